/* The one source of the microkernels. A file that includes it first defines:
 *   W          floats in one register (16, 8 or 4)
 *   MAX(a,b)   a where a > b, else b; WIDE(p), W uint16 from p on as uint32; HALVES(p), W float16 as float32: each is defined
 *              if one instruction does it
 *   FMA(a,b,c) a * b + c               FUSED       1 if FMA rounds once          SQRT(a)  the square root, rounded once
 *   MR, NR     register tile of gemm: rows x outputs          STREAMS     weight rows that gemm reads side by side for one row
 *   TALL_TILES if nearly all of 32 sums, 8 rows x 4 outputs, fit the registers
 *   TILE_ROWS, TILE_VECS  register tile of product and outer: rows x 16-lane vectors; TILE_ROWS divides 16
 *   MIX_ROWS, MIX_VECS  register tile of mix: rows x 16-lane vectors
 * All other code uses the vector types of GCC and clang, without intrinsics. After the include, TABLE(name,
 * quantised) defines the table of the instruction set. */
#include "micro.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline)) /* if inlined, the function's sums would spill */
#define LANES 16
#define NV (LANES / W)

typedef float vec __attribute__((vector_size(W * 4)));
typedef float vec_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef uint32_t uvec __attribute__((vector_size(W * 4)));
typedef uint16_t hvec __attribute__((vector_size(W * 2)));
typedef uint16_t hvec_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));
#if W > 4
typedef float vec8 __attribute__((vector_size(32)));
#endif
typedef float half_vec __attribute__((vector_size(W * 2)));
typedef float half_vec_unaligned __attribute__((vector_size(W * 2), aligned(4), may_alias));
typedef double double_vec __attribute__((vector_size(W * 4)));
typedef int64_t long_vec __attribute__((vector_size(W * 4)));
typedef uint64_t ulong_vec __attribute__((vector_size(W * 4)));
typedef float vec4 __attribute__((vector_size(16)));
typedef float vec4_unaligned __attribute__((vector_size(16), aligned(4), may_alias));

#ifndef WIDE
#define WIDE(p) __builtin_convertvector(*(const hvec_unaligned *)(p), uvec)
#endif
#ifndef HALVES
#define HALVES(p) from_float16(WIDE(p))
#endif
#ifndef MAX
#define MAX(a, b) choose((a) > (b), (a), (b))
#endif

/* ---------------------------------------------------------------------------------------- 16 lanes */

typedef struct {
    vec v[NV];
} lanes;

INLINE vec broadcast(float x) { return x - (vec){0}; } /* x - 0 is x for every x; x + 0 would lose the sign of -0 */

INLINE lanes splat(float x) {
    lanes a;
    UNROLL for (int h = 0; h < NV; h++) a.v[h] = broadcast(x);
    return a;
}

INLINE lanes load(const float *p) {
    lanes a;
    UNROLL for (int h = 0; h < NV; h++) a.v[h] = *(const vec_unaligned *)(p + h * W);
    return a;
}

INLINE void store(float *p, lanes a) {
    UNROLL for (int h = 0; h < NV; h++) *(vec_unaligned *)(p + h * W) = a.v[h];
}

/* Load the first n < 16 values, and `fill` in the other lanes. */
INLINE lanes load_tail(const float *p, ptrdiff_t n, float fill) {
    float buffer[LANES];
    for (int i = 0; i < LANES; i++) buffer[i] = fill;
    memcpy(buffer, p, n * sizeof *p);
    return load(buffer);
}

INLINE void store_tail(float *p, lanes a, ptrdiff_t n) {
    float buffer[LANES];
    store(buffer, a);
    memcpy(p, buffer, n * sizeof *p);
}

INLINE vec from_float16(uvec h) {
    uvec magnitude = (uvec)((vec)((h & 0x7fff) << 13) * broadcast(0x1p112f)); /* the exponent moves, exactly */
    uvec special = (uvec)((h & 0x7c00) == 0x7c00) & 0x7f800000;               /* infinity and NaN keep theirs */
    return (vec)(magnitude | special | (h & 0x8000) << 16);
}

/* The weight formats without blocks: name, bytes of a value, W values from i on as float32. One line here creates the functions
 * of the format and its row in the table. Zero bits must mean 0. A bfloat16 is the upper half of its float32. */
#define EACH_FORMAT(f)                                                \
    f(float32, 4, *(const vec_unaligned *)((const float *)w + i))     \
    f(bfloat16, 2, (vec)(WIDE((const uint16_t *)w + i) << 16))        \
    f(float16, 2, HALVES((const uint16_t *)w + i))

#define KIND(name, bytes, load) KIND_##name,
enum { EACH_FORMAT(KIND) }; /* constants: the compiler inlines a function once for each format */
#undef KIND

INLINE ptrdiff_t value_bytes(const int kind) {
#define BYTES(name, bytes, load) if (kind == KIND_##name) return bytes;
    EACH_FORMAT(BYTES)
#undef BYTES
    __builtin_unreachable();
}

INLINE vec load_weight_vec(const void *w, ptrdiff_t i, const int kind) {
#define LOAD(name, bytes, load) if (kind == KIND_##name) return load;
    EACH_FORMAT(LOAD)
#undef LOAD
    __builtin_unreachable();
}

INLINE lanes load_weights(const void *w, ptrdiff_t i, const int kind) {
    lanes a;
    UNROLL for (int h = 0; h < NV; h++) a.v[h] = load_weight_vec(w, i + h * W, kind);
    return a;
}

INLINE lanes load_weights_tail(const void *w, ptrdiff_t i, ptrdiff_t n, const int kind) {
    char buffer[LANES * 4] __attribute__((aligned(64))) = {0};
    memcpy(buffer, (const char *)w + i * value_bytes(kind), n * value_bytes(kind));
    return load_weights(buffer, 0, kind);
}

#define FUNCTION(name, sign)                                                    \
    INLINE lanes name(lanes a, lanes b) {                                       \
        UNROLL for (int h = 0; h < NV; h++) a.v[h] = a.v[h] sign b.v[h];        \
        return a;                                                               \
    }
FUNCTION(add, +) FUNCTION(sub, -) FUNCTION(mul, *) FUNCTION(divide, /)
#undef FUNCTION

INLINE lanes fma16(lanes a, lanes b, lanes c) {
    UNROLL for (int h = 0; h < NV; h++) c.v[h] = FMA(a.v[h], b.v[h], c.v[h]);
    return c;
}

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* a where a > b, else b. So a NaN in a gives b. */
INLINE lanes max16(lanes a, lanes b) {
    UNROLL for (int h = 0; h < NV; h++) a.v[h] = MAX(a.v[h], b.v[h]);
    return a;
}

/* Add the lanes in the fixed order: lane l and lane l + 8, then lanes 4, 2 and 1 apart. */
INLINE vec4 fold4(lanes a) {
#if W == 4
    return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
#else
#if W == 8
    vec8 b = a.v[0] + a.v[1];
#else
    vec8 b = __builtin_shufflevector(a.v[0], a.v[0], 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(a.v[0], a.v[0], 8, 9, 10, 11, 12, 13, 14, 15);
#endif
    return __builtin_shufflevector(b, b, 0, 1, 2, 3) + __builtin_shufflevector(b, b, 4, 5, 6, 7);
#endif
}

INLINE float fold(lanes a) {
    vec4 c = fold4(a);
    vec4 d = c + __builtin_shufflevector(c, c, 2, 3, 2, 3);
    return d[0] + d[1];
}

/* Do four folds at once. Each lane does the same additions; the vectors are joined as they become shorter. */
INLINE vec4 fold_four(lanes a, lanes b, lanes c, lanes d) {
#if W == 16
#define EIGHTS(x, y, o) __builtin_shufflevector(x, y, o, o + 1, o + 2, o + 3, o + 4, o + 5, o + 6, o + 7, \
                                                o + 16, o + 17, o + 18, o + 19, o + 20, o + 21, o + 22, o + 23)
#define FOURS(x, y, o) __builtin_shufflevector(x, y, o, o + 1, o + 2, o + 3, o + 8, o + 9, o + 10, o + 11, \
                                                  o + 16, o + 17, o + 18, o + 19, o + 24, o + 25, o + 26, o + 27)
    vec ab = EIGHTS(a.v[0], b.v[0], 0) + EIGHTS(a.v[0], b.v[0], 8);
    vec cd = EIGHTS(c.v[0], d.v[0], 0) + EIGHTS(c.v[0], d.v[0], 8);
    vec four = FOURS(ab, cd, 0) + FOURS(ab, cd, 4);
    vec two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    vec one = two + __builtin_shufflevector(two, two, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return __builtin_shufflevector(one, one, 0, 4, 8, 12);
#undef EIGHTS
#undef FOURS
#else
    vec4 p = fold4(a), q = fold4(b), r = fold4(c), s = fold4(d);
    vec4 pq = __builtin_shufflevector(p, q, 0, 1, 4, 5) + __builtin_shufflevector(p, q, 2, 3, 6, 7);
    vec4 rs = __builtin_shufflevector(r, s, 0, 1, 4, 5) + __builtin_shufflevector(r, s, 2, 3, 6, 7);
    return __builtin_shufflevector(pq, rs, 0, 2, 4, 6) + __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
#endif
}

INLINE float fold_max(lanes a) {
    float buffer[LANES];
    store(buffer, a);
    float m = buffer[0];
    for (int i = 1; i < LANES; i++) m = buffer[i] > m ? buffer[i] : m;
    return m;
}

/* exp(x) = 2^n p(r) with x = n ln 2 + r. The relative error is below 1e-7 for -87 <= x <= 88. The result is 0 below, infinity
 * above, and NaN for NaN. ln 2 is split so that n * LN2_HI is exact (Cody and Waite 1980). The polynomial is a least-maximum
 * fit of (exp(r) - 1 - r) / r^2 on |r| <= 0.35; its error relative to exp is 3.3e-9. */
INLINE lanes exp16(lanes x) {
    const float LOG2E = 1.44269504f, LN2_HI = 0.693359375f, LN2_LO = -2.12194440e-4f;
    const float ROUND = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
    lanes y;
    UNROLL for (int h = 0; h < NV; h++) {
        vec a = x.v[h], shifted = FMA(a, broadcast(LOG2E), broadcast(ROUND));
        vec n = shifted - broadcast(ROUND);
        vec r = FMA(n, broadcast(-LN2_LO), FMA(n, broadcast(-LN2_HI), a));
        vec p = broadcast(1.38131448e-3f);
        p = FMA(p, r, broadcast(8.36941879e-3f));
        p = FMA(p, r, broadcast(4.1668456e-2f));
        p = FMA(p, r, broadcast(1.66665152e-1f));
        p = FMA(p, r, broadcast(4.9999994e-1f));
        p = FMA(p, r * r, r) + broadcast(1.0f);
        vec scaled = (vec)((uvec)p + ((uvec)shifted << 23)); /* times 2^n: n added to the exponent */
        scaled = choose(a <= broadcast(88.0f), scaled, a * broadcast(INFINITY)); /* NaN stays NaN */
        y.v[h] = (vec)((ivec)scaled & ~(a < broadcast(-87.0f)));
    }
    return y;
}

/* gelu_new(x) = 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): one exp, no cancellation. */
INLINE lanes gelu16(lanes x) {
    const float A = -1.59576912f, B = -0.0713548163f; /* -2 sqrt(2 / pi), and that times 0.044715 */
    lanes e = exp16(mul(x, fma16(mul(x, x), splat(B), splat(A))));
    return divide(x, add(splat(1.0f), e));
}

/* The normal distribution's tail beyond |x|: 0.5 erfc(t), t = |x| / sqrt(2), as exp(-x^2 / 2), which it stores, times a polynomial
 * in 1 / (1 + 0.33 t). The polynomial is a least-maximum fit on t <= 9.5, relative error below 1e-7. */
INLINE lanes normal_tail16(lanes x, lanes *density) {
    static const float P[] = {
        0.0931830545f, 0.091418628f, 0.10096187f, 0.0225054527f, 0.206270569f, -0.177719225f, 0.231343976f, -0.067964366f,
    };
    lanes size, u, p;
    UNROLL for (int h = 0; h < NV; h++) size.v[h] = (vec)((ivec)x.v[h] & 0x7fffffff);
    *density = exp16(mul(mul(size, size), splat(-0.5f)));
    u = divide(splat(1.0f), fma16(size, splat(0.233345238f), splat(1.0f)));
    p = splat(P[7]);
    UNROLL for (int i = 6; i >= 0; i--) p = fma16(p, u, splat(P[i]));
    return mul(mul(p, u), *density);
}

INLINE lanes positive16(lanes x, lanes yes, lanes no) {
    UNROLL for (int h = 0; h < NV; h++) x.v[h] = choose(x.v[h] > broadcast(0.0f), yes.v[h], no.v[h]);
    return x;
}

/* An activation; `kind` is a constant. gelu(x) = x times the normal distribution up to x; silu(x) = x / (1 + exp(-x)), and
 * quick_gelu(x) = x / (1 + exp(-1.702 x)). */
INLINE lanes activation16(lanes x, const int kind) {
    if (kind == GELU_NEW) return gelu16(x);
    if (kind == RELU) return max16(splat(0.0f), x); /* keeps NaN */
    if (kind == GELU) {
        lanes density, tail = mul(x, normal_tail16(x, &density));
        return positive16(x, sub(x, tail), tail);
    }
    return divide(x, add(splat(1.0f), exp16(mul(x, splat(kind == SILU ? -1.0f : -1.702f)))));
}

/* ---------------------------------------------------------------------------------------- matrix products */

/* Prefetch of weight rows: every `every`th group of 16 values (1 or 2) from number `first` on, `ahead` bytes before use. */
typedef struct {
    ptrdiff_t ahead;
    int every, first;
} fetch;

INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* Compute one register tile of rows x outputs dots over K values. Weight rows lie `wstep` values apart and their outputs
 * `ostep`, so each row is a separate stream from memory. If `packed`, inp has 16 values of each row, then the next 16. So the
 * processor's own prefetching follows one stream instead of one for each row. One packed tile has all rows, so weights are read
 * once, and the prefetches say so. */
INLINE void dots(const int rows, const int outputs, const int packed, float *out, ptrdiff_t ldo, ptrdiff_t ostep,
                 const float *inp, ptrdiff_t ldi, const char *w, ptrdiff_t wstep, ptrdiff_t K, const int kind, fetch next) {
    const ptrdiff_t bytes = value_bytes(kind);
    const char *wrow[8];
    lanes acc[40];
    UNROLL for (int n = 0; n < outputs; n++) wrow[n] = w + n * wstep * bytes;
    UNROLL_ALL(40) for (int i = 0; i < rows * outputs; i++) acc[i] = splat(0.0f);
    ptrdiff_t k = 0;
#define ROW(r) (packed ? k * rows + (r) * LANES : (r) * ldi + k)
    for (; k + LANES <= K; k += LANES) {
        if (packed)
            UNROLL for (int n = 0; n < outputs; n++) __builtin_prefetch(wrow[n] + k * bytes + 2048, 0, 0);
        else if ((k / LANES & (next.every - 1)) == next.first)
            UNROLL for (int n = 0; n < outputs; n++) __builtin_prefetch(wrow[n] + k * bytes + next.ahead);
        UNROLL for (int h = 0; h < NV; h++) { /* one register of the 16 lanes at a time, because narrow sets have few */
            vec b[8];
            UNROLL for (int n = 0; n < outputs; n++) b[n] = load_weight_vec(wrow[n], k + h * W, kind);
            UNROLL for (int r = 0; r < rows; r++) {
                vec a = *(const vec_unaligned *)(inp + ROW(r) + h * W);
                UNROLL for (int n = 0; n < outputs; n++)
                    acc[r * outputs + n].v[h] = FMA(a, b[n], acc[r * outputs + n].v[h]);
            }
        }
    }
    if (__builtin_expect(k < K, 0)) { /* expected rarely: so the sums stay in registers despite the calls inside */
        lanes b[8];
        UNROLL for (int n = 0; n < outputs; n++) b[n] = load_weights_tail(wrow[n], k, K - k, kind);
        UNROLL for (int r = 0; r < rows; r++) {
            lanes a = load_tail(inp + ROW(r), K - k, 0.0f);
            UNROLL for (int n = 0; n < outputs; n++) acc[r * outputs + n] = fma16(a, b[n], acc[r * outputs + n]);
        }
    }
#undef ROW
    HERE(ldo);
    HERE(ostep);
#define OUT(i) out[(i) / outputs * ldo + (i) % outputs * ostep]
    UNROLL_ALL(10) for (int i = 0; i + 4 <= rows * outputs; i += 4) {
        vec4 four = fold_four(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
        if (outputs == 4 && ostep == 1)
            *(vec4_unaligned *)(out + i / 4 * ldo) = four;
        else
            OUT(i) = four[0], OUT(i + 1) = four[1], OUT(i + 2) = four[2], OUT(i + 3) = four[3];
    }
    UNROLL_ALL(40) for (int i = 0; i < rows * outputs; i++)
        if (i >= rows * outputs / 4 * 4) OUT(i) = fold(acc[i]);
#undef OUT
}

/* Compute a few rows against `outputs` (a constant) weight rows, `wstep` apart. Two row tiles are about equally tall; each
 * prefetches every other line of the next weight rows. Of more tiles, the first and a shorter last one prefetch all lines. */
INLINE void dots_column(const int outputs, const int tallest, const int packed, float *out, ptrdiff_t ldo, ptrdiff_t ostep,
                        const float *inp, ptrdiff_t ldi, ptrdiff_t rows, const char *w, ptrdiff_t wstep, ptrdiff_t K,
                        const int kind) {
    const int two = rows > tallest && rows <= 2 * tallest;
    for (ptrdiff_t r = 0, height; r < rows; r += height) {
        height = two && !r ? (rows + 1) / 2 : least(rows - r, tallest);
        fetch next = {2048, 1, r && height == tallest}; /* first = 1 with every = 1 means: do not prefetch */
        if (two) next = (fetch){K * value_bytes(kind), 2, r != 0};
        switch (height) {
#define ROWS(count) \
    case count:                                                                                                              \
        if (count <= tallest)                                                                                                \
            dots(count, outputs, packed, out + r * ldo, ldo, ostep, inp + r * ldi, ldi, w, wstep, K, kind, next);            \
        break
            ROWS(1);
            ROWS(2);
            ROWS(3);
            ROWS(4);
            ROWS(5);
            ROWS(6);
            ROWS(7);
            ROWS(8);
#undef ROWS
        }
    }
}

/* Read the weights from memory once, in `streams` (a constant) equal parts, and one row of each part at a time. So the
 * processor keeps more reads in flight than with one stream. If `near`, the rows of a tile are neighbours instead. */
INLINE void gemm_of(const int streams, const int tallest, const int packed, const int near, float *out, ptrdiff_t ldo,
                    const float *inp, ptrdiff_t ldi, ptrdiff_t rows, const char *w, ptrdiff_t N, ptrdiff_t K, const int kind) {
    const ptrdiff_t part = N / streams, row_bytes = K * value_bytes(kind), apart = near ? 1 : part, step = near ? streams : 1;
    for (ptrdiff_t n = 0; n < part * step; n += step)
        dots_column(streams, tallest, packed, out + n, ldo, apart, inp, ldi, rows, w + n * row_bytes, apart * K, K, kind);
    for (ptrdiff_t n = part * streams; n < N; n++)
        dots_column(1, packed ? tallest : MR, packed, out + n, ldo, 1, inp, ldi, rows, w + n * row_bytes, K, K, kind);
}

/* ---------------------------------------------------------------------------------------- packed matrix products
 *
 * One register tile serves all products: TILE_ROWS x PANEL sums. Each step of k adds TILE_ROWS values times the PANEL values of
 * a panel, which are neighbours in memory. Lanes of a register are never added to each other. */

#define PANEL (TILE_VECS * LANES)
#define NARROW 64            /* for at most so many rows, packing the weights costs more than it saves */
#define OUTER_STEPS 256      /* packed panels hold so many steps of k ... */
#define OUTER_PANELS 16      /* ... and so many panels: OUTER_STEPS * OUTER_PANELS * PANEL values stay in the second-level cache */

typedef struct {
    lanes v[TILE_ROWS][TILE_VECS];
} sums;

#define EACH_SUM                                       \
    UNROLL for (int r = 0; r < TILE_ROWS; r++)         \
        UNROLL for (int c = 0; c < TILE_VECS; c++)

/* Add one step of k: sum[r][n] += row[r][at] * b[n]. */
INLINE void tile_step(sums *sum, const float *const *row, ptrdiff_t at, const float *b) {
    UNROLL for (int h = 0; h < NV; h++) {
        vec value[TILE_VECS];
        UNROLL for (int c = 0; c < TILE_VECS; c++) value[c] = *(const vec_unaligned *)(b + c * LANES + h * W);
        UNROLL for (int r = 0; r < TILE_ROWS; r++) {
            vec weight = broadcast(row[r][at]);
            UNROLL for (int c = 0; c < TILE_VECS; c++) sum->v[r][c].v[h] = FMA(weight, value[c], sum->v[r][c].v[h]);
        }
    }
}

/* sum[r][n] += a[r * a_row + k * a_step] * b[k * PANEL + n], k ascending. */
INLINE void tile(sums *sum, const float *a, ptrdiff_t a_row, ptrdiff_t a_step, const float *b, ptrdiff_t steps) {
    const float *row[TILE_ROWS];
    UNROLL for (int r = 0; r < TILE_ROWS; r++) row[r] = a + r * a_row;
    _Pragma("GCC unroll 4") for (ptrdiff_t k = 0; k < steps; k++) tile_step(sum, row, k * a_step, b + k * PANEL);
}

/* Do the same, and prefetch `lines` of 16 values each, from `ahead` on, into the second-level cache: one for every 8 steps.
 * More at a time, or prefetching into the first level, would delay the loads of the tile. */
INLINE void tile_reading(sums *sum, const float *a, ptrdiff_t a_row, ptrdiff_t a_step, const float *b, ptrdiff_t steps,
                         const float *ahead, ptrdiff_t lines) {
    const float *row[TILE_ROWS];
    UNROLL for (int r = 0; r < TILE_ROWS; r++) row[r] = a + r * a_row;
    for (ptrdiff_t first = 0; first < steps; first += 8) {
        const ptrdiff_t last = least(first + 8, steps);
        __builtin_prefetch(ahead, 0, 2);
        ahead += first < 8 * lines ? LANES : 0;
        _Pragma("GCC unroll 4") for (ptrdiff_t k = first; k < last; k++) tile_step(sum, row, k * a_step, b + k * PANEL);
    }
}

/* Store a tile of `rows` x `count` sums, and drop the other sums. */
INLINE void store_tile(float *out, ptrdiff_t ldo, const sums *sum, ptrdiff_t rows, ptrdiff_t count) {
    if (rows >= TILE_ROWS && count >= PANEL) {
        EACH_SUM store(out + r * ldo + c * LANES, sum->v[r][c]);
        return;
    }
    float whole[TILE_ROWS * PANEL];
    EACH_SUM store(whole + r * PANEL + c * LANES, sum->v[r][c]);
    if (rows > TILE_ROWS) rows = TILE_ROWS;
    if (count > PANEL) count = PANEL;
    for (ptrdiff_t r = 0; r < rows; r++) memcpy(out + r * ldo, whole + r * PANEL, count * sizeof *out);
}

INLINE void load_tile(sums *sum, const float *out, ptrdiff_t ldo, ptrdiff_t rows, ptrdiff_t count) {
    if (rows >= TILE_ROWS && count >= PANEL) {
        EACH_SUM sum->v[r][c] = load(out + r * ldo + c * LANES);
        return;
    }
    float whole[TILE_ROWS * PANEL] = {0};
    if (rows > TILE_ROWS) rows = TILE_ROWS;
    if (count > PANEL) count = PANEL;
    for (ptrdiff_t r = 0; r < rows; r++) memcpy(whole + r * PANEL, out + r * ldo, count * sizeof *out);
    EACH_SUM sum->v[r][c] = load(whole + r * PANEL + c * LANES);
}

/* Transpose W vectors of W values. Stage s swaps the halves of vectors that lie s apart. */
#if W == 16
#define EACH_LANE(f, s) \
    f(s, 0), f(s, 1), f(s, 2), f(s, 3), f(s, 4), f(s, 5), f(s, 6), f(s, 7), f(s, 8), f(s, 9), f(s, 10), f(s, 11), f(s, 12), \
        f(s, 13), f(s, 14), f(s, 15)
#elif W == 8
#define EACH_LANE(f, s) f(s, 0), f(s, 1), f(s, 2), f(s, 3), f(s, 4), f(s, 5), f(s, 6), f(s, 7)
#else
#define EACH_LANE(f, s) f(s, 0), f(s, 1), f(s, 2), f(s, 3)
#endif
#define LOWER(s, j) ((j) & (s) ? W + (j) - (s) : (j))
#define UPPER(s, j) ((j) & (s) ? W + (j) : (j) + (s))
#define STAGE(s)                                                              \
    UNROLL for (int i = 0; i < W; i++) if (!(i & (s))) {                      \
        vec a = x[i], b = x[i + (s)];                                         \
        x[i] = __builtin_shufflevector(a, b, EACH_LANE(LOWER, s));            \
        x[i + (s)] = __builtin_shufflevector(a, b, EACH_LANE(UPPER, s));      \
    }

INLINE void transpose(vec x[W]) {
    STAGE(1)
    STAGE(2)
#if W > 4
    STAGE(4)
#endif
#if W > 8
    STAGE(8)
#endif
}

/* The order in which a dot's 16 lanes are computed: position i is lane i with its four bits reversed, so the order is its own
 * inverse. A stack then holds at most four sums that wait for the other half of a fold. */
static const unsigned char fold_order[LANES] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

/* Transpose 16 rows of 16 values: out[i * lane_step + row] = row[fold_order[i]]. */
INLINE void pack_square(float *out, ptrdiff_t lane_step, const void *from, ptrdiff_t ld, const int kind) {
    UNROLL for (int r = 0; r < LANES; r += W)
        UNROLL for (int h = 0; h < NV; h++) {
            vec x[W];
            UNROLL for (int j = 0; j < W; j++) x[j] = load_weight_vec(from, (r + j) * ld + h * W, kind);
            transpose(x);
            UNROLL for (int j = 0; j < W; j++) *(vec_unaligned *)(out + fold_order[h * W + j] * lane_step + r) = x[j];
        }
}

/* Pack up to 16 rows of K values in the order in which a tile reads them. The value k = 16i + fold_order[j] of a row goes to
 * out[(j * steps + i) * width + row], with steps = K / 16 rounded up. Missing rows and values are zeros, as in a dot. */
INLINE void pack_lanes(float *out, ptrdiff_t width, const char *from, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t K, const int kind) {
    const ptrdiff_t steps = (K + LANES - 1) / LANES, whole = rows < LANES ? 0 : K / LANES;
    for (ptrdiff_t i = 0; i < whole; i++)
        pack_square(out + i * width, steps * width, from + i * LANES * value_bytes(kind), ld, kind);
    for (ptrdiff_t i = whole; i < steps; i++) {
        float square[LANES * LANES] = {0};
        const ptrdiff_t n = K - i * LANES < LANES ? K - i * LANES : LANES;
        for (ptrdiff_t r = 0; r < rows && r < LANES; r++)
            store(square + r * LANES, load_weights_tail(from, r * ld + i * LANES, n, kind));
        pack_square(out + i * width, steps * width, square, LANES, KIND_float32);
    }
}

/* Compute TILE_ROWS x PANEL dots at once, each with the operations of dots(). The tile runs once for each of the 16 lanes. The
 * folds 8+8, 4+4, 2+2, 1+1 add whole tiles. */
NOINLINE void dot_tile(float *out, ptrdiff_t ldo, const float *a, const float *b, ptrdiff_t steps, ptrdiff_t rows,
                       ptrdiff_t count) {
    float waiting[4][TILE_ROWS * PANEL] __attribute__((aligned(64)));
    int top = 0;
    for (int lane = 0; lane < LANES; lane++) {
        sums sum;
        EACH_SUM sum.v[r][c] = splat(0.0f);
        tile(&sum, a + lane * steps * LANES, 1, LANES, b + lane * steps * PANEL, steps);
        for (int halves = lane; halves & 1; halves >>= 1) {
            top--;
            EACH_SUM sum.v[r][c] = add(load(waiting[top] + (r * TILE_VECS + c) * LANES), sum.v[r][c]);
        }
        if (lane == LANES - 1)
            store_tile(out, ldo, &sum, rows, count);
        else {
            EACH_SUM store(waiting[top] + (r * TILE_VECS + c) * LANES, sum.v[r][c]);
            top++;
        }
    }
}

static void pack_rows(void *packed, const float *inp, ptrdiff_t ldi, ptrdiff_t rows, ptrdiff_t K) {
    const ptrdiff_t panel = (K + LANES - 1) / LANES * LANES * LANES;
    for (ptrdiff_t r = 0; r < rows; r += LANES)
        pack_lanes((float *)packed + r / LANES * panel, LANES, (const char *)(inp + r * ldi), ldi, rows - r, K, KIND_float32);
}

INLINE void pack_weights_of(float *packed, const char *w, ptrdiff_t N, ptrdiff_t K, const int kind) {
    const ptrdiff_t steps = (K + LANES - 1) / LANES, whole = (N + PANEL - 1) / PANEL * PANEL; /* zeros fill the last panel */
    for (ptrdiff_t n = 0; n < whole; n += LANES)
        pack_lanes(packed + n / PANEL * (steps * LANES * PANEL) + n % PANEL, PANEL, n < N ? w + n * K * value_bytes(kind) : w, K,
                   n < N ? N - n : 0, K, kind);
}

static void product(float *out, ptrdiff_t ldo, const void *packed_rows, ptrdiff_t rows, const weight_matrix *w,
                    ptrdiff_t start, ptrdiff_t stop, const void *packed_weights) {
    const ptrdiff_t N = stop - start, K = w->K;
    const ptrdiff_t steps = (K + LANES - 1) / LANES;
    for (ptrdiff_t r = 0; r < rows; r += TILE_ROWS) {
        const float *a = (const float *)packed_rows + r / LANES * (steps * LANES * LANES) + r % LANES;
        for (ptrdiff_t n = 0; n < N; n += PANEL)
            dot_tile(out + r * ldo + n, ldo, a, (const float *)packed_weights + n * steps * LANES, steps, rows - r, N - n);
    }
}

#define OUTER_PANEL (OUTER_STEPS * PANEL + LANES) /* distance of packed panels: not a multiple of a cache way */

/* Cut rows of b, N values each, into panels. Zeros fill the last panel. */
INLINE void pack_panels(float *out, const float *b, ptrdiff_t ldb, ptrdiff_t steps, ptrdiff_t N) {
    for (ptrdiff_t k = 0; k < steps; k++, out += PANEL, b += ldb) {
        ptrdiff_t n = 0;
        for (; n + PANEL <= N; n += PANEL)
            UNROLL for (int c = 0; c < TILE_VECS; c++) store(out + n / PANEL * OUTER_PANEL + c * LANES, load(b + n + c * LANES));
        if (n < N) {
            float rest[PANEL] = {0};
            memcpy(rest, b + n, (N - n) * sizeof *rest);
            memcpy(out + n / PANEL * OUTER_PANEL, rest, sizeof rest);
        }
    }
}

/* Pack 16 values for every step, from `count` rows, then zeros. Prefetch the next 16 values of each step. */
INLINE void pack_columns(float *out, const float *a, ptrdiff_t a_row, ptrdiff_t a_step, ptrdiff_t steps, ptrdiff_t count) {
    if (a_row == 1 && count >= LANES) {
        for (ptrdiff_t k = 0; k < steps; k++) {
            store(out + k * LANES, load(a + k * a_step));
            if (count > LANES) __builtin_prefetch(a + k * a_step + LANES, 0, 2);
        }
        return;
    }
    for (ptrdiff_t k = 0; k < steps; k++)
        for (ptrdiff_t r = 0; r < LANES; r++) out[k * LANES + r] = r < count ? a[r * a_row + k * a_step] : 0.0f;
}

/* The rows of b that are packed next. The tiles prefetch them, so the packing finds them in cache. */
typedef struct {
    const float *row;
    ptrdiff_t ld, rows, width, at;
} coming;

/* Return the address from which a tile of `steps` steps prefetches, and in `lines` the number of lines of 16 values. */
INLINE const float *read_ahead(coming *next, ptrdiff_t steps, ptrdiff_t *lines) {
    const float *from = next->row + next->at;
    *lines = next->rows <= 0 ? 0 : least((next->width - next->at + LANES - 1) / LANES, steps / 8);
    next->at += *lines * LANES;
    if (*lines && next->at >= next->width) {
        next->at = 0;
        next->row += next->ld;
        next->rows--;
    }
    return from;
}

/* Compute a row of tiles: rows of `a` against all panels of a block. */
NOINLINE void outer_row(float *out, ptrdiff_t ldo, const float *a, ptrdiff_t a_row, ptrdiff_t a_step, const float *panels,
                        ptrdiff_t steps, ptrdiff_t count, ptrdiff_t width, int add_to, coming *next) {
    for (ptrdiff_t n = 0; n < width; n += PANEL, panels += OUTER_PANEL) {
        ptrdiff_t lines;
        const float *ahead = read_ahead(next, steps, &lines);
        sums sum;
        if (add_to)
            load_tile(&sum, out + n, ldo, count, width - n);
        else
            EACH_SUM sum.v[r][c] = splat(0.0f);
        if (lines)
            tile_reading(&sum, a, a_row, a_step, panels, steps, ahead, lines);
        else
            tile(&sum, a, a_row, a_step, panels, steps);
        store_tile(out + n, ldo, &sum, count, width - n);
    }
}

/* Compute one block: `steps` steps from k on of the outputs [n, n + width) of all M rows. `room` has the packed panels. */
INLINE void outer_block(float *out, ptrdiff_t ldo, const float *a, ptrdiff_t a_row, ptrdiff_t a_step, ptrdiff_t M, ptrdiff_t steps,
                        ptrdiff_t width, int add_to, float *room, coming *next) {
    float *columns = room + OUTER_PANELS * OUTER_PANEL; /* (steps, 16) of a, used if a's rows are not contiguous */
    for (ptrdiff_t m = 0; m < M; m += LANES) {
        const int in_place = a_step == 1 && M - m >= LANES;
        const float *from = a + m * a_row;
        if (!in_place) pack_columns(columns, from, a_row, a_step, steps, M - m);
        for (ptrdiff_t r = 0; r < LANES && m + r < M; r += TILE_ROWS)
            if (in_place)
                outer_row(out + (m + r) * ldo, ldo, from + r * a_row, a_row, 1, room, steps, M - m - r, width, add_to, next);
            else
                outer_row(out + (m + r) * ldo, ldo, columns + r, 1, LANES, room, steps, M - m - r, width, add_to, next);
    }
}

static void outer(float *out, ptrdiff_t ldo, const float *a, ptrdiff_t a_row, ptrdiff_t a_step, const float *b, ptrdiff_t ldb,
                  ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, int add_to, float *room) {
    for (ptrdiff_t n = 0; n < N; n += OUTER_PANELS * PANEL) {
        const ptrdiff_t width = least(N - n, OUTER_PANELS * PANEL);
        for (ptrdiff_t k = 0; k < K; k += OUTER_STEPS) {
            const ptrdiff_t steps = least(K - k, OUTER_STEPS);
            coming next = {b + (k + steps) * ldb + n, ldb, least(K - k - steps, OUTER_STEPS), width, 0};
            if (!next.rows && n + width < N)
                next = (coming){b + n + width, ldb, least(K, OUTER_STEPS), least(N - n - width, OUTER_PANELS * PANEL), 0};
            pack_panels(room, b + k * ldb + n, ldb, steps, width);
            outer_block(out + n, ldo, a + k * a_step, a_row, a_step, M, steps, width, add_to || k, room, &next);
        }
    }
}

/* ---------------------------------------------------------------------------------------- row by row */

/* Run the statements over i = 0, 16, ... with n = 16 values, then once with the ragged rest n = 1 to 15. */
#define FOR_LANES(total, ...)                           \
    do {                                                \
        ptrdiff_t i = 0;                                \
        for (; i + LANES <= (total); i += LANES) {      \
            enum { n = LANES };                         \
            __VA_ARGS__;                                \
        }                                               \
        if (i < (total)) {                              \
            const ptrdiff_t n = (total) - i;            \
            __VA_ARGS__;                                \
        }                                               \
    } while (0)
#define GET(p, fill) (n == LANES ? load((p) + i) : load_tail((p) + i, n, (fill)))
#define PUT(p, a) (n == LANES ? store((p) + i, (a)) : store_tail((p) + i, (a), n))

static void layernorm(float *out, const float *inp, const float *weight, const float *bias, float eps, ptrdiff_t C, float *stats) {
    lanes acc = splat(0.0f);
    FOR_LANES(C, acc = add(acc, GET(inp, 0.0f)));
    const float mean = fold(acc) / (float)C;
    acc = splat(0.0f);
    FOR_LANES(C, {
        lanes d = sub(GET(inp, mean), splat(mean));
        acc = fma16(d, d, acc);
    });
    const float rstd = 1.0f / sqrtf(fold(acc) / (float)C + eps);
    if (stats) stats[0] = mean, stats[1] = rstd;
    FOR_LANES(C, PUT(out, fma16(mul(sub(GET(inp, 0.0f), splat(mean)), splat(rstd)), GET(weight, 0.0f), GET(bias, 0.0f))));
}

static void add_bias(float *out, const float *bias, ptrdiff_t N) {
    FOR_LANES(N, PUT(out, add(GET(out, 0.0f), GET(bias, 0.0f))));
}

#define EACH_ACTIVATION(f) f(GELU_NEW) f(GELU) f(RELU) f(SILU) f(QUICK_GELU)
#define FUNCTION(kind)                                                                        \
    static void add_bias_##kind(float *act, float *out, const float *bias, ptrdiff_t N) {     \
        FOR_LANES(N, {                                                                        \
            lanes sum = add(GET(out, 0.0f), GET(bias, 0.0f));                                 \
            if (act != out) PUT(out, sum);                                                    \
            PUT(act, activation16(sum, kind));                                                \
        });                                                                                   \
    }
EACH_ACTIVATION(FUNCTION)
#undef FUNCTION

static void add_bias_residual(float *after, const float *before, const float *out, const float *bias, ptrdiff_t N) {
    FOR_LANES(N, PUT(after, add(GET(before, 0.0f), add(GET(out, 0.0f), GET(bias, 0.0f)))));
}

/* ---------------------------------------------------------------------------------------- attention */

static void store_scaled(float *out, const float *acc, float factor, ptrdiff_t N) {
    FOR_LANES(N, PUT(out, mul(load(acc + i), splat(factor))));
}

static float softmax(float *s, ptrdiff_t T, float scale, float *max_of) {
    const ptrdiff_t Tp = (T + LANES - 1) / LANES * LANES;
    for (ptrdiff_t t = T; t < Tp; t++) s[t] = -INFINITY;
    lanes highest = splat(-INFINITY);
    for (ptrdiff_t t = 0; t < Tp; t += LANES) {
        lanes scaled = mul(load(s + t), splat(scale));
        store(s + t, scaled);
        highest = max16(scaled, highest);
    }
    const float max = fold_max(highest);
    if (max_of) *max_of = max;
    lanes acc = splat(0.0f);
    for (ptrdiff_t t = 0; t < Tp; t += LANES) {
        lanes e = exp16(sub(load(s + t), splat(max)));
        store(s + t, e);
        acc = add(acc, e);
    }
    return fold(acc);
}

#define MIX_AHEAD 1024 /* values: what one row reads of the values comes from memory */

INLINE void mix_tile(const int rows, const int vecs, float *acc, const float *p, ptrdiff_t ldp,
                     const float *v, ptrdiff_t HSp, ptrdiff_t t0, ptrdiff_t t1) {
    lanes sum[MIX_ROWS][MIX_VECS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < vecs; c++) sum[r][c] = load(acc + r * HSp + c * LANES);
    for (ptrdiff_t t = t0; t < t1; t++) {
        lanes value[MIX_VECS];
        if (rows == 1)
            UNROLL for (int c = 0; c < vecs; c++) __builtin_prefetch(v + t * HSp + c * LANES + MIX_AHEAD);
        UNROLL for (int c = 0; c < vecs; c++) value[c] = load(v + t * HSp + c * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            lanes weight = splat(p[r * ldp + t]);
            UNROLL for (int c = 0; c < vecs; c++) sum[r][c] = fma16(weight, value[c], sum[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < vecs; c++) store(acc + r * HSp + c * LANES, sum[r][c]);
}

INLINE void mix_rows(const int rows, float *acc, const float *p, ptrdiff_t ldp,
                     const float *v, ptrdiff_t HSp, ptrdiff_t t0, ptrdiff_t t1) {
    ptrdiff_t d = 0;
    for (; d + MIX_VECS * LANES <= HSp; d += MIX_VECS * LANES) mix_tile(rows, MIX_VECS, acc + d, p, ldp, v + d, HSp, t0, t1);
    for (; d < HSp; d += LANES) mix_tile(rows, 1, acc + d, p, ldp, v + d, HSp, t0, t1);
}

static void mix(float *acc, const float *p, ptrdiff_t ldp, ptrdiff_t rows,
                const float *v, ptrdiff_t HSp, ptrdiff_t t0, ptrdiff_t t1) {
    ptrdiff_t r = 0;
    for (; r + MIX_ROWS <= rows; r += MIX_ROWS) mix_rows(MIX_ROWS, acc + r * HSp, p + r * ldp, ldp, v, HSp, t0, t1);
    for (; r < rows; r++) mix_rows(1, acc + r * HSp, p + r * ldp, ldp, v, HSp, t0, t1);
}

/* ---------------------------------------------------------------------------------------- sampling */

/* exp of a float32 x <= 0: a float64 result with relative error below 1e-13, rounded once. It is correctly rounded in all but
 * about one case in a million. Without libm and fused operations it is the same on every machine: 0 below -104, NaN for NaN. */
INLINE half_vec exp_rounded(half_vec x) {
    const double LOG2E = 1.4426950408889634, LN2_HI = 0x1.62e42fefap-1, LN2_LO = 0x1.cf79abc9e3b39p-40;
    const double ROUND = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to an integer, in the low bits */
    double_vec a = __builtin_convertvector(x, double_vec);
    long_vec below = a < -104.0;
    a = (double_vec)((~below & (long_vec)a) | (below & (long_vec)(double_vec)(-104.0 - (double_vec){0})));
    double_vec shifted = a * LOG2E + ROUND, n = shifted - ROUND;
    double_vec r = (a - n * LN2_HI) - n * LN2_LO;
    double_vec p = r * (1.0 / 39916800) + 1.0 / 3628800; /* Taylor's series to r^11: remainder below 7e-15 for |r| <= 0.35 */
    const double rest[] = {1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 1.0 / 2, 1.0, 1.0};
    UNROLL for (int i = 0; i < 10; i++) p = p * r + rest[i];
    p = (double_vec)((ulong_vec)p + ((ulong_vec)shifted << 52)); /* times 2^n */
    return __builtin_convertvector((double_vec)(~below & (long_vec)p), half_vec);
}

/* Philox4x32-10: a bijection that mixes a 128-bit counter with a 64-bit key. It gives any number of any stream without the
 * numbers before it. 64 counters run side by side, so that the loop becomes vector code.
 * Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". */
static void noise(uint32_t words[256], uint32_t first, const uint32_t counter[3], uint32_t k0, uint32_t k1) {
    uint32_t *restrict const c0 = words, *restrict const c1 = words + 64;
    uint32_t *restrict const c2 = words + 128, *restrict const c3 = words + 192;
    for (int l = 0; l < 64; l++) c0[l] = counter[0], c1[l] = counter[1], c2[l] = counter[2], c3[l] = first + l;
    for (int round = 0; round < 10; round++) {
        for (int l = 0; l < 64; l++) {
            const uint64_t a = (uint64_t)0xD2511F53 * c0[l], b = (uint64_t)0xCD9E8D57 * c2[l];
            c0[l] = (uint32_t)(b >> 32) ^ c1[l] ^ k0;
            c1[l] = (uint32_t)b;
            c2[l] = (uint32_t)(a >> 32) ^ c3[l] ^ k1;
            c3[l] = (uint32_t)a;
        }
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

static void exps(float *e, const float *logits, float max, ptrdiff_t V) {
    ptrdiff_t i = 0;
    for (; i + W / 2 <= V; i += W / 2)
        *(half_vec_unaligned *)(e + i) = exp_rounded(*(const half_vec_unaligned *)(logits + i) - max);
    if (i < V) {
        half_vec rest = {0};
        memcpy(&rest, logits + i, (V - i) * sizeof *e);
        rest = exp_rounded(rest - max);
        memcpy(e + i, &rest, (V - i) * sizeof *e);
    }
}

/* ---------------------------------------------------------------------------------------- the machine's own limits */

INLINE float probe_read_of(const int streams, const float *p, ptrdiff_t count) {
    const ptrdiff_t part = count / streams / (2 * LANES) * (2 * LANES);
    lanes sum[8];
    UNROLL for (int s = 0; s < streams; s++) sum[s] = splat(0.0f);
    for (ptrdiff_t i = 0; i < part; i += 2 * LANES)
        UNROLL for (int s = 0; s < streams; s++) {
            const float *at = p + s * part + i;
            __builtin_prefetch(at + 1024);
            __builtin_prefetch(at + 1024 + LANES);
            sum[s] = add(sum[s], add(load(at), load(at + LANES)));
        }
    float total = 0.0f;
    UNROLL for (int s = 0; s < streams; s++) total += fold(sum[s]);
    return total;
}

static float probe_read(const float *p, ptrdiff_t count, int streams) {
    switch (streams) {
    case 1: return probe_read_of(1, p, count);
    case 2: return probe_read_of(2, p, count);
    case 4: return probe_read_of(4, p, count);
    default: return probe_read_of(8, p, count);
    }
}

#define PROBE_CHAINS 12 /* independent sums: more than latency times width of all supported processors */

static float probe_fma(ptrdiff_t times) {
    vec sum[PROBE_CHAINS], a = broadcast(0.999999f), b = broadcast(1e-6f);
    UNROLL for (int i = 0; i < PROBE_CHAINS; i++) sum[i] = broadcast((float)i);
    for (ptrdiff_t t = 0; t < times; t++) UNROLL for (int i = 0; i < PROBE_CHAINS; i++) sum[i] = FMA(sum[i], a, b);
    float total = 0.0f;
    UNROLL for (int i = 0; i < PROBE_CHAINS; i++) total += sum[i][0];
    return total;
}

#include "micro_training.h"

/* ---------------------------------------------------------------------------------------- the tables */

/* If registers suffice, tall tiles read a weight row once for up to 8 rows, which are packed, and twice for up to 16. Without room
 * for that, w has the keys of a head, short rows in a cache: the four sums of neighbours are stored together. */
#ifdef TALL_TILES
INLINE void interleave(float *packed, const float *inp, ptrdiff_t ldi, ptrdiff_t rows, ptrdiff_t K) {
    for (ptrdiff_t k = 0; k < K; k += LANES)
        for (ptrdiff_t r = 0; r < rows; r++, packed += LANES)
            store(packed, K - k < LANES ? load_tail(inp + r * ldi + k, K - k, 0.0f) : load(inp + r * ldi + k));
}
#define TALL_CASES(id)                                                                                                   \
        else if (!room)                                                                                                  \
            gemm_of(4, 4, 0, 1, out, ldo, inp, ldi, rows, from, stop - start, w->K, KIND_##id);                          \
        else if (rows <= 8) {                                                                                            \
            interleave(room, inp, ldi, rows, w->K);                                                                      \
            gemm_of(4, 8, 1, 0, out, ldo, room, LANES, rows, from, stop - start, w->K, KIND_##id);                       \
        } else if (rows > 10 && rows <= 16)                                                                              \
            gemm_of(4, 8, 0, 0, out, ldo, inp, ldi, rows, from, stop - start, w->K, KIND_##id);
#else
#define TALL_CASES(id)
#endif
#define FUNCTIONS(id, bytes, load)                                                                                       \
    static void gemm_##id(float *out, ptrdiff_t ldo, const float *inp, ptrdiff_t ldi, ptrdiff_t rows,                    \
                            const weight_matrix *w, ptrdiff_t start, ptrdiff_t stop, void *room) {                       \
        const char *from = (const char *)w->data + start * w->K * bytes;                                                 \
        (void)room;                                                                                                      \
        if (rows == 1)                                                                                                   \
            gemm_of(STREAMS, 1, 0, 0, out, ldo, inp, ldi, 1, from, stop - start, w->K, KIND_##id);                       \
        TALL_CASES(id)                                                                                                   \
        else                                                                                                             \
            gemm_of(NR, MR, 0, 0, out, ldo, inp, ldi, rows, from, stop - start, w->K, KIND_##id);                        \
    }                                                                                                                    \
    static void pack_weights_##id(void *room, const weight_matrix *w, ptrdiff_t start, ptrdiff_t stop) {                 \
        pack_weights_of(room, (const char *)w->data + start * w->K * bytes, stop - start, w->K, KIND_##id);              \
    }                                                                                                                    \
    static void widen_##id(float *out, const weight_matrix *w, ptrdiff_t row) {                                          \
        const char *from = (const char *)w->data + row * w->K * bytes;                                                   \
        ptrdiff_t k = 0;                                                                                                 \
        for (; k + LANES <= w->K; k += LANES) store(out + k, load_weights(from, k, KIND_##id));                          \
        if (k < w->K) store_tail(out + k, load_weights_tail(from, k, w->K - k, KIND_##id), w->K - k);                    \
    }                                                                                                                    \
    static const weight_format format_##id = {                                                                           \
        .name = #id, .block_values = 1, .value_bytes = bytes, .interleave = 1, .panel = PANEL, .narrow = NARROW,         \
        .gemm = gemm_##id, .pack_rows = pack_rows, .pack_weights = pack_weights_##id, .product = product,                \
        .widen = widen_##id,                                                                                             \
    };
EACH_FORMAT(FUNCTIONS)
#undef FUNCTIONS

/* TABLE defines the table of an instruction set, from its name and its quantised formats. */
#define ROW(name, bytes, load) &format_##name,
#define ADD_BIAS(kind) add_bias_##kind,
#define BACKWARD(kind) backward_##kind,
#define TABLE(set, quantised)                                                                                            \
    static const weight_format *const formats_##set[] = {EACH_FORMAT(ROW) &quantised[0], &quantised[1], NULL};           \
    static const microkernels table_##set = {                                                                            \
        .isa = #set, .fused = FUSED, .formats = formats_##set, .outer = outer, .layernorm = layernorm,                   \
        .add_bias = add_bias, .add_bias_act = {EACH_ACTIVATION(ADD_BIAS)}, .add_bias_residual = add_bias_residual,                    \
        .softmax = softmax, .mix = mix, .store_scaled = store_scaled, .exps = exps, .noise = noise,                      \
        .add_rows = add_rows, .act_backward = {EACH_ACTIVATION(BACKWARD)}, .layernorm_backward = layernorm_backward,                  \
        .layernorm_gains = layernorm_gains, .softmax_backward = softmax_backward, .adamw = adamw,                        \
        .square_sum = square_sum, .panel = PANEL, .outer_room = OUTER_PANELS * OUTER_PANEL + OUTER_STEPS * LANES,        \
        .probe_read = probe_read, .probe_fma = probe_fma, .probe_flop = 2.0 * W * PROBE_CHAINS,                          \
        .probe_stream = probe_stream,                                                                                    \
    };
