"""The exercises of notebooks 05 to 07, about whole networks: joint training, the real thing, and the reader's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from micelab.exercises.checking import exercise
from micelab.graph.affine import CONVOLUTIONS
from micelab.graph.checkup import checkup

_Z = torch.tensor([-0.5, 0.1, 0.6, 0.9, 1.4])
_PHI = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.0])


def _gate(z: Tensor, theta: float) -> Tensor:
    return ((z > 0) & (z < theta)).to(z.dtype)


@exercise(
    "05-theta",
    hint="phi grows in step with (z, theta), so z * dphi/dz + theta * dphi/dtheta = phi; dphi/dz is the gate: solve it.",
    praise="No step of the simulation is unrolled: the spike count itself tells how the rate moves with theta.",
    cases=[(_Z, _PHI, 1.0), (2 * _Z, 2 * _PHI, 2.0), (_Z, _PHI, 0.8)],
    slips={
        "you leave out the gate: above theta and below 0 the rate does not follow z.": lambda z, phi, theta: (phi - z) / theta,
        "you leave out theta: divide by it.": lambda z, phi, theta: phi - _gate(z, theta) * z,
        "you leave out z: only the saturated neurons' gradient is right.": lambda z, phi, theta: phi / theta,
        "the sign is the other way round.": lambda z, phi, theta: (_gate(z, theta) * z - phi) / theta,
    },
)
def theta_gradient(z: Tensor, phi: Tensor, theta: float) -> Tensor:
    """d phi/d theta of each neuron, from its mean input z [N] and its true rate phi [N]; d phi/dz is 1 for 0 < z < theta."""
    gate = ((z > 0) & (z < theta)).to(z.dtype)
    return (phi - gate * z) / theta


_ACTS_ON = {
    "half start": "quantization",
    "quantized training": "quantization",
    "trained bound": "clipping",
    "signed spikes": "timing",
}


def _wrong_remedy(value: Any) -> str:
    if not isinstance(value, dict) or set(value) != set(_ACTS_ON):
        return f"a dictionary with the {len(_ACTS_ON)} remedies is needed: keep the names as they stand."
    kinds = {"timing", "quantization", "clipping"}
    for remedy, kind in value.items():
        if kind is None or kind is ...:
            return f"nothing is handed in for {remedy!r} yet: write timing, quantization or clipping."
        if str(kind).strip().lower() not in kinds:
            return f"{remedy!r} acts on {kind!r}, which is none of timing, quantization and clipping."
    wrong = [remedy for remedy, kind in value.items() if str(kind).strip().lower() != _ACTS_ON[remedy]]
    return f"{wrong[0]!r} does not act on {value[wrong[0]]} first of all." if wrong else ""


@exercise(
    "05-remedies",
    hint="which of them changes the staircase, which its upper end, and which the effect of the spikes' order?",
    praise="Each acts on one error and does not see the other two; a loss computed from true spikes sees all three.",
    judge=_wrong_remedy,
)
def acts_on() -> dict[str, str]:
    """The error that each remedy acts on first of all."""
    return {
        "half start": "quantization",
        "quantized training": "quantization",
        "trained bound": "clipping",
        "signed spikes": "timing",
    }


def _best(steps: list[int], accuracy: list[float], within: int) -> float:
    return max((reached for t, reached in zip(steps, accuracy, strict=True) if t <= within), default=0.0)


@exercise(
    "06-true-steps",
    hint="a run of T takes T + hidden steps in truth; keep those that take at most `budget`, return the best or 0.",
    praise="This is how every table of micelab compares: a method that looks at four steps before it starts has spent them.",
    cases=[
        ([1, 2, 4, 8], [0.4, 0.6, 0.8, 0.9], 0, 4),
        ([1, 2, 4, 8], [0.7, 0.8, 0.85, 0.9], 4, 8),
        ([2, 4, 8], [0.6, 0.8, 0.7], 0, 8),
        ([1, 2, 4], [0.5, 0.6, 0.7], 4, 3),
    ],
    slips={
        "you leave out the hidden steps.": lambda steps, accuracy, hidden, budget: _best(steps, accuracy, budget),
        "a run that takes exactly the budget is still in it.": lambda steps, accuracy, hidden, budget: _best(
            steps, accuracy, budget - hidden - 1
        ),
        "you return the number of steps: the accuracy is asked for.": lambda steps, accuracy, hidden, budget: max(
            (t for t in steps if t + hidden <= budget), default=0
        ),
    },
)
def best_within(steps: list[int], accuracy: list[float], hidden: int, budget: int) -> float:
    """The best accuracy among the runs that take at most `budget` true steps, 0 if there is none."""
    best = 0.0
    for t, reached in zip(steps, accuracy, strict=True):
        if t + hidden <= budget:
            best = max(best, reached)
    return best


@exercise(
    "06-energy",
    hint="the ANN pays 4.6 pJ for each of its `macs`; a spike pays 0.9 pJ for each of the `fan_out` neurons it reaches.",
    praise="Below one, spikes are cheaper. It grows with T: patience costs energy.",
    cases=[(1000.0, 10, 20_000), (5000.0, 10, 20_000), (0.0, 9, 500)],
    slips={
        "every spike reaches `fan_out` neurons.": lambda spikes, fan_out, macs: 0.9 * spikes / (4.6 * macs),
        "an addition is cheaper than a multiplication and an addition: 0.9 against 4.6 pJ.": lambda spikes, fan_out, macs: (
            spikes * fan_out / macs
        ),
    },
)
def energy_share(spikes: float, fan_out: int, macs: int) -> float:
    """The energy of an SNN's layer as a share of the ANN's."""
    return 0.9 * spikes * fan_out / (4.6 * macs)


_STEPS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])


@exercise(
    "07-gap",
    hint="average `outputs` over time (dimension 0), and take the largest absolute difference from `of_mean`.",
    praise="Zero for every affine layer, and for no other: this is the whole rule of what converts.",
    cases=[
        (_STEPS, _STEPS.mean(0)),
        (_STEPS.amax(1, keepdim=True), _STEPS.mean(0).amax().reshape(1)),
        (2 * _STEPS, _STEPS.mean(0)),
        (_STEPS, 2 * _STEPS.mean(0)),
    ],
    slips={
        "you average over neurons: dimension 0 is time.": lambda outputs, of_mean: (outputs.mean(1).mean() - of_mean).abs().max(),
        "the largest difference may be negative: take absolute values.": lambda outputs, of_mean: (
            outputs.mean(0) - of_mean
        ).max(),
        "you take the mean difference: the largest is asked for.": lambda outputs, of_mean: (
            (outputs.mean(0) - of_mean).abs().mean()
        ),
    },
)
def gap(outputs: Tensor, of_mean: Tensor) -> Tensor:
    """How far a layer's mean output over time [T, N] is from its output for the mean input [N]: the largest difference."""
    return (outputs.mean(0) - of_mean).abs().max()


def _wrong_network(value: Any) -> str:
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"{value.__name__} is a class: hand in a network, with brackets behind its name."
    if not isinstance(value, nn.Module):
        return "a network (torch.nn.Module) is needed."
    if not any(isinstance(module, CONVOLUTIONS) for module in value.modules()):
        return "it holds no convolution any more: mend the network, keep its two convolutions."
    report = checkup(value, torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    return "" if report else f"{report.problems[0].why}. To do: {report.problems[0].remedy}."


@exercise(
    "07-mend",
    hint="run `micelab.checkup` on it: each problem names its remedy. What remains must take digits, [N, 1, 8, 8].",
    praise="It converts. Had it been trained before, it would have to be trained again: these are changes of the network.",
    judge=_wrong_network,
)
def mended() -> nn.Module:
    """The network of the exercise with parts that convert."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
