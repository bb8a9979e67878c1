/* A convolution of spikes, and the neurons that read it. A current is the bias and the weights of the spikes that its place sees,
   added in one order whatever the batch and the number of threads. In layers of few channels, spikes of eight channels make a
   set, and the sums of all sets are made beforehand; in others, spikes are listed and their weights added one by one. Spikes,
   not 0 where there is one, and currents have channels last in memory; weights are [rows][columns][channels][outputs], with theta
   multiplied in, outputs a multiple of 16, and of 32 where spikes are listed.
   Compiled without contraction, so that neurons round every sum and product as those in neuron.c do. */

#include <stddef.h>
#include <stdlib.h>

#include "lanes.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

/* channels whose spikes make one set, how many sets there are, and the side of the kernels that look sums of them up */
#define GROUP 8
#define SETS (1 << GROUP)
#define SIDE 3

/* images of a step and what is read and written of them, [steps][images][high][wide][outputs]: currents, or, where there is a
   theta, spikes of amplitude theta for those currents and the ones at `plus` (or NULL); theta and start are of each output,
   residual and count (or NULL) [images][high][wide][outputs] */
typedef struct {
    const float *spikes, *weights, *bias, *plus, *theta, *start;
    float *out, *count, *residual;
    int64_t steps, images, height, width, channels, outputs, rows, columns, stride, padding, high, wide;
} layer;

/* the neurons of a line of places of one image before the first step, V vectors of outputs from `block` on */
INLINE void begin(const layer *k, int64_t image, int64_t oy, int64_t block, const int V)
{
    if (!k->theta)
        return;
    int64_t at = (image * k->high + oy) * k->wide * k->outputs + block;
    for (int64_t ox = 0; ox < k->wide; ox++, at += k->outputs)
        for (int i = 0; i < V * LANES; i += LANES) {
            keep(k->residual + at + i, load(k->start + block + i));
            if (k->count)
                keep(k->count + at + i, (vector){0});
        }
}

/* LANES currents of one step: they go out, or charge the neurons at `here`, whose spikes do; `at`: where in the step's images */
INLINE void send(const layer *k, vector current, int64_t at, int64_t here, int64_t output)
{
    if (k->theta) {
        const vector theta = load(k->theta + output);
        if (k->plus)
            current += load(k->plus + at);
        const vector v = load(k->residual + here) + current;
        const vector spike = ones_where(v >= theta);
        current = spike * theta;
        keep(k->residual + here, v - current);
        if (k->count)
            keep(k->count + here, load(k->count + here) + spike);
    }
    keep(k->out + at, current);
}

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

/* for each LANES outputs, each group of channels and each set of them that may have fired, the sum of their weights at each place
   of the kernel: sums is [outputs/LANES][groups][SETS][SIDE][SIDE][LANES] */
void sum_sets(const float *weights, float *sums, int64_t channels, int64_t outputs)
{
    const int64_t taps = SIDE * SIDE;
    for (int64_t block = 0; block < outputs; block += LANES)
        for (int64_t channel = 0; channel < channels; channel += GROUP, sums += SETS * taps * LANES) {
            const int64_t many = channels - channel < GROUP ? channels - channel : GROUP;
            memset(sums, 0, taps * LANES * sizeof *sums);
            for (int64_t set = 1; set < 1 << many; set++) {
                const float *others = sums + (set & (set - 1)) * taps * LANES;
                const float *lowest = weights + (channel + __builtin_ctz(set)) * outputs + block;
                for (int64_t tap = 0; tap < taps; tap++)
                    keep(sums + (set * taps + tap) * LANES, load(others + tap * LANES) + load(lowest + tap * channels * outputs));
            }
        }
}

/* which of the first `many` of LANES values are not 0, a bit each */
INLINE uint32_t fired(const float *values, int64_t many)
{
#if defined __AVX512F__
    const __m512 there = _mm512_maskz_loadu_ps((1 << many) - 1, values);
    return _mm512_cmp_ps_mask(there, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif defined __AVX__
    if (many == LANES)
        return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values), _mm256_setzero_ps(), _CMP_NEQ_UQ));
#endif
    uint32_t bits = 0;
    for (int64_t i = 0; i < many; i++)
        bits |= (uint32_t)(values[i] != 0.0f) << i;
    return bits;
}

/* where the sums of each set of an image's spikes begin, with an edge of silence, [height + 2*padding][width + 2*padding][groups] */
INLINE void find_sets(const layer *k, const float *values, int32_t *found, const int64_t channels)
{
    const int64_t pad = k->padding, groups = (channels + GROUP - 1) / GROUP, wide = k->width + 2 * pad;
    const int32_t size = SIDE * SIDE * LANES;
    for (int64_t y = -pad; y < k->height + pad; y++) {
        const int64_t inside = y >= 0 && y < k->height;
        for (int64_t x = 0; x < wide; x++)
            if (!inside || x < pad || x >= k->width + pad)
                for (int64_t group = 0; group < groups; group++)
                    found[x * groups + group] = group * SETS * size;
        for (int64_t x = 0; x < inside * k->width; x++, values += channels)
#pragma GCC unroll 4
            for (int64_t at = 0; at < channels; at += LANES) {
                const uint32_t bits = fired(values + at, channels - at < LANES ? channels - at : LANES);
                for (int64_t group = at / GROUP; group < groups && group < (at + LANES) / GROUP; group++)
                    found[(x + pad) * groups + group] = (group * SETS + (bits >> (group * GROUP - at)) % SETS) * size;
            }
        found += wide * groups;
    }
}

/* one line of places of one image at one step, LANES outputs from `block` on: at each place the sums of the sets that it sees */
INLINE void look_up(const layer *k, const int32_t *found, const float *sums, int64_t step, int64_t image, int64_t oy, int64_t block,
                    const int64_t groups)
{
    const int64_t line = (k->width + 2 * k->padding) * groups;
    const int32_t *seen = found + oy * k->stride * line;
    int64_t here = (image * k->high + oy) * k->wide * k->outputs + block;
    const int64_t ahead = step * k->images * k->high * k->wide * k->outputs;
    for (int64_t ox = 0; ox < k->wide; ox++, seen += k->stride * groups, here += k->outputs) {
        vector even = load(k->bias + block), odd = {0};
#pragma GCC unroll 3
        for (int64_t row = 0; row < SIDE; row++)
#pragma GCC unroll 3
            for (int64_t column = 0; column < SIDE; column++)
#pragma GCC unroll 4
                for (int64_t group = 0; group < groups; group++) {
                    const vector sum = load(sums + seen[row * line + column * groups + group] + (row * SIDE + column) * LANES);
                    if (group % 2)
                        odd += sum;
                    else
                        even += sum;
                }
        send(k, even + odd, ahead + here, here, block);
    }
}

/* all steps of one image; found: room for the places of all their sets */
INLINE void by_sets(const layer *k, int32_t *found, const float *sums, int64_t image, int64_t block, const int64_t channels)
{
    const int64_t groups = (channels + GROUP - 1) / GROUP, pad = 2 * k->padding, size = (k->height + pad) * (k->width + pad) * groups;
    for (int64_t step = 0; step < k->steps; step++)
        find_sets(k, k->spikes + (step * k->images + image) * k->height * k->width * channels, found + step * size, channels);
    for (int64_t oy = 0; oy < k->high; oy++) {
        begin(k, image, oy, block, 1);
        for (int64_t step = 0; step < k->steps; step++)
            look_up(k, found + step * size, sums, step, image, oy, block, groups);
    }
}

/* one line of places of one image at one step, V vectors of outputs from `block` on; list: the spikes' places in their row of the
   image, row after row; start[y*(width + 1) + x]: where those of column x and beyond begin */
INLINE void gather(const layer *k, const int32_t *list, const int64_t *start, int64_t step, int64_t image, int64_t oy, int64_t block,
                   const int V)
{
    int64_t here = (image * k->high + oy) * k->wide * k->outputs + block;
    const int64_t ahead = step * k->images * k->high * k->wide * k->outputs;
    for (int64_t ox = 0; ox < k->wide; ox++, here += k->outputs) {
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
            send(k, even[i] + odd[i], ahead + here + i * LANES, here + i * LANES, block + i * LANES);
    }
}

/* all steps of one image; list and start: room for the spikes of all of them */
INLINE void by_lists(const layer *k, int32_t *list, int64_t *start, int64_t image, int64_t block, const int V)
{
    const int64_t size = k->height * (k->width + 1);
    for (int64_t oy = 0; oy < k->high; oy++) {
        begin(k, image, oy, block, V);
        for (int64_t step = 0; step < k->steps; step++)
            gather(k, list, start + step * size, step, image, oy, block, V);
    }
}

static int with_lists(const layer *k, int threads)
{
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int32_t *list = malloc((k->steps * k->height * k->width * k->channels + 16) * sizeof *list);
        int64_t *start = malloc(k->steps * k->height * (k->width + 1) * sizeof *start);
        if (!list || !start) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t image = 0; image < k->images; image++) {
            if (!list || !start)
                continue;
            int64_t found = 0, *next = start;
            for (int64_t step = 0; step < k->steps; step++) {
                const float *values = k->spikes + (step * k->images + image) * k->height * k->width * k->channels;
                for (int64_t y = 0; y < k->height; y++, *next++ = found)
                    for (int64_t x = 0; x < k->width; x++, values += k->channels) {
                        *next++ = found;
                        found += listed(values, k->channels, x * k->channels, list + found);
                    }
            }
            int64_t block = 0;
            for (; k->outputs - block >= 4 * LANES; block += 4 * LANES)
                by_lists(k, list, start, image, block, 4);
            for (; block < k->outputs; block += 2 * LANES)
                by_lists(k, list, start, image, block, 2);
        }
        free(list);
        free(start);
    }
    return failed;
}

static int with_sets(const layer *k, const float *sums, int threads)
{
    const int64_t groups = (k->channels + GROUP - 1) / GROUP, pad = 2 * k->padding;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int32_t *found = malloc(k->steps * (k->height + pad) * (k->width + pad) * groups * sizeof *found);
        if (!found) {
#pragma omp atomic write
            failed = 1;
        }
        const float *those = sums;
        for (int64_t block = 0; block < k->outputs; block += LANES, those += groups * SETS * SIDE * SIDE * LANES) {
#pragma omp for schedule(static) nowait
            for (int64_t image = 0; image < k->images; image++)
                if (found && k->channels == 16)
                    by_sets(k, found, those, image, block, 16);
                else if (found && k->channels == 32)
                    by_sets(k, found, those, image, block, 32);
                else if (found)
                    by_sets(k, found, those, image, block, k->channels);
        }
        free(found);
    }
    return failed;
}

/* Without theta there are no neurons, and images are those of all steps. sums: of `sum_sets`, for a kernel of SIDE x SIDE,
   or NULL: then spikes are listed. 0, or 1 where there is no memory for sets or lists */
int fire_events(const float *spikes, const float *weights, const float *sums, const float *bias, const float *plus,
                const float *theta, const float *start, float *out, float *count, float *residual, int64_t steps, int64_t images,
                int64_t height, int64_t width, int64_t channels, int64_t outputs, int64_t rows, int64_t columns, int64_t stride,
                int64_t padding, int threads)
{
    const int64_t high = (height + 2 * padding - rows) / stride + 1, wide = (width + 2 * padding - columns) / stride + 1;
    const layer k = {spikes, weights, bias, plus, theta, start, out, count, residual, steps, images, height, width, channels,
                     outputs, rows, columns, stride, padding, high, wide};
    return sums ? with_sets(&k, sums, threads) : with_lists(&k, threads);
}
