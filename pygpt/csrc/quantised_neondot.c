/* Quantised weights for aarch64 with the dot product (Neoverse N1 2019, Apple M1 2020, and later): 128-bit vectors. */
#include "micro.h"
#if defined(__aarch64__)
#if defined(__clang__)
TARGET("dotprod")
#else
TARGET("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>
#define W 4
#define FMA(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define HALVES(p) ((vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p)))))
#define DOT4(sum, w, x) ((ivec)vdotq_s32((int32x4_t)(sum), (int8x16_t)(w), (int8x16_t)(x)))
#define STREAMS 4
#define TALL 4
#define TILE_PANELS 1
#include "quantised_body.h"
QUANTISED(neondot)
END_TARGET
#endif
