// Norms, rotary positions, activations, look-up: row by row, hence batch-invariant.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "pool.h"
#include "rows.h"
#include "storage.h"

namespace {

// Rows in one task: enough work to hide the cost of scheduling it.
int64_t rows_per_task(int64_t width) { return std::max<int64_t>(1, 16384 / width); }

template <typename Body>
void for_rows(int64_t rows, int64_t width, const Body& body) {
    int64_t per_task = rows_per_task(width);
    parallel((rows + per_task - 1) / per_task, [&](int64_t task) {
        for (int64_t r = task * per_task; r < std::min(rows, (task + 1) * per_task); r++) body(r);
    });
}

template <int kind>
void gate_rows(const float* x, int64_t ldx, float* out, int64_t rows, int64_t width, bool gated) {
    for_rows(rows, width, [&](int64_t r) {
        const float* gate = x + r * ldx;
        const float* up = gate + width;
        float* to = out + r * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            Lanes value = activate<kind>(load(gate + i));
            store(to + i, gated ? mul(value, load(up + i)) : value);
        }
        if (i < width) {
            int left = width - i;
            Lanes value = activate<kind>(load_first(gate + i, left));
            if (gated) value = mul(value, load_first(up + i, left));
            store_first(to + i, value, left);
        }
    });
}

}  // namespace

// out = x / sqrt(mean(x²) + eps) · weight for each head of `width` in a row. x: [rows, heads, width] with a row step;
// out: packed.
extern "C" void quiver_rms_norm(const float* x, int64_t ldx, const float* weight, float eps, float* out, int64_t rows,
                                int64_t heads, int64_t width) {
    for_rows(rows, heads * width, [&](int64_t r) {
        for (int64_t h = 0; h < heads; h++) {
            const float* from = x + r * ldx + h * width;
            float* to = out + (r * heads + h) * width;
            float mean = sum_over(from, width, [](Lanes v, Lanes so_far) { return fma(v, v, so_far); }) / width;
            Lanes factor = all(1.0f / std::sqrt(mean + eps));
            for (int64_t i = 0; i < width; i += LANES) {
                int left = std::min<int64_t>(LANES, width - i);
                store_first(to + i, mul(mul(load_first(from + i, left), factor), load_first(weight + i, left)), left);
            }
        }
    });
}

// out = (x - mean) / sqrt(variance + eps) · (weight + weight_offset) + bias. x, out: [rows, width]; bias may be null.
extern "C" void quiver_layer_norm(const float* x, const float* weight, const float* bias, float weight_offset,
                                  float eps, float* out, int64_t rows, int64_t width) {
    for_rows(rows, width, [&](int64_t r) {
        layer_norm_row(x + r * width, weight, bias, weight_offset, eps, out + r * width, width);
    });
}

// out = act(x[:, :width]), times x[:, width:] when gated. kind: 0 silu, 1 relu, 2 relu squared, 3 gelu by tanh, 4 gelu by erf.
extern "C" void quiver_activate(const float* x, int64_t ldx, float* out, int64_t rows, int64_t width, int64_t gated,
                                int64_t kind) {
    if (kind == 0) gate_rows<0>(x, ldx, out, rows, width, gated);
    if (kind == 1) gate_rows<1>(x, ldx, out, rows, width, gated);
    if (kind == 2) gate_rows<2>(x, ldx, out, rows, width, gated);
    if (kind == 3) gate_rows<3>(x, ldx, out, rows, width, gated);
    if (kind == 4) gate_rows<4>(x, ldx, out, rows, width, gated);
}

// Rotate the first `dim` features of every head, the two halves being the pairs; the others stay as they are.
// x: [rows, heads, head_dim] with a row step; out: packed; cos, sin: [rows, dim].
extern "C" void quiver_rotate(const float* x, int64_t ldx, float* out, int64_t rows, int64_t heads, int64_t head_dim,
                              const float* cos, const float* sin, int64_t dim) {
    for_rows(rows, heads * head_dim, [&](int64_t r) {
        const float *c = cos + r * dim, *s = sin + r * dim;
        int64_t half = dim / 2;
        for (int64_t h = 0; h < heads; h++) {
            const float* from = x + r * ldx + h * head_dim;
            float* to = out + (r * heads + h) * head_dim;
            for (int64_t i = 0; i < half; i += LANES) {
                int left = std::min<int64_t>(LANES, half - i);
                Lanes a = load_first(from + i, left), b = load_first(from + half + i, left);
                Lanes turned_a = sub(mul(a, load_first(c + i, left)), mul(b, load_first(s + i, left)));
                Lanes turned_b = add(mul(b, load_first(c + half + i, left)), mul(a, load_first(s + half + i, left)));
                store_first(to + i, turned_a, left);
                store_first(to + half + i, turned_b, left);
            }
            std::copy(from + dim, from + head_dim, to + dim);
        }
    });
}

// cos, sin: [rows, 2 half], of positions[r] · frequencies, twice, times `factor`.
extern "C" void quiver_rotary(const int64_t* positions, const float* frequencies, float factor, float* cos, float* sin,
                              int64_t rows, int64_t half) {
    for_rows(rows, 32 * half, [&](int64_t r) {
        for (int64_t i = 0; i < half; i++) {
            float angle = static_cast<float>(positions[r]) * frequencies[i];
            float *c = cos + r * 2 * half + i, *s = sin + r * 2 * half + i;
            c[0] = c[half] = std::cos(angle) * factor;
            s[0] = s[half] = std::sin(angle) * factor;
        }
    });
}

// out = x + y, all [rows, width].
extern "C" void quiver_add(const float* x, const float* y, float* out, int64_t rows, int64_t width) {
    for_rows(rows, width, [&](int64_t r) {
        for (int64_t i = r * width; i < (r + 1) * width; i += LANES) {
            int left = std::min<int64_t>(LANES, (r + 1) * width - i);
            store_first(out + i, add(load_first(x + i, left), load_first(y + i, left)), left);
        }
    });
}

// out[r] = row ids[r] of a table [size, width], as fp32; NaN where there is no such row. panel: how many rows lie
// interleaved, as [size / panel][width][panel]: 16 in a packed weight, 1 in a plain table.
extern "C" void quiver_gather(const void* table, int64_t storage, int64_t panel, int64_t size, const int64_t* ids,
                              float* out, int64_t rows, int64_t width) {
    with_storage(table, storage, [&](auto* from) {
        for_rows(rows, width, [&](int64_t r) {
            float* to = out + r * width;
            if (ids[r] < 0 || ids[r] >= size) {
                std::fill(to, to + width, NAN);
                return;
            }
            auto* row = from + ids[r] / panel * panel * width + ids[r] % panel;
            if (panel == 1)
                for (int64_t i = 0; i < width; i++) to[i] = widened(row[i]);
            else
                for (int64_t i = 0; i < width; i++) to[i] = widened(row[i * panel]);
        });
    });
}

// out[r] = first index of row r's maximum; -1 where it is not finite or the row holds a NaN.
extern "C" void quiver_best(const float* x, int64_t* out, int64_t rows, int64_t width) {
    for_rows(rows, width, [&](int64_t r) {
        const float* row = x + r * width;
        Lanes top = all(-INFINITY);
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) top = max(load(row + i), top);
        float best = largest(top);
        for (; i < width; i++) best = std::max(best, row[i]);
        bool is_number = true;
        for (i = 0; i < width; i++) is_number &= row[i] == row[i];
        out[r] = is_number && std::isfinite(best) ? std::find(row, row + width, best) - row : -1;
    });
}
