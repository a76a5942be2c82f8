/* The samplers' arithmetic: float32, one after another in ascending id, as the serial program does it. The order matters:
 * with thousands of nearly equal tiny probabilities another order, or float64 sums, picks another id now and then. */
#ifndef PYGPT_SAMPLER_H
#define PYGPT_SAMPLER_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* exp of a float32 x <= 0, rounded once from a float64 result with relative error below 1e-13: the correctly rounded value
 * in all but about one case in a million, on every machine (no libm, no fused operation). 0 below -104, NaN for NaN. */
static inline float exp_rounded(float x) {
    const double LOG2E = 1.4426950408889634, LN2_HI = 0x1.62e42fefap-1, LN2_LO = 0x1.cf79abc9e3b39p-40;
    const double ROUND = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to an integer, left in the low bits */
    double a = x < -104.0f ? -104.0 : (double)x;
    double shifted = a * LOG2E + ROUND, n = shifted - ROUND;
    double r = (a - n * LN2_HI) - n * LN2_LO;
    double p = 1.0 / 39916800; /* Taylor's series to r^11: the next term is below 7e-15 for |r| <= 0.35 */
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 1.0 / 2;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits, exponent;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 52; /* times 2^n */
    memcpy(&p, &bits, sizeof p);
    return x < -104.0f ? 0.0f : (float)p;
}

/* The first id of the highest logit; -1 when a logit is NaN or the highest is not finite. */
static inline ptrdiff_t greedy_id(const float *logits, ptrdiff_t V) {
    float max = -INFINITY;
    ptrdiff_t best = -1;
    for (ptrdiff_t i = 0; i < V; i++) {
        if (isnan(logits[i])) return -1;
        if (logits[i] > max) max = logits[i], best = i;
    }
    return isfinite(max) ? best : -1;
}

/* The first id whose running sum of softmax(logits) exceeds `coin`, V - 1 if rounding leaves none; -1 when the logits are
 * not finite. `e` is room for V values. */
static inline ptrdiff_t inverse_cdf_id(const float *logits, float *e, ptrdiff_t V, float coin) {
    ptrdiff_t best = greedy_id(logits, V);
    if (best < 0) return -1;
    const float max = logits[best];
    float sum = 0.0f, running = 0.0f;
    for (ptrdiff_t i = 0; i < V; i++) e[i] = exp_rounded(logits[i] - max);
    for (ptrdiff_t i = 0; i < V; i++) sum += e[i];
    for (ptrdiff_t i = 0; i < V; i++) {
        running += e[i] / sum;
        if (running > coin) return i;
    }
    return V - 1;
}
#endif
