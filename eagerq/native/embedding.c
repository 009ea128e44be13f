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

static inline i64 number(const void *list, i64 at, int wide) {
    return wide ? ((const i64 *)list)[at] : ((const int32_t *)list)[at];
}

/* Values from .. from + WIDE of a row; `spare` holds them where they have to be taken apart. */
static inline const u8 *values(const Table *t, i64 row, i64 from, i64 count, u8 *restrict spare) {
    const u8 *bytes = t->bytes + row * t->pitch;
    if (!t->halves) return bytes + from;
    bytes += from / 2;
    for (i64 i = 0; i < (count + 1) / 2; i++) {
        spare[2 * i] = bytes[i] & 15;
        spare[2 * i + 1] = bytes[i] >> 4;
    }
    return spare;
}

static inline void soon(const Table *t, const Indices *in, i64 at) {
    if (at >= in->count) return;
    const i64 row = number(in->rows, at, in->wide);
    __builtin_prefetch(t->bytes + row * t->pitch);
    __builtin_prefetch(t->scale + row);
    __builtin_prefetch(t->zero + row);
}

static int outside(const Indices *in, i64 rows) {
    int any = 0;
    if (in->wide) for (i64 i = 0; i < in->count; i++) any |= (uint64_t)((const i64 *)in->rows)[i] >= (uint64_t)rows;
    else for (i64 i = 0; i < in->count; i++) any |= number(in->rows, i, 0) < 0 || number(in->rows, i, 0) >= rows;
    return any;
}

CLONES static void real_row(const Table *t, i64 row, float *restrict out) {
    const float zero = t->zero[row], scale = t->scale[row];
    u8 spare[WIDE];
    for (i64 from = 0; from < t->columns; from += WIDE) {
        const i64 count = t->columns - from < WIDE ? t->columns - from : WIDE;
        const u8 *q = values(t, row, from, count, spare);
        for (i64 j = 0; j < count; j++) out[from + j] = ((float)q[j] - zero) * scale;
    }
}

/* Real rows one below the other; nothing and 1 where a row is not in the table. */
EXPORT int eagerq_embedding(const Table *t, const Indices *in, float *out) {
    if (outside(in, t->rows)) return 1;
#pragma omp parallel for schedule(static) if (in->count * t->columns > 2 * BLOCK)
    for (i64 i = 0; i < in->count; i++) {
        soon(t, in, i + AHEAD);
        real_row(t, number(in->rows, i, in->wide), out + i * t->columns);
    }
    return 0;
}

#define ROWS_OF_THE_BAG(COUNT, STEP)                                                       \
    for (i64 i = begin; i < end; i++) {                                                    \
        const i64 row = number(in->rows, i, in->wide);                                     \
        if (!from) soon(t, in, i + AHEAD);                                                 \
        if (row == padding) continue;                                                      \
        const float zero = t->zero[row], scale = each ? t->scale[row] * each[i] : t->scale[row]; \
        const u8 *q = values(t, row, from, COUNT, spare);                                  \
        for (i64 j = 0; j < COUNT; j++) STEP;                                              \
        seen++;                                                                            \
    }

#define ADD total[j] = fmaf((float)q[j] - zero, scale, total[j])
#define KEEP                                                     \
    {                                                            \
        float value = ((float)q[j] - zero) * scale;              \
        total[j] = !seen || value > total[j] ? value : total[j]; \
    }

CLONES static void bag(const Table *t, const Indices *in, i64 begin, i64 end, const float *each, i64 padding, int mode,
                       float *restrict out) {
    u8 spare[WIDE];
    for (i64 from = 0; from < t->columns; from += WIDE) {
        const i64 count = t->columns - from < WIDE ? t->columns - from : WIDE;
        float total[WIDE] = {0};
        i64 seen = 0;
        if (mode == MAX) ROWS_OF_THE_BAG(count, KEEP)
        else if (count == WIDE) ROWS_OF_THE_BAG(WIDE, ADD)
        else ROWS_OF_THE_BAG(count, ADD)
        if (mode == MEAN && seen) for (i64 j = 0; j < count; j++) total[j] /= (float)seen;
        for (i64 j = 0; j < count; j++) out[from + j] = total[j];
    }
}

/* Each bag's rows put together. `starts` has `bags` numbers and may have the last bag's end besides; nothing and 1
 * where they are out of order or a row is not in the table. */
EXPORT int eagerq_embedding_bag(const Table *t, const Indices *in, const Indices *starts, i64 bags, const float *each,
                                i64 padding, int mode, float *out) {
    i64 last = 0;
    for (i64 i = 0; i < starts->count; i++) {
        const i64 start = number(starts->rows, i, starts->wide);
        if (start < last || start > in->count || (!i && start)) return 1;
        last = start;
    }
    if (outside(in, t->rows)) return 1;
#pragma omp parallel for schedule(static) if (in->count * t->columns > 2 * BLOCK)
    for (i64 i = 0; i < bags; i++) {
        const i64 begin = number(starts->rows, i, starts->wide);
        const i64 end = i + 1 < starts->count ? number(starts->rows, i + 1, starts->wide) : in->count;
        bag(t, in, begin, end, each, padding, mode, out + i * t->columns);
    }
    return 0;
}
