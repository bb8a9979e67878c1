"""The neuron, its staircase and the four-term sum of docs/errors.md in NumPy, one neuron and one step at a time in mind."""

import numpy as np


def integrate_and_fire(current, theta, v0, signed=False):
    """(spikes [T, ...], residual [...]) for current [T, ...]; theta and v0 broadcast over one step's shape."""
    current = np.asarray(current)
    theta, v0 = (np.asarray(value, dtype=current.dtype) for value in (theta, v0))
    v = np.zeros_like(current[0]) + v0 * theta
    count, spikes = np.zeros_like(v), np.zeros_like(current)
    for t, drive in enumerate(current):
        v = v + drive
        spikes[t] = v >= theta
        if signed:
            spikes[t] -= (v < 0) & (count > 0)
        count = count + spikes[t]
        v = v - theta * spikes[t]
    return spikes, v


def staircase(z, theta, v0, steps):
    return theta * np.clip(np.floor(steps * z / theta + v0), 0, steps) / steps


def four_terms(rate, mean_current, z_ann, theta, v0, steps):
    q = staircase(mean_current, theta, v0, steps)
    clipped, positive = np.clip(mean_current, 0, theta), np.maximum(mean_current, 0)
    ann = np.maximum(z_ann, 0)
    terms = {"timing": rate - q, "quantization": q - clipped, "clipping": clipped - positive, "inherited": positive - ann}
    return terms | {"total": rate - ann}
