/* Fake quantization while training; numbers are those of eagerq.functional. */
#include "common.h"

/* Eight bytes of 0 or 1 to the bits of one. */
static inline u8 packed(const u8 *flags) {
    uint64_t eight;
    memcpy(&eight, flags, 8);
    return (u8)((eight * 0x0102040810204080ull) >> 56);
}

/* out = (clamp(round(x * inverse) + zero) - zero) * scale; bit i of mask tells whether x[i] was inside */
CLONES static void fake_block(const float *restrict x, float *restrict out, u8 *restrict mask, i64 n, float inverse,
                              float scale, float zero, float low, float high) {
    u8 inside[BLOCK + 8];
    for (i64 i = 0; i < n; i++) {
        float steps = rintf(x[i] * inverse) + zero;
        float kept = steps < low ? low : steps;
        kept = kept > high ? high : kept;
        inside[i] = kept == steps;
        out[i] = (kept - zero) * scale;
    }
    if (!mask) return;
    memset(inside + n, 0, (u8)(-n & 7));
    for (i64 i = 0; i < n; i += 8) mask[i / 8] = packed(inside + i);
}

EXPORT void eagerq_fake_quantize(const float *x, float *out, u8 *mask, i64 n, const float *scale_at,
                                 const int32_t *zero_at, float low, float high) {
    const float scale = *scale_at, inverse = 1.0f / scale, zero = (float)*zero_at;
#pragma omp parallel for schedule(static) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        i64 at = block * BLOCK;
        fake_block(x + at, out + at, mask ? mask + at / 8 : 0, SPAN(block, n), inverse, scale, zero, low, high);
    }
}

CLONES static void masked_block(const float *restrict grad, const u8 *restrict mask, float *restrict out, i64 n) {
    i64 whole = n / 8 * 8;
    for (i64 i = 0; i < whole; i += 8) {
        uint32_t bits = mask[i / 8], words[8];
        memcpy(words, grad + i, sizeof words);
        for (int k = 0; k < 8; k++) words[k] &= 0u - ((bits >> k) & 1u);
        memcpy(out + i, words, sizeof words);
    }
    for (i64 i = whole; i < n; i++) out[i] = (mask[i / 8] >> (i % 8)) & 1 ? grad[i] : 0.0f;
}

EXPORT void eagerq_masked(const float *grad, const u8 *mask, float *out, i64 n) {
#pragma omp parallel for schedule(static) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        i64 at = block * BLOCK;
        masked_block(grad + at, mask + at / 8, out + at, SPAN(block, n));
    }
}
