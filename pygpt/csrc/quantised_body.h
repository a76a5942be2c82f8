/* The kernels of the quantised formats q8_0 and q4_0. Each instruction set compiles this source with its own integer dot product.
 *
 * Layout. A matrix of N outputs and K inputs lies in panels of 16 outputs. Zeros pad N to a multiple of 16, and K to groups of 32:
 *   q8_0 values  int8  [N/16][K/4][16][4]
 *   q4_0 values  uint8 [N/16][K/8][16][4]: low nibbles inputs 8i to 8i+3, high nibbles 8i+4 to 8i+7; the number is nibble - 8
 *   scales       float16 [N/16][K/32][16], after all values: one for a group of 32 inputs of one output
 * So 64 bytes hold one or two steps of four inputs for 16 outputs. Lanes are outputs in every instruction set.
 *
 * Arithmetic, the same bits in every set:
 *   rows      A group of 32 values has s = max|x| / 127 and q = x * (127 / max), rounded to nearest, ties to even. If 127 / max
 *             is infinite, q is 0. If max is not finite, q is 0 and s is NaN, so the output becomes NaN.
 *   products  Each output adds its groups in ascending order, from 0: sum = fma((float)(sum of q * q), weight scale * s, sum).
 *             The integer sum is below 2^24, so it is exact in any order.
 *
 * A file that includes this one first defines:
 *   W            int32 or float32 lanes of a register (16, 8 or 4)
 *   FMA(a,b,c)   a * b + c, rounded once          HALVES(p)  W float16 values from p on as float32
 *   DOT4(sum, w, x)             sum[l] += four products of lane l, weights from 0 to 15 and int8 x
 *   DOT8(sum, w, prepared, x)   the same for int8 weights, unless DOT4 takes them, too
 *   PREPARE(w)   a register of int8 weights in the form that DOT8 needs; BIAS is the number that PREPARE adds to each weight
 *   START4(n), FINISH4(sum, n)  the first sum of DOT4, and the int32 sums plus n at the end of a group, if sums are not int32
 *   STREAMS      panels read side by side for one row          TALL  rows of gemm's tallest tile, 4 or 8
 *   TILE_PANELS  panels of product's register tile
 * After the include, QUANTISED(set) defines the table. */
#include "micro.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define OUTPUTS 16 /* outputs of a panel */
#define GROUP 32   /* inputs that share a scale */
#define NV (OUTPUTS / W)
#define BAND 16 /* rows that are packed together */
#define FEW 16  /* each worker packs all of at most so many rows: a barrier would cost more */
#define PREFETCH 2048 /* bytes ahead of a tile's own loads */
#define TILE_ROWS 4   /* of product: a divisor of BAND */
#define TILE_LIMIT 64 /* sums of the largest tile, in registers or in memory */
#ifndef DOT8
#define PREPARE(w) (w)
#define BIAS 0
#define DOT8(sum, w, prepared, x) DOT4(sum, w, x)
#endif
#ifndef START4
#define START4(n) broadcast_int(n)
#define FINISH4(sum, n) (sum)
#endif

typedef float vec __attribute__((vector_size(W * 4)));
typedef float vec_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef int32_t ivec_unaligned __attribute__((vector_size(W * 4), aligned(1), may_alias));
typedef int8_t bytes __attribute__((vector_size(W)));
typedef int8_t bytes_unaligned __attribute__((vector_size(W), aligned(1), may_alias));
typedef int32_t int_unaligned __attribute__((aligned(1), may_alias));

enum { Q8 = 8, Q4 = 4 }; /* bits of a weight: a constant, so the compiler inlines each function below once for each */

INLINE vec broadcast(float x) { return x - (vec){0}; }
INLINE ivec broadcast_int(int32_t x) { return x - (ivec){0}; }
INLINE ivec load_int(const void *p) { return *(const ivec_unaligned *)p; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
INLINE ptrdiff_t groups_of(ptrdiff_t K) { return (K + GROUP - 1) / GROUP; }
INLINE ptrdiff_t panels_of(ptrdiff_t N) { return (N + OUTPUTS - 1) / OUTPUTS; }

/* Return the address of one panel's values or scales. */
INLINE const char *values_of(const weight_matrix *w, ptrdiff_t panel, const int bits) {
    return (const char *)w->data + panel * groups_of(w->K) * (GROUP * OUTPUTS * bits / 8);
}

INLINE const uint16_t *scales_of(const weight_matrix *w, ptrdiff_t panel, const int bits) {
    return (const uint16_t *)values_of(w, panels_of(w->N), bits) + panel * groups_of(w->K) * OUTPUTS;
}

/* ---------------------------------------------------------------------------------------- rows */

/* A quantised row has int8 values, padded with zeros to whole groups, then the scale of each group, then the sum of each group. */
INLINE ptrdiff_t row_bytes(ptrdiff_t K) { return groups_of(K) * (GROUP + 8); }
INLINE char *row_at(const void *packed, ptrdiff_t r, ptrdiff_t K) {
    return (char *)packed + r / BAND * BAND * ((K + 15) / 16 * 16 * 4) + r % BAND * row_bytes(K);
}

/* Combine all lanes of each of the W registers v: lane l of v[0] gets those of v[l]. `a` and `b` are the operands of `combined`. */
#define EVERY_OTHER(n, odd) 2 * (n) + (odd), 2 * (n) + 2 + (odd), 2 * (n) + 4 + (odd), 2 * (n) + 6 + (odd)
#if W == 16
#define HALF(x, y, odd) \
    __builtin_shufflevector(x, y, EVERY_OTHER(0, odd), EVERY_OTHER(4, odd), EVERY_OTHER(8, odd), EVERY_OTHER(12, odd))
#elif W == 8
#define HALF(x, y, odd) __builtin_shufflevector(x, y, EVERY_OTHER(0, odd), EVERY_OTHER(4, odd))
#else
#define HALF(x, y, odd) __builtin_shufflevector(x, y, EVERY_OTHER(0, odd))
#endif
#define FOLD_ALL(v, combined)                                                                                            \
    for (int left = W / 2; left; left /= 2)                                                                              \
        for (int i = 0; i < left; i++) {                                                                                 \
            const ivec a = HALF(v[2 * i], v[2 * i + 1], 0), b = HALF(v[2 * i], v[2 * i + 1], 1);                         \
            v[i] = combined;                                                                                             \
        }

/* As integers, magnitudes keep their order, and NaN is the greatest. */
INLINE ivec greater(ivec a, ivec b) { return (a & (a > b)) | (b & ~(a > b)); }

/* Quantise `count` groups of a row, at most W. */
INLINE void quantise_groups(char *values, float *scales, int32_t *sums, const float *inp, int count) {
    const float ROUND = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, left in the low bits */
    ivec tops[W] = {{0}}, totals[W] = {{0}};
    for (int g = 0; g < count; g++)
        UNROLL for (int i = 0; i < GROUP / W; i++)
            tops[g] = greater(tops[g], *(const ivec_unaligned *)(inp + g * GROUP + i * W) & 0x7fffffff);
    FOLD_ALL(tops, greater(a, b));
    const vec max = (vec)tops[0], infinity = broadcast(INFINITY), inverse = broadcast(127.0f) / max;
    const vec scale = choose(max < infinity, max / broadcast(127.0f), broadcast(NAN));
    const vec factor = choose((max < infinity) & (inverse < infinity), inverse, (vec){0});
    for (int g = 0; g < count; g++) {
        for (int line = 0; line < GROUP; line += 16) __builtin_prefetch(inp + (count + g) * GROUP + line); /* the next groups */
        UNROLL for (int i = 0; i < GROUP / W; i++) {
            const vec x = *(const vec_unaligned *)(inp + g * GROUP + i * W);
            const vec scaled = factor[g] == 0.0f ? (vec){0} : x * broadcast(factor[g]);
            const ivec q = (ivec)(scaled + broadcast(ROUND)) - 0x4b400000;
            totals[g] += q;
            *(bytes_unaligned *)(values + g * GROUP + i * W) = __builtin_convertvector(q, bytes);
        }
    }
    FOLD_ALL(totals, a + b);
    memcpy(scales, &scale, count * sizeof *scales);
    memcpy(sums, &totals[0], count * sizeof *sums);
}

static void pack_rows(void *packed, const float *inp, ptrdiff_t ldi, ptrdiff_t rows, ptrdiff_t K) {
    const ptrdiff_t groups = groups_of(K);
    for (ptrdiff_t r = 0; r < rows; r++, inp += ldi) {
        char *values = row_at(packed, r, K);
        float *scales = (float *)(values + groups * GROUP);
        int32_t *sums = (int32_t *)(scales + groups);
        ptrdiff_t g = 0;
        for (; g + W <= K / GROUP; g += W) quantise_groups(values + g * GROUP, scales + g, sums + g, inp + g * GROUP, W);
        if (g < groups) {
            float rest[W * GROUP] = {0};
            memcpy(rest, inp + g * GROUP, (K - g * GROUP) * sizeof *rest);
            quantise_groups(values + g * GROUP, scales + g, sums + g, rest, (int)(groups - g));
        }
    }
}

/* ---------------------------------------------------------------------------------------- products */

/* Compute the integer sums of one group, rows x panels, for the outputs from h * W on of each panel. */
INLINE void dot_group(const int bits, const int rows, const int panels, ivec *sum, const char *const *weights, const char *row,
                      ptrdiff_t step, int h) {
    const ivec low = broadcast_int(0x0f0f0f0f);
    UNROLL for (int k = 0; k < GROUP; k += 32 / bits) {
        ivec w[8], other[8]; /* q8_0: the same weights after PREPARE; q4_0: the high nibbles */
        UNROLL for (int p = 0; p < panels; p++) {
            const char *from = weights[p] + k * OUTPUTS * bits / 8;
            w[p] = load_int(from + h * W * 4);
            if (bits == Q8)
                other[p] = PREPARE(w[p]);
            else
                other[p] = (w[p] >> 4) & low, w[p] = w[p] & low;
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const ivec x = broadcast_int(*(const int_unaligned *)(row + r * step + k));
            const ivec next = broadcast_int(bits == Q4 ? *(const int_unaligned *)(row + r * step + k + 4) : 0);
            UNROLL for (int p = 0; p < panels; p++) {
                ivec *to = sum + r * panels + p;
                *to = bits == Q8 ? DOT8(*to, w[p], other[p], x) : DOT4(DOT4(*to, w[p], x), other[p], next);
            }
        }
    }
}

/* Compute one register tile: `rows` packed rows times `panels` panels of weights, which lie `apart` panels apart. Results go to
 * out[r * ldo + p * apart * 16 + n]. The last panel may be the last one of the matrix, with fewer outputs. */
INLINE void tile(const int bits, const int rows, const int panels, const int prefetch, float *out, ptrdiff_t ldo, const char *row,
                 const weight_matrix *w, ptrdiff_t panel, ptrdiff_t apart) {
    const ptrdiff_t groups = groups_of(w->K), step = row_bytes(w->K);
    const char *weights[8];
    const uint16_t *scales[8];
    vec acc[TILE_LIMIT];
    UNROLL for (int p = 0; p < panels; p++) {
        weights[p] = values_of(w, panel + p * apart, bits);
        scales[p] = scales_of(w, panel + p * apart, bits);
    }
    UNROLL_ALL(64) for (int i = 0; i < rows * panels * NV; i++) acc[i] = (vec){0};
    for (ptrdiff_t g = 0; g < groups; g++) {
        const float *row_scale = (const float *)(row + groups * GROUP) + g;
        if (prefetch)
            UNROLL for (int p = 0; p < panels; p++)
                UNROLL for (int line = 0; line < GROUP * bits / 8 * OUTPUTS; line += 64)
                    __builtin_prefetch(weights[p] + line + PREFETCH);
        _Pragma("GCC unroll 1") for (int h = 0; h < NV; h++) { /* the float sums stay in memory: registers are scarce */
            ivec sum[TILE_LIMIT];
            int32_t offset[BAND];
            UNROLL for (int r = 0; r < rows; r++) {
                offset[r] = ((const int32_t *)(row_scale + groups))[r * (step / 4)] * -(bits == Q8 ? BIAS : 8);
                UNROLL for (int p = 0; p < panels; p++)
                    sum[r * panels + p] = bits == Q8 ? BIAS ? broadcast_int(offset[r]) : (ivec){0} : START4(offset[r]);
            }
            dot_group(bits, rows, panels, sum, weights, row + g * GROUP, step, h);
            UNROLL for (int p = 0; p < panels; p++) {
                const vec scale = HALVES(scales[p] + h * W);
                UNROLL for (int r = 0; r < rows; r++) {
                    const ivec whole = bits == Q8 ? sum[r * panels + p] : FINISH4(sum[r * panels + p], offset[r]);
                    vec *to = acc + (r * panels + p) * NV + h;
                    *to = FMA(__builtin_convertvector(whole, vec), scale * broadcast(row_scale[r * (step / 4)]), *to);
                }
            }
        }
        UNROLL for (int p = 0; p < panels; p++) weights[p] += GROUP * OUTPUTS * bits / 8, scales[p] += OUTPUTS;
    }
    UNROLL for (int p = 0; p < panels; p++) {
        const ptrdiff_t count = w->N - (panel + p * apart) * OUTPUTS;
        UNROLL for (int r = 0; r < rows; r++) {
            float *to = out + r * ldo + p * apart * OUTPUTS, whole[OUTPUTS];
            UNROLL for (int h = 0; h < NV; h++)
                *(vec_unaligned *)((count < OUTPUTS ? whole : to) + h * W) = acc[(r * panels + p) * NV + h];
            if (count < OUTPUTS) memcpy(to, whole, count * sizeof *to);
        }
    }
}

/* Multiply a few rows with all panels from `start` on. The panels are cut into `panels` equal parts, and one panel of each part
 * is read at a time. So memory is read in several streams. */
INLINE void gemm_of(const int bits, const int rows, const int panels, float *out, ptrdiff_t ldo, const char *row,
                    const weight_matrix *w, ptrdiff_t start, ptrdiff_t stop) {
    const ptrdiff_t first = start / OUTPUTS, part = (panels_of(stop) - first) / panels;
    for (ptrdiff_t n = 0; n < part; n++) tile(bits, rows, panels, 1, out + n * OUTPUTS, ldo, row, w, first + n, part);
    for (ptrdiff_t n = part * panels; n < panels_of(stop) - first; n++)
        tile(bits, rows, 1, 1, out + n * OUTPUTS, ldo, row, w, first + n, 0);
}

/* Use tiles as tall as the rows, up to TALL, and split the last rows into two halves. */
INLINE void gemm(const int bits, float *out, ptrdiff_t ldo, const float *inp, ptrdiff_t ldi, ptrdiff_t rows,
                 const weight_matrix *w, ptrdiff_t start, ptrdiff_t stop, void *room) {
    pack_rows(room, inp, ldi, rows, w->K);
    for (ptrdiff_t r = 0, tall; r < rows; r += tall) {
        tall = rows - r <= TALL ? rows - r : rows - r < 2 * TALL ? (rows - r + 1) / 2 : TALL;
        if (r / BAND != (r + tall - 1) / BAND) tall = BAND - r % BAND;
        switch (tall) {
#define ROWS(count, panels) \
    case count: gemm_of(bits, count, panels, out + r * ldo, ldo, row_at(room, r, w->K), w, start, stop); break
            ROWS(1, STREAMS);
            ROWS(2, TILE_LIMIT / NV < 8 ? 1 : 2);
            ROWS(3, TILE_LIMIT / NV < 8 ? 1 : 2);
            ROWS(4, TILE_LIMIT / NV < 8 ? 1 : 2);
#if TALL > 4
            ROWS(5, 1);
            ROWS(6, 1);
            ROWS(7, 1);
            ROWS(8, 1);
#endif
#undef ROWS
        }
    }
}

/* Multiply many rows. A few panels at a time stay in the first-level cache while all rows use them. */
INLINE void product(const int bits, float *out, ptrdiff_t ldo, const void *packed, ptrdiff_t rows, const weight_matrix *w,
                    ptrdiff_t start, ptrdiff_t stop) {
    const ptrdiff_t first = start / OUTPUTS, last = panels_of(stop);
    ptrdiff_t n = first;
#define BAND_OF(panels)                                                                                                  \
    for (; n + panels <= last; n += panels) {                                                                            \
        float *to = out + (n - first) * OUTPUTS;                                                                         \
        ptrdiff_t r = 0;                                                                                                 \
        for (; r + TILE_ROWS <= rows; r += TILE_ROWS)                                                                    \
            tile(bits, TILE_ROWS, panels, 0, to + r * ldo, ldo, row_at(packed, r, w->K), w, n, 1);                       \
        for (; r < rows; r++) tile(bits, 1, panels, 0, to + r * ldo, ldo, row_at(packed, r, w->K), w, n, 1);             \
    }
    BAND_OF(TILE_PANELS)
    BAND_OF(1)
#undef BAND_OF
}

/* ---------------------------------------------------------------------------------------- one row as numbers */

INLINE void widen(const int bits, float *out, const weight_matrix *w, ptrdiff_t row) {
    const char *values = values_of(w, row / OUTPUTS, bits) + row % OUTPUTS * 4;
    const uint16_t *scales = scales_of(w, row / OUTPUTS, bits) + row % OUTPUTS;
    for (ptrdiff_t k = 0; k < w->K; scales += OUTPUTS) {
        const uint16_t one[W] = {*scales};
        const float scale = HALVES(one)[0];
        for (ptrdiff_t end = least(k + GROUP, w->K); k < end; k++) {
            const char byte = values[k / (32 / bits) * (OUTPUTS * 4) + k % 4];
            out[k] = scale * (float)(bits == Q8 ? (signed char)byte : (byte >> (k & 4) & 15) - 8); /* exact: 11 bits times 8 bits */
        }
    }
}

#include "quantise.h"

/* ---------------------------------------------------------------------------------------- the machine's own limit */

#define PROBE_CHAINS 12 /* independent sums: more than latency times width of any of these machines */
#if defined(__x86_64__)
#define OPAQUE(x) __asm__ volatile("" : "+x"(x)) /* the compiler must compute with x again, even if its value is the same */
#elif defined(__aarch64__)
#define OPAQUE(x) __asm__ volatile("" : "+w"(x))
#else
#define OPAQUE(x) ((x) ^= 2)
#endif

INLINE int probe(const int bits, ptrdiff_t times) {
    ivec sum[PROBE_CHAINS], x = broadcast_int(0x01010101), w = x; /* small, so that no sum overflows */
    UNROLL for (int i = 0; i < PROBE_CHAINS; i++) sum[i] = broadcast_int(i);
    for (ptrdiff_t t = 0; t < times; t++)
        UNROLL for (int i = 0; i < PROBE_CHAINS; i++) {
            sum[i] = bits == Q8 ? DOT8(sum[i], w, PREPARE(w), x) : DOT4(sum[i], w, x);
            OPAQUE(x);
        }
    int32_t total = 0;
    UNROLL for (int i = 0; i < PROBE_CHAINS; i++) total ^= sum[i][0];
    return total;
}

/* ---------------------------------------------------------------------------------------- the table */

#define EACH_QUANTISED(f, ...) f(q8_0, Q8, __VA_ARGS__) f(q4_0, Q4, __VA_ARGS__)
#define FUNCTIONS(name, bits, ...)                                                                                       \
    static void gemm_##name(float *out, ptrdiff_t ldo, const float *inp, ptrdiff_t ldi, ptrdiff_t rows,                  \
                            const weight_matrix *w, ptrdiff_t start, ptrdiff_t stop, void *room) {                       \
        gemm(bits, out, ldo, inp, ldi, rows, w, start, stop, room);                                                      \
    }                                                                                                                    \
    static void widen_##name(float *out, const weight_matrix *w, ptrdiff_t row) { widen(bits, out, w, row); }            \
    static int quantise_##name(void *out, const weight_format *from, const weight_matrix *w, ptrdiff_t start,            \
                               ptrdiff_t stop, float *room) {                                                            \
        return quantise(bits, out, from, w, start, stop, room);                                                          \
    }
EACH_QUANTISED(FUNCTIONS)

/* Define the table of a set from its functions for many rows: `many` as product() above, and `limit` as probe(). */
#define TABLE(set, many, limit, operations) \
    EACH_QUANTISED(FOR_MANY_ROWS, many, limit) \
    const weight_format quantised_##set[2] = {EACH_QUANTISED(ROW, many, limit, operations)};
#define FOR_MANY_ROWS(name, bits, many, limit)                                                                           \
    static void many##_##name(float *out, ptrdiff_t ldo, const void *packed, ptrdiff_t rows, const weight_matrix *w,     \
                              ptrdiff_t start, ptrdiff_t stop, const void *room) {                                       \
        (void)room;                                                                                                      \
        many(bits, out, ldo, packed, rows, w, start, stop);                                                              \
    }                                                                                                                    \
    static int limit##_##name(ptrdiff_t times) { return limit(bits, times); }
#define ROW(id, bits, many, limit, operations)                                                                           \
    {.name = #id, .block_values = GROUP, .value_bytes = GROUP * bits / 8, .scale_bytes = 2, .interleave = OUTPUTS,       \
     .panel = TILE_PANELS * OUTPUTS, .narrow = FEW, .gemm = gemm_##id, .pack_rows = pack_rows, .product = many##_##id,    \
     .widen = widen_##id, .quantise = quantise_##id, .probe = limit##_##id, .probe_operations = operations},
#define QUANTISED(set) TABLE(set, product, probe, 2 * 4 * W * PROBE_CHAINS)
