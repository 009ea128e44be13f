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

static void look_up_block(const u8 *x, u8 *out, i64 n, const u8 *table) {
    for (i64 i = 0; i < n; i++) out[i] = table[x[i]];
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9
#include <immintrin.h>

/* The table in four registers: bits 0 to 6 of a byte choose within two of them, bit 7 which two. */
__attribute__((target("avx512f,avx512bw,avx512vbmi")))
static void look_up_vectors(const u8 *x, u8 *out, i64 n, const u8 *table) {
    const __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
    const __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
    for (i64 i = 0; i < n; i += 64) {
        const __mmask64 some = n - i >= 64 ? ~0ull : (1ull << (n - i)) - 1;
        const __m512i index = _mm512_maskz_loadu_epi8(some, x + i);
        const __m512i low = _mm512_permutex2var_epi8(a, index, b), high = _mm512_permutex2var_epi8(c, index, d);
        const __m512i found = _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
        if (n - i >= 64) _mm512_storeu_si512(out + i, found);
        else _mm512_mask_storeu_epi8(out + i, some, found);
    }
}

static int has_byte_tables(void) { return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw"); }
#else
#define look_up_vectors look_up_block
static int has_byte_tables(void) { return 0; }
#endif

EXPORT void eagerq_look_up(const u8 *x, u8 *out, const u8 *table, i64 n) {
    const int vectors = has_byte_tables();
#pragma omp parallel for schedule(static) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        const i64 at = block * BLOCK;
        if (vectors) look_up_vectors(x + at, out + at, SPAN(block, n), table);
        else look_up_block(x + at, out + at, SPAN(block, n), table);
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
