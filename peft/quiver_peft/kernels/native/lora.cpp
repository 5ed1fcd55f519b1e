// y[rows] += (x[rows] Aᵀ) Bᵀ for segments of rows, each with its own A and B, read where they lie.
// A row's result does not depend on the other rows: x Aᵀ is sixteen chains over k, then one tree; B is one chain over
// the ranks that goes on from y.
#include <algorithm>

#include "groups.h"
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

namespace {

struct Expand {
    int64_t first_rank, last_rank, start, end;
    const float* b_t;  // [last_rank - first_rank, end - start]
};

struct Lora {
    const float* a;  // [num_ranks, k]
    int64_t num_ranks, num_expands;
    Expand expands[1];
};

constexpr int64_t ROWS = 32;  // of a segment in one task
constexpr int RANKS_AT_ONCE = 4;

// low[r, j] = x[r] · a[j] for `rows` rows and 4 ranks.
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

// y[r] += low[r, rank .. rank + count) b_t, columns [first, last).
template <int count>
inline void add_ranks(float* y, int64_t ldy, int64_t rows, const float* low, int64_t ldl, const float* b_t, int64_t width,
                      int64_t first, int64_t last) {
    int64_t n = first;
    for (; n + LANES <= last; n += LANES) {
        Lanes weights[count];
#pragma GCC unroll 8
        for (int j = 0; j < count; j++) weights[j] = load(b_t + j * width + n);
        for (int64_t r = 0; r < rows; r++) {
            Lanes acc = load(y + r * ldy + n);
#pragma GCC unroll 8
            for (int j = 0; j < count; j++) acc = fma(all(low[r * ldl + j]), weights[j], acc);
            store(y + r * ldy + n, acc);
        }
    }
    if (n < last) {
        int left = last - n;
        for (int64_t r = 0; r < rows; r++) {
            Lanes acc = load_first(y + r * ldy + n, left);
            for (int j = 0; j < count; j++) acc = fma(all(low[r * ldl + j]), load_first(b_t + j * width + n, left), acc);
            store_first(y + r * ldy + n, acc, left);
        }
    }
}

// Share `part` of `parts` of the columns of each target.
void expand(const Lora& lora, float* y, int64_t ldy, int64_t rows, const float* low, int64_t ldl, int64_t part,
            int64_t parts) {
    for (int64_t i = 0; i < lora.num_expands; i++) {
        const Expand& e = lora.expands[i];
        int64_t width = e.end - e.start, share = (width / parts + LANES - 1) / LANES * LANES;
        int64_t first = std::min(part * share, width), last = part + 1 == parts ? width : std::min(first + share, width);
        float* out = y + e.start;
        int64_t j = e.first_rank;
        for (; j + 4 <= e.last_rank; j += 4)
            add_ranks<4>(out, ldy, rows, low + j, ldl, e.b_t + (j - e.first_rank) * width, width, first, last);
        for (; j < e.last_rank; j++)
            add_ranks<1>(out, ldy, rows, low + j, ldl, e.b_t + (j - e.first_rank) * width, width, first, last);
    }
}

struct Item {
    int64_t row, rows;
    const Lora* lora;
    float* low;
};

}  // namespace

// What the adapters do at `site`, a number.
extern "C" void quiver_add_lora(float* y, int64_t ldy, const float* x, int64_t ldx, int64_t k, const Groups* groups,
                                int64_t site) {
    int64_t num_items = 0, num_low = 0;
    for (const Group& group : *groups)
        if (const Lora* lora = group.at<Lora>(site)) {
            int64_t rows = group.end - group.start;
            num_items += (rows + ROWS - 1) / ROWS;
            num_low += rows * lora->num_ranks;
        }
    if (!num_items) return;
    // One piece of memory for the list of items and for x Aᵀ.
    float* memory = scratch(0, num_low + num_items * (sizeof(Item) / sizeof(float)));
    Item* items = reinterpret_cast<Item*>(memory);
    float* low = memory + num_items * (sizeof(Item) / sizeof(float));
    int64_t n = 0;
    for (const Group& group : *groups) {
        const Lora* lora = group.at<Lora>(site);
        for (int64_t row = group.start; lora && row < group.end; row += ROWS) {
            int64_t rows = std::min(ROWS, group.end - row);
            items[n++] = {row, rows, lora, low};
            low += rows * lora->num_ranks;
        }
    }
    auto shrink_item = [&](const Item& item, int64_t part, int64_t parts) {
        int64_t ranks = item.lora->num_ranks, share = (ranks / parts + 3) / 4 * 4;
        int64_t first = std::min(part * share, ranks), last = part + 1 == parts ? ranks : std::min(first + share, ranks);
        shrink(x + item.row * ldx, ldx, item.rows, item.lora->a, k, first, last, item.low, ranks);
    };
    auto expand_item = [&](const Item& item, int64_t part, int64_t parts) {
        expand(*item.lora, y + item.row * ldy, ldy, item.rows, item.low, item.lora->num_ranks, part, parts);
    };
    int64_t threads = num_threads();
    if (threads == 1 || num_items >= 2 * threads) {
        parallel(num_items, [&](int64_t i) {
            shrink_item(items[i], 0, 1);
            expand_item(items[i], 0, 1);
        });
        return;
    }
    // Few items: each is shared out, first by ranks, then by columns.
    parallel(num_items * threads, [&](int64_t i) { shrink_item(items[i / threads], i % threads, threads); });
    parallel(num_items * threads, [&](int64_t i) { expand_item(items[i / threads], i % threads, threads); });
}
