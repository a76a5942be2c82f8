/* Microkernels for any processor, with 128-bit vectors. Products and sums are rounded separately, so the bits differ from those
 * with FMA. But they are the same for every thread count, batch and cache use. */
#define W 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define FUSED 0
#define SQRT(a) ((vec){sqrtf((a)[0]), sqrtf((a)[1]), sqrtf((a)[2]), sqrtf((a)[3])})
#define MR 1
#define NR 2
#define TILE_ROWS 2
#define TILE_VECS 1
#define STREAMS 2
#define MIX_ROWS 1
#define MIX_VECS 2
#include "micro_body.h"
TABLE(baseline, quantised_baseline)

const microkernels *micro_baseline(void) { return &table_baseline; }
