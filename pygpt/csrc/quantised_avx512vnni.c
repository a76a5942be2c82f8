/* Quantised weights for x86-64 with AVX-512 and its VNNI (Ice Lake 2019, Zen 4 2022, and later): 512-bit vectors. Processors
 * that also have AMX (Sapphire Rapids 2023, and later) multiply many rows in its tiles. */
#include "micro.h"
#if defined(__x86_64__)
TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
#include <immintrin.h>
#define W 16
#define FMA(a, b, c) ((vec)_mm512_fmadd_ps((a), (b), (c)))
#define HALVES(p) ((vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define DOT4(sum, w, x) ((ivec)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(x)))
#define PREPARE(w) ((w) ^ (int32_t)0x80808080) /* vpdpbusd takes unsigned weights: add 128 here, subtract it where a sum starts */
#define BIAS 128
#define DOT8(sum, w, prepared, x) DOT4(sum, prepared, x)
#define STREAMS 2
#define TALL 8
#define TILE_PANELS 3
#include "quantised_body.h"
QUANTISED(avx512vnni)
END_TARGET

#ifdef HAS_AMX
TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,amx-tile,amx-int8")

/* Tiles 0 to 2 have integer sums, BAND rows x OUTPUTS. Tile 3 has one group of BAND rows, tiles 4 to 6 that of OUTPUTS outputs. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TILES = {1, 0, {0}, {64, 64, 64, GROUP, 64, 64, 64}, {BAND, BAND, BAND, BAND, GROUP / 4, GROUP / 4, GROUP / 4}};

/* Write one group of q4_0 values as int8. */
INLINE void widen_group(char *out, const char *values) {
    for (int i = 0; i < GROUP * OUTPUTS / 128; i++) {
        const ivec both = load_int(values + i * 64), low = broadcast_int(0x0f0f0f0f);
        _mm512_storeu_si512(out + i * 128, _mm512_sub_epi8((__m512i)(both & low), _mm512_set1_epi8(8)));
        _mm512_storeu_si512(out + i * 128 + 64, _mm512_sub_epi8((__m512i)((both >> 4) & low), _mm512_set1_epi8(8)));
    }
}

/* Compute BAND rows, of which `rows` exist, times `panels` panels. */
INLINE void tiles(const int bits, float *out, ptrdiff_t ldo, const char *row, ptrdiff_t rows, const weight_matrix *w,
                  ptrdiff_t panel, int panels) {
    const ptrdiff_t groups = groups_of(w->K), step = row_bytes(w->K);
    vec acc[TILE_PANELS][BAND] = {{{0}}};
    ivec sums[TILE_PANELS][BAND];
    char wide[TILE_PANELS][GROUP * OUTPUTS];
    for (ptrdiff_t g = 0; g < groups; g++) {
        const float *row_scale = (const float *)(row + groups * GROUP) + g;
        const char *from[TILE_PANELS];
        for (int p = 0; p < panels; p++) {
            from[p] = values_of(w, panel + p, bits) + g * (GROUP * OUTPUTS * bits / 8);
            if (bits == Q4) widen_group(wide[p], from[p]), from[p] = wide[p];
        }
        __asm__ volatile("" ::: "memory"); /* gcc does not know that tiles read memory */
        _tile_loadd(3, row + g * GROUP, step);
#define SUMS(p, weights)                                                                                                 \
        if (p < panels) {                                                                                                \
            _tile_zero(p);                                                                                               \
            _tile_loadd(weights, from[p], 64);                                                                           \
            _tile_dpbssd(p, 3, weights);                                                                                 \
            _tile_stored(p, sums[p], 64);                                                                                \
        }
        SUMS(0, 4)
        SUMS(1, 5)
        SUMS(2, 6)
#undef SUMS
        for (int p = 0; p < panels; p++) {
            const vec scale = HALVES(scales_of(w, panel + p, bits) + g * OUTPUTS);
            for (ptrdiff_t r = 0; r < rows; r++)
                acc[p][r] = FMA(__builtin_convertvector(sums[p][r], vec), scale * broadcast(row_scale[r * (step / 4)]), acc[p][r]);
        }
    }
    for (int p = 0; p < panels; p++) {
        const ptrdiff_t count = least(w->N - (panel + p) * OUTPUTS, OUTPUTS);
        for (ptrdiff_t r = 0; r < rows; r++) memcpy(out + r * ldo + p * OUTPUTS, &acc[p][r], count * sizeof *out);
    }
}

INLINE void product_in_tiles(const int bits, float *out, ptrdiff_t ldo, const void *packed, ptrdiff_t rows,
                             const weight_matrix *w, ptrdiff_t start, ptrdiff_t stop) {
    _tile_loadconfig(&TILES);
    for (ptrdiff_t n = start / OUTPUTS, last = panels_of(stop); n < last; n += TILE_PANELS)
        for (ptrdiff_t r = 0; r < rows; r += BAND)
            tiles(bits, out + r * ldo + n * OUTPUTS - start, ldo, row_at(packed, r, w->K), least(rows - r, BAND), w, n,
                  (int)least(last - n, TILE_PANELS));
    _tile_release();
}

#define FUNCTIONS(name, bits)                                                                                            \
    static void tiles_##name(float *out, ptrdiff_t ldo, const void *packed, ptrdiff_t rows, const weight_matrix *w,      \
                             ptrdiff_t start, ptrdiff_t stop, const void *room) {                                        \
        (void)room;                                                                                                      \
        product_in_tiles(bits, out, ldo, packed, rows, w, start, stop);                                                  \
    }
EACH_QUANTISED(FUNCTIONS)

static int probe_tiles(ptrdiff_t times) {
    _tile_loadconfig(&TILES);
    for (ptrdiff_t t = 0; t < times; t++) {
        _tile_dpbssd(0, 3, 4);
        _tile_dpbssd(1, 3, 5);
        _tile_dpbssd(2, 3, 6);
    }
    _tile_release();
    return 0;
}

#undef PRODUCT
#undef PROBE
#undef PROBE_OPERATIONS
#define PRODUCT(id) tiles_##id
#define PROBE(id) probe_tiles
#define PROBE_OPERATIONS (2 * BAND * OUTPUTS * GROUP * TILE_PANELS)
QUANTISED(avx512amx)
END_TARGET
#endif
#endif
