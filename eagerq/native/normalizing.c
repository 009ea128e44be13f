/* Batch norm in training of channels that are divided first, with ReLU: each channel is read once from memory.
 *
 * Forward, the steps are those of torch's CPU kernels, rounded alike (sums in double): quantization behind a
 * batch norm turns a last bit into a whole step now and then, and nets of many layers make that grow.
 */
#include "normalizing.h"

enum { LANES = 16 };

/* Divide; the sum of the quotients, and their ends. */
CLONES static double divide(const float *restrict x, float factor, float *restrict out, i64 n, float *ends) {
    Sums sums = {{0}, {0}};
    Values q, least = ends[0] - (Values){0}, most = ends[1] - (Values){0};
    double sum = 0;
    const i64 whole = n / LANES * LANES;
    for (i64 i = 0; i < whole; i += LANES) {
        memcpy(&q, x + i, sizeof q);
        q /= factor;
        memcpy(out + i, &q, sizeof q);
        add16(&sums, &q);
        take_least(&least, &q);
        take_most(&most, &q);
    }
    for (i64 i = whole; i < n; i++) {
        const float one = x[i] / factor;
        out[i] = one;
        sum += one;
        ends[0] = one < ends[0] ? one : ends[0];
        ends[1] = one > ends[1] ? one : ends[1];
    }
    for (int k = 0; k < LANES; k++) {
        ends[0] = least[k] < ends[0] ? least[k] : ends[0];
        ends[1] = most[k] > ends[1] ? most[k] : ends[1];
    }
    return sum + total(&sums);
}

CLONES static double spread_of(const float *restrict x, float mean, i64 n) {
    Sums sums = {{0}, {0}};
    Values far;
    double sum = 0;
    const i64 whole = n / LANES * LANES;
    for (i64 i = 0; i < whole; i += LANES) {
        memcpy(&far, x + i, sizeof far);
        far -= mean;
        far *= far;
        add16(&sums, &far);
    }
    for (i64 i = whole; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
    return sum + total(&sums);
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

/* How a channel lies in memory: planes, from one to the next so many values and bytes of the mask. Small planes are
 * gathered to one, since what starts and ends a loop would cost more than their values. */
typedef struct { i64 planes, plane, step, bytes; } Lie;

enum { FEW = 4096, SMALL = 512 };

static Lie lie_of(const Norm *s) {
    return (Lie){s->batch, s->plane, s->channels * s->plane, s->channels * ((s->plane + 7) / 8)};
}

static int is_small(Lie lie) { return lie.planes > 1 && lie.plane < SMALL && lie.planes * lie.plane <= FEW; }

#define EACH(lie) for (i64 n = 0, at = 0; n < (lie).planes; n++, at += (lie).step)

static void gather(Lie lie, const float *restrict from, float *restrict to) {
    EACH(lie) memcpy(to + n * lie.plane, from + at, lie.plane * sizeof *to);
}

static void scatter(Lie lie, const float *restrict from, float *restrict to) {
    EACH(lie) memcpy(to + at, from + n * lie.plane, lie.plane * sizeof *to);
}

/* The bits of gathered planes, each of which starts on a byte of its own. */
static void scatter_bits(Lie lie, const u8 *restrict from, u8 *restrict to) {
    for (i64 n = 0; n < lie.planes; n++, to += lie.bytes) {
        const i64 whole = (lie.plane + 7) / 8, first = n * lie.plane;
        for (i64 j = 0; j < whole; j++) {
            const u8 *two = from + first / 8 + j;
            to[j] = (u8)((two[0] | two[1] << 8) >> first % 8);
        }
        if (lie.plane % 8) to[whole - 1] &= (u8)((1 << lie.plane % 8) - 1);
    }
}

/* Forward, of the channel c that lies at y; its ends come with those of others. */
static void normalize_channel(const Norm *s, i64 c, Lie lie, const float *y, float *out, u8 *mask, int relu, Ends *all) {
    const double count = (double)lie.planes * lie.plane;
    double sum = 0, spread = 0;
    float ends[2] = {INFINITY, -INFINITY};
    EACH(lie) sum += divide(y + at, s->factor[c], out + at, lie.plane, ends);
    const float mean = (float)(sum / count);
    EACH(lie) spread += spread_of(out + at, mean, lie.plane);
    const Line line = line_of(s, c, mean, (float)spread, count);
    EACH(lie) normalize(out + at, mask ? mask + n * lie.bytes : 0, relu, lie.plane, line);
    widen(all, ends[0], ends[1], line);
}

static void normalize_small(const Norm *s, i64 c, Lie lie, const float *y, float *out, u8 *mask, int relu, Ends *all) {
    float from[FEW], to[FEW];
    u8 bits[FEW / 8 + 2];
    gather(lie, y, from);
    normalize_channel(s, c, (Lie){1, lie.planes * lie.plane, 0, 0}, from, to, mask ? bits : 0, relu, all);
    scatter(lie, to, out);
    if (mask) scatter_bits(lie, bits, mask);
}

/* What folding multiplies each channel by, weight / spread, and one in place of zero. */
EXPORT void eagerq_fold(const float *weight, const float *spread, float *factor, i64 n) {
    for (i64 c = 0; c < n; c++) {
        const float folded = weight[c] / spread[c];
        factor[c] = folded == 0 ? 1.0f : folded;
    }
}

/* Add to a batch norm's weight's gradient what comes through the factor, in two parts: nothing where that is zero. */
EXPORT void eagerq_fold_backward(const float *spread, const float *one, const float *other, i64 n, float *of_weight) {
    for (i64 c = 0; c < n; c++) of_weight[c] += (one[c] + other[c]) / spread[c];
}

/* A row of the mask for each plane; it starts on a byte. A mask goes with a ReLU. */
EXPORT void eagerq_batch_norm(const float *y, float *out, u8 *mask, int relu, const Norm *s) {
    const Lie lie = lie_of(s);
    float low = INFINITY, high = -INFINITY;
    int strange = 0;
#pragma omp parallel for schedule(static) reduction(min : low) reduction(max : high) reduction(| : strange) \
    if (s->channels * lie.planes * lie.plane > 2 * BLOCK)
    for (i64 c = 0; c < s->channels; c++) {
        const i64 at = c * lie.plane;
        u8 *bits = mask ? mask + c * ((lie.plane + 7) / 8) : 0;
        Ends all = {low, high, strange};
        (is_small(lie) ? normalize_small : normalize_channel)(s, c, lie, y + at, out + at, bits, relu, &all);
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

static inline void kept16(const float *grad, const u8 *mask, i64 i, Values *kept) {
    if (mask) masked16(grad + i, mask + i / 8, (float *)kept);
    else memcpy(kept, grad + i, sizeof *kept);
}

static inline float kept_one(const float *grad, const u8 *mask, i64 i) {
    return !mask || (mask[i / 8] >> (i % 8)) & 1 ? grad[i] : 0.0f;
}

/* Sums of the gradient where the bit is set (everywhere without bits), and of it times the distance from the centre. */
CLONES static void sums_of(const float *grad, const u8 *mask, const float *x, float centre, i64 n, double *sum,
                           double *with) {
    Values sums = {0}, products = {0}, g, values;
    const i64 whole = n / LANES * LANES;
    for (i64 i = 0; i < whole; i += LANES) {
        kept16(grad, mask, i, &g);
        memcpy(&values, x + i, sizeof values);
        sums += g;
        products += g * (values - centre);
    }
    for (i64 i = whole; i < n; i++) {
        const float one = kept_one(grad, mask, i);
        *sum += one, *with += one * (x[i] - centre);
    }
    for (int k = 0; k < LANES; k++) *sum += sums[k], *with += products[k];
}

/* of_x may be where x is */
CLONES static void back(const float *grad, const u8 *mask, const float *x, float *of_x, i64 n, Slope to) {
    const i64 whole = n / LANES * LANES;
    for (i64 i = 0; i < whole; i += LANES) {
        Values g, values;
        kept16(grad, mask, i, &g);
        memcpy(&values, x + i, sizeof values);
        values = (g - to.level - (values - to.centre) * to.part) * to.scale;
        memcpy(of_x + i, &values, sizeof values);
    }
    for (i64 i = whole; i < n; i++)
        of_x[i] = (kept_one(grad, mask, i) - to.level - (x[i] - to.centre) * to.part) * to.scale;
}

/* What a batch norm's gradient goes to. */
typedef struct { float *of_y, *of_factor, *of_weight, *of_bias; } Gradients;

/* Backward, of the channel c that lies at y. */
static void back_channel(const Norm *s, i64 c, Lie lie, const float *grad, const u8 *mask, const float *y, Gradients to) {
    const float centre = centre_of(s, c);
    double sum = 0, with = 0;
    EACH(lie) sums_of(grad + at, mask ? mask + n * lie.bytes : 0, y + at, centre, lie.plane, &sum, &with);
    const double count = (double)lie.planes * lie.plane;
    const Slope slope = slope_of(s, c, sum, with, count, to.of_factor, to.of_weight, to.of_bias);
    EACH(lie) back(grad + at, mask ? mask + n * lie.bytes : 0, y + at, to.of_y + at, lie.plane, slope);
}

static void back_small(const Norm *s, i64 c, Lie lie, const float *grad, const u8 *mask, const float *y, Gradients to) {
    float from[FEW], values[FEW], *of_y = to.of_y;
    if (mask) EACH(lie) eagerq_keep(grad + at, mask + n * lie.bytes, from + n * lie.plane, lie.plane);
    else gather(lie, grad, from);
    gather(lie, y, values);
    to.of_y = values;
    back_channel(s, c, (Lie){1, lie.planes * lie.plane, 0, 0}, from, 0, values, to);
    scatter(lie, values, of_y);
}

/* Gradients for y, factor, weight and bias; the division by the factor is in the constants. That for y may be where y
 * is. */
EXPORT void eagerq_batch_norm_backward(const float *grad, const float *y, const u8 *mask, float *of_y, float *of_factor,
                                       float *of_weight, float *of_bias, const Norm *s) {
    const Lie lie = lie_of(s);
#pragma omp parallel for schedule(static) if (s->channels * lie.planes * lie.plane > 2 * BLOCK)
    for (i64 c = 0; c < s->channels; c++) {
        const i64 at = c * lie.plane;
        const u8 *bits = mask ? mask + c * ((lie.plane + 7) / 8) : 0;
        const Gradients to = {of_y + at, of_factor, of_weight, of_bias};
        (is_small(lie) ? back_small : back_channel)(s, c, lie, grad + at, bits, y + at, to);
    }
}
