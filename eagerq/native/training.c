/* Fake quantization while training; numbers are those of eagerq.functional. */
#include <omp.h>
#include <stdlib.h>

#include "common.h"
#include "nine.h"

enum { LANES = 64 };

/* How rows are rounded: parameters of each (or of all), and the running ranges that they follow from. */
typedef struct {
    float *scale;
    int32_t *zero;
    float *low, *high; /* null where nothing is observed */
    float constant;
    int quant_min, quant_max, symmetric;
} Quantizer;

typedef struct { float low, high, scale; int32_t zero; } Fresh;

/* Smallest and largest of n values; NaN in both if there is one. */
CLONES static void range_of(const float *restrict x, i64 n, float *low, float *high) {
    float least[LANES], most[LANES];
    int strange[LANES], any = 0;
    for (int k = 0; k < LANES; k++) least[k] = INFINITY, most[k] = -INFINITY, strange[k] = 0;
    i64 whole = n / LANES * LANES;
    for (i64 i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++) {
            float v = x[i + k];
            least[k] = v < least[k] ? v : least[k];
            most[k] = v > most[k] ? v : most[k];
            strange[k] |= v != v;
        }
    for (i64 i = whole; i < n; i++) {
        float v = x[i];
        least[0] = v < least[0] ? v : least[0];
        most[0] = v > most[0] ? v : most[0];
        strange[0] |= v != v;
    }
    for (int k = 1; k < LANES; k++) {
        least[0] = least[k] < least[0] ? least[k] : least[0];
        most[0] = most[k] > most[0] ? most[k] : most[0];
    }
    for (int k = 0; k < LANES; k++) any |= strange[k];
    *low = any ? NAN : least[0];
    *high = any ? NAN : most[0];
}

/* eagerq.functional.training_qparams */
static void choose(float low, float high, const Quantizer *q, Fresh *f) {
    const float smallest = 6.1e-5f;
    const int least = q->quant_min, most = q->quant_max, span = most - least;
    if (!(low < INFINITY)) {
        f->scale = 1.0f, f->zero = 0;
        return;
    }
    low = low < 0 ? low : 0.0f;
    high = high > 0 ? high : 0.0f;
    const int two_sided = low < 0 && high > 0;
    if (q->symmetric && two_sided) {
        const float below = -(float)(span / 2 + 1), above = (float)(span / 2);
        const float one = fabsf(low / below), other = fabsf(high / above);
        const double widest = one > other ? one : other;
        low = (float)(widest * below);
        high = (float)(widest * above);
    }
    float scale = (float)(((double)high - (double)low) / span);
    if (isinf(1.0f / scale)) scale = 0.1f;
    const float floor = scale < smallest ? smallest : scale, stretch = floor / scale;
    const double steps_below = (double)(low * stretch) / floor, steps_above = (double)(high * stretch) / floor;
    const int from_low = abs(least) + fabs(steps_below) < abs(most) + fabs(steps_above);
    double zero = from_low ? least - steps_below : most - steps_above;
    if (q->symmetric && two_sided) zero = (least + most) / 2.0;
    zero = zero < least ? least : zero > most ? most : zero;
    f->scale = floor;
    f->zero = (int32_t)rint(zero);
}

static float averaged(float old, float new, float constant) {
    return isinf(old) ? new : old + constant * (new - old);
}

/* What becomes of one row's parameters; 0 for a range that is not finite. */
static int observe(const Quantizer *q, i64 row, float low, float high, Fresh *f) {
    if (!(high - low < INFINITY)) return 0;
    f->low = averaged(q->low[row], low, q->constant);
    f->high = averaged(q->high[row], high, q->constant);
    choose(f->low, f->high, q, f);
    return 1;
}

static void commit(const Quantizer *q, i64 rows, const Fresh *fresh) {
    for (i64 row = 0; row < rows; row++) {
        q->low[row] = fresh[row].low, q->high[row] = fresh[row].high;
        q->scale[row] = fresh[row].scale, q->zero[row] = fresh[row].zero;
    }
}

/* out = (clamp(round(x·factor · inverse) + zero) - zero) · scale; bit i of mask tells whether i was inside */
CLONES static void fake_block(const float *restrict x, float factor, float *restrict out, u8 *restrict mask, i64 n,
                              float scale, float zero, float low, float high) {
    const float inverse = 1.0f / scale;
    u8 inside[BLOCK + 8];
    for (i64 i = 0; i < n; i++) {
        float steps = rintf(x[i] * factor * inverse) + zero;
        float kept = steps < low ? low : steps;
        kept = kept > high ? high : kept;
        inside[i] = kept == steps;
        out[i] = (kept - zero) * scale;
    }
    if (mask) pack(inside, mask, n);
}

/* n bits to as many bytes of 0 or 1 */
EXPORT void eagerq_unpack(const u8 *bits, u8 *flags, i64 n) {
#pragma omp parallel for schedule(static) if (n > 8 * BLOCK)
    for (i64 at = 0; at < n / 8; at++) {
        const uint64_t each = bits[at] * 0x0101010101010101ull & 0x8040201008040201ull;
        const uint64_t ones = ((each + 0x7f7f7f7f7f7f7f7full) | each) >> 7 & 0x0101010101010101ull;
        memcpy(flags + 8 * at, &ones, 8);
    }
    for (i64 i = n / 8 * 8; i < n; i++) flags[i] = bits[i / 8] >> i % 8 & 1;
}

/* Parameters for n values, whose ends may be known already; 0, with nothing changed, if these are not finite. */
static int settle(const Quantizer *q, const float *x, i64 n, const float *ends, Fresh *fresh) {
    *fresh = (Fresh){0, 0, *q->scale, *q->zero};
    if (!q->low) return 1;
    float low = INFINITY, high = -INFINITY;
    int strange = 0;
    if (ends) {
        low = ends[0], high = ends[1];
    } else {
#pragma omp parallel for schedule(static) reduction(min : low) reduction(max : high) reduction(| : strange) \
    if (n > 2 * BLOCK)
        for (i64 block = 0; block < BLOCKS(n); block++) {
            float least, most;
            range_of(x + block * (i64)BLOCK, SPAN(block, n), &least, &most);
            strange |= least != least;
            low = least < low ? least : low;
            high = most > high ? most : high;
        }
    }
    if (strange || !observe(q, 0, low, high, fresh)) return 0;
    commit(q, 1, fresh);
    return 1;
}

/* All of x by one scale. Returns 0, with nothing changed, if the range observed is not finite. */
EXPORT int eagerq_fake_quantize(const float *x, float *out, u8 *mask, i64 n, const Quantizer *q) {
    Fresh fresh;
    if (!settle(q, x, n, 0, &fresh)) return 0;
#pragma omp parallel for schedule(static) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        i64 at = block * BLOCK;
        fake_block(x + at, 1.0f, out + at, mask ? mask + at / 8 : 0, SPAN(block, n), fresh.scale, (float)fresh.zero,
                   (float)q->quant_min, (float)q->quant_max);
    }
    return 1;
}

/* fake_block in place; the bits of what was inside are merged with those that are there */
CLONES static void round_block(float *x, u8 *restrict mask, int merge, i64 n, float scale, float zero, float low,
                               float high) {
    const float inverse = 1.0f / scale;
    u8 inside[BLOCK + 8], bits[BLOCK / 8];
    for (i64 i = 0; i < n; i++) {
        float steps = rintf(x[i] * inverse) + zero;
        float kept = steps < low ? low : steps;
        kept = kept > high ? high : kept;
        inside[i] = kept == steps;
        x[i] = (kept - zero) * scale;
    }
    pack(inside, merge ? bits : mask, n);
    if (merge) for (i64 i = 0; i < (n + 7) / 8; i++) mask[i] &= bits[i];
}

/* All of x by one scale, in place; each row of the mask starts on a byte. Returns as above. */
EXPORT int eagerq_round_over(float *x, u8 *mask, int merge, i64 rows, i64 width, const float *ends,
                             const Quantizer *q) {
    Fresh fresh;
    if (!settle(q, x, rows * width, ends, &fresh)) return 0;
    const i64 bytes = (width + 7) / 8, blocks = BLOCKS(width);
#pragma omp parallel for schedule(static) if (rows * width > 2 * BLOCK)
    for (i64 part = 0; part < rows * blocks; part++) {
        const i64 row = part / blocks, block = part % blocks, at = block * BLOCK;
        round_block(x + row * width + at, mask + row * bytes + at / 8, merge, SPAN(block, width), fresh.scale,
                    (float)fresh.zero, (float)q->quant_min, (float)q->quant_max);
    }
    return 1;
}

/* A matrix turned: out[j][i] = x[i][j]. Convolutions have few taps, so that columns are few. */
static inline __attribute__((always_inline)) void turn_by(const float *restrict x, float *restrict out, i64 rows,
                                                          i64 columns) {
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < columns; j++) out[j * rows + i] = x[i * columns + j];
}

static inline __attribute__((always_inline)) void turn_back_by(const float *restrict x, float *restrict out,
                                                               i64 rows, i64 columns) {
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < columns; j++) out[i * columns + j] = x[j * rows + i];
}

static void turn(const float *x, float *out, i64 rows, i64 columns) {
    if (columns == 9) turn_by(x, out, rows, 9);
    else turn_by(x, out, rows, columns);
}

static void turn_back(const float *x, float *out, i64 rows, i64 columns) {
    if (columns == 9) turn_back_by(x, out, rows, 9);
    else turn_back_by(x, out, rows, columns);
}

/* Room for a row of each thread, where rows are turned. */
static float *spare_rows(i64 taps, i64 width) {
    return taps > 1 ? malloc((size_t)omp_get_max_threads() * width * sizeof(float)) : 0;
}

/* Each row of x·factor by its own scale; a row of the mask starts on a byte. With taps, rows hold channels of so many
 * taps, and come out as taps of so many channels: channels_last. Returns as above. */
EXPORT int eagerq_fake_quantize_rows(const float *x, const float *factors, float *out, u8 *mask, i64 rows, i64 width,
                                     i64 taps, const Quantizer *q) {
    Fresh *fresh = q->low ? malloc(rows * sizeof *fresh) : 0;
    float *spare = spare_rows(taps, width);
    if ((q->low && !fresh) || (taps > 1 && !spare)) {
        free(fresh), free(spare);
        return 0;
    }
    const i64 bytes = (width + 7) / 8;
    const int nine = serves_nine(taps, width);
    int finite = 1;
#pragma omp parallel for schedule(static) reduction(& : finite) if (rows * width > 2 * BLOCK)
    for (i64 row = 0; row < rows; row++) {
        const float factor = factors ? factors[row] : 1.0f;
        const float *from = x + row * width;
        Fresh now = {0, 0, q->scale[row], q->zero[row]};
        if (fresh) {
            float low, high;
            range_of(from, width, &low, &high);
            low *= factor, high *= factor; /* rounding keeps the order, so these are the ends of the products */
            finite &= factor < 0 ? observe(q, row, high, low, &now) : observe(q, row, low, high, &now);
            fresh[row] = now;
        }
        if (nine) {
            round_nine(from, factor, out + row * width, mask ? mask + row * bytes : 0, width, now.scale, (float)now.zero,
                       (float)q->quant_min, (float)q->quant_max);
            continue;
        }
        float *to = spare ? spare + omp_get_thread_num() * width : out + row * width;
        for (i64 at = 0; at < width; at += BLOCK)
            fake_block(from + at, factor, to + at, mask ? mask + row * bytes + at / 8 : 0,
                       width - at < BLOCK ? width - at : BLOCK, now.scale, (float)now.zero, (float)q->quant_min,
                       (float)q->quant_max);
        if (spare) turn(to, out + row * width, width / taps, taps);
    }
    if (fresh && finite) commit(q, rows, fresh);
    free(fresh), free(spare);
    return finite;
}

/* out = grad · factor where the bit is set, else 0; returns the sum of grad · x there, if there is an x */
CLONES static double masked_block(const float *grad, const u8 *restrict mask, const float *restrict x,
                                  float factor, float *out, i64 n) {
    Values sums = {0}, kept, values;
    double sum = 0;
    i64 whole = n / 16 * 16;
    for (i64 i = 0; i < whole; i += 16) {
        masked16(grad + i, mask + i / 8, (float *)&kept);
        if (x) {
            memcpy(&values, x + i, sizeof values);
            sums += kept * values;
        }
        kept *= factor;
        memcpy(out + i, &kept, sizeof kept);
    }
    for (i64 i = whole; i < n; i++) {
        float one = (mask[i / 8] >> (i % 8)) & 1 ? grad[i] : 0.0f;
        if (x) sum += one * x[i];
        out[i] = one * factor;
    }
    for (int k = 0; k < 16; k++) sum += sums[k];
    return sum;
}

EXPORT void eagerq_masked(const float *grad, const u8 *mask, float *out, i64 n) {
#pragma omp parallel for schedule(static) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        i64 at = block * BLOCK;
        masked_block(grad + at, mask + at / 8, 0, 1.0f, out + at, SPAN(block, n));
    }
}

/* Gradients of eagerq_fake_quantize_rows for x and, if there are factors, for these; out may be where grad is.
 * Returns 0 if there is no memory. */
EXPORT int eagerq_masked_rows(const float *grad, const u8 *mask, const float *x, const float *factors, float *out,
                              float *of_factors, i64 rows, i64 width, i64 taps) {
    const i64 bytes = (width + 7) / 8;
    float *spare = spare_rows(taps, width);
    if (taps > 1 && !spare) return 0;
    const int nine = serves_nine(taps, width);
#pragma omp parallel for schedule(static) if (rows * width > 2 * BLOCK)
    for (i64 row = 0; row < rows; row++) {
        i64 at = row * width;
        const float *from = grad + at;
        const float *values = factors ? x + at : 0;
        const float factor = factors ? factors[row] : 1.0f;
        double sum;
        if (spare) {
            float *room = spare + omp_get_thread_num() * width;
            if (nine) memcpy(room, from, width * sizeof *room);
            else turn_back(from, room, width / taps, taps);
            from = room;
        }
        if (nine) sum = masked_nine(from, mask + row * bytes, values, factor, out + at, width);
        else sum = masked_block(from, mask + row * bytes, values, factor, out + at, width);
        if (factors) of_factors[row] = (float)sum;
    }
    free(spare);
    return 1;
}

CLONES static void rectify_block(float *x, u8 *restrict mask, i64 n) {
    u8 above[BLOCK + 8];
    for (i64 i = 0; i < n; i++) {
        above[i] = !(x[i] <= 0);
        x[i] = x[i] <= 0 ? 0.0f : x[i];
    }
    pack(above, mask, n);
}

/* max(x, 0) in place; bit i of mask tells whether i was above */
EXPORT void eagerq_rectify(float *x, u8 *mask, i64 n) {
#pragma omp parallel for schedule(static) if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        i64 at = block * BLOCK;
        rectify_block(x + at, mask + at / 8, SPAN(block, n));
    }
}

/* a + b, perhaps with a ReLU, and its ends */
CLONES static void sum_block(const float *restrict a, const float *restrict b, float *restrict out, u8 *restrict mask,
                             int relu, i64 n, float *low, float *high) {
    u8 above[BLOCK + 8];
    if (!relu) {
        for (i64 i = 0; i < n; i++) out[i] = a[i] + b[i];
    } else {
        for (i64 i = 0; i < n; i++) {
            const float y = a[i] + b[i];
            above[i] = !(y <= 0);
            out[i] = y <= 0 ? 0.0f : y;
        }
        if (mask) pack(above, mask, n);
    }
    range_of(out, n, low, high);
}

/* The two ends are NaN if any sum is. */
EXPORT void eagerq_sum(const float *a, const float *b, float *out, u8 *mask, int relu, i64 n, float *ends) {
    float low = INFINITY, high = -INFINITY;
    int strange = 0;
#pragma omp parallel for schedule(static) reduction(min : low) reduction(max : high) reduction(| : strange) \
    if (n > 2 * BLOCK)
    for (i64 block = 0; block < BLOCKS(n); block++) {
        const i64 at = block * BLOCK;
        float least, most;
        sum_block(a + at, b + at, out + at, mask ? mask + at / 8 : 0, relu, SPAN(block, n), &least, &most);
        strange |= least != least;
        low = least < low ? least : low;
        high = most > high ? most : high;
    }
    ends[0] = strange ? NAN : low;
    ends[1] = strange ? NAN : high;
}
