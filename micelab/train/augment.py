"""Augmentation of training images: torchvision's transforms image by image for the CPU, and for CUDA the same crop, mirror
and cutout as a few operations on a whole batch of uint8 images.

The batched ones draw from the same distribution with other random numbers, which come from the CPU, so that a batch depends on
(seed, epoch, step) and not on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from micelab.exceptions import InputError

if TYPE_CHECKING:
    from torchvision.transforms import v2

Augmentation = Literal["none", "standard", "cutout", "auto"]


def augmentation(name: Augmentation, size: int, flip: bool = True) -> v2.Transform | None:
    """Random transform of one uint8 image [C, H + 2p, W + 2p] (padded beforehand, `padding_for`) to [C, H, W].

    "standard": crop and mirror; "cutout": also a quarter of the image blanked; "auto": also AutoAugment (CIFAR policy).
    """
    from torchvision.transforms import v2  # here: a second and 160 MB that no simulation needs

    if name == "none":
        return None
    if name not in ("standard", "cutout", "auto"):
        raise InputError(f"augmentation {name!r} is unknown: choose 'none', 'standard', 'cutout' or 'auto'")
    steps: list[v2.Transform] = [v2.RandomCrop(size)] + [v2.RandomHorizontalFlip()] * flip
    if name == "auto":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))
    if name in ("cutout", "auto"):
        share = cutout_share(size)
        steps.append(v2.RandomErasing(p=1.0, scale=(share, share), ratio=(1.0, 1.0)))
    return v2.Compose(steps)


def cutout_share(size: int) -> float:
    """Part of an image of side `size` that Cutout blanks: a quarter (16x16 of 32x32), a tenth of very small ones."""
    return 0.25 if size >= 16 else 0.1


def padding_for(size: int) -> int:
    """Pixels added on each side before the random crop: 4 for 32x32, 1 for 8x8 (the field's custom, an eighth)."""
    return size // 8


def small_side(size: int) -> int:
    """Side of the smaller crops that the first epochs may see: three quarters, for about half of the cost.

    >>> small_side(32), small_side(8)
    (24, 6)
    """
    return 3 * size // 4


def cutout_side(size: int) -> int:
    """Side in pixels of the square that "cutout" blanks in an image of `size` x `size`.

    >>> cutout_side(32), cutout_side(8)
    (16, 3)
    """
    return round((size * size * cutout_share(size)) ** 0.5)


def draw_places(
    images: int, size: int, flip: bool, cutout: bool, generator: torch.Generator | None = None, padded: int | None = None
) -> Tensor:
    """Where each image is cut, mirrored and blanked: top, left, mirrored, blank's top and left, [images, 5] int64 on the CPU.

    top and left lie in [0, padded - size], `padded` being the side that is cut from, by default `size` with its own padding;
    mirrored is 0 or 1; the blank lies whole within the image, and is at -size, outside, where there is none.

    >>> draw_places(2, 32, flip=False, cutout=False)[:, 2:].tolist()
    [[0, -32, -32], [0, -32, -32]]
    """

    def below(most: int) -> Tensor:
        return torch.randint(0, most, (images,), generator=generator)

    room = 2 * padding_for(size) if padded is None else padded - size
    crops = [below(room + 1) for _ in range(2)]
    mirrored = below(2) if flip else torch.zeros(images, dtype=torch.long)
    blanks = [below(size - cutout_side(size) + 1) if cutout else torch.full((images,), -size) for _ in range(2)]
    return torch.stack([*crops, mirrored, *blanks], 1)


def crop_flip_cutout(padded: Tensor, picked: Tensor, places: Tensor, size: int) -> Tensor:
    """The `picked` [n] of the images `padded` [M, C, H + 2p, W + 2p], cut to [n, C, size, size] as `places` [n, 5] says.

    All on one device; the type stays (uint8), blanked pixels are 0.

    >>> image = torch.arange(9).view(1, 1, 3, 3)
    >>> crop_flip_cutout(image, torch.tensor([0]), torch.tensor([[1, 0, 1, 0, -9]]), 2).flatten().tolist()  # mirrored
    [4, 3, 7, 6]
    """
    top, left, mirrored, blank_top, blank_left = places.T[:, :, None]
    along = torch.arange(size, device=padded.device)
    rows = top + along
    columns = left + torch.where(mirrored > 0, size - 1 - along, along)
    channels = torch.arange(padded.shape[1], device=padded.device)[None, :, None, None]
    images = padded[picked[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
    side = cutout_side(size)
    blank_rows = (along >= blank_top) & (along < blank_top + side)
    blank_columns = (along >= blank_left) & (along < blank_left + side)
    return images.masked_fill_((blank_rows[:, :, None] & blank_columns[:, None, :])[:, None], 0)
