/* Sums of products of bytes to bytes: what convolutions and linear layers have in common.
 *
 * Sums are exact (int32, by the processor's products of four bytes); what follows is float32, rounded at each
 * step as eagerq.kernels.reference does. Without AVX-512 VNNI none of this is compiled in or called.
 */
#ifndef EAGERQ_REQUANTIZE_H
#define EAGERQ_REQUANTIZE_H

#include <stdlib.h>

#include "common.h"

/* The sizes and numbers of a call; sizes of the input, then of the output, then of the window. */
typedef struct {
    i64 batch, channels, height, width, outputs, rows, columns;
    i64 taps_y, taps_x, every_y, every_x, pad_y, pad_x, step_y, step_x;
    int32_t x_zero, is_signed, to_signed, to_real; /* to_real: float32, nothing requantized */
    float x_scale, inverse, zero, low, high;
} Conv;

/* What a layer knows by heart: the weight as packed by eagerq.native.conv, the sum of each channel's weights. */
typedef struct {
    const int8_t *weight;
    const int32_t *sums, *zeros; /* zeros: the weight's zero points, or null where all are 0 */
    const float *scale, *bias;   /* these four for whole vectors of outputs, zeros at their end */
} Layer;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9
#define HAS_VNNI
#include <immintrin.h>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define INLINE VNNI static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* What all results of a call have in common, in registers. */
typedef struct {
    __m512 x_scale, inverse, zero, high;
    __m512i least, most, order;
    int to_signed;
} Rounding;

INLINE Rounding rounding(const Conv *c) {
    const Rounding shared = {
        _mm512_set1_ps(c->x_scale), _mm512_set1_ps(c->inverse), _mm512_set1_ps(c->zero), _mm512_set1_ps(c->high),
        _mm512_set1_epi8((char)(int)c->low), _mm512_set1_epi8((char)(int)c->high),
        /* the four outputs that each vector gives to a lane, side by side */
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), c->to_signed,
    };
    return shared;
}

/* What is known of results: that they may lie beyond int32; nothing; that they need no zero point (as behind ReLU,
 * which is most of them) and no bounds but those of unsigned bytes. */
enum { FAR, NEAR, PLAIN };

static inline int is_plain(const Conv *c) { return !c->to_signed && c->zero == 0 && c->low == 0 && c->high == 255; }

/* Sixteen sums to integers of the output: round(((sum * x_scale) * scale + bias) * inverse + zero), to be clamped;
 * of FAR ones, what is far too low stays low by itself. */
INLINE __m512i requantized(const int KNOWN, __m512i total, __m512 scale, __m512 bias, const Rounding *shared) {
    __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), shared->x_scale), scale);
    y = _mm512_mul_ps(_mm512_add_ps(y, bias), shared->inverse);
    if (KNOWN < PLAIN) y = _mm512_add_ps(y, shared->zero);
    return _mm512_cvtps_epi32(KNOWN == FAR ? _mm512_min_ps(y, shared->high) : y);
}

/* Four vectors of integers to bytes, clamped and in their order. */
INLINE __m512i packed(const int KNOWN, const __m512i *steps, const Rounding *shared) {
    const __m512i low = _mm512_packs_epi32(steps[0], steps[1]), high = _mm512_packs_epi32(steps[2], steps[3]);
    __m512i bytes;
    if (KNOWN == PLAIN) bytes = _mm512_packus_epi16(low, high);
    else if (shared->to_signed) {
        bytes = _mm512_max_epi8(_mm512_packs_epi16(low, high), shared->least);
        bytes = _mm512_min_epi8(bytes, shared->most);
    } else {
        bytes = _mm512_max_epu8(_mm512_packus_epi16(low, high), shared->least);
        bytes = _mm512_min_epu8(bytes, shared->most);
    }
    return _mm512_permutexvar_epi32(shared->order, bytes);
}

/* The first `left` of 64 bytes: masks only where they must be, since some processors store slowly through them. */
INLINE void put(u8 *to, __m512i bytes, i64 left) {
    if (left >= 64) _mm512_storeu_si512(to, bytes);
    else if (left == 32) _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(bytes));
    else if (left == 16) _mm_storeu_si128((__m128i *)to, _mm512_castsi512_si128(bytes));
    else if (left == 48) {
        _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(bytes));
        _mm_storeu_si128((__m128i *)(to + 32), _mm512_extracti32x4_epi32(bytes, 2));
    } else if (left == 24) {
        _mm_storeu_si128((__m128i *)to, _mm512_castsi512_si128(bytes));
        _mm_storel_epi64((__m128i *)(to + 16), _mm512_extracti32x4_epi32(bytes, 1));
    } else _mm512_mask_storeu_epi8(to, (1ull << left) - 1, bytes);
}

/* Whether no result can lie beyond int32, whatever the bytes. */
VNNI static inline int is_bounded(i64 products, i64 outputs, const Layer *layer, const Conv *c) {
    const __m512i sign = _mm512_set1_epi32(INT32_MAX);
    __m512i most_scale = _mm512_setzero_si512(), most_bias = most_scale;
    for (i64 at = 0; at < outputs; at += 16) { /* as integers, so that what is not a number is the greatest */
        most_scale = _mm512_max_epi32(most_scale, _mm512_and_si512(_mm512_loadu_si512(layer->scale + at), sign));
        most_bias = _mm512_max_epi32(most_bias, _mm512_and_si512(_mm512_loadu_si512(layer->bias + at), sign));
    }
    const int32_t bits[2] = {_mm512_reduce_max_epi32(most_scale), _mm512_reduce_max_epi32(most_bias)};
    float most[2];
    memcpy(most, bits, sizeof most);
    const double sum = 255.0 * 255.0 * (double)products * fabs(c->x_scale);
    return (sum * most[0] + most[1]) * fabs(c->inverse) + fabs(c->zero) < 2e9;
}

#endif
#endif
