"""Walks through the layers of a graph, which others build on: the simulation, training, calibration, measuring."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from micelab.exceptions import InputError, first_line
from micelab.graph.affine import DIMENSIONS, call_name, is_elementwise
from micelab.graph.tracing import activations, is_activation, module_of
from micelab.machine import full_precision, ran_out


class LayerRunner(fx.Interpreter):
    """Runs the graph node by node, hands every activation to `activate(name, module, z)`, and names the layer that fails."""

    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced, garbage_collect_values=True)
        self.traced = traced
        self.extra_traceback = False
        self._hint = ""

    def activate(self, name: str, module: Any, z: Tensor) -> Tensor:
        """What the activation `name` gives back for its input z; here the module's own value."""
        return module(z)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return module_of(self.traced, target)(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(args[0], Tensor):
            check_batch(self.traced, args[0])
        self._hint = "; is this one image [C, H, W]? Give it as image[None]" if getattr(args[0], "ndim", 4) == 3 else ""
        with full_precision(args[0].device if isinstance(args[0], Tensor) else torch.device("cpu")):
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        try:
            if is_activation(self.traced, n):
                args, _ = self.fetch_args_kwargs_from_env(n)
                return self.activate(str(n.target), module_of(self.traced, str(n.target)), args[0])
            out = super().run_node(n)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, InputError):
                raise InputError(f"layer `{call_name(n)}`: {error}") from error
            if isinstance(error, RuntimeError) and ran_out(error):
                raise
            raise InputError(
                f"layer `{call_name(n)}` cannot take input of shape {self._shapes(n)}: {first_line(error)}{self._hint}"
            ) from error
        if isinstance(out, Tensor) and n.op != "placeholder" and out.shape[:1] != self._inputs(n)[0].shape[:1]:
            raise InputError(
                f"layer `{call_name(n)}` mixes the images of a batch: {self._shapes(n)} in, {tuple(out.shape)} out; "
                f"keep dimension 0 as it is{self._hint}"
            )
        return out

    def _inputs(self, n: fx.Node) -> list[Any]:
        return [self.env[source] for source in n.all_input_nodes if hasattr(self.env[source], "shape")]

    def _shapes(self, n: fx.Node) -> str:
        return ", ".join(str(tuple(value.shape)) for value in self._inputs(n))


class InputCollector(LayerRunner):
    """Runs the ANN and keeps the input z of every activation."""

    def __init__(self, traced: Any):
        super().__init__(traced)
        self.activations = activations(traced)
        self.inputs: dict[str, Tensor] = {}

    def activate(self, name: str, module: nn.Module, z: Tensor) -> Tensor:
        self.inputs[name] = z
        return module(z)


def image_batches(images: Any) -> Iterator[Tensor]:
    """The batches of `images`: a tensor [N, C, H, W] is one, a loader gives its own, labels are left out; each is checked."""
    if not isinstance(images, Iterable):
        raise InputError(f"images are a {type(images).__name__}: give a float tensor [N, C, H, W] in [0, 1] or batches of them")
    for batch in [images] if isinstance(images, Tensor) else images:
        yield check_images(batch[0] if isinstance(batch, (tuple, list)) and batch else batch)


def labelled_batches(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of every batch of `loader`, checked; raises InputError where it gives none, or something else."""
    seen = 0
    for batch in loader if isinstance(loader, Iterable) and not isinstance(loader, Tensor) else [loader]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InputError(f"the loader gives a {type(batch).__name__}: give batches of (images [N, C, H, W], labels [N])")
        images = check_images(batch[0])
        yield images, check_labels(batch[1], len(images))
        seen += len(images)
    if not seen:
        raise InputError("the loader gave no images: give batches of (images, labels)")


def check_images(images: Any) -> Tensor:
    """`images` if it is a float tensor [N, ...] without NaN; raises InputError with the remedy otherwise."""
    if not isinstance(images, Tensor):
        raise InputError(f"images are a {type(images).__name__}: give a float tensor [N, C, H, W] in [0, 1]")
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}: networks take float in [0, 1], so use images.float() / 255")
    if images.dim() < 2 or images.shape[0] == 0:
        raise InputError(f"images have shape {tuple(images.shape)}: give at least one image as [N, C, H, W]")
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0])
        raise InputError(f"image {bad} of the batch holds NaN or infinite values: remove or mend it")
    return images


def check_batch(traced: fx.GraphModule, images: Tensor) -> None:
    """Raises InputError where `images` are one image without its batch, as the first layer that reads them tells.

    >>> from micelab.graph import read
    >>> try:
    ...     check_batch(read(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), torch.zeros(3, 8, 8))
    ... except InputError as error:
    ...     print(error)
    images have shape (3, 8, 8), and layer `0` takes a batch of 4 dimensions: give one image as image[None]
    """
    node = next(node for node in traced.graph.nodes if node.op == "placeholder")
    while node.users:
        node = next(iter(node.users))
        module = module_of(traced, str(node.target)) if node.op == "call_module" else None
        dimensions = next((number for number, kinds in DIMENSIONS.items() if isinstance(module, kinds)), None)
        if dimensions == images.dim() + 1:
            raise InputError(
                f"images have shape {tuple(images.shape)}, and layer `{node.target}` takes a batch of {dimensions} dimensions: "
                "give one image as image[None]"
            )
        if dimensions or not (is_activation(traced, node) or is_elementwise(traced, node)):
            return


def check_labels(labels: Any, images: int) -> Tensor:
    """`labels` as int64 if they are one class for each of so many images, [N]; raises InputError with the remedy otherwise.

    >>> check_labels(torch.tensor([3, 1]), images=2)
    tensor([3, 1])
    """
    given = f"a {type(labels).__name__}"
    if isinstance(labels, Tensor):
        given = f"{labels.dtype} of shape {tuple(labels.shape)}"
        whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if whole and labels.shape == (images,):
            return labels.long()
    raise InputError(
        f"labels are {given}: give an integer tensor [{images}], the class of each image, as y.flatten() is of [N, 1], "
        "y.argmax(1) of one-hot rows, y.long() of floats and torch.as_tensor(y) of a list or an array"
    )


def check_time_steps(time_steps: Any) -> int:
    """T as an int if it is an integer of any kind (NumPy's, too) and at least 1; raises InputError otherwise.

    >>> check_time_steps(torch.arange(9)[8])
    8
    """
    try:
        steps = 0 if isinstance(time_steps, bool) else operator.index(time_steps)
    except TypeError:
        steps = 0
    if steps < 1:
        raise InputError(f"time_steps is {time_steps!r}: give an integer of at least 1")
    return steps


def in_own_type(network: nn.Module, images: Tensor) -> Tensor:
    """`images` in the type of the network's own numbers: one in float64 takes no float32.

    >>> in_own_type(nn.Linear(2, 2).double(), torch.zeros(1, 2)).dtype
    torch.float64
    """
    own = (value.dtype for value in chain(network.parameters(), network.buffers()) if value.is_floating_point())
    return images.to(next(own, images.dtype))
