/* The microkernels: the innermost loops, compiled once for each instruction set from one source (micro_body.h).
 *
 * One arithmetic. Every function below computes each output by one fixed sequence of IEEE-754 operations. All instruction sets
 * with fused multiply-add use the same sequence; the baseline rounds products and sums separately:
 *   dot   16 lanes; lane l adds a[16i+l] * b[16i+l] by FMA in ascending i; zeros fill a ragged tail; then the lanes
 *         fold 8+8, 4+4, 2+2, 1+1
 *   sum   the same with additions; max is exact in any order
 *   exp   one polynomial in FMA form; no libm
 * So a register tile may hold any number of rows and outputs, and one row or a thousand give the same bits.
 *
 * Every weight format is one row of a table, weight_format. All other arrays are float32. Rows are contiguous along K, and
 * every leading dimension counts values. quantised_body.h has the arithmetic of the quantised formats. The functions
 * do not allocate memory, and except for prefetches they read only the given arrays. */
#ifndef PYGPT_MICRO_H
#define PYGPT_MICRO_H
#include <stddef.h>
#include <stdint.h>

/* Loops whose count is a constant after inlining: unrolled completely, so that arrays of sums become registers. */
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_ALL(most) UNROLL
#define HERE(x) __asm__("" : "+r"(x))
#define TARGET(isa) PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define HERE(x) (void)0
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_ALL(most) PRAGMA(GCC unroll most)
#define TARGET(isa) PRAGMA(GCC target(isa)) /* the functions up to END_TARGET use this instruction set */
#define END_TARGET _Pragma("GCC reset_options")
#endif

typedef struct { /* one step of AdamW; corrections are 1 / (1 - beta^step) */
    float lr, beta1, beta2, rest1, rest2, over_correction1, over_correction2, eps, decay, gradient_scale;
} adamw_numbers;

typedef struct { /* one layer's part of a tensor: N outputs of K weights each */
    const void *data;
    ptrdiff_t N, K;
} weight_matrix;

/* One weight format: how the numbers of a matrix lie in memory, and the functions that compute with them. A block holds
 * block_values neighbours of one row: their values in value_bytes bytes, and scale_bytes bytes of their shared scale. Rows are
 * interleaved in groups. The values of all groups come first, then their scales, filled up to a multiple of 64 bytes. The functions
 * take outputs [start, stop) of a matrix, start at the beginning of a group, and number those of `out` from 0. */
typedef struct weight_format weight_format;
struct weight_format {
    const char *name;
    int block_values, value_bytes, scale_bytes;
    int interleave; /* rows of a group: 1 if rows are not interleaved */
    int panel;      /* outputs of a register tile of product: use blocks of a multiple of it */
    int narrow;     /* up to this number of rows, gemm is faster than product */

    /* out[r * ldo + n] = dot(inp + r * ldi, row start + n of w) for r < rows. For few rows: it reads the weights once. `room` is
     * scratch memory of rows x (K rounded up to 16) float32 values, for converted activations; for float32 it may be NULL. */
    void (*gemm)(float *out, ptrdiff_t ldo, const float *inp, ptrdiff_t ldi, ptrdiff_t rows, const weight_matrix *w,
                 ptrdiff_t start, ptrdiff_t stop, void *room);

    /* Compute the same bits for many rows. The caller packs the rows first. They take at most (rows rounded up to 16) x (K rounded
     * up to 16) float32 values; rows from a multiple r of 16 on begin r x (K rounded up to 16) values further. The weights are
     * packed into `room`, (outputs rounded up to panels) x (K rounded up to 16) float32 values, chosen to fit the second-level
     * cache. If a format does not pack weights, pack_weights is NULL, and product takes NULL. */
    void (*pack_rows)(void *packed, const float *inp, ptrdiff_t ldi, ptrdiff_t rows, ptrdiff_t K);
    void (*pack_weights)(void *room, const weight_matrix *w, ptrdiff_t start, ptrdiff_t stop);
    void (*product)(float *out, ptrdiff_t ldo, const void *packed_rows, ptrdiff_t rows, const weight_matrix *w,
                    ptrdiff_t start, ptrdiff_t stop, const void *room);

    void (*widen)(float *out, const weight_matrix *w, ptrdiff_t row); /* out[k] = w[row][k] for k < K */

    /* Quantised formats: write the groups [start, stop) of `out` from a matrix of the same shape in another format. `room` has
     * (rows of a group) x (K rounded up to 32, and 16) float32 values. Return whether the format can represent every number: a
     * number must be finite, and not too large for a scale. NULL for unquantised formats. */
    int (*quantise)(void *out, const weight_format *from, const weight_matrix *w, ptrdiff_t start, ptrdiff_t stop, float *room);

    /* Probe of the machine's limit for formats of integer products, else NULL: the integer dot product alone, in registers,
     * probe_operations each time. */
    int (*probe)(ptrdiff_t times);
    int probe_operations;
};

/* The activations of the feed-forward, in the order of config.ACTIVATIONS. */
enum { GELU_NEW, GELU, RELU, SILU, QUICK_GELU, ACTIVATIONS };

typedef struct {
    const char *isa; /* "baseline", "avx2", ... */
    int fused;       /* whether multiply-add rounds once */

    const weight_format *const *formats; /* float32 first; after the last, NULL */

    /* out[m * ldo + n] = (add_to ? out[m * ldo + n] : 0) + sum over k < K of a[m * a_row + k * a_step] * b[k * ldb + n], m < M,
     * n < N. The sum is in ascending k, by FMA. `room` has outer_room values. */
    void (*outer)(float *out, ptrdiff_t ldo, const float *a, ptrdiff_t a_row, ptrdiff_t a_step, const float *b, ptrdiff_t ldb,
                  ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, int add_to, float *room);

    /* out = (inp - mean) * rstd * weight + bias over one row of C, rstd = 1 / sqrt(variance + eps); stats (mean, rstd), or NULL. */
    void (*layernorm)(float *out, const float *inp, const float *weight, const float *bias, float eps, ptrdiff_t C, float *stats);

    /* Epilogues of a matrix product, in place on N values of one row. */
    void (*add_bias)(float *out, const float *bias, ptrdiff_t N); /* out += bias */
    /* act = activation(out + bias); if act and out are different arrays, out += bias */
    void (*add_bias_act[ACTIVATIONS])(float *act, float *out, const float *bias, ptrdiff_t N);
    /* after = before + (out + bias) */
    void (*add_bias_residual)(float *after, const float *before, const float *out, const float *bias, ptrdiff_t N);

    /* s[t] = exp(scale * s[t] - max) for t < T, and 0 for the padding up to a multiple of 16. Return the sum, added in 16
     * lanes, and in max_of, unless it is NULL, the max. */
    float (*softmax)(float *s, ptrdiff_t T, float scale, float *max_of);

    /* acc[r * HSp + d] += sum over t in [t0, t1), ascending, of p[r * ldp + t] * v[t * HSp + d]. HSp is a multiple of 16. */
    void (*mix)(float *acc, const float *p, ptrdiff_t ldp, ptrdiff_t rows,
                const float *v, ptrdiff_t HSp, ptrdiff_t t0, ptrdiff_t t1);

    /* out[i] = acc[i] * factor for i < N; acc is readable up to a multiple of 16. */
    void (*store_scaled)(float *out, const float *acc, float factor, ptrdiff_t N);

    /* e[i] = exp(logits[i] - max) for the samplers: the same bits in every set, the baseline included. */
    void (*exps)(float *e, const float *logits, float max, ptrdiff_t V);

    /* words[64 j + l] = number j of Philox4x32-10 for the counter (counter, first + l) and the key k0, k1, for j < 4, l < 64. */
    void (*noise)(uint32_t words[256], uint32_t first, const uint32_t counter[3], uint32_t k0, uint32_t k1);

    /* The backward pass and AdamW; micro_training.h has the formulas. */
    void (*add_rows)(float *out, const float *inp, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t N, int add_to);
    void (*act_backward[ACTIVATIONS])(float *d, const float *x, ptrdiff_t N);
    void (*layernorm_backward)(float *dx, const float *dout, const float *x, const float *weight, const float *stats, ptrdiff_t C);
    void (*layernorm_gains)(float *dweight, float *dbias, const float *dout, const float *x, const float *stats, ptrdiff_t ld,
                            ptrdiff_t rows, ptrdiff_t N, int add_to);
    void (*softmax_backward)(float *d, const float *p, float dot, float scale, ptrdiff_t T, ptrdiff_t Tp);
    void (*adamw)(float *p, const float *g, float *m, float *v, ptrdiff_t count, const adamw_numbers *numbers);
    double (*square_sum)(const float *g, ptrdiff_t count);

    int panel;            /* columns of a panel of outer: use shares of a multiple of it */
    ptrdiff_t outer_room; /* values */

    /* Probes of the machine's limits. The first reads `count` floats in 1, 2, 4 or 8 streams. The second does probe_flop
     * operations, multiplications and additions, each time. */
    float (*probe_read)(const float *p, ptrdiff_t count, int streams);
    float (*probe_fma)(ptrdiff_t times);
    double probe_flop;
    void (*probe_stream)(float *p, const float *g, float *m, float *v, ptrdiff_t count); /* AdamW's reads and writes alone */
} microkernels;

/* Compute the dots of rows of inp with the N rows of a float32 array. */
static inline void gemm_floats(const weight_format *float32, float *out, ptrdiff_t ldo, const float *inp, ptrdiff_t ldi,
                               ptrdiff_t rows, const float *w, ptrdiff_t N, ptrdiff_t K) {
    const weight_matrix matrix = {w, N, K};
    float32->gemm(out, ldo, inp, ldi, rows, &matrix, 0, N, NULL);
}

/* Each returns NULL if the build or this processor lacks the instruction set. Two names of one width share all kernels except
 * the quantised ones. */
const microkernels *micro_baseline(void), *micro_avx2(void), *micro_avxvnni(void), *micro_avx512(void), *micro_avx512vnni(void),
    *micro_avx512amx(void), *micro_neon(void), *micro_neondot(void);

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxint8intrin.h>) /* gcc 11 or clang 12 */
#define HAS_AMX
#endif

/* The quantised formats of each instruction set (quantised_body.h): q8_0, then q4_0. */
extern const weight_format quantised_baseline[2], quantised_avx2[2], quantised_avxvnni[2], quantised_avx512vnni[2],
    quantised_avx512amx[2], quantised_neon[2], quantised_neondot[2];
#endif
