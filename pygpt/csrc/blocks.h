/* Convert GGUF's blocks of q8_0 and q4_0 to panels (quantised_body.h): the same numbers in another order.
 *
 * A block is 32 neighbours of one row: a float16 scale, then the values. q8_0 has 32 int8 values. q4_0 has 16 bytes: low
 * nibbles are inputs 0 to 15, high nibbles 16 to 31. K is a multiple of 32. Source: ggml-common.h, block_q8_0 and block_q4_0. */
#ifndef PYGPT_BLOCKS_H
#define PYGPT_BLOCKS_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Return four inputs of a q4_0 block from input k on, a nibble in each byte. */
static inline uint32_t four_nibbles(const char *bytes, ptrdiff_t k) {
    uint32_t word;
    memcpy(&word, bytes + k % 16, sizeof word);
    return word >> (k < 16 ? 0 : 4) & 0x0f0f0f0f;
}

/* Fill the panels [start, stop) of a matrix of N outputs and K inputs; `bits` of a value is 8 or 4. Outputs beyond N are zeros. */
static inline void panels_of_blocks(char *out, const char *blocks, int bits, ptrdiff_t N, ptrdiff_t K,
                                    ptrdiff_t start, ptrdiff_t stop) {
    const ptrdiff_t groups = K / 32, block_bytes = 2 + 4 * bits, panel_bytes = K * 2 * bits;
    char *scales = out + (N + 15) / 16 * panel_bytes;
    for (ptrdiff_t panel = start; panel < stop; panel++) {
        const ptrdiff_t rows = N - panel * 16 < 16 ? N - panel * 16 : 16;
        memset(out + panel * panel_bytes, bits == 8 ? 0 : 0x88, rows < 16 ? panel_bytes : 0);
        memset(scales + panel * groups * 32, 0, rows < 16 ? groups * 32 : 0);
        for (ptrdiff_t n = 0; n < rows; n++)
            for (ptrdiff_t g = 0; g < groups; g++) {
                const char *block = blocks + ((panel * 16 + n) * groups + g) * block_bytes;
                char *to = out + panel * panel_bytes + g * 64 * bits + n * 4;
                memcpy(scales + (panel * groups + g) * 32 + n * 2, block, 2);
                for (ptrdiff_t k = 0; k < 32; k += 32 / bits, to += 64) {
                    uint32_t word = four_nibbles(block + 2, k) | four_nibbles(block + 2, k + 4) << 4;
                    if (bits == 8) memcpy(&word, block + 2 + k, sizeof word);
                    memcpy(to, &word, sizeof word);
                }
            }
    }
}
#endif
