/* The integrate-and-fire neuron with soft reset on a CPU: all T steps of a few neurons while their membrane is in registers.

   Neurons lie in memory order, `neurons` of them a step; step t's currents begin at current + t*step_current (0: the same at
   every step). theta and start repeat after theta_period and start_period neurons (1: one number for all). plus: a second
   current that is added first, or NULL. count: where the sums of spikes go, or NULL. out may be current or plus itself.
   half: currents and out are bfloat16; membranes, thresholds and counts are float in any case.
   Compiled without contraction, so that every sum and product is rounded as the loop in micelab/neuron/firing.py rounds it. */

#include "lanes.h"

typedef struct {
    const void *current, *plus;
    const float *theta, *start;
    void *out;
    float *count, *residual;
    int64_t neurons, step_current, step_plus, step_out, theta_period, start_period, steps;
} task;

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
            if (V > 1) { /* every step lies elsewhere, more places than the processor follows by itself */
                __builtin_prefetch((const char *)k->current + (t * k->step_current + at + 2 * MOST * LANES) * (half ? 2 : 4));
                if (with_plus)
                    __builtin_prefetch((const char *)k->plus + (t * k->step_plus + at + 2 * MOST * LANES) * (half ? 2 : 4));
            }
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

/* bytes[i] = 1 where values[i] is not 0 */
void ones(const float *restrict values, uint8_t *restrict bytes, int64_t size, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < size; i++)
        bytes[i] = values[i] != 0.0f;
}
