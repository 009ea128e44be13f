/* What stands between the products of an int8 network: bytes made real, reals made bytes by their own range, tables of
 * functions, layer norm. The formulas are those of eagerq.kernels, whose float64 steps are float64 here. */
#include "common.h"

static inline float real(u8 byte, int is_signed) { return (float)(is_signed ? (int8_t)byte : (int)byte); }

CLONES static void dequantize_block(const u8 *restrict q, float *restrict out, i64 n, float zero, float scale, int is_signed) {
    if (is_signed) for (i64 i = 0; i < n; i++) out[i] = (real(q[i], 1) - zero) * scale;
    else for (i64 i = 0; i < n; i++) out[i] = (real(q[i], 0) - zero) * scale;
}

EXPORT void eagerq_dequantize(const u8 *q, float *out, i64 n, float zero, float scale, int is_signed) {
#pragma omp parallel for schedule(static) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        const i64 at = block * BLOCK;
        dequantize_block(q + at, out + at, SPAN(block, n), zero, scale, is_signed);
    }
}

EXPORT void eagerq_look_up(const u8 *x, const u8 *table, u8 *out, i64 n) {
#pragma omp parallel for schedule(static) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        const i64 at = block * BLOCK, end = at + SPAN(block, n);
        for (i64 i = at; i < end; i++) out[i] = table[x[i]];
    }
}

/* Least and greatest, zero among them, as sixteen of each go along; what is not a finite number shows in `odd`. */
CLONES static void range_block(const float *restrict x, i64 n, float *least, float *most, int *odd) {
    float low = 0, high = 0;
    uint32_t infinite = 0;
    for (i64 i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        infinite |= (uint32_t)((bits & 0x7f800000u) == 0x7f800000u);
    }
#pragma omp simd reduction(min : low) reduction(max : high)
    for (i64 i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    *least = low;
    *most = high;
    *odd = (int)infinite;
}

CLONES static void steps_block(const float *restrict x, u8 *restrict out, i64 n, float inverse, float zero) {
    for (i64 i = 0; i < n; i++) {
        float steps = rintf(x[i] * inverse + zero);
        steps = steps < 0.0f ? 0.0f : steps;
        steps = steps > 255.0f ? 255.0f : steps;
        out[i] = (u8)(int)steps;
    }
}

/* As eagerq.functional.dynamic_qparams; the scale as its inverse's inverse. */
static void parameters(float low, float high, int most, float *scale, int *zero) {
    const double smallest = (double)6.1e-5f;
    double exact = ((double)high - (double)low) / most;
    if (isinf(1.0f / (float)exact)) exact = 0.1;
    const double floor = exact < smallest ? smallest : exact;
    const float stretch = (float)floor / (float)exact;
    const double below = (double)(low * stretch) / floor, above = (double)(high * stretch) / floor;
    double chosen = fabs(below) < most + fabs(above) ? -below : most - above;
    chosen = chosen < 0 ? 0 : chosen;
    chosen = chosen > most ? most : chosen;
    *zero = (int)rint(chosen);
    *scale = (float)(1.0 / (double)(float)(1.0 / floor));
}

/* Reals to bytes by their own range; 1, and nothing done, where they are not all finite. */
EXPORT int eagerq_quantize_dynamic(const float *x, u8 *out, i64 n, int most, float *scale, int *zero) {
    float low = 0, high = 0;
    int odd = 0;
#pragma omp parallel for schedule(static) reduction(min : low) reduction(max : high) reduction(| : odd) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        float least, greatest;
        int infinite;
        range_block(x + block * BLOCK, SPAN(block, n), &least, &greatest, &infinite);
        low = least < low ? least : low;
        high = greatest > high ? greatest : high;
        odd |= infinite;
    }
    if (odd) return 1;
    parameters(low, high, most, scale, zero);
    const float inverse = (float)(1.0 / (double)*scale);
#pragma omp parallel for schedule(static) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        const i64 at = block * BLOCK;
        steps_block(x + at, out + at, SPAN(block, n), inverse, (float)*zero);
    }
    return 0;
}

typedef struct {
    i64 count; /* values of a line */
    const float *weight, *bias;
    double eps;
    float x_scale, x_zero, factor, zero, low, high;
    int x_signed;
} Norm;

CLONES static void norm_line(const u8 *restrict x, u8 *restrict out, const Norm *p) {
    const i64 n = p->count;
    i64 total = 0, squares = 0;
    for (i64 block = 0; block < BLOCKS(n); block++) {
        int32_t part = 0, part_squares = 0; /* a block's squares fit */
        for (i64 i = block * BLOCK; i < block * BLOCK + SPAN(block, n); i++) {
            const int32_t value = p->x_signed ? (int8_t)x[i] : x[i];
            part += value;
            part_squares += value * value;
        }
        total += part;
        squares += part_squares;
    }
    const double size = (double)(float)n, scale = (double)p->x_scale;
    const float mean = (float)((double)(float)(double)total / size);
    const double square = (double)(float)((double)(float)(double)squares / size);
    float variance = (float)(square - (double)mean * (double)mean);
    variance = variance < 0 ? 0 : variance;
    const double middle = (double)total / (double)n;
    double exact = (double)squares / (double)n - middle * middle;
    exact = (exact < 0 ? 0 : exact) * (scale * scale);
    const int cancelled = square * (scale * scale) > 16384.0 * (exact + p->eps);
    const double spread = cancelled ? exact : (double)(variance * p->x_scale * p->x_scale);
    const float factor = (float)(scale / sqrt(spread + p->eps)), off = mean - p->x_zero;
    for (i64 i = 0; i < n; i++) {
        float y = (real(x[i], p->x_signed) - p->x_zero - off) * factor;
        if (p->weight || p->bias) {
            double wide = (double)y;
            if (p->weight) wide *= (double)p->weight[i];
            if (p->bias) wide += (double)p->bias[i];
            y = (float)wide;
        }
        float steps = rintf(y * p->factor) + p->zero;
        steps = steps < p->low ? p->low : steps;
        steps = steps > p->high ? p->high : steps;
        out[i] = (u8)(int)steps;
    }
}

EXPORT void eagerq_layer_norm(const u8 *x, u8 *out, i64 lines, const Norm *p) {
#pragma omp parallel for schedule(static) if (lines * p->count > 2 * BLOCK)
    for (i64 line = 0; line < lines; line++) norm_line(x + line * p->count, out + line * p->count, p);
}
