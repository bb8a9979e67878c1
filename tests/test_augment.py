"""Augmentation of a whole batch on the device: each image as a plain slice of it, reproducible, of torchvision's distribution."""

import pytest
import torch
from torchvision.transforms import v2

from micelab.data import Split, to_float
from micelab.exceptions import InputError
from micelab.train.augment import augmentation, crop_flip_cutout, cutout_side, draw_places, padding_for, small_side
from micelab.train.batches import DeviceBatches, TrainingBatches, training_batches


def some(images=40, channels=3, size=32):
    generator = torch.Generator().manual_seed(0)
    return Split(
        torch.randint(1, 256, (images, channels, size, size), dtype=torch.uint8, generator=generator), torch.arange(images)
    )


def one_by_one(padded, picked, places, size):
    """The same in slices, image by image."""
    made = []
    for number, (top, left, mirrored, blank_top, blank_left) in zip(picked.tolist(), places.tolist(), strict=True):
        image = padded[number, :, top : top + size, left : left + size].clone()
        image = image.flip(-1) if mirrored else image
        if blank_top >= 0:
            image[:, blank_top : blank_top + cutout_side(size), blank_left : blank_left + cutout_side(size)] = 0
        made.append(image)
    return torch.stack(made)


@pytest.mark.parametrize(("size", "channels"), [(32, 3), (8, 1), (20, 3)])
@pytest.mark.parametrize("cutout", [False, True], ids=["no cutout", "cutout"])
def test_a_batch_is_the_same_slices_as_image_by_image(size, channels, cutout):
    split = some(30, channels, size)
    padded = v2.functional.pad(split.images, [padding_for(size)] * 4)
    places = draw_places(50, size, flip=True, cutout=cutout, generator=torch.Generator().manual_seed(1))
    picked = torch.randint(0, 30, (50,), generator=torch.Generator().manual_seed(2))
    found = crop_flip_cutout(padded, picked, places, size)
    assert found.dtype == torch.uint8
    assert torch.equal(one_by_one(padded, picked, places, size), found)
    assert set(places[:, 2].tolist()) == {0, 1}


def test_places_reach_every_corner_and_no_further():
    places = draw_places(5000, 32, flip=True, cutout=True, generator=torch.Generator().manual_seed(0))
    assert places.amin(0).tolist() == [0, 0, 0, 0, 0]
    assert places.amax(0).tolist() == [8, 8, 1, 16, 16]
    assert draw_places(9, 32, flip=False, cutout=False)[:, 2:].unique().tolist() == [-32, 0]


@pytest.mark.parametrize("size", [8, 16, 32])
def test_cutout_blanks_as_many_pixels_as_torchvisions(size):
    image = torch.full((1, size + 2 * padding_for(size), size + 2 * padding_for(size)), 9, dtype=torch.uint8)
    theirs = augmentation("cutout", size)(image)
    places = draw_places(1, size, flip=True, cutout=True)
    ours = crop_flip_cutout(image[None], torch.tensor([0]), places, size)[0]
    assert int((theirs == 0).sum()) == int((ours == 0).sum()) == cutout_side(size) ** 2


def test_mean_image_over_many_draws_is_that_of_torchvisions_transforms():
    padded = v2.functional.pad(some(1, 1, 8).images, [1] * 4)
    torch.manual_seed(0)
    transform = augmentation("cutout", 8)
    theirs = torch.stack([transform(padded[0]) for _ in range(3000)]).float().mean(0)
    ours = crop_flip_cutout(padded, torch.zeros(3000, dtype=torch.long), draw_places(3000, 8, True, True), 8).float().mean(0)
    assert float((theirs - ours).abs().max()) < 12  # of 255: five standard errors of one pixel's mean


@pytest.mark.parametrize("augment", ["none", "standard", "cutout"])
def test_any_batch_can_be_made_again_alone(augment):
    split = some()
    batches = DeviceBatches(split, 8, augment, seed=3, device="cpu")
    whole = list(batches.epoch(2))
    torch.rand(5)  # whatever else is drawn in between
    again = list(batches.epoch(2, first_step=3))
    assert len(whole) == 5
    for (a, label_a), (b, label_b) in zip(whole[3:], again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(label_a, label_b)
    other = next(iter(DeviceBatches(split, 8, augment, seed=4, device="cpu").epoch(2)))[0]
    assert not torch.equal(whole[0][0], other)


def test_images_come_in_the_order_of_the_cpus_batches_and_processes_share_them():
    split = some()
    cpu, device = TrainingBatches(split, 8, "standard", 3), DeviceBatches(split, 8, "standard", 3, device="cpu")
    shares = [DeviceBatches(split, 8, "standard", 3, rank=rank, world=2, device="cpu") for rank in range(2)]
    for (_, a), (images, b), (_, left), (_, right) in zip(*(batches.epoch(1) for batches in (cpu, device, *shares)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[0::2], left)
        assert torch.equal(a[1::2], right)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
    plain = next(iter(DeviceBatches(split, 8, "none", 3, device="cpu").epoch(0)))
    assert torch.equal(plain[0], to_float(split.images[plain[1]]))


@pytest.mark.parametrize("kind", [TrainingBatches, DeviceBatches])
@pytest.mark.parametrize("augment", ["standard", "cutout"])
def test_the_first_epochs_may_see_smaller_pieces_of_the_whole_padded_image(kind, augment):
    split = some()
    options = {"device": "cpu"} if kind is DeviceBatches else {}
    batches, plain = (kind(split, 8, augment, 3, flip=False, small_epochs=small, **options) for small in (2, 0))
    size = split.images.shape[-1]
    for epoch, side in ((0, small_side(size)), (1, small_side(size)), (2, size)):
        for (images, labels), (others, wanted) in zip(batches.epoch(epoch), plain.epoch(epoch), strict=True):
            assert torch.equal(labels, wanted)
            assert images.shape == (8, *split.images.shape[1:-2], side, side)
            assert torch.equal(images, others) == (side == size)
    if augment == "standard":  # every piece is one of its image, and all places come up
        found = set()
        for epoch in range(2):
            order = batches.order(epoch)
            for step, (images, _) in enumerate(batches.epoch(epoch)):
                for image, number in zip(images, batches.part(order, step), strict=True):
                    places = to_float(batches.images[number][None])[0].unfold(1, side := small_side(size), 1).unfold(2, side, 1)
                    hits = (places == image[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
                    assert hits
                    found |= {tuple(hit) for hit in hits if len(hits) == 1}
        assert len(found) > 10
        assert max(max(place) for place in found) > 2 * padding_for(size)


@pytest.mark.parametrize("kind", [TrainingBatches, DeviceBatches])
def test_views_come_again_after_so_many_epochs_and_small_ones_are_others(kind):
    split = some()
    options = {"device": "cpu"} if kind is DeviceBatches else {}
    batches, new = (kind(split, 8, "cutout", 3, small_epochs=3, views=views, **options) for views in (2, 0))
    epochs = [list(batches.epoch(epoch)) for epoch in range(6)]
    assert [batches.view(epoch) for epoch in range(6)] == [(0, True), (1, True), (0, True), (1, False), (0, False), (1, False)]
    for one in range(6):
        for other in range(one):
            same = all(torch.equal(a, b) for (a, _), (b, _) in zip(epochs[one], epochs[other], strict=True))
            assert same == (batches.view(one) == batches.view(other))
    for epoch in (0, 1):  # before any comes again, they are those that always new ones begin with
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(epochs[epoch], new.epoch(epoch), strict=True))


def test_the_cpu_and_autoaugment_keep_torchvisions_transforms():
    split = some()
    assert type(training_batches(split, 8, "standard", 0)) is TrainingBatches
    assert type(training_batches(split, 8, "auto", 0, device="cuda")) is TrainingBatches
    with pytest.raises(InputError, match="'auto' works image by image"):
        DeviceBatches(split, 8, "auto", 0)
    with pytest.raises(InputError, match="'wild' is unknown"):
        DeviceBatches(split, 8, "wild", 0)
