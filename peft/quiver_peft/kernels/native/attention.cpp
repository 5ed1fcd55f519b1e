// Attention over keys and values in cache blocks. A row's result depends on its query and its keys alone: keys are
// taken in blocks of 64 positions counted from the sequence's start, whatever chunk or tile the row comes in.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "lanes.h"
#include "layout.h"
#include "pool.h"

namespace {

constexpr int64_t KEYS = 64;  // positions in one block of the online softmax
constexpr int64_t MAX_ROWS = 32;  // query tokens times heads that share a key head, in one task
constexpr float LOWEST = -1e30f;

struct Call {
    const float* q;
    int64_t q_step;  // of a row
    const float* keys;
    const float* values;
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

// One task: query tokens [first, last) of a sequence, for the heads of one key head.
struct Tile {
    int64_t sequence, head, first, last;
};

struct State {
    float largest[MAX_ROWS], total[MAX_ROWS];
    alignas(64) float scores[MAX_ROWS][KEYS];
    const float* key[2][KEYS];  // of this block and of the next
    const float* value[2][KEYS];
};

inline void eight_dots(const float* q, const float* const* keys, int64_t size, float* out) {
    Lanes acc[8];
    for (int i = 0; i < 8; i++) acc[i] = zero();
    int64_t e = 0;
    for (; e + LANES <= size; e += LANES) {
        Lanes query = load(q + e);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) acc[i] = fma(query, load(keys[i] + e), acc[i]);
    }
    if (e < size) {
        Lanes query = load_first(q + e, size - e);
        for (int i = 0; i < 8; i++) acc[i] = fma(query, load_first(keys[i] + e, size - e), acc[i]);
    }
    _mm256_storeu_ps(out, sum_eight(acc));
}

// Scale, bias and mask the scores of positions [base, base + count) for one row at position `at`.
inline void finish_scores(const Call& c, float* scores, int64_t base, int64_t count, int64_t at, int64_t head) {
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
inline void soften(State& s, int64_t row, float* out, int64_t size) {
    float* scores = s.scores[row];
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

// out[row] += weights · values for `rows` rows and `chunks` times 16 elements from `e` on; keys in order.
template <int rows, int chunks>
inline void add_whole(const State& s, const float* const* values, int64_t row, float* const* out, int64_t e,
                      int64_t count) {
    constexpr int registers = chunks * PER_LANES;
    Register acc[rows][registers];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < registers; j++) acc[r][j] = reg_load(out[r] + e + j * WIDTH);
    for (int64_t i = 0; i < count; i++) {
        const float* value = values[i] + e;
        Register weights[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) weights[r] = reg_all(s.scores[row + r][i]);
#pragma GCC unroll 8
        for (int j = 0; j < registers; j++) {
            Register part = reg_load(value + j * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) acc[r][j] = reg_fma(weights[r], part, acc[r][j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < registers; j++) reg_store(out[r] + e + j * WIDTH, acc[r][j]);
}

template <int rows>
inline void add_values(const State& s, const float* const* values, int64_t row, float* const* out, int64_t size,
                       int64_t count) {
    constexpr int chunks = 4 / PER_LANES;
    int64_t e = 0;
    for (; e + chunks * LANES <= size; e += chunks * LANES) add_whole<rows, chunks>(s, values, row, out, e, count);
    for (; e + LANES <= size; e += LANES) add_whole<rows, 1>(s, values, row, out, e, count);
    if (e < size)
        for (int r = 0; r < rows; r++) {
            Lanes acc = load_first(out[r] + e, size - e);
            for (int64_t i = 0; i < count; i++)
                acc = fma(all(s.scores[row + r][i]), load_first(values[i] + e, size - e), acc);
            store_first(out[r] + e, acc, size - e);
        }
}

// Where positions [base, base + KEYS) lie, up to `end`; their first use is a whole block away.
inline void locate(const Call& c, const Tile& t, int64_t base, int64_t end, const float** key, const float** value) {
    const int32_t* table = c.at.tables + t.sequence * c.at.table_width + base / c.at.block_size;
    int64_t offset = base % c.at.block_size, place = *table * c.at.block_size + offset;
    const int64_t count = std::min(KEYS, end - base), shift = t.head * c.head_dim;
    for (int64_t i = 0; i < count; i++, place++, offset++) {
        if (offset == c.at.block_size) {
            offset = 0;
            place = *++table * c.at.block_size;
        }
        key[i] = c.keys + place * c.token_step + shift;
        value[i] = c.values + place * c.value_step + shift;
        for (int64_t e = 0; e < c.head_dim; e += LANES) {
            _mm_prefetch(reinterpret_cast<const char*>(key[i] + e), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(value[i] + e), _MM_HINT_T0);
        }
    }
    // Past the end the last one stands again; its score is masked.
    for (int64_t i = count; i < KEYS; i++) key[i] = key[count - 1], value[i] = value[count - 1];
}

void attend(const Call& c, const Tile& t) {
    State s;
    const int64_t group = c.num_heads / c.num_kv_heads, size = c.head_dim;
    const int64_t row0 = c.at.starts[t.sequence], length = c.at.lengths[t.sequence];
    const int64_t before = length - (c.at.starts[t.sequence + 1] - row0);  // position of the sequence's first row
    const int64_t rows = (t.last - t.first) * group;
    const float* queries[MAX_ROWS];
    float* outs[MAX_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = row0 + t.first + r / group, head = t.head * group + r % group;
        queries[r] = c.q + token * c.q_step + head * size;
        outs[r] = c.out + (token * c.num_heads + head) * size;
        std::memset(outs[r], 0, size * sizeof(float));
        s.largest[r] = LOWEST;
        s.total[r] = 0;
    }
    int64_t end = c.causal ? before + t.last : length;
    int64_t begin = c.window ? std::max<int64_t>(before + t.first - c.window + 1, 0) / KEYS * KEYS : 0;
    int now = 0;
    locate(c, t, begin, end, s.key[0], s.value[0]);
    for (int64_t base = begin; base < end; base += KEYS, now = 1 - now) {
        int64_t count = std::min(KEYS, end - base);
        if (base + KEYS < end) locate(c, t, base + KEYS, end, s.key[1 - now], s.value[1 - now]);
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t i = 0; i < count; i += 8) eight_dots(queries[r], s.key[now] + i, size, s.scores[r] + i);
            finish_scores(c, s.scores[r], base, count, before + t.first + r / group, t.head * group + r % group);
            soften(s, r, outs[r], size);
        }
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) add_values<4>(s, s.value[now], r, outs + r, size, count);
        for (; r + 2 <= rows; r += 2) add_values<2>(s, s.value[now], r, outs + r, size, count);
        for (; r < rows; r++) add_values<1>(s, s.value[now], r, outs + r, size, count);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t e = 0; e < size; e++) outs[r][e] /= s.total[r];
}

}  // namespace

extern "C" void quiver_paged_attention(const float* q, int64_t q_step, const float* keys, const float* values,
                                       int64_t token_step, int64_t value_step, float* out, const Layout* layout,
                                       int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float scale,
                                       int64_t causal, int64_t window, const float* bias, int64_t bias_limit) {
    Call c{q, q_step, keys, values, token_step, value_step, out, *layout, num_heads, num_kv_heads, head_dim, scale,
           causal, window, bias, bias_limit};
    const int32_t* starts = layout->starts;
    const int64_t num_sequences = layout->num_sequences;
    int64_t tokens = std::max<int64_t>(1, MAX_ROWS / (num_heads / num_kv_heads)), count = 0;
    for (int64_t b = 0; b < num_sequences; b++) count += (starts[b + 1] - starts[b] + tokens - 1) / tokens * num_kv_heads;
    Tile* tiles = reinterpret_cast<Tile*>(scratch(0, count * sizeof(Tile) / sizeof(float)));
    int64_t n = 0;
    for (int64_t b = 0; b < num_sequences; b++) {
        int64_t rows = starts[b + 1] - starts[b];
        // The longest first, so that no thread is left alone with it at the end.
        for (int64_t last = rows; last > 0; last -= tokens)
            for (int64_t head = 0; head < num_kv_heads; head++)
                tiles[n++] = {b, head, std::max<int64_t>(last - tokens, 0), last};
    }
    parallel(count, [&](int64_t i) { attend(c, tiles[i]); });
}

// keys[places[r]] = k[r] and values[places[r]] = v[r]; a row has `width` elements.
extern "C" void quiver_store_rows(float* keys, float* values, int64_t width, const float* k, int64_t k_step,
                                  const float* v, int64_t v_step, const int64_t* places, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        std::memcpy(keys + places[r] * width, k + r * k_step, width * sizeof(float));
        std::memcpy(values + places[r] * width, v + r * v_step, width * sizeof(float));
    }
}
