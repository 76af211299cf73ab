// The instructions that the kernels need, for one instruction set: 16 lanes of int32 or float32.
//
// Compiled once for each instruction set, chosen by the compiler's flags. No header of C++'s
// library is included in what is compiled so: functions of theirs compiled for a new processor
// could be linked into code that an old one runs.

#pragma once

#include <cstdint>

#if defined(__AVX512VNNI__)

#include <immintrin.h>
#define INSTRUCTION_SET avx512_vnni

namespace {

struct Lanes {
    using Ints = __m512i;
    using Floats = __m512;
    static constexpr int PANELS_AT_ONCE = 4, ROWS_AT_ONCE = 6;
    static constexpr bool SIGNED = false;  // whether dot() takes weights of all 8 bits as signed

    static Ints load(const void *p) { return _mm512_loadu_si512(p); }
    static void store(void *p, Ints x) { _mm512_storeu_si512(p, x); }
    static Ints ints(int32_t x) { return _mm512_set1_epi32(x); }
    static Ints bytes(int x) { return _mm512_set1_epi8(x); }
    static Ints four(const int8_t *p) {
        int32_t x;
        __builtin_memcpy(&x, p, 4);
        return ints(x);
    }
    // Not the intrinsic: gcc 12 copies its sums to and fro.
    static Ints dot(Ints sum, Ints w, Ints x) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
        return sum;
    }
    static Ints bits(Ints w, int mask) { return _mm512_and_si512(w, bytes(mask)); }
    static Ints flip(Ints w, int mask) { return _mm512_xor_si512(w, bytes(mask)); }
    template <int N> static Ints left(Ints w) { return _mm512_slli_epi32(w, N); }
    template <int N> static Ints right(Ints w) { return _mm512_srli_epi32(w, N); }
    static Ints merge(Ints low, Ints w, int mask) {  // low | (w & mask)
        return _mm512_ternarylogic_epi32(low, w, bytes(mask), 0xf8);
    }

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats floats(float x) { return _mm512_set1_ps(x); }
    static Floats floats(Ints x) { return _mm512_cvtepi32_ps(x); }
    static Floats load(const float *p) { return _mm512_loadu_ps(p); }
    static Floats halves(const uint16_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
    }
    static Floats bfloats(const uint16_t *p) {
        return _mm512_castsi512_ps(left<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p))));
    }
    static Floats unsigned_bytes(const uint8_t *p) {
        return floats(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
    }
    static Floats signed_bytes(const int8_t *p) {
        return floats(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
    }
    static void store(float *p, Floats x) { _mm512_storeu_ps(p, x); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats subtract(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }

    static float sum(Floats x) { return _mm512_reduce_add_ps(x); }
    static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
    static Floats above_zero(Floats x) {  // 1 where x > 0, else 0
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ), floats(1.0f));
    }
    static Ints rounded(Floats x) { return _mm512_cvtps_epi32(x); }
    static Floats scaled_by_power(Floats x, Ints n) {  // x * 2^n
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), left<23>(n)));
    }

    static float largest(Floats a, Floats b) {  // magnitude
        return _mm512_reduce_max_ps(max(magnitude(a), magnitude(b)));
    }
    // Rounded to the nearest, ties to even; stored as int8. Gives their sum.
    static int32_t store_rounded(int8_t *p, Floats x) {
        Ints whole = _mm512_cvtps_epi32(x);
        _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(whole));
        return _mm512_reduce_add_epi32(whole);
    }
};

}  // namespace

#elif defined(__AVX2__)

#include <immintrin.h>
#if defined(__AVXVNNI__)
#define INSTRUCTION_SET avx_vnni
#else
#define INSTRUCTION_SET avx2
#endif

namespace {

struct Lanes {
    struct Ints { __m256i a, b; };
    struct Floats { __m256 a, b; };
    static constexpr int PANELS_AT_ONCE = 1, ROWS_AT_ONCE = 4;
#if defined(__AVXVNNI__)
    static constexpr bool SIGNED = false;
#else
    static constexpr bool SIGNED = true;
#endif

    static Ints load(const void *p) {
        const __m256i *from = (const __m256i *)p;
        return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
    }
    static void store(void *p, Ints x) {
        __m256i *to = (__m256i *)p;
        _mm256_storeu_si256(to, x.a);
        _mm256_storeu_si256(to + 1, x.b);
    }
    static Ints ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    static Ints four(const int8_t *p) {
        int32_t x;
        __builtin_memcpy(&x, p, 4);
        return ints(x);
    }
#if defined(__AVXVNNI__)
    static Ints dot(Ints sum, Ints w, Ints x) {
        return {_mm256_dpbusd_avx_epi32(sum.a, w.a, x.a), _mm256_dpbusd_avx_epi32(sum.b, w.b, x.b)};
    }
#else
    // vpmaddubsw saturates at 16 bits: the weights' magnitude may be 128, not 255.
    static __m256i dot(__m256i sum, __m256i w, __m256i x) {
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static Ints dot(Ints sum, Ints w, Ints x) {
        return {dot(sum.a, w.a, x.a), dot(sum.b, w.b, x.b)};
    }
#endif
    static Ints bits(Ints w, int mask) {
        __m256i m = _mm256_set1_epi8(mask);
        return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)};
    }
    static Ints flip(Ints w, int mask) {
        __m256i m = _mm256_set1_epi8(mask);
        return {_mm256_xor_si256(w.a, m), _mm256_xor_si256(w.b, m)};
    }
    template <int N> static Ints left(Ints w) {
        return {_mm256_slli_epi32(w.a, N), _mm256_slli_epi32(w.b, N)};
    }
    template <int N> static Ints right(Ints w) {
        return {_mm256_srli_epi32(w.a, N), _mm256_srli_epi32(w.b, N)};
    }
    static Ints merge(Ints low, Ints w, int mask) {
        Ints high = bits(w, mask);
        return {_mm256_or_si256(low.a, high.a), _mm256_or_si256(low.b, high.b)};
    }

    static Floats zero() { return floats(0.0f); }
    static Floats floats(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Floats floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
    static Floats load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Floats halves(const uint16_t *p) {
        const __m128i *from = (const __m128i *)p;
        return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
    }
    static Floats bfloats(const uint16_t *p) {
        const __m128i *from = (const __m128i *)p;
        Ints x = left<16>(Ints{_mm256_cvtepu16_epi32(_mm_loadu_si128(from)),
                               _mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1))});
        return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
    }
    static Floats unsigned_bytes(const uint8_t *p) {
        return floats(Ints{_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                           _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))});
    }
    static Floats signed_bytes(const int8_t *p) {
        return floats(Ints{_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                           _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))});
    }
    static void store(float *p, Floats x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static Floats mul(Floats x, Floats y) {
        return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
    }
    static Floats add(Floats x, Floats y, Floats z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    static Floats subtract(Floats x, Floats y, Floats z) {
        return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
    }

    static float sum(Floats x) {
        __m256 s = _mm256_add_ps(x.a, x.b);
        __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
        t = _mm_add_ps(t, _mm_movehl_ps(t, t));
        return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
    }
    static Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static Ints rounded(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
    static Floats scaled_by_power(Floats x, Ints n) {
        Ints power = left<23>(n);
        return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.a), power.a)),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.b), power.b))};
    }

    static Floats div(Floats x, Floats y) {
        return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
    }
    static Floats magnitude(Floats x) {
        __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
    }
    static __m256 above_zero(__m256 x) {
        return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ), _mm256_set1_ps(1.0f));
    }
    static Floats above_zero(Floats x) { return {above_zero(x.a), above_zero(x.b)}; }

    static float largest(Floats x, Floats y) {
        Floats both = max(magnitude(x), magnitude(y));
        __m256 m = _mm256_max_ps(both.a, both.b);
        __m128 n = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
        n = _mm_max_ps(n, _mm_movehl_ps(n, n));
        return _mm_cvtss_f32(_mm_max_ss(n, _mm_movehdup_ps(n)));
    }
    static int32_t store_rounded(int8_t *p, Floats x) {
        __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
        _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(low, high));
        __m256i s = _mm256_add_epi32(a, b);
        __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
        t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
    }
};

}  // namespace

#elif defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>
#define INSTRUCTION_SET neon_dotprod

namespace {

struct Lanes {
    struct Ints { int32x4_t v[4]; };
    struct Floats { float32x4_t v[4]; };
    static constexpr int PANELS_AT_ONCE = 1, ROWS_AT_ONCE = 4;
    static constexpr bool SIGNED = true;

    template <class F> static Ints each(F f) { return {{f(0), f(1), f(2), f(3)}}; }
    template <class F> static Floats every(F f) { return {{f(0), f(1), f(2), f(3)}}; }
    static uint8x16_t u8(int32x4_t x) { return vreinterpretq_u8_s32(x); }
    static int32x4_t s32(uint8x16_t x) { return vreinterpretq_s32_u8(x); }

    static Ints load(const void *p) {
        return each([=](int i) { return s32(vld1q_u8((const uint8_t *)p + 16 * i)); });
    }
    static void store(void *p, Ints x) {
        for (int i = 0; i < 4; i++) vst1q_u8((uint8_t *)p + 16 * i, u8(x.v[i]));
    }
    static Ints ints(int32_t x) {
        return each([=](int) { return vdupq_n_s32(x); });
    }
    static Ints four(const int8_t *p) {
        int32_t x;
        __builtin_memcpy(&x, p, 4);
        return ints(x);
    }
    static Ints dot(Ints sum, Ints w, Ints x) {
        return each([&](int i) {
            return vdotq_s32(sum.v[i], vreinterpretq_s8_s32(w.v[i]), vreinterpretq_s8_s32(x.v[i]));
        });
    }
    static Ints bits(Ints w, int mask) {
        return each([&](int i) { return s32(vandq_u8(u8(w.v[i]), vdupq_n_u8(mask))); });
    }
    static Ints flip(Ints w, int mask) {
        return each([&](int i) { return s32(veorq_u8(u8(w.v[i]), vdupq_n_u8(mask))); });
    }
    template <int N> static Ints left(Ints w) {
        if constexpr (N == 0) return w;
        else return each([&](int i) { return vshlq_n_s32(w.v[i], N); });
    }
    template <int N> static Ints right(Ints w) {
        if constexpr (N == 0) return w;
        else return each([&](int i) {
            return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(w.v[i]), N));
        });
    }
    static Ints merge(Ints low, Ints w, int mask) {
        Ints high = bits(w, mask);
        return each([&](int i) { return vorrq_s32(low.v[i], high.v[i]); });
    }

    static Floats zero() { return floats(0.0f); }
    static Floats floats(float x) {
        return every([=](int) { return vdupq_n_f32(x); });
    }
    static Floats floats(Ints x) {
        return every([&](int i) { return vcvtq_f32_s32(x.v[i]); });
    }
    static Floats load(const float *p) {
        return every([=](int i) { return vld1q_f32(p + 4 * i); });
    }
    static Floats halves(const uint16_t *p) {
        return every([=](int i) {
            return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
        });
    }
    static Floats bfloats(const uint16_t *p) {
        return every([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
    }
    static Floats unsigned_bytes(const uint8_t *p) {
        uint8x16_t x = vld1q_u8(p);
        uint16x8_t a = vmovl_u8(vget_low_u8(x)), b = vmovl_u8(vget_high_u8(x));
        return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(a))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(a))),
                 vcvtq_f32_u32(vmovl_u16(vget_low_u16(b))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(b)))}};
    }
    static Floats signed_bytes(const int8_t *p) {
        int8x16_t x = vld1q_s8(p);
        int16x8_t a = vmovl_s8(vget_low_s8(x)), b = vmovl_s8(vget_high_s8(x));
        return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(a))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(a))),
                 vcvtq_f32_s32(vmovl_s16(vget_low_s16(b))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(b)))}};
    }
    static void store(float *p, Floats x) {
        for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
    }
    static Floats mul(Floats x, Floats y) {
        return every([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
    }
    static Floats add(Floats x, Floats y, Floats z) {
        return every([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
    }
    static Floats subtract(Floats x, Floats y, Floats z) {
        return every([&](int i) { return vfmsq_f32(z.v[i], x.v[i], y.v[i]); });
    }

    static float sum(Floats x) {
        return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3])));
    }
    static Floats max(Floats x, Floats y) {
        return every([&](int i) { return vmaxq_f32(x.v[i], y.v[i]); });
    }
    static Floats div(Floats x, Floats y) {
        return every([&](int i) { return vdivq_f32(x.v[i], y.v[i]); });
    }
    static Floats magnitude(Floats x) {
        return every([&](int i) { return vabsq_f32(x.v[i]); });
    }
    static Floats above_zero(Floats x) {
        return every([&](int i) {
            uint32x4_t one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
            return vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(x.v[i], vdupq_n_f32(0.0f)), one));
        });
    }
    static Ints rounded(Floats x) {
        return each([&](int i) { return vcvtnq_s32_f32(x.v[i]); });
    }
    static Floats scaled_by_power(Floats x, Ints n) {
        return every([&](int i) {
            return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x.v[i]), vshlq_n_s32(n.v[i], 23)));
        });
    }

    static float largest(Floats x, Floats y) {
        float32x4_t m = vdupq_n_f32(0);
        for (int i = 0; i < 4; i++) {
            m = vmaxq_f32(m, vmaxq_f32(vabsq_f32(x.v[i]), vabsq_f32(y.v[i])));
        }
        return vmaxvq_f32(m);
    }
    static int32_t store_rounded(int8_t *p, Floats x) {
        Ints n = each([&](int i) { return vcvtnq_s32_f32(x.v[i]); });
        int16x8_t a = vcombine_s16(vqmovn_s32(n.v[0]), vqmovn_s32(n.v[1]));
        int16x8_t b = vcombine_s16(vqmovn_s32(n.v[2]), vqmovn_s32(n.v[3]));
        vst1q_s8(p, vcombine_s8(vqmovn_s16(a), vqmovn_s16(b)));
        return vaddvq_s32(vaddq_s32(vaddq_s32(n.v[0], n.v[1]), vaddq_s32(n.v[2], n.v[3])));
    }
};

}  // namespace

#else
#error "no instruction set that lanes.h knows"
#endif
