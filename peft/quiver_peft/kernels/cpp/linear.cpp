// y = x Wᵀ + b with W packed once. Every output is one chain of fused multiply-adds over k = 0 ... K - 1, whatever the
// tile it falls in: a row's result does not depend on how many rows there are.
//
// Packed W: panels of 16 outputs, each [K][16], the last one filled up with zeros.
#include <sys/mman.h>

#include <algorithm>

#include "kernels.h"
#include "lanes.h"
#include "pool.h"

namespace {

#ifdef __AVX512F__
constexpr int TILE_ROWS = 12;  // 12 · 2 accumulators, 2 weights, 1 input: 27 of 32 registers
constexpr int WIDE = 2;
#else
constexpr int TILE_ROWS = 6;  // 6 · 2 accumulators, 2 weights, 1 input: 15 of 16 registers
constexpr int WIDE = 1;
#endif
constexpr int64_t AHEAD = 32 * LANES;  // floats between a weight's fetch and its use
constexpr int64_t DEPTH = 1024;  // of k at a time when there are many rows: two panels of it stay in the L2 cache

struct Product {
    const float* x;
    int64_t ldx;
    const float* w;
    const float* bias;
    float* y;
    int64_t ldy;
    int64_t m, n, k;
    int64_t num_panels;
};

// `rows` rows by `panels` panels, over k in [k0, k1). Input i of row r is x[r · row_step + i · k_step].
// ahead: weights that will be wanted next, `ahead_step` floats of them fetched with each k; null: those of these panels
// that are wanted a little later. A single row is so fast that the processor's own look-ahead is nearly all it needs.
template <int rows, int panels>
inline void tile(const Product& p, const float* x, int64_t row_step, int64_t k_step, float* y, int64_t panel, int64_t k0,
                 int64_t k1, const float* ahead, int64_t ahead_step) {
    constexpr int registers = panels * PER_LANES;
    Register acc[rows][registers];
    const int64_t column = panel * LANES;
    const bool whole = column + panels * LANES <= p.n;
    alignas(64) float edge[panels * LANES];
    if (k0 == 0 && !p.bias) {
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < registers; j++) acc[r][j] = reg_zero();
    } else {
        for (int r = 0; r < rows; r++) {
            const float* start = k0 == 0 ? p.bias + column : y + r * p.ldy + column;
            if (!whole) {
                for (int64_t i = 0; i < panels * LANES; i++) edge[i] = column + i < p.n ? start[i] : 0.0f;
                start = edge;
            }
            for (int j = 0; j < registers; j++) acc[r][j] = reg_load(start + j * WIDTH);
        }
    }
    const int64_t panel_step = p.k * LANES;
    const float* w = p.w + panel * panel_step + k0 * LANES;
    for (int64_t k = k0; k < k1; k++) {
        Register weights[registers];
        if (ahead) {
            _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
            ahead += ahead_step;
        } else {
#pragma GCC unroll 4
            for (int j = 0; j < (rows == 1 ? 1 : panels); j++)
                _mm_prefetch(reinterpret_cast<const char*>(w + j * panel_step + AHEAD), _MM_HINT_T0);
        }
#pragma GCC unroll 16
        for (int j = 0; j < registers; j++)
            weights[j] = reg_load(w + j / PER_LANES * panel_step + j % PER_LANES * WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            Register input = reg_all(x[r * row_step]);
#pragma GCC unroll 16
            for (int j = 0; j < registers; j++) acc[r][j] = reg_fma(input, weights[j], acc[r][j]);
        }
        w += LANES;
        x += k_step;
    }
    for (int r = 0; r < rows; r++) {
        float* out = y + r * p.ldy + column;
        float* to = whole ? out : edge;
        for (int j = 0; j < registers; j++) reg_store(to + j * WIDTH, acc[r][j]);
        if (!whole)
            for (int64_t i = 0; column + i < p.n; i++) out[i] = edge[i];
    }
}

template <int rows>
void some_panels(const Product& p, const float* x, int64_t row_step, int64_t k_step, float* y, int64_t first,
                 int64_t last, int64_t k0, int64_t k1, const float* ahead, int64_t ahead_step) {
    constexpr int wide = rows <= 2 ? 4 / rows : WIDE;
    for (; first + wide <= last; first += wide)
        tile<rows, wide>(p, x, row_step, k_step, y, first, k0, k1, ahead, ahead_step);
    for (; first < last; first++) tile<rows, 1>(p, x, row_step, k_step, y, first, k0, k1, ahead, ahead_step);
}

template <int rows = TILE_ROWS>
void some_rows(int64_t count, const Product& p, const float* x, int64_t row_step, int64_t k_step, float* y,
               int64_t first, int64_t last, int64_t k0, int64_t k1, const float* ahead, int64_t ahead_step) {
    if constexpr (rows > 0) {
        if (count == rows)
            some_panels<rows>(p, x, row_step, k_step, y, first, last, k0, k1, ahead, ahead_step);
        else
            some_rows<rows - 1>(count, p, x, row_step, k_step, y, first, last, k0, k1, ahead, ahead_step);
    }
}

// One tile of rows: the weights stream by, and are the limit.
void few_rows(const Product& p) {
    int64_t per_task = std::max<int64_t>(4, p.num_panels / (8 * num_threads()) / 4 * 4);
    parallel((p.num_panels + per_task - 1) / per_task, [&](int64_t task) {
        int64_t first = task * per_task, last = std::min(first + per_task, p.num_panels);
        some_rows(p.m, p, p.x, p.ldx, 1, p.y, first, last, 0, p.k, nullptr, 0);
    });
}

// Many tiles: the input is rearranged tile by tile so that its reads are one stream.
void many_rows(const Product& p) {
    int64_t tiles = (p.m + TILE_ROWS - 1) / TILE_ROWS;
    // Tiles of nearly equal height rather than a thin last one.
    int64_t height = (p.m + tiles - 1) / tiles;
    tiles = (p.m + height - 1) / height;
    float* packed = scratch(0, tiles * height * p.k);
    parallel(tiles, [&](int64_t t) {
        int64_t rows = std::min(height, p.m - t * height);
        const float* from = p.x + t * height * p.ldx;
        float* to = packed + t * height * p.k;
        for (int64_t k = 0; k < p.k; k++)
            for (int64_t r = 0; r < rows; r++) *to++ = from[r * p.ldx + k];
    });
    constexpr int64_t wide = 2;
    parallel((p.num_panels + wide - 1) / wide, [&](int64_t task) {
        int64_t first = task * wide, last = std::min(first + wide, p.num_panels);
        for (int64_t k0 = 0; k0 < p.k; k0 += DEPTH) {
            int64_t k1 = std::min(k0 + DEPTH, p.k);
            for (int64_t t = 0; t < tiles; t++) {
                int64_t rows = std::min(height, p.m - t * height);
                const float* x = packed + t * height * p.k + k0 * rows;
                // This tile's share of the panels that come after these.
                int64_t step = wide * LANES / tiles;
                const float* ahead = p.w + (last * p.k + k0 * wide) * LANES + t * (k1 - k0) * step;
                some_rows(rows, p, x, 1, rows, p.y + t * height * p.ldy, first, last, k0, k1, ahead, step);
            }
        }
    });
}

}  // namespace

// w: [n, k], row step ldw -> packed: [ceil(n / 16), k, 16].
extern "C" void quiver_pack(const float* w, int64_t ldw, int64_t n, int64_t k, float* packed) {
    parallel((n + LANES - 1) / LANES, [=](int64_t panel) {
        float* to = packed + panel * k * LANES;
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < LANES; j++) {
                int64_t row = panel * LANES + j;
                *to++ = row < n ? w[row * ldw + i] : 0.0f;
            }
    });
}

// x: [rows, k], y: [rows, n], both with row steps; bias: [n] or null.
extern "C" void quiver_linear(const float* x, int64_t ldx, const float* packed, const float* bias, float* y, int64_t ldy,
                              int64_t rows, int64_t n, int64_t k) {
    Product p{x, ldx, packed, bias, y, ldy, rows, n, k, (n + LANES - 1) / LANES};
    if (rows <= TILE_ROWS)
        few_rows(p);
    else
        many_rows(p);
}

// Asks for transparent huge pages; call it before the memory is first written.
extern "C" void quiver_use_large_pages(void* memory, int64_t bytes) {
    constexpr uintptr_t page = 4096;
    uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
