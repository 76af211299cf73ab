// Attention of query rows over K/V cells, for one instruction set: softmax(q k + mask) v.
//
// Lanes are query rows: up to 64, from any heads that share K/V, against 32 cells at a time, so
// that maxima and sums run down the lanes and nothing is ever added sideways. Segments of cells are
// computed each by itself, rescaling what they have when a larger score comes (Milakov and
// Gimelshein, arXiv:1805.02867), and merged in their order: a row's result does not depend on the
// rows beside it, nor on the threads. Blocks of cells that none of the rows sees are passed over.

#pragma once

#include "lanes.h"
#include "types.h"

namespace gemloom {
namespace {

constexpr int CELLS = 32;
// Scores that are finite, since minus infinity less itself is no number: of a cell that a row does not
// see, and of a row that has seen none yet.
constexpr float HIDDEN = -1e30f, UNSEEN = -1e29f;

// e^x for x <= 0, and exactly 0 below -88.03: 2^whole * 2^rest, the latter by its Taylor series in
// ln 2. At -127 rest is 0, and a power of -127 takes all bits from 1.
inline Lanes::Floats exponential(Lanes::Floats x) {
    // In this order x86 hands on what is no number.
    const Lanes::Floats scaled = Lanes::max(Lanes::floats(-127.0f), Lanes::mul(x, Lanes::floats(1.44269504f)));
    const Lanes::Ints whole = Lanes::rounded(scaled);
    const Lanes::Floats rest = Lanes::add(Lanes::floats(whole), Lanes::floats(-1.0f), scaled);
    Lanes::Floats y = Lanes::floats(1.54035304e-4f);
    const float series[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
    for (float term : series) y = Lanes::add(y, rest, Lanes::floats(term));
    return Lanes::scaled_by_power(y, whole);
}

inline Lanes::Floats minus(Lanes::Floats a, Lanes::Floats b) {
    return Lanes::add(b, Lanes::floats(-1.0f), a);
}

enum Sight { NONE, SOME, ALL };

// Which of the 32 cells from `first` the rows see, token after token.
inline Sight sight(const AttentionJob &job, int64_t first) {
    int64_t hidden = 0, tokens = 0;
    for (int64_t r = 0; r < job.rows; r++) {
        if (r && job.mask[r] == job.mask[r - 1]) continue;
        tokens++;
        for (int c = 0; c < CELLS; c++) hidden += job.mask[r][first + c] != 0;
    }
    return hidden == tokens * CELLS ? NONE : hidden ? SOME : ALL;
}

// 32 cells from `first` as float32 [CELLS][head_dim].
inline void widen(const AttentionJob &job, const char *from, int64_t stride, int64_t first, float *to) {
    for (int64_t c = 0; c < CELLS; c++, to += job.head_dim) {
        const char *row = from + (first + c) * stride;
        for (int64_t d = 0; d < job.head_dim; d += PANEL) {
            Lanes::store(to + d, job.halves ? Lanes::halves(reinterpret_cast<const half *>(row) + d)
                                            : Lanes::load(reinterpret_cast<const float *>(row) + d));
        }
    }
}

// Rows in lanes, WIDTH of them: everything is [head_dim][WIDTH] or [cells][WIDTH].
template <int WIDTH> struct Attention {
    static constexpr int VECTORS = WIDTH / PANEL;
    static constexpr int P = Lanes::PANELS_AT_ONCE < VECTORS ? Lanes::PANELS_AT_ONCE : VECTORS;
    static constexpr int N = Lanes::PANELS_AT_ONCE > P ? 8 : 4;

    // A segment's sums, unscaled, with the largest score and the total of the weights of each row.
    struct Part {
        float largest[WIDTH], total[WIDTH], sums[];

        static Part &at(float *memory) { return *reinterpret_cast<Part *>(memory); }
    };

    // c[i] = c[i] * factor + sum over j of a[i * ai + j * aj] * b[j], for N i's and P vectors of
    // lanes. Without a factor c begins at zero.
    static void multiply(const float *a, int64_t ai, int64_t aj, const float *b, int64_t count,
                         const float *factor, float *c) {
        Lanes::Floats sums[N][P];
        for (int i = 0; i < N; i++) {
            for (int p = 0; p < P; p++) {
                const float *old = c + i * WIDTH + p * PANEL;
                sums[i][p] = factor ? Lanes::mul(Lanes::load(old), Lanes::load(factor + p * PANEL)) : Lanes::zero();
            }
        }
        for (int64_t j = 0; j < count; j++) {
            Lanes::Floats row[P];
            for (int p = 0; p < P; p++) row[p] = Lanes::load(b + j * WIDTH + p * PANEL);
            for (int i = 0; i < N; i++) {
                const Lanes::Floats one = Lanes::floats(a[i * ai + j * aj]);
                for (int p = 0; p < P; p++) sums[i][p] = Lanes::add(one, row[p], sums[i][p]);
            }
        }
        for (int i = 0; i < N; i++) {
            for (int p = 0; p < P; p++) Lanes::store(c + i * WIDTH + p * PANEL, sums[i][p]);
        }
    }

    static void hide(const AttentionJob &job, int64_t first, float (&scores)[CELLS][WIDTH]) {
        for (int64_t r = 0; r < job.rows; r++) {
            for (int c = 0; c < CELLS; c++) {
                if (job.mask[r][first + c]) scores[c][r] = HIDDEN;
            }
        }
    }

    // Scores become weights; what was summed up before is to be multiplied by `factor`.
    static void soften(float (&scores)[CELLS][WIDTH], Part &part, float (&factor)[WIDTH]) {
        for (int at = 0; at < WIDTH; at += PANEL) {
            const Lanes::Floats before = Lanes::load(part.largest + at), one = Lanes::floats(1.0f);
            Lanes::Floats largest = before;
            for (auto &row : scores) largest = Lanes::max(largest, Lanes::load(row + at));
            const Lanes::Floats shrunk = exponential(minus(before, largest));
            Lanes::Floats total = Lanes::mul(Lanes::load(part.total + at), shrunk);
            for (auto &row : scores) {
                const Lanes::Floats weight = exponential(minus(Lanes::load(row + at), largest));
                total = Lanes::add(weight, one, total);
                Lanes::store(row + at, weight);
            }
            Lanes::store(part.largest + at, largest);
            Lanes::store(part.total + at, total);
            Lanes::store(factor + at, shrunk);
        }
    }

    static void clear(int64_t size, Part &part) {
        for (float &x : part.largest) x = UNSEEN;
        for (float &x : part.total) x = 0.0f;
        for (int64_t i = 0; i < size * WIDTH; i++) part.sums[i] = 0.0f;
    }

    static void transpose(const AttentionJob &job, float *q) {
        for (int64_t r = 0; r < WIDTH; r++) {
            for (int64_t d = 0; d < job.head_dim; d++) {
                q[d * WIDTH + r] = r < job.rows ? job.q[r][d] * job.scale : 0.0f;
            }
        }
    }

    // Cells `first` to `last` into a part; `q` is from transpose(), `cells` memory for two blocks.
    static void attend(const AttentionJob &job, const float *q, int64_t first, int64_t last, float *cells, Part &part) {
        alignas(64) float scores[CELLS][WIDTH], factor[WIDTH];
        const int64_t size = job.head_dim;
        float *k = cells, *v = cells + CELLS * size;
        clear(size, part);
        for (; first < last; first += CELLS) {
            const Sight seen = sight(job, first);
            if (seen == NONE) continue;
            widen(job, job.k, job.k_stride, first, k);
            widen(job, job.v, job.v_stride, first, v);
            for (int p = 0; p < WIDTH; p += P * PANEL) {
                for (int c = 0; c < CELLS; c += N) multiply(k + c * size, size, 1, q + p, size, nullptr, scores[c] + p);
            }
            if (seen == SOME) hide(job, first, scores);
            soften(scores, part, factor);
            for (int p = 0; p < WIDTH; p += P * PANEL) {
                for (int64_t d = 0; d < size; d += N) {
                    multiply(v + d, 1, size, scores[0] + p, CELLS, factor + p, part.sums + d * WIDTH + p);
                }
            }
        }
    }

    static void merge(int64_t size, const Part &from, Part &into) {
        for (int at = 0; at < WIDTH; at += PANEL) {
            const Lanes::Floats a = Lanes::load(into.largest + at), b = Lanes::load(from.largest + at);
            const Lanes::Floats largest = Lanes::max(a, b);
            const Lanes::Floats fa = exponential(minus(a, largest)), fb = exponential(minus(b, largest));
            auto add = [&](float *x, const float *y) {
                Lanes::store(x, Lanes::add(Lanes::load(y), fb, Lanes::mul(Lanes::load(x), fa)));
            };
            Lanes::store(into.largest + at, largest);
            add(into.total + at, from.total + at);
            for (int64_t d = 0; d < size; d++) add(into.sums + d * WIDTH + at, from.sums + d * WIDTH + at);
        }
    }

    static void finish(const AttentionJob &job, const Part &part) {
        for (int64_t r = 0; r < job.rows; r++) {
            const float inverse = 1.0f / part.total[r];
            for (int64_t d = 0; d < job.head_dim; d++) job.out[r][d] = part.sums[d * WIDTH + r] * inverse;
        }
    }
};

template <int WIDTH> constexpr AttentionKernels attention_of = {
    [](const AttentionJob &job, float *q) { Attention<WIDTH>::transpose(job, q); },
    [](const AttentionJob &job, const float *q, int64_t first, int64_t last, float *cells, float *part) {
        Attention<WIDTH>::attend(job, q, first, last, cells, Attention<WIDTH>::Part::at(part));
    },
    [](int64_t size, float *from, float *into) {
        Attention<WIDTH>::merge(size, Attention<WIDTH>::Part::at(from), Attention<WIDTH>::Part::at(into));
    },
    [](const AttentionJob &job, float *part) {
        Attention<WIDTH>::finish(job, Attention<WIDTH>::Part::at(part));
    },
};

}  // namespace
}  // namespace gemloom
