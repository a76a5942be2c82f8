/* The samplers' arithmetic: every sum has one fixed order and libm is not used, so all machines and builds choose the same id.
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
typedef void noise_function(uint32_t words[256], uint32_t first, const uint32_t counter[3], uint32_t k0, uint32_t k1);

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

/* Return the first id at which the running sum of softmax(logits) exceeds `coin`. If rounding leaves no such id, return V - 1;
 * if the logits are not finite, -1. `e` has room for V values. `exps` fills it with exp(logit - max), correctly rounded in all
 * but about one case in a million (micro.h). */
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

/* Return the entry of an id. Values must not be NaN. */
static inline ranked rank_of(const float *x, ptrdiff_t id) {
    const float value = x[id] + 0.0f; /* -0 equals 0 */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (ranked){bits >> 31 ? bits : bits ^ 0x7FFFFFFF, (uint32_t)id};
}

/* Sort n ids by falling value; equal values keep their order. A radix sort by bytes, whose time does not depend on the values. */
static inline void sort_ranked(ranked *order, ranked *spare, ptrdiff_t n) {
    for (int shift = 0; shift < 32; shift += 8) {
        ptrdiff_t next[257] = {0};
        for (ptrdiff_t i = 0; i < n; i++) next[(order[i].key >> shift & 255) + 1]++;
        for (int byte = 0; byte < 256; byte++) next[byte + 1] += next[byte];
        for (ptrdiff_t i = 0; i < n; i++) spare[next[order[i].key >> shift & 255]++] = order[i];
        ranked *const sorted = spare;
        spare = order;
        order = sorted;
    } /* after four swaps, the caller's `order` has the result */
}

/* Sort all ids by falling value; of equal values the lower id comes first. Values must not be NaN. */
static inline void rank_ids(ranked *order, ranked *spare, const float *x, ptrdiff_t V) {
    for (ptrdiff_t i = 0; i < V; i++) order[i] = rank_of(x, i);
    sort_ranked(order, spare, V);
}

/* Sort the ids of weights of at least `least` by falling value x; of equal values the higher id comes first. Return their number. */
static inline ptrdiff_t rank_likely(ranked *order, ranked *spare, const float *x, const float *e, ptrdiff_t V, float least) {
    ptrdiff_t n = 0;
    for (ptrdiff_t i = V - 1; i >= 0; i--)
        if (e[i] >= least) order[n++] = rank_of(x, i);
    sort_ranked(order, spare, n);
    return n;
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

/* Return how many of the n most probable ids top_k keeps: the k first, and all that equal the k-th. */
static inline ptrdiff_t top_k_of(const ranked *order, ptrdiff_t n, ptrdiff_t k) {
    ptrdiff_t kept = k < n ? k : n;
    while (kept < n && order[kept].key == order[kept - 1].key) kept++;
    return kept;
}

/* Return how many of the n most probable ids top_p keeps: the first ones that together reach `share` of the weight, at least one.
 * An id stays if the ids before it have less. */
static inline ptrdiff_t top_p_of(const float *e, const ranked *order, ptrdiff_t n, double share) {
    double before = 0.0;
    ptrdiff_t i = 0;
    do before += e[order[i].id];
    while (++i < n && before < share);
    return i;
}

/* Set the weights of all ids to 0 but for the first `kept` in order. `spare` has room for them. */
static inline void keep_only(float *e, const ranked *order, ranked *spare, ptrdiff_t kept, ptrdiff_t V) {
    for (ptrdiff_t i = 0; i < kept; i++) memcpy(&spare[i].key, &e[order[i].id], sizeof *e);
    memset(e, 0, V * sizeof *e);
    for (ptrdiff_t i = 0; i < kept; i++) memcpy(&e[order[i].id], &spare[i].key, sizeof *e);
}

/* Apply top_k, then top_p. Only likely ids are sorted if they decide, else all ids. */
static inline void keep_top(float *e, const float *x, ptrdiff_t V, const sample_options *o, ranked *order, ranked *spare) {
    const double share = o->top_p < 1.0 ? o->top_p * sum_of(e, V) : 0.0;
    ptrdiff_t n = 0;
    double likely = 0.0;
    for (float least = 0x1p-8f; n == 0 || (n < V && (o->top_k > 0 ? n < o->top_k : likely < share * 1.001)); least *= 0x1p-5f) {
        n = rank_likely(order, spare, x, e, V, least < 0x1p-24f ? 0.0f : least);
        likely = 0.0;
        for (ptrdiff_t i = 0; i < n; i++) likely += e[order[i].id];
    }
    if (o->top_k > 0) keep_only(e, order, spare, n = top_k_of(order, n, o->top_k), V);
    if (o->top_p < 1.0) keep_only(e, order, spare, top_p_of(e, order, n, o->top_k > 0 ? o->top_p * sum_of(e, V) : share), V);
}

static inline void weigh(float *e, const float *x, ptrdiff_t V, double max, double temperature, exps_function *exps) {
    for (ptrdiff_t i = 0; i < V; i++) e[i] = (float)((x[i] - max) / temperature);
    exps(e, e, 0.0f, V); /* the highest logit has the weight 1 */
}

/* Compute the weights (V,) for sampling: exp of the logits divided by the temperature, 1 for the highest. Then top_k, top_p and
 * min_p, in this order, set the weights of the ids that they exclude to 0. Of equal logits top_p takes the higher id first; in
 * Hugging Face the sort decides. Returns 0 if the logits are not finite, else 1. `order` and `spare` have room for V ids.
 * Sources: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p). */
static inline int sample_weights_of(float *e, const float *x, ptrdiff_t V, const sample_options *o, ranked *order, ranked *spare,
                                    exps_function *exps) {
    const double max = highest(x, V);
    if (!isfinite(max)) return 0;
    weigh(e, x, V, max, o->temperature, exps);
    if (o->top_k > 0 || o->top_p < 1.0) keep_top(e, x, V, o, order, spare);
    for (ptrdiff_t i = 0; i < V; i++) e[i] = e[i] < o->min_p ? 0.0f : e[i];
    return 1;
}

/* Return ln(x) of a normal float64 x > 0, accurate to a few units in the last place; a NaN stays a NaN. It does not use libm.
 * x = m 2^k with sqrt(1/2) <= m < sqrt(2), and ln m = 2 artanh((m - 1) / (m + 1)) by its series to the 21st power. */
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

/* The random numbers of one choice: 64 bits for each id, which depend only on seed, stream, step and id. */
typedef struct {
    uint64_t seed, step; /* step < 2^60 */
    uint32_t stream;
} noise_source;

/* Fill words with half of the bits of ids [256 block, 256 block + 256): the upper 32 bits of each, or the lower ones. */
static inline void noise_words(uint32_t words[256], const noise_source *from, ptrdiff_t block, int lower, noise_function *noise) {
    const uint32_t counter[3] = {(uint32_t)from->step, (uint32_t)(from->step >> 32) | (uint32_t)lower << 31, from->stream};
    noise(words, (uint32_t)(64 * block), counter, (uint32_t)from->seed, (uint32_t)(from->seed >> 32));
}

/* Return an id's number, uniform in (0, 1], from its two words. */
static inline double uniform_of(uint32_t upper, uint32_t lower) {
    return ((double)((uint64_t)upper << 32 | lower) + 0.5) * 0x1p-64;
}

/* Return -ln(1 - v), which is exponentially distributed if v is uniform. */
static inline double exponential_of(double v) { return v < 0x1p-26 ? v * (1 + v / 2) : -natural_log(1 - v); }

typedef struct {
    const float *x; /* logits (V,), and the highest one */
    double max, temperature, min_p; /* the temperature is 0.001 to 1000 */
    exps_function *exps;
} unweighed;

/* Compute upper bounds, at most 1% too high, of the weights of ids [start, start + n): 2^t with a cubic for t's fraction. The
 * least bound is 2^-125, because 2^t must stay a normal number. */
static inline void bound_weights(float *w, const unweighed *logits, ptrdiff_t start, ptrdiff_t n) {
    const float *const x = logits->x + start, max = (float)logits->max;
    const float scale = (float)(1.4426950408889634 / logits->temperature);
    for (ptrdiff_t i = 0; i < n; i++) w[i] = (x[i] - max) * scale;
    for (ptrdiff_t i = 0; i < n; i++) w[i] = w[i] > -125.0f ? w[i] : -125.0f; /* in a loop of its own, or gcc makes branches */
    for (ptrdiff_t i = 0; i < n; i++) {
        const int32_t whole = (int32_t)w[i]; /* rounds up, so the fraction is above -1 */
        const float f = w[i] - (float)whole;
        const float part = 1.004f * (0.99986f + f * (0.69069f + f * (0.22967f + f * 0.038912f)));
        uint32_t bits;
        memcpy(&bits, &part, sizeof bits);
        bits += (uint32_t)whole << 23;
        memcpy(&w[i], &bits, sizeof bits);
    }
}

/* Choose an id with a probability that is proportional to its weight: the id with the least E / weight, where E is the id's
 * exponentially distributed number. This is the Gumbel-max rule: the same as the highest ln(weight) + Gumbel noise. Weights that
 * differ slightly nearly always give the same id for the same noise, so a draft can follow the choice. Returns -1 if no weight
 * is above 0. Ids that cannot win are skipped by the upper bits of v alone, because E >= v.
 *
 * e: the weights; or NULL, and then finite logits give them, but only in blocks where any id can win.
 * Sources: Gumbel 1954; Maddison et al. 2014 (A* sampling). */
static inline ptrdiff_t race_id(const float *e, const unweighed *logits, ptrdiff_t V, const noise_source *from,
                                noise_function *noise) {
    uint32_t upper[256], lower[256];
    float own[256];
    const double least = e ? 0.0 : logits->min_p;
    double best = INFINITY;
    ptrdiff_t found = -1;
    for (ptrdiff_t start = 0; start < V; start += 256) {
        const ptrdiff_t n = V - start < 256 ? V - start : 256;
        const float limit = (float)(best * 0x1.00001p24); /* a little more than best: the product below is rounded */
        const float *const w = e ? e + start : own;
        int any = 0;
        if (!e) bound_weights(own, logits, start, n);
        noise_words(upper, from, start / 256, 0, noise);
        for (ptrdiff_t i = 0; i < n; i++) any |= (float)(int32_t)(upper[i] >> 8) <= limit * w[i];
        if (!any) continue;
        if (!e) weigh(own, logits->x + start, n, logits->max, logits->temperature, logits->exps);
        noise_words(lower, from, start / 256, 1, noise);
        for (ptrdiff_t i = 0; i < n; i++)
            if (w[i] > 0.0f && w[i] >= least && (float)(int32_t)(upper[i] >> 8) <= limit * w[i]) {
                const double time = exponential_of(uniform_of(upper[i], lower[i])) / w[i];
                if (time < best) best = time, found = start + i;
            }
    }
    return found;
}

/* ---------------------------------------------------------------------------------------- log-probabilities, losses */

/* Return ln of the sum of exp(logit - max); NaN if the logits are not finite. `e` has room for V values. */
static inline double log_sum(const float *logits, float max, float *e, ptrdiff_t V, exps_function *exps) {
    if (!isfinite(max)) return NAN;
    exps(e, logits, max, V);
    return natural_log(sum_of(e, V));
}
#endif
