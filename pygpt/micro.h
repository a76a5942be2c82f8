/* The microkernels: the innermost loops, compiled once for each instruction set from one source (micro_body.h).
 *
 * One arithmetic. Every function below computes each output by one fixed sequence of IEEE-754 operations, the same for
 * every instruction set that has fused multiply-add (the baseline rounds products and sums apart):
 *   dot   16 lanes; lane l adds a[16i+l] * b[16i+l] by FMA in ascending i; a ragged tail counts as zeros; then the lanes
 *         are folded 8+8, 4+4, 2+2, 1+1
 *   sum   the same with additions; max is exact in any order
 *   exp   one polynomial in FMA form; no libm
 * So a register tile may hold any number of rows and outputs, and one row or a thousand give the same bits.
 *
 * Weights are float32, or bfloat16 (bf16 != 0) widened in registers. Rows are contiguous along K; every leading dimension
 * counts values. Nothing is allocated, nothing outside the given arrays is read (prefetches aside). */
#ifndef PYGPT_MICRO_H
#define PYGPT_MICRO_H
#include <stddef.h>

typedef struct {
    const char *isa; /* "baseline", "avx2", ... */
    int fused;       /* whether multiply-add rounds once */

    /* out[r * ldo + n] = dot(inp + r * ldi, w + n * ldw, K) for r < rows, n < N. Several rows share register tiles of
     * weights; for one row the weights stream from memory once, in a few far-apart streams. `next` is what the caller will
     * need afterwards: its bytes are prefetched meanwhile. */
    void (*gemm)(float *out, ptrdiff_t ldo, const float *inp, ptrdiff_t ldi, ptrdiff_t rows, const void *w, ptrdiff_t ldw,
                 ptrdiff_t N, ptrdiff_t K, int bf16, const void *next, ptrdiff_t next_bytes);

    /* out[i] = w[i] for i < count bfloat16 values: worth it where many rows meet the same weights. */
    void (*widen)(float *out, const void *w, ptrdiff_t count);

    /* out[i] = wte[i] + wpe[i] for i < C. */
    void (*encode)(float *out, const void *wte, const void *wpe, ptrdiff_t C, int bf16);

    /* out = (inp - mean) / sqrt(variance + 1e-5) * weight + bias over one row of C. */
    void (*layernorm)(float *out, const float *inp, const void *weight, const void *bias, ptrdiff_t C, int bf16);

    /* Epilogues of a matrix product, in place on N values of one row. */
    void (*add_bias)(float *out, const void *bias, ptrdiff_t N, int bf16);                           /* out += bias */
    void (*add_bias_gelu)(float *out, const void *bias, ptrdiff_t N, int bf16);                      /* gelu(out + bias) */
    void (*add_bias_residual)(float *x, const float *out, const void *bias, ptrdiff_t N, int bf16);  /* x += out + bias */

    /* s[t] = exp(scale * s[t] - max) for t < T, 0 for the padding up to a multiple of 16; returns the sum in 16 lanes. */
    float (*softmax)(float *s, ptrdiff_t T, float scale);

    /* acc[r * HSp + d] += sum over t in [t0, t1), ascending, of p[r * ldp + t] * v[t * HSp + d]; HSp a multiple of 16. */
    void (*mix)(float *acc, const float *p, ptrdiff_t ldp, ptrdiff_t rows,
                const float *v, ptrdiff_t HSp, ptrdiff_t t0, ptrdiff_t t1);

    /* out[i] = acc[i] * factor for i < N; acc is readable up to a multiple of 16. */
    void (*store_scaled)(float *out, const float *acc, float factor, ptrdiff_t N);

    /* e[i] = exp(logits[i] - max) for the samplers: the same bits in every set, the baseline included. */
    void (*exps)(float *e, const float *logits, float max, ptrdiff_t V);

    int narrow;  /* up to so many rows, gemm streams the weights: better all of them in one call than in blocks */
    int outputs; /* gemm's tiles are so many outputs wide: shares and blocks of a multiple have no ragged edge */

    /* The machine's limits: read `count` floats in 1, 2, 4 or 8 streams; multiply and add, probe_flop operations each time. */
    float (*probe_read)(const float *p, ptrdiff_t count, int streams);
    float (*probe_fma)(ptrdiff_t times);
    double probe_flop;
} microkernels;

/* Each returns NULL where the build or this processor lacks the instruction set. */
const microkernels *micro_baseline(void);
const microkernels *micro_avx2(void);
const microkernels *micro_avx512(void);
const microkernels *micro_neon(void);
#endif
