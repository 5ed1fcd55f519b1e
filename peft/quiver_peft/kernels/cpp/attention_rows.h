// Online softmax (Milakov & Gimelshein 2018) of some rows over one block of keys and values after another.
#pragma once
#include <algorithm>
#include <cmath>

#include "lanes.h"
#include "layout.h"
#include "storage.h"

namespace {

constexpr int64_t KEYS = 64;  // positions in one block of the online softmax
constexpr int64_t MAX_ROWS = 32;  // query tokens times heads that share a key head, in one task
constexpr float LOWEST = -1e30f;

// Kv: the type that keys and values are stored in.
template <typename Kv>
struct Call {
    const float* q;
    int64_t q_step;  // of a row
    const Kv* keys;
    const Kv* values;
    int64_t token_step;  // of a cache row
    int64_t value_step;
    float* out;  // [T, H, E]
    const Layout& at;
    int64_t num_heads, num_kv_heads, head_dim;
    float scale;
    int64_t causal, window;  // window 0: none
    const float* bias;
    int64_t bias_limit;
};

// Where the keys and values of a block lie, those of the task's first head.
template <typename Kv>
struct Block {
    const Kv* key[KEYS];
    const Kv* value[KEYS];
};

template <typename Kv>
struct State {
    float largest[MAX_ROWS], total[MAX_ROWS];
    alignas(64) float scores[MAX_ROWS][KEYS];  // of one head
    Block<Kv> blocks[2];  // this one and the next
};

// Prefetches into L2: the block after the current one.
template <typename Kv>
inline void fetch(const Kv* from, int64_t size) {
    for (int64_t e = 0; e < size; e += 64 / sizeof(Kv)) _mm_prefetch(reinterpret_cast<const char*>(from + e), _MM_HINT_T1);
}

template <typename Kv>
inline void eight_dots(const float* q, const Kv* const* key, int64_t shift, int64_t size, float* out) {
    const Kv* keys[8];
    for (int i = 0; i < 8; i++) keys[i] = key[i] + shift;
    Lanes acc[8];
    for (int i = 0; i < 8; i++) acc[i] = zero();
    int64_t e = 0;
    for (; e + LANES <= size; e += LANES) {
        Lanes query = load(q + e);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) acc[i] = fma(query, widen(keys[i] + e), acc[i]);
    }
    if (e < size) {
        Lanes query = load_first(q + e, size - e);
        for (int i = 0; i < 8; i++) acc[i] = fma(query, widen_first(keys[i] + e, size - e), acc[i]);
    }
    _mm256_storeu_ps(out, sum_eight(acc));
}

// Scale, bias and mask the scores of positions [base, base + count) for one row at position `at`.
template <typename Kv>
inline void finish_scores(const Call<Kv>& c, float* scores, int64_t base, int64_t count, int64_t at, int64_t head) {
    int64_t first = c.window ? std::max<int64_t>(at - c.window + 1 - base, 0) : 0;
    int64_t last = c.causal ? std::min(at + 1 - base, count) : count;
    for (int64_t i = 0; i < KEYS; i += LANES) store(scores + i, mul(load(scores + i), all(c.scale)));
    if (c.bias) {
        const float* row = c.bias + head * (2 * c.bias_limit + 1) + c.bias_limit;
        for (int64_t i = 0; i < count; i++) {
            int64_t distance = base + i - at;
            scores[i] += row[std::max(-c.bias_limit, std::min(c.bias_limit, distance))];
        }
    }
    for (int64_t i = 0; i < std::min(first, KEYS); i++) scores[i] = -INFINITY;
    for (int64_t i = std::max<int64_t>(last, 0); i < KEYS; i++) scores[i] = -INFINITY;
}

// Turns scores into weights and rescales what was summed before.
template <typename Kv>
inline void soften(State<Kv>& s, float* scores, int64_t row, float* out, int64_t size) {
    Lanes top = load(scores);
    for (int64_t i = LANES; i < KEYS; i += LANES) top = max(top, load(scores + i));
    float largest_before = s.largest[row], now = std::max(largest_before, largest(top));
    Lanes total = zero();
    for (int64_t i = 0; i < KEYS; i += LANES) {
        Lanes weight = exponential(sub(load(scores + i), all(now)));
        store(scores + i, weight);
        total = add(total, weight);
    }
    if (now != largest_before) {
        alignas(64) float factor[LANES];
        store(factor, exponential(all(largest_before - now)));
        s.total[row] *= factor[0];
        s.largest[row] = now;
        int64_t e = 0;
        for (; e + LANES <= size; e += LANES) store(out + e, mul(load(out + e), all(factor[0])));
        for (; e < size; e++) out[e] *= factor[0];
    }
    s.total[row] += sum(total);
}

// out[r] += weights[r] · values for `rows` rows and `chunks` times 16 elements from `e` on; keys in order.
template <int rows, int chunks, typename Kv>
inline void add_whole(const float (*scores)[KEYS], const Kv* const* values, int64_t shift, float* const* out,
                      int64_t e, int64_t count) {
    constexpr int registers = chunks * PER_LANES;
    Register acc[rows][registers];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < registers; j++) acc[r][j] = reg_load(out[r] + e + j * WIDTH);
    for (int64_t i = 0; i < count; i++) {
        const Kv* value = values[i] + shift + e;
        Register weights[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) weights[r] = reg_all(scores[r][i]);
#pragma GCC unroll 8
        for (int j = 0; j < registers; j++) {
            Register part = reg_widen(value + j * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) acc[r][j] = reg_fma(weights[r], part, acc[r][j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < registers; j++) reg_store(out[r] + e + j * WIDTH, acc[r][j]);
}

template <int rows, typename Kv>
inline void add_values(const float (*scores)[KEYS], const Kv* const* values, int64_t shift, float* const* out,
                       int64_t size, int64_t count) {
    constexpr int chunks = 4 / PER_LANES;
    int64_t e = 0;
    for (; e + chunks * LANES <= size; e += chunks * LANES)
        add_whole<rows, chunks>(scores, values, shift, out, e, count);
    for (; e + LANES <= size; e += LANES) add_whole<rows, 1>(scores, values, shift, out, e, count);
    if (e < size)
        for (int r = 0; r < rows; r++) {
            Lanes acc = load_first(out[r] + e, size - e);
            for (int64_t i = 0; i < count; i++)
                acc = fma(all(scores[r][i]), widen_first(values[i] + shift + e, size - e), acc);
            store_first(out[r] + e, acc, size - e);
        }
}

}  // namespace
