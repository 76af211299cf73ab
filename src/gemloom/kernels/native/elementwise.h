// What lies between products, for one instruction set: norms and gated activations.

#pragma once

#include "attention.h"
#include "lanes.h"

namespace gemloom {
namespace {

// y = (add + x / sqrt(mean(x^2) + eps) * weight) * scale over n values; without a weight, times 1;
// without something to add, the norm alone.
void norm(const float *x, const float *weight, const float *add, float scale, float eps, int64_t n, float *y) {
    Lanes::Floats squares[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
    const int64_t whole = n / PANEL * PANEL;
    for (int64_t i = 0; i < whole; i += PANEL) {
        const Lanes::Floats a = Lanes::load(x + i);
        squares[i / PANEL % 4] = Lanes::add(a, a, squares[i / PANEL % 4]);
    }
    alignas(64) float lanes[4][PANEL];
    float sum = 0.0f;
    for (int s = 0; s < 4; s++) {
        Lanes::store(lanes[s], squares[s]);
        for (float lane : lanes[s]) sum += lane;
    }
    for (int64_t i = whole; i < n; i++) sum += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
    for (int64_t i = 0; i < whole; i += PANEL) {
        Lanes::Floats a = Lanes::mul(Lanes::load(x + i), Lanes::floats(factor));
        if (weight) a = Lanes::mul(a, Lanes::load(weight + i));
        if (add) {
            a = Lanes::add(a, Lanes::floats(1.0f), Lanes::load(add + i));
            a = Lanes::mul(a, Lanes::floats(scale));
        }
        Lanes::store(y + i, a);
    }
    for (int64_t i = whole; i < n; i++) {
        y[i] = x[i] * factor * (weight ? weight[i] : 1.0f);
        if (add) y[i] = (y[i] + add[i]) * scale;
    }
}

// gelu(x) * up, with gelu(x) = x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form.
inline Lanes::Floats gelu_mul(Lanes::Floats x, Lanes::Floats up) {
    const Lanes::Floats cubic = Lanes::add(Lanes::mul(x, x), Lanes::floats(0.044715f), Lanes::floats(1.0f));
    const Lanes::Floats twice = Lanes::mul(Lanes::mul(x, cubic), Lanes::floats(1.59576912f));
    // e^-|2u| does not overflow; of a negative x, 1 / (1 + e^-2u) is e^2u / (1 + e^2u).
    const Lanes::Floats e = exponential(Lanes::mul(Lanes::magnitude(twice), Lanes::floats(-1.0f)));
    const Lanes::Floats above = Lanes::max(e, Lanes::above_zero(twice));
    return Lanes::mul(Lanes::mul(x, up), Lanes::div(above, Lanes::add(e, Lanes::floats(1.0f), Lanes::floats(1.0f))));
}

void gelu_mul(const float *gate, const float *up, int64_t n, float *y) {
    int64_t i = 0;
    for (; i + PANEL <= n; i += PANEL) {
        Lanes::store(y + i, gelu_mul(Lanes::load(gate + i), Lanes::load(up + i)));
    }
    if (i == n) return;
    alignas(64) float rest[3][PANEL] = {};
    for (int64_t j = i; j < n; j++) {
        rest[0][j - i] = gate[j];
        rest[1][j - i] = up[j];
    }
    Lanes::store(rest[2], gelu_mul(Lanes::load(rest[0]), Lanes::load(rest[1])));
    for (int64_t j = i; j < n; j++) y[j] = rest[2][j - i];
}

}  // namespace
}  // namespace gemloom
