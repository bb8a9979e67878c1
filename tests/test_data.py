"""Data sets: fixed splits, folders of images in every state, and what is said when CIFAR cannot be had."""

import os
import re
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from micelab.data import Split, data_folder, load_data, mean_and_spread, stratified_split
from micelab.exceptions import DataError, InputError
from micelab.train.augment import augmentation
from micelab.train.batches import TrainingBatches

SPLITS = ("train", "validation", "test")
FIRST_VALIDATION_DIGITS = [7, 4, 7, 1, 3, 2, 7, 8, 3, 4, 4, 0]
FIRST_VALIDATION_CIFAR10 = [1, 2, 2, 1, 5, 1, 0, 6, 5, 6, 0, 0]


def paint(folder, classes=("cat", "dog"), images=10, side=20):
    """A labelled folder of small pictures."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def cifar(name):
    try:
        return load_data(name, download=False)
    except DataError as absent:
        pytest.skip(str(absent))


def rows(split):
    return {image.numpy().tobytes() for image in split.images}


# Digits and CIFAR


def test_the_digits_are_split_in_three_without_overlap_and_without_loss():
    digits = load_data()
    assert digits.shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert sum(len(digits.split(name)) for name in SPLITS) == 1797
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() == 255
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not rows(digits.split(one)) & rows(digits.split(other))


def test_a_split_is_the_same_every_time():
    first, second = load_data(), load_data()
    assert all(torch.equal(first.split(name).images, second.split(name).images) for name in SPLITS)
    # the very images, so that networks trained yesterday are never validated on what they learnt from
    assert load_data().validation.labels[:12].tolist() == FIRST_VALIDATION_DIGITS


def test_a_split_takes_its_share_of_every_class_whatever_the_callers_seed():
    labels = torch.arange(4).repeat_interleave(torch.tensor([10, 20, 30, 140]))
    torch.manual_seed(1)
    rest, picked = stratified_split(labels, 0.1)
    torch.manual_seed(2)
    assert torch.equal(stratified_split(labels, 0.1)[1], picked)
    assert labels[picked].bincount().tolist() == [1, 2, 3, 14]
    assert torch.equal(torch.cat([rest, picked]).sort()[0], torch.arange(200))


def test_mean_and_spread_equal_numpys():
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = mean_and_spread(images)
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean.numpy(), pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std.numpy(), pixels.std((0, 2, 3), ddof=1), rtol=1e-12)


@pytest.mark.cifar
def test_cifar10_is_read_with_the_split_and_constants_that_the_shipped_networks_know():
    found = cifar("cifar10")
    assert [len(found.split(name)) for name in SPLITS] == [47500, 2500, 10000]
    assert found.shape == (3, 32, 32)
    assert found.classes[:2] == ("airplane", "automobile")
    assert (found.mean, found.std) == ((0.4912, 0.482, 0.4464), (0.247, 0.2435, 0.2616))
    assert found.validation.labels.bincount().tolist() == [250] * 10
    assert found.validation.labels[:12].tolist() == FIRST_VALIDATION_CIFAR10


@pytest.mark.cifar
def test_cifar100_has_a_hundred_classes_in_every_split():
    found = cifar("cifar100")
    assert [len(found.split(name)) for name in SPLITS] == [47500, 2500, 10000]
    assert all(len(found.split(name).labels.unique()) == len(found.classes) == 100 for name in SPLITS)


def test_the_data_folder_is_the_callers_then_the_environments_then_the_usual_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MICELAB_DATA", str(tmp_path / "env"))
    assert data_folder(tmp_path / "own") == tmp_path / "own"
    assert data_folder() == tmp_path / "env"
    monkeypatch.delenv("MICELAB_DATA")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data_folder().resolve() == tmp_path / "data"


# What goes wrong


def test_an_unknown_data_set_is_answered_with_the_known_ones():
    with pytest.raises(DataError, match="'mnist' is unknown: choose 'digits', 'cifar10', 'cifar100' or the path"):
        load_data("mnist")


def test_absent_cifar_without_download_names_the_command_that_fetches_it(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"run `micelab data cifar10 --data {tmp_path}` once")):
        load_data("cifar10", tmp_path, download=False)


@pytest.mark.parametrize(
    ("error", "words"),
    [(URLError("Name or service not known"), "could not be downloaded .Name or"), (TimeoutError("timed out"), "timed out")],
)
def test_no_network_is_said_in_one_sentence(tmp_path, monkeypatch, error, words):
    from torchvision.datasets import cifar as torchvision_cifar

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torchvision_cifar, "download_and_extract_archive", fail)
    with pytest.raises(DataError, match=words):
        load_data("cifar100", tmp_path)


def test_a_data_folder_that_cannot_be_written_is_named_before_anything_is_downloaded(tmp_path, monkeypatch):
    # root may write anywhere, so the answer of the system is replaced
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
    with pytest.raises(DataError, match=r"data folder .*deep cannot be written: choose another with --data or \$MICELAB_DATA"):
        load_data("cifar10", tmp_path / "not" / "yet" / "deep")
    assert not (tmp_path / "not").exists()


def test_damaged_cifar_files_are_not_read(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{n}" for n in range(1, 6))):
        (folder / name).write_bytes(b"half a file")
    with pytest.raises(DataError, match="or its md5 is wrong"):
        load_data("cifar10", tmp_path, download=False)


# Folders of images


def test_a_folder_of_images_is_scaled_and_split(tmp_path):
    found = load_data(str(paint(tmp_path / "pets")), image_size=16)
    assert found.name == "pets"
    assert found.classes == ("cat", "dog")
    assert [len(found.split(name)) for name in SPLITS] == [14, 2, 4]
    assert found.shape == (3, 16, 16)
    assert all(0.4 < mean < 0.6 for mean in found.mean)


def test_train_and_test_sub_folders_are_kept_apart(tmp_path):
    paint(tmp_path / "train", images=10)
    paint(tmp_path / "test", images=3)
    found = load_data(str(tmp_path), image_size=8)
    assert [len(found.split(name)) for name in SPLITS] == [18, 2, 6]


def test_train_and_test_of_different_classes_are_refused_with_the_odd_one(tmp_path):
    paint(tmp_path / "train", ("cat", "dog"))
    paint(tmp_path / "test", ("cat", "dog", "eel"))
    with pytest.raises(DataError, match="different classes: eel is in one only"):
        load_data(str(tmp_path))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path} holds no images to learn from")):
        load_data(str(tmp_path))


def test_a_class_without_images_is_named(tmp_path):
    (paint(tmp_path / "pets") / "eel").mkdir()
    with pytest.raises(DataError, match=r"holds no images to learn from: .*eel"):
        load_data(str(tmp_path / "pets"))


def test_one_class_is_not_enough(tmp_path):
    with pytest.raises(DataError, match=r"holds one class only \(cat\)"):
        load_data(str(paint(tmp_path, ("cat",))))


def test_a_class_with_too_few_images_is_named(tmp_path):
    paint(tmp_path, ("cat",), images=10)
    paint(tmp_path, ("dog",), images=2)
    with pytest.raises(DataError, match=r"class dog .* has too few images"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
def test_an_image_that_cannot_be_read_is_named(tmp_path, content):
    file = paint(tmp_path) / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:300] if content is None else content)
    with pytest.raises(DataError, match=rf"image .*{os.sep}dog{os.sep}3.png cannot be read"):
        load_data(str(tmp_path))


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    file = tmp_path / "pets.zip"
    file.touch()
    with pytest.raises(DataError, match=r"pets.zip is a file: give a folder"):
        load_data(str(file))


# Batches


def numbered(count=40):
    """Images that carry their own number in every pixel."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 8, 8).contiguous()
    return Split(images, torch.arange(count))


def test_batches_in_order_are_floats_between_zero_and_one():
    images, labels = next(load_data().test.batches(32))
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert (images.shape, labels.shape) == ((32, 1, 8, 8), (32,))


@pytest.mark.parametrize("augment", ["none", "standard", "auto"])
def test_an_epoch_can_be_taken_up_at_any_step_and_gives_the_same_batches(augment):
    split = load_data("digits").train.head(100)
    if augment == "auto":  # AutoAugment's colours are for three channels
        split = Split(split.images.expand(-1, 3, -1, -1).contiguous(), split.labels)
    batches = TrainingBatches(split, 16, augment, seed=3)
    whole = list(batches.epoch(1))
    torch.manual_seed(99)
    later = list(batches.epoch(1, first_step=4))
    assert len(whole) == len(batches) == 6
    for (images, labels), (images2, labels2) in zip(whole[4:], later, strict=True):
        assert torch.equal(images, images2)
        assert torch.equal(labels, labels2)


def test_another_seed_and_another_epoch_give_another_order():
    orders = [
        torch.cat([labels for _, labels in TrainingBatches(numbered(), 8, "none", seed).epoch(epoch)]).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_processes_share_each_batch_without_overlap():
    one = [labels.tolist() for _, labels in TrainingBatches(numbered(), 8, "none", seed=0).epoch(2)]
    shares = [
        [labels.tolist() for _, labels in TrainingBatches(numbered(), 8, "none", seed=0, rank=rank, world=2).epoch(2)]
        for rank in (0, 1)
    ]
    for whole, first, second in zip(one, *shares, strict=True):
        assert len(first) == len(second) == 4
        assert sorted(first + second) == sorted(whole)


def test_augmentation_leaves_the_data_set_as_it_was():
    split = load_data().train.head(64)
    before = split.images.clone()
    list(TrainingBatches(split, 16, "standard", seed=0).epoch(0))
    assert torch.equal(split.images, before)


@pytest.mark.parametrize(("size", "world"), [(0, 1), (41, 1), (9, 2)])
def test_a_batch_size_that_does_not_fit_is_refused(size, world):
    with pytest.raises(InputError, match=f"batch size {size} must be a multiple of the {world} processes, at most the 40"):
        TrainingBatches(numbered(), size, "none", seed=0, world=world)


def test_an_unknown_augmentation_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match="'strong' is unknown: choose 'none', 'standard', 'cutout' or 'auto'"):
        augmentation("strong", 32)  # type: ignore[arg-type]


def test_a_split_of_another_name_is_refused():
    with pytest.raises(InputError, match="split 'val' is unknown: choose 'train', 'validation' or 'test'"):
        load_data("digits").split("val")
