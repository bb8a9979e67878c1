/* Batch-norm and the neurons after it at once, for channels that come last in memory: the current of a neuron is
   z*scale + shift (+ plus), with a scale and a shift for each channel. All steps lie one after the other; z may be the same at
   each (constant). A block of neurons goes through all T steps while it is in the cache: `block` is a multiple of the channels,
   and the values of a channel are given over a whole block, so that the inner loops need not know of channels. */

#include "lanes.h"

#define TOGETHER 2
#define AHEAD 256

typedef struct {
    const void *grad, *z, *plus;
    void *out;
    const float *scale, *shift, *mean;
    float theta, start;
    int64_t neurons, block, steps;
    int constant;
} normed;

INLINE int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* sums of z - pivot and of its square over some blocks, for each place in a block; then for each channel */
INLINE void moments(const void *z, const float *pivot, int64_t from, int64_t to, int64_t block, float *sums, const int half)
{
    for (int64_t i = 0; i < 2 * block; i++)
        sums[i] = 0;
    for (int64_t at = from; at < to; at += block)
        for (int64_t i = 0; i < least(block, to - at); i += LANES) {
            const vector far = take(z, at + i, 4 * LANES, half) - load(pivot + i);
            keep(sums + i, load(sums + i) + far);
            keep(sums + block + i, load(sums + block + i) + far * far);
        }
}

/* sums over the places of each channel in a block: `of` [2][block] into `into` [2][channels] */
static void by_channel(const float *of, float *into, int64_t block, int64_t channels)
{
    for (int64_t row = 0; row < 2; row++)
        for (int64_t c = 0; c < channels; c++) {
            double sum = 0;
            for (int64_t i = c; i < block; i += channels)
                sum += of[row * block + i];
            into[row * channels + c] = sum;
        }
}

void batch_moments(const void *z, const float *pivot, float *sums, int64_t size, int64_t chunk, int64_t block, int64_t channels,
                   int half, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t from = 0; from < size; from += chunk) {
        float places[2 * block];
        if (half)
            moments(z, pivot, from, least(from + chunk, size), block, places, 1);
        else
            moments(z, pivot, from, least(from + chunk, size), block, places, 0);
        by_channel(places, sums + from / chunk * 2 * channels, block, channels);
    }
}

INLINE vector current_of(const normed *k, int64_t t, int64_t at, int64_t i, const int with_plus, const int half)
{
    vector drive = take(k->z, (k->constant ? 0 : t * k->neurons) + at + i, 4 * LANES, half) * load(k->scale + i) + load(k->shift + i);
    return with_plus ? drive + take(k->plus, t * k->neurons + at + i, 4 * LANES, half) : drive;
}

INLINE void fire_block(const normed *k, int64_t at, int64_t size, const int with_plus, const int half)
{
    float v[size];
    for (int64_t i = 0; i < size; i++)
        v[i] = k->start;
    for (int64_t t = 0; t < k->steps; t++)
        for (int64_t i = 0; i < size; i += LANES) {
            const vector now = load(v + i) + current_of(k, t, at, i, with_plus, half);
            const vector sent = ones_where(now >= k->theta) * k->theta;
            put(k->out, t * k->neurons + at + i, 4 * LANES, half, sent);
            keep(v + i, now - sent);
        }
}

void normed_fire(const void *z, const void *plus, void *out, const float *scale, const float *shift, float theta, float start,
                 int64_t neurons, int64_t block, int64_t steps, int constant, int half, int threads)
{
    const normed k = {0, z, plus, out, scale, shift, 0, theta, start, neurons, block, steps, constant};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t at = 0; at < neurons; at += block) {
        const int64_t size = least(block, neurons - at);
        if (half)
            plus ? fire_block(&k, at, size, 1, 1) : fire_block(&k, at, size, 0, 1);
        else
            plus ? fire_block(&k, at, size, 1, 0) : fire_block(&k, at, size, 0, 0);
    }
}

/* V vectors of the neurons from at + i on: writes the gradient of their currents, summed over the steps where they are constant;
   places: sums of it, and of its product with z - mean, for each place in the block; the others: as in through_time, less what
   these sums tell */
INLINE void gradient_of(const normed *k, int64_t at, int64_t i, const int V, const int with_plus, const int half, float *places,
                        vector *of_theta, vector *of_start)
{
    const vector theta = (vector){0} + k->theta;
    const float low = 0.5f * k->theta, high = 1.5f * k->theta;
    const int64_t ahead = at + i + AHEAD, step = k->constant ? 0 : k->neurons, size = half ? 2 : 4;
    vector scale[MOST], shift[MOST], v[MOST], sum[MOST], far[MOST];
    mask near[LONGEST][MOST];
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) {
        scale[j] = load(k->scale + i + j * LANES);
        shift[j] = load(k->shift + i + j * LANES);
        v[j] = (vector){0} + k->start;
    }
    for (int64_t t = 0; t < k->steps; t++) {
        __builtin_prefetch((const char *)k->grad + (t * k->neurons + ahead) * size);
        __builtin_prefetch((const char *)k->z + (t * step + ahead) * size);
        if (with_plus)
            __builtin_prefetch((const char *)k->plus + (t * k->neurons + ahead) * size);
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) {
            const int64_t here = at + i + j * LANES;
            v[j] += take(k->z, t * step + here, 4 * LANES, half) * scale[j] + shift[j];
            if (with_plus)
                v[j] += take(k->plus, t * k->neurons + here, 4 * LANES, half);
            near[t][j] = (v[j] > low) & (v[j] < high);
            const vector sent = ones_where(v[j] >= theta) * theta;
            *of_theta += sent * take(k->grad, t * k->neurons + here, 4 * LANES, half);
            v[j] -= sent;
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < V; j++)
        v[j] = sum[j] = far[j] = (vector){0};
    for (int64_t t = k->steps - 1; t >= 0; t--) {
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) {
            const int64_t here = at + i + j * LANES;
            v[j] = replaced(v[j], near[t][j], take(k->grad, t * k->neurons + here, 4 * LANES, half));
            sum[j] += v[j];
            if (!k->constant) {
                put(k->out, t * step + here, 4 * LANES, half, v[j]);
                far[j] += v[j] * (take(k->z, t * step + here, 4 * LANES, half) - load(k->mean + i + j * LANES));
            }
            if (with_plus)
                *of_theta -= v[j] * take(k->plus, t * k->neurons + here, 4 * LANES, half);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) {
        const int64_t here = at + i + j * LANES, place = i + j * LANES;
        if (k->constant) {
            put(k->out, here, 4 * LANES, half, sum[j]);
            far[j] = sum[j] * (take(k->z, here, 4 * LANES, half) - load(k->mean + place));
        }
        keep(places + place, load(places + place) + sum[j]);
        keep(places + k->block + place, load(places + k->block + place) + far[j]);
        *of_start += v[j];
    }
}

INLINE void gradient_block(const normed *k, int64_t at, int64_t size, const int with_plus, const int half, float *places,
                           double *two)
{
    vector of_theta = {0}, of_start = {0};
    int64_t i = 0;
    for (; i + TOGETHER * LANES <= size; i += TOGETHER * LANES)
        gradient_of(k, at, i, TOGETHER, with_plus, half, places, &of_theta, &of_start);
    for (; i < size; i += LANES)
        gradient_of(k, at, i, 1, with_plus, half, places, &of_theta, &of_start);
    write_sums(two, of_theta, of_start);
}

/* the same for given rates, as in `gradients`: the gradient of their currents, its sums by channel, and the two of rate_gradient */
INLINE void rate_block(const normed *k, const void *rate, float below, int64_t at, int64_t size, const int with_plus,
                       const int half, float *places, double *two)
{
    vector of_theta = {0}, of_start = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        const vector grad = take(k->grad, at + i, 4 * LANES, half), current = current_of(k, 0, at, i, with_plus, half);
        const mask under = current < k->theta;
        const vector through = grad * ones_where(under & (current > 0.0f));
        put(k->out, at + i, 4 * LANES, half, through);
        of_theta += grad * take(rate, at + i, 4 * LANES, half) - through * current;
        of_start += grad * ones_where(under & (current > below));
        keep(places + i, load(places + i) + through);
        keep(places + k->block + i,
             load(places + k->block + i) + through * (take(k->z, at + i, 4 * LANES, half) - load(k->mean + i)));
    }
    write_sums(two, of_theta, of_start);
}

/* for every block of `size` values, `some` with its places and sums, which go to channel_sums and sums */
#define BLOCKS_BY_CHANNEL(size, some)                                                                                  \
    _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")                                 \
    for (int64_t at = 0; at < (size); at += block) {                                                                   \
        const int64_t left = least(block, (size)-at);                                                                  \
        float places[2 * block];                                                                                       \
        for (int64_t i = 0; i < 2 * block; i++)                                                                        \
            places[i] = 0;                                                                                             \
        double *two = sums + 2 * (at / block);                                                                         \
        some;                                                                                                          \
        by_channel(places, channel_sums + at / block * 2 * channels, block, channels);                                 \
    }

/* channel_sums: [blocks][2][channels], sums: [blocks][2] */
void normed_gradient(const void *grad, const void *z, const void *plus, void *out, const float *scale, const float *shift,
                     const float *mean, float *channel_sums, double *sums, float theta, float start, int64_t neurons,
                     int64_t block, int64_t channels, int64_t steps, int constant, int half, int threads)
{
    const normed k = {grad, z, plus, out, scale, shift, mean, theta, start, neurons, block, steps, constant};
    if (half)
        BLOCKS_BY_CHANNEL(neurons, plus ? gradient_block(&k, at, left, 1, 1, places, two)
                                        : gradient_block(&k, at, left, 0, 1, places, two))
    else
        BLOCKS_BY_CHANNEL(neurons, plus ? gradient_block(&k, at, left, 1, 0, places, two)
                                        : gradient_block(&k, at, left, 0, 0, places, two))
}

void normed_rate_gradient(const void *grad, const void *z, const void *plus, const void *rate, void *out, const float *scale,
                          const float *shift, const float *mean, float *channel_sums, double *sums, float theta, float below,
                          int64_t neurons, int64_t block, int64_t channels, int half, int threads)
{
    const normed k = {grad, z, plus, out, scale, shift, mean, theta, 0, neurons, block, 1, 0};
    if (half)
        BLOCKS_BY_CHANNEL(neurons, plus ? rate_block(&k, rate, below, at, left, 1, 1, places, two)
                                        : rate_block(&k, rate, below, at, left, 0, 1, places, two))
    else
        BLOCKS_BY_CHANNEL(neurons, plus ? rate_block(&k, rate, below, at, left, 1, 0, places, two)
                                        : rate_block(&k, rate, below, at, left, 0, 0, places, two))
}

/* into = grad*first + z*second + third, with such values for each place in a block: a batch-norm's gradient of its input */
void of_channels(const void *grad, const void *z, void *into, const float *first, const float *second, const float *third,
                 int64_t size, int64_t block, int half, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t at = 0; at < size; at += block)
        for (int64_t i = 0; i < least(block, size - at); i += LANES) {
            if (half)
                put(into, at + i, 4 * LANES, 1,
                    take(grad, at + i, 4 * LANES, 1) * load(first + i) + take(z, at + i, 4 * LANES, 1) * load(second + i) +
                        load(third + i));
            else
                put(into, at + i, 4 * LANES, 0,
                    take(grad, at + i, 4 * LANES, 0) * load(first + i) + take(z, at + i, 4 * LANES, 0) * load(second + i) +
                        load(third + i));
        }
}
