/* Convolutions of bytes with the channels last, where one call of a large library costs more than the work.
 *
 * Sums are exact (int32, by the processor's products of four bytes); what follows is float32, rounded at each
 * step as eagerq.kernels.reference does. Without AVX-512 VNNI none of this is compiled in or called.
 */
#include <stdlib.h>

#include "common.h"

/* The sizes and numbers of a call; sizes of the input, then of the output, then of the window. */
typedef struct {
    i64 batch, channels, height, width, outputs, rows, columns;
    i64 taps_y, taps_x, every_y, every_x, pad_y, pad_x, step_y, step_x;
    int32_t x_zero, is_signed, to_signed, to_real; /* to_real: float32, nothing requantized */
    float x_scale, inverse, zero, low, high;
} Conv;

/* What a layer knows by heart: the weight as packed by eagerq.native.conv, the sum of each channel's weights. */
typedef struct {
    const int8_t *weight;
    const int32_t *sums, *zeros; /* zeros: the weight's zero points, or null where all are 0 */
    const float *scale, *bias;
} Layer;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9
#include <immintrin.h>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define INLINE VNNI static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

EXPORT int eagerq_conv_ready(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

static i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* Sixteen sums to integers of the output: round(((sum * x_scale) * scale + bias) * inverse + zero), to be clamped. */
INLINE __m512i requantized(__m512i total, __m512 scale, __m512 bias, const Conv *c) {
    __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(c->x_scale)), scale);
    y = _mm512_add_ps(_mm512_mul_ps(_mm512_add_ps(y, bias), _mm512_set1_ps(c->inverse)), _mm512_set1_ps(c->zero));
    return _mm512_cvtps_epi32(_mm512_min_ps(y, _mm512_set1_ps(c->high))); /* what is far too low stays low */
}

/* Four vectors of integers to bytes, clamped; those of each lane of 16 bytes come from that lane of each vector. */
INLINE __m512i packed(const __m512i *steps, const Conv *c) {
    const __m512i low = _mm512_packs_epi32(steps[0], steps[1]), high = _mm512_packs_epi32(steps[2], steps[3]);
    const __m512i least = _mm512_set1_epi8((char)(int)c->low);
    return c->to_signed ? _mm512_max_epi8(_mm512_packs_epi16(low, high), least)
                        : _mm512_max_epu8(_mm512_packus_epi16(low, high), least);
}

/* The first `left` of 64 bytes: masks only where they must be, since some processors store slowly through them. */
INLINE void put(u8 *to, __m512i bytes, i64 left) {
    if (left >= 64) _mm512_storeu_si512(to, bytes);
    else if (left == 32) _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(bytes));
    else if (left == 16) _mm_storeu_si128((__m128i *)to, _mm512_castsi512_si128(bytes));
    else if (left == 48) {
        _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(bytes));
        _mm_storeu_si128((__m128i *)(to + 32), _mm512_extracti32x4_epi32(bytes, 2));
    } else if (left == 24) {
        _mm_storeu_si128((__m128i *)to, _mm512_castsi512_si128(bytes));
        _mm_storel_epi64((__m128i *)(to + 16), _mm512_extracti32x4_epi32(bytes, 1));
    } else _mm512_mask_storeu_epi8(to, (1ull << left) - 1, bytes);
}

/* --- all inputs to all outputs ------------------------------------------------------------------------- */

/* Lines of memory that a window reads: taps_y of them, each of a row's taps_x * channels bytes on end. */
typedef struct {
    i64 count, bytes, apart;
} Lines;

INLINE int32_t window_sum(const u8 *from, const Lines *lines) {
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

/* MR windows times NV * 16 outputs */
INLINE void tile(const int MR, const int NV, const int REAL, const u8 **from, u8 **to, i64 count, i64 first, const int8_t *weight,
                 const Lines *lines, const Layer *layer, const Conv *c) {
    __m512i acc[14][4];
    UNROLL for (int r = 0; r < MR; r++) UNROLL for (int v = 0; v < NV; v++) acc[r][v] = _mm512_setzero_si512();
    const i64 fours = (lines->bytes + 3) / 4;
    for (i64 line = 0; line < lines->count; line++) {
        const i64 start = line * lines->apart;
        const u8 *at[14];
        UNROLL for (int r = 0; r < MR; r++) at[r] = from[r] + start;
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
    int32_t off[14];
    if (layer->zeros)
        for (int r = 0; r < MR; r++)
            off[r] = window_sum(from[r], lines) - c->x_zero * (int32_t)(lines->count * lines->bytes);
    __m512i shift[4];
    UNROLL for (int v = 0; v < NV; v++)
        shift[v] = _mm512_mullo_epi32(_mm512_loadu_si512(layer->sums + first + v * 16), _mm512_set1_epi32(-c->x_zero));
    const i64 left = least(c->outputs - first, NV * 16);
    /* the four outputs that each vector gives to a lane, side by side */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    UNROLL for (int r = 0; r < MR; r++) {
        if (r == count) break;
        __m512i steps[4];
        UNROLL for (int v = 0; v < 4; v++) {
            if (v >= NV) { steps[v] = _mm512_setzero_si512(); continue; }
            const i64 channel = first + v * 16;
            __m512i total = _mm512_add_epi32(acc[r][v], shift[v]);
            if (layer->zeros)
                total = _mm512_sub_epi32(total, _mm512_mullo_epi32(_mm512_loadu_si512(layer->zeros + channel),
                                                                   _mm512_set1_epi32(off[r])));
            const __m512 scale = _mm512_loadu_ps(layer->scale + channel), bias = _mm512_loadu_ps(layer->bias + channel);
            if (REAL) put_real((float *)to[r] + channel, total, scale, bias, left - v * 16, c);
            else steps[v] = requantized(total, scale, bias, c);
        }
        if (!REAL) put(to[r] + first, _mm512_permutexvar_epi32(order, packed(steps, c)), left);
    }
}

#define TILE(NAME, MR, NV, REAL)                                                                                  \
    VNNI static void NAME(const u8 **from, u8 **to, i64 count, i64 first, const int8_t *weight,                   \
                          const Lines *lines, const Layer *layer, const Conv *c) {                                \
        tile(MR, NV, REAL, from, to, count, first, weight, lines, layer, c);                                      \
    }
#define TILES_OF(NV, MR)          \
    TILE(tile_##NV, MR, NV, 0)    \
    TILE(pair_##NV, 2, NV, 0)     \
    TILE(real_##NV, MR, NV, 1)    \
    TILE(real_pair_##NV, 2, NV, 1)
TILES_OF(1, 14)
TILES_OF(2, 12)
TILES_OF(3, 8)
TILES_OF(4, 6)

static const int TALL[] = {0, 14, 12, 8, 6};
typedef void (*Tile)(const u8 **, u8 **, i64, i64, const int8_t *, const Lines *, const Layer *, const Conv *);
/* by the kind of the result, whether there are but two windows, and how many vectors of outputs */
static const Tile TILES[2][2][5] = {
    {{0, tile_1, tile_2, tile_3, tile_4}, {0, pair_1, pair_2, pair_3, pair_4}},
    {{0, real_1, real_2, real_3, real_4}, {0, real_pair_1, real_pair_2, real_pair_3, real_pair_4}},
};

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

/* `many` windows from the one numbered `start` on, those of a row of the output `stride` bytes apart */
static void windows(const u8 *base, u8 *out, i64 many, i64 columns, i64 stride, i64 row_stride, i64 from_block,
                    i64 to_block, const Lines *lines, const Layer *layer, const Conv *c) {
    const i64 vectors = (c->outputs + 15) / 16, blocks = (vectors + 3) / 4;
    const i64 deep = lines->count * ((lines->bytes + 3) / 4) * 64, wide = c->outputs * (c->to_real ? 4 : 1);
    for (i64 block = from_block; block < to_block; block++) {
        const i64 begin = block_start(vectors, blocks, block), nv = block_start(vectors, blocks, block + 1) - begin;
        i64 row = 0, column = 0;
        for (i64 at = 0; at < many; at += TALL[nv]) {
            const u8 *from[14];
            u8 *to[14];
            const i64 count = many - at < TALL[nv] ? many - at : TALL[nv];
            for (i64 r = 0; r < TALL[nv]; r++) {
                from[r] = base + row * row_stride + column * stride;
                to[r] = out + (at + least(r, count - 1)) * wide;
                if (r >= count - 1) continue; /* the last again, for nothing */
                if (++column == columns) column = 0, row++;
            }
            if (++column == columns) column = 0, row++;
            TILES[c->to_real][count <= 2][nv](from, to, count, begin * 16, layer->weight + begin * deep, lines, layer, c);
        }
    }
}

/* One tap, nothing around it, bytes as they are: the windows are the pixels. */
static void direct(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {
    const i64 pixels = c->batch * c->rows * c->columns, vectors = (c->outputs + 15) / 16, blocks = (vectors + 3) / 4;
    const Lines lines = {1, c->channels, 0};
    i64 chunk = 48 * 1024 / (c->channels + 1) / 24 * 24;
    chunk = chunk < 24 ? 24 : chunk;
    chunk = least(chunk, (pixels / 4 + 23) / 24 * 24);
    chunk = chunk < 24 ? 24 : chunk;
    const i64 chunks = (pixels + chunk - 1) / chunk;
#pragma omp parallel for collapse(2) schedule(dynamic) if (pixels * c->channels * c->outputs > 100000)
    for (i64 piece = 0; piece < chunks; piece++)
        for (i64 block = 0; block < blocks; block++) {
            const i64 at = piece * chunk, many = least(chunk, pixels - at);
            windows(x + at * c->channels, out + at * c->outputs, many, many, c->channels, 0, block, block + 1, &lines,
                    layer, c);
        }
}

/* `batch` rows of `channels` bytes, a multiple of four, times the weight. */
EXPORT void eagerq_linear(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {
    const i64 rows = c->batch, vectors = (c->outputs + 15) / 16, blocks = (vectors + 3) / 4;
    const i64 wide = c->outputs * (c->to_real ? 4 : 1), work = rows * c->channels * c->outputs;
    const Lines lines = {1, c->channels, 0};
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
            windows(x + at * c->channels, out + at * wide, many, many, c->channels, 0, block, block + 1, &lines, layer, c);
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
    /* strips of the output, of some 256 windows; of few, the outputs are parted too, so that all threads have some */
    const i64 wanted = c->columns > 128 ? c->rows : (c->rows * c->columns + 255) / 256;
    const i64 high = c->rows < 2 ? 1 : (c->rows + (wanted < 2 ? 2 : wanted) - 1) / (wanted < 2 ? 2 : wanted);
    const i64 strips = (c->rows + high - 1) / high, parts = c->batch * strips < 8 && blocks > 1 ? 2 : 1;
    const Lines lines = {c->taps_y, c->taps_x * c->channels, c->step_y * row};
#pragma omp parallel
    {
        u8 *strip = malloc(((high - 1) * c->every_y + deep) * row + 64);
#pragma omp for schedule(dynamic)
        for (i64 piece = 0; piece < c->batch * strips * parts; piece++) {
                const i64 part = piece % parts, image = piece / parts / strips, number = piece / parts % strips;
                const i64 at = number * high, many = least(high, c->rows - at), top = at * c->every_y - c->pad_y;
                lay_out(x + image * c->height * c->width * c->channels, strip, top,
                        top + (many - 1) * c->every_y + deep, wide, c);
                windows(strip, out + (image * c->rows + at) * c->columns * c->outputs, many * c->columns, c->columns,
                        c->every_x * c->channels, c->every_y * row, part * blocks / parts, (part + 1) * blocks / parts, &lines, layer, c);
        }
        free(strip);
    }
}

/* --- each channel by itself ---------------------------------------------------------------------------- */

enum { STRETCH = 32 }; /* columns of the output at a time */

/* A column of the window's rows, channels apart: four bytes of four rows for each of 64 channels, in four vectors. */
INLINE void interleave(const u8 **from, i64 offset, __mmask64 some, __m512i outside, __m512i flip, u8 *to) {
    __m512i row[4];
    UNROLL for (int k = 0; k < 4; k++)
        row[k] = from[k] ? _mm512_xor_si512(_mm512_maskz_loadu_epi8(some, from[k] + offset), flip) : outside;
    const __m512i ab = _mm512_unpacklo_epi8(row[0], row[1]), cd = _mm512_unpacklo_epi8(row[2], row[3]);
    const __m512i AB = _mm512_unpackhi_epi8(row[0], row[1]), CD = _mm512_unpackhi_epi8(row[2], row[3]);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(ab, cd));
    _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(ab, cd));
    _mm512_store_si512(to + 128, _mm512_unpacklo_epi16(AB, CD));
    _mm512_store_si512(to + 192, _mm512_unpackhi_epi16(AB, CD));
}

/* One block of 64 channels of part of a row of the output. The packing of the results undoes the interleaving. */
INLINE void span(const int ODD, const i64 groups, const i64 taps_x, const u8 *columns, i64 apart, u8 *out, i64 many,
                 i64 left, const int8_t *weight, const int32_t *sums, const int32_t *zeros, const float *scale,
                 const float *bias, const Conv *c) {
    const __m512i x_zero = _mm512_set1_epi32(-c->x_zero), ones = _mm512_set1_epi8(1);
    const __m512i area = _mm512_set1_epi32(-c->x_zero * (int32_t)(groups * taps_x * 4)); /* untapped rows too */
    __m512i shift[4];
    UNROLL for (int j = 0; j < 4; j++) shift[j] = _mm512_mullo_epi32(_mm512_loadu_si512(sums + j * 16), x_zero);
    for (i64 at = 0; at < many; at++, out += c->channels) {
        __m512i acc[4], seen[4];
        UNROLL for (int j = 0; j < 4; j++) acc[j] = shift[j];
        if (ODD) UNROLL for (int j = 0; j < 4; j++) seen[j] = area;
        UNROLL for (i64 group = 0; group < groups; group++)
            UNROLL for (i64 tap = 0; tap < taps_x; tap++) {
                const u8 *from = columns + group * apart + (at * c->every_x + tap * c->step_x) * 256;
                const int8_t *w = weight + (group * taps_x + tap) * 256;
                UNROLL for (int j = 0; j < 4; j++) {
                    const __m512i x = _mm512_load_si512(from + j * 64);
                    acc[j] = _mm512_dpbusd_epi32(acc[j], x, _mm512_loadu_si512(w + j * 64));
                    if (ODD) seen[j] = _mm512_dpbusd_epi32(seen[j], x, ones);
                }
            }
        UNROLL for (int j = 0; j < 4; j++) {
            if (ODD) acc[j] = _mm512_sub_epi32(acc[j], _mm512_mullo_epi32(_mm512_loadu_si512(zeros + j * 16), seen[j]));
            acc[j] = requantized(acc[j], _mm512_loadu_ps(scale + j * 16), _mm512_loadu_ps(bias + j * 16), c);
        }
        put(out, packed(acc, c), left);
    }
}

VNNI static void spanned(const u8 *columns, i64 groups, i64 apart, u8 *out, i64 many, i64 left,
                         const int8_t *weight, const int32_t *sums, const int32_t *zeros, const float *scale,
                         const float *bias, const Conv *c) {
    const i64 taps_x = c->taps_x;
    if (zeros) span(1, groups, taps_x, columns, apart, out, many, left, weight, sums, zeros, scale, bias, c);
    else if (groups == 1 && taps_x == 3) span(0, 1, 3, columns, apart, out, many, left, weight, sums, zeros, scale, bias, c);
    else span(0, groups, taps_x, columns, apart, out, many, left, weight, sums, zeros, scale, bias, c);
}

VNNI static void depthwise_row(const u8 *image, u8 *out, i64 row, i64 block, i64 each, u8 *scratch, const Layer *layer,
                               const Conv *c) {
    const i64 first = block * each, left = least(each, c->channels - first), groups = (c->taps_y + 3) / 4;
    const __mmask64 some = left == 64 ? ~0ull : (1ull << left) - 1;
    const __m512i outside = _mm512_set1_epi8((char)c->x_zero), flip = _mm512_set1_epi8(c->is_signed ? (char)0x80 : 0);
    const u8 *none[4] = {0};
    for (i64 start = 0; start < c->columns; start += STRETCH) {
        const i64 many = least(STRETCH, c->columns - start);
        const i64 wide = (many - 1) * c->every_x + (c->taps_x - 1) * c->step_x + 1, apart = wide * 256;
        for (i64 group = 0; group < groups; group++) {
            const u8 *from[4];
            for (i64 k = 0; k < 4; k++) { /* rows that no tap reads have weights of 0 */
                const i64 y = row * c->every_y - c->pad_y + (group * 4 + k) * c->step_y;
                from[k] = y < 0 || y >= c->height || group * 4 + k >= c->taps_y
                        ? 0 : image + y * c->width * c->channels + first;
            }
            for (i64 i = 0; i < wide; i++) {
                const i64 x = start * c->every_x - c->pad_x + i;
                interleave(x < 0 || x >= c->width ? none : from, x * c->channels, some, outside, flip,
                           scratch + group * apart + i * 256);
            }
        }
        spanned(scratch, groups, apart, out + start * c->channels + first, many, left,
                layer->weight + block * groups * c->taps_x * 256, layer->sums + block * 64,
                layer->zeros ? layer->zeros + block * 64 : 0, layer->scale + block * 64, layer->bias + block * 64, c);
    }
}

/* The layer's channels are packed in blocks of 64, in the order of the interleaving: zeros in the places left over. */
EXPORT void eagerq_depthwise(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {
    const i64 blocks = (c->channels + 63) / 64, each = ((c->channels + blocks - 1) / blocks + 15) / 16 * 16;
    const i64 wide = (STRETCH - 1) * c->every_x + (c->taps_x - 1) * c->step_x + 1, groups = (c->taps_y + 3) / 4;
    const i64 lines = c->batch * c->rows;
#pragma omp parallel if (lines * c->columns * c->channels > 20000)
    {
        u8 *scratch = aligned_alloc(64, groups * wide * 256);
#pragma omp for schedule(static)
        for (i64 line = 0; line < lines; line++)
            for (i64 block = 0; block < blocks; block++)
                depthwise_row(x + line / c->rows * c->height * c->width * c->channels,
                              out + line * c->columns * c->channels, line % c->rows, block, each, scratch, layer, c);
        free(scratch);
    }
}

#else
EXPORT int eagerq_conv_ready(void) { return 0; }
EXPORT void eagerq_linear(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {}
EXPORT int eagerq_linear_dynamic(const float *x, u8 *bytes, u8 *out, int most, const Layer *layer, const Conv *c) {
    return 1;
}
EXPORT void eagerq_conv(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {}
EXPORT void eagerq_depthwise(const u8 *x, u8 *out, const Layer *layer, const Conv *c) {}
#endif
