// Paged attention. Batch-invariant: keys are processed in blocks of 64 positions counted from the sequence's start,
// whatever chunk or tile the row is in.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "attention_rows.h"
#include "kernels.h"
#include "pool.h"

namespace {

// One task: query tokens [first, last) of a sequence, for the heads of `heads` key heads from `head` on.
struct Tile {
    int64_t sequence, head, heads, first, last;
};

// Where positions [base, base + KEYS) lie, up to `end`.
template <typename Kv>
inline void locate(const Call<Kv>& c, const Tile& t, int64_t base, int64_t end, Block<Kv>& block) {
    const int32_t* table = c.at.tables + t.sequence * c.at.table_width + base / c.at.block_size;
    int64_t offset = base % c.at.block_size, place = *table * c.at.block_size + offset;
    const int64_t count = std::min(KEYS, end - base), shift = t.head * c.head_dim;
    for (int64_t i = 0; i < count; i++, place++, offset++) {
        if (offset == c.at.block_size) {
            offset = 0;
            place = *++table * c.at.block_size;
        }
        block.key[i] = c.keys + place * c.token_step + shift;
        block.value[i] = c.values + place * c.value_step + shift;
    }
    // Past the end the last position is repeated; its score is masked.
    for (int64_t i = count; i < KEYS; i++) block.key[i] = block.key[count - 1], block.value[i] = block.value[count - 1];
}

// One key head's share of a block: `rows` rows, whose queries and results these are. What comes after it is fetched
// meanwhile, at `next` or nowhere, from `next_shift` on.
template <typename Kv>
void attend_block(const Call<Kv>& c, State<Kv>& s, const Block<Kv>& block, int64_t shift, const float* const* queries,
                  float* const* outs, int64_t first_row, int64_t rows, int64_t base, int64_t count, int64_t before,
                  int64_t head, const Block<Kv>* next, int64_t next_shift) {
    const int64_t group = c.num_heads / c.num_kv_heads, size = c.head_dim;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < count; i += 8) {
            if (r == 0 && next)
                for (int64_t j = i; j < i + 8; j++) {
                    fetch(next->key[j] + next_shift, size);
                    fetch(next->value[j] + next_shift, size);
                }
            eight_dots(queries[r], block.key + i, shift, size, s.scores[r] + i);
        }
        finish_scores(c, s.scores[r], base, count, before + r / group, head * group + r % group);
        soften(s, s.scores[r], first_row + r, outs[r], size);
    }
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_values<4>(s.scores + r, block.value, shift, outs + r, size, count);
    for (; r + 2 <= rows; r += 2) add_values<2>(s.scores + r, block.value, shift, outs + r, size, count);
    for (; r < rows; r++) add_values<1>(s.scores + r, block.value, shift, outs + r, size, count);
}

template <typename Kv>
void attend(const Call<Kv>& c, const Tile& t) {
    State<Kv> s;
    const int64_t group = c.num_heads / c.num_kv_heads, size = c.head_dim;
    const int64_t row0 = c.at.starts[t.sequence], length = c.at.lengths[t.sequence];
    // Position of the tile's first row.
    const int64_t before = length - (c.at.starts[t.sequence + 1] - row0) + t.first;
    const int64_t rows = (t.last - t.first) * group;  // of each key head
    const float* queries[MAX_ROWS];
    float* outs[MAX_ROWS];
    for (int64_t r = 0; r < rows * t.heads; r++) {
        int64_t token = row0 + t.first + r % rows / group, head = (t.head + r / rows) * group + r % group;
        queries[r] = c.q + token * c.q_step + head * size;
        outs[r] = c.out + (token * c.num_heads + head) * size;
        std::memset(outs[r], 0, size * sizeof(float));
        s.largest[r] = LOWEST;
        s.total[r] = 0;
    }
    int64_t end = c.causal ? before + t.last - t.first : length;
    int64_t begin = c.window ? std::max<int64_t>(before - c.window + 1, 0) / KEYS * KEYS : 0;
    int now = 0;
    locate(c, t, begin, end, s.blocks[0]);
    for (int64_t i = 0; i < std::min(KEYS, end - begin); i++) {
        fetch(s.blocks[0].key[i], size);
        fetch(s.blocks[0].value[i], size);
    }
    for (int64_t base = begin; base < end; base += KEYS, now = 1 - now) {
        int64_t count = std::min(KEYS, end - base);
        const Block<Kv>* later = base + KEYS < end ? &s.blocks[1 - now] : nullptr;
        if (later) locate(c, t, base + KEYS, end, s.blocks[1 - now]);
        for (int64_t h = 0; h < t.heads; h++) {
            const bool is_last = h + 1 == t.heads;
            attend_block(c, s, s.blocks[now], h * size, queries + h * rows, outs + h * rows, h * rows, rows, base, count,
                         before, t.head + h, is_last ? later : &s.blocks[now], is_last ? 0 : (h + 1) * size);
        }
    }
    for (int64_t r = 0; r < rows * t.heads; r++)
        for (int64_t e = 0; e < size; e++) outs[r][e] /= s.total[r];
}

template <typename Kv>
void paged_attention(const Call<Kv>& c) {
    const int32_t* starts = c.at.starts;
    const int64_t num_sequences = c.at.num_sequences;
    const int64_t group = c.num_heads / c.num_kv_heads, tokens = std::max<int64_t>(1, MAX_ROWS / group);
    int64_t count = 0;
    for (int64_t b = 0; b < num_sequences; b++)
        count += (starts[b + 1] - starts[b] + tokens - 1) / tokens * c.num_kv_heads;
    Tile* tiles = reinterpret_cast<Tile*>(scratch(0, count * sizeof(Tile) / sizeof(float)));
    int64_t n = 0;
    for (int64_t b = 0; b < num_sequences; b++) {
        int64_t rows = starts[b + 1] - starts[b];
        // Of one row all heads together, where there are tasks enough: a position's keys lie side by side.
        int64_t heads = rows > 1 || num_sequences < 4 * num_threads() ? 1 : std::min(c.num_kv_heads, MAX_ROWS / group);
        // The longest first, so that no thread is left alone with it at the end.
        for (int64_t last = rows; last > 0; last -= tokens)
            for (int64_t head = 0; head < c.num_kv_heads; head += heads)
                tiles[n++] = {b, head, std::min(heads, c.num_kv_heads - head), std::max<int64_t>(last - tokens, 0), last};
    }
    parallel(n, [&](int64_t i) { attend(c, tiles[i]); });
}

}  // namespace

// storage: of keys and values.
extern "C" void quiver_paged_attention(const float* q, int64_t q_step, const void* keys, const void* values,
                                       int64_t storage, int64_t token_step, int64_t value_step, float* out,
                                       const Layout* layout, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                       float scale, int64_t causal, int64_t window, const float* bias,
                                       int64_t bias_limit) {
    with_storage(keys, storage, [&](auto* typed_keys) {
        using Kv = std::remove_const_t<std::remove_pointer_t<decltype(typed_keys)>>;
        paged_attention(Call<Kv>{q, q_step, typed_keys, static_cast<const Kv*>(values), token_step, value_step, out,
                                 *layout, num_heads, num_kv_heads, head_dim, scale, causal, window, bias, bias_limit});
    });
}

// keys[places[r]] = k[r] and values[places[r]] = v[r], in their type; a row has `width` elements.
extern "C" void quiver_store_rows(void* keys, void* values, int64_t storage, int64_t width, const float* k,
                                  int64_t k_step, const float* v, int64_t v_step, const int64_t* places, int64_t rows) {
    with_storage(keys, storage, [&](auto* typed_keys) {
        using Kv = std::remove_const_t<std::remove_pointer_t<decltype(typed_keys)>>;
        for (int64_t r = 0; r < rows; r++) {
            Kv* key = static_cast<Kv*>(keys) + places[r] * width;
            Kv* value = static_cast<Kv*>(values) + places[r] * width;
            for (int64_t e = 0; e < width; e++) narrow(k[r * k_step + e], key[e]);
            for (int64_t e = 0; e < width; e++) narrow(v[r * v_step + e], value[e]);
        }
    });
}
