"""The exercises of the notebooks: each answer once, with the cases it is tried on and the slips that people make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from micelab.exercises.checking import exercise
from micelab.one_neuron import trace_neuron

_Z = torch.tensor([-0.5, 0.1, 0.3, 0.6, 0.95, 1.4])
_SPIKES = torch.tensor([[1.0, 0, 0], [1, 0, 1], [1, 1, 0], [1, 0, 0]])
_LAYER = torch.tensor([-1.0, -0.2, 0.1, 0.2, 0.3, 0.3, 0.4, 0.6, 0.9, 4.0])


@exercise(
    "00-rate",
    hint="the mean over the time-steps (dimension 0) is the share of steps with a spike; each spike is worth theta.",
    praise="That is all a spiking neuron says: how often it fired, times what a spike is worth.",
    cases=[(_SPIKES, 1.0), (_SPIKES, 2.0), (_SPIKES[:1], 0.5)],
    slips={
        "your rate grows with the number of steps: divide the count by T.": lambda spikes, theta: theta * spikes.sum(0),
        "your mean runs over neurons: dimension 0 is time, dimension 1 the neurons.": lambda spikes, theta: (
            theta * spikes.mean(1)
        ),
        "your rate forgets theta: a spike is worth theta.": lambda spikes, theta: spikes.mean(0),
    },
)
def rate(spikes: Tensor, theta: float) -> Tensor:
    """What each neuron says: theta times the share of steps with a spike; spikes [T, N] of 0 and 1, out [N]."""
    return theta * spikes.mean(0)


@exercise(
    "00-patience",
    hint="go through both lists together, from few steps to many, and return T at the first accuracy that is at least `wanted`.",
    praise="Fewer steps are less waiting and less energy; the rest of the course is about making this number small.",
    cases=[
        ([1, 2, 4, 8], [0.1, 0.5, 0.9, 0.97], 0.9),
        ([1, 2, 4], [0.1, 0.5, 0.9], 0.05),
        ([2, 4, 8, 16], [0.2, 0.8, 0.7, 0.9], 0.75),
    ],
    slips={
        "you return the place in the list, not the T that stands there.": lambda steps, accuracy, wanted: next(
            place for place, a in enumerate(accuracy) if a >= wanted
        ),
        "you return the accuracy, not the T that reaches it.": lambda steps, accuracy, wanted: next(
            a for a in accuracy if a >= wanted
        ),
        "at least `wanted` is enough: compare with >=, not with >.": lambda steps, accuracy, wanted: next(
            (t for t, a in zip(steps, accuracy, strict=True) if a > wanted), steps[-1]
        ),
    },
)
def fewest_steps(steps: list[int], accuracy: list[float], wanted: float) -> int:
    """The smallest T whose accuracy is at least `wanted`; `accuracy` is listed in the order of `steps`, ascending."""
    for t, reached in zip(steps, accuracy, strict=True):
        if reached >= wanted:
            return t
    return steps[-1]


def _hard_reset(current: Tensor, theta: float, v0: float) -> int:
    v, count = v0 * theta, 0
    for i in current:
        v = v + float(i)
        if v >= theta:
            v, count = 0.0, count + 1
    return count


def _late_threshold(current: Tensor, theta: float, v0: float) -> int:
    v, count = v0 * theta, 0
    for i in current:
        v = v + float(i)
        if v > theta:
            v, count = v - theta, count + 1
    return count


@exercise(
    "01-count",
    hint="start v at v0 * theta; at each step add the current, and where v >= theta count one spike and take theta off v.",
    praise="You have written the neuron of this whole course.",
    cases=[
        (torch.full((8,), 0.375), 1.0, 0.0),
        (torch.full((4,), 0.375), 1.0, 0.5),
        (torch.tensor([0.5, 0.5, 0.5, 0.5]), 1.0, 0.0),
        (torch.tensor([1.5, 1.5, 0.25, -1.0]), 2.0, 0.25),
    ],
    slips={
        "your neuron resets to 0 and throws charge away: take theta off v instead.": _hard_reset,
        "your neuron starts empty: v begins at v0 * theta.": lambda current, theta, v0: trace_neuron(current, theta, 0.0).count,
        "your neuron needs more than theta: it fires at v >= theta.": _late_threshold,
    },
)
def spike_count(current: Tensor, theta: float, v0: float) -> int:
    """The number of spikes of a neuron under `current` [T]; theta is its threshold, v0 its start in units of theta."""
    v, count = v0 * theta, 0
    for i in current:
        v = v + float(i)
        if v >= theta:
            v, count = v - theta, count + 1
    return count


@exercise(
    "01-residual",
    hint="charge is conserved: what was there at the start and what came in is either sent (theta a spike) or still there.",
    praise="No loop is needed: the balance knows how the story ends.",
    cases=[
        (torch.full((8,), 0.375), 2, 1.0, 0.0),
        (torch.full((8,), 0.375), 3, 1.0, 0.5),
        (torch.tensor([1.5, -1.0]), 1, 2.0, 0.5),
    ],
    slips={
        "you leave out the start: v0 * theta was there from the beginning.": lambda current, count, theta, v0: (
            float(current.sum()) - theta * count
        ),
        "v0 is in units of theta: the start is v0 * theta.": lambda current, count, theta, v0: (
            v0 + float(current.sum()) - theta * count
        ),
        "each spike takes theta with it, not 1.": lambda current, count, theta, v0: v0 * theta + float(current.sum()) - count,
    },
)
def residual(current: Tensor, count: int, theta: float, v0: float) -> float:
    """v(T) from the charge balance alone, without a loop: theta*n + v(T) = theta*v0 + sum of I."""
    return v0 * theta + float(current.sum()) - theta * count


def _steps(z: Tensor, theta: float, v0: float, time_steps: int) -> Tensor:
    return torch.floor(time_steps * z / theta + v0)


@exercise(
    "02-staircase",
    hint="scale z to steps, add v0, round down, keep the result between 0 and T, scale back.",
    praise="One line gives what T steps of simulation give, as long as the current is steady.",
    cases=[(_Z, 1.0, 0.0, 4), (_Z, 1.0, 0.5, 4), (_Z, 0.8, 0.5, 8), (_Z, 2.0, 0.25, 1)],
    slips={
        "nothing limits your count: it must stay between 0 and T.": lambda z, theta, v0, time_steps: (
            theta * _steps(z, theta, v0, time_steps) / time_steps
        ),
        "your count is not kept above 0: no neuron sends less than no spike.": lambda z, theta, v0, time_steps: (
            theta * _steps(z, theta, v0, time_steps).clamp(max=time_steps) / time_steps
        ),
        "your count is not kept below T: one spike a step is the most.": lambda z, theta, v0, time_steps: (
            theta * _steps(z, theta, v0, time_steps).clamp(min=0) / time_steps
        ),
        "you leave out v0.": lambda z, theta, v0, time_steps: (
            theta * _steps(z, theta, 0.0, time_steps).clamp(0, time_steps) / time_steps
        ),
        "you return the count: times theta / T it becomes what the neuron says.": lambda z, theta, v0, time_steps: _steps(
            z, theta, v0, time_steps
        ).clamp(0, time_steps),
        "you give the ReLU itself: the count must be rounded down to a whole number.": lambda z, theta, v0, time_steps: z.clamp(
            min=0
        ),
    },
)
def staircase(z: Tensor, theta: float, v0: float, time_steps: int) -> Tensor:
    """Q(z), what a neuron with the steady current z says after T steps; z [N], out [N]."""
    count = torch.floor(time_steps * z / theta + v0).clamp(0, time_steps)
    return theta * count / time_steps


@exercise(
    "02-mean-error",
    hint="one step of the staircase is theta/T wide; within it the error runs evenly from (v0 - 1) to v0 of that width.",
    praise="It is 0 at v0 = 1/2, for every T: the half threshold makes the neuron honest on average.",
    cases=[(4, 0.0, 1.0), (4, 0.5, 1.0), (8, 1.0, 1.0), (2, 0.25, 3.0)],
    slips={
        "the sign is the other way round: a start at 0 rounds down, so the error is negative.": lambda time_steps, v0, theta: (
            (0.5 - v0) * theta / time_steps
        ),
        "you leave out theta: the error is in activation units.": lambda time_steps, v0, theta: (v0 - 0.5) / time_steps,
        "you leave out T: more steps make the error smaller.": lambda time_steps, v0, theta: (v0 - 0.5) * theta,
    },
)
def mean_error(time_steps: int, v0: float, theta: float) -> float:
    """The mean of Q(z) - z for z spread evenly over 0 to theta."""
    return (v0 - 0.5) * theta / time_steps


@exercise(
    "03-clipping",
    hint="take relu(z), limit it to theta, and average the square of what was cut off.",
    praise="Only inputs above theta pay it.",
    cases=[(_LAYER, 1.0), (_LAYER, 0.25), (_LAYER, 5.0)],
    slips={
        "you count negative inputs as clipped: ReLU makes them 0 before, in the ANN as well.": lambda z, theta: (
            (z.clamp(0, theta) - z).square().mean()
        ),
        "you average the error itself: square it first.": lambda z, theta: (z.clamp(min=0) - z.clamp(0, theta)).mean(),
        "you take the root: the mean square is asked for.": lambda z, theta: (
            (z.clamp(min=0) - z.clamp(0, theta)).square().mean().sqrt()
        ),
    },
)
def clipping_error(z: Tensor, theta: float) -> Tensor:
    """The mean over z of (clip(z, 0, theta) - relu(z))^2."""
    return (z.clamp(0, theta) - z.clamp(min=0)).square().mean()


def _total(z: Tensor, theta: Any, time_steps: int) -> Tensor:
    said = theta * torch.floor(time_steps * z / theta + 0.5).clamp(0, time_steps) / time_steps
    return (said - z.clamp(min=0)).square().mean()


@exercise(
    "03-best-theta",
    hint="for each candidate compute the mean of (Q(z) - relu(z))^2 with v0 = 1/2, and return the candidate where it is least.",
    praise="This is how the method `mse` sets every threshold of a network.",
    cases=[
        (_LAYER, [0.5, 1.0, 2.0, 4.0], 4),
        (_LAYER, [0.5, 1.0, 2.0, 4.0], 32),
        (_LAYER[:-1], [0.25, 0.5, 1.0, 2.0], 2),
    ],
    slips={
        "you return the place of the best candidate, not the candidate.": lambda z, candidates, time_steps: min(
            range(len(candidates)), key=lambda k: float(_total(z, candidates[k], time_steps))
        ),
        "you look at clipping alone, so the largest candidate always wins.": lambda z, candidates, time_steps: max(candidates),
        "you look at quantization alone, so the smallest candidate always wins.": lambda z, candidates, time_steps: min(
            candidates
        ),
    },
)
def best_theta(z: Tensor, candidates: list[float], time_steps: int) -> float:
    """The candidate with the least mean of (Q(z) - relu(z))^2, at v0 = 1/2."""
    best, least = candidates[0], float("inf")
    for theta in candidates:
        count = torch.floor(time_steps * z / theta + 0.5).clamp(0, time_steps)
        error = float((theta * count / time_steps - z.clamp(min=0)).square().mean())
        if error < least:
            best, least = theta, error
    return best


def _wrong_order(value: Any) -> str:
    push, hold = ([int(spike) for spike in row] for row in value)
    if len(push) != 8 or len(hold) != 8 or not {*push, *hold} <= {0, 1}:
        return f"the rows have {len(push)} and {len(hold)} steps: give two rows of eight zeros and ones."
    if (sum(push), sum(hold)) != (4, 3):
        return f"you send {sum(push)} push and {sum(hold)} hold spikes: it must stay 4 and 3, only their order may change."
    trace = trace_neuron(1.5 * torch.tensor(push) - 1.0 * torch.tensor(hold))
    return "" if trace.count == 4 else f"with this order the neuron sends {trace.count} spikes, 4 are asked for."


@exercise(
    "04-order",
    hint="push first sends 5, even sends 3: begin with the pushes, and let some of the hold spikes come earlier.",
    praise="Four spikes where the mean current asks for three: spikes cannot be taken back, so early ones stay.",
    judge=_wrong_order,
)
def over_firing_order() -> tuple[list[int], list[int]]:
    """An order of 4 push (+1.5) and 3 hold (-1) spikes in 8 steps that makes the neuron send 4."""
    push = [1, 1, 1, 1, 0, 0, 0, 0]
    hold = [1, 1, 0, 0, 0, 1, 0, 0]
    return push, hold


@exercise(
    "04-diagnose",
    hint="over: v(T) < 0 although it has fired; under: v(T) >= theta although it could fire once more (count < T).",
    praise="The membrane remembers: what is left in it tells which neurons fired wrongly, without the ANN.",
    cases=[
        (torch.tensor([-0.5, 0.2, 1.3, 2.0, -0.7]), torch.tensor([2.0, 1, 1, 4, 0]), 1.0, 4),
        (torch.tensor([1.3, 2.5, -0.1]), torch.tensor([1.0, 1, 1]), 2.0, 2),
    ],
    slips={
        "a neuron that fired at every step cannot fire more: that is clipping, not under-firing.": lambda v, n, theta, T: (
            ((v < 0) & (n > 0)).float() - (v >= theta).float()
        ),
        "a neuron that never fired has nothing to take back: v < 0 alone is no over-firing.": lambda v, n, theta, T: (
            (v < 0).float() - ((v >= theta) & (n < T)).float()
        ),
        "the signs are the other way round: +1 is over-firing.": lambda v, n, theta, T: (
            ((v >= theta) & (n < T)).float() - ((v < 0) & (n > 0)).float()
        ),
    },
)
def diagnose(v: Tensor, count: Tensor, theta: float, time_steps: int) -> Tensor:
    """+1 for each neuron that over-fires, -1 for each that under-fires, 0 otherwise; v(T), count [N], out [N]."""
    over = (v < 0) & (count > 0)
    under = (v >= theta) & (count < time_steps)
    return over.float() - under.float()
