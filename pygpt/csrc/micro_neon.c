/* Microkernels for aarch64, where every processor has NEON with FMA: 128-bit vectors. */
#include "micro.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#define W 4
#define FMA(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define HALVES(p) ((vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p)))))
#define FUSED 1
#define SQRT(a) ((vec)vsqrtq_f32((float32x4_t)(a)))
#define MR 2
#define NR 3
#define TILE_ROWS 4
#define TILE_VECS 1
#define STREAMS 4
#define MIX_ROWS 2
#define MIX_VECS 2
#include "micro_body.h"
TABLE(neon, quantised_neon)
TABLE(neondot, quantised_neondot)

#if defined(__linux__)
#include <sys/auxv.h>
static int has_dotprod(void) { return (getauxval(AT_HWCAP) >> 20) & 1; /* HWCAP_ASIMDDP */ }
#elif defined(__APPLE__)
#include <sys/sysctl.h>
static int has_dotprod(void) {
    int has = 0;
    size_t size = sizeof has;
    return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) && has;
}
#else
static int has_dotprod(void) { return 0; }
#endif

const microkernels *micro_neon(void) { return &table_neon; }
const microkernels *micro_neondot(void) { return has_dotprod() ? &table_neondot : NULL; }
#else
const microkernels *micro_neon(void) { return NULL; }
const microkernels *micro_neondot(void) { return NULL; }
#endif
