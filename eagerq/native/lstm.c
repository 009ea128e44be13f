/* An LSTM of bytes through time: its recurrent products, and all that stands between them. */
#include "pairs.h"

enum { WIDE = 256 };

/* One direction of one layer. Gates lie side by side: input, forget, cell, output. */
typedef struct {
    const void *layer, *product; /* the recurrent weight, and the sizes and numbers of its product */
    const u8 *x, *h;             /* the input's part of all gates [steps, rows, 4, hidden]; [rows, hidden] before */
    u8 *y, *c, *sums;            /* [steps, rows, hidden]; [rows, hidden], written over; room for a step's product */
    const u8 *answers;           /* to each byte: of the four gates, and of the cell state's tangent */
    Pair gates, kept, added, cell, shown;
    i64 rows, hidden, steps;
} Sequence;

void eagerq_linear(const u8 *x, u8 *out, const void *layer, const void *product);

CLONES static void add_line(const u8 *restrict a, const u8 *restrict b, u8 *restrict out, i64 n, const Pair *p) {
    for (i64 i = 0; i < n; i++) out[i] = sum(a[i], b[i], 0, 0, p);
}

CLONES static void mul_line(const u8 *restrict a, const u8 *restrict b, u8 *restrict out, i64 n, const Pair *p) {
    for (i64 i = 0; i < n; i++) out[i] = product(a[i], b[i], 0, 0, p);
}

static void answer(const u8 *table, u8 *values, i64 n) {
    for (i64 i = 0; i < n; i++) values[i] = table[values[i]];
}

/* n values of a row, whose gates are `apart`. */
static void line(const Sequence *s, const u8 *x, const u8 *sums, u8 *c, u8 *y, i64 apart, i64 n) {
    u8 gates[4][WIDE], kept[WIDE], added[WIDE];
    for (i64 gate = 0; gate < 4; gate++) {
        add_line(x + gate * apart, sums + gate * apart, gates[gate], n, &s->gates);
        answer(s->answers + gate * 256, gates[gate], n);
    }
    mul_line(gates[1], c, kept, n, &s->kept);
    mul_line(gates[0], gates[2], added, n, &s->added);
    add_line(kept, added, c, n, &s->cell);
    memcpy(kept, c, n);
    answer(s->answers + 4 * 256, kept, n);
    mul_line(gates[3], kept, y, n, &s->shown);
}

EXPORT void eagerq_lstm(const Sequence *s) {
    const i64 n = s->hidden, lines = (n + WIDE - 1) / WIDE;
    const u8 *h = s->h, *x = s->x;
    u8 *y = s->y;
    for (i64 step = 0; step < s->steps; step++) {
        eagerq_linear(h, s->sums, s->layer, s->product);
#pragma omp parallel for collapse(2) schedule(static) if (s->rows * n > BLOCK)
        for (i64 row = 0; row < s->rows; row++)
            for (i64 part = 0; part < lines; part++) {
                const i64 at = part * WIDE, from = row * n + at, gates = row * 4 * n + at;
                line(s, x + gates, s->sums + gates, s->c + from, y + from, n, n - at < WIDE ? n - at : WIDE);
            }
        h = y;
        x += s->rows * 4 * n;
        y += s->rows * n;
    }
}
