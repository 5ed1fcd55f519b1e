// The types that weights, keys and values are stored in, widened to fp32 where they are used. Widening is exact.
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

// Sixteen of them, or the first n and zeros after.
inline Lanes widen(const float* p) { return load(p); }
inline Lanes widen_first(const float* p, int n) { return load_first(p, n); }
template <typename Narrow>
inline Lanes widen(const Narrow* p) {
#ifdef __AVX512F__
    return {reg_widen(p)};
#else
    return {reg_widen(p), reg_widen(p + WIDTH)};
#endif
}
template <typename Narrow>
inline Lanes widen_first(const Narrow* p, int n) {
    alignas(64) float first[LANES] = {};
    for (int i = 0; i < n; i++) first[i] = widened(p[i]);
    return load(first);
}

// The nearest number of the type, ties to even; as torch rounds.
inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, Fp16& out) { out.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void narrow(float x, Bf16& out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    out.bits = x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Calls body(pointer) with the weights' own type.
template <typename Body>
void with_storage(const void* weights, int64_t storage, const Body& body) {
    switch (static_cast<Storage>(storage)) {
        case Storage::FP32: return body(static_cast<const float*>(weights));
        case Storage::BF16: return body(static_cast<const Bf16*>(weights));
        case Storage::FP16: return body(static_cast<const Fp16*>(weights));
    }
}
