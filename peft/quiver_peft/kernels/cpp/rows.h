// Operations on one row: reductions, LayerNorm, activations.
#pragma once
#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace {

// Accumulates `step` over a row. The order depends on the width alone, so that results are batch-invariant.
template <typename Step>
inline float sum_over(const float* x, int64_t width, const Step& step) {
    Lanes sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (int j = 0; j < 4; j++) sums[j] = step(load(x + i + j * LANES), sums[j]);
    for (; i < width; i += LANES)
        sums[0] = step(load_first(x + i, std::min<int64_t>(LANES, width - i)), sums[0]);
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// out = (x - mean) / deviation · (weight + weight_offset) + bias; bias may be null. out may be x.
inline void layer_norm_row(const float* x, const float* weight, const float* bias, float weight_offset, float eps,
                           float* out, int64_t width) {
    float mean = sum_over(x, width, [](Lanes v, Lanes so_far) { return add(v, so_far); }) / width;
    for (int64_t i = 0; i < width; i += LANES) {
        int left = std::min<int64_t>(LANES, width - i);
        store_first(out + i, sub(load_first(x + i, left), all(mean)), left);
    }
    float variance = sum_over(out, width, [](Lanes v, Lanes so_far) { return fma(v, v, so_far); }) / width;
    Lanes factor = all(1.0f / std::sqrt(variance + eps));
    for (int64_t i = 0; i < width; i += LANES) {
        int left = std::min<int64_t>(LANES, width - i);
        Lanes scale = mul(factor, add(load_first(weight + i, left), all(weight_offset)));
        Lanes shift = bias ? load_first(bias + i, left) : zero();
        store_first(out + i, fma(load_first(out + i, left), scale, shift), left);
    }
}

inline Lanes sigmoid(Lanes x) { return div(all(1.0f), add(all(1.0f), exponential(sub(zero(), x)))); }

// kind: as `quiver_activate` numbers them.
template <int kind>
inline Lanes activate(Lanes x) {
    if constexpr (kind == 0) return mul(x, sigmoid(x));
    if constexpr (kind == 1) return max(x, zero());
    if constexpr (kind == 2) {
        Lanes positive = max(x, zero());
        return mul(positive, positive);
    }
    if constexpr (kind == 3) {
        // x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        Lanes cubic = fma(mul(mul(x, x), x), all(0.044715f), x);
        return mul(x, sigmoid(mul(all(1.5957691216f), cubic)));
    }
    // x (1 + erf(x / sqrt(2))) / 2
    if constexpr (kind == 4)
        return mul(mul(all(0.5f), x), add(all(1.0f), error_function(mul(x, all(0.70710678118654752f)))));
    return x;
}

}  // namespace
