"""Training batches, each a function of (seed, epoch, step) only, so that any of them can be made again.

They are made where they are used: on the CPU by torchvision, image by image; on CUDA the images lie on the device as uint8 and
are augmented there, a batch at a time, so that the device does not wait for one transform an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from micelab.data import Split, to_float
from micelab.exceptions import InputError
from micelab.train.augment import Augmentation, augmentation, crop_flip_cutout, draw_places, padding_for, small_side


class Choices(TypedDict, total=False):
    """What may be chosen of batches, as `TrainingBatches` has it by default: mirroring, this process and how many there are,
    how many epochs see smaller crops, and how many views come again."""

    flip: bool
    rank: int
    world: int
    small_epochs: int
    views: int


class TrainingBatches:
    """Augmented batches of one epoch; every batch depends on (seed, epoch, step) only, so any of them can be made again.

    Processes share an epoch: process `rank` of `world` takes its part of each batch of `batch_size`. The first `small_epochs`
    see smaller crops (`small_side`). With `views`, epochs that lie so many apart have the same batches, so that each image is
    seen in so many random views (0: in a new one every epoch).
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augment: Augmentation,
        seed: int,
        flip: bool = True,
        rank: int = 0,
        world: int = 1,
        small_epochs: int = 0,
        views: int = 0,
    ):
        if batch_size % world or not 1 <= batch_size <= len(split):
            raise InputError(
                f"batch size {batch_size} must be a multiple of the {world} processes, at most the {len(split)} training images"
            )
        height, size = split.images.shape[-2:]
        if height != size and augment != "none":
            raise InputError(
                f"images are of {height} x {size} pixels, and --augment {augment} crops squares: make them square, or use none"
            )
        self.transform, self.small = (augmentation(augment, side, flip) for side in (size, small_side(size)))
        self.small_epochs, self.views = small_epochs, views
        self.images = nn.functional.pad(split.images, [padding_for(size)] * 4) if self.transform else split.images
        self.labels, self.batch_size, self.seed, self.rank, self.world = split.labels, batch_size, seed, rank, world

    def __len__(self) -> int:
        return math.floor(len(self.labels) / self.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images float [n, C, H, W], labels [n]) of `epoch` from `first_step` on; seeds torch's generators each step."""
        view, small = self.view(epoch)
        order = self.order(view).to(self.images.device)
        for step in range(first_step, len(self)):
            torch.manual_seed(mix(self.seed, view, step, self.rank))
            picked = self.part(order, step)
            yield to_float(self.augmented(picked, small)), self.labels[picked]

    def view(self, epoch: int) -> tuple[int, bool]:
        """What the batches of `epoch` are made from: its number, from 0 again after `views`, and whether they are small."""
        return epoch % self.views if self.views else epoch, epoch < self.small_epochs

    def augmented(self, picked: Tensor, small: bool = False) -> Tensor:
        """The training images of these numbers [n], each changed by chance, uint8 [n, C, H, W], or, `small`, of smaller side."""
        images, transform = self.images[picked], self.small if small else self.transform
        return images if transform is None else torch.stack([transform(image) for image in images])

    def order(self, epoch: int) -> Tensor:
        """The training images' numbers in the order of `epoch`, [N], on the CPU."""
        return torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(mix(self.seed, epoch)))

    def part(self, order: Tensor, step: int) -> Tensor:
        """Those of `order` that this process takes in `step`."""
        return order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world]


class DeviceBatches(TrainingBatches):
    """The batches of `TrainingBatches`, of the same images in the same order, made on `device`; every augmentation but "auto"."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augment: Augmentation,
        seed: int,
        device: torch.device | str = "cuda",
        **choices: Unpack[Choices],
    ):
        if augment == "auto":
            raise InputError("augmentation 'auto' works image by image, on the CPU: use TrainingBatches")
        super().__init__(split, batch_size, augment, seed, **choices)
        self.size, self.flip, self.cutout = split.images.shape[-1], choices.get("flip", True), augment == "cutout"
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def augmented(self, picked: Tensor, small: bool = False) -> Tensor:
        """As in `TrainingBatches`, the whole batch at once."""
        if self.transform is None:
            return self.images[picked]
        size = small_side(self.size) if small else self.size
        places = draw_places(len(picked), size, self.flip, self.cutout, padded=self.images.shape[-1])
        return crop_flip_cutout(self.images, picked, places.to(self.images.device), size)


def training_batches(
    split: Split,
    batch_size: int,
    augment: Augmentation,
    seed: int,
    device: torch.device | str = "cpu",
    **choices: Unpack[Choices],
) -> TrainingBatches:
    """Batches for training on `device`: made there on CUDA (save "auto"), else on the CPU by torchvision's transforms."""
    if torch.device(device).type == "cuda" and augment != "auto":
        return DeviceBatches(split, batch_size, augment, seed, device, **choices)
    return TrainingBatches(split, batch_size, augment, seed, **choices)


def mix(*numbers: int) -> int:
    """One seed out of several numbers (NumPy's SeedSequence, which spreads close seeds far apart)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
