/* Microkernels for x86-64 with AVX2 and FMA (Haswell 2013, Zen 2017, and later): 256-bit vectors. */
#include "micro.h"
#if defined(__x86_64__)
TARGET("avx2,fma,f16c")
#include <cpuid.h>
#include <immintrin.h>
#define W 8
#define FMA(a, b, c) ((vec)_mm256_fmadd_ps((a), (b), (c)))
#define WIDE(p) ((uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define HALVES(p) ((vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define MAX(a, b) ((vec)_mm256_max_ps((a), (b)))
#define FUSED 1
#define SQRT(a) ((vec)_mm256_sqrt_ps(a))
#define MR 3
#define NR 2
#define TILE_ROWS 4
#define TILE_VECS 1
#define STREAMS 4
#define MIX_ROWS 3
#define MIX_VECS 2
#include "micro_body.h"
TABLE(avx2, quantised_avx2)
TABLE(avxvnni, quantised_avxvnni)
END_TARGET

/* Two features that older compilers cannot test by name. The system saves their registers if it supports AVX2. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

const microkernels *micro_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() ? &table_avx2 : NULL;
}

const microkernels *micro_avxvnni(void) { return has_avxvnni() && micro_avx2() ? &table_avxvnni : NULL; }
#else
const microkernels *micro_avx2(void) { return NULL; }
const microkernels *micro_avxvnni(void) { return NULL; }
#endif
