// What a LoRA adapter adds to a product, for one instruction set: y += s B (A x), in float32.

#pragma once

#include "lanes.h"
#include "types.h"

namespace gemloom {
namespace {

// N rows of x meet all r rows of A: t[i][j] = s[i] * (x[i] . a[j]). Lanes run along k.
template <int N> void inner(const DeltaJob &job, int64_t at, float *t) {
    constexpr int R = 4;  // rows of A at once
    const int64_t whole = job.k / PANEL * PANEL;
    for (int64_t j = 0; j < job.r; j += R) {
        Lanes::Floats sums[N][R];
        for (auto &row : sums) for (auto &sum : row) sum = Lanes::zero();
        const float *a[R];  // past the last row the last again
        for (int q = 0; q < R; q++) a[q] = job.a + (j + q < job.r ? j + q : job.r - 1) * job.k;
        for (int64_t d = 0; d < whole; d += PANEL) {
            Lanes::Floats factors[R];
            for (int q = 0; q < R; q++) factors[q] = Lanes::load(a[q] + d);
            for (int i = 0; i < N; i++) {
                const Lanes::Floats x = Lanes::load(job.x[at + i] + d);
                for (int q = 0; q < R; q++) sums[i][q] = Lanes::add(x, factors[q], sums[i][q]);
            }
        }
        for (int i = 0; i < N; i++) {
            for (int q = 0; q < R && j + q < job.r; q++) {
                float sum = Lanes::sum(sums[i][q]);
                for (int64_t d = whole; d < job.k; d++) sum += job.x[at + i][d] * a[q][d];
                t[i * job.r + j + q] = sum * job.scale[at + i];
            }
        }
    }
}

// y[i] += sum over j of t[i][j] * b[j], columns `first` to `last`. Lanes run along m.
template <int N> void outer(const DeltaJob &job, int64_t at, const float *t) {
    constexpr int P = Lanes::PANELS_AT_ONCE;
    int64_t c = job.first;
    for (; c + P * PANEL <= job.last; c += P * PANEL) {
        Lanes::Floats sums[N][P];
        for (int i = 0; i < N; i++) {
            for (int p = 0; p < P; p++) sums[i][p] = Lanes::load(job.y[at + i] + c + p * PANEL);
        }
        for (int64_t j = 0; j < job.r; j++) {
            Lanes::Floats row[P];
            for (int p = 0; p < P; p++) row[p] = Lanes::load(job.b + j * job.b_stride + c + p * PANEL);
            for (int i = 0; i < N; i++) {
                const Lanes::Floats one = Lanes::floats(t[i * job.r + j]);
                for (int p = 0; p < P; p++) sums[i][p] = Lanes::add(one, row[p], sums[i][p]);
            }
        }
        for (int i = 0; i < N; i++) {
            for (int p = 0; p < P; p++) Lanes::store(job.y[at + i] + c + p * PANEL, sums[i][p]);
        }
    }
    for (; c < job.last; c++) {
        for (int i = 0; i < N; i++) {
            float sum = job.y[at + i][c];
            for (int64_t j = 0; j < job.r; j++) sum = __builtin_fmaf(t[i * job.r + j], job.b[j * job.b_stride + c], sum);
            job.y[at + i][c] = sum;
        }
    }
}

template <int N> void delta_rows(const DeltaJob &job, int64_t at) {
    inner<N>(job, at, job.scratch);
    outer<N>(job, at, job.scratch);
}

void delta(const DeltaJob &job) {
    int64_t at = 0;
    for (; job.n - at >= 4; at += 4) delta_rows<4>(job, at);
    for (; job.n - at >= 1; at += 1) delta_rows<1>(job, at);
}

}  // namespace
}  // namespace gemloom
