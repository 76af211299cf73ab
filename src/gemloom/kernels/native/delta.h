// What a LoRA adapter adds to a product, for one instruction set: y += s B (A x), in float32.

#pragma once

#include "lanes.h"
#include "types.h"

namespace gemloom {
namespace {

inline Lanes::Floats wide(const float *p) { return Lanes::load(p); }
inline Lanes::Floats wide(const half *p) { return Lanes::halves(p); }

inline float one_of(const float *p) { return *p; }
inline float one_of(const half *p) {
    alignas(64) half padded[PANEL] = {*p};
    alignas(64) float values[PANEL];
    Lanes::store(values, Lanes::halves(padded));
    return values[0];
}

// N rows of x meet all r rows of A: t[i][j] = s[i] * (x[i] . a[j]). Lanes run along k.
template <int N, class T> void inner(const DeltaJob &job, int64_t at, float *t) {
    constexpr int R = N == 1 && Lanes::PANELS_AT_ONCE > 1 ? 8 : 4;  // rows of A at once: enough sums to hide their latency
    const int64_t whole = job.k / PANEL * PANEL;
    for (int64_t j = 0; j < job.r; j += R) {
        Lanes::Floats sums[N][R];
        for (auto &row : sums) for (auto &sum : row) sum = Lanes::zero();
        const T *a[R];  // past the last row the last again
        for (int q = 0; q < R; q++) a[q] = static_cast<const T *>(job.a) + (j + q < job.r ? j + q : job.r - 1) * job.k;
        for (int64_t d = 0; d < whole; d += PANEL) {
            Lanes::Floats factors[R];
            for (int q = 0; q < R; q++) {
                __builtin_prefetch(a[q] + d + R * job.k);  // hardware does not follow into the next rows
                factors[q] = wide(a[q] + d);
            }
            for (int i = 0; i < N; i++) {
                const Lanes::Floats x = Lanes::load(job.x[at + i] + d);
                for (int q = 0; q < R; q++) sums[i][q] = Lanes::add(x, factors[q], sums[i][q]);
            }
        }
        for (int i = 0; i < N; i++) {
            for (int q = 0; q < R && j + q < job.r; q++) {
                float sum = Lanes::sum(sums[i][q]);
                for (int64_t d = whole; d < job.k; d++) sum += job.x[at + i][d] * one_of(a[q] + d);
                t[i * job.r + j + q] = sum * job.scale[at + i];
            }
        }
    }
}

// y[i] += sum over j of t[i][j] * b[j], columns `first` to `last`. Lanes run along m.
template <int N, class T> void outer(const DeltaJob &job, int64_t at, const float *t) {
    const T *b = static_cast<const T *>(job.b);
    constexpr int P = (N == 1 ? 2 : 1) * Lanes::PANELS_AT_ONCE;
    int64_t c = job.first;
    for (; c + P * PANEL <= job.last; c += P * PANEL) {
        Lanes::Floats sums[N][P];
        for (int i = 0; i < N; i++) {
            for (int p = 0; p < P; p++) sums[i][p] = Lanes::load(job.y[at + i] + c + p * PANEL);
        }
        for (int64_t j = 0; j < job.r; j++) {
            Lanes::Floats row[P];
            const T *here = b + j * job.b_stride + c;
            for (int p = 0; p < P; p++) {
                __builtin_prefetch(here + (P + p) * PANEL);
                row[p] = wide(here + p * PANEL);
            }
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
            for (int64_t j = 0; j < job.r; j++) sum = __builtin_fmaf(t[i * job.r + j], one_of(b + j * job.b_stride + c), sum);
            job.y[at + i][c] = sum;
        }
    }
}

template <int N, class T> void delta_rows(const DeltaJob &job, int64_t at) {
    inner<N, T>(job, at, job.scratch);
    outer<N, T>(job, at, job.scratch);
}

template <class T> void delta_of(const DeltaJob &job) {
    int64_t at = 0;
    for (; job.n - at >= 4; at += 4) delta_rows<4, T>(job, at);
    for (; job.n - at >= 1; at += 1) delta_rows<1, T>(job, at);
}

void delta(const DeltaJob &job) { return job.halves ? delta_of<half>(job) : delta_of<float>(job); }

}  // namespace
}  // namespace gemloom
