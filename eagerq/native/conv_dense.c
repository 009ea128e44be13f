/* Convolutions of bytes with the channels last, and linear layers: all inputs to all outputs. */
#include "requantize.h"

#ifdef HAS_VNNI

EXPORT int eagerq_conv_ready(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

/* Lines of memory that a window reads: taps_y of them, each of a row's taps_x * channels bytes on end; the next window
 * of the row reads `stride` bytes further on. */
typedef struct {
    i64 count, bytes, apart, stride;
} Lines;

VNNI static __attribute__((noinline)) int32_t window_sum(const u8 *from, const Lines *lines) {
    int32_t total = 0;
    for (i64 line = 0; line < lines->count; line++)
        for (i64 k = 0; k < lines->bytes; k++) total += from[line * lines->apart + k];
    return total;
}

/* The first `left` of sixteen sums in real numbers: (sum * x_scale) * scale + bias. */
INLINE void put_real(float *to, __m512i total, __m512 scale, __m512 bias, i64 left, const Conv *c) {
    const __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(c->x_scale)), scale);
    if (left >= 16) _mm512_storeu_ps(to, _mm512_add_ps(y, bias));
    else _mm512_mask_storeu_ps(to, (__mmask16)((1u << left) - 1), _mm512_add_ps(y, bias));
}

enum { REAL = PLAIN + 1 }; /* what is known of sums that become real numbers */

/* The results of as many windows as fill 64 bytes: NV vectors of outputs of each. */
INLINE void put_windows(const int NV, u8 *const *to, __m512i bytes, i64 left) {
    if (NV > 2 || left < NV * 16) {
        for (int k = 0; k < (NV > 2 ? 1 : 4 / NV); k++) {
            put(to[k], bytes, left);
            if (NV == 1) bytes = _mm512_alignr_epi64(bytes, bytes, 2);
            if (NV == 2) bytes = _mm512_alignr_epi64(bytes, bytes, 4);
        }
    } else if (NV == 2) {
        _mm256_storeu_si256((__m256i *)to[0], _mm512_castsi512_si256(bytes));
        _mm256_storeu_si256((__m256i *)to[1], _mm512_extracti64x4_epi64(bytes, 1));
    } else {
        _mm_storeu_si128((__m128i *)to[0], _mm512_castsi512_si128(bytes));
        _mm_storeu_si128((__m128i *)to[1], _mm512_extracti32x4_epi32(bytes, 1));
        _mm_storeu_si128((__m128i *)to[2], _mm512_extracti32x4_epi32(bytes, 2));
        _mm_storeu_si128((__m128i *)to[3], _mm512_extracti32x4_epi32(bytes, 3));
    }
}

/* Windows and where their results go; of windows in a row, only the first: the others follow. */
typedef struct {
    const u8 *from[16];
    u8 *to[16];
} Windows;

INLINE const u8 *read_at(const int ROW, const Windows *w, int r, const Lines *lines) {
    return ROW ? w->from[0] + r * lines->stride : w->from[r];
}

INLINE u8 *write_at(const int ROW, const Windows *w, int r, const Conv *c) {
    return ROW ? w->to[0] + r * c->outputs * (c->to_real ? 4 : 1) : w->to[r];
}

/* MR windows times NV * 16 outputs; of a ROW or anywhere */
INLINE void tile(const int MR, const int NV, const int KNOWN, const int ROW, const Windows *places, i64 first,
                 const int8_t *weight, const Lines *lines, const Layer *layer, const Conv *c) {
    __m512i acc[16][4];
    UNROLL for (int v = 0; v < NV; v++) {
        const __m512i sums = _mm512_loadu_si512(layer->sums + first + v * 16);
        acc[0][v] = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-c->x_zero));
        UNROLL for (int r = 1; r < MR; r++) acc[r][v] = acc[0][v];
    }
    const i64 fours = (lines->bytes + 3) / 4;
    for (i64 line = 0; line < lines->count; line++) {
        const i64 start = line * lines->apart;
        const u8 *at[16];
        UNROLL for (int r = 0; r < MR; r++) at[r] = read_at(ROW, places, r, lines) + start;
        for (i64 k = 0; k < fours; k++) {
            __m512i w[4];
            UNROLL for (int v = 0; v < NV; v++) w[v] = _mm512_loadu_si512(weight + v * 64);
            UNROLL for (int r = 0; r < MR; r++) {
                int32_t four;
                memcpy(&four, at[r] + k * 4, 4);
                __m512i x = _mm512_set1_epi32(four);
                UNROLL for (int v = 0; v < NV; v++) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], x, w[v]);
            }
            weight += NV * 64;
        }
    }
    if (layer->zeros)
        UNROLL for (int r = 0; r < MR; r++) {
            const u8 *from = read_at(ROW, places, r, lines);
            const int32_t seen = window_sum(from, lines) - c->x_zero * (int32_t)(lines->count * lines->bytes);
            UNROLL for (int v = 0; v < NV; v++) {
                const __m512i zeros = _mm512_loadu_si512(layer->zeros + first + v * 16);
                acc[r][v] = _mm512_sub_epi32(acc[r][v], _mm512_mullo_epi32(zeros, _mm512_set1_epi32(seen)));
            }
        }
    const i64 left = least(c->outputs - first, NV * 16);
    const Rounding shared = rounding(c);
    __m512 scale[4], bias[4];
    UNROLL for (int v = 0; v < NV; v++) {
        scale[v] = _mm512_loadu_ps(layer->scale + first + v * 16);
        bias[v] = _mm512_loadu_ps(layer->bias + first + v * 16);
    }
    if (KNOWN == REAL) {
        UNROLL for (int r = 0; r < MR; r++)
            UNROLL for (int v = 0; v < NV; v++)
                put_real((float *)write_at(ROW, places, r, c) + first + v * 16, acc[r][v], scale[v], bias[v],
                         left - v * 16, c);
        return;
    }
    UNROLL for (int r = 0; r < MR; r += NV > 2 ? 1 : 4 / NV) {
        __m512i steps[4];
        UNROLL for (int j = 0; j < 4; j++)
            steps[j] = j >= NV && NV == 3 ? _mm512_setzero_si512()
                     : requantized(KNOWN, acc[r + j / NV][j % NV], scale[j % NV], bias[j % NV], &shared);
        u8 *at[4];
        for (int k = 0; k < (NV > 2 ? 1 : 4 / NV); k++) at[k] = write_at(ROW, places, r + k, c) + first;
        put_windows(NV, at, packed(KNOWN, steps, &shared), left);
    }
}

#define TILE(NAME, MR, NV, KNOWN, ROW)                                                                           \
    VNNI static void NAME(const Windows *places, i64 first, const int8_t *weight, const Lines *lines,             \
                          const Layer *layer, const Conv *c) {                                                    \
        tile(MR, NV, KNOWN, ROW, places, first, weight, lines, layer, c);                                         \
    }
#define TILES_OF(NV, TALL, SHORT)           \
    TILE(far_##NV, SHORT, NV, FAR, 0)       \
    TILE(tall_##NV, TALL, NV, NEAR, 0)      \
    TILE(short_##NV, SHORT, NV, NEAR, 0)    \
    TILE(row_##NV, TALL, NV, NEAR, 1)       \
    TILE(plain_row_##NV, TALL, NV, PLAIN, 1) \
    TILE(real_##NV, TALL, NV, REAL, 0)      \
    TILE(real_short_##NV, SHORT, NV, REAL, 0)
TILES_OF(1, 16, 4)
TILES_OF(2, 12, 2)
TILES_OF(3, 8, 2)
TILES_OF(4, 6, 2)

typedef void (*Tile)(const Windows *, i64, const int8_t *, const Lines *, const Layer *, const Conv *);
enum { FEW, MANY, ROW };
/* by what is known of results, how many windows there are and whether of one row, and how many vectors of outputs */
static const Tile TILES[4][3][5] = {
    {{0, far_1, far_2, far_3, far_4}},
    {{0, short_1, short_2, short_3, short_4}, {0, tall_1, tall_2, tall_3, tall_4}, {0, row_1, row_2, row_3, row_4}},
    {{0, short_1, short_2, short_3, short_4},
     {0, tall_1, tall_2, tall_3, tall_4},
     {0, plain_row_1, plain_row_2, plain_row_3, plain_row_4}},
    {{0, real_short_1, real_short_2, real_short_3, real_short_4},
     {0, real_1, real_2, real_3, real_4},
     {0, real_1, real_2, real_3, real_4}},
};
static const int WINDOWS[3][5] = {{0, 4, 2, 2, 2}, {0, 16, 12, 8, 6}, {0, 16, 12, 8, 6}};

/* Output channels go by blocks of one to four vectors, as equal as can be: where block `number` begins. */
static i64 block_start(i64 vectors, i64 blocks, i64 number) { return number * vectors / blocks; }

/* Rows [top, bottom) of the input, with padding laid around and signed bytes made unsigned. */
static void lay_out(const u8 *x, u8 *strip, i64 top, i64 bottom, i64 wide, const Conv *c) {
    const i64 row = wide * c->channels, inside = c->width * c->channels, before = least(c->pad_x * c->channels, row);
    const i64 kept = least(inside, row - before);
    const u8 flip = c->is_signed ? 0x80 : 0;
    for (i64 y = top; y < bottom; y++, strip += row) {
        if (y < 0 || y >= c->height) {
            memset(strip, c->x_zero, row);
            continue;
        }
        memset(strip, c->x_zero, before);
        memset(strip + before + kept, c->x_zero, row - before - kept);
        if (!flip) memcpy(strip + before, x + y * inside, kept);
        else for (i64 i = 0; i < kept; i++) strip[before + i] = x[y * inside + i] ^ flip;
    }
}

/* Where windows begin: how many there are to a row and rows to an image, and how far apart they lie. */
typedef struct {
    const u8 *base;
    i64 columns, rows, row_stride, image_stride;
} Field;

/* `many` windows of a field, whose results follow each other */
static void windows(const Field *field, u8 *out, i64 many, i64 from_block, i64 to_block, const Lines *lines,
                    const Layer *layer, const Conv *c) {
    const i64 vectors = (c->outputs + 15) / 16, blocks = (vectors + 3) / 4;
    const i64 deep = lines->count * ((lines->bytes + 3) / 4) * 64, wide = c->outputs * (c->to_real ? 4 : 1);
    const int near = is_bounded(lines->count * lines->bytes, c->outputs, layer, c);
    const int known = c->to_real ? REAL : !near ? FAR : is_plain(c) ? PLAIN : NEAR;
    for (i64 block = from_block; block < to_block; block++) {
        const i64 begin = block_start(vectors, blocks, block), nv = block_start(vectors, blocks, block + 1) - begin;
        i64 row = 0, column = 0;
        const u8 *base = field->base;
        for (i64 at = 0, count; at < many; at += count) {
            Windows places;
            const int few = known == FAR || many - at <= WINDOWS[FEW][nv];
            const int which = few ? FEW : column + WINDOWS[ROW][nv] <= field->columns ? ROW : MANY;
            const i64 tall = WINDOWS[which][nv];
            count = least(many - at, tall);
            const i64 told = which == ROW && known != REAL ? 1 : tall;
            for (i64 r = 0; r < told; r++) {
                places.from[r] = base + row * field->row_stride + column * lines->stride;
                places.to[r] = out + (at + least(r, count - 1)) * wide;
                if (r >= count && r > 0) places.from[r] = places.from[r - 1]; /* the last again, for nothing */
                else if ((column += tall - told + 1) == field->columns) {
                    column = 0;
                    if (++row == field->rows) row = 0, base += field->image_stride;
                }
            }
            TILES[known][which][nv](&places, begin * 16, layer->weight + begin * deep, lines, layer, c);
        }
    }
}

/* One tap, nothing around it, bytes as they are: the windows are the pixels. */
static void direct(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {
    const i64 pixels = c->batch * c->rows * c->columns, vectors = (c->outputs + 15) / 16, blocks = (vectors + 3) / 4;
    const Lines lines = {1, c->channels, 0, c->channels};
    i64 chunk = 48 * 1024 / (c->channels + 1) / 24 * 24;
    chunk = chunk < 24 ? 24 : chunk;
    chunk = least(chunk, (pixels / 4 + 23) / 24 * 24);
    chunk = chunk < 24 ? 24 : chunk;
    const i64 chunks = (pixels + chunk - 1) / chunk;
#pragma omp parallel for collapse(2) schedule(dynamic) if (pixels * c->channels * c->outputs > 100000)
    for (i64 piece = 0; piece < chunks; piece++)
        for (i64 block = 0; block < blocks; block++) {
            const i64 at = piece * chunk, many = least(chunk, pixels - at);
            const Field field = {x + at * c->channels, many, 1, 0, 0};
            windows(&field, out + at * c->outputs, many, block, block + 1, &lines, layer, c);
        }
}

/* `batch` rows of `channels` bytes, a multiple of four, times the weight. */
EXPORT void eagerq_linear(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {
    const i64 rows = c->batch, vectors = (c->outputs + 15) / 16, blocks = (vectors + 3) / 4;
    const i64 wide = c->outputs * (c->to_real ? 4 : 1), work = rows * c->channels * c->outputs;
    const Lines lines = {1, c->channels, 0, c->channels};
    /* as many rows as stay in the second cache beside a block's weights, which all of them meet one by one */
    i64 chunk = 384 * 1024 / (c->channels + 1) / 24 * 24;
    if (c->to_real) chunk = least(chunk, 1024 * 1024 / wide / 24 * 24);
    if (blocks < 8) chunk = least(chunk, (rows / 4 + 23) / 24 * 24);
    chunk = chunk < 24 ? 24 : chunk;
    const i64 chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel for collapse(2) schedule(dynamic) if (work > 100000)
    for (i64 piece = 0; piece < chunks; piece++)
        for (i64 block = 0; block < blocks; block++) {
            const i64 at = piece * chunk, many = least(chunk, rows - at);
            const Field field = {x + at * c->channels, many, 1, 0, 0};
            windows(&field, out + at * wide, many, block, block + 1, &lines, layer, c);
        }
}

int eagerq_quantize_dynamic(const float *x, u8 *out, i64 n, int most, float *scale, int *zero);

/* The same of reals, made bytes by their own range; 1, and nothing done, where they are not all finite. */
EXPORT int eagerq_linear_dynamic(const float *x, u8 *bytes, u8 *out, int most, const Layer *layer, const Conv *c) {
    Conv own = *c;
    if (eagerq_quantize_dynamic(x, bytes, c->batch * c->channels, most, &own.x_scale, &own.x_zero)) return 1;
    eagerq_linear(bytes, out, layer, &own);
    return 0;
}

EXPORT void eagerq_conv(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {
    const int one = c->taps_y * c->taps_x == 1 && c->pad_y + c->pad_x == 0;
    if (one && c->every_y * c->every_x == 1 && !c->is_signed && c->channels % 4 == 0) {
        direct(x, out, layer, c);
        return;
    }
    const i64 wide = (c->columns - 1) * c->every_x + c->taps_x, row = wide * c->channels;
    const i64 deep = (c->taps_y - 1) * c->step_y + 1;
    const i64 vectors = (c->outputs + 15) / 16, blocks = (vectors + 3) / 4;
    const i64 weight = c->taps_y * ((c->taps_x * c->channels + 3) / 4) * 64 * vectors;
    /* strips of the output, of some 256 windows, or of small images all; of few, the outputs are parted too, so that
     * all threads have some; parts of a large weight meet as many images as stay in the second cache beside them */
    const int small = c->rows * c->columns <= 64;
    const i64 wanted = c->columns > 128 ? c->rows : (c->rows * c->columns + 255) / 256, most = wanted < 2 ? 2 : wanted;
    const i64 high = small ? c->rows : (c->rows + most - 1) / most, strips = (c->rows + high - 1) / high;
    const i64 room = ((high - 1) * c->every_y + deep) * row, fitting = small ? 384 * 1024 / room : 1;
    const i64 parts = small && weight > 256 * 1024 ? blocks : c->batch * strips < 8 && blocks > 1 ? 2 : 1;
    i64 together = least(fitting, c->batch * parts / 8);
    together = together < 1 ? 1 : together;
    const i64 stacks = (c->batch + together - 1) / together;
    const Lines lines = {c->taps_y, c->taps_x * c->channels, c->step_y * row, c->every_x * c->channels};
#pragma omp parallel
    {
        u8 *strip = malloc(together * room + 64);
        i64 laid = -1;
#pragma omp for schedule(dynamic)
        for (i64 piece = 0; piece < stacks * strips * parts; piece++) {
            const i64 part = piece % parts, first = piece / parts / strips * together, number = piece / parts % strips;
            const i64 images = least(together, c->batch - first);
            const i64 at = number * high, many = least(high, c->rows - at), top = at * c->every_y - c->pad_y;
            for (i64 image = 0; image < images && piece / parts != laid; image++)
                lay_out(x + (first + image) * c->height * c->width * c->channels, strip + image * room, top,
                        top + (many - 1) * c->every_y + deep, wide, c);
            laid = piece / parts;
            const Field field = {strip, c->columns, many, c->every_y * row, room};
            windows(&field, out + (first * c->rows + at) * c->columns * c->outputs, images * many * c->columns,
                    part * blocks / parts, (part + 1) * blocks / parts, &lines, layer, c);
        }
        free(strip);
    }
}

#else
EXPORT int eagerq_conv_ready(void) { return 0; }
EXPORT void eagerq_linear(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {}
EXPORT int eagerq_linear_dynamic(const float *x, u8 *bytes, u8 *out, int most, const Layer *layer, const Conv *c) {
    return 1;
}
EXPORT void eagerq_conv(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {}
#endif
