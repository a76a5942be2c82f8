/* Quantised weights for x86-64 with AVX2, FMA and F16C (Haswell 2013, Zen 2017, and later): 256-bit vectors. AVX-512 without
 * VNNI uses these kernels, too, because it lacks an instruction that gives one byte the sign of another. */
#include "micro.h"
#if defined(__x86_64__)
TARGET("avx2,fma,f16c")
#include <immintrin.h>
#define W 8
#define FMA(a, b, c) ((vec)_mm256_fmadd_ps((a), (b), (c)))
#define HALVES(p) ((vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
/* vpmaddubsw multiplies unsigned by signed bytes, and adds pairs in 16 bits. So multiply |w| by x with the sign of w: at most 2
 * x 128 x 127 = 32,512. */
#define PREPARE(w) ((ivec)_mm256_abs_epi8((__m256i)(w)))
#define BIAS 0
#define PAIRS(w, x) _mm256_maddubs_epi16((__m256i)(w), (__m256i)(x))
#define DOT8(sum, w, prepared, x) \
    ((sum) + (ivec)_mm256_madd_epi16(PAIRS(prepared, _mm256_sign_epi8((__m256i)(x), (__m256i)(w))), _mm256_set1_epi16(1)))
/* A whole group of nibbles fits into 16 bits: 16 x 15 x 127 = 30,480. */
#define START4(n) ((ivec){0})
#define DOT4(sum, w, x) ((ivec)_mm256_add_epi16((__m256i)(sum), PAIRS(w, x)))
#define FINISH4(sum, n) ((ivec)_mm256_madd_epi16((__m256i)(sum), _mm256_set1_epi16(1)) + (n))
#define STREAMS 2
#define TALL 8
#define TILE_PANELS 1
#include "quantised_body.h"
QUANTISED(avx2)
END_TARGET
#endif
