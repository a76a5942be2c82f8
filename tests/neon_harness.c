/* The kernels of one instruction set on fixed inputs. Each case prints its name and a hash of its output's bits.
 * test_neon.py compiles it for aarch64 and for this machine, and compares the lines. The argument names the set: neon, avx2, ...
 *
 * Only an integer generator and exact scaling make the inputs. Outputs are hashed with a margin on each side that must not
 * change. NaNs are hashed as one value, because IEEE 754 leaves their bits open, and processors differ in them. */
#include "micro.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MARGIN 16

static uint64_t state;

static uint32_t next_random(void) { /* splitmix64 */
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

/* From -1 to 1, times a power of two from 2^-spread to 2^spread: sums of such cancel, so that their order shows. */
static float number(int spread) {
    const float x = (float)((int32_t)next_random() >> 8) * 0x1p-23f;
    const int shift = spread ? (int)(next_random() % (2 * spread + 1)) - spread : 0;
    return ldexpf(x, shift);
}

static float *numbers(ptrdiff_t count, int spread) {
    float *p = malloc((count + 2 * MARGIN) * sizeof *p);
    if (!p) exit(1);
    for (ptrdiff_t i = 0; i < count + 2 * MARGIN; i++) p[i] = number(spread);
    return p + MARGIN;
}

static float *scratch(ptrdiff_t count) { /* its size differs by set, and must not move the generator on */
    const uint64_t before = state;
    float *p = numbers(count, 0);
    state = before;
    return p;
}

static void release(void *p) { free((float *)p - MARGIN); }

/* A matrix of N x K weights of a format. Single values are float32 or the upper bytes of float32, which are finite as float16, too.
 * Blocks have random values, the least among them, and finite float16 scales of both signs, subnormals among them. */
static void *weights(ptrdiff_t N, ptrdiff_t K, int spread, const weight_format *format) {
    const ptrdiff_t block = format->block_values, group = format->interleave;
    const ptrdiff_t blocks = (N + group - 1) / group * group * ((K + block - 1) / block);
    float *p = numbers(blocks * block, spread);
    for (ptrdiff_t i = 0; format->scale_bytes == 0 && i < blocks; i++)
        memmove((char *)p + i * format->value_bytes, (char *)(p + i + 1) - format->value_bytes, format->value_bytes);
    if (format->scale_bytes) {
        uint8_t *values = (uint8_t *)p;
        uint16_t *scales = (uint16_t *)(values + blocks * format->value_bytes);
        for (ptrdiff_t i = 0; i < blocks * format->value_bytes; i++) values[i] = next_random() % 9 ? next_random() : 0x80;
        for (ptrdiff_t i = 0; i < blocks; i++) scales[i] = next_random() & (next_random() % 9 ? 0xbbff : 0x83ff);
    }
    return p;
}

static void report(const char *name, const float *values, ptrdiff_t count) {
    uint64_t hash = 14695981039346656037u; /* FNV-1a over words */
    for (ptrdiff_t i = -MARGIN; i < count + MARGIN; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        if (isnan(values[i])) bits = 0x7fc00000;
        hash = (hash ^ bits) * 1099511628211u;
    }
    printf("%s %016llx\n", name, (unsigned long long)hash);
}

/* The way for few rows and the packed one, which must give the same bits. */
static void test_products(const weight_format *format, ptrdiff_t rows, ptrdiff_t N, ptrdiff_t K) {
    char name[80];
    const ptrdiff_t ldo = N + 3, ldi = K + 5, Kp = (K + 15) / 16 * 16, Np = (N + format->panel - 1) / format->panel * format->panel;
    float *inp = numbers(rows * ldi, 12), *out = numbers(rows * ldo, 0), *same = numbers(rows * ldo, 0);
    float *packed = scratch((rows + 15) / 16 * 16 * Kp), *room = scratch(Np * Kp), *free_room = scratch(rows * Kp);
    const weight_matrix w = {weights(N, K, 3, format), N, K};
    const ptrdiff_t half = N / 2 / format->interleave * format->interleave;
    memcpy(same - MARGIN, out - MARGIN, (rows * ldo + 2 * MARGIN) * sizeof *out);
    format->gemm(out, ldo, inp, ldi, rows, &w, 0, half, free_room); /* as two workers do */
    format->gemm(out + half, ldo, inp, ldi, rows, &w, half, N, free_room);
    snprintf(name, sizeof name, "gemm rows=%td N=%td K=%td %s", rows, N, K, format->name);
    report(name, out, rows * ldo);
    format->pack_rows(packed, inp, ldi, rows, K);
    if (format->pack_weights) format->pack_weights(room, &w, 0, N);
    for (ptrdiff_t r = 0; r < rows; r += 48) /* in parts */
        format->product(same + r * ldo, ldo, packed + r * Kp, rows - r < 48 ? rows - r : 48, &w, 0, N, room);
    snprintf(name, sizeof name, "product rows=%td N=%td K=%td %s", rows, N, K, format->name);
    report(name, same, rows * ldo);
    if (memcmp(same - MARGIN, out - MARGIN, (rows * ldo + 2 * MARGIN) * sizeof *out)) fprintf(stderr, "%s: not gemm's bits\n", name);
    release(inp), release(out), release(same), release(packed), release(room), release(free_room), release((void *)w.data);
}

/* Sums of outer products against the plain loop that defines them. */
static void test_outer(const microkernels *m, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, int across, int add_to) {
    char name[80];
    const ptrdiff_t ldo = N + 3, ldb = N + 5, a_row = across ? 1 : K + 2, a_step = across ? M + 1 : 1;
    float *a = numbers(M * (K + 2) + K * (M + 1), 8), *b = numbers(K * ldb, 8), *out = numbers(M * ldo, 4);
    float *plain = numbers(M * ldo, 0), *room = scratch(m->outer_room);
    memcpy(plain - MARGIN, out - MARGIN, (M * ldo + 2 * MARGIN) * sizeof *out);
    m->outer(out, ldo, a, a_row, a_step, b, ldb, M, N, K, add_to, room);
    for (ptrdiff_t i = 0; i < M; i++)
        for (ptrdiff_t n = 0; n < N; n++) {
            float sum = add_to ? plain[i * ldo + n] : 0.0f;
            for (ptrdiff_t k = 0; k < K; k++) sum = fmaf(a[i * a_row + k * a_step], b[k * ldb + n], sum);
            plain[i * ldo + n] = sum;
        }
    snprintf(name, sizeof name, "outer M=%td N=%td K=%td across=%d add_to=%d", M, N, K, across, add_to);
    report(name, out, M * ldo);
    if (memcmp(plain - MARGIN, out - MARGIN, (M * ldo + 2 * MARGIN) * sizeof *out)) fprintf(stderr, "%s: not the plain loop's bits\n", name);
    release(a), release(b), release(out), release(plain), release(room);
}

/* Row n of a matrix as float32. */
static void test_widen(const weight_format *format, ptrdiff_t K) {
    char name[80];
    float *out = numbers(K, 2);
    const weight_matrix w = {weights(5, K, 3, format), 5, K};
    for (ptrdiff_t row = 0; row < 5; row += 2) {
        format->widen(out, &w, row);
        snprintf(name, sizeof name, "widen K=%td row=%td %s", K, row, format->name);
        report(name, out, K);
    }
    release(out), release((void *)w.data);
}

/* A matrix of float32 in panels. Some blocks are zeros, one number is huge, others are subnormal. */
static void test_quantise(const weight_format *const *formats, const weight_format *format, ptrdiff_t N, ptrdiff_t K) {
    char name[80];
    const ptrdiff_t Np = (N + 15) / 16 * 16, Kp = (K + 31) / 32 * 32, bytes = Np * Kp / 32 * (format->value_bytes + 2);
    float *w = numbers(N * K, 6), *room = scratch(16 * (Kp + 16)), *out = numbers((bytes + 3) / 4, 0);
    const weight_matrix matrix = {w, N, K};
    for (ptrdiff_t i = 0; i < N * K / 3; i++) w[i] = i % 96 < 32 ? 0.0f : i % 96 < 64 ? ldexpf(w[i], -140) : w[i];
    w[N * K / 2] = 4e5f;
    const int held = format->quantise(out, formats[0], &matrix, 0, N, room);
    snprintf(name, sizeof name, "quantise N=%td K=%td held=%d %s", N, K, held, format->name);
    report(name, out, (bytes + 3) / 4);
    release(w), release(room), release(out);
}

static void test_row(const microkernels *m, ptrdiff_t C) {
    char name[80];
    float *inp = numbers(C, 4), *out = numbers(C, 2), *x = numbers(C, 2), *acc = numbers((C + 15) / 16 * 16, 6);
    float *weight = numbers(C, 1), *bias = numbers(C, 3);
#define REPORT(kernel, values)                                                            \
    do {                                                                                  \
        snprintf(name, sizeof name, kernel " C=%td", C);                                  \
        report(name, values, C);                                                          \
    } while (0)
    m->add_bias(out, bias, C);
    REPORT("add_bias", out);
    m->add_bias_residual(x, x, out, bias, C);
    REPORT("add_bias_residual", x);
    for (int act = 0; act < ACTIVATIONS; act++) {
        m->add_bias_act[act](x, out, bias, C);
        snprintf(name, sizeof name, "add_bias_act %d C=%td", act, C);
        report(name, x, C);
        strcat(name, " kept");
        report(name, out, C);
    }
    m->add_bias_act[GELU_NEW](out, out, bias, C);
    REPORT("add_bias_act in place", out);
    m->layernorm(out, inp, weight, bias, 1e-5f, C, x);
    REPORT("layernorm", out);
    report("layernorm stats", x, C > 1 ? 2 : 1);
    m->store_scaled(out, acc, 0.3f, C);
    REPORT("store_scaled", out);
#undef REPORT
    release(inp), release(out), release(x), release(acc), release(weight), release(bias);
}

static void test_attention(const microkernels *m, ptrdiff_t rows, ptrdiff_t HSp, ptrdiff_t T) {
    char name[80];
    const ptrdiff_t ldp = (T + 15) / 16 * 16;
    float *p = numbers(rows * ldp, 5), *v = numbers(T * HSp, 5), *acc = numbers(rows * HSp, 0), *sums = numbers(rows, 0);
    float *highest = numbers(rows, 0);
    for (ptrdiff_t r = 0; r < rows; r++) sums[r] = m->softmax(p + r * ldp, T, 0.125f, highest + r);
    snprintf(name, sizeof name, "softmax rows=%td T=%td", rows, T);
    report(name, p, rows * ldp);
    strcat(name, " sums");
    report(name, sums, rows);
    strcat(name, " highest");
    report(name, highest, rows);
    m->mix(acc, p, ldp, rows, v, HSp, T / 3, T);
    snprintf(name, sizeof name, "mix rows=%td HSp=%td T=%td", rows, HSp, T);
    report(name, acc, rows * HSp);
    release(p), release(v), release(acc), release(sums), release(highest);
}

/* exp over its whole range and beyond, in each of its two forms, and the GELU made of the first. */
static void test_exp(const microkernels *m) {
    char name[40];
    const ptrdiff_t count = 6007;
    static const float edges[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 88.0f, 88.1f, -87.0f, -87.1f, -103.9f, -104.1f, 3e38f,
                                  -3e38f, 1e-40f, -1e-40f, 1e-45f, 127.5f, -150.0f, 1e19f, -1e19f, 2e-20f, -0.34657359f};
    const ptrdiff_t special = sizeof edges / sizeof *edges;
    float *logits = numbers(count, 0), *out = numbers(count, 0), *zeros = numbers(count, 0), *scaled = numbers(count, 0);
    for (ptrdiff_t i = 0; i < count; i++) {
        logits[i] = i % 50 == 7 ? edges[i / 50 % special] : ldexpf(logits[i], i % 3 ? 7 : -3);
        zeros[i] = 0.0f;
    }
    for (ptrdiff_t i = 0; i < count; i++) out[i] = logits[i] > 3.7f ? -logits[i] : logits[i]; /* none above the greatest */
    m->exps(scaled, out, 3.7f, count);
    report("exps", scaled, count);
    memcpy(out, logits, count * sizeof *out);
    for (int act = 0; act < ACTIVATIONS; act++) {
        m->add_bias_act[act](scaled, out, zeros, count);
        snprintf(name, sizeof name, "activation %d edges", act);
        report(name, scaled, count);
        memcpy(scaled, logits, count * sizeof *scaled);
        m->act_backward[act](scaled, out, count);
        snprintf(name, sizeof name, "slope %d edges", act);
        report(name, scaled, count);
    }
    for (ptrdiff_t i = 0; i < count; i++) out[i] = logits[i] < 80.0f ? logits[i] : 80.0f; /* max(s) is 80: exp(-167 .. 0) */
    ptrdiff_t padded = count;
    padded -= padded % 16; /* the last block whole: softmax may write up to a multiple of 16 */
    zeros[0] = m->softmax(out, padded, 1.0f, NULL);
    report("softmax edges", out, padded);
    report("softmax edges sum", zeros, 1);
    release(logits), release(out), release(zeros), release(scaled);
}

/* The row-by-row kernels of the backward pass, and AdamW. */
static void test_training(const microkernels *m, ptrdiff_t N, ptrdiff_t rows, int add_to) {
    char name[80];
    const ptrdiff_t ld = N + 3, Tp = (N + 15) / 16 * 16;
    float *out = numbers(Tp, 2), *second = numbers(N, 2), *inp = numbers(rows * ld, 3), *x = numbers(rows * ld, 3);
    float *weight = numbers(N, 1), *stats = numbers(2 * rows, 1), *v = numbers(N, 2);
    const adamw_numbers adam = {1e-3f, 0.9f, 0.99f, 0.1f, 0.01f, 1.7f, 2.3f, 1e-8f, 0.1f, 0.7f};
    double squares;
#define REPORT(kernel, values, count)                                                                     \
    do {                                                                                                  \
        snprintf(name, sizeof name, kernel " N=%td rows=%td add_to=%d", N, rows, add_to);                 \
        report(name, values, count);                                                                      \
    } while (0)
    m->add_rows(out, inp, ld, rows, N, add_to);
    REPORT("add_rows", out, N);
    m->layernorm_gains(out, second, inp, x, stats, ld, rows, N, add_to);
    REPORT("layernorm_gains weight", out, N);
    REPORT("layernorm_gains bias", second, N);
    m->layernorm_backward(out, inp, x, weight, stats, N);
    REPORT("layernorm_backward", out, N);
    for (int act = 0; act < ACTIVATIONS; act++) {
        m->act_backward[act](out, x, N);
        snprintf(name, sizeof name, "act_backward %d N=%td rows=%td add_to=%d", act, N, rows, add_to);
        report(name, out, N);
    }
    m->softmax_backward(out, x, 0.3f, 0.125f, N, Tp);
    REPORT("softmax_backward", out, Tp);
    squares = m->square_sum(inp, N);
    memcpy(second, &squares, N > 1 ? sizeof squares : sizeof *second);
    REPORT("square_sum", second, N);
    for (ptrdiff_t i = 0; i < N; i++) v[i] = fabsf(v[i]);
    m->adamw(weight, inp, x, v, N, &adam);
    REPORT("adamw p", weight, N);
    REPORT("adamw m", x, N);
    REPORT("adamw v", v, N);
#undef REPORT
    release(out), release(second), release(inp), release(x), release(weight), release(stats), release(v);
}

static const microkernels *named(const char *name) {
    const microkernels *sets[] = {micro_baseline(), micro_avx2(), micro_avxvnni(), micro_avx512(), micro_avx512vnni(),
                                  micro_avx512amx(), micro_neon(), micro_neondot()};
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        if (sets[i] && !strcmp(sets[i]->isa, name)) return sets[i];
    return NULL;
}

int main(int argc, char **argv) {
    static const ptrdiff_t rows[] = {1, 2, 4, 5, 6, 8, 11, 20, 70}, outputs[] = {1, 7, 33, 48}, sizes[] = {1, 15, 16, 48, 87, 512};
    static const ptrdiff_t channels[] = {1, 15, 16, 17, 87, 768};
    const microkernels *m = argc == 2 ? named(argv[1]) : NULL;
    if (!m) {
        fprintf(stderr, "this processor lacks the instruction set\n");
        return 1;
    }
    fprintf(stderr, "%s\n", m->isa);
    for (const weight_format *const *each = m->formats; *each; each++) {
        const weight_format *format = *each;
        state = 0; /* the same inputs in every order */
        if (!m->fused && !format->quantise) continue; /* only these have the bits of the sets with FMA */
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            for (size_t n = 0; n < sizeof outputs / sizeof *outputs; n++)
                for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) test_products(format, rows[r], outputs[n], sizes[k]);
            test_products(format, rows[r], 101, 700);
        }
        for (size_t c = 0; c < sizeof channels / sizeof *channels; c++) test_widen(format, channels[c]);
        for (size_t c = 0; format->quantise && c < sizeof channels / sizeof *channels; c++)
            test_quantise(m->formats, format, 37, channels[c]);
    }
    if (!m->fused) return 0;
    for (size_t c = 0; c < sizeof channels / sizeof *channels; c++) test_row(m, channels[c]);
    for (int way = 0; way < 4; way++) {
        test_outer(m, 1, 1, 1, way & 1, way >> 1);
        test_outer(m, 8, 48, 16, way & 1, way >> 1);
        test_outer(m, 19, 61, 33, way & 1, way >> 1);
        test_outer(m, 17, 801, 300, way & 1, way >> 1); /* several blocks of columns and of steps */
    }
    for (size_t c = 0; c < sizeof channels / sizeof *channels; c++)
        for (int way = 0; way < 4; way++) test_training(m, channels[c], way & 1 ? 1 : 7, way >> 1);
    for (ptrdiff_t r = 1; r < 8; r++)
        for (ptrdiff_t HSp = 16; HSp <= 80; HSp += 16) test_attention(m, r, HSp, 1 + 13 * r + HSp);
    test_attention(m, 4, 64, 1000);
    test_exp(m);
    return 0;
}
