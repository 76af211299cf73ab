// Matrix products over packed weights, and the activations' way to 8 bits, for one instruction set.
//
// A tile is `N` rows of activations times `P` panels of 16 weights each. Of each run of 32 columns
// its dot products are summed in int32, exactly, and then scaled into float sums, run after run:
// so a result does not depend on the tile that computed it.

#pragma once

#include "lanes.h"
#include "types.h"

namespace gemloom {
namespace {

// f(0), f(1) ... f(N-1) with the index known to the compiler, so that arrays stay in registers.
template <int I> struct Index {
    static constexpr int value = I;
    constexpr operator int() const { return I; }
};

template <int N, int I = 0, class F> [[gnu::always_inline]] inline void repeat(F &&f) {
    if constexpr (I < N) {
        f(Index<I>{});
        repeat<N, I + 1>(f);
    }
}

constexpr int log2_of(int x) { return x <= 1 ? 0 : 1 + log2_of(x / 2); }

// Vector w(J) of a run, as unsigned bytes. (One overload for each shape of Run.)

template <int J> [[gnu::always_inline]] inline Lanes::Ints nibble(const uint8_t (&v)[4][VECTOR]) {
    if constexpr (J % 2) return Lanes::bits(Lanes::right<4>(Lanes::load(v[J / 2])), 0x0f);
    else return Lanes::bits(Lanes::load(v[J / 2]), 0x0f);
}

template <int N> [[gnu::always_inline]] inline Lanes::Ints shift(Lanes::Ints w) {
    if constexpr (N < 0) return Lanes::right<-N>(w);
    else if constexpr (N > 0) return Lanes::left<N>(w);
    else return w;
}

template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q4_0::Run &run) {
    return nibble<J>(run.nibbles);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q4_K::Run &run) {
    return nibble<J>(run.nibbles);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q5_K::Run &run) {
    return Lanes::merge(nibble<J>(run.nibbles), shift<4 - J>(Lanes::load(run.ones)), 0x10);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q6_K::Run &run) {
    Lanes::Ints high = shift<4 - J % 4 * 2>(Lanes::load(run.twos[J / 4]));
    return Lanes::merge(nibble<J>(run.nibbles), high, 0x30);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q6_K_bytes::Run &run) {
    return Lanes::load(run.bytes[J]);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const TQ2_0::Run &run) {
    return Lanes::bits(shift<-(J % 4) * 2>(Lanes::load(run.twos[J / 4])), 0x03);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q8_0::Run &run) {
    if constexpr (Lanes::SIGNED) return Lanes::flip(Lanes::load(run.bytes[J]), 0x80);
    else return Lanes::load(run.bytes[J]);
}

// Scales and minima of 16 rows in a run; H is the half of the run.

template <class W, int H> [[gnu::always_inline]] inline Lanes::Floats
scale(const typename W::Record &record, [[maybe_unused]] const typename W::Run &run) {
    Lanes::Floats d = Lanes::halves(record.scale);
    if constexpr (W::SCALES == 2) return Lanes::mul(d, Lanes::signed_bytes(run.scale[H]));
    else if constexpr (W::MINIMUM) return Lanes::mul(d, Lanes::unsigned_bytes(run.scale));
    else return d;
}

template <class W> [[gnu::always_inline]] inline Lanes::Floats
minimum(const typename W::Record &record, const typename W::Run &run) {
    return Lanes::mul(Lanes::halves(record.minimum), Lanes::unsigned_bytes(run.minimum));
}

// Where the integer sums of part H of run b begin: at minus OFFSET times the sum of its activations.
template <class W> [[gnu::always_inline]] inline Lanes::Ints
start(const Activations &x, int64_t b, int H) {
    constexpr int offset = Lanes::SIGNED && W::OFFSET == 128 ? 0 : W::OFFSET;
    if constexpr (offset == 0) return Lanes::ints(0);
    int32_t minus = x.minus[2 * b + H];
    if constexpr (W::SCALES == 1) minus += x.minus[2 * b + 1];
    return Lanes::left<log2_of(offset)>(Lanes::ints(minus));
}

template <class W, int N, int P> struct Tile {
    // Adds run b (of the row) to sums[N][P], from P records of which the run is number r.
    [[gnu::always_inline]] static inline void
    run(const typename W::Record *w, int r, const Activations *x, int64_t b,
        float (&sums)[N][P * PANEL]) {
        constexpr int J = 8 / W::SCALES;
        repeat<W::SCALES>([&](auto h) {
            constexpr int H = decltype(h)::value;
            Lanes::Ints dots[N][P];
            repeat<N>([&](auto i) {
                Lanes::Ints from = start<W>(x[i], b, H);
                repeat<P>([&](auto p) { dots[i][p] = from; });
            });
            repeat<J>([&](auto j) {
                constexpr int V = H * J + decltype(j)::value;
                Lanes::Ints v[P];
                repeat<P>([&](auto p) { v[p] = vector<V>(w[p].runs[r]); });
                repeat<N>([&](auto i) {
                    Lanes::Ints four = Lanes::four(x[i].values + b * RUN + V * 4);
                    repeat<P>([&](auto p) { dots[i][p] = Lanes::dot(dots[i][p], v[p], four); });
                });
            });
            repeat<P>([&](auto p) {
                const Lanes::Floats s = scale<W, H>(w[p], w[p].runs[r]);
                Lanes::Floats m;
                if constexpr (W::MINIMUM) m = minimum<W>(w[p], w[p].runs[r]);
                repeat<N>([&](auto i) {
                    float *at = sums[i] + p * PANEL;
                    Lanes::Floats sum = Lanes::load(at);
                    const Lanes::Floats dot = Lanes::mul(Lanes::floats(dots[i][p]), Lanes::floats(x[i].scale[b]));
                    sum = Lanes::add(dot, s, sum);
                    if constexpr (W::MINIMUM) sum = Lanes::subtract(Lanes::floats(x[i].sum[b]), m, sum);
                    Lanes::store(at, sum);
                });
            });
        });
    }

    // Rows `at` to at + N of the job times P panels from `panel` on.
    static void compute(const Job &job, int64_t at, int panel) {
        constexpr int RUNS = W::BLOCK / RUN;
        alignas(64) float sums[N][P * PANEL] = {};
        Activations x[N];
        for (int i = 0; i < N; i++) x[i] = job.x[at + i];
        auto *w = static_cast<const typename W::Record *>(job.group) + panel;
        for (int64_t b = 0; b < job.k / RUN; w += PANELS) {
            for (int r = 0; r < RUNS; r++, b++) {
                if constexpr (N <= 4) prefetch(&w[0].runs[r]);
                run(w, r, x, b, sums);
            }
        }
        const int64_t rows = job.rows - panel * PANEL, whole = rows < P * PANEL ? rows : P * PANEL;
        for (int i = 0; i < N; i++) {
            float *y = job.y[at + i] + panel * PANEL;
            for (int64_t r = 0; r < whole; r++) y[r] = sums[i][r];
        }
    }

    // The same run of the next block: one row alone waits for memory.
    [[gnu::always_inline]] static inline void prefetch(const typename W::Run *run) {
        constexpr int AHEAD = PANELS * sizeof(typename W::Record);
        repeat<P>([&](auto p) {
            const char *from = reinterpret_cast<const char *>(run) + p * sizeof(typename W::Record);
            for (unsigned i = 0; i < sizeof(typename W::Run); i += 64) {
                __builtin_prefetch(from + AHEAD + i);
            }
        });
    }
};

template <class W, int N> void panels(const Job &job, int64_t at) {
    constexpr int P = Lanes::PANELS_AT_ONCE;
    for (int p = 0; p < PANELS && p * PANEL < job.rows; p += P) Tile<W, N, P>::compute(job, at, p);
}

template <class W> void tiles(const Job &job) {
    for (int64_t at = 0; at < job.n;) {
        const int64_t left = job.n - at;
        if constexpr (Lanes::ROWS_AT_ONCE >= 6) {
            if (left >= 6 && left != 8) {
                panels<W, 6>(job, at);
                at += 6;
                continue;
            }
        }
        if (left >= 4) {
            panels<W, 4>(job, at);
            at += 4;
        } else if (left >= 2) {
            panels<W, 2>(job, at);
            at += 2;
        } else {
            panels<W, 1>(job, at);
            at += 1;
        }
    }
}

template <class W> void product(const Job &job) { tiles<W>(job); }

// Putting six bits together takes as long as multiplying with four rows: many rows have it done once.
template <> void product<Q6_K>(const Job &job) {
    if (job.n < Job::MANY) return tiles<Q6_K>(job);
    auto *from = static_cast<const Q6_K::Record *>(job.group);
    auto *to = static_cast<Q6_K_bytes::Record *>(job.scratch);
    for (int64_t i = 0; i < job.k / Q6_K::BLOCK * PANELS; i++) {
        __builtin_memcpy(to[i].scale, from[i].scale, sizeof to[i].scale);
        for (int r = 0; r < 8; r++) {
            __builtin_memcpy(to[i].runs[r].scale, from[i].runs[r].scale, sizeof to[i].runs[r].scale);
            repeat<8>([&](auto j) {
                Lanes::store(to[i].runs[r].bytes[j], vector<decltype(j)::value>(from[i].runs[r]));
            });
        }
    }
    Job wide = job;
    wide.group = job.scratch;
    tiles<Q6_K_bytes>(wide);
}

// Runs `first` to `last` of a row x [k] into its Activations.
void quantize(const float *x, int64_t k, int64_t first, int64_t last, void *row) {
    const Activations to(row, k);
    for (int64_t b = first; b < last; b++) {
        const Lanes::Floats low = Lanes::load(x + b * RUN), high = Lanes::load(x + b * RUN + PANEL);
        const float largest = Lanes::largest(low, high);
        const float scale = largest < 1e-35f ? 0.0f : largest / 127.0f;  // 1 / scale is finite
        const Lanes::Floats inverse = Lanes::floats(scale == 0.0f ? 0.0f : 1.0f / scale);
        int8_t *values = const_cast<int8_t *>(to.values) + b * RUN;
        const int32_t a = Lanes::store_rounded(values, Lanes::mul(low, inverse));
        const int32_t c = Lanes::store_rounded(values + PANEL, Lanes::mul(high, inverse));
        const_cast<float *>(to.scale)[b] = scale;
        const_cast<float *>(to.sum)[b] = scale * static_cast<float>(a + c);
        const_cast<int32_t *>(to.minus)[2 * b] = -a;
        const_cast<int32_t *>(to.minus)[2 * b + 1] = -c;
    }
}

}  // namespace

}  // namespace gemloom
