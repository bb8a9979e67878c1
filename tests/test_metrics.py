"""Accuracy over time, lost points, operations and energy, each against separate runs or a computation by hand."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micelab
from micelab import methods
from micelab.convert import convert
from micelab.exceptions import InputError
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
        assert curve.at(steps) == pytest.approx(right / 40)
    assert len(set(curve.accuracy)) > 1


def test_steps_that_a_method_hides_are_counted(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "max", dataclasses.replace(methods.get("max"), hidden_steps=4))
    ann = network()
    curve = accuracy_curve(convert(ann, "max", IMAGES), loader(ann), (1, 4))
    assert curve.true_steps == (5, 8)
    assert curve.to_dict()["true_steps"] == (5, 8)


@pytest.mark.parametrize("steps", [(), (0, 4), (-1,)])
def test_an_accuracy_curve_wants_steps_of_at_least_one(steps):
    ann = network()
    with pytest.raises(InputError, match="give integers of at least 1"):
        accuracy_curve(convert(ann, "max", IMAGES), loader(ann), steps)


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


@pytest.mark.parametrize("loader", [torch.rand(4, 1, 8, 8), [torch.rand(4, 1, 8, 8)], [(torch.rand(4, 1, 8, 8), torch.zeros(3))]])
def test_a_loader_without_a_label_for_each_image_is_refused(loader):
    snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    with pytest.raises(InputError, match="give batches of"):
        micelab.accuracy_curve(snn, loader, (1,))


@pytest.mark.parametrize("time_steps", [(1.5, 2), (), (0,), ("2",)])
def test_an_accuracy_is_asked_for_after_whole_steps(time_steps):
    snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    with pytest.raises(InputError, match="give integers of at least 1"):
        micelab.accuracy_curve(snn, [(torch.rand(2, 1, 8, 8), torch.zeros(2))], time_steps)


def test_a_step_that_was_not_measured_is_named_with_those_that_were():
    snn = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs")
    curve = micelab.accuracy_curve(snn, [(torch.rand(2, 1, 8, 8), torch.zeros(2))], (1, 4))
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
