// Products of a few rows with the rows of an unpacked matrix.
#pragma once
#include <algorithm>

#include "lanes.h"

namespace {

constexpr int RANKS_AT_ONCE = 4;

// low[r, j] = x[r] · a[j] for `rows` rows and 4 ranks: sixteen partial sums over k, then a tree.
template <int rows>
inline void dot_four(const float* x, int64_t ldx, const float* a, int64_t k, float* low, int64_t ldl, int count) {
    constexpr int registers = PER_LANES;
    const float* a_rows[RANKS_AT_ONCE];
    for (int j = 0; j < RANKS_AT_ONCE; j++) a_rows[j] = a + std::min(j, count - 1) * k;
    Register acc[rows][RANKS_AT_ONCE][registers];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < RANKS_AT_ONCE; j++)
            for (int h = 0; h < registers; h++) acc[r][j][h] = reg_zero();
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
#pragma GCC unroll 8
        for (int h = 0; h < registers; h++) {
            Register weights[RANKS_AT_ONCE];
#pragma GCC unroll 8
            for (int j = 0; j < RANKS_AT_ONCE; j++) weights[j] = reg_load(a_rows[j] + i + h * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                Register input = reg_load(x + r * ldx + i + h * WIDTH);
#pragma GCC unroll 8
                for (int j = 0; j < RANKS_AT_ONCE; j++) acc[r][j][h] = reg_fma(input, weights[j], acc[r][j][h]);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        alignas(64) float sums[LANES];
        for (int j = 0; j < count; j++) {
            for (int h = 0; h < registers; h++) reg_store(sums + h * WIDTH, acc[r][j][h]);
            Lanes total = load(sums);
            if (i < k)
                total = fma(load_first(x + r * ldx + i, k - i), load_first(a_rows[j] + i, k - i), total);
            low[r * ldl + j] = sum(total);
        }
    }
}

constexpr int DOT_ROWS = WIDTH == 16 ? 4 : 1;

// low[r, j] for ranks [first, last).
void shrink(const float* x, int64_t ldx, int64_t rows, const float* a, int64_t k, int64_t first, int64_t last, float* low,
            int64_t ldl) {
    for (int64_t j = first; j < last; j += RANKS_AT_ONCE) {
        int count = std::min<int64_t>(RANKS_AT_ONCE, last - j);
        int64_t r = 0;
        for (; r + DOT_ROWS <= rows; r += DOT_ROWS)
            dot_four<DOT_ROWS>(x + r * ldx, ldx, a + j * k, k, low + r * ldl + j, ldl, count);
        for (; r < rows; r++) dot_four<1>(x + r * ldx, ldx, a + j * k, k, low + r * ldl + j, ldl, count);
    }
}

}  // namespace
