// Attention of many query rows over K/V cells, for one instruction set: softmax(q k + mask) v.
//
// Lanes are query rows: 64 of them, from any heads that share K/V, against 32 cells at a time, so
// that maxima and sums run down the lanes and nothing is ever added sideways. The softmax goes
// over the cells once, rescaling what it has when a larger score comes (Milakov and Gimelshein,
// arXiv:1805.02867). Blocks of cells that none of the rows sees are passed over.

#pragma once

#include "lanes.h"
#include "types.h"

namespace gemloom {
namespace {

constexpr int ROWS = 64, CELLS = 32, VECTORS = ROWS / PANEL;
constexpr int N = 4, P = Lanes::PANELS_AT_ONCE;
constexpr float HIDDEN = -1e30f;  // finite: minus infinity less itself would be no number

// c[i][...] = c[i][...] * factor + sum over j of a[i * ai + j * aj] * b[j][...], for N i's and P
// vectors; rows of b and c are ROWS wide. Without a factor c begins at zero.
inline void multiply(const float *a, int64_t ai, int64_t aj, const float *b, int64_t count,
                     const float *factor, float *c) {
    Lanes::Floats sums[N][P];
    for (int i = 0; i < N; i++) {
        for (int p = 0; p < P; p++) {
            if (factor) {
                const Lanes::Floats old = Lanes::load(c + i * ROWS + p * PANEL);
                sums[i][p] = Lanes::mul(old, Lanes::load(factor + p * PANEL));
            } else {
                sums[i][p] = Lanes::zero();
            }
        }
    }
    for (int64_t j = 0; j < count; j++) {
        Lanes::Floats row[P];
        for (int p = 0; p < P; p++) row[p] = Lanes::load(b + j * ROWS + p * PANEL);
        for (int i = 0; i < N; i++) {
            const Lanes::Floats one = Lanes::floats(a[i * ai + j * aj]);
            for (int p = 0; p < P; p++) sums[i][p] = Lanes::add(one, row[p], sums[i][p]);
        }
    }
    for (int i = 0; i < N; i++) {
        for (int p = 0; p < P; p++) Lanes::store(c + i * ROWS + p * PANEL, sums[i][p]);
    }
}

// e^x for x <= 0, never less than 1e-38: 2^whole * 2^rest, the latter by its Taylor series in ln 2.
inline Lanes::Floats exponential(Lanes::Floats x) {
    const Lanes::Floats scaled = Lanes::mul(Lanes::max(x, Lanes::floats(-86.0f)), Lanes::floats(1.44269504f));
    const Lanes::Ints whole = Lanes::rounded(scaled);
    const Lanes::Floats rest = Lanes::add(Lanes::floats(whole), Lanes::floats(-1.0f), scaled);
    Lanes::Floats y = Lanes::floats(1.54035304e-4f);
    const float series[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
    for (float term : series) y = Lanes::add(y, rest, Lanes::floats(term));
    return Lanes::scaled_by_power(y, whole);
}

// State of one block of rows: everything transposed, [head_dim][ROWS] or [cells][ROWS].
struct Block {
    float *q, *sums, *k, *v;  // k and v: the cells at hand as float32 [CELLS][head_dim]
    alignas(64) float scores[CELLS][ROWS], largest[ROWS], total[ROWS], factor[ROWS];
};

inline void convert(const AttentionJob &job, const char *from, int64_t stride, int64_t first, float *to) {
    for (int64_t c = 0; c < CELLS; c++, to += job.head_dim) {
        const char *row = from + (first + c) * stride;
        for (int64_t d = 0; d < job.head_dim; d += PANEL) {
            Lanes::store(to + d, job.halves ? Lanes::halves(reinterpret_cast<const half *>(row) + d)
                                            : Lanes::load(reinterpret_cast<const float *>(row) + d));
        }
    }
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

inline void hide(const AttentionJob &job, int64_t first, Block &b) {
    for (int64_t r = 0; r < job.rows; r++) {
        for (int c = 0; c < CELLS; c++) {
            if (job.mask[r][first + c]) b.scores[c][r] = HIDDEN;
        }
    }
}

// Scores to weights; what was summed up before is to be multiplied by `factor`.
inline void soften(Block &b) {
    for (int p = 0; p < VECTORS; p++) {
        const int at = p * PANEL;
        const Lanes::Floats before = Lanes::load(b.largest + at);
        Lanes::Floats largest = before;
        for (int c = 0; c < CELLS; c++) largest = Lanes::max(largest, Lanes::load(b.scores[c] + at));
        const Lanes::Floats minus = Lanes::mul(largest, Lanes::floats(-1.0f)), one = Lanes::floats(1.0f);
        const Lanes::Floats factor = exponential(Lanes::add(before, one, minus));
        Lanes::Floats total = Lanes::mul(Lanes::load(b.total + at), factor);
        for (int c = 0; c < CELLS; c++) {
            const Lanes::Floats y = exponential(Lanes::add(Lanes::load(b.scores[c] + at), one, minus));
            total = Lanes::add(y, one, total);
            Lanes::store(b.scores[c] + at, y);
        }
        Lanes::store(b.largest + at, largest);
        Lanes::store(b.total + at, total);
        Lanes::store(b.factor + at, factor);
    }
}

inline void begin(const AttentionJob &job, Block &b) {
    for (int64_t r = 0; r < ROWS; r++) {
        b.largest[r] = HIDDEN;
        b.total[r] = 0.0f;
        for (int64_t d = 0; d < job.head_dim; d++) {
            b.q[d * ROWS + r] = r < job.rows ? job.q[r][d] * job.scale : 0.0f;
            b.sums[d * ROWS + r] = 0.0f;
        }
    }
}

inline void finish(const AttentionJob &job, const Block &b) {
    for (int64_t r = 0; r < job.rows; r++) {
        const float inverse = 1.0f / b.total[r];
        for (int64_t d = 0; d < job.head_dim; d++) job.out[r][d] = b.sums[d * ROWS + r] * inverse;
    }
}

void attend(const AttentionJob &job) {
    alignas(64) Block b;
    const int64_t size = job.head_dim;
    b.q = job.scratch;
    b.sums = b.q + size * ROWS;
    b.k = b.sums + size * ROWS;
    b.v = b.k + size * CELLS;
    begin(job, b);
    const int vectors = (job.rows + PANEL - 1) / PANEL;
    for (int64_t first = 0; first < job.cells; first += CELLS) {
        const Sight seen = sight(job, first);
        if (seen == NONE) continue;
        convert(job, job.k, job.k_stride, first, b.k);
        convert(job, job.v, job.v_stride, first, b.v);
        for (int p = 0; p < vectors; p += P) {
            for (int c = 0; c < CELLS; c += N) {
                multiply(b.k + c * size, size, 1, b.q + p * PANEL, size, nullptr, b.scores[c] + p * PANEL);
            }
        }
        if (seen == SOME) hide(job, first, b);
        soften(b);
        for (int p = 0; p < vectors; p += P) {
            for (int64_t d = 0; d < size; d += N) {
                float *sums = b.sums + d * ROWS + p * PANEL;
                multiply(b.v + d, 1, size, b.scores[0] + p * PANEL, CELLS, b.factor + p * PANEL, sums);
            }
        }
    }
    finish(job, b);
}

}  // namespace

}  // namespace gemloom
