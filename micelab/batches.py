"""Training batches made where they are used: on CUDA the images lie on the device as uint8 and are augmented there, a batch at
a time, so that the device does not wait for one transform an image on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from micelab.augment import Augmentation, crop_flip_cutout, draw_places
from micelab.data import Split, TrainingBatches, mix, to_float
from micelab.exceptions import InputError


class DeviceBatches(TrainingBatches):
    """The batches of `TrainingBatches`, of the same images in the same order, made on `device`; every augmentation but "auto"."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augment: Augmentation,
        seed: int,
        flip: bool = True,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cuda",
    ):
        if augment == "auto":
            raise InputError("augmentation 'auto' works image by image, on the CPU: use micelab.data.TrainingBatches")
        super().__init__(split, batch_size, augment, seed, flip, rank, world)
        self.size, self.flip, self.cutout = split.images.shape[-1], flip, augment == "cutout"
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images float [n, C, H, W], labels [n]) of `epoch` from `first_step` on; seeds torch's generators each step."""
        order = self.order(epoch).to(self.images.device)
        for step in range(first_step, len(self)):
            torch.manual_seed(mix(self.seed, epoch, step, self.rank))
            picked = self.part(order, step)
            if self.transform is None:
                images = self.images[picked]
            else:
                places = draw_places(len(picked), self.size, self.flip, self.cutout)
                images = crop_flip_cutout(self.images, picked, places.to(self.images.device), self.size)
            yield to_float(images), self.labels[picked]


def training_batches(
    split: Split,
    batch_size: int,
    augment: Augmentation,
    seed: int,
    flip: bool = True,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> TrainingBatches:
    """Batches for training on `device`: made there on CUDA (save "auto"), else on the CPU by torchvision's transforms."""
    if torch.device(device).type == "cuda" and augment != "auto":
        return DeviceBatches(split, batch_size, augment, seed, flip, rank, world, device)
    return TrainingBatches(split, batch_size, augment, seed, flip, rank, world)
