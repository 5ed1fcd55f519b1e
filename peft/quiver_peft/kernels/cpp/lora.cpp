// y[rows] += (x[rows] Aᵀ) Bᵀ for segments of rows, each with its own A and B, read in place.
// Batch-invariant: x Aᵀ is sixteen partial sums over k and a tree; Bᵀ is one chain over the ranks that starts from y.
#include <algorithm>

#include "dots.h"
#include "groups.h"
#include "kernels.h"
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

// Applies the groups' LoRA descriptors at `site`.
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
