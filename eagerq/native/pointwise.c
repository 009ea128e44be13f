/* Pointwise work on bytes that no public operator of torch does exactly and fast.
 *
 * Bytes are unsigned or signed: a signed one is read as (b ^ 0x80) - 128. Numbers are those of
 * eagerq.kernels.reference.
 */
#include "pairs.h"

#ifndef EAGERQ_STAMP
#define EAGERQ_STAMP "unknown"
#endif
EXPORT const char eagerq_stamp[17] = EAGERQ_STAMP;

#define ADD_LOOP(A, B) for (i64 i = 0; i < n; i++) out[i] = sum(a[i], b[i], A, B, p);
#define MUL_LOOP(A, B) for (i64 i = 0; i < n; i++) out[i] = product(a[i], b[i], A, B, p);
#define PAIR_BLOCK(NAME, LOOP)                                                                                      \
    CLONES static void NAME(const u8 *restrict a, const u8 *restrict b, u8 *restrict out, i64 n, const Pair *p) {   \
        if (p->a_signed) { if (p->b_signed) LOOP(1, 1) else LOOP(1, 0) }                                            \
        else { if (p->b_signed) LOOP(0, 1) else LOOP(0, 0) }                                                        \
    }

PAIR_BLOCK(add_block, ADD_LOOP)
PAIR_BLOCK(mul_block, MUL_LOOP)

EXPORT void eagerq_add(const u8 *a, const u8 *b, u8 *out, i64 n, const Pair *p) {
#pragma omp parallel for schedule(static) if (n > 4 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        i64 at = block * BLOCK;
        add_block(a + at, b + at, out + at, SPAN(block, n), p);
    }
}

/* a [outer, again, n] times b [outer, n]: one row of b for `again` rows of a. */
EXPORT void eagerq_mul(const u8 *a, const u8 *b, u8 *out, i64 outer, i64 again, i64 n, const Pair *p) {
    const i64 blocks = BLOCKS(n);
#pragma omp parallel for collapse(3) schedule(static) if (outer * again * n > 4 * BLOCK)
    for (i64 part = 0; part < outer; part++)
        for (i64 row = 0; row < again; row++)
            for (i64 block = 0; block < blocks; block++) {
                const i64 at = block * BLOCK, from = (part * again + row) * n + at;
                mul_block(a + from, b + part * n + at, out + from, SPAN(block, n), p);
            }
}

CLONES static void quantize_block(const float *restrict x, u8 *restrict out, i64 n, float inverse, float zero,
                                  float low, float high) {
    for (i64 i = 0; i < n; i++) out[i] = stored(rintf(fmaf(x[i], inverse, zero)), low, high);
}

EXPORT void eagerq_quantize(const float *x, u8 *out, i64 n, float inverse, float zero, float low, float high) {
#pragma omp parallel for schedule(static) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        i64 at = block * BLOCK;
        quantize_block(x + at, out + at, SPAN(block, n), inverse, zero, low, high);
    }
}

CLONES static void max_block(const u8 *restrict x, u8 *restrict out, i64 n, int flip) {
    if (flip) for (i64 i = 0; i < n; i++) out[i] = (int8_t)x[i] > (int8_t)out[i] ? x[i] : out[i];
    else for (i64 i = 0; i < n; i++) out[i] = x[i] > out[i] ? x[i] : out[i];
}

/* [batch, height, width, channels] -> [batch, rows, columns, channels] */
EXPORT void eagerq_max_pool(const u8 *x, u8 *out, i64 batch, i64 height, i64 width, i64 channels, i64 rows,
                            i64 columns, const i64 *window, int is_signed) {
    const i64 taps_y = window[0], taps_x = window[1], every_y = window[2], every_x = window[3];
    const i64 pad_y = window[4], pad_x = window[5], step_y = window[6], step_x = window[7];
#pragma omp parallel for collapse(2) schedule(static)
    for (i64 image = 0; image < batch; image++)
        for (i64 row = 0; row < rows; row++)
            for (i64 column = 0; column < columns; column++) {
                u8 *to = out + ((image * rows + row) * columns + column) * channels;
                int first = 1;
                for (i64 ty = 0; ty < taps_y; ty++) {
                    i64 y = row * every_y - pad_y + ty * step_y;
                    if (y < 0 || y >= height) continue;
                    for (i64 tx = 0; tx < taps_x; tx++) {
                        i64 xx = column * every_x - pad_x + tx * step_x;
                        if (xx < 0 || xx >= width) continue;
                        const u8 *from = x + ((image * height + y) * width + xx) * channels;
                        if (first) memcpy(to, from, channels);
                        else max_block(from, to, channels, is_signed);
                        first = 0;
                    }
                }
                if (first) memset(to, is_signed ? 0x80 : 0, channels); /* nothing but padding */
            }
}

enum { WIDE = 256 }; /* channels at a time */

CLONES static void total_block(const u8 *restrict x, int32_t *restrict total, i64 pixels, i64 channels, i64 n, u8 flip) {
    for (i64 c = 0; c < n; c++) total[c] = 0;
    for (i64 pixel = 0; pixel < pixels; pixel++, x += channels)
        for (i64 c = 0; c < n; c++) total[c] += x[c] ^ flip;
}

/* [batch, pixels, channels] -> [batch, channels]: round(sum of (x - zero) / pixels + zero), the sum exact */
EXPORT void eagerq_mean(const u8 *x, u8 *out, i64 batch, i64 pixels, i64 channels, float zero, float low, float high,
                        int is_signed) {
    const i64 blocks = (channels + WIDE - 1) / WIDE;
#pragma omp parallel for collapse(2) schedule(static) if (batch * pixels * channels > 4 * BLOCK)
    for (i64 image = 0; image < batch; image++)
        for (i64 block = 0; block < blocks; block++) {
            const i64 at = block * WIDE, n = channels - at < WIDE ? channels - at : WIDE;
            int32_t total[WIDE];
            total_block(x + image * pixels * channels + at, total, pixels, channels, n, is_signed ? 0x80 : 0);
            const float shift = ((is_signed ? 128.0f : 0.0f) + zero) * (float)pixels;
            u8 *to = out + image * channels + at;
            for (i64 c = 0; c < n; c++)
                to[c] = stored(rintf(((float)total[c] - shift) / (float)pixels + zero), low, high);
        }
}
