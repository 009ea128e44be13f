/* Convolutions of bytes with the channels last, each channel by itself.
 *
 * Four rows of a window are interleaved byte by byte, so that one product of four bytes takes a column of the
 * window. Channels go in units of sixteen, a vector of sums each.
 */
#include "requantize.h"

#ifdef HAS_VNNI

enum { ROOM = 24 * 1024 }; /* bytes of interleaved rows that a thread works on, so that they stay in the first cache */

/* `bytes` of four rows, or of padding where there is none, to as many times four. */
INLINE void interleave(const u8 *const *from, i64 bytes, __m512i outside, int flip, u8 *to) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    /* bytes 16 * j + 4 * lane of a row, where unpacking leaves them in vector j */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (i64 at = 0; at < bytes; at += 64, to += 256) {
        const i64 left = bytes - at;
        const __mmask64 some = left >= 64 ? ~0ull : (1ull << left) - 1;
        __m512i row[4];
        UNROLL for (int k = 0; k < 4; k++) {
            row[k] = outside;
            if (from[k]) {
                row[k] = left >= 64 ? _mm512_loadu_si512(from[k] + at) : _mm512_maskz_loadu_epi8(some, from[k] + at);
                row[k] = _mm512_permutexvar_epi32(order, row[k]);
                if (flip) row[k] = _mm512_xor_si512(row[k], sign);
            }
        }
        const __m512i ab = _mm512_unpacklo_epi8(row[0], row[1]), cd = _mm512_unpacklo_epi8(row[2], row[3]);
        const __m512i AB = _mm512_unpackhi_epi8(row[0], row[1]), CD = _mm512_unpackhi_epi8(row[2], row[3]);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(ab, cd));
        if (left > 16) _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(ab, cd));
        if (left > 32) _mm512_store_si512(to + 128, _mm512_unpacklo_epi16(AB, CD));
        if (left > 48) _mm512_store_si512(to + 192, _mm512_unpackhi_epi16(AB, CD));
    }
}

/* A stretch of a row of the output, and where its interleaved columns lie. */
typedef struct {
    const u8 *columns;
    u8 *out;
    i64 many, first, units, groups, apart; /* columns of the output; channels; groups of four rows, bytes apart */
    i64 reach, row; /* rows of the input that are there; which of the rows of the output that share them */
} Stretch;

/* UNITS of sixteen channels of PIXELS at a time, whose four vectors of results are neighbours in memory. With
 * TAPS, the window is one group of rows by as many columns, nothing far out of range; and without ZEROS, none of
 * these channels' weights has a zero point. */
INLINE void span(const int UNITS, const int PIXELS, const int TAPS, const int KNOWN, const int ZEROS,
                 const Stretch *part, i64 unit, const Layer *layer, const Conv *c) {
    const i64 first = part->first + unit * 16;
    const i64 taps = TAPS ? TAPS : c->taps_x, groups = TAPS ? 1 : part->groups, each = groups * taps * 64;
    const i64 wide = part->units * 64 * c->step_x, left = least(c->channels - first, UNITS * 16);
    const __m512i x_zero = _mm512_set1_epi32(-c->x_zero);
    /* rows that are seen: untapped ones, too, where they are padding */
    const i64 seen_rows = TAPS ? c->taps_y : 4 * groups;
    const int32_t one_each = seen_rows < 4 ? 0x010101 >> (3 - seen_rows) * 8 << part->row * 8 : 0x01010101;
    const __m512i ones = _mm512_set1_epi32(one_each);
    const __m512i area = _mm512_set1_epi32(-c->x_zero * (int32_t)(seen_rows * taps));
    const int8_t *weight = layer->weight + first / 16 * each;
    const Rounding shared = rounding(c);
    __m512i shift[4], w[4][3];
    __m512 scale[4], bias[4];
    UNROLL for (int u = 0; u < UNITS; u++) {
        shift[u] = _mm512_mullo_epi32(_mm512_loadu_si512(layer->sums + first + u * 16), x_zero);
        scale[u] = _mm512_loadu_ps(layer->scale + first + u * 16);
        bias[u] = _mm512_loadu_ps(layer->bias + first + u * 16);
        UNROLL for (int tap = 0; tap < TAPS; tap++) { /* the window's rows come a byte later for the next row */
            w[u][tap] = _mm512_loadu_si512(weight + u * each + tap * 64);
            if (part->row) w[u][tap] = _mm512_slli_epi32(w[u][tap], 8);
        }
    }
    const u8 *columns = part->columns;
    u8 *out = part->out + unit * 16;
    for (i64 at = 0; at < part->many; at += PIXELS, out += PIXELS * c->channels) {
        __m512i steps[4];
        UNROLL for (int j = 0; j < 4; j++) {
            if (j >= UNITS * PIXELS) { steps[j] = _mm512_setzero_si512(); continue; }
            const int u = j % UNITS;
            const u8 *from = columns + ((at + j / UNITS) * c->every_x * part->units + unit + u) * 64;
            __m512i total = shift[u], seen = area;
            if (TAPS) {
                UNROLL for (int tap = 0; tap < TAPS; tap++) {
                    const __m512i x = _mm512_load_si512(from + tap * wide);
                    total = _mm512_dpbusd_epi32(total, x, w[u][tap]);
                    if (ZEROS) seen = _mm512_dpbusd_epi32(seen, x, ones);
                }
            } else {
                for (i64 group = 0; group < groups; group++)
                    for (i64 tap = 0; tap < taps; tap++) {
                        const __m512i x = _mm512_load_si512(from + group * part->apart + tap * wide);
                        const __m512i four = _mm512_loadu_si512(weight + u * each + (group * taps + tap) * 64);
                        total = _mm512_dpbusd_epi32(total, x, four);
                        if (layer->zeros) seen = _mm512_dpbusd_epi32(seen, x, ones);
                    }
            }
            if (ZEROS && layer->zeros) {
                const __m512i zeros = _mm512_loadu_si512(layer->zeros + first + u * 16);
                total = _mm512_sub_epi32(total, _mm512_mullo_epi32(zeros, seen));
            }
            steps[j] = requantized(KNOWN, total, scale[u], bias[u], &shared);
        }
        put(out, packed(KNOWN, steps, &shared), PIXELS == 1 ? left : least(part->many - at, PIXELS) * c->channels);
    }
}

#define SPAN_OF(NAME, UNITS, PIXELS, TAPS, KNOWN, ZEROS)                                      \
    VNNI static void NAME(const Stretch *part, i64 unit, const Layer *layer, const Conv *c) { \
        span(UNITS, PIXELS, TAPS, KNOWN, ZEROS, part, unit, layer, c);                        \
    }
#define SPANS_OF(NAME, TAPS, KNOWN, ZEROS)      \
    SPAN_OF(NAME##_1, 1, 1, TAPS, KNOWN, ZEROS) \
    SPAN_OF(NAME##_2, 2, 1, TAPS, KNOWN, ZEROS) \
    SPAN_OF(NAME##_3, 3, 1, TAPS, KNOWN, ZEROS) \
    SPAN_OF(NAME##_4, 4, 1, TAPS, KNOWN, ZEROS)
SPANS_OF(any, 0, FAR, 1)
SPANS_OF(three, 3, NEAR, 0)
SPANS_OF(plain, 3, PLAIN, 0)
SPAN_OF(two_of_two, 2, 2, 3, NEAR, 0)
SPAN_OF(plain_two_of_two, 2, 2, 3, PLAIN, 0)
SPAN_OF(four_of_one, 1, 4, 3, NEAR, 0)
SPAN_OF(plain_four_of_one, 1, 4, 3, PLAIN, 0)
SPAN_OF(uneven, 1, 1, 3, NEAR, 1)

/* by what is known of results (three taps, too, but for those that may be far) and how many units; then those that
 * do more than one pixel at a time, of a layer of so many units */
typedef void (*Span)(const Stretch *, i64, const Layer *, const Conv *);
static const Span SPANS[3][5] = {
    {0, any_1, any_2, any_3, any_4}, {0, three_1, three_2, three_3, three_4}, {0, plain_1, plain_2, plain_3, plain_4},
};
static const Span THIN[3][3] = {{0}, {0, four_of_one, two_of_two}, {0, plain_four_of_one, plain_two_of_two}};

/* Whether one of sixteen channels' weights has a zero point. */
VNNI static int is_uneven(const Layer *layer, i64 first) {
    if (!layer->zeros) return 0;
    const __m512i zeros = _mm512_loadu_si512(layer->zeros + first);
    return _mm512_test_epi32_mask(zeros, zeros) != 0;
}

/* Columns of the input, as many as `part` needs from the one numbered `left` on, of the rows of one output row. */
VNNI static void lay_out(const u8 *image, i64 top, i64 left, i64 wide, i64 bytes, u8 *scratch, const Stretch *part,
                         const Conv *c) {
    const __m512i outside = _mm512_set1_epi8((char)c->x_zero);
    const u8 *const none[4] = {0};
    const i64 begin = left < 0 ? least(-left, wide) : 0, end = least(wide, c->width - left);
    const int flat = bytes == c->channels && bytes % 16 == 0; /* columns follow each other without gaps */
    for (i64 group = 0; group < part->groups; group++) {
        const u8 *from[4];
        for (i64 k = 0; k < 4; k++) { /* rows that no tap reads have weights of 0 */
            const i64 y = top + (group * 4 + k) * c->step_y;
            from[k] = y < 0 || y >= c->height || group * 4 + k >= part->reach || begin >= end
                    ? 0 : image + (y * c->width + left + begin) * c->channels + part->first;
        }
        for (i64 i = 0; i < wide; i++) {
            u8 *to = scratch + group * part->apart + i * part->units * 64;
            if (i < begin || i >= end) interleave(none, bytes, outside, c->is_signed, to);
            else if (flat) {
                interleave(from, (end - begin) * bytes, outside, c->is_signed, to);
                i = end - 1;
            } else {
                interleave(from, bytes, outside, c->is_signed, to);
                for (int k = 0; k < 4; k++) from[k] = from[k] ? from[k] + c->channels : 0;
            }
        }
    }
}

/* `rows` rows of the output, two at most, channels [first, first + bytes): stretch by stretch. */
static void depthwise_rows(const u8 *image, u8 *out, i64 row, i64 rows, i64 first, i64 bytes, i64 most, u8 *scratch,
                           int known, const Layer *layer, const Conv *c) {
    const i64 stretches = (c->columns + most - 1) / most, units = (bytes + 15) / 16, blocks = (units + 3) / 4;
    for (i64 number = 0; number < stretches; number++) {
        const i64 start = number * c->columns / stretches, many = (number + 1) * c->columns / stretches - start;
        const i64 wide = (many - 1) * c->every_x + (c->taps_x - 1) * c->step_x + 1;
        Stretch part = {scratch, out + (row * c->columns + start) * c->channels + first, many, first, units,
                        (c->taps_y + 3) / 4, wide * units * 64, c->taps_y + rows - 1, 0};
        lay_out(image, row * c->every_y - c->pad_y, start * c->every_x - c->pad_x, wide, bytes, scratch, &part, c);
        for (; part.row < rows; part.row++, part.out += c->columns * c->channels) {
            if (known != FAR && (c->channels == 16 || c->channels == 32)) THIN[known][units](&part, 0, layer, c);
            else for (i64 block = 0; block < blocks; block++) {
                const i64 unit = block * units / blocks, next = (block + 1) * units / blocks;
                SPANS[known][next - unit](&part, unit, layer, c);
            }
            for (i64 unit = 0; known != FAR && unit < units; unit++) /* seldom: then what is there is overwritten */
                if (is_uneven(layer, first + unit * 16)) uneven(&part, unit, layer, c);
        }
    }
}

EXPORT void eagerq_depthwise(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {
    const i64 groups = (c->taps_y + 3) / 4;
    const i64 pieces = (c->channels + 255) / 256, each = ((c->channels + pieces - 1) / pieces + 63) / 64 * 64;
    const i64 column = groups * ((least(each, c->channels) + 15) / 16) * 64, around = (c->taps_x - 1) * c->step_x + 1;
    const i64 room = (ROOM / column - around) / c->every_x, most = room < 4 ? 4 : room;
    const int simple = c->taps_x == 3 && groups == 1 && is_bounded(c->taps_y * c->taps_x, c->outputs, layer, c);
    const int known = !simple ? FAR : is_plain(c) ? PLAIN : NEAR;
    /* two rows of the output at a time where four of the input hold all that they need */
    const i64 rows = simple && c->taps_y < 4 && c->every_y * c->step_y == 1 ? 2 : 1;
    const i64 lines = (c->rows + rows - 1) / rows, size = c->height * c->width * c->channels;
#pragma omp parallel if (c->batch * c->rows * c->columns * c->channels > 20000)
    {
        u8 *scratch = aligned_alloc(64, ((most + 3) * c->every_x + around) * column);
#pragma omp for schedule(static)
        for (i64 number = 0; number < c->batch * lines * pieces; number++) {
            const i64 image = number / pieces / lines, row = number / pieces % lines * rows;
            const i64 first = number % pieces * each;
            depthwise_rows(x + image * size, out + image * c->rows * c->columns * c->channels, row,
                           least(rows, c->rows - row), first, least(each, c->channels - first), most, scratch, known,
                           layer, c);
        }
        free(scratch);
    }
}

#else
EXPORT void eagerq_depthwise(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {}
#endif
