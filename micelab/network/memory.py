"""How much goes through at a time: the memory that a chunk of images may take, and what happens where it is not there."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from micelab.exceptions import InputError
from micelab.machine import ran_out

log = logging.getLogger(__name__)
Result = TypeVar("Result")

SHARE = 8
"""The largest layer of a chunk gets this part of the free memory: its input, output and workspace live at once, and records."""


def device_budget(device: torch.device, most: int) -> int:
    """Bytes that a chunk's largest layer may take on an accelerator: `most`, or an eighth of what is free where that is less.

    Free is what the driver has and what torch's allocator holds without using it. Asking takes one call to the driver and
    does not wait for the device.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return most
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(most, max(0, free + held) // SHARE)


class Pace:
    """How many images go through a cache best, found out on the images themselves: each of `sizes` is timed twice, then the
    fastest is taken.

    The first time of a size holds what libraries set up for a new shape: the shorter of the two counts. `guess`, one of
    `sizes`, is used until then and stays unless another is 3 % faster.

    >>> pace = Pace((8, 16, 32), guess=16)
    >>> for seconds in (1.0, 2.0, 3.0, 0.9, 1.7, 2.8):  # of 16, 8, 32, 16, 8 and 32 images
    ...     size = pace.size(images=64)
    ...     pace.took(size, seconds)
    >>> pace.size(images=64), pace.size(images=5)
    (16, 5)
    """

    ROUNDS, MARGIN = 2, 0.97

    def __init__(self, sizes: Sequence[int], guess: int):
        self.guess = guess
        self.times: dict[int, list[float]] = {guess: [], **{size: [] for size in sizes}}

    @property
    def best(self) -> int:
        """The fastest size, or the guess while some have not been timed."""
        if any(len(times) < self.ROUNDS for times in self.times.values()):
            return self.guess
        fastest = min(self.times, key=lambda size: min(self.times[size]))
        return fastest if min(self.times[fastest]) < self.MARGIN * min(self.times[self.guess]) else self.guess

    def size(self, images: int) -> int:
        """How many of the `images` that are left go next: a size that has been timed less than others, or the best."""
        waiting = [size for size, times in self.times.items() if len(times) < self.ROUNDS and size <= images]
        size = min(waiting, key=lambda size: len(self.times[size])) if waiting else self.best
        return min(size, images)

    def took(self, images: int, seconds: float) -> None:
        """Writes down how long so many images took; a piece of another size is a rest and says nothing."""
        if images in self.times and len(self.times[images]) < self.ROUNDS:
            self.times[images].append(seconds / images)


def in_chunks(
    images: Tensor,
    size: int,
    work: Callable[[Tensor], Result],
    halved: Callable[[], None] = lambda: None,
    pace: Pace | None = None,
    lanes: int = 1,
) -> Iterator[tuple[int, Tensor, Result]]:
    """(start, images[start : start + n], work of them) for all images [N, ...], n = `size` at a time, or as `pace` finds best.

    `lanes` chunks are worked on side by side, each by one thread; what comes back is in order. Where the memory does not
    suffice, n is halved for the rest, `halved` is called, and the first time the log says so. Raises InputError where it does
    not suffice for one image.

    >>> [(start, done) for start, _, done in in_chunks(torch.ones(5, 2), 2, lambda part: int(part.sum()))]
    [(0, 4), (2, 4), (4, 2)]
    """
    start = ahead = 0
    told = False
    begun: deque[tuple[Tensor, Callable[[], tuple[tuple[Result] | None, float]]]] = deque()
    with _side_by_side(lanes if len(images) > 1 else 1) as begin:
        while start < len(images):
            while ahead < len(images) and len(begun) <= (lanes if lanes > 1 else 0):  # one in reserve, so that no thread waits
                part = images[ahead : ahead + (size if pace is None else pace.size(len(images) - ahead))]
                begun.append((part, begin(_try, work, part)))
                ahead += len(part)
            part, outcome = begun.popleft()
            result, seconds = outcome()
            if result is not None:
                if pace is not None:
                    pace.took(len(part), seconds)
                yield start, part, result[0]
                start += len(part)
                continue
            while begun:  # what is under way beside it needs memory, too: it comes again, in smaller pieces
                begun.popleft()[1]()
            ahead = start
            if images.is_cuda and torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(part) == 1:
                raise InputError(
                    f"the memory of {images.device} does not suffice for one image: use fewer time-steps, or a smaller network, "
                    "free what else lies there, or simulate on the cpu"
                )
            size, pace = len(part) // 2, None
            halved()
            if not told:
                told = True
                log.warning("%s is out of memory with %d images at a time: going on with %d", images.device, len(part), size)


@contextmanager
def _side_by_side(lanes: int) -> Iterator[Callable[..., Callable[[], Any]]]:
    """`begin(function, *args)`, which gives a function to wait for the result: with one lane the work is done by then."""
    if lanes == 1:
        yield lambda function, *args: partial(_same, function(*args))
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(lanes, "micelab", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield lambda function, *args: pool.submit(function, *args).result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what a thread sets for itself is what threads to come begin with


def _same(value: Any) -> Any:
    return value


def _try(work: Callable[[Tensor], Result], part: Tensor) -> tuple[tuple[Result] | None, float]:
    """((result,), seconds of this thread), or (None, seconds) where memory ran out: the error is gone by then, and with it the
    tensors that its frames held. While another program has the processor, the thread's clock stands still."""
    begun = time.thread_time()
    try:
        return (work(part),), time.thread_time() - begun
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return None, time.thread_time() - begun
