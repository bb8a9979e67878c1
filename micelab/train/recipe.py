"""Every choice of a training run: what is common to both stages, and what each adds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from micelab import checkpoint, models
from micelab.activation import QuantClip, TrainableClip
from micelab.convert import convert
from micelab.data import ImageData, to_float
from micelab.exceptions import ConversionError, InputError
from micelab.train.augment import Augmentation

FIT_IMAGES = 256
"""So many training images, without augmentation, tell `fit_theta` where the bounds begin."""


@dataclass(frozen=True)
class Recipe:
    """What both stages share: data, schedule (linear warm-up, then a cosine to zero), seed, precision, where to start.

    `theta_lr`: rate of the bounds theta (and starts v0), as a share of `lr`; `weight_decay` is for weights only; `storage`:
    numbers of the file that the final network is written to, and those that its accuracies are measured with; `small_crops`:
    share of the epochs, from the first on, that see crops of three quarters of the side, at about half of the cost; `views`:
    how many random views each image is seen in, after which they come again (0: a new one every epoch); `distill`: weight of the
    Kullback-Leibler divergence at `temperature` to `teacher`, a checkpoint (None: the one that it starts from), which is asked
    once about each view that comes again.
    """

    dataset: str = "digits"
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    theta_lr: float = 0.1
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    augment: Augmentation = "standard"
    small_crops: float = 0.0
    views: int = 0
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "fp32"
    start: str | None = None
    storage: Literal["fp32", "fp16"] = "fp32"
    distill: float = 0.0
    teacher: str | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, (good, wanted) in self.ranges().items():
            if not good:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}, which is out of range: give {wanted}")
        if self.teacher is not None and not self.distill:
            raise InputError(f"--teacher {self.teacher} teaches nothing where --distill is 0: give its weight, as in --distill 1")
        if self.temperature != 1 and not self.distill:
            raise InputError(
                f"--temperature {self.temperature:g} is a teacher's, and --distill is 0: give its weight, as in --distill 1"
            )

    @property
    def small_epochs(self) -> int:
        """How many epochs see smaller crops."""
        return round(self.small_crops * self.epochs)

    def ranges(self) -> dict[str, tuple[bool, str]]:
        """Of each option: whether it lies in its range, and that range in words."""
        return {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "a number above 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "theta_lr": (0 <= self.theta_lr < math.inf, "at least 0"),
            "warmup_epochs": (0 <= self.warmup_epochs < math.inf, "at least 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "at least 0, less than 1"),
            "small_crops": (
                0 <= self.small_crops <= 1 and not (self.small_crops and self.augment == "none"),
                "a share from 0 to 1, and an --augment that crops",
            ),
            "views": (
                self.views >= 0 and not (self.views and self.augment == "none"),
                "0 (always new ones) or more, and an --augment that changes them",
            ),
            "seed": (self.seed >= 0, "at least 0"),
            "precision": (self.precision in ("bf16", "fp32"), "bf16 or fp32"),
            "storage": (self.storage in ("fp32", "fp16"), "fp32 or fp16"),
            "distill": (0 <= self.distill < math.inf, "at least 0"),
            "temperature": (0 < self.temperature < math.inf, "a number above 0"),
        }


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """Stage 1. The recipe is the field's: SGD with Nesterov momentum 0.9, weight decay 5e-4.

    fit_theta: the bounds begin not at `theta` but at the thresholds that method "mse" finds for `start`, a ReLU network.

    >>> TrainConfig(epochs=2, levels=4).lr
    0.1
    """

    network: str = "small_cnn"
    kind: models.Kind | None = None
    width: int | None = None
    activation: str = "quant_clip"
    levels: int | None = 8
    theta: float = 4.0
    fit_theta: bool = False
    momentum: float = 0.9
    compile: bool = False

    def ranges(self) -> dict[str, tuple[bool, str]]:
        return super().ranges() | {"momentum": (0 <= self.momentum < 1, "at least 0, less than 1")}

    def build(self, data: ImageData) -> models.ImageNetwork:
        """The network to train, fitted to the data: weights drawn from `seed`, or those of the checkpoint `start`."""
        spec: dict[str, Any] = {"name": self.network, "activation": self.activation, "levels": self.levels}
        spec |= {"theta": self.theta, "num_classes": len(data.classes), "in_channels": data.shape[0]}
        spec |= {"mean": list(data.mean), "std": list(data.std)}
        spec |= {key: value for key in ("kind", "width") if (value := getattr(self, key)) is not None}
        torch.manual_seed(self.seed)
        model = models.build(spec)
        if self.start is not None:
            checkpoint.start_from(model, self.start)
        if self.fit_theta:
            self._fit_theta(model, data)
        return model

    def _fit_theta(self, model: models.ImageNetwork, data: ImageData) -> None:
        """Every bound becomes the threshold that "mse" finds for its layer of `start` at T = levels."""
        relu = None if self.start is None else checkpoint.load(self.start)
        if relu is None or any(isinstance(module, TrainableClip) for module in relu.modules()):
            raise InputError("--fit-theta fits bounds to a ReLU network's activations: name one with --start, or leave it out")
        clips = {name: module for name, module in model.named_modules() if isinstance(module, QuantClip)}
        if not clips or self.levels is None:
            raise InputError(f"--fit-theta is for bounds with levels, and --activation {self.activation} has none: leave it out")
        try:
            snn = convert(relu, "mse", to_float(data.train.images[:FIT_IMAGES]), time_steps=self.levels)
        except ConversionError as error:
            raise ConversionError(f"--start {self.start}: {error}; or leave out --fit-theta") from error
        with torch.no_grad():
            for name, clip in clips.items():
                clip.log_theta.copy_(snn.neurons[name].theta.log().expand_as(clip.log_theta))


@dataclass(frozen=True)
class JointConfig(Recipe):
    """Stage 2, from the checkpoint `start`: Adam, gradients clipped to norm `max_norm`, no weight decay.

    time_steps: the T it is trained for; several: one of them drawn for each batch, one network for all. penalty: weight of the
    residual potential penalty; gradient: "rates", of the spike counts alone, or "time", of every spike (`ThroughTimeConfig`);
    average: the network is the mean of the weights at the end and those of `start`, itself trained jointly: two ends of one
    path, between which lies a flatter place (Izmailov et al., UAI 2018).

    >>> JointConfig(time_steps=(2,), distill=1.0).gradient
    'rates'
    """

    epochs: int = 10
    lr: float = 1e-3
    weight_decay: float = 0.0
    theta_lr: float = 1.0
    warmup_epochs: float = 0.1
    time_steps: tuple[int, ...] = (8,)
    penalty: float = 0.0
    max_norm: float = 1.0
    gradient: Literal["rates", "time"] = "rates"
    average: bool = False

    def ranges(self) -> dict[str, tuple[bool, str]]:
        steps = self.time_steps
        return super().ranges() | {
            "time_steps": (bool(steps) and all(isinstance(t, int) and 1 <= t <= 256 for t in steps), "integers from 1 to 256"),
            "penalty": (0 <= self.penalty < math.inf, "at least 0"),
            "max_norm": (0 < self.max_norm < math.inf, "a number above 0"),
            "gradient": (self.gradient in ("rates", "time"), "rates or time"),
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.gradient == "time") != isinstance(self, ThroughTimeConfig):
            kind = "ThroughTimeConfig" if self.gradient == "time" else "JointConfig"
            raise InputError(f'gradient is "{self.gradient}": use {kind}, whose rate and optimizer are made for it')
        if self.gradient == "time" and self.penalty:
            raise InputError("--penalty goes with the gradient of the rates: leave it out, or give --gradient rates")


@dataclass(frozen=True)
class ThroughTimeConfig(JointConfig):
    """Stage 2 with the gradient of every spike, which is true enough for the recipe of stage 1: SGD with Nesterov momentum.

    >>> ThroughTimeConfig(time_steps=(2,)).lr
    0.05
    """

    lr: float = 0.05
    weight_decay: float = 1e-4
    theta_lr: float = 0.1
    warmup_epochs: float = 1.0
    max_norm: float = 5.0
    gradient: Literal["rates", "time"] = "time"


@dataclass(frozen=True)
class Named:
    """A recipe by name: where it differs from the defaults, in both stages, in stage 1, and in joint training."""

    both: dict[str, Any]
    first: dict[str, Any]
    joint: dict[str, Any]


def _resnet20(dataset: str, kind: str, start: str, first: dict[str, Any]) -> Named:
    both = {"dataset": dataset} | ({} if kind == "A" else {"storage": "fp16"})
    return Named(both, {"network": "resnet20", "kind": kind} | first, {"start": start, "gradient": "time"})


_LONG = {"augment": "cutout", "label_smoothing": 0.1}
RECIPES = {
    "cifar10-a": _resnet20("cifar10", "A", "resnet20a-cifar10-qcfs", {"epochs": 60}),
    "cifar100-a": _resnet20("cifar100", "A", "resnet20a-cifar100-qcfs", {"epochs": 100, "lr": 0.05}),
    "cifar10-b": _resnet20("cifar10", "B", "data/runs/cifar10-b/model.safetensors", {"epochs": 60} | _LONG),
    "cifar100-b": _resnet20("cifar100", "B", "data/runs/cifar100-b/model.safetensors", {"epochs": 60, "lr": 0.05} | _LONG),
    "cifar10-c": _resnet20("cifar10", "C", "data/runs/cifar10-c/model.safetensors", {"epochs": 60} | _LONG),
    "cifar100-c": _resnet20("cifar100", "C", "data/runs/cifar100-c/model.safetensors", {"epochs": 60, "lr": 0.05} | _LONG),
}
"""Stage 1 of each is `micelab train --recipe NAME`, stage 2 the same with `--joint`, through time; it starts from the shipped
network of stage 1 (kind A), or from what stage 1 left in data/runs/."""


def choose(name: str | None, joint: bool, given: dict[str, Any]) -> Recipe:
    """The configuration of recipe `name` (None: the defaults, by the data set) with the options `given` put over it.

    >>> choose("cifar10-b", False, {"epochs": 2}).epochs, choose("cifar10-a", True, {"time_steps": (4,)}).start
    (2, 'resnet20a-cifar10-qcfs')

    Raises InputError for an unknown name.
    """
    if name is not None and name not in RECIPES:
        raise InputError(f"--recipe {name} is unknown: choose {', '.join(RECIPES)}")
    named = RECIPES[name] if name is not None else Named({}, {"epochs": 60}, {})
    if joint:
        chosen = named.both | named.joint | given
        return (ThroughTimeConfig if chosen.get("gradient") == "time" else JointConfig)(**chosen)
    words = named.both | named.first | given
    words.setdefault("network", "small_cnn" if words.get("dataset", "digits") == "digits" else "resnet20")
    if words.get("activation") in ("relu", "clip"):
        if given.get("levels") is not None:
            raise InputError(f"--levels is for quant_clip, and --activation {words['activation']} has none: leave one out")
        words["levels"] = None
    if words.get("kind") is not None and words["network"] != "resnet20":
        raise InputError(
            f"--kind is for resnet20, and the network is {words['network']}: add --network resnet20, or leave it out"
        )
    return TrainConfig(**words)
