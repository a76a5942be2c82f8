/* Microkernels for aarch64, where every processor has NEON with FMA: 128-bit vectors. */
#include "micro.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#define ISA "neon"
#define W 4
#define FMA(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
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

const microkernels *micro_neon(void) { return &table; }
#else
const microkernels *micro_neon(void) { return NULL; }
#endif
