"""The named networks: ResNet-20 of kinds A, B, C and a small convolutional net for the digits.

Three different networks are called ResNet-20 in this literature; `kind` (or `width`) says which:

====  ====================================================  ==========  =========
kind  shape                                                 parameters  MMAC/image
====  ====================================================  ==========  =========
A     one 3x3 stem, 16-32-64 channels, 3 blocks a stage     0.27 M      41
B     three 3x3 stem, 64-128-256-512, 2 blocks a stage      11.3 M      187
C     one 3x3 stem, 64-128-256 channels, 3 blocks a stage   4.3 M       648
====  ====================================================  ==========  =========

All have 1x1-convolution shortcuts where shapes change and average pooling only. Images come in as float in [0, 1];
normalization is the first layer and is saved with the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from micelab.activation import ActivationName, make_activation
from micelab.exceptions import InputError

Kind = Literal["A", "B", "C"]
_WIDTH_OF_KIND = {"A": 16, "B": 64, "C": 64}


class Normalize(nn.Module):
    """(x - mean)/std per channel: [N, C, H, W] in [0, 1] to zero mean and unit spread."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise InputError(f"images have shape {tuple(x.shape)}: give them as [N, C, H, W], one image as image[None]")
        if x.shape[-3] != len(self.mean):
            wanted = len(self.mean)
            raise InputError(
                f"images have {x.shape[-3]} channels, and this network was made for {wanted}: give it images of {wanted}"
            )
        return (x - self.mean) / self.std


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [N, inputs, H, W] -> [N, outputs, H/stride, W/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module]):
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(inputs, outputs, stride=stride)
        self.act1 = activation()
        self.conv2, self.bn2 = _conv_bn(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(inputs, outputs, 1, stride))
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ImageNetwork(nn.Module):
    """Normalization, stem, blocks, average pooling, linear head; `spec` rebuilds it with `build`."""

    def __init__(self, normalize: Normalize, stem: nn.Module, blocks: nn.Module, features: int, num_classes: int):
        super().__init__()
        self.spec: dict[str, Any] = {}
        self.normalize, self.stem, self.blocks = normalize, stem, blocks
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.blocks(self.stem(self.normalize(x))))))


def resnet20(
    num_classes: int = 10,
    width: int | None = None,
    kind: Kind | None = None,
    activation: ActivationName = "relu",
    levels: int | None = 8,
    theta: float = 4.0,
    in_channels: int = 3,
    mean: Sequence[float] | float = 0.5,
    std: Sequence[float] | float = 0.25,
) -> ImageNetwork:
    """A ResNet-20: images [N, in_channels, H, W] in [0, 1] to logits [N, num_classes].

    `kind` "A" (width 16), "B", "C" (width 64), or any `width` of A's shape; `activation` "relu", "clip" (TCL), "quant_clip"
    (QCFS with `levels`), "noisy_quant_clip" (NQ) or "spike_clip" (what joint training makes of it); `theta` starts every
    bound; `mean` and `std` normalize, per channel.

    >>> net = resnet20(width=16)
    >>> net(torch.zeros(1, 3, 32, 32)).shape, sum(p.numel() for p in net.parameters())
    (torch.Size([1, 10]), 272474)
    """
    if kind is not None and kind not in _WIDTH_OF_KIND:
        raise InputError(f"kind {kind!r} of ResNet-20 is unknown: choose 'A', 'B' or 'C'")
    spec = {"name": "resnet20", "num_classes": num_classes, "width": width, "kind": kind, "activation": activation}
    if kind is not None and width is not None:
        raise InputError(f"kind {kind!r} has its own width: give kind or width, not both")
    width = _WIDTH_OF_KIND[kind or "A"] if width is None else width
    if min(width, num_classes, in_channels) < 1:
        raise InputError(f"width {width}, num_classes {num_classes} and in_channels {in_channels} must be at least 1")

    def act() -> nn.Module:
        return make_activation(activation, levels, theta)

    means, stds = _per_channel(mean, in_channels), _per_channel(std, in_channels)
    if kind == "B":
        stem = nn.Sequential(
            *_conv_bn(in_channels, width), act(), *_conv_bn(width, width), act(), *_conv_bn(width, width, stride=2), act()
        )
        stages, depth = [width, 2 * width, 4 * width, 8 * width], 2
    else:
        stem = nn.Sequential(*_conv_bn(in_channels, width), act())
        stages, depth = [width, 2 * width, 4 * width], 3
    blocks, inputs = [], width
    for number, outputs in enumerate(stages):
        for block in range(depth):
            stride = 2 if number > 0 and block == 0 else 1
            blocks.append(BasicBlock(inputs, outputs, stride, act))
            inputs = outputs
    net = ImageNetwork(Normalize(means, stds), stem, nn.Sequential(*blocks), inputs, num_classes)
    net.spec = spec | {"levels": levels, "theta": theta, "in_channels": in_channels, "mean": means, "std": stds}
    return net


def small_cnn(
    num_classes: int = 10,
    width: int = 16,
    activation: ActivationName = "relu",
    levels: int | None = 8,
    theta: float = 2.0,
    in_channels: int = 1,
    mean: Sequence[float] | float = 0.3,
    std: Sequence[float] | float = 0.38,
) -> ImageNetwork:
    """Four 3x3 convolutions with average pooling, made for the 8x8 digits; trains in seconds on a laptop.

    >>> small_cnn()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    if min(width, num_classes, in_channels) < 1:
        raise InputError(f"width {width}, num_classes {num_classes} and in_channels {in_channels} must be at least 1")
    means, stds = _per_channel(mean, in_channels), _per_channel(std, in_channels)

    def act() -> nn.Module:
        return make_activation(activation, levels, theta)

    stem = nn.Sequential(*_conv_bn(in_channels, width), act())
    blocks = nn.Sequential(
        nn.Sequential(*_conv_bn(width, width), act(), nn.AvgPool2d(2)),
        nn.Sequential(*_conv_bn(width, 2 * width), act()),
        nn.Sequential(*_conv_bn(2 * width, 2 * width), act()),
    )
    net = ImageNetwork(Normalize(means, stds), stem, blocks, 2 * width, num_classes)
    net.spec = {"name": "small_cnn", "num_classes": num_classes, "width": width, "activation": activation}
    net.spec |= {"levels": levels, "theta": theta, "in_channels": in_channels, "mean": means, "std": stds}
    return net


NETWORKS: dict[str, Callable[..., ImageNetwork]] = {"resnet20": resnet20, "small_cnn": small_cnn}


def build(spec: dict[str, Any]) -> ImageNetwork:
    """A new network, untrained, from the `spec` of another."""
    options = dict(spec)
    name = options.pop("name", None)
    if name not in NETWORKS:
        raise InputError(f"network {name!r} is unknown: choose one of {', '.join(NETWORKS)}")
    try:
        return NETWORKS[name](**options)
    except TypeError as error:
        raise InputError(f"network {name!r} does not take these options: {error}") from error


def describe(spec: dict[str, Any]) -> str:
    """The network in a few words: "ResNet-20 kind A (width 16), quant_clip levels=8"."""
    levels = f" levels={spec['levels']}" if spec["activation"] not in ("relu", "clip") else ""
    kind = spec.get("kind") or {16: "A", 64: "C"}.get(spec.get("width") or 16)
    name = f"ResNet-20 kind {kind}" if spec["name"] == "resnet20" and kind else spec["name"]
    width = spec.get("width") or _WIDTH_OF_KIND[kind or "A"]
    return f"{name} (width {width}), {spec['activation']}{levels}"


def _per_channel(value: Sequence[float] | float, channels: int) -> list[float]:
    values = [float(value)] * channels if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != channels:
        raise InputError(f"normalization has {len(values)} values for {channels} channels: give one for each")
    return values
