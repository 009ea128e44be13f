/* Rows of bytes or halves of bytes, each with a scale and a zero point, looked up and put together in bags.
 *
 * A product and a sum are rounded once, as torch's own sum of float rows has them.
 */
#include "common.h"

enum { WIDE = 64, AHEAD = 12 };

typedef struct {
    const u8 *bytes;
    i64 rows, columns, pitch; /* pitch: bytes from a row to the next */
    const float *scale, *zero;
    int halves; /* two values a byte, the first in the low half */
} Table;

typedef struct {
    const void *rows;
    i64 count;
    int wide; /* int64, not int32 */
} Indices;

enum { SUM, MEAN, MAX };

#define INLINE static inline __attribute__((always_inline))

INLINE i64 number(const void *list, i64 at, int wide) {
    return wide ? ((const i64 *)list)[at] : ((const int32_t *)list)[at];
}

/* Values from .. from + WIDE of a row; `spare` holds them where they have to be taken apart. */
INLINE const u8 *values(const u8 *row, i64 from, i64 count, int halves, u8 *restrict spare) {
    if (!halves) return row + from;
    row += from / 2;
    for (i64 i = 0; i < (count + 1) / 2; i++) {
        spare[2 * i] = row[i] & 15;
        spare[2 * i + 1] = row[i] >> 4;
    }
    return spare;
}

/* A row that is needed soon; no matter if it is none of the table's. */
INLINE void soon(const Table *t, i64 row) {
    const u8 *bytes = t->bytes + row * t->pitch;
    for (i64 at = 0; at < t->pitch; at += WIDE) __builtin_prefetch(bytes + at);
    __builtin_prefetch(t->scale + row);
    __builtin_prefetch(t->zero + row);
}

CLONES static void real_row(const Table *t, i64 row, float *restrict out) {
    const float zero = t->zero[row], scale = t->scale[row];
    u8 spare[WIDE];
    for (i64 from = 0; from < t->columns; from += WIDE) {
        const i64 count = t->columns - from < WIDE ? t->columns - from : WIDE;
        const u8 *q = values(t->bytes + row * t->pitch, from, count, t->halves, spare);
        for (i64 j = 0; j < count; j++) out[from + j] = ((float)q[j] - zero) * scale;
    }
}

/* Real rows one below the other; 1 where a row is not in the table. */
EXPORT int eagerq_embedding(const Table *t, const Indices *in, float *out) {
    int refused = 0;
#pragma omp parallel for schedule(static) reduction(| : refused) if (in->count * t->columns > 2 * BLOCK)
    for (i64 i = 0; i < in->count; i++) {
        const i64 row = number(in->rows, i, in->wide);
        if (i + AHEAD < in->count) soon(t, number(in->rows, i + AHEAD, in->wide));
        if ((uint64_t)row >= (uint64_t)t->rows) refused = 1;
        else real_row(t, row, out + i * t->columns);
    }
    return refused;
}

typedef struct {
    const float *each; /* a factor for each index, or null */
    i64 padding;
    int mode;
} How;

/* COUNT values of all rows of a bag, from those numbered `from` on; 1 where a row is not in the table. */
INLINE int part_of_bag(const int MOST, const int HALVES, const i64 COUNT, const Table *t, const Indices *in, i64 begin,
                       i64 end, i64 from, const How *how, float *restrict out) {
    const u8 *const bytes = t->bytes;
    const float *const scales = t->scale, *const zeros = t->zero, *const each = how->each;
    const i64 rows = t->rows, pitch = t->pitch, padding = how->padding, known = from ? 0 : in->count - AHEAD;
    const int wide = in->wide;
    u8 spare[WIDE];
    float total[WIDE] = {0};
    i64 seen = 0;
    for (i64 i = begin; i < end; i++) {
        const i64 row = number(in->rows, i, wide);
        if (i < known) soon(t, number(in->rows, i + AHEAD, wide));
        if ((uint64_t)row >= (uint64_t)rows) return 1;
        if (row == padding) continue;
        const float zero = zeros[row], scale = each ? scales[row] * each[i] : scales[row];
        const u8 *q = values(bytes + row * pitch, from, COUNT, HALVES, spare);
        if (MOST) for (i64 j = 0; j < COUNT; j++) {
            const float value = ((float)q[j] - zero) * scale;
            total[j] = !seen || value > total[j] ? value : total[j];
        }
        else for (i64 j = 0; j < COUNT; j++) total[j] = fmaf((float)q[j] - zero, scale, total[j]);
        seen++;
    }
    if (how->mode == MEAN && seen) for (i64 j = 0; j < COUNT; j++) total[j] /= (float)seen;
    for (i64 j = 0; j < COUNT; j++) out[from + j] = total[j];
    return 0;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* The same for whole bytes that are summed, WIDE of them: compilers widen bytes by way of 16 bits, at twice the price. */
__attribute__((target("avx512f"))) static int wide_part_of_bag(const Table *t, const Indices *in, i64 begin, i64 end,
                                                               i64 from, const How *how, float *restrict out) {
    const i64 rows = t->rows, known = from ? 0 : in->count - AHEAD;
    __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    i64 seen = 0;
    for (i64 i = begin; i < end; i++) {
        const i64 row = number(in->rows, i, in->wide);
        if (i < known) soon(t, number(in->rows, i + AHEAD, in->wide));
        if ((uint64_t)row >= (uint64_t)rows) return 1;
        if (row == how->padding) continue;
        const u8 *q = t->bytes + row * t->pitch + from;
        const __m512 zero = _mm512_set1_ps(t->zero[row]);
        const __m512 scale = _mm512_set1_ps(how->each ? t->scale[row] * how->each[i] : t->scale[row]);
        for (int v = 0; v < 4; v++) {
            const __m512i steps = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(q + v * 16)));
            total[v] = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(steps), zero), scale, total[v]);
        }
        seen++;
    }
    for (int v = 0; v < 4; v++) {
        if (how->mode == MEAN && seen) total[v] = _mm512_div_ps(total[v], _mm512_set1_ps((float)seen));
        _mm512_storeu_ps(out + from + v * 16, total[v]);
    }
    return 0;
}

static int has_wide(void) { return __builtin_cpu_supports("avx512f"); }
#else
#define wide_part_of_bag(...) 0
static int has_wide(void) { return 0; }
#endif

CLONES static int bag(const Table *t, const Indices *in, i64 begin, i64 end, const How *how, float *restrict out) {
    int refused = 0;
    for (i64 from = 0; from < t->columns; from += WIDE) {
        const i64 left = t->columns - from, count = left < WIDE ? left : WIDE;
        const int most = how->mode == MAX;
        if (most || count < WIDE) refused |= part_of_bag(most, t->halves, count, t, in, begin, end, from, how, out);
        else if (!t->halves && has_wide()) refused |= wide_part_of_bag(t, in, begin, end, from, how, out);
        else if (t->halves) refused |= part_of_bag(0, 1, WIDE, t, in, begin, end, from, how, out);
        else refused |= part_of_bag(0, 0, WIDE, t, in, begin, end, from, how, out);
    }
    return refused;
}

/* Each bag's rows put together. `starts` has `bags` numbers and may have the last bag's end besides; 1 where they are
 * out of order or a row is not in the table. */
EXPORT int eagerq_embedding_bag(const Table *t, const Indices *in, const Indices *starts, i64 bags, const float *each,
                                i64 padding, int mode, float *out) {
    const How how = {each, padding, mode};
    int refused = 0;
    for (i64 i = 0, last = 0; i < starts->count; i++) {
        const i64 start = number(starts->rows, i, starts->wide);
        if (start < last || start > in->count || (!i && start)) return 1;
        last = start;
    }
#pragma omp parallel for schedule(static) reduction(| : refused) if (in->count * t->columns > 2 * BLOCK)
    for (i64 i = 0; i < bags; i++) {
        const i64 begin = number(starts->rows, i, starts->wide);
        const i64 end = i + 1 < starts->count ? number(starts->rows, i + 1, starts->wide) : in->count;
        refused |= bag(t, in, begin, end, &how, out + i * t->columns);
    }
    return refused;
}
