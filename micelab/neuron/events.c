/* A convolution of spikes, and the neurons that read it. A current is the bias and the weights of the spikes that its place sees,
   added in one order whatever the batch and the number of threads. In layers of few channels, spikes of eight channels make a
   set, and the sums of all sets are made beforehand; in others, spikes are listed and their weights added one by one.
   A spike is a bit: bytes are [steps][images][height][width][eights of channels], the first of eight the lowest bit, and 0 beyond
   the last channel. Currents have channels last in memory; weights are [rows][columns][channels][outputs], with theta multiplied
   in, outputs a multiple of 16, and of 32 where spikes are listed.
   Weights may be integers of 16 bits, of which a scale for each output makes currents: those are added exactly.
   Compiled without contraction, so that neurons round every sum and product as those in neuron.c do. */

#include <stddef.h>
#include <stdlib.h>

#include "lanes.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

/* channels whose spikes make one set, and how many sets there are */
#define GROUP 8
#define SETS (1 << GROUP)

#if LANES == 16
typedef uint16_t bits;
#else
typedef uint8_t bits;
#endif
typedef int16_t integers __attribute__((vector_size(2 * LANES)));

/* spikes of the steps of some images, and what is made of them: currents `out` [steps][images][high][wide][outputs], bf16 where
   `half`; or, where
   there is a theta, bits `fired` for those currents, those at `plus` (or NULL) and spikes `more` (or NULL) of height `amplitude`;
   theta and start are of each output, residual and count (or NULL) [images][high][wide][outputs] */
typedef struct {
    const uint8_t *spikes;
    const void *weights;
    const float *bias, *scale, *plus;
    const uint8_t *more;
    const float *amplitude, *theta, *start;
    void *out;
    uint8_t *fired;
    float *count, *residual;
    int64_t steps, images, height, width, channels, outputs, rows, columns, stride, padding, high, wide;
    int half;
} layer;

/* bytes of the spikes of a place */
INLINE int64_t eights(int64_t channels)
{
    return (channels + GROUP - 1) / GROUP;
}

/* which of LANES membranes are at their threshold or above, a bit each */
INLINE bits reached(vector v, vector theta)
{
#if defined __AVX512F__
    return _mm512_cmp_ps_mask((__m512)v, (__m512)theta, _CMP_GE_OQ);
#elif defined __AVX__
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)theta, _CMP_GE_OQ));
#else
    bits yes = 0;
    for (int i = 0; i < LANES; i++)
        yes |= (v[i] >= theta[i]) << i;
    return yes;
#endif
}

/* `values` where there is a bit, else 0 */
INLINE vector where(bits yes, vector values)
{
#ifdef __AVX512F__
    return (vector)_mm512_maskz_mov_ps(yes, (__m512)values);
#else
    const mask each = {1, 2, 4, 8, 16, 32, 64, 128};
    mask number;
    memcpy(&number, &values, sizeof number);
    number &= ((each & (int32_t)yes) != 0);
    memcpy(&values, &number, sizeof values);
    return values;
#endif
}

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

/* what LANES outputs are about, the same at every place */
typedef struct {
    vector bias, scale, theta, amplitude;
} numbers;

INLINE numbers of_outputs(const layer *k, int64_t output)
{
    numbers n = {load(k->bias + output), {0}, {0}, {0}};
    if (k->scale)
        n.scale = load(k->scale + output);
    if (k->theta)
        n.theta = load(k->theta + output);
    if (k->more)
        n.amplitude = load(k->amplitude + output);
    return n;
}

/* sums of LANES weights each, floats or, whole, integers */
typedef struct {
    vector floats;
    integers whole;
} sum;

/* adds LANES weights, from number `at` on */
INLINE void add(sum *to, const void *weights, int64_t at, const int whole)
{
    if (whole) {
        integers more;
        memcpy(&more, (const int16_t *)weights + at, sizeof more);
        to->whole += more;
    } else
        to->floats += load((const float *)weights + at);
}

/* the currents that two sums make */
INLINE vector currents(const sum *even, const sum *odd, const numbers *n, const int whole)
{
    if (!whole)
        return even->floats + odd->floats;
    return __builtin_convertvector(even->whole + odd->whole, vector) * n->scale + n->bias;
}

/* LANES currents of one step: they go out, or charge the neurons at `here`, whose spikes do; `at`: where in the step's images */
INLINE void send(const layer *k, const numbers *n, vector current, int64_t at, int64_t here)
{
    if (!k->theta) {
        put(k->out, at, 4 * LANES, k->half, current);
        return;
    }
    if (k->plus)
        current += load(k->plus + at);
    if (k->more) {
        bits others;
        memcpy(&others, k->more + at / GROUP, sizeof others);
        current += where(others, n->amplitude);
    }
    const vector v = load(k->residual + here) + current;
    const bits spikes = reached(v, n->theta);
    memcpy(k->fired + at / GROUP, &spikes, sizeof spikes);
    keep(k->residual + here, v - where(spikes, n->theta));
    if (k->count)
        keep(k->count + here, load(k->count + here) + where(spikes, (vector){0} + 1.0f));
}

/* the channels of a place's spikes, counted from `from` on, into `list`; gives back how many they are. Writes up to 16 more. */
INLINE int64_t listed(const uint8_t *spikes, int64_t channels, int32_t from, int32_t *list)
{
    int64_t found = 0;
#ifdef __AVX512F__
    const __m512i ahead = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t at = 0; at < channels; at += 16) {
        uint16_t these = spikes[at / GROUP];
        if (channels - at > GROUP)
            these |= spikes[at / GROUP + 1] << GROUP;
        const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(from + (int32_t)at), ahead);
        _mm512_storeu_si512(list + found, _mm512_maskz_compress_epi32(these, places));
        found += __builtin_popcount(these);
    }
#else
    for (int64_t at = 0; at < eights(channels); at++)
        for (unsigned these = spikes[at]; these; these &= these - 1)
            list[found++] = from + (int32_t)at * GROUP + __builtin_ctz(these);
#endif
    return found;
}

/* which of LANES values are not 0 */
INLINE bits fired(vector values)
{
#if defined __AVX512F__
    return _mm512_cmp_ps_mask((__m512)values, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif defined __AVX__
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)values, _mm256_setzero_ps(), _CMP_NEQ_UQ));
#else
    bits yes = 0;
    for (int i = 0; i < LANES; i++)
        yes |= (values[i] != 0.0f) << i;
    return yes;
#endif
}

/* `many` of LANES values from number `at` on as bits: 1 where they are not 0 */
INLINE void pack(const void *values, int64_t at, uint8_t *packed, const int64_t many, const int half)
{
    const bits spikes = fired(take(values, at, 4 * many, half));
    memcpy(packed, &spikes, eights(many));
}

/* the reverse: `amplitude`, of each channel, where there is a bit */
INLINE void unpack(const uint8_t *packed, const float *amplitude, float *values, const int64_t many)
{
    vector heights = {0};
    bits spikes = 0;
    memcpy(&heights, amplitude, many * sizeof *amplitude);
    memcpy(&spikes, packed, eights(many));
    heights = where(spikes, heights);
    memcpy(values, &heights, many * sizeof *values);
}

INLINE void pack_place(const void *values, uint8_t *packed, int64_t place, int64_t channels, const int half)
{
    const int64_t whole = channels - channels % LANES, from = place * channels;
    uint8_t *to = packed + place * eights(channels);
    for (int64_t at = 0; at < whole; at += LANES)
        pack(values, from + at, to + at / GROUP, LANES, half);
    if (whole < channels)
        pack(values, from + whole, to + whole / GROUP, channels - whole, half);
}

/* values [places][channels], fp32 or, half, bf16, as bits; and back, in fp32 */
void pack_spikes(const void *values, uint8_t *packed, int64_t places, int64_t channels, int half, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t place = 0; place < places; place++) {
        if (half)
            pack_place(values, packed, place, channels, 1);
        else
            pack_place(values, packed, place, channels, 0);
    }
}

void unpack_spikes(const uint8_t *packed, const float *amplitude, float *values, int64_t places, int64_t channels, int threads)
{
    const int64_t whole = channels - channels % LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t place = 0; place < places; place++) {
        const uint8_t *from = packed + place * eights(channels);
        float *to = values + place * channels;
        for (int64_t at = 0; at < whole; at += LANES)
            unpack(from + at / GROUP, amplitude + at, to + at, LANES);
        if (whole < channels)
            unpack(from + whole / GROUP, amplitude + whole, to + whole, channels - whole);
    }
}

/* a place's plain neurons, whose currents are at hand: those of the next step lie `ahead` numbers further, or, where it is 0, are the
   same; theta and start are of each channel, count may be NULL */
INLINE void fire_place(const float *currents, int64_t ahead, const float *theta, const float *start, uint8_t *fired, float *count,
                       float *residual, int64_t steps, int64_t place, int64_t places, int64_t channels)
{
    for (int64_t at = 0; at < channels; at += LANES) {
        const int64_t here = place * channels + at;
        const vector bound = load(theta + at), one = (vector){0} + 1.0f;
        vector v = load(start + at), sent = {0}, current = load(currents + here);
        for (int64_t step = 0; step < steps; step++) {
            if (ahead)
                current = load(currents + step * ahead + here);
            v += current;
            const bits spikes = reached(v, bound);
            memcpy(fired + (step * places * channels + here) / GROUP, &spikes, sizeof spikes);
            v -= where(spikes, bound);
            sent += where(spikes, one);
        }
        keep(residual + here, v);
        if (count)
            keep(count + here, sent);
    }
}

/* currents [steps, or one for all][places][channels], channels a multiple of 16, to bits `fired` [steps][places][eights] */
void fire_bits(const float *currents, const float *theta, const float *start, uint8_t *fired, float *count, float *residual,
               int64_t steps, int64_t ahead, int64_t places, int64_t channels, int threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t place = 0; place < places; place++) {
        if (ahead)
            fire_place(currents, ahead, theta, start, fired, count, residual, steps, place, places, channels);
        else
            fire_place(currents, 0, theta, start, fired, count, residual, steps, place, places, channels);
    }
}

INLINE void all_sets(const void *weights, void *sums, int64_t taps, int64_t channels, int64_t outputs, const int whole)
{
    const int64_t size = whole ? sizeof(int16_t) : sizeof(float);
    char *into = sums;
    for (int64_t block = 0; block < outputs; block += LANES)
        for (int64_t channel = 0; channel < channels; channel += GROUP, into += SETS * taps * LANES * size) {
            const int64_t many = channels - channel < GROUP ? channels - channel : GROUP;
            memset(into, 0, taps * LANES * size);
            for (int64_t set = 1; set < 1 << many; set++)
                for (int64_t tap = 0; tap < taps; tap++) {
                    sum both = {{0}, {0}};
                    add(&both, into, ((set & (set - 1)) * taps + tap) * LANES, whole);
                    add(&both, weights, (tap * channels + channel + __builtin_ctz(set)) * outputs + block, whole);
                    char *here = into + (set * taps + tap) * LANES * size;
                    if (whole)
                        memcpy(here, &both.whole, sizeof both.whole);
                    else
                        keep((float *)here, both.floats);
                }
        }
}

/* for each LANES outputs, each group of channels and each set of them that may have fired, the sum of their weights at each of the
   `taps` places of the kernel: sums is [outputs/LANES][groups][SETS][taps][LANES], of the weights' kind */
void sum_sets(const void *weights, void *sums, int64_t taps, int64_t channels, int64_t outputs, int whole)
{
    if (whole)
        all_sets(weights, sums, taps, channels, outputs, 1);
    else
        all_sets(weights, sums, taps, channels, outputs, 0);
}

/* where the sums of `many` places' sets begin, or, without spikes, those of silence; kernels are side x side */
INLINE void find_line(const uint8_t *spikes, int32_t *found, int64_t many, const int64_t groups, const int64_t side)
{
    const int32_t size = side * side * LANES;
    for (int64_t i = 0; i < many * groups; i++)
        found[i] = ((int32_t)(i % groups) * SETS + (spikes ? spikes[i] : 0)) * size;
}

/* the same for an image with an edge of silence, [height + 2*padding][width + 2*padding][groups] */
INLINE void find_sets(const layer *k, const uint8_t *spikes, int32_t *found, const int64_t groups, const int64_t side)
{
    const int64_t pad = k->padding, wide = k->width + 2 * pad;
    find_line(NULL, found, pad * wide, groups, side);
    found += pad * wide * groups;
    for (int64_t y = 0; y < k->height; y++, found += wide * groups, spikes += k->width * groups) {
        find_line(NULL, found, pad, groups, side);
        find_line(spikes, found + pad * groups, k->width, groups, side);
        find_line(NULL, found + (pad + k->width) * groups, pad, groups, side);
    }
    find_line(NULL, found, pad * wide, groups, side);
}

/* one line of places of one image at one step, LANES outputs from `block` on: at each place the sums of the sets that it sees */
INLINE void look_up(const layer *of, const int32_t *found, const void *sums, int64_t step, int64_t image, int64_t oy, int64_t block,
                    const int64_t groups, const int64_t side, const int whole)
{
    const layer own = *of, *k = &own; /* nothing that is written can change it */
    const numbers n = of_outputs(k, block);
    const int64_t line = (k->width + 2 * k->padding) * groups;
    const int32_t *seen = found + oy * k->stride * line;
    int64_t here = (image * k->high + oy) * k->wide * k->outputs + block;
    const int64_t ahead = step * k->images * k->high * k->wide * k->outputs;
    for (int64_t ox = 0; ox < k->wide; ox++, seen += k->stride * groups, here += k->outputs) {
        sum even = {n.bias, {0}}, odd = {{0}, {0}};
#pragma GCC unroll 3
        for (int64_t row = 0; row < side; row++) {
            const int32_t *sets = seen + row * line;
            __asm__("" : "+r"(sets)); /* else gcc keeps an offset for each of the sets, more than there are registers */
#pragma GCC unroll 3
            for (int64_t column = 0; column < side; column++)
#pragma GCC unroll 4
                for (int64_t group = 0; group < groups; group++)
                    add(group % 2 ? &odd : &even, sums, sets[column * groups + group] + (row * side + column) * LANES, whole);
        }
        send(k, &n, currents(&even, &odd, &n, whole), ahead + here, here);
    }
}

/* all steps of one image; found: room for the places of all their sets */
INLINE void by_sets(const layer *k, int32_t *found, const void *sums, int64_t image, int64_t block, const int64_t groups,
                    const int64_t side, const int whole)
{
    const int64_t pad = 2 * k->padding, size = (k->height + pad) * (k->width + pad) * groups;
    for (int64_t step = 0; step < k->steps; step++)
        find_sets(k, k->spikes + (step * k->images + image) * k->height * k->width * groups, found + step * size, groups, side);
    for (int64_t oy = 0; oy < k->high; oy++) {
        begin(k, image, oy, block, 1);
        for (int64_t step = 0; step < k->steps; step++)
            look_up(k, found + step * size, sums, step, image, oy, block, groups, side, whole);
    }
}

/* the rows of weights that a place of the output sees a spike for, into `rows`; gives back how many they are. Writes up to LANES more. */
INLINE int64_t seen_from(const layer *k, const int32_t *list, const int64_t *start, int64_t oy, int64_t ox, int32_t *rows)
{
    const int64_t left = ox * k->stride - k->padding, right = left + k->columns;
    const int64_t from = left < 0 ? 0 : left, to = right > k->width ? k->width : right;
    int64_t seen = 0;
    for (int64_t row = 0; row < k->rows && from < to; row++) {
        const int64_t y = oy * k->stride - k->padding + row;
        if (y < 0 || y >= k->height)
            continue;
        const int64_t first = start[y * (k->width + 1) + from], many = start[y * (k->width + 1) + to] - first;
        const int32_t base = (row * k->columns - left) * k->channels;
        for (int64_t at = 0; at < many; at += LANES) {
            mask places;
            memcpy(&places, list + first + at, sizeof places);
            places += base;
            memcpy(rows + seen + at, &places, sizeof places);
        }
        seen += many;
    }
    return seen;
}

/* one line of places of one image at one step, V vectors of outputs from `block` on; list: the spikes' places in their row of the
   image, row after row; start[y*(width + 1) + x]: where those of column x and beyond begin; rows: room for what a place sees */
INLINE void gather(const layer *of, const int32_t *list, const int64_t *start, int32_t *rows, int64_t step, int64_t image, int64_t oy,
                   int64_t block, const int V, const int whole)
{
    const layer own = *of, *k = &own;
    numbers n[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++)
        n[i] = of_outputs(k, block + i * LANES);
    int64_t here = (image * k->high + oy) * k->wide * k->outputs + block;
    const int64_t ahead = step * k->images * k->high * k->wide * k->outputs;
    for (int64_t ox = 0; ox < k->wide; ox++, here += k->outputs) {
        sum even[V], odd[V];
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) {
            even[i] = (sum){n[i].bias, {0}};
            odd[i] = (sum){{0}, {0}};
        }
        const int64_t seen = seen_from(k, list, start, oy, ox, rows);
        int64_t at = 0;
        for (; at + 1 < seen; at += 2) {
            const int64_t first = rows[at] * k->outputs + block, second = rows[at + 1] * k->outputs + block;
#pragma GCC unroll 8
            for (int i = 0; i < V; i++) {
                add(even + i, k->weights, first + i * LANES, whole);
                add(odd + i, k->weights, second + i * LANES, whole);
            }
        }
        if (at < seen)
#pragma GCC unroll 8
            for (int i = 0; i < V; i++)
                add(even + i, k->weights, rows[at] * k->outputs + block + i * LANES, whole);
#pragma GCC unroll 8
        for (int i = 0; i < V; i++)
            send(k, n + i, currents(even + i, odd + i, n + i, whole), ahead + here + i * LANES, here + i * LANES);
    }
}

/* all steps of one image; list and start: room for the spikes of all of them, rows for what a place sees */
INLINE void by_lists(const layer *k, int32_t *list, int64_t *start, int32_t *rows, int64_t image, int64_t block, const int V,
                     const int whole)
{
    const int64_t size = k->height * (k->width + 1);
    for (int64_t oy = 0; oy < k->high; oy++) {
        begin(k, image, oy, block, V);
        for (int64_t step = 0; step < k->steps; step++)
            gather(k, list, start + step * size, rows, step, image, oy, block, V, whole);
    }
}

INLINE int with_lists(const layer *k, int threads, const int whole)
{
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int32_t *list = malloc((k->steps * k->height * k->width * k->channels + 16) * sizeof *list);
        int64_t *start = malloc(k->steps * k->height * (k->width + 1) * sizeof *start);
        int32_t *rows = malloc((k->rows * k->columns * k->channels + LANES) * sizeof *rows);
        if (!list || !start || !rows) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t image = 0; image < k->images; image++) {
            if (!list || !start || !rows)
                continue;
            int64_t found = 0, *next = start;
            for (int64_t step = 0; step < k->steps; step++) {
                const int64_t bytes = eights(k->channels);
                const uint8_t *spikes = k->spikes + (step * k->images + image) * k->height * k->width * bytes;
                for (int64_t y = 0; y < k->height; y++, *next++ = found)
                    for (int64_t x = 0; x < k->width; x++, spikes += bytes) {
                        *next++ = found;
                        found += listed(spikes, k->channels, x * k->channels, list + found);
                    }
            }
            int64_t block = 0;
            for (; k->outputs - block >= 4 * LANES; block += 4 * LANES)
                by_lists(k, list, start, rows, image, block, 4, whole);
            for (; block < k->outputs; block += 2 * LANES)
                by_lists(k, list, start, rows, image, block, 2, whole);
        }
        free(list);
        free(start);
        free(rows);
    }
    return failed;
}

/* the same for 16 to 32 channels and kernels of one place or 3 x 3, whose numbers the compiler is to know */
INLINE void by_known_sets(const layer *k, int32_t *found, const void *sums, int64_t image, int64_t block, const int whole)
{
    switch (eights(k->channels) * 10 + k->rows) {
    case 21: by_sets(k, found, sums, image, block, 2, 1, whole); break;
    case 23: by_sets(k, found, sums, image, block, 2, 3, whole); break;
    case 31: by_sets(k, found, sums, image, block, 3, 1, whole); break;
    case 33: by_sets(k, found, sums, image, block, 3, 3, whole); break;
    case 41: by_sets(k, found, sums, image, block, 4, 1, whole); break;
    case 43: by_sets(k, found, sums, image, block, 4, 3, whole); break;
    }
}

INLINE int with_sets(const layer *k, const char *sums, int threads, const int whole)
{
    const int64_t groups = eights(k->channels), pad = 2 * k->padding;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int32_t *found = malloc(k->steps * (k->height + pad) * (k->width + pad) * groups * sizeof *found);
        if (!found) {
#pragma omp atomic write
            failed = 1;
        }
        const char *those = sums;
        const int64_t size = groups * SETS * k->rows * k->rows * LANES * (whole ? sizeof(int16_t) : sizeof(float));
        for (int64_t block = 0; block < k->outputs; block += LANES, those += size) {
#pragma omp for schedule(static) nowait
            for (int64_t image = 0; image < k->images; image++)
                if (found)
                    by_known_sets(k, found, those, image, block, whole);
        }
        free(found);
    }
    return failed;
}

INLINE int fire_all(const layer *k, const void *sums, int threads, const int whole)
{
    return sums ? with_sets(k, sums, threads, whole) : with_lists(k, threads, whole);
}

/* Without theta there are no neurons, and images are those of all steps. sums: of `sum_sets`, for 16 to 32 channels and a kernel
   of one place or 3 x 3, or NULL: then spikes are listed. With a scale (of each output) weights are integers, of which no sum may
   pass 16 bits. 0, or 1 where there is no memory for sets or lists */
int fire_events(const uint8_t *spikes, const void *weights, const void *sums, const float *bias, const float *scale,
                const float *plus, const uint8_t *more, const float *amplitude, const float *theta, const float *start, void *out,
                uint8_t *fired, float *count, float *residual, int64_t steps, int64_t images, int64_t height, int64_t width,
                int64_t channels, int64_t outputs, int64_t rows, int64_t columns, int64_t stride, int64_t padding, int half,
                int threads)
{
    const int64_t high = (height + 2 * padding - rows) / stride + 1, wide = (width + 2 * padding - columns) / stride + 1;
    const layer k = {spikes, weights, bias, scale, plus, more, amplitude, theta, start, out, fired, count, residual, steps, images,
                     height, width, channels, outputs, rows, columns, stride, padding, high, wide, half};
    return scale ? fire_all(&k, sums, threads, 1) : fire_all(&k, sums, threads, 0);
}
