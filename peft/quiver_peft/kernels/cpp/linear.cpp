// y = x Wᵀ + b with W packed once. Every output is one chain of fused multiply-adds over k = 0 ... K - 1, whatever the
// tile it falls in: a row's result does not depend on how many rows there are.
//
// Packed W: panels of 16 outputs, each [K][16], the last one filled up with zeros, in the type W is stored in. What is
// computed is fp32 whatever that is: with few rows each weight is widened as it streams by, with many rows a piece of
// a panel is widened once into the cache.
#include <sys/mman.h>

#include <algorithm>

#include "kernels.h"
#include "lanes.h"
#include "pool.h"
#include "storage.h"

namespace {

#ifdef __AVX512F__
constexpr int TILE_ROWS = 12;  // 12 · 2 accumulators, 2 weights, 1 input: 27 of 32 registers
constexpr int WIDE = 2;
#else
constexpr int TILE_ROWS = 6;  // 6 · 2 accumulators, 2 weights, 1 input: 15 of 16 registers
constexpr int WIDE = 1;
#endif
constexpr int64_t AHEAD = 32 * 64;  // bytes between a weight's fetch and its use
constexpr int64_t DEPTH = 1024;  // of k at a time when there are many rows: two panels of it stay in the L2 cache

struct Product {
    const float* x;
    int64_t ldx;
    const float* bias;
    float* y;
    int64_t ldy;
    int64_t m, n, k;
    int64_t num_panels;
};

// `rows` rows by `panels` panels, over k in [k0, k1). Input i of row r is x[r · row_step + i · k_step].
// w: the weights of `panel` at k0; those of the next panel lie `panel_step` further on.
// ahead: weights that will be wanted next, `ahead_step` floats of them fetched with each k; null: those of these panels
// that are wanted a little later. A single row is so fast that the processor's own look-ahead is nearly all it needs.
template <int rows, int panels, typename Weight>
inline void tile(const Product& p, const float* x, int64_t row_step, int64_t k_step, float* y, int64_t panel,
                 const Weight* w, int64_t panel_step, int64_t k0, int64_t k1, const char* ahead, int64_t ahead_step) {
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
    for (int64_t k = k0; k < k1; k++) {
        Register weights[registers];
        if (ahead) {
            _mm_prefetch(ahead, _MM_HINT_T0);
            ahead += ahead_step;
        } else {
#pragma GCC unroll 4
            for (int j = 0; j < (rows == 1 ? 1 : panels); j++)
                _mm_prefetch(reinterpret_cast<const char*>(w + j * panel_step) + AHEAD, _MM_HINT_T0);
        }
#pragma GCC unroll 16
        for (int j = 0; j < registers; j++)
            weights[j] = reg_widen(w + j / PER_LANES * panel_step + j % PER_LANES * WIDTH);
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

// w: the weights of panel `first` at k0.
template <int rows, typename Weight>
void some_panels(const Product& p, const float* x, int64_t row_step, int64_t k_step, float* y, int64_t first,
                 int64_t last, const Weight* w, int64_t panel_step, int64_t k0, int64_t k1, const char* ahead,
                 int64_t ahead_step) {
    constexpr int wide = rows <= 2 ? 4 / rows : WIDE;
    for (; first + wide <= last; first += wide, w += wide * panel_step)
        tile<rows, wide>(p, x, row_step, k_step, y, first, w, panel_step, k0, k1, ahead, ahead_step);
    for (; first < last; first++, w += panel_step)
        tile<rows, 1>(p, x, row_step, k_step, y, first, w, panel_step, k0, k1, ahead, ahead_step);
}

template <int rows = TILE_ROWS, typename Weight>
void some_rows(int64_t count, const Product& p, const float* x, int64_t row_step, int64_t k_step, float* y,
               int64_t first, int64_t last, const Weight* w, int64_t panel_step, int64_t k0, int64_t k1,
               const char* ahead, int64_t ahead_step) {
    if constexpr (rows > 0) {
        if (count == rows)
            some_panels<rows>(p, x, row_step, k_step, y, first, last, w, panel_step, k0, k1, ahead, ahead_step);
        else
            some_rows<rows - 1>(count, p, x, row_step, k_step, y, first, last, w, panel_step, k0, k1, ahead, ahead_step);
    }
}

// One tile of rows: the weights stream by, and are the limit.
template <typename Weight>
void few_rows(const Product& p, const Weight* w) {
    int64_t per_task = std::max<int64_t>(4, p.num_panels / (8 * num_threads()) / 4 * 4);
    parallel((p.num_panels + per_task - 1) / per_task, [&](int64_t task) {
        int64_t first = task * per_task, last = std::min(first + per_task, p.num_panels);
        int64_t panel_step = p.k * LANES;
        some_rows(p.m, p, p.x, p.ldx, 1, p.y, first, last, w + first * panel_step, panel_step, 0, p.k, nullptr, 0);
    });
}

// The weights of panels [first, last) over k in [k0, k1) as fp32, and how far one panel's lie from the next one's.
struct Widened {
    const float* w;
    int64_t panel_step;
};
inline Widened widen(const float* w, int64_t k, int64_t first, int64_t, int64_t k0, int64_t) {
    return {w + (first * k + k0) * LANES, k * LANES};
}
template <typename Weight>
Widened widen(const Weight* w, int64_t k, int64_t first, int64_t last, int64_t k0, int64_t k1) {
    const int64_t step = (k1 - k0) * LANES;
    float* to = scratch(1, (last - first) * step);
    for (int64_t panel = first; panel < last; panel++) {
        const Weight* from = w + (panel * k + k0) * LANES;
        float* out = to + (panel - first) * step;
        for (int64_t i = 0; i < step; i += WIDTH) reg_store(out + i, reg_widen(from + i));
    }
    return {to, step};
}

// Many tiles: the input is rearranged tile by tile so that its reads are one stream.
template <typename Weight>
void many_rows(const Product& p, const Weight* w) {
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
            Widened piece = widen(w, p.k, first, last, k0, k1);
            for (int64_t t = 0; t < tiles; t++) {
                int64_t rows = std::min(height, p.m - t * height);
                const float* x = packed + t * height * p.k + k0 * rows;
                // This tile's share of the panels that come after these.
                int64_t step = wide * LANES / tiles;
                const char* ahead =
                    reinterpret_cast<const char*>(w + (last * p.k + k0 * wide) * LANES + t * (k1 - k0) * step);
                some_rows(rows, p, x, 1, rows, p.y + t * height * p.ldy, first, last, piece.w, piece.panel_step, k0, k1,
                          ahead, step * static_cast<int64_t>(sizeof(Weight)));
            }
        }
    });
}

}  // namespace

// w: [n, k], row step ldw -> packed: [ceil(n / 16), k, 16]; both of elements of `bytes`, 4 or 2.
extern "C" void quiver_pack(const void* w, int64_t ldw, int64_t n, int64_t k, void* packed, int64_t bytes) {
    auto pack = [=](auto zero) {
        using Element = decltype(zero);
        const Element* from = static_cast<const Element*>(w);
        parallel((n + LANES - 1) / LANES, [=](int64_t panel) {
            Element* to = static_cast<Element*>(packed) + panel * k * LANES;
            for (int64_t i = 0; i < k; i++)
                for (int64_t j = 0; j < LANES; j++) {
                    int64_t row = panel * LANES + j;
                    *to++ = row < n ? from[row * ldw + i] : Element{0};
                }
        });
    };
    if (bytes == 4)
        pack(uint32_t{0});
    else
        pack(uint16_t{0});
}

// x: [rows, k], y: [rows, n], both with row steps; bias: [n] or null. storage: of the packed weights.
extern "C" void quiver_linear(const float* x, int64_t ldx, const void* packed, int64_t storage, const float* bias,
                              float* y, int64_t ldy, int64_t rows, int64_t n, int64_t k) {
    Product p{x, ldx, bias, y, ldy, rows, n, k, (n + LANES - 1) / LANES};
    with_storage(packed, storage, [&](auto* w) {
        if (rows <= TILE_ROWS)
            few_rows(p, w);
        else
            many_rows(p, w);
    });
}

// Asks for transparent huge pages; call it before the memory is first written.
extern "C" void quiver_use_large_pages(void* memory, int64_t bytes) {
    constexpr uintptr_t page = 4096;
    uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
