"""Spike counts that are the same bits everywhere: weights, biases, thresholds and images on grids of powers of two.

Sums of numbers on a grid are exact in fp32 as long as they stay below 2^24 grid units, and what is exact does not depend on its
order: not on the batch, the chunk, the number of threads, the library or the device. `snap_to_grid` puts a network there and
works out, by intervals, the largest sum that any image could make in any order.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn import functional as F

from micelab.exceptions import InputError, first_line
from micelab.graph.affine import POOLS, TRANSPOSES, WEIGHTED, call_name, is_size
from micelab.graph.runner import check_time_steps, in_own_type
from micelab.graph.tracing import is_activation, module_of
from micelab.models import Normalize
from micelab.network.folded import largest_layer
from micelab.network.spiking import SpikingNetwork
from micelab.neuron.firing import IntegrateFire
from micelab.neuron.layout import over_channels

EXACT = 2**24
"""fp32 holds every integer up to this one."""

MOST_BITS = 16

_SAME_UNITS = (nn.Identity, nn.Flatten, nn.ZeroPad2d)
_SUMS = (operator.add, torch.add)
_SHAPES: set[Any] = {"flatten", "reshape", "contiguous", torch.flatten, torch.reshape, *TRANSPOSES}
_SHAPES |= {torch.cat, torch.concat, torch.concatenate}


def on_grid(values: Tensor, bits: int) -> Tensor:
    """The nearest multiples of 2^-bits, same shape (a half goes to the even one).

    >>> on_grid(torch.tensor([0.3, -0.9, 2.0]), bits=2).tolist()
    [0.25, -1.0, 2.0]
    """
    return torch.round(values * 2.0**bits) / 2.0**bits


class OnGrid(nn.Module):
    """Rounds what goes through to multiples of 2^-bits: [N, ...] to the same shape."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return on_grid(x, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def snap_to_grid(
    model: SpikingNetwork,
    bits: int | None = None,
    value_bits: int = 6,
    time_steps: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> SpikingNetwork:
    """A copy of a converted network whose spike counts are bit-equal for any order, batch, chunk, thread count and device.

    Weights become multiples of 2^-bits (bits in 1..16; default: in each layer as many as its sums have room for);
    thresholds, and the normalized images, of 2^-value_bits (1..16; a pixel of 8 bits is about 2^-6 after normalization);
    biases and start potentials of the products of the two. Nothing of `model` is changed; `spec["grid"]` of the copy tells
    the bits of each layer. time_steps: the T up to which this is to hold (default: the one it was converted for); a longer
    simulation is refused. shape: [C, H, W] of an image (default: the network's in_channels, 32, 32).

    Holds for images in [0, 1] and plain integrate-and-fire neurons, for counts, residuals and spikes; logits, behind a mean,
    may still round. Convolutions run as plain sums of products (no cuDNN, which may transform the weights), so on CUDA it is
    slower.

    >>> import micelab
    >>> snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), method="qcfs")
    >>> snapped = micelab.snap_to_grid(snn, bits=8, shape=(1, 8, 8))
    >>> float((snapped.layers.get_submodule('head').weight * 2**8).frac().abs().max())
    0.0
    >>> bits = micelab.snap_to_grid(snn, shape=(1, 8, 8)).spec["grid"]["bits"]
    >>> min(bits.values()) > 8
    True

    Raises InputError naming the layer where sums could pass 2^24 units of their grid, where a value leaves the grid (a mean over
    a number that is no power of two, batch-norm that is not folded) or where neurons are of another kind; and where the network
    takes no images of that shape, or is in half precision. Source: fp32 sums of integers below 2^24 are exact (IEEE 754);
    docs/performance.md.
    """
    for name, value in (("bits", 1 if bits is None else bits), ("value_bits", value_bits)):
        if not isinstance(value, int) or not 1 <= value <= MOST_BITS:
            raise InputError(f"{name} is {value!r}: give an integer from 1 to {MOST_BITS}, the grid is 2^-{name}")
    if not isinstance(model, SpikingNetwork):
        raise InputError(f"the model is a {type(model).__name__}: snap_to_grid takes what micelab.convert gives back")
    steps = model.time_steps if time_steps is None else check_time_steps(time_steps)
    image = _image_for(model, (model.spec.get("ann", {}).get("in_channels", 3), 32, 32) if shape is None else shape)
    names = [name for name, module in model.layers.named_modules() if isinstance(module, (*WEIGHTED, IntegrateFire))]
    chosen = dict.fromkeys(names, MOST_BITS if bits is None else bits)
    while True:
        snapped = copy.deepcopy(model)
        round_images(snapped.layers, value_bits)
        snap_numbers(snapped, chosen, value_bits)
        bounds = _Bounds(snapped.layers, chosen, value_bits, steps, may_give_way=bits is None)
        with torch.inference_mode():
            bounds.run(image)
        if not bounds.fitting:
            break
        chosen |= bounds.fitting
    snapped.spec["grid"] = {"bits": chosen, "value_bits": value_bits, "time_steps": steps}
    snapped.most_steps = steps
    return snapped


def _image_for(model: SpikingNetwork, shape: Any) -> Tensor:
    """A black image [1, C, H, W] that the network takes."""
    device = next(iter(model.neurons.values())).theta.device
    try:
        image = in_own_type(model.layers, torch.zeros(1, *shape, device=device))
        largest_layer(model.layers, image)
    except (TypeError, RuntimeError, InputError) as error:
        raise InputError(f"shape is {shape}, which the network does not take: give [C, H, W] ({first_line(error)})") from error
    if image.dtype not in (torch.float32, torch.float64):
        raise InputError(f"the network is in {image.dtype}, whose sums round before 2^24 units: put model.float() on the grid")
    return image


def snap_numbers(snn: SpikingNetwork, bits: Mapping[str, int], value_bits: int) -> None:
    """Puts weights, biases, thresholds and starts on their grids, in place; `bits` of each layer of weights or neurons."""
    for name, module in snn.layers.named_modules():
        if isinstance(module, WEIGHTED):
            module.weight.copy_(on_grid(module.weight, bits[name]))
            if module.bias is not None:
                module.bias.copy_(on_grid(module.bias, bits[name] + value_bits))
        elif isinstance(module, IntegrateFire):
            module.theta.copy_(on_grid(module.theta, value_bits).clamp(min=2.0**-value_bits))
            module.v0.copy_(on_grid(module.v0, bits[name]))


def round_images(layers: fx.GraphModule, bits: int) -> None:
    """Puts a rounding behind the images, or behind their normalization where that comes first, in place."""
    place = next(node for node in layers.graph.nodes if node.op == "placeholder")
    users = list(place.users)
    if len(users) == 1 and users[0].op == "call_module" and isinstance(module_of(layers, str(users[0].target)), Normalize):
        place = users[0]
    layers.add_submodule("image_grid", OnGrid(bits))
    with layers.graph.inserting_after(place):
        rounded = layers.graph.call_module("image_grid", (place,))
    place.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)
    layers.recompile()


@dataclass
class _Range:
    """Values between `low` <= 0 and `high` >= 0, [1, ...], all multiples of 2^-units; every partial sum of theirs, too.

    `finest`: the layers whose bits are in `units`, each with the units that come from elsewhere."""

    low: Tensor
    high: Tensor
    units: int
    finest: dict[str, int] = field(default_factory=dict)


def _together(ranges: Sequence[_Range]) -> tuple[int, dict[str, int]]:
    """Units, and whose, of values that stand side by side or are added."""
    finest: dict[str, int] = {}
    for each in ranges:
        for layer, elsewhere in each.finest.items():
            finest[layer] = max(elsewhere, finest.get(layer, elsewhere))
    return max(each.units for each in ranges), finest


class _Bounds(fx.Interpreter):
    """Walks the network with ranges in place of values; what leaves the grid is a sentence, raised where a neuron reads it.

    Unless bits may give way: then `fitting` has those that layers should have, of which sums before a neuron pass 2^24 units."""

    def __init__(
        self, traced: fx.GraphModule, bits: Mapping[str, int], value_bits: int, time_steps: int, may_give_way: bool = False
    ):
        super().__init__(traced)
        self.traced, self.bits, self.value_bits, self.time_steps = traced, bits, value_bits, time_steps
        self.may_give_way = may_give_way
        self.fitting: dict[str, int] = {}
        self.extra_traceback = False
        self.before_neurons: set[fx.Node] = set()  # the others round, as logits may
        for node in reversed(traced.graph.nodes):
            if any(is_activation(traced, user) or user in self.before_neurons for user in node.users):
                self.before_neurons.add(node)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            zeros = super().run_node(n)
            return _Range(zeros, zeros + 1, self.value_bits)
        if n.op == "output":
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        ranges: list[_Range] = []
        map_aggregate((args, kwargs), lambda value: ranges.append(value) if isinstance(value, _Range) else None)
        lost = next((text for text in map(self.env.get, n.all_input_nodes) if isinstance(text, str)), None)
        if is_activation(self.traced, n):
            if lost:
                raise InputError(lost)
            return self._neurons(n, module_of(self.traced, str(n.target)), ranges[0])
        if lost:
            return lost
        if is_size(n):
            return ranges[0].low.shape if n.target is getattr else self._apply(n, args, kwargs, "low")
        found = self._module(n, ranges[0]) if n.op == "call_module" else self._call(n, args, kwargs, ranges)
        return f"layer `{call_name(n)}` takes values off the grid: snap_to_grid cannot follow it" if found is None else found

    def _module(self, n: fx.Node, given: _Range) -> Any:
        module: Any = module_of(self.traced, str(n.target))
        if isinstance(module, Normalize):
            ends = [module(given.low), module(given.high)]
            return _Range(torch.minimum(*ends).clamp(max=0), torch.maximum(*ends).clamp(min=0), self.value_bits)
        if isinstance(module, OnGrid):
            step = 2.0**-module.bits
            return _Range((given.low / step).floor() * step, (given.high / step).ceil() * step, module.bits)
        if isinstance(module, WEIGHTED):
            return self._weighted(n, module, given)
        if isinstance(module, _SAME_UNITS):
            return _Range(module(given.low), module(given.high), given.units, given.finest)
        if isinstance(module, POOLS):
            low, high = module(given.low), module(given.high)
            shares = divisors(module, given.low.shape[2:], low.shape[2:])
            for share in shares:
                if share & (share - 1):
                    return f"layer `{n.target}` is a mean over {share} values: on a grid that must be a power of two"
            more = max(shares).bit_length() - 1
            return _Range(low, high, given.units + more, {layer: units + more for layer, units in given.finest.items()})
        return None

    def _call(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], ranges: list[_Range]) -> Any:
        if n.target in _SUMS and len(args) == 2 and len(ranges) == 2 and not kwargs:
            first, second = ranges
            low, high = first.low + second.low, first.high + second.high
            return self._checked(n, _Range(low, high, *_together(ranges)))
        if n.target in _SHAPES:
            return _Range(self._apply(n, args, kwargs, "low"), self._apply(n, args, kwargs, "high"), *_together(ranges))
        return None

    def _apply(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], end: str) -> Any:
        args, kwargs = map_aggregate((args, kwargs), lambda value: getattr(value, end) if isinstance(value, _Range) else value)
        return getattr(args[0], str(n.target))(*args[1:], **kwargs) if n.op == "call_method" else n.target(*args, **kwargs)  # type: ignore[operator]

    def _weighted(self, n: fx.Node, module: Any, given: _Range) -> _Range | str:
        ends = []
        for sign in (1.0, -1.0):  # a partial sum takes all terms of one sign at most
            signed = copy.deepcopy(module)
            other = copy.deepcopy(module)
            signed.weight.copy_((sign * module.weight).clamp(min=0))
            other.weight.copy_((-sign * module.weight).clamp(min=0))
            if module.bias is not None:
                signed.bias.copy_((sign * module.bias).clamp(min=0))
                other.bias.zero_()
            ends.append(signed(given.high) + other(-given.low))
        name = str(n.target)
        return self._checked(n, _Range(-ends[1], ends[0], given.units + self.bits[name], {name: given.units}))

    def _checked(self, n: fx.Node, found: _Range, what: str = "sums") -> _Range | str:
        """`found`, or what is wrong with it."""
        largest = float(torch.maximum(found.high, -found.low).max())
        units = largest * 2.0**found.units
        if units <= EXACT:
            return found
        too_many = math.ceil(math.log2(units / EXACT))
        if self.may_give_way and (is_activation(self.traced, n) or n in self.before_neurons):
            room = {layer: max(1, found.units - too_many - elsewhere) for layer, elsewhere in found.finest.items()}
            fewer = {layer: bits for layer, bits in room.items() if bits < self.bits[layer]}
            if fewer:
                self.fitting |= {layer: min(bits, self.fitting.get(layer, bits)) for layer, bits in fewer.items()}
                return found
        return (
            f"layer `{call_name(n)}`: {what} could reach {largest:.4g}, {units:.3g} units of 2^-{found.units}, and fp32 is exact "
            f"up to 2^24 units: give fewer bits or value_bits, {too_many} less in sum, or a smaller time_steps"
        )

    def _neurons(self, n: fx.Node, module: Any, current: _Range) -> _Range:
        name = str(n.target)
        if type(module) is not IntegrateFire:
            raise InputError(f"layer `{name}` has neurons of kind {type(module).__name__}: only plain ones can be on a grid")
        theta = over_channels(module.theta, current.low).to(current.low.dtype)
        start = (theta * over_channels(module.v0, current.low)).abs()
        units, finest = max(current.units, self.bits[name] + self.value_bits), {**current.finest, name: self.value_bits}
        membrane = _Range(self.time_steps * current.low - start, self.time_steps * current.high + start, units, finest)
        found = self._checked(n, membrane, f"membrane potentials within {self.time_steps} steps")
        if isinstance(found, str):
            raise InputError(found)
        high = theta.expand_as(current.low)
        return _Range(-high if module.signed else torch.zeros_like(high), high, self.value_bits)


def divisors(pool: Any, sides: Sequence[int], outputs: Sequence[int]) -> list[int]:
    """The numbers by which a pooling of `sides` (H, W) to `outputs` divides the sums of its windows, at the border too.

    >>> divisors(nn.AvgPool2d(2, ceil_mode=True), (4, 5), (2, 3))
    [2, 4]
    """
    if getattr(pool, "divisor_override", None):
        return [pool.divisor_override]
    adaptive, found = not hasattr(pool, "kernel_size"), []
    options = [outputs] if adaptive else [pool.kernel_size, pool.stride, pool.padding]
    by_side = [option if isinstance(option, Sequence) else [option] * len(sides) for option in options]
    for side, *sizes in zip(sides, *by_side, strict=True):
        pixels = torch.eye(side)[:, None]  # one at a time: each window says its share of it
        if adaptive:
            shares = F.adaptive_avg_pool1d(pixels, *sizes)
        else:
            kernel, stride, padding = sizes
            shares = F.avg_pool1d(pixels, kernel, stride, padding, pool.ceil_mode, pool.count_include_pad)
        found.append({round(1 / share) for share in shares.amax((0, 1)).tolist()})
    return sorted({math.prod(sizes) for sizes in itertools.product(*found)})
