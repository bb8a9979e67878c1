/* A few numbers at once: vectors of LANES floats, taken from memory and put there as float or bfloat16. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
/* neurons whose membranes are in registers at once, in vectors; steps that a pass over time and back has room for */
#define MOST 4
#define LONGEST 256
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

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

INLINE void keep(float *into, vector values)
{
    memcpy(into, &values, sizeof values);
}

INLINE void write_sums(double *sums, vector first, vector second)
{
    sums[0] = sums[1] = 0;
    for (int i = 0; i < LANES; i++) {
        sums[0] += first[i];
        sums[1] += second[i];
    }
}
