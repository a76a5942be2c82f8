/* Quantised weights for every aarch64: 128-bit vectors. Products of bytes fit into 16 bits: at most 128 x 127 = 16,256. */
#include "micro.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#define W 4
#define FMA(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define HALVES(p) ((vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p)))))
#define DOT4(sum, w, x) \
    ((sum) + (ivec)vpaddq_s32(vpaddlq_s16(vmull_s8(vget_low_s8((int8x16_t)(w)), vget_low_s8((int8x16_t)(x)))), \
                              vpaddlq_s16(vmull_high_s8((int8x16_t)(w), (int8x16_t)(x)))))
#define STREAMS 4
#define TALL 4
#define TILE_PANELS 1
#include "quantised_body.h"
QUANTISED(neon)
#endif
