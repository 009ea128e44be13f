/* Batch norm in training of channels that are divided first, with ReLU: each channel is read once from memory.
 *
 * Forward, the steps are those of torch's CPU kernels, rounded alike (sums in double): quantization behind a
 * batch norm turns a last bit into a whole step now and then, and nets of many layers make that grow.
 */
#include <float.h>

#include "common.h"

enum { LANES = 16 };

typedef struct {
    i64 batch, channels, plane;
    const float *factor, *weight, *bias;
    float *running_mean, *running_var, *mean, *inverse;
    double eps, pace;
} Norm;

#define PLANES(c) for (i64 n = 0, at = (c) * s->plane; n < s->batch; n++, at += s->channels * s->plane)

/* Divide, and sum the quotients. */
CLONES static double divide(const float *restrict x, float factor, float *restrict out, i64 n) {
    double sums[LANES] = {0}, sum = 0;
    const i64 whole = n / LANES * LANES;
    for (i64 i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++) {
            out[i + k] = x[i + k] / factor;
            sums[k] += out[i + k];
        }
    for (i64 i = whole; i < n; i++) {
        out[i] = x[i] / factor;
        sum += out[i];
    }
    for (int k = 0; k < LANES; k++) sum += sums[k];
    return sum;
}

CLONES static double spread_of(const float *restrict x, float mean, i64 n) {
    double sums[LANES] = {0}, sum = 0;
    const i64 whole = n / LANES * LANES;
    for (i64 i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++) {
            const float far = x[i + k] - mean;
            sums[k] += far * far;
        }
    for (i64 i = whole; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
    for (int k = 0; k < LANES; k++) sum += sums[k];
    return sum;
}

CLONES static void normalize(float *x, u8 *restrict mask, i64 n, float scale, float shift) {
    if (!mask) {
        for (i64 i = 0; i < n; i++) x[i] = fmaf(x[i], scale, shift);
        return;
    }
    u8 above[BLOCK + 8];
    for (i64 start = 0; start < n; start += BLOCK) {
        const i64 span = n - start < BLOCK ? n - start : BLOCK;
        for (i64 i = 0; i < span; i++) {
            const float y = fmaf(x[start + i], scale, shift);
            above[i] = !(y <= 0);
            x[start + i] = y <= 0 ? 0.0f : y;
        }
        pack(above, mask + start / 8, span);
    }
}

/* A row of the mask for each plane; it starts on a byte. */
EXPORT void eagerq_batch_norm(const float *y, float *out, u8 *mask, const Norm *s) {
    const i64 bytes = (s->plane + 7) / 8;
    const double count = (double)s->batch * s->plane;
#pragma omp parallel for schedule(static) if (s->batch * s->channels * s->plane > 2 * BLOCK)
    for (i64 c = 0; c < s->channels; c++) {
        double sum = 0, spread = 0;
        PLANES(c) sum += divide(y + at, s->factor[c], out + at, s->plane);
        const float mean = (float)(sum / count);
        PLANES(c) spread += spread_of(out + at, mean, s->plane);
        const float total = (float)spread, variance = total / (float)count, unbiased = total / (float)(count - 1),
                    pace = (float)s->pace;
        const float inverse = variance + s->eps > 0 ? (float)(1.0 / sqrt(variance + s->eps)) : 0.0f;
        const float scale = inverse * s->weight[c], shift = fmaf(-mean, scale, s->bias[c]);
        PLANES(c) normalize(out + at, mask ? mask + (n * s->channels + c) * bytes : 0, s->plane, scale, shift);
        s->running_mean[c] = pace * mean + (1 - pace) * s->running_mean[c];
        s->running_var[c] = fmaf(pace, unbiased, (1 - pace) * s->running_var[c]);
        s->mean[c] = mean, s->inverse[c] = inverse;
    }
}

/* grad where the bit is set, else 0 */
CLONES static void keep(const float *restrict grad, const u8 *restrict mask, float *restrict out, i64 n) {
    const i64 whole = n / 16 * 16;
    for (i64 i = 0; i < whole; i += 16) {
        uint32_t bits = mask[i / 8] | (uint32_t)mask[i / 8 + 1] << 8, words[16];
        memcpy(words, grad + i, sizeof words);
        for (int k = 0; k < 16; k++) words[k] &= 0u - ((bits >> k) & 1u);
        memcpy(out + i, words, sizeof words);
    }
    for (i64 i = whole; i < n; i++) out[i] = (mask[i / 8] >> (i % 8)) & 1 ? grad[i] : 0.0f;
}

/* Sums of the gradient, and of the gradient times the distance from the centre. */
CLONES static void sums_of(const float *g, const float *restrict x, float centre, i64 n, double *sum, double *with) {
    float sums[LANES] = {0}, products[LANES] = {0};
    const i64 whole = n / LANES * LANES;
    for (i64 i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++) {
            sums[k] += g[i + k];
            products[k] += g[i + k] * (x[i + k] - centre);
        }
    for (i64 i = whole; i < n; i++) *sum += g[i], *with += g[i] * (x[i] - centre);
    for (int k = 0; k < LANES; k++) *sum += sums[k], *with += products[k];
}

CLONES static void back(const float *g, const float *restrict x, float *of_x, i64 n, float centre, float part, float level,
                        float scale) {
    for (i64 i = 0; i < n; i++) of_x[i] = (g[i] - level - (x[i] - centre) * part) * scale;
}

/* Gradients for y, factor, weight and bias; the division by the factor is in the constants. */
EXPORT void eagerq_batch_norm_backward(const float *grad, const float *y, const u8 *mask, float *of_y, float *of_factor,
                                       float *of_weight, float *of_bias, const Norm *s) {
    const i64 bytes = (s->plane + 7) / 8;
    const double count = (double)s->batch * s->plane;
#pragma omp parallel for schedule(static) if (s->batch * s->channels * s->plane > 2 * BLOCK)
    for (i64 c = 0; c < s->channels; c++) {
        const float *g = grad;
        if (mask) {
            PLANES(c) keep(grad + at, mask + (n * s->channels + c) * bytes, of_y + at, s->plane);
            g = of_y;
        }
        const double factor = s->factor[c], inverse = s->inverse[c], weight = s->weight[c];
        const float centre = (float)(s->mean[c] * factor);
        double sum = 0, with = 0;
        PLANES(c) sums_of(g + at, y + at, centre, s->plane, &sum, &with);
        with /= factor;
        /* of a channel scaled by next to nothing no distance is left: not to multiply that by infinity */
        const double most = FLT_MAX, share = with * inverse * inverse / count / factor;
        const float part = (float)(share > most ? most : share < -most ? -most : share), level = (float)(sum / count);
        PLANES(c) back(g + at, y + at, of_y + at, s->plane, centre, part, level, (float)(inverse * weight / factor));
        of_bias[c] = (float)sum;
        of_weight[c] = (float)(with * inverse);
        /* what a larger factor does to the quotients, their own mean and variance take back, but for eps */
        of_factor[c] = (float)(-with * inverse * weight * inverse * inverse * s->eps / factor);
    }
}
