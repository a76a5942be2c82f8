/* Quantised weights for aarch64 with the dot product (Neoverse N1 2019, Apple M1 2020, and later): 128-bit vectors. */
#include "micro.h"
#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>
#define W 4
#define FMA(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define HALVES(p) ((vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p)))))
#define PREPARE(w) (w)
#define BIAS 0
#define DOT8(sum, w, prepared, x) DOT4(sum, w, x)
#define DOT4(sum, w, x) ((ivec)vdotq_s32((int32x4_t)(sum), (int8x16_t)(w), (int8x16_t)(x)))
#define START4(n) broadcast_int(n)
#define FINISH4(sum, n) (sum)
#define STREAMS 4
#define TALL 4
#define TILE_ROWS 4
#define TILE_PANELS 1
#include "quantised_body.h"
QUANTISED(neondot)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif
#endif
