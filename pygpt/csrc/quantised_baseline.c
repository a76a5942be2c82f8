/* Quantised weights for any processor, with 128-bit vectors and the bits of the other sets. fmaf() from libm rounds once. */
#define W 4
#define FMA(a, b, c) fma4((a), (b), (c))
#define HALVES(p) halves4(p)
#define DOT4(sum, w, x) ((sum) + BYTES(w, x, 24) + BYTES(w, x, 16) + BYTES(w, x, 8) + BYTES(w, x, 0))
#define BYTES(w, x, left) (((w) << (left) >> 24) * ((x) << (left) >> 24))
#define STREAMS 1
#define TALL 4
#define TILE_PANELS 1
#include <math.h>
#include <stdint.h>

typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t ivec4 __attribute__((vector_size(16)));

static inline vec4 fma4(vec4 a, vec4 b, vec4 c) {
    return (vec4){fmaf(a[0], b[0], c[0]), fmaf(a[1], b[1], c[1]), fmaf(a[2], b[2], c[2]), fmaf(a[3], b[3], c[3])};
}

/* Convert float16 to float32. The exponent grows by 112, or to the top for infinity and NaN. A subtraction corrects subnormals. */
static inline vec4 halves4(const uint16_t *p) {
    const ivec4 h = {p[0], p[1], p[2], p[3]}, size = (h & 0x7fff) << 13, exponent = size & (0x7c00 << 13);
    const ivec4 is_top = exponent == (0x7c00 << 13), is_small = exponent == 0;
    const ivec4 whole = size + (112 << 23) + (is_top & (112 << 23));
    const ivec4 small = (ivec4)((vec4)(size + (113 << 23)) - 0x1p-14f);
    return (vec4)(((small & is_small) | (whole & ~is_small)) | (h & 0x8000) << 16);
}

#include "quantised_body.h"
QUANTISED(baseline)
