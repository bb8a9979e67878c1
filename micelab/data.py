"""Image data sets held in memory as uint8: digits (embedded), CIFAR-10/100 (torchvision), any labelled folder of images.

The training images are split once, by class and with a fixed seed, into training and validation; choices are made on
validation, and the test split is only reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from micelab.exceptions import DataError, InputError

SplitName = Literal["train", "validation", "test"]
VALIDATION_SHARE = {"digits": 0.1, "cifar10": 0.05, "cifar100": 0.05}
_SPLIT_SEED = 2023


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] uint8 and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int = 256, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """(images float in [0, 1], labels) in order, `size` at a time."""
        for images, labels in zip(self.images.split(size), self.labels.split(size), strict=True):
            yield to_float(images.to(device)), labels.to(device)

    def head(self, count: int | None) -> Split:
        """The first `count` images (all for None)."""
        return self if count is None else Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class ImageData:
    """A data set: three splits, class names, and the training images' mean and spread per channel."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.train.images.shape[1:])  # type: ignore[return-value]

    def split(self, name: SplitName) -> Split:
        """The split "train", "validation" or "test"; raises InputError for another name."""
        if name not in ("train", "validation", "test"):
            raise InputError(f"split {name!r} is unknown: choose 'train', 'validation' or 'test'")
        return getattr(self, name)


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to float32 in [0, 1], laid out channels_last."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


def data_folder(folder: str | Path | None = None) -> Path:
    """`folder`, else $MICELAB_DATA, else data/ under the current folder, or that of the checkout where there is none."""
    if folder or os.environ.get("MICELAB_DATA"):
        return Path(folder or os.environ["MICELAB_DATA"])
    own = Path(__file__).parent.parent / "data"  # notebooks run one folder further down
    return own if own.is_dir() and not Path("data").is_dir() else Path("data")


def load_data(name: str = "digits", folder: str | Path | None = None, download: bool = True, image_size: int = 32) -> ImageData:
    """The data set "digits", "cifar10", "cifar100", or a folder of images (one sub-folder a class; its path as `name`, "./digits"
    where it is called as one of the three).

    `folder`: where CIFAR lies or is downloaded to (`data_folder`); `download=False` never uses the network;
    `image_size`: side to which a folder's images are scaled. Raises DataError with the remedy where it cannot be had.

    >>> digits = load_data("digits")
    >>> digits.shape, len(digits.train), len(digits.validation), len(digits.test)
    ((1, 8, 8), 1295, 143, 359)
    """
    if name == "digits":
        images, labels, classes = _digits()
        fit, test = stratified_split(labels, 0.2)
        return _assemble(name, images[fit], labels[fit], images[test], labels[test], classes)
    if name in ("cifar10", "cifar100"):
        return _assemble(name, *_cifar(name, data_folder(folder), download))
    if Path(name).exists():
        return _image_folder(Path(name), image_size)
    raise DataError(f"data set {name!r} is unknown: choose 'digits', 'cifar10', 'cifar100' or the path of a folder of images")


def stratified_split(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Indices (rest, picked): `share` of every class picked with a fixed seed, both in ascending order."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    picked = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = members[torch.randperm(len(members), generator=generator)]
        picked.append(order[: max(1, round(share * len(members)))])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(picked)] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _assemble(
    name: str, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, classes: list[str]
) -> ImageData:
    fit, held_out = stratified_split(labels, VALIDATION_SHARE.get(name, 0.1))
    train = Split(images[fit], labels[fit])
    mean, std = mean_and_spread(train.images)
    return ImageData(
        name,
        train,
        Split(images[held_out], labels[held_out]),
        Split(test_images, test_labels),
        tuple(classes),
        tuple(round(m, 4) for m in mean.tolist()),
        tuple(round(max(s, 1e-3), 4) for s in std.tolist()),
    )


def mean_and_spread(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] in double, of images [N, C, H, W] uint8 read as [0, 1]; exact, from 256 counts a channel.

    >>> mean_and_spread(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    (tensor([0.5000], dtype=torch.float64), tensor([0.7071], dtype=torch.float64))
    """
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    values, total = torch.arange(256, dtype=torch.float64) / 255, images[:, 0].numel()
    mean = counts @ values / total
    squares = (counts * (values - mean[:, None]) ** 2).sum(1)
    return mean, (squares / max(total - 1, 1)).sqrt()


def _digits() -> tuple[Tensor, Tensor, list[str]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8))[:, None]
    return images, torch.from_numpy(found.target).long(), [str(n) for n in found.target_names]


def _cifar(name: str, root: Path, download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    parts: list[Any] = []
    for train in (True, False):
        try:
            found = kind(str(root), train=train, download=False)
        except RuntimeError as missing:  # torchvision: absent or its md5 is wrong
            if not download:
                raise DataError(
                    f"{name} is not in {root} (or its md5 is wrong): run `micelab data {name} --data {root}` once, with network"
                ) from missing
            found = _download(kind, name, root, train)
        except (EOFError, OSError, ValueError) as damaged:
            raise DataError(f"{name} in {root} cannot be read ({damaged}): delete its folder and download it again") from damaged
        parts += [torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)]
    return (*parts, list(found.classes))  # type: ignore[return-value]


def _download(kind: type, name: str, root: Path, train: bool) -> Any:
    from http.client import HTTPException
    from urllib.error import URLError

    if not os.access(_first_existing(root), os.W_OK):
        raise DataError(f"the data folder {root} cannot be written: choose another with --data or $MICELAB_DATA")
    try:
        return kind(str(root), train=train, download=True)
    except URLError as error:
        raise DataError(
            f"{name} is not in {root} and could not be downloaded ({error.reason}): check the network, or put the official "
            f"files there by hand, or use the embedded data set 'digits'"
        ) from error
    except PermissionError as error:
        raise DataError(f"the data folder {root} cannot be written: choose another with --data or $MICELAB_DATA") from error
    except (RuntimeError, OSError, HTTPException) as error:
        raise DataError(f"the download of {name} to {root} failed ({error}): delete what is there and try again") from error


def _first_existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _first_existing(path.parent)


def _image_folder(path: Path, size: int) -> ImageData:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if not path.is_dir():
        raise DataError(f"{path} is a file: give a folder that holds one sub-folder of images for each class")
    scale = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    def read(root: Path) -> tuple[Tensor, Tensor, list[str]]:
        try:
            found = ImageFolder(str(root))
        except FileNotFoundError as error:
            raise DataError(f"{root} holds no images to learn from: {error}".split(". Supported")[0]) from error
        if len(found.classes) < 2:
            raise DataError(f"{root} holds one class only ({found.classes[0]}): at least two sub-folders are needed")
        images = torch.empty(len(found), 3, size, size, dtype=torch.uint8)
        for number, (file, _) in enumerate(found.samples):
            try:
                images[number] = scale(found.loader(file))
            except (OSError, ValueError, SyntaxError) as error:
                raise DataError(f"image {file} cannot be read ({error}): mend or remove it") from error
        return images, torch.tensor(found.targets), found.classes

    if (path / "train").is_dir() and (path / "test").is_dir():
        images, labels, classes = read(path / "train")
        test_images, test_labels, test_classes = read(path / "test")
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise DataError(f"{path}/train and {path}/test hold different classes: {', '.join(odd)} is in one only")
    else:
        images, labels, classes = read(path)
        fit, test = stratified_split(labels, 0.2)
        images, labels, test_images, test_labels = images[fit], labels[fit], images[test], labels[test]
    if int(labels.bincount(minlength=len(classes)).min()) < 2:
        few = classes[int(labels.bincount(minlength=len(classes)).argmin())]
        raise DataError(f"class {few} in {path} has too few images to train and validate on: at least 3 are needed")
    return _assemble(path.name, images, labels, test_images, test_labels, classes)
