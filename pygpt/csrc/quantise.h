/* Making panels of the quantised formats (part of quantised_body.h): W outputs at a time, lanes are outputs, so the numbers of one output
 * are the same in every instruction set. Products and sums are rounded apart: the baseline has no other ones.
 *
 *   q8_0   d = max|w| / 127 as float16, rounded to nearest, or up where the quotient would exceed 127; q = w * (1 / d) to the nearest
 *   q4_0   a search, as llama.cpp does it: m is the first number of greatest size. For each of the SEARCH candidates c in ascending order,
 *          q = clamp(round(w * -c / m), -8, 7), and d = sum(w q) / sum(q q) is the scale of least squares, which leaves an error of
 *          sum(w w) - sum(w q)^2 / sum(q q). The first candidate of the least error gives d, rounded to float16; then q anew from d */

#define SEARCH {8.0f, 7.0f, 7.2f, 7.4f, 7.6f, 7.8f, 8.2f, 8.4f, 8.6f, 8.8f}

/* float32 to the bits of float16, to the nearest, ties to even (F. Giesen's float_to_half_fast3_rtne). */
INLINE ivec half_bits(vec x) {
    const ivec sign = (ivec)x & (int32_t)0x80000000, size = (ivec)x ^ sign;
    const ivec small = (ivec)((vec)size + broadcast(0.5f)) - 0x3f000000; /* adding 0.5 rounds to the steps of subnormals, 2^-24 */
    const ivec normal = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    const ivec special = (0x7c00 & ~(size > 0x7f800000)) | (0x7e00 & (size > 0x7f800000));
    const ivec is_small = size < (113 << 23), is_special = size >= (143 << 23);
    return (sign >> 16 & 0x8000) | (small & is_small) | (special & is_special) | (normal & ~is_small & ~is_special);
}

/* Store the scales of W outputs, and return them as they are now. */
INLINE vec store_scales(uint16_t *to, ivec bits) {
    UNROLL for (int l = 0; l < W; l++) to[l] = (uint16_t)bits[l];
    return HALVES(to);
}

INLINE vec magnitude(vec x) { return (vec)((ivec)x & 0x7fffffff); }
INLINE ivec rounded(vec x) { return (ivec)(x + broadcast(12582912.0f)) - 0x4b400000; } /* |x| below 2^22, ties to even */
INLINE vec inverse_of(vec d) { return (vec)((ivec)(1.0f / d) & ~(d == broadcast(0.0f))); } /* 0 for 0 */
INLINE int any(ivec mask) {
    int32_t found = 0;
    UNROLL for (int l = 0; l < W; l++) found |= mask[l];
    return found != 0;
}

/* x times inverse, from -8 to 7, rounded. */
INLINE vec nibble_of(vec x, vec inverse) {
    const vec scaled = x * inverse, least = broadcast(-8.0f), most = broadcast(7.0f);
    const vec low = choose(scaled > least, scaled, least);
    return choose(low < most, low, most) + broadcast(12582912.0f) - broadcast(12582912.0f);
}

/* The scale of least squares of 32 numbers, in float32. */
INLINE vec search_scale(const vec *x) {
    static const float candidates[] = SEARCH;
    vec extreme = x[0], best = {0}, scale = {0};
    for (int k = 1; k < GROUP; k++) extreme = choose(magnitude(x[k]) > magnitude(extreme), x[k], extreme);
    for (size_t c = 0; c < sizeof candidates / sizeof *candidates; c++) {
        const vec inverse = broadcast(-candidates[c]) / extreme;
        vec products = {0}, squares = {0};
        for (int k = 0; k < GROUP; k++) {
            const vec q = nibble_of(x[k], inverse);
            products += x[k] * q;
            squares += q * q;
        }
        const vec found = products / squares, gain = found * products;
        const ivec better = gain > best;
        best = choose(better, gain, best);
        scale = choose(better, found, scale);
    }
    return scale;
}

/* Quantise one group of W outputs, x[k] its numbers. Returns whether all could be held; a scale is NaN where not. */
INLINE int quantise_values(const int bits, char *values, uint16_t *scales, const vec *x) {
    vec largest = magnitude(x[0]), d;
    ivec odd = {0}, half, q[GROUP];
    for (int k = 0; k < GROUP; k++) {
        largest = choose(magnitude(x[k]) > largest, magnitude(x[k]), largest);
        odd |= ((ivec)x[k] & 0x7f800000) == 0x7f800000; /* infinite or NaN */
    }
    half = half_bits(bits == Q8 ? largest / broadcast(127.0f) : search_scale(x));
    if (bits == Q8) half -= rounded(largest * inverse_of(store_scales(scales, half))) > 127; /* the next float16: minus -1 */
    odd |= (half & 0x7c00) == 0x7c00;
    d = store_scales(scales, (half & ~odd) | (0x7e00 & odd));
    d = (vec)((ivec)inverse_of(d) & ~odd);
    for (int k = 0; k < GROUP; k++) q[k] = bits == Q8 ? rounded(x[k] * d) & ~odd & 0xff : rounded(nibble_of(x[k], d)) + 8;
    for (int k = 0; k < GROUP; k += 32 / bits) {
        ivec word = {0};
        UNROLL for (int i = 0; i < 4; i++)
            word |= q[k + i] << 8 * i | (bits == Q4 ? q[k + 4 + i] << (8 * i + 4) : (ivec){0});
        *(ivec_unaligned *)(values + k * OUTPUTS * bits / 8) = word;
    }
    return !any(odd);
}

INLINE int quantise(const int bits, void *out, const weight_format *from, const weight_matrix *w, ptrdiff_t start,
                    ptrdiff_t stop, float *room) {
    const weight_matrix to = {out, w->N, w->K};
    const ptrdiff_t groups = groups_of(w->K), ld = groups * GROUP + 16; /* rows apart that do not share cache sets */
    int held = 1;
    memset(room, 0, OUTPUTS * ld * sizeof *room); /* inputs and outputs that only fill up */
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
