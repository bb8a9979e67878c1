"""A CUDA device that computes nothing: torch's FakeTensorMode, with every wait of the host for the device written down."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_NUMBERS = {aten._local_scalar_dense.default, aten.item.default}
_ANSWERS = {aten.is_nonzero.default, aten.equal.default, aten.allclose.default}


class _Watch(TorchDispatchMode):
    """Reading a number of a device tensor gives 1 and asking it a question gives yes, so that checks pass; each is written
    down, as is every copy between CPU and device."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if func in _NUMBERS | _ANSWERS:
            self.waits += ["read"] * args[0].is_cuda
            return 1.0 if func in _NUMBERS else True
        out = func(*args, **kwargs)
        after = {x.device.type for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        if "cpu" in after and "cuda" in before:
            self.waits.append("copy to the CPU")
        if "cuda" in after and before == {"cpu"}:  # numbers as well: each is a copy of its own
            self.waits.append("copy to the device")
        return out


def _listing(waits):
    def tolist(self):
        """Ones, in the tensor's shape; written down as one read."""
        waits.extend(["read"] * self.is_cuda)
        return np.ones(self.shape).tolist()

    return tolist


def _replace(self, fn, recurse=True):
    """`nn.Module._apply` for `.to(...)`: torch's own swaps the memory of two tensors, and here there is none."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    with torch.no_grad():
        for name, value in self._parameters.items():
            if value is not None:
                self._parameters[name] = torch.nn.Parameter(fn(value), value.requires_grad)
        for name, value in self._buffers.items():
            if value is not None:
                self._buffers[name] = fn(value)
    return self


def _copied(self, memo):
    """`copy.deepcopy` of a fake tensor: torch's own looks for its memory."""
    if id(self) not in memo:
        copied = self.detach().clone()
        memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
    return memo[id(self)]


def backward(loss):
    """`loss.backward()` node by node: torch's engine asks the driver for the device's streams, and here there is no driver."""
    order, seen = [], set()

    def visit(node):
        if node is not None and node not in seen:
            seen.add(node)
            for source, _ in node.next_functions:
                visit(source)
            order.append(node)

    visit(loss.grad_fn)
    grads = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(order):
        given = grads.pop(node, {})
        if hasattr(node, "variable"):  # a leaf
            leaf = node.variable
            leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
            continue
        with torch.no_grad():
            run = node if callable(node) else node.apply  # the latter for torch.autograd.Function
            results = run(*[given.get(place) for place in range(len(node._input_metadata))])
        results = results if isinstance(results, tuple) else (results,)
        # a torch.autograd.Function also gives None for what is no tensor, here always its last arguments
        for (source, place), grad in zip(node.next_functions, results, strict=False):
            if source is not None and grad is not None:
                grad = grad.sum_to_size(source._input_metadata[place].shape)  # what was broadcast
                room = grads.setdefault(source, {})
                room[place] = grad if place not in room else room[place] + grad


@contextmanager
def fake_cuda():
    """Inside, tensors and modules on "cuda" are right in shape, type, layout and device, and hold nothing; an operation on
    tensors of two devices raises. Gives the list of what makes the host wait for the device: "read" for each number read,
    "copy to the CPU", "copy to the device".
    """
    waits = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _copied, create=True))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", _listing(waits)))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _replace))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Watch(waits))
        yield waits
