/* Quantised weights for x86-64 with AVX-512 and its VNNI (Ice Lake 2019, Zen 4 2022, and later): 512-bit vectors. */
#include "micro.h"
#if defined(__x86_64__)
TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
#include <immintrin.h>
#define W 16
#define FMA(a, b, c) ((vec)_mm512_fmadd_ps((a), (b), (c)))
#define HALVES(p) ((vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define DOT4(sum, w, x) ((ivec)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(x)))
#define PREPARE(w) ((w) ^ (int32_t)0x80808080) /* vpdpbusd takes unsigned weights: add 128 here, subtract it where a sum starts */
#define BIAS 128
#define DOT8(sum, w, prepared, x) DOT4(sum, prepared, x)
#define STREAMS 2
#define TALL 8
#define TILE_PANELS 3
#include "quantised_body.h"
QUANTISED(avx512vnni)
END_TARGET
#endif
