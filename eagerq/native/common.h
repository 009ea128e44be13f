/* What the C files share: how they are built for several processors, and how work is split.
 *
 * Plain C: pointers and numbers in, nothing of torch, so that one build serves every release.
 * Arithmetic is float32, rounded at each step as the plain formulas do (the build turns
 * contraction off; fmaf stands where they fuse). The OpenMP runtime is whichever torch has loaded.
 */
#ifndef EAGERQ_COMMON_H
#define EAGERQ_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define EXPORT __attribute__((visibility("default")))

enum { BLOCK = 8192 };
typedef int64_t i64;
typedef uint8_t u8;

#define BLOCKS(n) (((n) + BLOCK - 1) / BLOCK)
#define SPAN(block, n) ((n) - (block) * (i64)BLOCK < BLOCK ? (n) - (block) * (i64)BLOCK : BLOCK)

/* n bytes of 0 or 1, with room for eight more, to as many bits. */
static inline void pack(u8 *restrict flags, u8 *restrict bits, i64 n) {
    for (int k = 0; k < 8; k++) flags[n + k] = 0;
    for (i64 i = 0; i < n; i += 8) {
        uint64_t eight;
        memcpy(&eight, flags + i, 8);
        bits[i / 8] = (u8)((eight * 0x0102040810204080ull) >> 56);
    }
}

/* Sixteen values at a time, where compilers would take what is done to them one by one. */
typedef float Values __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));
typedef double Eight __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32)));

static const Words BITS = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                           1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};

/* The sixteen values whose bits are set, zero for the others. */
static inline void masked16(const float *values, const u8 *bits, float *kept) {
    const Words each = BITS & (bits[0] | bits[1] << 8);
    Words words;
    memcpy(&words, values, sizeof words);
    words &= each != 0;
    memcpy(kept, &words, sizeof words);
}

/* The smaller, or the larger, of two values each; what is there already stays where the other is not a number. */
static inline void take_least(Values *least, const Values *x) {
    const Words less = *x < *least;
    *least = (Values)((less & (Words)*x) | (~less & (Words)*least));
}

static inline void take_most(Values *most, const Values *x) {
    const Words more = *x > *most;
    *most = (Values)((more & (Words)*x) | (~more & (Words)*most));
}

/* Sums of sixteen values each, in double. */
typedef struct { Eight low, high; } Sums;

static inline void add16(Sums *sums, const Values *x) {
    Half halves[2];
    memcpy(halves, x, sizeof *x);
    sums->low += __builtin_convertvector(halves[0], Eight);
    sums->high += __builtin_convertvector(halves[1], Eight);
}

static inline double total(const Sums *sums) {
    double sum = 0;
    for (int k = 0; k < 8; k++) sum += sums->low[k];
    for (int k = 0; k < 8; k++) sum += sums->high[k];
    return sum;
}

#endif
