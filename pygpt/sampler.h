/* The samplers' arithmetic: float32, one after another in ascending id, as the serial program does it. The order matters:
 * with thousands of nearly equal tiny probabilities another order, or float64 sums, picks another id now and then. */
#ifndef PYGPT_SAMPLER_H
#define PYGPT_SAMPLER_H
#include <math.h>
#include <stddef.h>

/* The highest logit; NaN when a logit is NaN. Sixteen searches side by side: a maximum is exact in any order. */
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

/* The first id of the highest logit; -1 when a logit is NaN or the highest is not finite. */
static inline ptrdiff_t greedy_id(const float *logits, ptrdiff_t V) {
    const float max = highest(logits, V);
    if (!isfinite(max)) return -1;
    ptrdiff_t i = 0;
    while (logits[i] != max) i++;
    return i;
}

/* The first id whose running sum of softmax(logits) exceeds `coin`, V - 1 if rounding leaves none; -1 when the logits are
 * not finite. `e` is room for V values; `exps` fills it with exp(logit - max), each correctly rounded but for about one case
 * in a million (micro.h). */
static inline ptrdiff_t inverse_cdf_id(const float *logits, float *e, ptrdiff_t V, float coin,
                                       void (*exps)(float *e, const float *logits, float max, ptrdiff_t V)) {
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
#endif
