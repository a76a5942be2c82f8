/* Make panels of the quantised formats (a part of quantised_body.h). to_q8_0 and to_q4_0 in tests/quantisers.py describe and
 * compute the same numbers. Lanes are outputs, W at a time, so the numbers are the same in every instruction set. The baseline
 * lacks FMA, so products and sums are rounded separately. */

#define LEVELS {-9.0f, -8.75f, -8.5f, -8.25f, -8.0f, -7.75f, -7.5f, -7.25f, -7.0f}

/* Convert float32 to the bits of float16, to nearest, ties to even (F. Giesen's float_to_half_fast3_rtne). */
INLINE ivec half_bits(vec x) {
    const ivec sign = (ivec)x & (int32_t)0x80000000, size = (ivec)x ^ sign;
    const ivec small = (ivec)((vec)size + broadcast(0.5f)) - 0x3f000000; /* adding 0.5 rounds to the steps of subnormals, 2^-24 */
    const ivec normal = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    const ivec special = (0x7c00 & ~(size > 0x7f800000)) | (0x7e00 & (size > 0x7f800000));
    const ivec is_small = size < (113 << 23), is_special = size >= (143 << 23);
    return (sign >> 16 & 0x8000) | (small & is_small) | (special & is_special) | (normal & ~is_small & ~is_special);
}

/* Store the scales of W outputs, and return the stored (rounded) scales. */
INLINE vec store_scales(uint16_t *to, ivec bits) {
    UNROLL for (int l = 0; l < W; l++) to[l] = (uint16_t)bits[l];
    return HALVES(to);
}

INLINE vec magnitude(vec x) { return (vec)((ivec)x & 0x7fffffff); }

#define ROUND 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, ties to even, in the low bits */
INLINE ivec integer(vec x) { return (ivec)(x + broadcast(ROUND)) - 0x4b400000; }

/* Round and clip x to -8..7; NaN becomes -8. */
INLINE vec level(vec x) {
    const vec least = broadcast(-8.0f), most = broadcast(7.0f);
    x = choose(x > least, x, least);
    return choose(x < most, x, most) + broadcast(ROUND) - broadcast(ROUND);
}

INLINE vec fold(vec *terms) {
    for (int half = GROUP / 2; half; half /= 2)
        for (int k = 0; k < half; k++) terms[k] += terms[k + half];
    return terms[0];
}

INLINE int any(ivec mask) {
    int32_t found = 0;
    UNROLL for (int l = 0; l < W; l++) found |= mask[l];
    return found != 0;
}

/* Search the scale of 32 numbers. Return it as the bits of a float16. */
INLINE ivec search_scale(const vec *x, vec largest) {
    static const float levels[] = LEVELS;
    vec extreme = x[GROUP - 1], best = {0};
    ivec scale = {0};
    for (int k = GROUP - 2; k >= 0; k--) extreme = choose(magnitude(x[k]) == largest, x[k], extreme);
    for (size_t c = 0; c < sizeof levels / sizeof *levels; c++) {
        const vec factor = broadcast(levels[c]) / extreme;
        vec wq[GROUP], qq[GROUP];
        uint16_t stored[W];
        for (int k = 0; k < GROUP; k++) {
            const vec q = level(x[k] * factor);
            wq[k] = magnitude(x[k]) * x[k] * q;
            qq[k] = magnitude(x[k]) * (q * q);
        }
        const vec products = fold(wq), squares = fold(qq);
        const ivec bits = half_bits(products / squares);
        const vec d = store_scales(stored, bits);
        const vec saving = d * (2.0f * products - d * squares);
        const ivec better = saving > best;
        best = choose(better, saving, best);
        scale = (bits & better) | (scale & ~better);
    }
    return scale;
}

/* Quantise one group of W outputs; x[k] has the numbers of input k. Return whether the format can represent them all; if not,
 * the scale is NaN. */
INLINE int quantise_values(const int bits, char *values, uint16_t *scales, const vec *x) {
    vec largest = magnitude(x[0]), d;
    ivec odd = {0}, scale, q[GROUP];
    for (int k = 0; k < GROUP; k++) {
        largest = choose(magnitude(x[k]) > largest, magnitude(x[k]), largest);
        odd |= ((ivec)x[k] & 0x7f800000) == 0x7f800000; /* infinite or NaN */
    }
    if (bits == Q8) {
        const vec wanted = largest / broadcast(127.0f);
        scale = half_bits(wanted);
        scale -= store_scales(scales, scale) < wanted; /* the next float16: a true comparison is -1 */
        odd |= (scale & 0x7c00) == 0x7c00;
    } else {
        scale = search_scale(x, largest);
        odd |= (scale == 0) & (largest > broadcast(1.0f)); /* all candidates were infinite or NaN */
    }
    d = store_scales(scales, (scale & ~odd) | (0x7e00 & odd));
    odd |= d == broadcast(0.0f);
    for (int k = 0; k < GROUP; k++) {
        const vec quotient = (vec)((ivec)(x[k] / d) & ~odd);
        q[k] = bits == Q8 ? integer(quotient) & 0xff : integer(level(quotient)) + 8;
    }
    for (int k = 0; k < GROUP; k += 32 / bits) {
        ivec word = {0};
        UNROLL for (int i = 0; i < 4; i++)
            word |= q[k + i] << 8 * i | (bits == Q4 ? q[k + 4 + i] << (8 * i + 4) : (ivec){0});
        *(ivec_unaligned *)(values + k * OUTPUTS * bits / 8) = word;
    }
    return !any(odd & (d != broadcast(0.0f))); /* a scale of 0 holds zeros */
}

INLINE int quantise(const int bits, void *out, const weight_format *from, const weight_matrix *w, ptrdiff_t start,
                    ptrdiff_t stop, float *room) {
    const weight_matrix to = {out, w->N, w->K};
    const ptrdiff_t groups = groups_of(w->K), ld = groups * GROUP + 16; /* padding, so that rows use different cache sets */
    int held = 1;
    memset(room, 0, OUTPUTS * ld * sizeof *room); /* zero the padding of inputs and outputs */
    for (ptrdiff_t panel = start / OUTPUTS; panel < panels_of(stop); panel++) {
        char *values = (char *)values_of(&to, panel, bits);
        uint16_t *scales = (uint16_t *)scales_of(&to, panel, bits);
        const ptrdiff_t rows = least(w->N - panel * OUTPUTS, OUTPUTS);
        for (ptrdiff_t r = 0; r < rows; r++) from->widen(room + r * ld, w, panel * OUTPUTS + r);
        memset(room + rows * ld, 0, (OUTPUTS - rows) * ld * sizeof *room);
        for (ptrdiff_t g = 0; g < groups; g++, values += GROUP * OUTPUTS * bits / 8, scales += OUTPUTS)
            for (int h = 0; h < NV; h++) {
                union { vec v[GROUP]; float f[GROUP][W]; } x;
                for (int l = 0; l < W; l++)
                    for (int k = 0; k < GROUP; k++) x.f[k][l] = room[(h * W + l) * ld + g * GROUP + k];
                held &= quantise_values(bits, values + h * W * 4, scales + h * W, x.v);
            }
    }
    return held;
}
