/* The microkernels of the backward pass and of AdamW, a part of micro_body.h. All values are float32. Names and formulas are those
 * of llm.c, train_gpt2.c. Sums over rows are in ascending order; sums within a row use 16 lanes. */

/* out[n] = (add_to ? out[n] : 0) + sum over r < rows, ascending, of inp[r * ld + n]. */
static void add_rows(float *out, const float *inp, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t N, int add_to) {
    FOR_LANES(N, {
        lanes sum = add_to ? GET(out, 0.0f) : splat(0.0f);
        for (ptrdiff_t r = 0; r < rows; r++) sum = add(sum, GET(inp + r * ld, 0.0f));
        PUT(out, sum);
    });
}

/* The derivative of an activation at x; `kind` is a constant. With s = 1 / (1 + exp(-2u)), gelu_new's is s + x s (1 - s) 2u', and
 * u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2). silu and quick_gelu have a constant 2u'. Beyond the limit, the derivative is exactly
 * 0 or 1 in float32, so x is clamped. gelu's is the normal distribution up to x, plus x times its density. */
INLINE lanes slope16(lanes given, const int kind) {
    const float A = kind == GELU_NEW ? -1.59576912f : kind == SILU ? -1.0f : -1.702f, B = -0.0713548163f; /* as in gelu16 */
    const float limit = kind == GELU_NEW || kind == GELU ? 16.0f : 100.0f;
    const lanes one = splat(1.0f);
    lanes x;
    if (kind == RELU) return positive16(given, one, mul(splat(0.0f), given)); /* keeps NaN */
    UNROLL for (int h = 0; h < NV; h++) {
        vec v = given.v[h];
        v = choose(v > broadcast(limit), broadcast(limit), v);
        x.v[h] = choose(v < broadcast(-limit), broadcast(-limit), v);
    }
    if (kind == GELU) {
        lanes density, tail = normal_tail16(x, &density);
        return fma16(mul(x, splat(0.398942280f)), density, positive16(x, sub(one, tail), tail));
    }
    lanes square = mul(x, x);
    lanes exponent = kind == GELU_NEW ? mul(x, fma16(square, splat(B), splat(A))) : mul(x, splat(A));
    lanes s = divide(one, add(one, exp16(exponent)));
    lanes slope = kind == GELU_NEW ? fma16(square, splat(-3.0f * B), splat(-A)) : splat(-A); /* 2u' */
    return add(s, mul(mul(mul(x, s), sub(one, s)), slope));
}

/* d[n] *= the derivative of the activation at x[n]. */
#define FUNCTION(kind)                                                          \
    static void backward_##kind(float *d, const float *x, ptrdiff_t N) {        \
        FOR_LANES(N, PUT(d, mul(GET(d, 0.0f), slope16(GET(x, 0.0f), kind))));   \
    }
EACH_ACTIVATION(FUNCTION)
#undef FUNCTION

/* One row: dx += (dn - mean(dn) - norm * mean(dn * norm)) * rstd, with norm = (x - mean) * rstd and dn = dout * weight. */
static void layernorm_backward(float *dx, const float *dout, const float *x, const float *weight, const float *stats, ptrdiff_t C) {
    const lanes mean = splat(stats[0]), rstd = splat(stats[1]);
    lanes sum = splat(0.0f), product_sum = splat(0.0f);
#define NORM mul(sub(GET(x, stats[0]), mean), rstd)
#define DNORM mul(GET(dout, 0.0f), GET(weight, 0.0f))
    FOR_LANES(C, {
        lanes dnorm = DNORM;
        sum = add(sum, dnorm);
        product_sum = fma16(dnorm, NORM, product_sum);
    });
    const lanes a = splat(fold(sum) / (float)C), b = splat(fold(product_sum) / (float)C);
    FOR_LANES(C, PUT(dx, fma16(sub(sub(DNORM, a), mul(NORM, b)), rstd, GET(dx, 0.0f))));
#undef DNORM
#undef NORM
}

/* dweight[n] (+)= sum over rows of dout * norm, and dbias[n] (+)= sum of dout, for N channels. stats (rows, 2) are mean and
 * rstd. */
static void layernorm_gains(float *dweight, float *dbias, const float *dout, const float *x, const float *stats,
                            ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t N, int add_to) {
    FOR_LANES(N, {
        lanes weight = add_to ? GET(dweight, 0.0f) : splat(0.0f);
        lanes bias = add_to ? GET(dbias, 0.0f) : splat(0.0f);
        for (ptrdiff_t r = 0; r < rows; r++) {
            lanes d = GET(dout + r * ld, 0.0f);
            lanes norm = mul(sub(GET(x + r * ld, 0.0f), splat(stats[2 * r])), splat(stats[2 * r + 1]));
            weight = fma16(d, norm, weight);
            bias = add(bias, d);
        }
        PUT(dweight, weight);
        PUT(dbias, bias);
    });
}

/* One row of attention: d[t] = p[t] * (d[t] - dot) * scale for t < T, 0 up to Tp. */
static void softmax_backward(float *d, const float *p, float dot, float scale, ptrdiff_t T, ptrdiff_t Tp) {
    FOR_LANES(T, PUT(d, mul(mul(GET(p, 0.0f), sub(GET(d, 0.0f), splat(dot))), splat(scale))));
    for (ptrdiff_t t = T; t < Tp; t++) d[t] = 0.0f;
}

/* Passes over arrays prefetch lines this many values ahead, because the processor's own prefetcher requests fewer lines. */
#define AHEAD 512

INLINE void read_all_ahead(const float *p, const float *g, const float *m, const float *v) {
    __builtin_prefetch(p + AHEAD, 0, 2);
    __builtin_prefetch(g + AHEAD, 0, 2);
    __builtin_prefetch(m + AHEAD, 0, 2);
    __builtin_prefetch(v + AHEAD, 0, 2);
}

/* AdamW on count values: m and v are running means of g and g^2, corrected for their start at zero. The weight decay is
 * decoupled from the gradient. Source: Loshchilov and Hutter 2019. */
static void adamw(float *p, const float *g, float *m, float *v, ptrdiff_t count, const adamw_numbers *c) {
    FOR_LANES(count, {
        read_all_ahead(p + i, g + i, m + i, v + i);
        lanes grad = mul(GET(g, 0.0f), splat(c->gradient_scale)), old = GET(p, 0.0f), root;
        lanes first = fma16(splat(c->beta1), GET(m, 0.0f), mul(splat(c->rest1), grad));
        lanes second = fma16(splat(c->beta2), GET(v, 0.0f), mul(mul(splat(c->rest2), grad), grad));
        lanes corrected = mul(second, splat(c->over_correction2));
        UNROLL for (int h = 0; h < NV; h++) root.v[h] = SQRT(corrected.v[h]);
        lanes change = divide(mul(first, splat(c->over_correction1)), add(root, splat(c->eps)));
        change = fma16(splat(c->decay), old, change);
        PUT(m, first);
        PUT(v, second);
        PUT(p, fma16(splat(-c->lr), change, old));
    });
}

/* Return the sum of squares. In float64, products of float32 values are exact. 16 lanes are folded as in dot. */
static double square_sum(const float *g, ptrdiff_t count) {
    double lane[LANES] = {0};
    double_vec sum[2 * NV] = {{0}};
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        __builtin_prefetch(g + i + AHEAD);
        UNROLL for (int h = 0; h < 2 * NV; h++) {
            const double_vec x = __builtin_convertvector(*(const half_vec_unaligned *)(g + i + h * (W / 2)), double_vec);
            sum[h] += x * x;
        }
    }
    memcpy(lane, sum, sizeof lane);
    for (ptrdiff_t j = 0; i + j < count; j++) lane[j] += (double)g[i + j] * (double)g[i + j];
    for (int apart = LANES / 2; apart; apart /= 2)
        for (int j = 0; j < apart; j++) lane[j] += lane[j + apart];
    return lane[0];
}

/* Measure AdamW's upper limit: read four arrays, write three, and compute almost nothing. */
static void probe_stream(float *p, const float *g, float *m, float *v, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i + LANES <= count; i += LANES) {
        read_all_ahead(p + i, g + i, m + i, v + i);
        const lanes grad = load(g + i);
        store(p + i, add(load(p + i), grad));
        store(m + i, add(load(m + i), grad));
        store(v + i, add(load(v + i), grad));
    }
}
