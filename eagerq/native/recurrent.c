/* Steps in time of LSTM and GRU, apart from the sigmoids and tangents: those are torch's own, called in between. */
#include "common.h"

/* One direction of one layer. What a step reads and writes lies in [rows, hidden] blocks; the gates, whose rows are
 * `pitch` apart, in the order in which they are summed or, for LSTM, input, forget, output, cell. */
typedef struct {
    const void *layer, *product; /* the recurrent weight, and the sizes of its product */
    const float *x;              /* of this step: the input's part of all gates */
    float *y;                    /* of this step: the hidden state after it */
    float *h, *c, *sums, *gates, *bent; /* bent: what is given to the tangent, and comes back from it */
    u8 *bytes;
    i64 rows, hidden, pitch, apart; /* apart: from one gate to the next */
    i64 forward, left;              /* rows from one step to the next, below zero in reverse; steps still to go */
    int is_lstm, most;
} Recurrence;

int eagerq_linear_dynamic(const float *x, u8 *bytes, u8 *out, int most, const void *layer, const void *product);

#define ROWS(p) _Pragma("omp parallel for schedule(static) if (p->rows * p->hidden > 2 * BLOCK)") \
    for (i64 row = 0; row < p->rows; row++)

CLONES static void sum_line(const float *restrict a, const float *restrict b, float *restrict out, i64 n) {
    for (i64 i = 0; i < n; i++) out[i] = a[i] + b[i];
}

CLONES static void cell_line(const float *in, const float *forget, const float *new, float *restrict c, i64 n) {
    for (i64 i = 0; i < n; i++) {
        const float kept = forget[i] * c[i], added = in[i] * new[i];
        c[i] = kept + added;
    }
}

CLONES static void new_line(const float *x, const float *h, const float *reset, float *restrict out, i64 n) {
    for (i64 i = 0; i < n; i++) {
        const float part = h[i] * reset[i];
        out[i] = x[i] + part;
    }
}

CLONES static void shown_line(const float *show, const float *bent, float *restrict h, float *restrict y, i64 n) {
    for (i64 i = 0; i < n; i++) h[i] = y[i] = show[i] * bent[i];
}

CLONES static void updated_line(const float *update, const float *new, float *restrict h, float *restrict y, i64 n) {
    for (i64 i = 0; i < n; i++) {
        const float part = (h[i] - new[i]) * update[i];
        h[i] = y[i] = part + new[i];
    }
}

/* Gates before their sigmoids and tangents. 1, and nothing done, where the hidden state is not all finite. */
EXPORT int eagerq_recur_gates(const Recurrence *p) {
    static const int SLOTS[] = {0, 1, 3, 2};
    const i64 n = p->hidden, all = p->is_lstm ? 4 : 3;
    if (eagerq_linear_dynamic(p->h, p->bytes, (u8 *)p->sums, p->most, p->layer, p->product)) return 1;
    ROWS(p) for (i64 gate = 0; gate < (p->is_lstm ? 4 : 2); gate++) {
        const i64 from = row * all * n + gate * n;
        sum_line(p->sums + from, p->x + from, p->gates + SLOTS[gate] * p->apart + row * p->pitch, n);
    }
    return 0;
}

/* After the gates' sigmoids (and an LSTM's one tangent): an LSTM's cell state, or what a GRU's tangent is of. */
EXPORT void eagerq_recur_middle(const Recurrence *p) {
    const i64 n = p->hidden;
    ROWS(p) {
        const float *gate = p->gates + row * p->pitch;
        const i64 new = row * 3 * n + 2 * n;
        if (p->is_lstm) cell_line(gate, gate + p->apart, gate + 3 * p->apart, p->c + row * n, n);
        else new_line(p->x + new, p->sums + new, gate, p->bent + row * n, n);
    }
}

/* After the tangent: the hidden state, and the gates of the next step if there is one; as `eagerq_recur_gates`. */
EXPORT int eagerq_recur_end(Recurrence *p) {
    const i64 n = p->hidden;
    ROWS(p) {
        const float *gate = p->gates + row * p->pitch, *bent = p->bent + row * n;
        if (p->is_lstm) shown_line(gate + 2 * p->apart, bent, p->h + row * n, p->y + row * n, n);
        else updated_line(gate + p->apart, bent, p->h + row * n, p->y + row * n, n);
    }
    p->x += p->forward * n * (p->is_lstm ? 4 : 3);
    p->y += p->forward * n;
    if (--p->left == 0) return 0;
    return eagerq_recur_gates(p);
}
