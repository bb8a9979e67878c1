/* The gradient of the weights of a convolution of spikes, spike by spike: of a weight it is the sum of the currents' gradients at
   the places that saw its channel's spikes through it. Bytes of spikes are as in events.c; the stride is 1. The gradients of some
   images' currents are laid out with an edge of zeros, so that what a spike did through each place of the kernel is found at a fixed
   distance. */

#include <stddef.h>
#include <stdlib.h>

#include "lanes.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define GROUP 8
/* places of small images that are done together: fewer, and a channel has too few spikes for its sums to stay in registers; more,
   and the gradients that they see do not stay in the first cache */
#define TOGETHER 512

/* spikes [images][height][width][eights of channels]; grad [images][high][wide][outputs] */
typedef struct {
    const uint8_t *spikes;
    const void *grad;
    int64_t images, height, width, channels, outputs, side, padding, high, wide;
} layer;

/* the sets of 32 channels, or as many as are left, of up to 16 places; no spikes beyond them */
INLINE void sets_of(const uint8_t *spikes, int64_t many, int64_t bytes, int64_t at, uint32_t sets[16])
{
    const int64_t some = bytes - at < 4 ? bytes - at : 4;
#ifdef __AVX512F__
    if (many == 16 && bytes == 2) {
        _mm512_storeu_si512(sets, _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)spikes)));
        return;
    }
    if (many == 16 && bytes % 4 == 0) {
        const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i apart = _mm512_mullo_epi32(places, _mm512_set1_epi32((int32_t)bytes));
        _mm512_storeu_si512(sets, _mm512_i32gather_epi32(apart, spikes + at, 1));
        return;
    }
#endif
    for (int64_t i = 0; i < 16; i++) {
        sets[i] = 0;
        if (i < many)
            memcpy(sets + i, spikes + i * bytes + at, some);
    }
}

/* the spikes of up to 16 places by channel: each channel's list, with room for `room`, grows by those places, of which the first
   is `from` and the next are LANES further each; found: how many each list holds */
INLINE void sort_spikes(const uint8_t *spikes, int64_t many, int64_t channels, int32_t from, int32_t *lists, int64_t room,
                        int64_t *found)
{
    const int64_t bytes = (channels + GROUP - 1) / GROUP;
    for (int64_t at = 0; at < bytes; at += 4) {
        uint32_t sets[16];
        sets_of(spikes, many, bytes, at, sets);
        const int64_t first = at * GROUP, here = channels - first < 32 ? channels - first : 32;
#ifdef __AVX512F__
        const __m512i ahead = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
        const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(from), ahead), all = _mm512_loadu_si512(sets);
        for (int64_t i = 0; i < here; i++) {
            const __mmask16 yes = _mm512_test_epi32_mask(all, _mm512_set1_epi32(1u << i));
            _mm512_storeu_si512(lists + (first + i) * room + found[first + i], _mm512_maskz_compress_epi32(yes, places));
            found[first + i] += __builtin_popcount(yes);
        }
#else
        for (int64_t i = 0; i < many; i++)
            for (uint32_t set = sets[i]; set; set &= set - 1) {
                const int64_t channel = first + __builtin_ctz(set);
                lists[channel * room + found[channel]++] = from + (int32_t)i * LANES;
            }
        (void)here;
#endif
    }
}

/* LANES outputs' gradients from `block` on of one image, into its places of the layout */
INLINE void lay_out(const layer *k, int64_t image, int64_t block, float *into, const int half)
{
    const int64_t edge = k->side - 1 - k->padding, line = k->width + k->side - 1;
    for (int64_t y = 0; y < k->high; y++)
        for (int64_t x = 0; x < k->wide; x++)
            keep(into + ((y + edge) * line + x + edge) * LANES,
                 take(k->grad, ((image * k->high + y) * k->wide + x) * k->outputs + block, 4 * LANES, half));
}

/* the sums of one channel's spikes, for each place of the kernel, into weights that lie `apart` */
INLINE void add_up(const int32_t *list, int64_t many, const float *laid, int64_t line, float *weights, int64_t apart,
                   const int64_t side)
{
    vector sums[9];
#pragma GCC unroll 9
    for (int tap = 0; tap < side * side; tap++)
        sums[tap] = (vector){0};
    for (int64_t i = 0; i < many; i++) {
        const float *seen = laid + list[i];
#pragma GCC unroll 3
        for (int64_t row = 0; row < side; row++)
#pragma GCC unroll 3
            for (int64_t column = 0; column < side; column++)
                sums[row * side + column] += load(seen + ((side - 1 - row) * line + side - 1 - column) * LANES);
    }
#pragma GCC unroll 9
    for (int tap = 0; tap < side * side; tap++)
        keep(weights + tap * apart, load(weights + tap * apart) + sums[tap]);
}

INLINE void of_images(const layer *k, int64_t first, int64_t many, float *laid, int32_t *lists, int64_t room, int64_t *found,
                      float *weights, const int64_t side, const int half)
{
    const int64_t line = k->width + side - 1, size = (k->height + side - 1) * line * LANES;
    const int64_t bytes = (k->channels + GROUP - 1) / GROUP;
    memset(found, 0, k->channels * sizeof *found);
    for (int64_t i = 0; i < many; i++)
        for (int64_t y = 0; y < k->height; y++) {
            const uint8_t *spikes = k->spikes + ((first + i) * k->height + y) * k->width * bytes;
            for (int64_t x = 0; x < k->width; x += 16)
                sort_spikes(spikes + x * bytes, k->width - x < 16 ? k->width - x : 16, k->channels,
                            (int32_t)(i * size + (y * line + x) * LANES), lists, room, found);
        }
    for (int64_t block = 0; block < k->outputs; block += LANES) {
        for (int64_t i = 0; i < many; i++)
            lay_out(k, first + i, block, laid + i * size, half);
        for (int64_t channel = 0; channel < k->channels; channel++)
            add_up(lists + channel * room, found[channel], laid, line, weights + channel * k->outputs + block,
                   k->channels * k->outputs, side);
    }
}

/* weights: for each thread [side][side][channels][outputs], of zeros; 0, or 1 where there is no memory */
int weight_gradient(const uint8_t *spikes, const void *grad, float *weights, int64_t images, int64_t height, int64_t width,
                    int64_t channels, int64_t outputs, int64_t side, int64_t padding, int half, int threads)
{
    const int64_t high = height + 2 * padding - side + 1, wide = width + 2 * padding - side + 1;
    const layer k = {spikes, grad, images, height, width, channels, outputs, side, padding, high, wide};
    const int64_t together = height * width < TOGETHER ? TOGETHER / (height * width) : 1, room = together * height * width + 16;
    const int64_t places = (height + side - 1) * (width + side - 1);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *laid = aligned_alloc(4 * LANES, together * places * LANES * sizeof *laid); /* else each line is read as two */
        int32_t *lists = malloc(channels * room * sizeof *lists);
        int64_t *found = malloc(channels * sizeof *found);
        if (!laid || !lists || !found) {
#pragma omp atomic write
            failed = 1;
        } else {
            memset(laid, 0, together * places * LANES * sizeof *laid);
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; part++) {
            float *own = weights + part * side * side * channels * outputs;
            const int64_t to = images * (part + 1) / threads;
            for (int64_t image = images * part / threads; image < to && laid && lists && found; image += together) {
                const int64_t many = to - image < together ? to - image : together;
                switch (side * 2 + half) {
                case 2: of_images(&k, image, many, laid, lists, room, found, own, 1, 0); break;
                case 3: of_images(&k, image, many, laid, lists, room, found, own, 1, 1); break;
                case 6: of_images(&k, image, many, laid, lists, room, found, own, 3, 0); break;
                case 7: of_images(&k, image, many, laid, lists, room, found, own, 3, 1); break;
                }
            }
        }
        free(laid);
        free(lists);
        free(found);
    }
    return failed;
}
