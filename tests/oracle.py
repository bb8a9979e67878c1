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


def muted(current, theta, v0, hidden):
    """SRP: (spikes [T, ...] after `hidden` steps, which neurons are silent)."""
    _, left = integrate_and_fire(current[:hidden], theta, v0)
    silent = left <= 1e-3 * theta
    spikes, _ = integrate_and_fire(current[hidden:], theta, v0)
    return spikes * ~silent, silent


def shifted_start(current, theta, v0, margin=1e-3):
    """COS for one neuron and current [rho]: the start (in thetas) with one spike less, one more, or as many."""
    v, spare, missing, fired = v0 * theta, np.inf, np.inf, 0
    for drive in current:
        v += drive
        if v >= theta:
            v -= theta
            spare, fired = min(spare, v + margin * theta), fired + 1
        else:
            missing = min(missing, (1 + margin) * theta - v)
    if v < 0 and fired:
        return v0 - max(theta, spare) / theta
    if v >= theta and fired < len(current):
        return v0 + max(theta, missing) / theta
    return v0


def channel_means(values):
    return np.moveaxis(np.asarray(values), 1, 0).reshape(np.asarray(values).shape[1], -1).mean(1)
