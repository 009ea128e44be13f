/* Sums and products of two quantized values, requantized: the numbers of eagerq.kernels.reference. */
#ifndef EAGERQ_PAIRS_H
#define EAGERQ_PAIRS_H

#include "common.h"

static inline float real(u8 byte, int is_signed) { return (float)(is_signed ? (int8_t)byte : (int)byte); }

static inline u8 stored(float steps, float low, float high) {
    steps = steps < low ? low : steps;
    steps = steps > high ? high : steps;
    return (u8)(int)steps;
}

/* What to add to an operand: of a sum, after its scale; of a product, which has none, minus its zero point. */
typedef struct Pair {
    int a_signed, b_signed;
    float a_scale, a_shift, b_scale, b_shift, factor, zero, low, high;
} Pair;

static inline u8 sum(u8 a, u8 b, int a_signed, int b_signed, const Pair *p) {
    const float total = fmaf(real(a, a_signed), p->a_scale, p->a_shift) + fmaf(real(b, b_signed), p->b_scale, p->b_shift);
    return stored(rintf(total * p->factor) + p->zero, p->low, p->high);
}

static inline u8 product(u8 a, u8 b, int a_signed, int b_signed, const Pair *p) {
    const float both = (real(a, a_signed) + p->a_shift) * (real(b, b_signed) + p->b_shift);
    return stored(rintf(both * p->factor) + p->zero, p->low, p->high);
}

#endif
