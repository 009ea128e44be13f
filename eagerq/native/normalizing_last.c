/* Batch norm in training as in normalizing.c, for channels that are last in memory: a row has a value of each.
 *
 * Sums are taken in double, from each channel's first value on, over spans of rows that do not depend on the
 * number of threads; nor do the results.
 */
#include <stdlib.h>

#include "normalizing.h"

enum { MOST_SPANS = 16, LEAST_VALUES = 4 * BLOCK };

/* How rows are parted: into spans, each summed by one thread, and these into tiles whose bits fill whole bytes. */
typedef struct { i64 rows, tile, span, spans; } Parts;

static Parts parts_of(const Norm *s) {
    const i64 rows = s->batch * s->plane, c = s->channels, together = c % 8 == 0 ? 1 : 8;
    i64 tile = BLOCK / 2 / c / together * together, spans = rows * c / LEAST_VALUES;
    tile = tile < together ? together : tile;
    spans = spans < 1 ? 1 : spans > MOST_SPANS ? MOST_SPANS : spans;
    const i64 tiles = (rows + tile - 1) / tile, span = (tiles + spans - 1) / spans * tile;
    return (Parts){rows, tile, span, (rows + span - 1) / span};
}

#define UP_TO(start, length, end) ((end) - (start) < (length) ? (end) - (start) : (length))
#define TILES(first, many)                                                                                          \
    for (i64 first = span * p.span, end = first + UP_TO(first, p.span, p.rows), many; first < end; first += p.tile) \
        if ((many = UP_TO(first, p.tile, end)))

/* Two sums of each channel's quotients, and their ends. */
CLONES static void sum_rows(const float *restrict x, i64 rows, i64 channels, const float *restrict factor,
                            const float *restrict from, double *restrict sum, double *restrict square,
                            float *restrict least, float *restrict most) {
    for (i64 row = 0; row < rows; row++, x += channels)
        for (i64 c = 0; c < channels; c++) {
            const float q = x[c] / factor[c];
            const double far = (double)q - from[c];
            sum[c] += far;
            square[c] += far * far;
            least[c] = q < least[c] ? q : least[c];
            most[c] = q > most[c] ? q : most[c];
        }
}

CLONES static void normalize_rows(const float *restrict x, float *restrict out, u8 *restrict above, i64 rows,
                                  i64 channels, int relu, const float *restrict factor, const float *restrict scale,
                                  const float *restrict shift) {
    for (i64 row = 0; row < rows; row++, x += channels, out += channels, above += channels)
        if (relu)
            for (i64 c = 0; c < channels; c++) {
                const float y = fmaf(x[c] / factor[c], scale[c], shift[c]);
                above[c] = !(y <= 0);
                out[c] = y <= 0 ? 0.0f : y;
            }
        else
            for (i64 c = 0; c < channels; c++) out[c] = fmaf(x[c] / factor[c], scale[c], shift[c]);
}

/* A bit of the mask for each value in the order of memory. Returns 0, with nothing changed, without memory. */
EXPORT int eagerq_batch_norm_last(const float *y, float *out, u8 *mask, int relu, const Norm *s) {
    const i64 n = s->channels;
    const Parts p = parts_of(s);
    double *sums = calloc(p.spans * 2 * n, sizeof *sums);
    float *ends = malloc((p.spans * 2 + 3) * n * sizeof *ends);
    u8 *flags = malloc(p.spans * (p.tile * n + 8));
    const int served = sums && ends && flags;
    if (served) {
        float *from = ends + p.spans * 2 * n, *scale = from + n, *shift = scale + n;
        for (i64 c = 0; c < n; c++) from[c] = y[c] / s->factor[c];
#pragma omp parallel for schedule(static) if (p.spans > 1)
        for (i64 span = 0; span < p.spans; span++) {
            float *least = ends + span * 2 * n, *most = least + n;
            for (i64 c = 0; c < n; c++) least[c] = INFINITY, most[c] = -INFINITY;
            const i64 first = span * p.span;
            sum_rows(y + first * n, UP_TO(first, p.span, p.rows), n, s->factor, from, sums + span * 2 * n,
                     sums + span * 2 * n + n, least, most);
        }
        Ends all = {INFINITY, -INFINITY, 0};
        for (i64 c = 0; c < n; c++) {
            double sum = 0, square = 0;
            float least = INFINITY, most = -INFINITY;
            for (i64 span = 0; span < p.spans; span++) {
                const i64 at = span * 2 * n + c;
                sum += sums[at], square += sums[at + n];
                least = ends[at] < least ? ends[at] : least, most = ends[at + n] > most ? ends[at + n] : most;
            }
            const double total = square - sum / p.rows * sum;
            const Line line = line_of(s, c, (float)(from[c] + sum / p.rows), total < 0 ? 0.0f : (float)total, p.rows);
            scale[c] = line.scale, shift[c] = line.shift;
            widen(&all, least, most, line);
        }
        tell_ends(s, all, relu);
#pragma omp parallel for schedule(static) if (p.spans > 1)
        for (i64 span = 0; span < p.spans; span++) {
            u8 *above = flags + span * (p.tile * n + 8);
            TILES(first, many) {
                normalize_rows(y + first * n, out + first * n, above, many, n, relu, s->factor, scale, shift);
                if (mask) pack(above, mask + first * n / 8, many * n);
            }
        }
    }
    free(sums), free(ends), free(flags);
    return served;
}

CLONES static void sum_gradients(const float *restrict g, const float *restrict x, i64 rows, i64 channels,
                                 const float *restrict centre, double *restrict sum, double *restrict with) {
    for (i64 row = 0; row < rows; row++, g += channels, x += channels)
        for (i64 c = 0; c < channels; c++) {
            sum[c] += g[c];
            with[c] += g[c] * (x[c] - centre[c]);
        }
}

CLONES static void back_rows(const float *restrict g, const float *x, float *of_x, i64 rows, i64 channels,
                             const float *restrict centre, const float *restrict part, const float *restrict level,
                             const float *restrict scale) {
    for (i64 row = 0; row < rows; row++, g += channels, x += channels, of_x += channels)
#pragma GCC ivdep /* of_x may be where x is: each value is read before it is written */
        for (i64 c = 0; c < channels; c++) of_x[c] = (g[c] - level[c] - (x[c] - centre[c]) * part[c]) * scale[c];
}

/* The gradient of a tile, as it is or where the bit is set. */
static const float *kept(const float *grad, const u8 *mask, i64 at, i64 count, float *spare) {
    if (!mask) return grad + at;
    eagerq_keep(grad + at, mask + at / 8, spare, count);
    return spare;
}

/* See eagerq_batch_norm_backward. Returns 0, with nothing done, without memory. */
EXPORT int eagerq_batch_norm_last_backward(const float *grad, const float *y, const u8 *mask, float *of_y,
                                           float *of_factor, float *of_weight, float *of_bias, const Norm *s) {
    const i64 n = s->channels;
    const Parts p = parts_of(s);
    double *sums = calloc(p.spans * 2 * n, sizeof *sums);
    float *slopes = malloc(4 * n * sizeof *slopes), *spare = mask ? malloc(p.spans * p.tile * n * sizeof *spare) : 0;
    const int served = sums && slopes && (spare || !mask);
    if (served) {
        float *centre = slopes, *part = centre + n, *level = part + n, *scale = level + n;
        for (i64 c = 0; c < n; c++) centre[c] = centre_of(s, c);
#pragma omp parallel for schedule(static) if (p.spans > 1)
        for (i64 span = 0; span < p.spans; span++)
            TILES(first, many) {
                const float *g = kept(grad, mask, first * n, many * n, spare + span * p.tile * n);
                sum_gradients(g, y + first * n, many, n, centre, sums + span * 2 * n, sums + span * 2 * n + n);
            }
        for (i64 c = 0; c < n; c++) {
            double sum = 0, with = 0;
            for (i64 span = 0; span < p.spans; span++) sum += sums[span * 2 * n + c], with += sums[span * 2 * n + n + c];
            const Slope slope = slope_of(s, c, sum, with, p.rows, of_factor, of_weight, of_bias);
            part[c] = slope.part, level[c] = slope.level, scale[c] = slope.scale;
        }
#pragma omp parallel for schedule(static) if (p.spans > 1)
        for (i64 span = 0; span < p.spans; span++)
            TILES(first, many) {
                const float *g = kept(grad, mask, first * n, many * n, spare + span * p.tile * n);
                back_rows(g, y + first * n, of_y + first * n, many, n, centre, part, level, scale);
            }
    }
    free(sums), free(slopes), free(spare);
    return served;
}
