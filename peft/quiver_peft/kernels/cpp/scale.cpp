// Learned scales of the adapters in a step (IA3's vectors, DoRA's magnitudes), each on its adapter's rows.
#include <algorithm>

#include "groups.h"
#include "kernels.h"
#include "lanes.h"
#include "pool.h"

namespace {

// Outputs [start, end) become scale · y + shift; shift may be null.
struct OutScale {
    int64_t start, end;
    const float* scale;
    const float* shift;
};

struct Scale {
    const float* in_scale;  // or null
    int64_t num_outs;
    OutScale outs[1];  // in order
};

void scale_row(const float* x, const float* scale, const float* shift, float* out, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        int left = std::min<int64_t>(LANES, width - i);
        Lanes scaled = mul(load_first(x + i, left), load_first(scale + i, left));
        store_first(out + i, shift ? add(scaled, load_first(shift + i, left)) : scaled, left);
    }
}

constexpr int64_t ROWS = 16;  // in one task

template <typename Body>
void for_rows_of(const Group& group, const Body& body) {
    parallel((group.end - group.start + ROWS - 1) / ROWS, [&](int64_t task) {
        int64_t first = group.start + task * ROWS;
        for (int64_t r = first; r < std::min(first + ROWS, group.end); r++) body(r);
    });
}

}  // namespace

// out = x, the rows of adapters that scale the site's input scaled. x: [rows, k] with a row step; out: packed.
extern "C" void quiver_scale_inputs(const float* x, int64_t ldx, float* out, int64_t rows, int64_t k,
                                    const Groups* groups, int64_t site) {
    int64_t r = 0;
    auto copy_up_to = [&](int64_t end) {
        for (; r < end; r++) std::copy(x + r * ldx, x + r * ldx + k, out + r * k);
    };
    for (const Group& group : *groups) {
        const Scale* scale = group.at<Scale>(site);
        if (!scale || !scale->in_scale) continue;
        copy_up_to(group.start);
        for_rows_of(group, [&](int64_t i) { scale_row(x + i * ldx, scale->in_scale, nullptr, out + i * k, k); });
        r = group.end;
    }
    copy_up_to(rows);
}

// In place. y: [rows, outputs] with a row step.
extern "C" void quiver_scale_outputs(float* y, int64_t ldy, const Groups* groups, int64_t site) {
    for (const Group& group : *groups) {
        const Scale* scale = group.at<Scale>(site);
        if (!scale || !scale->num_outs) continue;
        for_rows_of(group, [&](int64_t r) {
            for (int64_t i = 0; i < scale->num_outs; i++) {
                const OutScale& out = scale->outs[i];
                float* at = y + r * ldy + out.start;
                scale_row(at, out.scale, out.shift, at, out.end - out.start);
            }
        });
    }
}
