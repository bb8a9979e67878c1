"""Conversion: thresholds from data and from training, options, calibration in every form, and what is out of range."""

import copy
import importlib
import itertools
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import micelab
from micelab import methods
from micelab.activation import TrainableClip
from micelab.convert import convert
from micelab.exceptions import ConversionError, InputError
from micelab.models import small_cnn

IMAGES = torch.rand(70, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network(activation="relu", **options):
    torch.manual_seed(0)
    ann = small_cnn(activation=activation, **options)
    with torch.no_grad():
        ann.train()(IMAGES)
    return ann.eval()


def first_input(ann):
    """What the first activation receives, [C, M], unfolded."""
    with torch.no_grad():
        z = ann.stem[1](ann.stem[0](ann.normalize(IMAGES)))
    return z.transpose(0, 1).flatten(1).numpy()


def test_thresholds_of_a_layer_equal_numpys_over_all_calibration_images():
    ann = network()
    z = first_input(ann)
    assert convert(ann, "max", IMAGES).neurons["stem.2"].theta.item() == pytest.approx(z.max(), rel=1e-5)
    theta = convert(ann, "percentile", IMAGES, percentile=97.0).neurons["stem.2"].theta.item()
    assert theta == pytest.approx(np.percentile(np.maximum(z, 0), 97), rel=1e-4)


def test_thresholds_of_channels_equal_numpys_channel_by_channel():
    ann = network()
    z = first_input(ann)
    theta = convert(ann, "max", IMAGES, per_channel=True).neurons["stem.2"].theta
    np.testing.assert_allclose(theta.numpy(), z.max(1), rtol=1e-4)
    assert theta.shape == (16,)


@pytest.mark.parametrize("method", ["max", "percentile", "mse"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_tensor_and_a_loader_of_any_batches_give_the_same_thresholds(method, per_channel):
    ann = network()
    labels = torch.zeros(70)
    loader = [(IMAGES[:7], labels[:7]), (IMAGES[7:50], labels[7:50]), (IMAGES[50:], labels[50:])]
    forms = [IMAGES, loader, iter(loader), IMAGES.split(9), [IMAGES.double()]]
    thetas = [convert(ann, method, form, per_channel=per_channel).state_dict()["layers.blocks.2.2.theta"] for form in forms]
    for theta in thetas[1:]:
        torch.testing.assert_close(theta, thetas[0], rtol=1e-4, atol=1e-5)


def test_samples_are_few_where_data_are_many_and_the_maximum_still_sees_all(monkeypatch):
    ann = network()
    full = convert(ann, "percentile", IMAGES, percentile=90)
    largest = convert(ann, "max", IMAGES)
    monkeypatch.setattr(importlib.import_module("micelab.convert"), "SAMPLES", 2000)
    few = convert(ann, "percentile", IMAGES, percentile=90)
    for name, neuron in few.neurons.items():
        assert neuron.theta != full.neurons[name].theta
        assert neuron.theta.item() == pytest.approx(full.neurons[name].theta.item(), rel=0.2)
        assert convert(ann, "max", IMAGES).neurons[name].theta == largest.neurons[name].theta


def test_a_loader_of_any_length_is_read_a_batch_at_a_time_and_let_go():
    living, most = [], []

    def batches():
        for part in IMAGES.repeat(3, 1, 1, 1).split(10):
            images = part.clone()
            living.append(weakref.ref(images))
            yield images, torch.zeros(10)
            del images
            most.append(sum(each() is not None for each in living))

    ann = network()
    theta = convert(ann, "percentile", batches()).neurons["stem.2"].theta
    assert len(most) == 21
    assert max(most) == 1
    torch.testing.assert_close(theta, convert(ann, "percentile", IMAGES.repeat(3, 1, 1, 1)).neurons["stem.2"].theta)


@pytest.mark.parametrize("widths", [(1000,), (1,) * 300, (7, 400, 1, 1, 90, 30)])
def test_of_inputs_without_end_every_so_manieth_is_kept_however_they_come(monkeypatch, widths):
    module = importlib.import_module("micelab.convert")
    monkeypatch.setattr(module, "SAMPLES", 50)
    rows, kept = torch.arange(2.0 * sum(widths)).reshape(2, -1), module._Samples()
    for part in rows.split(widths, 1):
        kept.add(part)
        assert sum(each.numel() for each in kept.parts) <= 100
    stride = {1000: 45, 300: 15, 529: 15}[sum(widths)]  # the first of 1, 3, 3*5, 3*5*3 that leaves at most 100 of both rows
    assert torch.equal(rows[:, ::stride], torch.cat(kept.parts, 1))


def test_a_loader_of_many_images_gives_thresholds_near_those_of_all(monkeypatch):
    ann = network()
    full = convert(ann, "percentile", IMAGES, percentile=90)
    largest = convert(ann, "max", IMAGES)
    monkeypatch.setattr(importlib.import_module("micelab.convert"), "SAMPLES", 2000)
    few = convert(ann, "percentile", iter(IMAGES.split(7)), percentile=90)
    for name, neuron in few.neurons.items():
        assert neuron.theta != full.neurons[name].theta
        assert neuron.theta.item() == pytest.approx(full.neurons[name].theta.item(), rel=0.2)
        torch.testing.assert_close(
            convert(ann, "max", iter(IMAGES.split(7))).neurons[name].theta, largest.neurons[name].theta, rtol=1e-5, atol=0
        )


def test_biases_alone_read_no_more_of_a_loader_than_they_use():
    ann, read = network("quant_clip"), []
    endless = (read.append(0) or IMAGES for _ in itertools.count())
    biases = convert(ann, "step_bias", endless, time_steps=2).neurons["stem.2"].bias
    assert len(read) == 4  # 256 images of 70 each
    torch.testing.assert_close(biases, convert(ann, "step_bias", [IMAGES] * 9, time_steps=2).neurons["stem.2"].bias)


@pytest.mark.parametrize("method", ["tcl", "qcfs"])
def test_trained_bounds_become_thresholds_without_any_data(method):
    ann = network("quant_clip", theta=1.5)
    ann.blocks[1][2] = TrainableClip(0.75, channels=32)
    snn = convert(ann, method)
    assert snn.neurons["stem.2"].theta.item() == pytest.approx(1.5)
    torch.testing.assert_close(snn.neurons["blocks.1.2"].theta, torch.full((32,), 0.75))
    assert all(neuron.v0 == methods.get(method).v0 for neuron in snn.neurons.values())
    with pytest.raises(ConversionError, match=r"layer `stem\.2` is nn\.ReLU and has no trained bound"):
        convert(network(), method)


@pytest.mark.parametrize("clip", [lambda: nn.Hardtanh(0, 0.25), lambda: TrainableClip(0.25)], ids=["fixed", "trained"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("method", ["max", "percentile", "mse", "half_start"])
def test_no_threshold_is_above_the_bound_of_a_clip_and_long_simulations_reach_the_ann(clip, per_channel, method):
    ann = network()
    ann.stem[2] = clip()
    assert first_input(ann).max() > 1
    for block in ann.blocks:
        block[2] = nn.ReLU6()
    snn = convert(ann, method, IMAGES, per_channel=per_channel, v0=0.5, time_steps=512)
    theta = snn.neurons["stem.2"].theta
    assert float(theta.max()) == pytest.approx(0.25, rel=1e-6 if method != "mse" else 0.05)
    assert theta.numel() == (16 if per_channel and method != "half_start" else 1)
    with torch.no_grad():
        expected = ann(IMAGES[:8])
    logits = snn.simulate(IMAGES[:8], 512, record=False).logits[-1]
    assert float((logits - expected).abs().max() / expected.abs().max()) < 0.03


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("method", ["max", "percentile", "mse", "calibrated"])
def test_no_threshold_of_a_channel_is_above_its_own_clip(method, per_channel):
    ann = network()
    ann.stem[2] = TrainableClip(1.0, channels=16)
    ann.stem[2].log_theta.data.copy_(torch.linspace(-2, 1, 16))
    ann.stem[1].bias.data[0] = -100  # a silent channel, which gets the largest of its layer
    theta = convert(ann, method, IMAGES, per_channel=per_channel).neurons["stem.2"].theta
    bound = ann.stem[2].theta.detach()
    assert bool((theta <= bound * (1 + 1e-6)).all())
    assert theta[0] == bound[0]


def test_a_clip_at_infinity_is_none():
    ann = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Hardtanh(0, float("inf")), nn.Flatten(), nn.Linear(144, 3))
    assert convert(ann, "max", IMAGES).neurons["1"].theta > 0
    with pytest.raises(ConversionError, match=r"layer `1` is nn.Hardtanh and has no trained bound"):
        convert(ann, "tcl")


def test_the_six_of_relu6_is_the_threshold_and_counts_as_a_clip_of_training():
    ann = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 3), nn.Hardtanh(0, 2.5)).double()
    snn = convert(ann, "tcl")
    assert [neuron.theta.item() for neuron in snn.neurons.values()] == [6, 2.5]
    assert snn.simulate(IMAGES, 2).logits.dtype == torch.float64
    table = micelab.error_breakdown(ann, snn, IMAGES, 2)
    assert all(layer.trained_clip for layer in table.layers.values())


def test_a_bound_that_training_drove_to_zero_is_named():
    ann = network("clip")
    ann.stem[2].log_theta.data.fill_(-200)
    with pytest.raises(InputError, match=r"layer `stem\.2`: theta holds 0"):
        convert(ann, "tcl")


def test_start_and_kind_of_neuron_can_be_chosen():
    ann = network()
    for v0 in (0, 0.25, 1):
        assert all(neuron.v0 == v0 for neuron in convert(ann, "mse", IMAGES, v0=v0).neurons.values())
    assert all(neuron.signed for neuron in convert(ann, "max", IMAGES, signed=True).neurons.values())
    assert not any(neuron.signed for neuron in convert(ann, "max", IMAGES).neurons.values())


def test_the_search_for_the_threshold_depends_on_the_number_of_steps():
    few, many = (convert(network(), "mse", IMAGES, time_steps=steps) for steps in (1, 32))
    assert (few.time_steps, many.time_steps) == (1, 32)
    assert few.neurons["stem.2"].theta < many.neurons["stem.2"].theta


def test_a_silent_channel_gets_the_largest_threshold_of_its_layer():
    ann = network()
    ann.stem[1].weight.data[3], ann.stem[1].bias.data[3] = 0, -1
    for method in ("max", "percentile", "mse"):
        theta = convert(ann, method, IMAGES, per_channel=True).neurons["stem.2"].theta
        assert theta[3] == convert(ann, "max", IMAGES).neurons["stem.2"].theta


def test_a_silent_layer_is_named():
    ann = network()
    ann.stem[1].weight.data.zero_()
    ann.stem[1].bias.data.fill_(-1)
    with pytest.raises(ConversionError, match=r"layer `stem\.2` is never above 0"):
        convert(ann, "max", IMAGES)


def test_long_simulations_reach_the_ann():
    ann = network()
    with torch.no_grad():
        expected = ann(IMAGES[:8])
    for fold in (True, False):
        logits = convert(ann, "max", IMAGES, v0=0.5, fold=fold).simulate(IMAGES[:8], 512, record=False).logits[-1]
        assert float((logits - expected).abs().max() / expected.abs().max()) < 0.02


@pytest.mark.parametrize("activation", ["relu", "clip", "quant_clip"])
def test_networks_in_double_precision_convert_and_simulate(activation):
    ann = network(activation).double()
    snn = convert(ann, "max" if activation == "relu" else "tcl", IMAGES)
    assert snn.simulate(IMAGES, 4).logits.dtype == torch.float64
    assert micelab.error_breakdown(ann, snn, IMAGES.double(), 4).layers["stem.2"].timing.rms == 0


def test_caller_keeps_network_and_images_as_they_were():
    ann, images = network("quant_clip").train(), IMAGES.clone()
    before = copy.deepcopy(ann.state_dict())
    snn = convert(ann, "mse", images)
    for neuron in snn.neurons.values():
        neuron.theta.add_(1)
    for parameter in snn.parameters():
        assert not parameter.requires_grad
        parameter.add_(1)
    assert torch.equal(images, IMAGES)
    assert ann.training
    assert all(parameter.requires_grad for parameter in ann.parameters())
    assert all(torch.equal(value, ann.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"time_steps": 0}, "time_steps is 0"),
        ({"time_steps": 2.5}, "time_steps is 2.5"),
        ({"v0": -0.1}, "v0 is -0.1"),
        ({"v0": float("nan")}, "v0 is nan"),
        ({"v0": "half"}, "v0 is 'half'"),
        ({"v0": torch.zeros(8)}, "one number between 0 and 1"),
        ({"percentile": None}, "percentile is None"),
        ({"percentile": 0.0}, "percentile is 0"),
        ({"percentile": 101.0}, "percentile is 101"),
        ({"calibration": None}, "give calibration=images"),
        ({"calibration": 5}, "calibration is a int"),
        ({"calibration": []}, "calibration holds no images"),
        ({"calibration": [{"image": 1}]}, "images are a dict"),
        ({"calibration": torch.zeros(0, 1, 8, 8)}, "at least one image"),
        ({"calibration": torch.tensor(1.0)}, "at least one image"),
        ({"calibration": (IMAGES * 255).byte()}, "images.float"),
        (
            {"calibration": IMAGES.repeat(1, 3, 1, 1)},
            "layer `normalize`: images have 3 channels, and this network was made for 1",
        ),
        ({"calibration": IMAGES.log()[:0].repeat(2, 1, 1, 1)}, "at least one image"),
        ({"calibration": torch.full_like(IMAGES, torch.nan)}, "image 0 of the batch holds NaN"),
    ],
)
def test_options_out_of_range_are_refused_in_words(options, text):
    with pytest.raises(InputError, match=text):
        convert(network(), "percentile", **{"calibration": IMAGES} | options)


def test_what_cannot_be_converted_is_named():
    with pytest.raises(ConversionError, match=r"layer `1` is nn\.GELU"):
        convert(nn.Sequential(nn.Linear(3, 3), nn.GELU()), "max", IMAGES)


def test_a_spiking_network_is_not_converted_again():
    snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    with pytest.raises(ConversionError, match="is a spiking network already: give the ANN"):
        micelab.convert(snn, "qcfs")


def test_one_image_without_its_batch_is_told_to_become_one():
    snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    with pytest.raises(InputError, match=r"image\[None\]"):
        snn.simulate(torch.rand(1, 8, 8))


FIRST = {
    "convolution": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "norm": lambda: nn.Sequential(nn.Identity(), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()),
    "pool": lambda: nn.Sequential(nn.ReLU6(), nn.AvgPool2d(2), nn.ReLU()),
    "padding": lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3), nn.ReLU()),
    "normalize": lambda: nn.Sequential(micelab.models.Normalize([0.5] * 3, [0.25] * 3), nn.Conv2d(3, 4, 3), nn.ReLU()),
}


@pytest.mark.parametrize("kind", FIRST)
def test_one_image_is_told_to_become_a_batch_by_whatever_layer_it_comes_to(kind):
    torch.manual_seed(0)
    ann, one = FIRST[kind]().eval(), torch.rand(3, 8, 8)
    snn = convert(ann, "max", one[None])
    wrong = [
        lambda: snn(one),
        lambda: snn.simulate(one, 2),
        lambda: snn.recorded(one),
        lambda: convert(ann, "max", one),
        lambda: micelab.error_breakdown(ann, snn, one, 2),
    ]
    for call in wrong:
        with pytest.raises(InputError, match=r"images have shape \(3, 8, 8\), .* 4 dim.*: give one image as image\[None\]"):
            call()
    assert micelab.checkup(ann, one).problems[0].remedy == "give one image as image[None]"
    assert snn(one[None]).shape[0] == 1


def test_where_the_first_layer_does_not_tell_one_image_is_asked_about():
    ann = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU()).eval()
    with pytest.raises(InputError, match=r"layer `1` cannot take .*; is this one image \[C, H, W\]\? Give it as image\[None\]"):
        convert(ann, "max", torch.rand(3, 8, 8))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv1d(3, 4, 3), nn.ReLU()), (2, 3, 8)),
        ((nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU()), (3, 8)),
        ((nn.Flatten(), nn.Linear(24, 4), nn.ReLU()), (2, 3, 8)),
    ],
    ids=["sequences", "rows", "flattened"],
)
def test_sequences_and_rows_are_no_single_images(layers, shape):
    ann = nn.Sequential(*layers).eval()
    for parameter in ann.parameters():
        parameter.data.fill_(0.1)
    assert convert(ann, "max", torch.ones(shape))(torch.ones(shape)).shape[:2] == (shape[0], 4)


def test_kind_and_width_of_a_resnet_are_not_given_together():
    with pytest.raises(InputError, match="give kind or width"):
        micelab.resnet20(kind="C", width=16)
    with pytest.raises(InputError, match="at least 1"):
        micelab.resnet20(width=0)
