// Every kernel that a step calls, documented at its definition. Row counts are named `rows`.
#pragma once
#include <cstdint>

struct Layout;
struct Groups;

extern "C" {
void quiver_linear(const float* x, int64_t ldx, const void* packed, int64_t storage, const float* bias, float* y,
                   int64_t ldy, int64_t rows, int64_t n, int64_t k);
void quiver_add_lora(float* y, int64_t ldy, const float* x, int64_t ldx, int64_t k, const Groups* groups, int64_t site);
void quiver_paged_attention(const float* q, int64_t q_step, const void* keys, const void* values, int64_t storage,
                            int64_t token_step, int64_t value_step, float* out, const Layout* layout, int64_t num_heads,
                            int64_t num_kv_heads, int64_t head_dim, float scale, int64_t causal, int64_t window,
                            const float* bias, int64_t bias_limit);
void quiver_store_rows(void* keys, void* values, int64_t storage, int64_t width, const float* k, int64_t k_step,
                       const float* v, int64_t v_step, const int64_t* places, int64_t rows);
void quiver_rms_norm(const float* x, int64_t ldx, const float* weight, float eps, float* out, int64_t rows,
                     int64_t heads, int64_t width);
void quiver_layer_norm(const float* x, const float* weight, const float* bias, float weight_offset, float eps,
                       float* out, int64_t rows, int64_t width);
void quiver_activate(const float* x, int64_t ldx, float* out, int64_t rows, int64_t width, int64_t gated, int64_t kind);
void quiver_rotate(const float* x, int64_t ldx, float* out, int64_t rows, int64_t heads, int64_t head_dim,
                   const float* cos, const float* sin, int64_t dim);
void quiver_rotary(const int64_t* positions, const float* frequencies, float factor, float* cos, float* sin,
                   int64_t rows, int64_t half);
void quiver_add(const float* x, const float* y, float* out, int64_t rows, int64_t width);
void quiver_gather(const void* table, int64_t storage, int64_t panel, int64_t size, const int64_t* ids, float* out,
                   int64_t rows, int64_t width);
void quiver_best(const float* x, int64_t* out, int64_t rows, int64_t width);
void quiver_scale_inputs(const float* x, int64_t ldx, float* out, int64_t rows, int64_t k, const Groups* groups,
                         int64_t site);
void quiver_scale_outputs(float* y, int64_t ldy, const Groups* groups, int64_t site);
void quiver_add_bottleneck(float* out, const float* residual, int64_t width, const Groups* groups, int64_t site);
}
