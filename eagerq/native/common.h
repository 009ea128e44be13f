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

/* The sixteen values whose bits are set, zero for the others. */
static inline void masked16(const float *values, const u8 *bits, float *kept) {
    uint32_t each = bits[0] | (uint32_t)bits[1] << 8, words[16];
    memcpy(words, values, sizeof words);
    for (int k = 0; k < 16; k++) words[k] &= 0u - ((each >> k) & 1u);
    memcpy(kept, words, sizeof words);
}

#endif
