"""Accuracy over time, lost points, operations and energy, each against separate runs or a computation by hand."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micelab
from micelab import methods
from micelab.convert import convert
from micelab.exceptions import ConversionError, InputError
from micelab.metrics import ENERGY_ASSUMPTIONS, accuracy_curve, energy, lost_points, size
from micelab.models import resnet20, small_cnn

IMAGES = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network(activation="relu"):
    torch.manual_seed(0)
    ann = small_cnn(activation=activation, width=4, theta=0.8)
    with torch.no_grad():
        ann.train()(IMAGES)
    return ann.eval()


def loader(ann, batch=16):
    """Batches whose labels are what the ANN says, wrong for every tenth image."""
    with torch.no_grad():
        labels = ann(IMAGES).argmax(1)
    labels[::10] = (labels[::10] + 1) % 10
    return list(zip(IMAGES.split(batch), labels.split(batch), strict=True))


def test_one_simulation_gives_the_accuracy_at_every_number_of_steps():
    ann = network()
    snn, data = convert(ann, "max", IMAGES), loader(ann)
    curve = accuracy_curve(snn, data, time_steps=(8, 1, 3, 8, 32))
    assert curve.time_steps == (1, 3, 8, 32)
    assert (curve.images, curve.method) == (40, "max")
    for steps in curve.time_steps:
        right = sum(int((snn(images, steps).argmax(1) == labels).sum()) for images, labels in data)
        assert curve.at(steps) == right / 40  # not what is left of it in float32
    assert len(set(curve.accuracy)) > 1


def test_steps_that_a_method_hides_are_counted(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "max", dataclasses.replace(methods.get("max"), hidden_steps=4))
    ann = network()
    curve = accuracy_curve(convert(ann, "max", IMAGES), loader(ann), (1, 4))
    assert curve.true_steps == (5, 8)
    assert curve.to_dict()["true_steps"] == (5, 8)


def test_no_images_are_refused():
    ann = network()
    snn = convert(ann, "max", IMAGES)
    for measure in (lambda: accuracy_curve(snn, []), lambda: lost_points(ann, snn, [])):
        with pytest.raises(InputError, match="the loader gave no images"):
            measure()


@pytest.mark.parametrize("method", ["max", "mse", "tcl"])
def test_lost_points_sum_to_the_whole_loss(method):
    ann = network("relu" if method != "tcl" else "clip")
    snn, data = convert(ann, method, IMAGES), loader(ann)
    lost = lost_points(ann, snn, data, time_steps=3)
    assert lost.ann == pytest.approx(0.9)
    assert lost.snn == pytest.approx(accuracy_curve(snn, data, (3,)).at(3))
    assert lost.clipping + lost.quantization + lost.timing == pytest.approx(lost.ann - lost.snn)
    if method != "mse":  # neither the largest activation nor the bound of training clips anything more
        assert lost.clipping == pytest.approx(0)
    assert lost.to_dict()["timing"] == lost.timing


class Tiny(nn.Module):
    """One of everything: a first layer, a pool, a shortcut without weights, a layer behind weights, a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.same = nn.Conv2d(2, 2, 1, bias=False)
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(2 * 2 * 2, 3, bias=False)
        self.deep = nn.Linear(3, 5, bias=False)

    def forward(self, x):
        a = F.relu(self.conv(x))
        b = F.relu(self.same(a) + a)
        return self.deep(self.head(self.pool(b).flatten(1)))


def test_operations_and_energy_equal_a_computation_by_hand():
    torch.manual_seed(0)
    ann, steps, images = Tiny(), 4, torch.rand(10, 1, 4, 4)
    ann.conv.weight.data.abs_()
    ann.same.weight.data.abs_()
    snn = convert(ann, "max", images)
    used = energy(snn, images, steps)
    run = snn.simulate(images, steps)
    a, b = (float(layer.count.sum()) / 10 for layer in run.layers.values())
    assert a > 0
    assert b > 0
    first, same, head, deep = 32 * 9, 32 * 2, 8 * 3, 3 * 5
    assert used.ann_macs == first + same + head + deep
    assert used.snn_macs == first + steps * deep  # the image is constant: once; the head's numbers are real: every step
    # a spike of `a` meets 2 weights of the 1x1 convolution and one neuron of the shortcut, one of `b` 3 weights of the head
    assert used.synaptic_operations == pytest.approx(2 * a + a + 3 * b)
    assert used.spikes == pytest.approx(a + b)
    assert list(used.spike_rates.values()) == pytest.approx([a / (32 * steps), b / (32 * steps)])
    assert used.ann_microjoule == pytest.approx(4.6e-6 * used.ann_macs)
    assert used.snn_microjoule == pytest.approx(4.6e-6 * used.snn_macs + 0.9e-6 * used.synaptic_operations)
    assert used.to_dict()["assumptions"] == ENERGY_ASSUMPTIONS


class Stream(nn.Module):
    """Images and real numbers flow beside the spikes; a chain of sums ends in one membrane."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(1, 1, 1, bias=False) for _ in range(3))

    def forward(self, x):
        a = F.relu(self.one(x))
        b = F.relu(x)
        c = F.relu(a + b + x)
        mixed = self.two(c + x)
        return self.three(F.relu(a + b - c / 2)).view(x.size(0), -1) + mixed.flatten(1)


def test_real_numbers_beside_spikes_cost_multiplications_and_a_chain_of_sums_counts_each_spike_once():
    net = Stream()
    for parameter in net.parameters():
        parameter.data.fill_(0.7)
    images, steps = torch.rand(6, 1, 4, 4), 5
    snn = convert(net, "max", images)
    used = energy(snn, images, steps)
    a, b, c, d = (float(layer.count.sum()) / 6 for layer in snn.simulate(images, steps).layers.values())
    assert used.snn_macs == 16 + 16 * steps
    assert used.synaptic_operations == pytest.approx((a + b) + (a + b + c) + d)


class Sliced(nn.Module):
    """Some spikes are left out, by slices and by a pool; others go on twice, by a concatenation."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(1, 6, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(4, 5, 1)
        self.norm, self.pool = nn.BatchNorm2d(6), nn.AvgPool2d(2)

    def forward(self, x):
        a = F.relu(self.one(x))
        two = self.two(self.pool(self.norm(a))[:, :2])  # of five rows and columns four
        three = self.three(torch.cat([a[:, 2:4], -a[:, 2:4]], dim=1))
        return torch.cat([each.mean((2, 3)) for each in (two, three, F.relu(a[:, 4:] * 0.5 + 0.1))], dim=1)


def test_spikes_cost_where_they_arrive_and_nothing_where_a_slice_leaves_them_out():
    torch.manual_seed(0)
    ann, images = Sliced().eval(), torch.rand(6, 1, 5, 5)
    with torch.no_grad():
        ann.one.weight.copy_(torch.arange(1.0, 7.0).view(6, 1, 1, 1))  # each channel fires another number of times
        ann.norm.running_var.fill_(4.0)
        ann.norm.bias.fill_(0.3)
    snn = convert(ann, "max", images, time_steps=4)
    used = energy(snn, images)
    a = next(iter(snn.simulate(images).layers.values())).count.sum(0) / 6
    assert len(set(a.sum((1, 2)).tolist())) == 6
    assert used.synaptic_operations == pytest.approx(float(3 * a[:2, :4, :4].sum() + 5 * 2 * a[2:4].sum() + a[4:].sum()))
    with torch.inference_mode():
        assert energy(snn, images) == used


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), 8 * 8 * 8 * 2 * 9),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), 8 * 4 * 4 * 4 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), 4 * 8 * 8 * 6 * 4),
        (nn.Linear(8, 5), 4 * 8 * 8 * 5),
    ],
)
def test_multiply_accumulates_of_a_layer_equal_its_formula(layer, macs):
    assert size(nn.Sequential(layer, nn.ReLU()), (4, 8, 8)).macs == macs


@pytest.mark.parametrize(
    ("kind", "parameters", "millions"), [("A", 272_474, 40.8), ("B", 11_260_000, 187), ("C", 4_330_000, 648)]
)
def test_the_three_networks_called_resnet20_have_the_sizes_that_the_tables_name(kind, parameters, millions):
    found = size(resnet20(kind=kind), (3, 32, 32))
    assert found.parameters == pytest.approx(parameters, rel=0 if kind == "A" else 0.003)
    assert found.macs / 1e6 == pytest.approx(millions, rel=0.003)


def test_points_are_refused_for_images_that_are_not_and_for_another_network():
    ann = micelab.small_cnn(activation="quant_clip", theta=1.0).eval()
    snn = micelab.convert(ann, "qcfs", time_steps=2)
    images, labels = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(InputError, match="NaN"):
        micelab.lost_points(ann, snn, [(images * torch.nan, labels)], snn_accuracy=0.5)
    with pytest.raises(InputError, match="the networks do not match"):
        micelab.lost_points(micelab.resnet20(width=2, activation="quant_clip"), snn, [(images, labels)])


@pytest.mark.parametrize("loader", [torch.rand(4, 1, 8, 8), [torch.rand(4, 1, 8, 8)]])
def test_a_loader_without_labels_is_refused(loader):
    snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    with pytest.raises(InputError, match="give batches of"):
        micelab.accuracy_curve(snn, loader, (1,))


CLASSES = torch.tensor([3, 1, 4, 1])


@pytest.mark.parametrize(
    ("labels", "given"),
    [
        (CLASSES[:3], r"torch.int64 of shape \(3,\)"),
        (CLASSES[:, None], r"torch.int64 of shape \(4, 1\).*y.flatten\(\)"),
        (F.one_hot(CLASSES, 10), r"torch.int64 of shape \(4, 10\).*y.argmax\(1\)"),
        (CLASSES.float(), r"torch.float32 of shape \(4,\).*y.long\(\)"),
        (CLASSES > 1, "torch.bool"),
        (CLASSES[0], r"torch.int64 of shape \(\)"),
        (CLASSES.tolist(), r"a list.*torch.as_tensor\(y\)"),
        (CLASSES.numpy(), "a ndarray"),
        (None, "a NoneType"),
    ],
)
def test_labels_that_are_no_class_for_each_image_are_refused_with_the_remedy(labels, given):
    ann = micelab.small_cnn(activation="quant_clip")
    snn, loader = micelab.convert(ann, "qcfs"), [(torch.rand(4, 1, 8, 8), labels)]
    for measure in (lambda: accuracy_curve(snn, loader, (1,)), lambda: lost_points(ann, snn, loader, 1)):
        with pytest.raises(InputError, match=rf"labels are {given}"):
            measure()


def test_labels_of_any_integer_type_are_labels():
    ann = network("quant_clip")
    snn, plain = convert(ann, "qcfs"), loader(ann)
    small = [(images, labels.to(torch.uint8)) for images, labels in plain]
    assert accuracy_curve(snn, small, (4,)) == accuracy_curve(snn, plain, (4,))


@pytest.mark.parametrize("method", ["qcfs", "accumulate"])
def test_a_network_that_answers_more_than_logits_has_no_accuracy(method):
    ann = nn.Sequential(nn.Conv2d(1, 2, 3), micelab.QuantClip(4), nn.Conv2d(2, 3, 3))
    snn, loader = convert(ann, method), [(IMAGES[:4], CLASSES)]
    with pytest.raises(InputError, match=r"the network answers \(4, 3, 4, 4\): an accuracy needs logits \[N, classes\]"):
        accuracy_curve(snn, loader, (1, 2))
    with pytest.raises(InputError, match=r"the network answers \(4, 3, 4, 4\): an accuracy needs"):
        lost_points(ann, snn, loader, 2)


@pytest.mark.parametrize("time_steps", [0, -1, 2.0, 1.5, "8", True])
def test_what_is_no_number_of_steps_is_refused_by_every_measure_alike(time_steps):
    ann = micelab.small_cnn(activation="quant_clip")
    snn, loader = micelab.convert(ann, "qcfs"), [(IMAGES[:4], CLASSES)]
    measures = (
        lambda: accuracy_curve(snn, loader, (4, time_steps)),
        lambda: accuracy_curve(snn, loader, time_steps),
        lambda: lost_points(ann, snn, loader, time_steps),
        lambda: energy(snn, IMAGES, time_steps),
        lambda: micelab.error_breakdown(ann, snn, IMAGES, time_steps),
    )
    for measure in measures:
        with pytest.raises(InputError, match=f"time_steps is {time_steps!r}: give an integer of at least 1"):
            measure()


def test_an_accuracy_is_asked_for_after_some_steps_at_least():
    snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    with pytest.raises(InputError, match=r"time_steps is \(\): give at least one"):
        accuracy_curve(snn, [(IMAGES[:4], CLASSES)], ())


def test_integers_of_numpy_and_torch_are_numbers_of_steps():
    ann = network("quant_clip")
    snn, data = convert(ann, "qcfs"), loader(ann)
    curves = [accuracy_curve(snn, data, steps) for steps in ((1, 2, 3), np.arange(1, 4), torch.arange(1, 4), range(1, 4))]
    assert curves == curves[:1] * 4
    assert all(type(t) is int for curve in curves for t in curve.time_steps)
    assert accuracy_curve(snn, data, np.array(2)) == accuracy_curve(snn, data, np.int64(2)) == accuracy_curve(snn, data, (2,))
    assert energy(snn, IMAGES, np.int64(3)) == energy(snn, IMAGES, 3)
    assert lost_points(ann, snn, data, np.int64(3)) == lost_points(ann, snn, data, 3)


def test_an_ann_where_the_spiking_network_belongs_is_refused():
    ann = micelab.small_cnn(activation="quant_clip")
    snn, loader = micelab.convert(ann, "qcfs"), [(IMAGES[:4], CLASSES)]
    measures = (
        lambda: accuracy_curve(ann, loader),
        lambda: lost_points(snn, ann, loader),
        lambda: energy(ann, IMAGES),
        lambda: micelab.error_breakdown(snn, ann, IMAGES),
    )
    for measure in measures:
        with pytest.raises(InputError, match="snn is a ImageNetwork: give the SpikingNetwork"):
            measure()
    with pytest.raises(ConversionError, match="a spiking network already: give the ANN"):
        lost_points(snn, snn, loader)


@pytest.mark.parametrize("images", [torch.float32, torch.float64])
def test_images_are_taken_in_the_type_of_each_network(images):
    ann = network("quant_clip")
    snn, plain = convert(ann, "qcfs"), loader(ann)
    cast = [(batch.to(images), labels) for batch, labels in plain]
    for exact in (convert(ann, "qcfs").double(), snn):
        lost = lost_points(copy.deepcopy(ann).double(), exact, cast, 2)
        assert dataclasses.astuple(lost) == pytest.approx(dataclasses.astuple(lost_points(ann, snn, plain, 2)))


def test_a_step_that_was_not_measured_is_named_with_those_that_were():
    snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    curve = micelab.accuracy_curve(snn, [(torch.rand(2, 1, 8, 8), CLASSES[:2])], (1, 4))
    with pytest.raises(InputError, match=r"T = 3 was not measured: choose T from \(1, 4\)"):
        curve.at(3)


def test_where_no_t_is_given_it_is_the_one_of_the_conversion():
    ann = micelab.small_cnn(activation="quant_clip", theta=1.0).eval()
    snn = micelab.convert(ann, "qcfs", time_steps=3)
    images, labels = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    assert len(snn.simulate(images).logits) == 3
    assert micelab.error_breakdown(ann, snn, images).time_steps == 3
    assert micelab.lost_points(ann, snn, [(images, labels)]).time_steps == 3
    assert micelab.energy(snn, images).time_steps == 3
