/* Quantised weights for x86-64 with AVX-VNNI (Alder Lake 2021, Zen 5 2024, and later): 256-bit vectors. */
#include "micro.h"
#if defined(__x86_64__)
TARGET("avx2,fma,f16c,avxvnni")
#include <immintrin.h>
#define W 8
#define FMA(a, b, c) ((vec)_mm256_fmadd_ps((a), (b), (c)))
#define HALVES(p) ((vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define DOT4(sum, w, x) ((ivec)_mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(w), (__m256i)(x)))
#define PREPARE(w) ((w) ^ (int32_t)0x80808080) /* vpdpbusd takes unsigned weights: add 128 here, subtract it where a sum starts */
#define BIAS 128
#define DOT8(sum, w, prepared, x) DOT4(sum, prepared, x)
#define STREAMS 2
#define TALL 4
#define TILE_PANELS 1
#include "quantised_body.h"
QUANTISED(avxvnni)
END_TARGET
#endif
