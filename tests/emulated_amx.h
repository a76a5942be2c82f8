/* AMX in plain C, for a processor without it: the tests compile the kernels with this file in front of them. */
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static __thread struct {
    int configured;
    uint8_t config[64];
    uint8_t rows[8][16][64];
} emulated;

static int tile_rows(int t) { return emulated.config[48 + t]; }
static int tile_bytes(int t) { return emulated.config[16 + 2 * t] | emulated.config[17 + 2 * t] << 8; }

static inline void emulated_loadconfig(const void *config) {
    memset(&emulated, 0, sizeof emulated);
    memcpy(emulated.config, config, 64);
    if (emulated.config[0] != 1) abort(); /* the processor raises a fault in all these cases */
    for (int i = 1; i < 16; i++)
        if (emulated.config[i]) abort();
    for (int t = 0; t < 8; t++)
        if (tile_rows(t) > 16 || tile_bytes(t) > 64 || !tile_rows(t) != !tile_bytes(t)) abort();
    for (int i = 32; i < 64; i++)
        if ((i < 48 || i >= 56) && emulated.config[i]) abort();
    emulated.configured = 1;
}

static inline void emulated_zero(int t) {
    if (!emulated.configured || !tile_rows(t)) abort();
    memset(emulated.rows[t], 0, sizeof emulated.rows[t]);
}

static inline void emulated_loadd(int t, const void *from, long stride) {
    emulated_zero(t);
    for (int r = 0; r < tile_rows(t); r++) memcpy(emulated.rows[t][r], (const char *)from + r * stride, tile_bytes(t));
}

static inline void emulated_stored(int t, void *to, long stride) {
    if (!emulated.configured) abort();
    for (int r = 0; r < tile_rows(t); r++) memcpy((char *)to + r * stride, emulated.rows[t][r], tile_bytes(t));
}

static inline void emulated_dpbssd(int c, int a, int b) {
    if (!emulated.configured || tile_rows(c) != tile_rows(a) || tile_bytes(c) != tile_bytes(b) || tile_bytes(a) != 4 * tile_rows(b))
        abort();
    for (int m = 0; m < tile_rows(c); m++)
        for (int n = 0; n < tile_bytes(c) / 4; n++) {
            int32_t sum;
            memcpy(&sum, emulated.rows[c][m] + 4 * n, 4);
            for (int k = 0; k < tile_bytes(a); k++)
                sum += (int8_t)emulated.rows[a][m][k] * (int8_t)emulated.rows[b][k / 4][4 * n + k % 4];
            memcpy(emulated.rows[c][m] + 4 * n, &sum, 4);
        }
}

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_release
#define _tile_loadconfig emulated_loadconfig
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_zero emulated_zero
#define _tile_dpbssd emulated_dpbssd
#define _tile_release() (emulated.configured = 0)
#undef __get_cpuid_count
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(d) = 3u << 24, 1)
#define syscall(...) 0L
#endif
