/* A convolution that follows spikes: a current is the bias and the weights of the spikes that its place sees, added in one order
   whatever the batch and the number of threads. Spikes, not 0 where there is one, and currents have channels last in memory;
   weights are [rows][columns][channels][outputs], with theta multiplied in, outputs a multiple of 32. */

#include <stddef.h>
#include <stdlib.h>

#include "lanes.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef struct {
    const float *weights, *bias;
    int64_t height, width, channels, outputs, rows, columns, stride, padding, high, wide;
} layer;

/* the places of values that are not 0, counted from `from` on, into `list`; gives back how many they are. Writes up to 16 more. */
INLINE int64_t listed(const float *values, int64_t size, int32_t from, int32_t *list)
{
    int64_t found = 0;
#ifdef __AVX512F__
    const __m512i ahead = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t at = 0; at < size; at += 16) {
        const __mmask16 there = size - at < 16 ? (1 << (size - at)) - 1 : 0xffff;
        const __mmask16 spikes = _mm512_cmp_ps_mask(_mm512_maskz_loadu_ps(there, values + at), _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(from + (int32_t)at), ahead);
        _mm512_storeu_si512(list + found, _mm512_maskz_compress_epi32(spikes, places));
        found += __builtin_popcount(spikes);
    }
#else
    for (int64_t at = 0; at < size; at++) {
        list[found] = from + (int32_t)at;
        found += values[at] != 0.0f;
    }
#endif
    return found;
}

/* for 3x3 weights and stride 1: adds what the spikes of each place give to the nine around it, V vectors of outputs from `block` on;
   room: the currents, and an edge around them that some spikes beside it reach */
INLINE void spread(const layer *k, float *room, const int32_t *list, const int64_t *start, int64_t block, const int V)
{
    const int64_t step = k->channels * k->outputs;
    for (int64_t y = 0; y < k->height; y++)
        for (int64_t x = 0; x < k->width; x++) {
            const int32_t *at = list + start[y * (k->width + 1) + x], *end = list + start[y * (k->width + 1) + x + 1];
            if (at == end)
                continue;
            vector sum[9][V];
            const float *weights = k->weights + block - x * step;
#pragma GCC unroll 9
            for (int tap = 0; tap < 9; tap++)
#pragma GCC unroll 8
                for (int i = 0; i < V; i++)
                    sum[tap][i] = load(weights + *at * k->outputs + tap * step + i * LANES);
            for (at++; at < end; at++)
#pragma GCC unroll 9
                for (int tap = 0; tap < 9; tap++)
#pragma GCC unroll 8
                    for (int i = 0; i < V; i++)
                        sum[tap][i] += load(weights + *at * k->outputs + tap * step + i * LANES);
#pragma GCC unroll 9
            for (int tap = 0; tap < 9; tap++)
#pragma GCC unroll 8
                for (int i = 0; i < V; i++) {
                    float *into = room + ((y + 2 - tap / 3) * (k->width + 2) + x + 2 - tap % 3) * k->outputs + block + i * LANES;
                    keep(into, load(into) + sum[tap][i]);
                }
        }
}

/* the currents of V vectors of outputs from `block` on; list: the spikes' places in their row of the image, row after row;
   start[y*(width + 1) + x]: where those of column x and beyond begin */
INLINE void gather(const layer *k, float *out, const int32_t *list, const int64_t *start, int64_t block, const int V)
{
    for (int64_t oy = 0; oy < k->high; oy++)
        for (int64_t ox = 0; ox < k->wide; ox++) {
            vector even[V], odd[V];
#pragma GCC unroll 8
            for (int i = 0; i < V; i++) {
                even[i] = load(k->bias + block + i * LANES);
                odd[i] = (vector){0};
            }
            const int64_t left = ox * k->stride - k->padding, right = left + k->columns;
            const int64_t from = left < 0 ? 0 : left, to = right > k->width ? k->width : right;
            for (int64_t row = 0; row < k->rows && from < to; row++) {
                const int64_t y = oy * k->stride - k->padding + row;
                if (y < 0 || y >= k->height)
                    continue;
                const int32_t *at = list + start[y * (k->width + 1) + from], *end = list + start[y * (k->width + 1) + to];
                const float *weights = k->weights + block;
                const int64_t base = (row * k->columns - left) * k->channels;
                for (; at + 1 < end; at += 2) {
                    const float *first = weights + (base + at[0]) * k->outputs, *second = weights + (base + at[1]) * k->outputs;
#pragma GCC unroll 8
                    for (int i = 0; i < V; i++) {
                        even[i] += load(first + i * LANES);
                        odd[i] += load(second + i * LANES);
                    }
                }
                if (at < end)
#pragma GCC unroll 8
                    for (int i = 0; i < V; i++)
                        even[i] += load(weights + (base + at[0]) * k->outputs + i * LANES);
            }
#pragma GCC unroll 8
            for (int i = 0; i < V; i++)
                keep(out + (oy * k->wide + ox) * k->outputs + block + i * LANES, even[i] + odd[i]);
        }
}

/* every output's bias in a room for currents with an edge around them, then what `spread` adds, then the currents out of it */
static void spread_all(const layer *k, float *room, float *out, const int32_t *list, const int64_t *start)
{
    const int64_t wide = k->width + 2, inside = 2 - k->padding;
    for (int64_t place = 0; place < (k->height + 2) * wide; place++)
        memcpy(room + place * k->outputs, k->bias, k->outputs * sizeof *room);
    for (int64_t block = 0; block < k->outputs; block += 2 * LANES)
        spread(k, room, list, start, block, 2);
    for (int64_t y = 0; y < k->high; y++)
        memcpy(out + y * k->wide * k->outputs, room + ((y + inside) * wide + inside) * k->outputs, k->wide * k->outputs * sizeof *out);
}

static void gather_all(const layer *k, float *out, const int32_t *list, const int64_t *start)
{
    int64_t block = 0;
    for (; k->outputs - block >= 4 * LANES; block += 4 * LANES)
        gather(k, out, list, start, block, 4);
    for (; block < k->outputs; block += 2 * LANES)
        gather(k, out, list, start, block, 2);
}

/* 0, or 1 where there is no memory for the lists */
int convolve_events(const float *spikes, const float *weights, const float *bias, float *out, int64_t images, int64_t height,
                    int64_t width, int64_t channels, int64_t outputs, int64_t rows, int64_t columns, int64_t stride,
                    int64_t padding, int threads)
{
    const int64_t high = (height + 2 * padding - rows) / stride + 1, wide = (width + 2 * padding - columns) / stride + 1;
    const layer k = {weights, bias, height, width, channels, outputs, rows, columns, stride, padding, high, wide};
    const int spreads = rows == 3 && columns == 3 && stride == 1 && padding <= 2 && outputs < 4 * LANES; /* `gather` takes 4 at once */
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int32_t *list = malloc((height * width * channels + 16) * sizeof *list);
        int64_t *start = malloc(height * (width + 1) * sizeof *start);
        float *room = malloc(spreads ? (height + 2) * (width + 2) * outputs * sizeof *room : 1);
        if (!list || !start || !room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t image = 0; image < images; image++) {
            if (!list || !start || !room)
                continue;
            const float *values = spikes + image * height * width * channels;
            int64_t found = 0;
            for (int64_t y = 0; y < height; y++)
                for (int64_t x = 0; x <= width; x++) {
                    start[y * (width + 1) + x] = found;
                    if (x < width)
                        found += listed(values + (y * width + x) * channels, channels, x * channels, list + found);
                }
            float *into = out + image * high * wide * outputs;
            if (spreads)
                spread_all(&k, room, into, list, start);
            else
                gather_all(&k, into, list, start);
        }
        free(list);
        free(start);
        free(room);
    }
    return failed;
}
