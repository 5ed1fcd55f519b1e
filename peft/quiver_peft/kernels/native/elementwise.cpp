// Norm, rotary positions and activations: row by row, so that a row's result is its own.
#include <algorithm>
#include <cmath>

#include "lanes.h"
#include "pool.h"

namespace {

// Rows in one task: enough work that handing it out does not show.
int64_t rows_per_task(int64_t width) { return std::max<int64_t>(1, 16384 / width); }

template <typename Body>
void for_rows(int64_t rows, int64_t width, const Body& body) {
    int64_t per_task = rows_per_task(width);
    parallel((rows + per_task - 1) / per_task, [&](int64_t task) {
        for (int64_t r = task * per_task; r < std::min(rows, (task + 1) * per_task); r++) body(r);
    });
}

inline Lanes sigmoid(Lanes x) { return div(all(1.0f), add(all(1.0f), exponential(sub(zero(), x)))); }

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
    return x;
}

template <int kind>
void gate_rows(const float* x, int64_t ldx, float* out, int64_t rows, int64_t width, bool gated) {
    for_rows(rows, width, [&](int64_t r) {
        const float* gate = x + r * ldx;
        const float* up = gate + width;
        float* to = out + r * width;
        for (int64_t i = 0; i < width; i += LANES) {
            int left = std::min<int64_t>(LANES, width - i);
            Lanes value = activate<kind>(load_first(gate + i, left));
            if (gated) value = mul(value, load_first(up + i, left));
            store_first(to + i, value, left);
        }
    });
}

}  // namespace

// out = x / sqrt(mean(x²) + eps) · weight. x: [rows, width] with a row step; out: packed.
extern "C" void quiver_rms_norm(const float* x, int64_t ldx, const float* weight, float eps, float* out, int64_t rows,
                                int64_t width) {
    for_rows(rows, width, [&](int64_t r) {
        const float* from = x + r * ldx;
        Lanes squares[4] = {zero(), zero(), zero(), zero()};
        int64_t i = 0;
        for (; i + 4 * LANES <= width; i += 4 * LANES)
            for (int j = 0; j < 4; j++) {
                Lanes v = load(from + i + j * LANES);
                squares[j] = fma(v, v, squares[j]);
            }
        for (; i < width; i += LANES) {
            Lanes v = load_first(from + i, std::min<int64_t>(LANES, width - i));
            squares[0] = fma(v, v, squares[0]);
        }
        float mean = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3]))) / width;
        Lanes factor = all(1.0f / std::sqrt(mean + eps));
        float* to = out + r * width;
        for (i = 0; i < width; i += LANES) {
            int left = std::min<int64_t>(LANES, width - i);
            store_first(to + i, mul(mul(load_first(from + i, left), factor), load_first(weight + i, left)), left);
        }
    });
}

// out = act(x[:, :width]), times x[:, width:] when gated. kind: 0 silu, 1 relu, 2 relu squared, 3 gelu by tanh.
extern "C" void quiver_activate(const float* x, int64_t ldx, float* out, int64_t rows, int64_t width, int64_t gated,
                                int64_t kind) {
    if (kind == 0) gate_rows<0>(x, ldx, out, rows, width, gated);
    if (kind == 1) gate_rows<1>(x, ldx, out, rows, width, gated);
    if (kind == 2) gate_rows<2>(x, ldx, out, rows, width, gated);
    if (kind == 3) gate_rows<3>(x, ldx, out, rows, width, gated);
}

// Rotate the first `dim` features of every head in place, the two halves being the pairs.
// x: [rows, heads, head_dim] with a row step; cos, sin: [rows, dim].
extern "C" void quiver_rotate(float* x, int64_t ldx, int64_t rows, int64_t heads, int64_t head_dim, const float* cos,
                              const float* sin, int64_t dim) {
    for_rows(rows, heads * head_dim, [&](int64_t r) {
        const float *c = cos + r * dim, *s = sin + r * dim;
        int64_t half = dim / 2;
        for (int64_t h = 0; h < heads; h++) {
            float* first = x + r * ldx + h * head_dim;
            float* second = first + half;
            for (int64_t i = 0; i < half; i += LANES) {
                int left = std::min<int64_t>(LANES, half - i);
                Lanes a = load_first(first + i, left), b = load_first(second + i, left);
                Lanes turned_a = sub(mul(a, load_first(c + i, left)), mul(b, load_first(s + i, left)));
                Lanes turned_b = add(mul(b, load_first(c + half + i, left)), mul(a, load_first(s + half + i, left)));
                store_first(first + i, turned_a, left);
                store_first(second + i, turned_b, left);
            }
        }
    });
}
