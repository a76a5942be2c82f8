/* The samplers' arithmetic. Every sum has one fixed order, and libm is not used. So all machines and builds choose the same id.
 *
 * The median's sums are float32, sequential in ascending id, as in the serial program. With thousands of nearly equal tiny
 * probabilities, another order or float64 sums would sometimes choose another id. Random sampling and log-probabilities use the
 * same exponentials, and sum them in float64. */
#ifndef PYGPT_SAMPLER_H
#define PYGPT_SAMPLER_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef void exps_function(float *e, const float *logits, float max, ptrdiff_t V); /* micro.h */

/* Return the highest logit, or NaN if any logit is NaN. Sixteen lanes search: a maximum is exact in any order. */
static inline float highest(const float *logits, ptrdiff_t V) {
    float max[16], nan = 0.0f;
    for (int l = 0; l < 16; l++) max[l] = -INFINITY;
    ptrdiff_t i = 0;
    for (; i + 16 <= V; i += 16)
        for (int l = 0; l < 16; l++) {
            max[l] = logits[i + l] > max[l] ? logits[i + l] : max[l];
            nan = logits[i + l] == logits[i + l] ? nan : NAN;
        }
    for (; i < V; i++) {
        max[0] = logits[i] > max[0] ? logits[i] : max[0];
        nan = logits[i] == logits[i] ? nan : NAN;
    }
    for (int l = 1; l < 16; l++) max[0] = max[l] > max[0] ? max[l] : max[0];
    return max[0] + nan;
}

/* Return the first id of the highest logit; -1 if any logit is NaN or the highest is not finite. */
static inline ptrdiff_t greedy_id(const float *logits, ptrdiff_t V) {
    const float max = highest(logits, V);
    if (!isfinite(max)) return -1;
    ptrdiff_t i = 0;
    while (logits[i] != max) i++;
    return i;
}

/* Return the first id at which the running sum of softmax(logits) exceeds `coin`. If rounding keeps the sum below `coin`,
 * return V - 1. If the logits are not finite, return -1. `e` has room for V values. `exps` fills it with exp(logit - max),
 * correctly rounded in all but about one case in a million (micro.h). */
static inline ptrdiff_t inverse_cdf_id(const float *logits, float *e, ptrdiff_t V, float coin, exps_function *exps) {
    const float max = highest(logits, V);
    if (!isfinite(max)) return -1;
    float sum = 0.0f, running = 0.0f;
    exps(e, logits, max, V);
    for (ptrdiff_t i = 0; i < V; i++) sum += e[i];
    for (ptrdiff_t i = 0; i < V; i++) {
        running += e[i] / sum;
        if (running > coin) return i;
    }
    return V - 1;
}

/* ---------------------------------------------------------------------------------------- ranking ids */

typedef struct {
    uint32_t key, id; /* the lower the key, the higher the value */
} ranked;

/* Sort all ids by falling value. Of equal values the lower id comes first if `low`, else the higher one. Values must not be
 * NaN. The time of this radix sort by bytes does not depend on the values. */
static inline void rank_ids(ranked *order, ranked *spare, const float *x, ptrdiff_t V, int low) {
    for (ptrdiff_t i = 0; i < V; i++) {
        const uint32_t id = (uint32_t)(low ? i : V - 1 - i);
        const float value = x[id] + 0.0f; /* -0 equals 0 */
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        order[i] = (ranked){bits >> 31 ? bits : bits ^ 0x7FFFFFFF, id};
    }
    for (int shift = 0; shift < 32; shift += 8) {
        ptrdiff_t next[257] = {0};
        for (ptrdiff_t i = 0; i < V; i++) next[(order[i].key >> shift & 255) + 1]++;
        for (int byte = 0; byte < 256; byte++) next[byte + 1] += next[byte];
        for (ptrdiff_t i = 0; i < V; i++) spare[next[order[i].key >> shift & 255]++] = order[i];
        ranked *const sorted = spare;
        spare = order;
        order = sorted;
    } /* after four swaps, the caller's `order` has the result */
}

/* ---------------------------------------------------------------------------------------- random sampling */

typedef struct {
    double temperature, top_p, min_p; /* 1, 1, 0 change nothing */
    ptrdiff_t top_k;                  /* 0: all */
} sample_options;

static inline double sum_of(const float *e, ptrdiff_t V) {
    double sum = 0.0;
    for (ptrdiff_t i = 0; i < V; i++) sum += e[i];
    return sum;
}

/* Keep the k highest logits, and all logits that equal the k-th. Set the other weights to 0. Return the number of kept logits. */
static inline ptrdiff_t keep_top_k(float *e, const ranked *order, ptrdiff_t V, ptrdiff_t k) {
    ptrdiff_t n = k < V ? k : V;
    while (n < V && order[n].key == order[n - 1].key) n++;
    for (ptrdiff_t i = n; i < V; i++) e[order[i].id] = 0.0f;
    return n;
}

/* Of the n most probable ids, keep the first ones that together have the share top_p of the weight, at least one. An id stays
 * if the ids before it together have less. */
static inline void keep_top_p(float *e, const ranked *order, ptrdiff_t n, ptrdiff_t V, double top_p) {
    const double share = top_p * sum_of(e, V);
    double before = 0.0;
    ptrdiff_t i = 0;
    do before += e[order[i].id];
    while (++i < n && before < share);
    for (; i < n; i++) e[order[i].id] = 0.0f;
}

/* Compute the weights (V,) for sampling: exp of the logits divided by the temperature, 1 for the highest. Then top_k, top_p and
 * min_p, in this order, set the weights of the ids that they exclude to 0. Of equal logits top_p takes the higher id first; in
 * Hugging Face the sort decides. Returns 0 if the logits are not finite, else 1. `order` and `spare` have room for V ids.
 * Sources: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p). */
static inline int sample_weights_of(float *e, const float *x, ptrdiff_t V, const sample_options *o, ranked *order, ranked *spare,
                                    exps_function *exps) {
    const double max = highest(x, V);
    if (!isfinite(max)) return 0;
    for (ptrdiff_t i = 0; i < V; i++) e[i] = (float)((x[i] - max) / o->temperature);
    exps(e, e, 0.0f, V);
    if (o->top_k > 0 || o->top_p < 1.0) {
        rank_ids(order, spare, x, V, 0);
        const ptrdiff_t n = o->top_k > 0 ? keep_top_k(e, order, V, o->top_k) : V;
        if (o->top_p < 1.0) keep_top_p(e, order, n, V, o->top_p);
    }
    for (ptrdiff_t i = 0; i < V; i++) e[i] = e[i] < o->min_p ? 0.0f : e[i];
    return 1;
}

/* Return the first id, in ascending order, at which the running sum of the weights exceeds `coin` (0 <= coin < 1) of their sum. */
static inline ptrdiff_t weighted_id(const float *e, ptrdiff_t V, double coin) {
    const double target = coin * sum_of(e, V);
    double running = 0.0;
    ptrdiff_t last = -1;
    for (ptrdiff_t i = 0; i < V; i++)
        if (e[i] > 0.0f) {
            running += e[i];
            last = i;
            if (running > target) break;
        }
    return last;
}

/* Philox4x32-10 is a bijection that mixes a 128-bit counter with a 64-bit key. It computes any number of any stream directly.
 * Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". */
static inline void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53 * c[0], b = (uint64_t)0xCD9E8D57 * c[2];
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)a;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

/* Return number `step` of stream `stream` of a seed: one of the multiples of 2^-53 in [0, 1), all equally likely. */
static inline double uniform_of(uint64_t seed, uint64_t stream, uint64_t step) {
    uint32_t c[4] = {(uint32_t)step, (uint32_t)(step >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)};
    philox(c, (uint32_t)seed, (uint32_t)(seed >> 32));
    return (((uint64_t)c[0] << 32 | c[1]) >> 11) * 0x1p-53;
}

/* ---------------------------------------------------------------------------------------- log-probabilities, losses */

/* Return ln(x) of a normal float64 x > 0, accurate to a few units in the last place. NaN stays NaN. libm is not used. x = m 2^k
 * with sqrt(1/2) <= m < sqrt(2), and ln m = 2 artanh((m - 1) / (m + 1)) by its series to the 21st power. */
static inline double natural_log(double x) {
    const double LN2 = 0.6931471805599453;
    int k = 0;
    double m = frexp(x, &k); /* exact */
    if (m < 0.7071067811865476) m *= 2, k--;
    const double s = (m - 1) / (m + 1), t = s * s;
    double p = 1.0 / 21;
    for (int n = 19; n > 0; n -= 2) p = p * t + 1.0 / n;
    return k * LN2 + 2 * s * p;
}

/* Return ln of the sum of exp(logit - max), or NaN if the logits are not finite. `e` has room for V values. */
static inline double log_sum(const float *logits, float max, float *e, ptrdiff_t V, exps_function *exps) {
    if (!isfinite(max)) return NAN;
    exps(e, logits, max, V);
    return natural_log(sum_of(e, V));
}
#endif
