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

// Vector w(J) of panel p in a run, as unsigned bytes. (One overload for each shape of Run.)

template <int J> [[gnu::always_inline]] inline Lanes::Ints nibble(const uint8_t (&v)[4][VECTOR]) {
    if constexpr (J % 2) return Lanes::bits(Lanes::right<4>(Lanes::load(v[J / 2])), 0x0f);
    else return Lanes::bits(Lanes::load(v[J / 2]), 0x0f);
}

template <int N> [[gnu::always_inline]] inline Lanes::Ints shift(Lanes::Ints w) {
    if constexpr (N < 0) return Lanes::right<-N>(w);
    else if constexpr (N > 0) return Lanes::left<N>(w);
    else return w;
}

template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q4_0::Run &run, int p) {
    return nibble<J>(run.nibbles[p]);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q4_K::Run &run, int p) {
    return nibble<J>(run.nibbles[p]);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q5_K::Run &run, int p) {
    return Lanes::merge(nibble<J>(run.nibbles[p]), shift<4 - J>(Lanes::load(run.ones[p])), 0x10);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q6_K::Run &run, int p) {
    Lanes::Ints high = shift<4 - J % 4 * 2>(Lanes::load(run.twos[p][J / 4]));
    return Lanes::merge(nibble<J>(run.nibbles[p]), high, 0x30);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const TQ2_0::Run &run, int p) {
    return Lanes::bits(shift<-(J % 4) * 2>(Lanes::load(run.twos[p][J / 4])), 0x03);
}
template <int J> [[gnu::always_inline]] inline Lanes::Ints vector(const Q8_0::Run &run, int p) {
    if constexpr (Lanes::SIGNED) return Lanes::flip(Lanes::load(run.bytes[p][J]), 0x80);
    else return Lanes::load(run.bytes[p][J]);
}
template <int J, int S, bool M> [[gnu::always_inline]] inline Lanes::Ints vector(const UnpackedRun<S, M> &run, int p) {
    return Lanes::load(run.bytes[p][J]);
}

// Scales and minima of panel p in a run; H is the half of the run.

template <class W, int H> [[gnu::always_inline]] inline Lanes::Floats
scale([[maybe_unused]] const typename W::Record &record, [[maybe_unused]] const typename W::Run &run, int p) {
    if constexpr (unpacked<W>) return Lanes::load(run.factors[H] + p * PANEL);
    else {
        const Lanes::Floats d = Lanes::halves(record.scale + p * PANEL);
        if constexpr (W::SCALES == 2) return Lanes::mul(d, Lanes::signed_bytes(run.scale[H] + p * PANEL));
        else if constexpr (W::MINIMUM) return Lanes::mul(d, Lanes::unsigned_bytes(run.scale + p * PANEL));
        else return d;
    }
}

template <class W> [[gnu::always_inline]] inline Lanes::Floats
minimum([[maybe_unused]] const typename W::Record &record, const typename W::Run &run, int p) {
    if constexpr (unpacked<W>) return Lanes::load(run.factors[W::SCALES] + p * PANEL);
    else return Lanes::mul(Lanes::halves(record.minimum + p * PANEL), Lanes::unsigned_bytes(run.minimum + p * PANEL));
}

// Where the integer sums of part H of a run begin: at minus OFFSET times the sum of its activations.
template <class W> [[gnu::always_inline]] inline Lanes::Ints
start(const Activations &x, int H) {
    constexpr int offset = Lanes::SIGNED && W::OFFSET == 128 ? 0 : W::OFFSET;
    if constexpr (offset == 0) return Lanes::ints(0);
    int32_t minus = x.minus[H];
    if constexpr (W::SCALES == 1) minus += x.minus[1];
    return Lanes::left<log2_of(offset)>(Lanes::ints(minus));
}

constexpr int AHEAD = 8192;  // bytes; 4 KiB and 16 KiB are slower
template <class W, int N, int P> struct Tile {
    using Sums = Lanes::Floats[N][P];

    // Adds what run r of a record gives, which is run b of the row, with P panels from `panel` on.
    [[gnu::always_inline]] static inline void
    add(const typename W::Record &w, int r, int panel, const Activations *const (&x)[N], int64_t b, Sums &sums) {
        constexpr int J = 8 / W::SCALES;
        const auto &run = w.runs[r];
        repeat<W::SCALES>([&](auto h) {
            constexpr int H = decltype(h)::value;
            Lanes::Ints dots[N][P];
            repeat<N>([&](auto i) {
                Lanes::Ints from = start<W>(x[i][b], H);
                repeat<P>([&](auto p) { dots[i][p] = from; });
            });
            repeat<J>([&](auto j) {
                constexpr int V = H * J + decltype(j)::value;
                Lanes::Ints v[P];
                repeat<P>([&](auto p) { v[p] = vector<V>(run, panel + p); });
                repeat<N>([&](auto i) {
                    Lanes::Ints four = Lanes::four(x[i][b].values + V * 4);
                    repeat<P>([&](auto p) { dots[i][p] = Lanes::dot(dots[i][p], v[p], four); });
                });
            });
            repeat<P>([&](auto p) {
                const Lanes::Floats s = scale<W, H>(w, run, panel + p);
                Lanes::Floats m;
                if constexpr (W::MINIMUM) m = minimum<W>(w, run, panel + p);
                repeat<N>([&](auto i) {
                    const Lanes::Floats dot = Lanes::mul(Lanes::floats(dots[i][p]), Lanes::floats(x[i][b].scale));
                    Lanes::Floats &sum = sums[i][p];
                    sum = Lanes::add(dot, s, sum);
                    if constexpr (W::MINIMUM) sum = Lanes::subtract(Lanes::floats(x[i][b].sum), m, sum);
                });
            });
        });
    }

    // Rows `at` to at + N of the job times P panels from `panel` on, runs `first` to `last`: those
    // before them are in y.
    static void compute(const Job &job, int64_t at, int panel, int64_t first, int64_t last) {
        constexpr int RUNS = W::BLOCK / RUN;
        const Activations *x[N];
        Sums sums;
        repeat<N>([&](auto i) {
            x[i] = job.x[at + i];
            const float *y = job.y[at + i] + panel * PANEL;
            repeat<P>([&](auto p) { sums[i][p] = first ? Lanes::load(y + p * PANEL) : Lanes::zero(); });
        });
        auto *w = static_cast<const typename W::Record *>(job.group);
        for (int64_t b = first; b < last; w++) {
            for (int r = 0; r < RUNS; r++, b++) {
                if constexpr (N <= 4 && !unpacked<W>) prefetch(w->runs[r]);
                add(*w, r, panel, x, b, sums);
            }
        }
        repeat<N>([&](auto i) {
            float *y = job.y[at + i] + panel * PANEL;
            repeat<P>([&](auto p) { Lanes::store(y + p * PANEL, sums[i][p]); });
        });
    }

    // What comes so much later: few rows wait for memory.
    [[gnu::always_inline]] static inline void prefetch(const typename W::Run &run) {
        const char *from = reinterpret_cast<const char *>(&run) + AHEAD;
        for (unsigned i = 0; i < sizeof run; i += 64) __builtin_prefetch(from + i);
    }
};

// Runs `first` to `last` of N rows with all panels. Sums and dots, N * P of each, stay in registers.
template <class W, int N> int64_t panels(const Job &job, int64_t at, int64_t first, int64_t last) {
    constexpr int P = N > 3 && Lanes::PANELS_AT_ONCE > 2 ? 2 : Lanes::PANELS_AT_ONCE;
    for (int p = 0; p < PANELS; p += P) Tile<W, N, P>::compute(job, at, p, first, last);
    return N;
}

template <class W> void tiles(const Job &job, int64_t first, int64_t last) {
    constexpr int N = Lanes::ROWS_AT_ONCE;
    for (int64_t at = 0; at < job.n;) {
        const int64_t left = job.n - at;
        if (left >= N && left != 8) at += panels<W, N>(job, at, first, last);
        else if (left >= 4) at += panels<W, 4>(job, at, first, last);
        else if (left >= 2) at += panels<W, 2>(job, at, first, last);
        else at += panels<W, 1>(job, at, first, last);
    }
}

// Runs `first` to `last` of the group, into the scratch.
template <class W> void unpack(const Job &job, int64_t first, int64_t last) {
    constexpr int RUNS = W::BLOCK / RUN;
    auto *to = static_cast<typename Unpacked<W>::Record *>(job.scratch);
    for (int64_t b = first; b < last; b++) {
        auto &from = static_cast<const typename W::Record *>(job.group)[b / RUNS];
        auto &run = from.runs[b % RUNS];
        auto &made = (to++)->runs[0];
        for (int p = 0; p < PANELS; p++) {
            repeat<W::SCALES>([&](auto h) {
                Lanes::store(made.factors[h] + p * PANEL, scale<W, decltype(h)::value>(from, run, p));
            });
            if constexpr (W::MINIMUM) Lanes::store(made.factors[W::SCALES] + p * PANEL, minimum<W>(from, run, p));
            repeat<8>([&](auto j) { Lanes::store(made.bytes[p][j], vector<decltype(j)::value>(run, p)); });
        }
    }
}

template <class W> void product(const Job &job) {
    const int64_t runs = job.k / RUN, step = Job::COLUMNS / RUN;
    if (job.n < Job::MANY) return tiles<W>(job, 0, runs);
    Job many = job;
    many.group = job.scratch;
    for (int64_t first = 0; first < runs; first += step) {
        const int64_t last = first + step < runs ? first + step : runs;
        unpack<W>(job, first, last);
        tiles<Unpacked<W>>(many, first, last);
    }
}

// Runs `first` to `last` of a row x [k] into its Activations.
void quantize(const float *x, int64_t first, int64_t last, Activations *row) {
    for (int64_t b = first; b < last; b++) {
        Activations &to = row[b];
        const Lanes::Floats low = Lanes::load(x + b * RUN), high = Lanes::load(x + b * RUN + PANEL);
        const float largest = Lanes::largest(low, high);
        to.scale = largest < 1e-35f ? 0.0f : largest / 127.0f;  // 1 / scale is finite
        const Lanes::Floats inverse = Lanes::floats(to.scale == 0.0f ? 0.0f : 1.0f / to.scale);
        to.minus[0] = -Lanes::store_rounded(to.values, Lanes::mul(low, inverse));
        to.minus[1] = -Lanes::store_rounded(to.values + PANEL, Lanes::mul(high, inverse));
        to.sum = to.scale * static_cast<float>(-to.minus[0] - to.minus[1]);
    }
}

}  // namespace

}  // namespace gemloom
