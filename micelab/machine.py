"""The machine that a number was measured on: what it is called and which precision suits it."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from micelab.exceptions import first_line

log = logging.getLogger(__name__)

_KEEP = {-3: 2**31 - 1, -1: 2**31 - 1, -2: 2**28}
"""glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD (malloc.h): no block of its own, none given back, large steps."""

_NO_MEMORY = (
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    *("can't allocate memory", "not enough memory"),  # of torch's allocator for the CPU, on Linux and on Windows
)


def default_precision(device: str | None = None) -> Literal["bf16", "fp32"]:
    """What to train in on `device` (default: the GPU if there is one): "bf16" where that is native, else "fp32".

    It is native on CUDA from Ampere on, and on processors with AVX-512 BF16 or AMX.
    """
    return "bf16" if has_bf16(device or ("cuda" if torch.cuda.is_available() else "cpu")) else "fp32"


def has_bf16(device: str) -> bool:
    """Whether `device` ("cpu", "cuda:0", ...) multiplies bf16 numbers by itself: elsewhere that is emulated, and slow."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def say_lacking(device: str, what: str) -> None:
    """Says once in the log that a fast mode was asked for in vain."""
    log.warning("%s has no %s: going on in fp32, which is exact", device, what)


def ran_out(error: RuntimeError) -> bool:
    """Whether the error says that memory was not enough, the device's or the machine's, whichever library says it.

    >>> ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 800000000 bytes"))
    True
    """
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def compiled(network: Callable[..., Any]) -> Callable[..., Any]:
    """`network` by torch.compile, and as it is where that fails: the log says why, once."""
    fast: Callable[..., Any] | None = torch.compile(network)

    def run(images: Tensor) -> Any:
        nonlocal fast
        if fast is not None:
            try:
                return fast(images)
            except torch._dynamo.exc.TorchDynamoException as error:
                why = first_line(getattr(error, "inner_exception", error))
                log.warning("--compile: torch.compile failed (%s): going on without it", why)
                fast = None
        return network(images)

    return run


def keep_memory() -> bool:
    """Lets this process keep the memory that it frees, for a loop that allocates the same large tensors over and over.

    The C library gives blocks from 32 MB on back to the system at once, and the next step pays for clearing their pages: up to
    two fifths of a step through time at T = 8 (docs/performance.md). For a process that only trains, as `micelab train`; True
    where it could be done, False where the C library is not glibc or the environment (MALLOC_...) has settled it.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        options = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return min(options(option, value) for option, value in _KEEP.items()) == 1


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Convolutions and matrix products of fp32 tensors in fp32 on CUDA, not in TF32, which is torch's default there.

    TF32 keeps 10 of 23 bits of every factor and so flips spikes. What the caller had set is set again afterwards.
    """
    if device.type != "cuda":
        yield
        return
    try:
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller uses the settings of torch 2.9 and later, which may not be mixed with the older ones
        with _ieee():
            yield
        return
    try:
        if convolutions:
            torch.backends.cudnn.allow_tf32 = False
        if products != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if convolutions:
            torch.backends.cudnn.allow_tf32 = True
        if products != "highest":
            torch.set_float32_matmul_precision(products)


@contextmanager
def sums_of_products(needed: bool = True) -> Iterator[None]:
    """Convolutions as plain sums of products, where `needed`: no algorithm that transforms the weights first (Winograd, FFT).

    Such algorithms leave a grid of powers of two. cuDNN and NNPACK have them and are not used; oneDNN is asked for none by torch.
    What the caller had set is set again afterwards.
    """
    if not needed:
        yield
        return
    with torch.backends.cudnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


@contextmanager
def _ieee() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    backends: list[Any] = [cudnn.conv, torch.backends.cuda.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.fp32_precision = was


def machine() -> str:
    """Processor or GPU, thread count and torch version of this process: what a number should carry."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()
