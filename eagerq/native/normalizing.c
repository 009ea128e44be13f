/* Batch norm in training of channels that were scaled, with ReLU: each channel is read once from memory.
 *
 * With Var[y/f] = Var[y]/f², weight·(y/f - E[y/f])/sqrt(Var[y/f] + eps) is
 * sign(f)·weight·(y - E[y])/sqrt(Var[y] + eps·f²): no pass over y for the division.
 */
#include "common.h"

enum { LANES = 16 };

typedef struct {
    i64 batch, channels, plane;
    const float *factor, *weight, *bias;
    float *running_mean, *running_var, *mean, *inverse;
    double eps, pace;
} Norm;

#define PLANES(c) for (i64 n = 0, at = (c) * s->plane; n < s->batch; n++, at += s->channels * s->plane)

#define LANE_SUM(n, TERM)                                        \
    float sums[LANES] = {0};                                     \
    double sum = 0;                                              \
    i64 whole = (n) / LANES * LANES;                             \
    for (i64 i = 0; i < whole; i += LANES)                       \
        for (int k = 0; k < LANES; k++) sums[k] += TERM(i + k);  \
    for (i64 i = whole; i < (n); i++) sum += TERM(i);            \
    for (int k = 0; k < LANES; k++) sum += sums[k];              \
    return sum;

/* Of the quotients as they would be rounded, in double: a mean near zero is little but the rounding of its terms. */
CLONES static double sum_of_quotients(const float *restrict x, float factor, i64 n) {
    double sums[LANES] = {0}, sum = 0;
    i64 whole = n / LANES * LANES;
    for (i64 i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++) sums[k] += x[i + k] / factor;
    for (i64 i = whole; i < n; i++) sum += x[i] / factor;
    for (int k = 0; k < LANES; k++) sum += sums[k];
    return sum;
}

CLONES static double sum_of(const float *restrict x, i64 n) {
#define TERM(i) x[i]
    LANE_SUM(n, TERM)
#undef TERM
}

CLONES static double spread_of(const float *restrict x, float mean, i64 n) {
#define TERM(i) (x[i] - mean) * (x[i] - mean)
    LANE_SUM(n, TERM)
#undef TERM
}

CLONES static double sum_with(const float *restrict g, const float *restrict x, float mean, i64 n) {
#define TERM(i) g[i] * (x[i] - mean)
    LANE_SUM(n, TERM)
#undef TERM
}

CLONES static void normalize(const float *restrict x, float *restrict out, u8 *restrict mask, i64 n, float scale,
                             float shift) {
    if (!mask) {
        for (i64 i = 0; i < n; i++) out[i] = x[i] * scale + shift;
        return;
    }
    u8 above[BLOCK + 8];
    for (i64 start = 0; start < n; start += BLOCK) {
        const i64 span = n - start < BLOCK ? n - start : BLOCK;
        for (i64 i = 0; i < span; i++) {
            const float y = x[start + i] * scale + shift;
            above[i] = !(y <= 0);
            out[start + i] = y <= 0 ? 0.0f : y;
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
        const float factor = s->factor[c];
        PLANES(c) sum += sum_of_quotients(y + at, factor, s->plane);
        const float seen = (float)(sum / count), mean = (float)(sum / count * factor);
        PLANES(c) spread += spread_of(y + at, mean, s->plane);
        const double square = (double)factor * factor;
        const float inverse = (float)(1.0 / sqrt(spread / count + s->eps * square));
        const float scale = (factor < 0 ? -s->weight[c] : s->weight[c]) * inverse;
        const float shift = s->bias[c] - mean * scale;
        PLANES(c) normalize(y + at, out + at, mask ? mask + (n * s->channels + c) * bytes : 0, s->plane, scale, shift);
        s->running_mean[c] = (float)(s->running_mean[c] + s->pace * ((double)seen - s->running_mean[c]));
        const float varied = (float)(spread / (count - 1) / square);
        s->running_var[c] = (float)(s->running_var[c] + s->pace * ((double)varied - s->running_var[c]));
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

CLONES static void spread_back(const float *g, const float *restrict x, float *of_x, i64 n, float mean, float part,
                               float level, float scale) {
    for (i64 i = 0; i < n; i++) of_x[i] = (g[i] - level - (x[i] - mean) * part) * scale;
}

/* Gradients for y, factor, weight and bias. */
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
        const float mean = s->mean[c], inverse = s->inverse[c], factor = s->factor[c];
        const float weight = factor < 0 ? -s->weight[c] : s->weight[c];
        double sum = 0, with = 0;
        PLANES(c) sum += sum_of(g + at, s->plane);
        PLANES(c) with += sum_with(g + at, y + at, mean, s->plane);
        const float part = (float)(with * inverse * inverse / count), level = (float)(sum / count);
        PLANES(c) spread_back(g + at, y + at, of_y + at, s->plane, mean, part, level, weight * inverse);
        const double of_signed = with * inverse;
        of_bias[c] = (float)sum;
        of_weight[c] = (float)(factor < 0 ? -of_signed : of_signed);
        of_factor[c] = (float)(-of_signed * weight * inverse * inverse * factor * s->eps);
    }
}
