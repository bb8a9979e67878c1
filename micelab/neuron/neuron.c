/* The integrate-and-fire neuron with soft reset on a CPU: all T steps of a few neurons while their membrane is in registers.

   Neurons lie in memory order, `neurons` of them a step; step t's currents begin at current + t*step_current (0: the same at
   every step). theta and start repeat after theta_period and start_period neurons (1: one number for all). plus: a second
   current that is added first, or NULL. count: where the sums of spikes go, or NULL. out may be current or plus itself.
   half: currents and out are bfloat16; membranes, thresholds and counts are float in any case.
   Compiled without contraction, so that every sum and product is rounded as the loop in micelab/neuron/firing.py rounds it. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define MOST 4
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

typedef struct {
    const void *current, *plus;
    const float *theta, *start;
    void *out;
    float *count, *residual;
    int64_t neurons, step_current, step_plus, step_out, theta_period, start_period, steps;
} task;

INLINE vector ones_where(mask yes)
{
    const vector one = (vector){0} + 1.0f;
    mask bits;
    vector ones;
    memcpy(&bits, &one, sizeof bits);
    bits &= yes;
    memcpy(&ones, &bits, sizeof ones);
    return ones;
}

INLINE vector load(const float *from)
{
    vector values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* the first `bytes` of LANES floats, or half so many bytes of bfloat16, from number `at` on; 0 beyond */
INLINE vector take(const void *from, int64_t at, int64_t bytes, const int half)
{
    vector values = {0};
    if (!half) {
        memcpy(&values, (const float *)from + at, bytes);
        return values;
    }
    halves stored = {0};
    memcpy(&stored, (const uint16_t *)from + at, bytes / 2);
    mask wide = __builtin_convertvector(stored, mask) << 16;
    memcpy(&values, &wide, sizeof values);
    return values;
}

/* the reverse; bfloat16 is rounded to nearest, ties to even */
INLINE void put(void *into, int64_t at, int64_t bytes, const int half, vector values)
{
    if (!half) {
        memcpy((float *)into + at, &values, bytes);
        return;
    }
    mask wide;
    memcpy(&wide, &values, sizeof wide);
    wide = ((wide + 0x7fff + ((wide >> 16) & 1)) >> 16) & 0xffff;
    halves stored = __builtin_convertvector(wide, halves);
    memcpy((uint16_t *)into + at, &stored, bytes / 2);
}

/* LANES values of a pattern that repeats, for the neurons from `here` on */
INLINE vector repeated(const float *from, int64_t period, int64_t here)
{
    if (period == 1)
        return (vector){0} + from[0];
    int64_t at = here % period;
    if (at + LANES <= period)
        return load(from + at);
    float values[LANES];
    for (int i = 0; i < LANES; i++)
        values[i] = from[(here + i) % period];
    return load(values);
}

/* V vectors of neurons from `here` on; or, with V = 1, the `size` < LANES neurons that are left over */
INLINE void some(const task *k, int64_t here, int64_t size, const int V, const int with_plus, const int is_signed,
                 const int amplitude, const int counted, const int half)
{
    vector theta[MOST], v[MOST], fired[MOST];
    const int64_t bytes = V > 1 ? 4 * LANES : size * 4;
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) {
        theta[i] = repeated(k->theta, k->theta_period, here + i * LANES);
        v[i] = repeated(k->start, k->start_period, here + i * LANES);
        fired[i] = (vector){0};
    }
    for (int64_t t = 0; t < k->steps; t++) {
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) {
            const int64_t at = here + i * LANES;
            vector drive = take(k->current, t * k->step_current + at, bytes, half);
            if (with_plus)
                drive += take(k->plus, t * k->step_plus + at, bytes, half);
            v[i] += drive;
            vector spike = ones_where(v[i] >= theta[i]);
            if (is_signed)
                spike -= ones_where((v[i] < 0.0f) & (fired[i] > 0.0f));
            vector sent = spike * theta[i];
            if (is_signed || counted)
                fired[i] += spike;
            v[i] -= sent;
            put(k->out, t * k->step_out + at, bytes, half, amplitude ? sent : spike);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) {
        memcpy(k->residual + here + i * LANES, &v[i], bytes);
        if (counted)
            memcpy(k->count + here + i * LANES, &fired[i], bytes);
    }
}

INLINE void all(const task *k, int threads, const int with_plus, const int is_signed, const int amplitude, const int counted,
                const int half)
{
    const int64_t whole = k->neurons / (MOST * LANES) * (MOST * LANES);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t here = 0; here < whole; here += MOST * LANES)
        some(k, here, LANES, MOST, with_plus, is_signed, amplitude, counted, half);
    for (int64_t here = whole; here < k->neurons; here += LANES) {
        int64_t left = k->neurons - here;
        some(k, here, left < LANES ? left : LANES, 1, with_plus, is_signed, amplitude, counted, half);
    }
}

void fire(
    const void *current, const void *plus, const float *theta, const float *start, void *out, float *count, float *residual,
    int64_t neurons, int64_t step_current, int64_t step_plus, int64_t step_out, int64_t theta_period, int64_t start_period,
    int64_t steps, int is_signed, int amplitude, int half, int threads)
{
    const task k = {current, plus, theta, start, out, count, residual, neurons, step_current, step_plus, step_out,
                    theta_period, start_period, steps};
    if (is_signed || !amplitude)
        all(&k, threads, plus != 0, is_signed, amplitude, count != 0, half);
    else if (half)
        plus ? all(&k, threads, 1, 0, 1, count != 0, 1) : all(&k, threads, 0, 0, 1, count != 0, 1);
    else if (count)
        plus ? all(&k, threads, 1, 0, 1, 1, 0) : all(&k, threads, 0, 0, 1, 1, 0);
    else
        plus ? all(&k, threads, 1, 0, 1, 0, 0) : all(&k, threads, 0, 0, 1, 0, 0);
}

/* `other` where yes, else values */
INLINE vector replaced(vector values, mask yes, vector other)
{
    mask bits, others;
    memcpy(&bits, &values, sizeof bits);
    memcpy(&others, &other, sizeof others);
    bits = (bits & ~yes) | (others & yes);
    memcpy(&values, &bits, sizeof values);
    return values;
}

/* the rates of the `bytes`/4 neurons from `at` on: theta*clip(floor(z*levels/theta + v0), 0, levels)/levels; limited before it
   is floored, which is the same for a whole number of levels */
INLINE void rates(const void *z, void *rate, float up, float v0, float most, float down, int64_t at, int64_t bytes, const int half)
{
    vector level = take(z, at, bytes, half) * up + v0;
    level = replaced(level, level < 0.0f, (vector){0});
    level = replaced(level, level > most, (vector){0} + most);
    const vector floored = __builtin_convertvector(__builtin_convertvector(level, mask), vector);
    put(rate, at, bytes, half, (floored + (level - level)) * down); /* NaN stays NaN */
}

void staircase(const void *z, void *rate, float up, float v0, float most, float down, int64_t size, int half, int threads)
{
    const int64_t whole = size / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t at = 0; at < whole; at += LANES)
        half ? rates(z, rate, up, v0, most, down, at, 4 * LANES, 1) : rates(z, rate, up, v0, most, down, at, 4 * LANES, 0);
    if (whole < size)
        rates(z, rate, up, v0, most, down, whole, 4 * (size - whole), half);
}

#define BLOCK 4096

typedef struct {
    const void *grad, *z, *rate;
    void *grad_z;
    float theta, below;
} backward;

/* grad_z = grad where 0 < z < theta, for the `bytes`/4 neurons from `at` on; adds grad*rate - grad_z*z to the first sum and
   grad, where below < z < theta, to the second */
INLINE void gradients(const backward *k, int64_t at, int64_t bytes, const int half, vector *of_theta, vector *of_start)
{
    const vector grad = take(k->grad, at, bytes, half), z = take(k->z, at, bytes, half);
    const mask under = z < k->theta;
    const vector through = grad * ones_where(under & (z > 0.0f));
    put(k->grad_z, at, bytes, half, through);
    *of_theta += grad * take(k->rate, at, bytes, half) - through * z;
    *of_start += grad * ones_where(under & (z > k->below));
}

INLINE void write_sums(double *sums, vector first, vector second)
{
    sums[0] = sums[1] = 0;
    for (int i = 0; i < LANES; i++) {
        sums[0] += first[i];
        sums[1] += second[i];
    }
}

/* `some` for `size` neurons; the two sums of block b go to sums[2*b] and sums[2*b + 1], so that threads do not change them */
#define IN_BLOCKS(some, k)                                                                                             \
    _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")                                 \
    for (int64_t block = 0; block < size; block += BLOCK) {                                                            \
        const int64_t end = size - block < BLOCK ? size : block + BLOCK;                                               \
        vector first = {0}, second = {0};                                                                              \
        int64_t at = block;                                                                                            \
        if (half)                                                                                                      \
            for (; at + LANES <= end; at += LANES)                                                                     \
                some(k, at, 4 * LANES, 1, &first, &second);                                                            \
        else                                                                                                           \
            for (; at + LANES <= end; at += LANES)                                                                     \
                some(k, at, 4 * LANES, 0, &first, &second);                                                            \
        if (at < end)                                                                                                  \
            some(k, at, 4 * (end - at), half, &first, &second);                                                        \
        write_sums(sums + 2 * (block / BLOCK), first, second);                                                         \
    }

void rate_gradient(const void *grad, const void *z, const void *rate, void *grad_z, double *sums, float theta, float below,
                   int64_t size, int half, int threads)
{
    const backward k = {grad, z, rate, grad_z, theta, below};
    IN_BLOCKS(gradients, &k)
}

/* The same neurons with gradients: grad is that of theta*s(t), grad_current takes that of the currents. A spike has the gradient
   1/theta where |v - theta| < theta/2, and the reset takes from the membrane what it sends: a gradient counts in such a step, and
   passes through all others. near: of each step whether it is one. */
#define LONGEST 256

typedef struct {
    const void *grad, *current;
    void *grad_current;
    float theta, start;
    int64_t step_grad, step_current, step, steps;
} timed;

INLINE void through_time(const timed *k, int64_t at, int64_t bytes, const int half, vector *of_theta, vector *of_start)
{
    const vector theta = (vector){0} + k->theta;
    const float low = 0.5f * k->theta, high = 1.5f * k->theta;
    vector v = (vector){0} + k->start, gone = {0}, charge = {0}, sum = {0};
    mask near[LONGEST];
    for (int64_t t = 0; t < k->steps; t++) {
        v += take(k->current, t * k->step_current + at, bytes, half);
        near[t] = (v > low) & (v < high);
        const vector sent = ones_where(v >= theta) * theta;
        sum += sent * take(k->grad, t * k->step_grad + at, bytes, half);
        v -= sent;
    }
    for (int64_t t = k->steps - 1; t >= 0; t--) {
        gone = replaced(gone, near[t], take(k->grad, t * k->step_grad + at, bytes, half));
        put(k->grad_current, t * k->step + at, bytes, half, gone);
        charge += gone * take(k->current, t * k->step_current + at, bytes, half);
    }
    *of_theta += sum - charge;
    *of_start += gone;
}

/* the T steps of the `size` neurons lie so many numbers apart */
void time_gradient(const void *grad, const void *current, void *grad_current, double *sums, float theta, float start,
                   int64_t size, int64_t step_grad, int64_t step_current, int64_t step, int64_t steps, int half, int threads)
{
    const timed k = {grad, current, grad_current, theta, start, step_grad, step_current, step, steps};
    IN_BLOCKS(through_time, &k)
}

/* Batch-norm and the neurons after it at once, for channels that come last in memory: the current of a neuron is
   z*scale + shift (+ plus), with a scale and a shift for each channel. All steps lie one after the other; z may be the same at
   each (constant). A block of neurons goes through all T steps while it is in the cache: `block` is a multiple of the channels,
   and the values of a channel are given over a whole block, so that the inner loops need not know of channels. */

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

INLINE void keep(float *into, vector values)
{
    memcpy(into, &values, sizeof values);
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

/* bytes[i] = 1 where values[i] is not 0 */
void ones(const float *restrict values, uint8_t *restrict bytes, int64_t size, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < size; i++)
        bytes[i] = values[i] != 0.0f;
}
