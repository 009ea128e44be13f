/* What batch norm does with a channel's sums, whatever the order of the values in memory. */
#ifndef EAGERQ_NORMALIZING_H
#define EAGERQ_NORMALIZING_H

#include <float.h>

#include "common.h"

typedef struct {
    i64 batch, channels, plane;
    const float *factor, *weight, *bias;
    float *running_mean, *running_var, *mean, *inverse;
    float *ends; /* of all that comes out; NaN if any of it is */
    double eps, pace;
} Norm;

/* The gradient where the bit is set, else 0. */
void eagerq_keep(const float *restrict grad, const u8 *restrict mask, float *restrict out, i64 n);

/* A value comes out as fmaf(value, scale, shift). */
typedef struct { float scale, shift; } Line;

/* The ends of all that comes out. */
typedef struct { float low, high; int strange; } Ends;

/* Forward, from the mean and the sum of squared distances from it; rounded as torch's CPU kernels do. */
static inline Line line_of(const Norm *s, i64 c, float mean, float total, double count) {
    const float variance = total / (float)count, unbiased = total / (float)(count - 1), pace = (float)s->pace;
    const float inverse = variance + s->eps > 0 ? (float)(1.0 / sqrt(variance + s->eps)) : 0.0f;
    const float scale = inverse * s->weight[c];
    s->running_mean[c] = pace * mean + (1 - pace) * s->running_mean[c];
    s->running_var[c] = fmaf(pace, unbiased, (1 - pace) * s->running_var[c]);
    s->mean[c] = mean, s->inverse[c] = inverse;
    return (Line){scale, fmaf(-mean, scale, s->bias[c])};
}

/* Rounding keeps the order, so a channel's ends come out as its ends; one odd value has made its mean odd. */
static inline void widen(Ends *all, float least, float most, Line line) {
    const float one = fmaf(least, line.scale, line.shift), other = fmaf(most, line.scale, line.shift);
    all->strange |= one != one || other != other;
    all->low = one < all->low ? one : all->low, all->low = other < all->low ? other : all->low;
    all->high = one > all->high ? one : all->high, all->high = other > all->high ? other : all->high;
}

static inline void tell_ends(const Norm *s, Ends all, int relu) {
    s->ends[0] = all.strange ? NAN : relu && all.low < 0 ? 0.0f : all.low;
    s->ends[1] = all.strange ? NAN : relu && all.high < 0 ? 0.0f : all.high;
}

/* A value's gradient is (gradient - level - (value - centre) · part) · scale; values are yet to be divided. */
typedef struct { float centre, part, level, scale; } Slope;

static inline float centre_of(const Norm *s, i64 c) { return (float)(s->mean[c] * (double)s->factor[c]); }

/* Backward, from the sums of the gradient and of the gradient times the distance from the centre. */
static inline Slope slope_of(const Norm *s, i64 c, double sum, double with, double count, float *of_factor,
                             float *of_weight, float *of_bias) {
    const double factor = s->factor[c], inverse = s->inverse[c], weight = s->weight[c];
    with /= factor;
    /* of a channel scaled by next to nothing no distance is left: not to multiply that by infinity */
    const double most = FLT_MAX, share = with * inverse * inverse / count / factor;
    of_bias[c] = (float)sum;
    of_weight[c] = (float)(with * inverse);
    /* what a larger factor does to the quotients, their own mean and variance take back, but for eps */
    of_factor[c] = (float)(-with * inverse * weight * inverse * inverse * s->eps / factor);
    return (Slope){centre_of(s, c), (float)(share > most ? most : share < -most ? -most : share), (float)(sum / count),
                   (float)(inverse * weight / factor)};
}

#endif
