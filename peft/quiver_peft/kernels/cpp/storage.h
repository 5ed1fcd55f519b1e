// The types that weights are stored in, widened to fp32 where they are used. Widening is exact.
#pragma once
#include <cstdint>
#include <cstring>

#include "lanes.h"

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

// As `packed_linear.py` and `elementwise.py` number them.
enum class Storage : int64_t { FP32 = 0, BF16 = 1, FP16 = 2 };

inline float widened(float w) { return w; }
inline float widened(Bf16 w) {
    uint32_t bits = static_cast<uint32_t>(w.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float widened(Fp16 w) { return _cvtsh_ss(w.bits); }

// One register of weights.
inline Register reg_widen(const float* p) { return reg_load(p); }
#ifdef __AVX512F__
inline Register reg_widen(const Bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Register reg_widen(const Fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#else
inline Register reg_widen(const Bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Register reg_widen(const Fp16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#endif

// Calls body(pointer) with the weights' own type.
template <typename Body>
void with_storage(const void* weights, int64_t storage, const Body& body) {
    switch (static_cast<Storage>(storage)) {
        case Storage::FP32: return body(static_cast<const float*>(weights));
        case Storage::BF16: return body(static_cast<const Bf16*>(weights));
        case Storage::FP16: return body(static_cast<const Fp16*>(weights));
    }
}
