// Sixteen fp32 lanes: one AVX-512 register, or two AVX2 ones. Both give the same bits.
#pragma once
#include <immintrin.h>

#include <cstdint>

#if !defined(__AVX2__) || !defined(__FMA__)
#error "needs AVX2 and FMA"
#endif

constexpr int LANES = 16;

#ifdef __AVX512F__

// What the innermost loops are written in: the compiler keeps arrays of these in registers, but not arrays of pairs.
using Register = __m512;
inline Register reg_zero() { return _mm512_setzero_ps(); }
inline Register reg_all(float x) { return _mm512_set1_ps(x); }
inline Register reg_load(const float* p) { return _mm512_loadu_ps(p); }
inline void reg_store(float* p, Register a) { _mm512_storeu_ps(p, a); }
inline Register reg_fma(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }

struct Lanes {
    __m512 v;
};
inline Lanes zero() { return {_mm512_setzero_ps()}; }
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline __mmask16 first_bits(int n) { return (__mmask16)((1u << n) - 1); }
inline Lanes load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_bits(n), p)}; }
inline void store_first(float* p, Lanes a, int n) { _mm512_mask_storeu_ps(p, first_bits(n), a.v); }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes div(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes round_even(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline __m256 low(Lanes a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high(Lanes a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)); }
inline Lanes join(__m256 lo, __m256 hi) {
    return {_mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(lo)), _mm256_castps_pd(hi), 1))};
}
// 2^n for whole numbers n in [-126, 127].
inline Lanes power_of_two(Lanes n) {
    __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
    return {_mm512_castsi512_ps(bits)};
}
// `yes` where a > b, else `no`; also `no` where either is NaN.
inline Lanes select_greater(Lanes a, Lanes b, Lanes yes, Lanes no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
}

#else

using Register = __m256;
inline Register reg_zero() { return _mm256_setzero_ps(); }
inline Register reg_all(float x) { return _mm256_set1_ps(x); }
inline Register reg_load(const float* p) { return _mm256_loadu_ps(p); }
inline void reg_store(float* p, Register a) { _mm256_storeu_ps(p, a); }
inline Register reg_fma(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }

struct Lanes {
    __m256 a, b;
};
inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes all(float x) {
    __m256 v = _mm256_set1_ps(x);
    return {v, v};
}
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline __m256i first_mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Lanes load_first(const float* p, int n) {
    return {_mm256_maskload_ps(p, first_mask(n)), n > 8 ? _mm256_maskload_ps(p + 8, first_mask(n - 8)) : _mm256_setzero_ps()};
}
inline void store_first(float* p, Lanes x, int n) {
    _mm256_maskstore_ps(p, first_mask(n), x.a);
    if (n > 8) _mm256_maskstore_ps(p + 8, first_mask(n - 8), x.b);
}
inline Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes sub(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lanes mul(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes div(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Lanes max(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Lanes min(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Lanes round_even(Lanes x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 low(Lanes x) { return x.a; }
inline __m256 high(Lanes x) { return x.b; }
inline Lanes join(__m256 lo, __m256 hi) { return {lo, hi}; }
inline __m256 power_of_two_half(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Lanes power_of_two(Lanes n) { return {power_of_two_half(n.a), power_of_two_half(n.b)}; }
inline Lanes select_greater(Lanes a, Lanes b, Lanes yes, Lanes no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ))};
}

#endif

constexpr int WIDTH = sizeof(Register) / sizeof(float);
constexpr int PER_LANES = LANES / WIDTH;

// The sums of eight registers' sixteen lanes, in a fixed order whatever stands in the others.
inline __m256 sum_eight(const Lanes* x) {
    __m256 s[8];
    for (int i = 0; i < 8; i++) s[i] = _mm256_add_ps(low(x[i]), high(x[i]));
    __m256 s01 = _mm256_hadd_ps(s[0], s[1]), s23 = _mm256_hadd_ps(s[2], s[3]);
    __m256 s45 = _mm256_hadd_ps(s[4], s[5]), s67 = _mm256_hadd_ps(s[6], s[7]);
    __m256 left = _mm256_hadd_ps(s01, s23), right = _mm256_hadd_ps(s45, s67);
    return _mm256_add_ps(_mm256_permute2f128_ps(left, right, 0x20), _mm256_permute2f128_ps(left, right, 0x31));
}

// The sum of the lanes, in the same order.
inline float sum(Lanes x) {
    __m256 s = _mm256_add_ps(low(x), high(x));
    s = _mm256_hadd_ps(s, s);
    s = _mm256_hadd_ps(s, s);
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

inline float largest(Lanes x) {
    __m256 m = _mm256_max_ps(low(x), high(x));
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

// e^x to about 1 unit in the last place; 0 below -87.3 (Cephes' expf: e^x = 2^n · polynomial(x - n ln 2)).
inline Lanes exponential(Lanes x) {
    const Lanes lowest = all(-87.33654f);
    Lanes clamped = min(all(88.0f), max(lowest, x));  // this order lets NaN through
    Lanes n = round_even(mul(clamped, all(1.44269504088896341f)));
    Lanes r = fma(n, all(-0.693359375f), clamped);
    r = fma(n, all(2.12194440e-4f), r);
    Lanes p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), all(1.0f));
    Lanes result = mul(p, power_of_two(n));
#ifdef __AVX512F__
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, lowest.v, _CMP_NLT_UQ), result.v)};
#else
    return {_mm256_and_ps(result.a, _mm256_cmp_ps(x.a, lowest.a, _CMP_NLT_UQ)),
            _mm256_and_ps(result.b, _mm256_cmp_ps(x.b, lowest.b, _CMP_NLT_UQ))};
#endif
}

// erf(x) to about 1 unit in the last place: a polynomial near zero, 1 - e^(polynomial of |x|) beyond (N. Juffa's erff,
// forums.developer.nvidia.com, "A faster and more accurate implementation of erff").
inline Lanes error_function(Lanes x) {
    Lanes size = max(sub(zero(), x), x), square = mul(x, x);
    Lanes far = fma(all(-1.72853470e-5f), size, all(3.83197126e-4f));
    Lanes odd = fma(all(-3.88396438e-3f), size, all(2.42546219e-2f));
    far = fma(far, square, odd);
    far = fma(far, size, all(-1.06777877e-1f));
    far = fma(far, size, all(-6.34846687e-1f));
    far = fma(far, size, all(-1.28717512e-1f));
    far = fma(far, size, sub(zero(), size));
    far = sub(all(1.0f), exponential(far));
    far = select_greater(x, zero(), far, sub(zero(), far));
    Lanes near = all(-5.96761703e-4f);
    near = fma(near, square, all(4.99119423e-3f));
    near = fma(near, square, all(-2.67681349e-2f));
    near = fma(near, square, all(1.12819925e-1f));
    near = fma(near, square, all(-3.76125336e-1f));
    near = fma(near, square, all(1.28379166e-1f));
    near = fma(near, x, x);
    return select_greater(size, all(0.927734375f), far, near);
}
