/* Batch norm in training of channels that are divided first, with ReLU: each channel is read once from memory.
 *
 * Forward, the steps are those of torch's CPU kernels, rounded alike (sums in double): quantization behind a
 * batch norm turns a last bit into a whole step now and then, and nets of many layers make that grow.
 */
#include "normalizing.h"

enum { LANES = 16 };

#define PLANES(c) for (i64 n = 0, at = (c) * s->plane; n < s->batch; n++, at += s->channels * s->plane)

/* Divide; the sum of the quotients, and their ends. */
CLONES static double divide(const float *restrict x, float factor, float *restrict out, i64 n, float *ends) {
    double sums[LANES] = {0}, sum = 0;
    float least[LANES], most[LANES];
    for (int k = 0; k < LANES; k++) least[k] = ends[0], most[k] = ends[1];
    const i64 whole = n / LANES * LANES;
    for (i64 i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++) {
            const float q = x[i + k] / factor;
            out[i + k] = q;
            sums[k] += q;
            least[k] = q < least[k] ? q : least[k];
            most[k] = q > most[k] ? q : most[k];
        }
    for (i64 i = whole; i < n; i++) {
        const float q = x[i] / factor;
        out[i] = q;
        sum += q;
        least[0] = q < least[0] ? q : least[0];
        most[0] = q > most[0] ? q : most[0];
    }
    for (int k = 0; k < LANES; k++) {
        sum += sums[k];
        ends[0] = least[k] < ends[0] ? least[k] : ends[0];
        ends[1] = most[k] > ends[1] ? most[k] : ends[1];
    }
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

CLONES static void normalize(float *x, u8 *restrict mask, int relu, i64 n, Line line) {
    if (!mask) {
        for (i64 i = 0; i < n; i++) {
            const float y = fmaf(x[i], line.scale, line.shift);
            x[i] = relu && y <= 0 ? 0.0f : y;
        }
        return;
    }
    u8 above[BLOCK + 8];
    for (i64 start = 0; start < n; start += BLOCK) {
        const i64 span = n - start < BLOCK ? n - start : BLOCK;
        for (i64 i = 0; i < span; i++) {
            const float y = fmaf(x[start + i], line.scale, line.shift);
            above[i] = !(y <= 0);
            x[start + i] = y <= 0 ? 0.0f : y;
        }
        pack(above, mask + start / 8, span);
    }
}

/* What folding multiplies each channel by, weight / spread, and one in place of zero. */
EXPORT void eagerq_fold(const float *weight, const float *spread, float *factor, i64 n) {
    for (i64 c = 0; c < n; c++) {
        const float folded = weight[c] / spread[c];
        factor[c] = folded == 0 ? 1.0f : folded;
    }
}

/* Add to a batch norm's weight's gradient what comes through the factor, in two parts. */
EXPORT void eagerq_fold_backward(const float *weight, const float *spread, const float *one, const float *other, i64 n,
                                 float *of_weight) {
    for (i64 c = 0; c < n; c++) {
        const float of_factor = weight[c] / spread[c] == 0 ? 0.0f : one[c] + other[c];
        of_weight[c] += of_factor / spread[c];
    }
}

/* A row of the mask for each plane; it starts on a byte. A mask goes with a ReLU. */
EXPORT void eagerq_batch_norm(const float *y, float *out, u8 *mask, int relu, const Norm *s) {
    const i64 bytes = (s->plane + 7) / 8;
    const double count = (double)s->batch * s->plane;
    float low = INFINITY, high = -INFINITY;
    int strange = 0;
#pragma omp parallel for schedule(static) reduction(min : low) reduction(max : high) reduction(| : strange) \
    if (s->batch * s->channels * s->plane > 2 * BLOCK)
    for (i64 c = 0; c < s->channels; c++) {
        double sum = 0, spread = 0;
        float ends[2] = {INFINITY, -INFINITY};
        PLANES(c) sum += divide(y + at, s->factor[c], out + at, s->plane, ends);
        const float mean = (float)(sum / count);
        PLANES(c) spread += spread_of(out + at, mean, s->plane);
        const Line line = line_of(s, c, mean, (float)spread, count);
        PLANES(c) normalize(out + at, mask ? mask + (n * s->channels + c) * bytes : 0, relu, s->plane, line);
        Ends all = {low, high, strange};
        widen(&all, ends[0], ends[1], line);
        low = all.low, high = all.high, strange = all.strange;
    }
    tell_ends(s, (Ends){low, high, strange}, relu);
}

/* grad where the bit is set, else 0 */
CLONES void eagerq_keep(const float *restrict grad, const u8 *restrict mask, float *restrict out, i64 n) {
    const i64 whole = n / 16 * 16;
    for (i64 i = 0; i < whole; i += 16) masked16(grad + i, mask + i / 8, out + i);
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

CLONES static void back(const float *g, const float *restrict x, float *of_x, i64 n, Slope to) {
    for (i64 i = 0; i < n; i++) of_x[i] = (g[i] - to.level - (x[i] - to.centre) * to.part) * to.scale;
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
            PLANES(c) eagerq_keep(grad + at, mask + (n * s->channels + c) * bytes, of_y + at, s->plane);
            g = of_y;
        }
        const float centre = centre_of(s, c);
        double sum = 0, with = 0;
        PLANES(c) sums_of(g + at, y + at, centre, s->plane, &sum, &with);
        const Slope slope = slope_of(s, c, sum, with, count, of_factor, of_weight, of_bias);
        PLANES(c) back(g + at, y + at, of_y + at, s->plane, slope);
    }
}
