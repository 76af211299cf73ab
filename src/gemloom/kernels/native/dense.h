// Products with matrices of bfloat16 as the file has them, in float32, for one instruction set.

#pragma once

#include "lanes.h"
#include "types.h"

namespace gemloom {
namespace {

// N rows of activations meet R rows of weights. Lanes run along k and are added up in the end, so a
// result does not depend on the tile that computed it.
template <int N, int R> void dense_tile(const DenseJob &job, int64_t at, int64_t row) {
    const float *x[N];
    const uint16_t *w[R];
    Lanes::Floats sums[N][R];
    for (int i = 0; i < N; i++) x[i] = job.x[at + i];
    for (int r = 0; r < R; r++) w[r] = reinterpret_cast<const uint16_t *>(job.w + (row + r) * job.w_stride);
    for (auto &each : sums) for (auto &sum : each) sum = Lanes::zero();
    for (int64_t d = 0; d < job.k; d += PANEL) {
        Lanes::Floats factors[R];
        for (int r = 0; r < R; r++) {
            factors[r] = Lanes::bfloats(w[r] + d);
            if (N == 1) __builtin_prefetch(reinterpret_cast<const char *>(w[r] + d) + R * job.w_stride);  // waits for memory
        }
        for (int i = 0; i < N; i++) {
            const Lanes::Floats one = Lanes::load(x[i] + d);
            for (int r = 0; r < R; r++) sums[i][r] = Lanes::add(one, factors[r], sums[i][r]);
        }
    }
    for (int i = 0; i < N; i++) {
        for (int r = 0; r < R; r++) job.y[at + i][row + r] = Lanes::sum(sums[i][r]);
    }
}

template <int N> void dense_rows(const DenseJob &job, int64_t at) {
    constexpr int R = Lanes::PANELS_AT_ONCE > 1 ? 4 : 2;
    int64_t row = job.first;
    for (; row + R <= job.last; row += R) dense_tile<N, R>(job, at, row);
    for (; row < job.last; row++) dense_tile<N, 1>(job, at, row);
}

void dense(const DenseJob &job) {
    constexpr int N = Lanes::PANELS_AT_ONCE > 1 ? 6 : 2;
    int64_t at = 0;
    for (; at + N <= job.n; at += N) dense_rows<N>(job, at);
    for (; at < job.n; at++) dense_rows<1>(job, at);
}

}  // namespace
}  // namespace gemloom
