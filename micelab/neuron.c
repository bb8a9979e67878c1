/* The integrate-and-fire neuron with soft reset on a CPU: all T steps of a few neurons while their membrane is in registers.

   Neurons lie in memory order, `neurons` of them a step; step t's currents begin at current + t*step_current (0: the same at
   every step). theta and start repeat after theta_period and start_period neurons (1: one number for all). plus: a second
   current that is added first, or NULL. count: where the sums of spikes go, or NULL. out may be current or plus itself.
   Compiled without contraction, so that every sum and product is rounded as the loop in micelab/neuron.py rounds it. */

#include <stdint.h>
#include <string.h>

#define LANES 8
#define MOST 4
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));

typedef struct {
    const float *current, *plus, *theta, *start;
    float *out, *count, *residual;
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
                 const int amplitude, const int counted)
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
            vector drive = {0}, more = {0};
            memcpy(&drive, k->current + t * k->step_current + at, bytes);
            if (with_plus) {
                memcpy(&more, k->plus + t * k->step_plus + at, bytes);
                drive += more;
            }
            v[i] += drive;
            vector spike = ones_where(v[i] >= theta[i]);
            if (is_signed)
                spike -= ones_where((v[i] < 0.0f) & (fired[i] > 0.0f));
            vector sent = spike * theta[i];
            if (is_signed || counted)
                fired[i] += spike;
            v[i] -= sent;
            memcpy(k->out + t * k->step_out + at, amplitude ? &sent : &spike, bytes);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) {
        memcpy(k->residual + here + i * LANES, &v[i], bytes);
        if (counted)
            memcpy(k->count + here + i * LANES, &fired[i], bytes);
    }
}

INLINE void all(const task *k, int threads, const int with_plus, const int is_signed, const int amplitude, const int counted)
{
    const int64_t whole = k->neurons / (MOST * LANES) * (MOST * LANES);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t here = 0; here < whole; here += MOST * LANES)
        some(k, here, LANES, MOST, with_plus, is_signed, amplitude, counted);
    for (int64_t here = whole; here < k->neurons; here += LANES) {
        int64_t left = k->neurons - here;
        some(k, here, left < LANES ? left : LANES, 1, with_plus, is_signed, amplitude, counted);
    }
}

void fire(
    const float *current, const float *plus, const float *theta, const float *start, float *out, float *count, float *residual,
    int64_t neurons, int64_t step_current, int64_t step_plus, int64_t step_out, int64_t theta_period, int64_t start_period,
    int64_t steps, int is_signed, int amplitude, int threads)
{
    const task k = {current, plus, theta, start, out, count, residual, neurons, step_current, step_plus, step_out,
                    theta_period, start_period, steps};
    if (is_signed || !amplitude)
        plus ? all(&k, threads, 1, is_signed, amplitude, count != 0) : all(&k, threads, 0, is_signed, amplitude, count != 0);
    else if (count)
        plus ? all(&k, threads, 1, 0, 1, 1) : all(&k, threads, 0, 0, 1, 1);
    else
        plus ? all(&k, threads, 1, 0, 1, 0) : all(&k, threads, 0, 0, 1, 0);
}

/* bytes[i] = 1 where values[i] is not 0 */
void ones(const float *restrict values, uint8_t *restrict bytes, int64_t size, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < size; i++)
        bytes[i] = values[i] != 0.0f;
}
