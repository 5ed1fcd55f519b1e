// Bottleneck adapters of a step, each on its own rows: out += scale · up(act(down(u))), weights read in place.
#include <algorithm>

#include "dots.h"
#include "groups.h"
#include "kernels.h"
#include "pool.h"
#include "rows.h"

namespace {

enum Norm : int64_t { NO_NORM, BEFORE, AFTER };
enum Source : int64_t { OUTPUT, OUTPUT_BEFORE_BIAS, SUM, RESIDUAL };

struct Bottleneck {
    int64_t rank;
    const float *down, *up;  // [rank, width], [width, rank]
    const float *down_bias, *up_bias, *norm_weight, *norm_bias, *out_bias;  // or null
    Norm norm;
    int64_t activation;  // as quiver_activate has it
    Source source;
    float scale, eps;
};

struct Item {
    int64_t row, rows;
    const Bottleneck* bottleneck;
};

constexpr int64_t ROWS = 32;  // of one adapter in one task

template <typename Step>
void each(int64_t width, const Step& step) {
    for (int64_t i = 0; i < width; i += LANES) step(i, std::min<int64_t>(LANES, width - i));
}

void add_bias(float* x, const float* bias, int64_t width) {
    if (bias)
        each(width, [&](int64_t i, int left) {
            store_first(x + i, add(load_first(x + i, left), load_first(bias + i, left)), left);
        });
}

// The bottleneck's input u, from the sub-layer's output and the residual.
void enter(const Bottleneck& b, const float* out, const float* residual, float* u, int64_t width) {
    each(width, [&](int64_t i, int left) {
        Lanes value = load_first((b.source == RESIDUAL ? residual : out) + i, left);
        if (b.source == SUM) value = add(value, load_first(residual + i, left));
        if (b.out_bias) value = sub(value, load_first(b.out_bias + i, left));
        store_first(u + i, value, left);
    });
    if (b.norm == BEFORE) layer_norm_row(u, b.norm_weight, b.norm_bias, 0, b.eps, u, width);
}

template <int kind>
void activate_row(float* x, int64_t width) {
    each(width, [&](int64_t i, int left) { store_first(x + i, activate<kind>(load_first(x + i, left)), left); });
}

void activate_row(int64_t kind, float* x, int64_t width) {
    if (kind == 0) activate_row<0>(x, width);
    if (kind == 1) activate_row<1>(x, width);
    if (kind == 3) activate_row<3>(x, width);
    if (kind == 4) activate_row<4>(x, width);
}

void add_item(const Item& item, float* out, const float* residual, int64_t width) {
    const Bottleneck& b = *item.bottleneck;
    float* u = scratch(1, item.rows * (width + b.rank));
    float* inner = u + item.rows * width;
    for (int64_t r = 0; r < item.rows; r++)
        enter(b, out + (item.row + r) * width, residual + (item.row + r) * width, u + r * width, width);
    shrink(u, width, item.rows, b.down, width, 0, b.rank, inner, b.rank);
    for (int64_t r = 0; r < item.rows; r++) {
        add_bias(inner + r * b.rank, b.down_bias, b.rank);
        activate_row(b.activation, inner + r * b.rank, b.rank);
    }
    float* delta = u;  // reuses u's memory
    shrink(inner, b.rank, item.rows, b.up, b.rank, 0, width, delta, width);
    for (int64_t r = 0; r < item.rows; r++) {
        float *from = delta + r * width, *to = out + (item.row + r) * width;
        add_bias(from, b.up_bias, width);
        if (b.norm == AFTER) layer_norm_row(from, b.norm_weight, b.norm_bias, 0, b.eps, from, width);
        each(width, [&](int64_t i, int left) {
            store_first(to + i, add(load_first(to + i, left), mul(load_first(from + i, left), all(b.scale))), left);
        });
    }
}

}  // namespace

// out, residual: [rows, width], the sub-layer's output and what it is added to.
extern "C" void quiver_add_bottleneck(float* out, const float* residual, int64_t width, const Groups* groups,
                                      int64_t site) {
    int64_t count = 0;
    for (const Group& group : *groups)
        if (group.at<Bottleneck>(site)) count += (group.end - group.start + ROWS - 1) / ROWS;
    Item* items = reinterpret_cast<Item*>(scratch(0, count * sizeof(Item) / sizeof(float)));
    int64_t n = 0;
    for (const Group& group : *groups)
        if (const Bottleneck* bottleneck = group.at<Bottleneck>(site))
            for (int64_t row = group.start; row < group.end; row += ROWS)
                items[n++] = {row, std::min(ROWS, group.end - row), bottleneck};
    parallel(n, [&](int64_t i) { add_item(items[i], out, residual, width); });
}
