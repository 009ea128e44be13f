/* Weights of windows of nine, rounded into channels_last, and their gradients back from there, sixteen channels at a time
 * in registers: the same numbers as by the plain loops, which turn a row in memory. */
#ifndef EAGERQ_NINE_H
#define EAGERQ_NINE_H

#include "common.h"

enum { TAPS = 9, CHANNELS = 16 };

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f")))

static int serves_nine(i64 taps, i64 width) {
    return taps == TAPS && width % (TAPS * CHANNELS) == 0 && __builtin_cpu_supports("avx512f");
}

/* Nine is odd: sixteen channels' values of one tap lie in as many different lanes of their nine vectors, every ninth from
 * some lane on. So masks put them together, and one permutation sets them in order; or the other way round. */
#define EVERY_NINTH(tap, vector) ((__mmask16)(0x201u << (((tap) + 2 * (vector)) % TAPS)))

AVX512 static inline __m512i times_nine(int plus) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_add_epi32(lane, _mm512_slli_epi32(lane, 3)), _mm512_set1_epi32(plus));
}

/* A row of channels of taps, rounded as fake_block does, to taps of channels. */
AVX512 static void round_nine(const float *restrict x, float factor, float *restrict out, u8 *restrict mask, i64 width,
                              float scale, float zero, float low, float high) {
    const __m512 by = _mm512_set1_ps(factor), inverse = _mm512_set1_ps(1.0f / scale), step = _mm512_set1_ps(scale);
    const __m512 origin = _mm512_set1_ps(zero), least = _mm512_set1_ps(low), most = _mm512_set1_ps(high);
    const i64 channels = width / TAPS;
    for (i64 at = 0; at < width; at += TAPS * CHANNELS) {
        __m512 rounded[TAPS];
#pragma GCC unroll 9
        for (int k = 0; k < TAPS; k++) {
            const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + at + k * 16), by), inverse);
            const __m512 steps = _mm512_add_ps(_mm512_roundscale_ps(scaled, _MM_FROUND_CUR_DIRECTION), origin);
            const __m512 kept = _mm512_min_ps(most, _mm512_max_ps(least, steps));
            if (mask) {
                const __mmask16 inside = _mm512_cmp_ps_mask(kept, steps, _CMP_EQ_OQ);
                memcpy(mask + at / 8 + k * 2, &inside, 2);
            }
            rounded[k] = _mm512_mul_ps(_mm512_sub_ps(kept, origin), step);
        }
#pragma GCC unroll 9
        for (int j = 0; j < TAPS; j++) {
            __m512 tap = rounded[0];
#pragma GCC unroll 9
            for (int k = 1; k < TAPS; k++) tap = _mm512_mask_mov_ps(tap, EVERY_NINTH(j, k), rounded[k]);
            _mm512_storeu_ps(out + j * channels + at / TAPS, _mm512_permutexvar_ps(times_nine(j), tap));
        }
    }
}

/* masked_block on a row of taps of channels, to channels of taps; without x, the result is 0. */
AVX512 static double masked_nine(const float *restrict grad, const u8 *restrict mask, const float *restrict x,
                                 float factor, float *restrict out, i64 width) {
    const __m512 by = _mm512_set1_ps(factor);
    const i64 channels = width / TAPS;
    __m512 sums = _mm512_setzero_ps();
    for (i64 at = 0; at < width; at += TAPS * CHANNELS) {
        __m512 taps[TAPS];
#pragma GCC unroll 9
        for (int j = 0; j < TAPS; j++)
            taps[j] = _mm512_permutexvar_ps(times_nine(-TAPS * j), _mm512_loadu_ps(grad + j * channels + at / TAPS));
#pragma GCC unroll 9
        for (int k = 0; k < TAPS; k++) {
            __m512 turned = taps[0];
            __mmask16 inside;
#pragma GCC unroll 9
            for (int j = 1; j < TAPS; j++) turned = _mm512_mask_mov_ps(turned, EVERY_NINTH(j, k), taps[j]);
            memcpy(&inside, mask + at / 8 + k * 2, 2);
            const __m512 kept = _mm512_maskz_mov_ps(inside, turned);
            if (x) sums = _mm512_add_ps(sums, _mm512_mul_ps(kept, _mm512_loadu_ps(x + at + k * 16)));
            _mm512_storeu_ps(out + at + k * 16, _mm512_mul_ps(kept, by));
        }
    }
    float each[16];
    double sum = 0;
    _mm512_storeu_ps(each, sums);
    for (int k = 0; k < 16; k++) sum += each[k];
    return sum;
}
#else
static int serves_nine(i64 taps, i64 width) { return 0; }
#define round_nine(...) ((void)0)
#define masked_nine(...) 0.0
#endif

#endif
