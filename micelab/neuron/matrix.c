/* A convolution of spikes by the processor's matrix unit (Intel AMX), which multiplies bfloat16 and adds in float. A spike is 1,
   and a float is the sum of three bfloat16 of its sign, its upper, middle and lower bits: so every product is exact, and only
   the sums round, as in float, in one order whatever the batch and the number of threads. (Bits below 2^-126 are lost: to the
   unit they are 0.) Spikes, not 0 where there is one, and
   currents have channels last in memory; weights are [rows][columns][channels][outputs], with theta multiplied in, outputs a
   multiple of 16. */

#include <stdlib.h>

#include "lanes.h"

#if defined(__AMXBF16__) && defined(__AMXTILE__) /* the names that clang gave them first */
#define __AMX_BF16__ 1
#define __AMX_TILE__ 1
#endif

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* a tile is at most 16 rows of 64 bytes: 16 places by 32 numbers that they see, those by 16 outputs, or 16 places by 16 outputs */
#define SIDE 16
#define DEPTH 32
#define TILE (SIDE * DEPTH)
#define PARTS 3
#define ONE 0x3f80

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shapes;

/* The image lies in a room with an edge around it. What a place sees of one row of weights lies together there, `seen` numbers, in
   memory order; `blocks` times 32 of them are taken, those beyond with weights of 0. A strip is `places` places of the output in
   a row, or, where that needs fewer strips (`flat`), of all places of the room, whatever row: then edges are computed, too. */
typedef struct {
    const uint16_t *weights;
    const float *bias;
    int64_t channels, outputs, rows, stride, high, wide, room_row, blocks, places, strips;
    int flat;
} layer;

/* whether the matrix unit is here: the system must be asked for it */
int has_matrix_unit(void)
{
    const int ask = 0x1023, tiles = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, ask, tiles) == 0;
}

/* weights as tiles [outputs/16][rows][blocks][parts][16 pairs of what is seen][16 outputs][2] */
static void in_tiles(const float *weights, uint16_t *tiles, int64_t rows, int64_t seen, int64_t blocks, int64_t outputs)
{
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    for (int64_t output = 0; output < outputs; output += SIDE)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t at = 0; at < blocks * DEPTH; at += 2) {
                const float *from = weights + (row * seen + at) * outputs + output;
                __m512 first = at < seen ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
                __m512 second = at + 1 < seen ? _mm512_loadu_ps(from + outputs) : _mm512_setzero_ps();
                uint16_t *into = tiles + ((output / SIDE * rows + row) * blocks + at / DEPTH) * PARTS * TILE + at % DEPTH * SIDE;
                for (int part = 0; part < PARTS; part++, into += TILE) {
                    const __m512i a = _mm512_and_si512(_mm512_castps_si512(first), upper);
                    const __m512i b = _mm512_and_si512(_mm512_castps_si512(second), upper);
                    _mm512_storeu_si512(into, _mm512_or_si512(_mm512_srli_epi32(a, 16), b));
                    first = _mm512_sub_ps(first, _mm512_castsi512_ps(a));
                    second = _mm512_sub_ps(second, _mm512_castsi512_ps(b));
                }
            }
}

/* a row of an image as bfloat16, 1 where there is a spike */
static void in_ones(const float *spikes, uint16_t *into, int64_t size)
{
    for (int64_t at = 0; at < size; at += 2 * SIDE) {
        const int64_t left = size - at;
        const __mmask32 there = left < 2 * SIDE ? (1u << left) - 1 : 0xffffffff;
        const __m512 low = _mm512_maskz_loadu_ps((__mmask16)there, spikes + at);
        const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(there >> 16), spikes + at + SIDE);
        const __mmask32 first = _mm512_cmp_ps_mask(low, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __mmask32 second = _mm512_cmp_ps_mask(high, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        _mm512_mask_storeu_epi16(into + at, there, _mm512_maskz_set1_epi16(second << 16 | first, ONE));
    }
}

/* for each of `count` tiles of currents; the number of a tile must stand in the code */
#define EACH(count, DO)                                                                                                \
    do {                                                                                                               \
        DO(0);                                                                                                         \
        if (count > 1) {                                                                                               \
            DO(1);                                                                                                     \
            DO(2);                                                                                                     \
            DO(3);                                                                                                     \
        }                                                                                                              \
    } while (0)
#define BEGIN(i) _tile_loadd(i, bias, 0)
#define ADD(i)                                                                                                         \
    _tile_loadd(4, from[i] + at, apart);                                                                               \
    _tile_dpbf16ps(i, 4, 5);                                                                                           \
    _tile_dpbf16ps(i, 4, 6);                                                                                           \
    _tile_dpbf16ps(i, 4, 7)
#define END(i) _tile_stored(i, into[i], step)

/* the currents of `count` strips, 1 or 4, from `strip` on, 16 outputs of them */
INLINE void strips(const layer *k, const uint16_t *room, float *out, int64_t strip, int64_t output, const int count)
{
    float edges[4][SIDE * SIDE];
    const uint16_t *from[4];
    float *into[4];
    const int64_t across = (k->wide + k->places - 1) / k->places;
    for (int i = 0; i < count; i++) {
        const int64_t y = (strip + i) / across, x = (strip + i) % across * k->places;
        const int64_t first = x + k->places > k->wide ? k->wide - k->places : x; /* the last may overlap the one before */
        from[i] = room + (k->flat ? (strip + i) * SIDE * k->channels : y * k->stride * k->room_row + first * k->stride * k->channels);
        into[i] = k->flat ? edges[i] : out + (y * k->wide + first) * k->outputs + output;
    }
    const int64_t apart = 2 * k->stride * k->channels, step = 4 * (k->flat ? SIDE : k->outputs);
    const float *bias = k->bias + output;
    const uint16_t *weights = k->weights + output / SIDE * k->rows * k->blocks * PARTS * TILE;
    EACH(count, BEGIN);
    for (int64_t row = 0; row < k->rows; row++)
        for (int64_t block = 0; block < k->blocks; block++, weights += PARTS * TILE) {
            const int64_t at = row * k->room_row + block * DEPTH;
            _tile_loadd(5, weights, 64);
            _tile_loadd(6, weights + TILE, 64);
            _tile_loadd(7, weights + 2 * TILE, 64);
            EACH(count, ADD);
        }
    EACH(count, END);
    if (!k->flat)
        return;
    const int64_t room_wide = k->room_row / k->channels;
    int64_t y = strip * SIDE / room_wide, x = strip * SIDE % room_wide;
    for (int place = 0; place < count * SIDE && y < k->high; place++) {
        if (x < k->wide)
            memcpy(out + (y * k->wide + x) * k->outputs + output, edges[place / SIDE] + place % SIDE * SIDE, SIDE * sizeof(float));
        if (++x == room_wide) {
            x = 0;
            y++;
        }
    }
}

static void convolved(const layer *k, const uint16_t *room, float *out)
{
    __asm__ volatile("" ::: "memory"); /* tiles are loaded from what was stored before, which their intrinsics do not say */
    for (int64_t output = 0; output < k->outputs; output += SIDE) {
        int64_t strip = 0;
        for (; strip + 4 <= k->strips; strip += 4)
            strips(k, room, out, strip, output, 4);
        for (; strip < k->strips; strip++)
            strips(k, room, out, strip, output, 1);
    }
}

/* 0, or 1 where there is no memory for the weights or an image */
int convolve_matrix(const float *spikes, const float *weights, const float *bias, float *out, int64_t images, int64_t height,
                    int64_t width, int64_t channels, int64_t outputs, int64_t rows, int64_t columns, int64_t stride,
                    int64_t padding, int threads)
{
    const int64_t high = (height + 2 * padding - rows) / stride + 1, wide = (width + 2 * padding - columns) / stride + 1;
    const int64_t blocks = (columns * channels + DEPTH - 1) / DEPTH, room_wide = width + 2 * padding;
    const int64_t in_rows = high * ((wide + SIDE - 1) / SIDE), in_all = ((high - 1) * room_wide + wide + SIDE - 1) / SIDE;
    const int flat = stride == 1 && in_all < in_rows;
    uint16_t *tiles = aligned_alloc(64, outputs / SIDE * rows * blocks * PARTS * TILE * sizeof *tiles);
    const layer k = {tiles, bias, channels, outputs, rows, stride, high, wide, room_wide * channels, blocks,
                     flat || wide > SIDE ? SIDE : wide, flat ? in_all : in_rows, flat};
    int failed = !tiles;
    if (tiles)
        in_tiles(weights, tiles, rows, columns * channels, blocks, outputs);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint16_t *room = calloc(((height + 2 * padding) * room_wide + SIDE) * channels + DEPTH, sizeof *room);
        shapes tile = {.palette = 1};
        for (int i = 0; i < 8; i++) {
            tile.bytes[i] = 64;
            tile.rows[i] = i < 5 ? k.places : SIDE;
        }
        __asm__ volatile("" ::: "memory");
        _tile_loadconfig(&tile);
        if (!room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t image = 0; image < images; image++) {
            if (!room || !tiles)
                continue;
            for (int64_t y = 0; y < height; y++)
                in_ones(spikes + (image * height + y) * width * channels, room + (y + padding) * k.room_row + padding * channels,
                        width * channels);
            convolved(&k, room, out + image * high * wide * outputs);
        }
        _tile_release();
        free(room);
    }
    free(tiles);
    return failed;
}

#else

int has_matrix_unit(void)
{
    return 0;
}

int convolve_matrix(const float *spikes, const float *weights, const float *bias, float *out, int64_t images, int64_t height,
                    int64_t width, int64_t channels, int64_t outputs, int64_t rows, int64_t columns, int64_t stride,
                    int64_t padding, int threads)
{
    (void)spikes, (void)weights, (void)bias, (void)out, (void)images, (void)height, (void)width, (void)channels, (void)outputs;
    (void)rows, (void)columns, (void)stride, (void)padding, (void)threads;
    return 1;
}

#endif
