/* A list of calls made one after the other, image by image where a batch would not stay in the cache. */
#include <omp.h>

#include "requantize.h"

struct Pair;
void eagerq_conv(const u8 *x, u8 *out, const Layer *layer, const Conv *c);
void eagerq_depthwise(const u8 *x, u8 *out, const Layer *layer, const Conv *c);
void eagerq_linear(const u8 *x, u8 *out, const Layer *layer, const Conv *c);
void eagerq_add(const u8 *a, const u8 *b, u8 *out, i64 n, const struct Pair *p);
void eagerq_look_up(const u8 *x, u8 *out, const u8 *table, i64 n);
void eagerq_mul(const u8 *a, const u8 *b, u8 *out, i64 outer, i64 again, i64 n, const struct Pair *p);
void eagerq_quantize(const float *x, u8 *out, i64 n, float inverse, float zero, float low, float high);
void eagerq_dequantize(const u8 *q, float *out, i64 n, float zero, float scale, int is_signed);
void eagerq_max_pool(const u8 *x, u8 *out, i64 batch, i64 height, i64 width, i64 channels, i64 rows, i64 columns,
                     const i64 *window, int is_signed);
void eagerq_mean(const u8 *x, u8 *out, i64 batch, i64 pixels, i64 channels, float zero, float low, float high,
                 int is_signed);

/* in the order of eagerq.native.program */
enum { CONV, DEPTHWISE, LINEAR, ADD, QUANTIZE, DEQUANTIZE, MAX_POOL, MEAN, MUL, LOOK_UP };

/* Memory that is read or written. Of a batch that goes image by image, one begins so many bytes after the other,
 * or one thread's after the other's where `own` says that each has its memory for itself. */
typedef struct {
    u8 *at;
    i64 apart, own;
} Place;

/* A call: where it reads and writes, and the rest of its arguments, by their kinds. */
typedef struct {
    i64 kind, images; /* images: of a batch that goes one by one; 0 where all go at once */
    i64 group;        /* calls in a row of one group go through it together: only they share memory as if in turn */
    Place places[3]; /* one or two that are read, and that of the result */
    const void *pointers[2];
    i64 numbers[7];
    float reals[4];
} Step;

static u8 *place(const Place *p, i64 image, i64 thread) { return p->at + (p->own ? thread : image) * p->apart; }

static void run_step(const Step *s, i64 image, i64 thread) {
    const u8 *x = place(&s->places[0], image, thread), *other = place(&s->places[1], image, thread);
    u8 *out = place(&s->places[2], image, thread);
    const i64 *n = s->numbers, parts = s->images ? s->images : 1;
    const float *r = s->reals;
    const Layer *layer = s->pointers[0];
    if (s->kind <= LINEAR) {
        Conv c = *(const Conv *)s->pointers[1];
        c.batch /= parts;
        if (s->kind == CONV) eagerq_conv(x, out, layer, &c);
        else if (s->kind == DEPTHWISE) eagerq_depthwise(x, out, layer, &c);
        else eagerq_linear(x, out, layer, &c);
        return;
    }
    const i64 count = n[0] / parts; /* values, or images */
    if (s->kind == ADD) eagerq_add(x, other, out, count, s->pointers[0]);
    else if (s->kind == QUANTIZE) eagerq_quantize((const float *)x, out, count, r[0], r[1], r[2], r[3]);
    else if (s->kind == DEQUANTIZE) eagerq_dequantize(x, (float *)out, count, r[0], r[1], (int)n[1]);
    else if (s->kind == MAX_POOL)
        eagerq_max_pool(x, out, count, n[1], n[2], n[3], n[4], n[5], s->pointers[0], (int)n[6]);
    else if (s->kind == MEAN) eagerq_mean(x, out, count, n[1], n[2], r[0], r[1], r[2], (int)n[3]);
    else if (s->kind == LOOK_UP) eagerq_look_up(x, out, s->pointers[0], count);
    else if (s->kind == MUL) /* of one part, all images' values are side by side */
        eagerq_mul(x, other, out, n[0] > 1 ? count : 1, n[1], n[0] > 1 ? n[2] : n[2] / parts, s->pointers[0]);
}

/* `most`: threads that have memory for themselves. */
EXPORT void eagerq_run(const Step *steps, i64 count, i64 most) {
    for (i64 at = 0, next; at < count; at = next) {
        const i64 images = steps[at].images;
        for (next = at + 1; next < count && images && steps[next].group == steps[at].group;) next++;
        if (!images) {
            run_step(&steps[at], 0, 0);
            continue;
        }
        const i64 threads = omp_get_max_threads() < most ? omp_get_max_threads() : most;
        const i64 shared = images / threads * threads; /* the others with all threads at each */
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
        for (i64 image = 0; image < shared; image++)
            for (i64 step = at; step < next; step++) run_step(&steps[step], image, omp_get_thread_num());
        for (i64 image = shared; image < images; image++)
            for (i64 step = at; step < next; step++) run_step(&steps[step], image, 0);
    }
}
