/* Microkernels for x86-64 with AVX-512 F, BW, VL and DQ (Skylake-X 2017, Zen 4 2022, and later): 512-bit vectors. */
#include "micro.h"
#if defined(__x86_64__)
TARGET("avx512f,avx512bw,avx512vl,avx512dq,fma")
#include <immintrin.h>
#ifdef HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define W 16
#define FMA(a, b, c) ((vec)_mm512_fmadd_ps((a), (b), (c)))
#define WIDE(p) ((uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))))
#define HALVES(p) ((vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define MAX(a, b) ((vec)_mm512_max_ps((a), (b)))
#define FUSED 1
#define SQRT(a) ((vec)_mm512_sqrt_ps(a))
#define MR 5
#define NR 5
#define TALL_TILES
#define TILE_ROWS 8
#define TILE_VECS 3
#define STREAMS 4
#define MIX_ROWS 4
#define MIX_VECS 4
#include "micro_body.h"
TABLE(avx512, quantised_avx2)
TABLE(avx512vnni, quantised_avx512vnni)
#ifdef HAS_AMX
TABLE(avx512amx, quantised_avx512amx)
#endif
END_TARGET

const microkernels *micro_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && micro_avx2() /* this set uses the quantised kernels of AVX2 */
               ? &table_avx512
               : NULL;
}

const microkernels *micro_avx512vnni(void) {
    return __builtin_cpu_supports("avx512vnni") && micro_avx512() ? &table_avx512vnni : NULL;
}

/* Linux lets a process use tiles only after the process has asked. It refuses if a signal stack is too small for them. */
const microkernels *micro_avx512amx(void) {
#ifdef HAS_AMX
    enum { TILE_AND_INT8 = 3 << 24, ASK = 0x1023, TILES = 18 }; /* bits of leaf 7; ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    unsigned a, b, c, d;
    if (micro_avx512vnni() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE_AND_INT8) == TILE_AND_INT8 &&
        !syscall(SYS_arch_prctl, ASK, TILES))
        return &table_avx512amx;
#endif
    return NULL;
}
#else
const microkernels *micro_avx512amx(void) { return NULL; }
const microkernels *micro_avx512(void) { return NULL; }
const microkernels *micro_avx512vnni(void) { return NULL; }
#endif
