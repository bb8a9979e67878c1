"""The simulation, time folded into the batch, against a plain loop over the steps; copies, states, chunks, bad input."""

import copy
import io
import pickle

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micelab
from micelab import machine
from micelab.convert import convert
from micelab.exceptions import InputError
from micelab.graph import activations
from micelab.models import resnet20, small_cnn
from micelab.network.spiking import CACHE_BUDGET, PRECISIONS
from micelab.neuron import IntegrateFire


class Forked(nn.Module):
    """Branches that are summed and concatenated, one of them without spikes; one activation used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(1, 4, 3, padding=1) for _ in range(3))
        self.d, self.act, self.head = nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.act(self.a(x)), torch.relu(self.b(x))
        y = torch.cat([a + b, self.c(x)], 1)
        z = self.d(y)
        z = self.act(z) + z
        return self.head(F.relu(z).mean((2, 3)))


class Preactivated(nn.Module):
    """Currents that several layers read, in place of spikes."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.head = nn.BatchNorm2d(4), nn.Linear(256, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv(F.relu(self.bn(x)))
        x = x + self.conv(F.relu(self.bn(x)))
        return self.head(F.relu(x).flatten(1)) + self.head(x.view(x.size(0), -1))


def digits(images=6, channels=1, side=8):
    return torch.rand(images, channels, side, side, generator=torch.Generator().manual_seed(1))


def spiking(make=small_cnn, images=None, signed=None, **options):
    torch.manual_seed(0)
    ann = make(**options)
    images = digits() if images is None else images
    with torch.no_grad():  # batch-norm with statistics of its own
        ann.train()(images)
    return convert(ann, "max", images, v0=0.5, signed=signed)


class Stepwise(nn.Module):
    """A layer of neurons that sees one step at a time and keeps its membrane, as a neuromorphic chip does."""

    def __init__(self, neuron):
        super().__init__()
        self.neuron, self.v, self.spikes = neuron, None, []

    def forward(self, current):
        theta = self.neuron.theta
        if self.v is None:
            self.v = torch.zeros_like(current) + self.neuron.v0 * theta
            self.count = torch.zeros_like(current)
        self.v = self.v + current
        spike = (self.v >= theta).float()
        if self.neuron.signed:
            spike = spike - ((self.v < 0) & (self.count > 0)).float()
        self.count = self.count + spike
        self.v = self.v - theta * spike
        self.spikes.append(spike)
        return theta * spike


def step_by_step(snn, images, steps):
    """Logits of every step and the neurons: the whole network once a step, image by image."""
    layers = copy.deepcopy(snn.layers)
    for name, neuron in activations(layers).items():
        layers.add_submodule(name, Stepwise(neuron))
    with torch.no_grad():
        outputs = torch.stack([layers(images) for _ in range(steps)])
    return outputs, {name: layers.get_submodule(name) for name in snn.neurons}


def on_a_grid(snn):
    """Weights and thresholds rounded to 1/64, so that every sum is exact and independent of its order."""
    for tensor in (*snn.layers.parameters(), *snn.layers.buffers()):
        if tensor.is_floating_point():
            tensor.copy_((tensor * 64).round() / 64)
    for neuron in snn.neurons.values():
        neuron.theta.copy_(neuron.theta.clamp(min=1 / 64).log2().round().exp2())
    return snn


NETWORKS = {
    "small_cnn": lambda signed: spiking(signed=signed),
    "resnet20": lambda signed: spiking(resnet20, digits(4, 3, 16), signed, width=4),
    "forked": lambda signed: spiking(Forked, signed=signed),
    "preactivated": lambda signed: spiking(Preactivated, signed=signed),
}


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signed"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_folded_time_equals_the_step_by_step_loop_spike_for_spike(kind, signed):
    snn, steps = NETWORKS[kind](signed), 7
    if kind in ("small_cnn", "resnet20"):
        snn.layers.normalize.mean.fill_(0.5)
        snn.layers.normalize.std.fill_(0.25)
    on_a_grid(snn)
    images = (digits(5, 3, 16) if kind == "resnet20" else digits(5)).mul(16).round() / 16
    outputs, loop = step_by_step(snn, images, steps)
    for chunk in (None, 1, 2, 5):
        run = snn.simulate(images, steps, spikes=True, chunk=chunk)
        assert list(run.layers) == list(loop)
        for name, layer in run.layers.items():
            spikes = torch.stack(loop[name].spikes)
            assert torch.equal(spikes, layer.spikes.float()), name
            assert torch.equal(loop[name].count, layer.count.float()), name
            assert torch.equal(loop[name].v, layer.residual), name
        mean = outputs.cumsum(0) / torch.arange(1, steps + 1).view(-1, 1, 1)
        torch.testing.assert_close(run.logits, mean, rtol=1e-5, atol=1e-5)
    if signed:
        assert any((layer.spikes < 0).any() for layer in run.layers.values())


def test_first_layer_of_a_simulation_equals_the_numpy_oracle():
    snn, images = spiking(), digits()
    run = snn.simulate(images, 9, spikes=True)
    first = run.layers["stem.2"]
    current = np.broadcast_to(first.mean_current.numpy(), (9, *first.mean_current.shape))
    spikes, residual = oracle.integrate_and_fire(current, first.theta.numpy(), first.v0.numpy())
    np.testing.assert_array_equal(spikes, first.spikes.numpy())
    np.testing.assert_array_equal(residual, first.residual.numpy())


def test_rate_count_residual_and_current_keep_the_charge_in_every_layer():
    run = spiking().simulate(digits(), 12)
    for layer in run.layers.values():
        kept = layer.theta * layer.count + layer.residual
        torch.testing.assert_close(kept, layer.theta * layer.v0 + 12 * layer.mean_current, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.rate, layer.theta * layer.count / 12)
        assert layer.count.min() >= 0
        assert layer.count.max() <= 12


def test_layers_are_ordered_from_input_to_output_and_named_as_in_the_ann():
    names = list(spiking(resnet20, digits(2, 3, 16), width=4).simulate(digits(2, 3, 16), 1).layers)
    assert names == ["stem.2", *[f"blocks.{block}.act{act}" for block in range(9) for act in (1, 2)]]


def test_a_long_simulation_begins_as_a_short_one():
    snn, images = spiking(), digits()
    assert torch.equal(snn.simulate(images, 64).logits[:16], snn.simulate(images, 16).logits)


def test_recording_less_changes_no_logits():
    snn, images = spiking(), digits()
    full = snn.simulate(images, 8, spikes=True)
    bare = snn.simulate(images, 8, record=False)
    assert torch.equal(full.logits, bare.logits)
    assert bare.layers == {}
    assert all(layer.spikes is None for layer in snn.simulate(images, 8).layers.values())
    for layer in full.layers.values():
        assert layer.spikes.dtype == torch.int8
        assert torch.equal(layer.spikes.sum(0), layer.count.long())


def test_an_unknown_way_to_record_is_refused():
    with pytest.raises(InputError, match="record is 'count': choose True, \"counts\" or False"):
        spiking().simulate(digits(), 8, record="count")


def test_calling_the_network_gives_the_last_mean_logits():
    snn, images = spiking(), digits()
    assert torch.equal(snn(images, 5), snn.simulate(images, 5).logits[-1])
    assert torch.equal(snn(images), snn.simulate(images, snn.time_steps).logits[-1])
    assert torch.equal(snn.simulate(images, 3).predictions, snn.simulate(images, 3).logits.argmax(-1))


def test_streaming_gives_the_same_layers_as_one_run(monkeypatch):
    snn, images = spiking(), digits(7)
    whole = snn.simulate(images, 4)
    monkeypatch.setattr("micelab.network.spiking.CACHE_BUDGET", 2 * 16 * 64 * 4 * 4)
    parts = list(snn.stream(images, 4))
    assert [len(part) for part, _ in parts] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([part for part, _ in parts]), images)
    for name, layer in whole.layers.items():
        assert torch.equal(layer.count, torch.cat([run.layers[name].count for _, run in parts]))


@pytest.mark.parametrize("steps", [1, 8, 64, 4096])
def test_chunks_keep_the_largest_layer_within_the_budget_for_any_number_of_images(steps):
    snn = spiking()
    image = 16 * 8 * 8 * 4 * steps  # the largest layer's values of one image, in bytes
    for images in (1, 1000):
        chunk = snn.chunk(torch.zeros(1, 1, 8, 8).expand(images, 1, 8, 8), steps)
        assert chunk == max(1, CACHE_BUDGET // image)


def test_copies_pickles_and_states_are_the_same_network():
    snn, images = spiking(), digits()
    expected = snn.simulate(images, 6).logits
    file = io.BytesIO()
    torch.save(snn.state_dict(), file)
    file.seek(0)
    other = spiking(images=digits() / 2)
    assert not torch.equal(expected, other.simulate(images, 6).logits)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(snn), pickle.loads(pickle.dumps(snn)), other):
        assert torch.equal(expected, twin.simulate(images, 6).logits)
        assert list(twin.neurons) == list(snn.neurons)
    assert {"layers.stem.2.theta", "layers.stem.2.v0"} <= snn.state_dict().keys()


def test_a_copy_is_independent_of_its_original():
    snn, images = spiking(), digits()
    expected = snn.simulate(images, 6).logits
    twin = copy.deepcopy(snn)
    twin.neurons["stem.2"].theta.mul_(3)
    assert torch.equal(expected, snn.simulate(images, 6).logits)
    assert not torch.equal(expected, twin.simulate(images, 6).logits)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_network_of_another_number_type_takes_the_same_images(kind):
    snn = spiking().to(kind)
    run = snn.simulate(digits(), 4)
    assert run.logits.dtype == kind
    assert run.layers["stem.2"].residual.dtype == torch.promote_types(kind, torch.float32)  # a membrane is fp32 at least


@pytest.mark.parametrize("precision", ["events", "bf16x3", "bf16", "int8"])
def test_a_precision_is_one_of_fp32_networks(precision):
    with pytest.raises(
        InputError, match=f"precision '{precision}' is one of fp32 networks, this one is torch.float64: use .float()"
    ):
        spiking().double()(digits(), 4, precision)


def test_answers_may_be_changed_and_trained_on():
    snn = spiking()
    nn.Linear(10, 2)(snn(digits(), 4)).sum().backward()
    run = snn.simulate(digits(), 4)
    run.logits.mul_(2)
    run.layers["stem.2"].current.mul_(2)
    run.layers["blocks.0.2"].membrane.mul_(2)


@pytest.mark.parametrize("fold", [True, False])
def test_in_training_mode_it_stays_the_same_network(fold):
    torch.manual_seed(0)
    ann = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with torch.no_grad():
        ann.train()(digits(20))
    snn = convert(ann.eval(), "mse", digits(), fold=fold)
    expected = snn(digits(), 4)
    assert torch.equal(nn.Sequential(snn).train()(digits()), snn(digits()))
    assert torch.equal(snn(digits(), 4), expected)
    assert snn.training
    assert not snn.layers.training


@pytest.mark.parametrize(
    ("conv", "norm", "back", "pool", "side"),
    [
        (nn.Conv1d, nn.BatchNorm1d, nn.ConvTranspose1d, nn.AdaptiveAvgPool1d, (9,)),
        (nn.Conv3d, nn.BatchNorm3d, nn.ConvTranspose3d, nn.AdaptiveAvgPool3d, (6, 5, 7)),
    ],
)
def test_layers_of_one_and_three_dimensions_run_and_come_to_the_anns_answer(conv, norm, back, pool, side):
    torch.manual_seed(0)
    ann = nn.Sequential(
        conv(2, 4, 3), norm(4), nn.ReLU(), back(4, 3, 2), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(3, 2)
    ).eval()
    images = torch.rand(3, 2, *side)
    snn = convert(ann, "max", images)
    torch.testing.assert_close(snn(images, 1024), ann(images).detach(), atol=5e-3, rtol=0)
    for precision in PRECISIONS:
        assert snn(images, 4, precision).shape == (3, 2)


def test_bf16_is_a_fast_mode_with_membranes_in_fp32(monkeypatch):
    monkeypatch.setattr("micelab.network.spiking.has_bf16", lambda device: True)
    snn, images = spiking(resnet20, digits(4, 3, 16), width=4), digits(4, 3, 16)
    exact, fast = snn.simulate(images, 8), snn.simulate(images, 8, precision="bf16")
    assert fast.logits.dtype == torch.float32
    first, *_, last = snn.neurons
    assert torch.equal(exact.layers[first].count, fast.layers[first].count)  # the images' layer is not touched
    moved = (exact.layers[last].count - fast.layers[last].count).abs().float().mean()
    assert 0 < moved < 1  # spike of 8 steps
    for layer in fast.layers.values():
        kept = layer.theta * layer.count + layer.residual
        torch.testing.assert_close(kept, layer.theta * layer.v0 + 8 * layer.mean_current, rtol=1e-4, atol=1e-4)
    bare = snn.simulate(images, 8, record=False, precision="bf16")
    torch.testing.assert_close(fast.logits, bare.logits)


def test_bf16_falls_back_to_fp32_and_says_so_once_where_the_machine_lacks_it(monkeypatch, caplog):
    monkeypatch.setattr("micelab.network.spiking.has_bf16", lambda device: False)
    machine.say_lacking.cache_clear()
    snn, images = spiking(), digits()
    for _ in range(2):
        assert torch.equal(snn(images, 4), snn(images, 4, precision="bf16"))
    assert [record.getMessage() for record in caplog.records] == [
        "cpu has no bf16 arithmetic (it would be emulated, and slower than fp32): going on in fp32, which is exact"
    ]


@pytest.mark.parametrize("precision", ["fp32", "events"])
def test_a_callers_autocast_does_not_change_the_arithmetic(precision):
    torch.manual_seed(0)
    snn = micelab.convert(micelab.small_cnn(width=16, activation="quant_clip", theta=1.0), "qcfs")
    images = torch.rand(3, 1, 8, 8)
    expected = snn.simulate(images, 4, precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        run = snn.simulate(images, 4, precision=precision)
    assert run.logits.dtype == torch.float32
    assert torch.equal(run.logits, expected.logits)


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: x.reshape(shape=(x.shape[0], -1)),
        lambda x: x.view(size=(x.size(0), -1)),
        lambda x: torch.reshape(input=x, shape=(x.shape[0], -1)),
        lambda x: torch.reshape(x, shape=(x.shape[0], -1)),
        lambda x: x.reshape(x.shape[0], x.numel() // x.shape[0]),
    ],
    ids=["by name", "view", "all by name", "half by name", "numel"],
)
def test_a_reshape_is_one_however_it_is_written(flat):
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(1, 4, 3), micelab.QuantClip(4, 1.0), nn.Linear(144, 3)

        def forward(self, x):
            return self.head(flat(self.act(self.conv(x))))

    torch.manual_seed(0)
    net, images = Flattens().eval(), torch.rand(2, 1, 8, 8)
    assert micelab.checkup(net, images)
    plain = micelab.convert(nn.Sequential(net.conv, net.act, nn.Flatten(), net.head), "qcfs").simulate(images, 4)
    torch.testing.assert_close(micelab.convert(net, "qcfs").simulate(images, 4).logits, plain.logits)


def test_another_precision_is_refused():
    with pytest.raises(InputError, match="precision is 'fp16': choose 'auto', 'fp32', 'events', 'bf16x3', 'bf16' or 'int8'"):
        spiking().simulate(digits(), 2, precision="fp16")


def test_images_may_want_a_gradient_and_are_not_changed():
    images = digits().requires_grad_()
    before = images.detach().clone()
    logits = spiking().simulate(images, 4).logits
    assert not logits.requires_grad
    assert torch.equal(before, images.detach())


def test_a_network_without_weights_converts_and_runs():
    snn = convert(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()), "max", digits())
    assert snn.simulate(digits(), 4).logits.shape == (4, 6, 16)


def test_summaries_are_plain_numbers():
    run = spiking().simulate(digits(2), 3)
    summary = run.to_dict()
    assert np.shape(summary["logits"]) == (3, 2, 10)
    layer = run.layers["stem.2"]
    assert summary["layers"]["stem.2"]["spike_rate"] == pytest.approx(layer.count.float().mean().item() / 3)
    assert isinstance(summary["layers"]["stem.2"]["theta"], float)


@pytest.mark.parametrize("steps", [0, -1, 2.0, "2", True])
def test_time_steps_below_one_are_refused(steps):
    with pytest.raises(InputError, match="time_steps is"):
        spiking().simulate(digits(), steps)


def test_steps_of_numpy_are_steps():
    snn = spiking()
    assert torch.equal(snn(digits(), np.int64(4)), snn(digits(), 4))


def test_zero_steps_are_not_taken_for_the_default():
    with pytest.raises(InputError, match="time_steps is 0"):
        spiking()(digits(), 0)


@pytest.mark.parametrize("chunk", [0, -3, 2.5])
def test_chunks_below_one_image_are_refused(chunk):
    with pytest.raises(InputError, match="chunk is"):
        spiking().simulate(digits(), 2, chunk=chunk)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "images.float"),
        (torch.full((2, 1, 8, 8), torch.nan), "image 0 of the batch holds NaN"),
        (torch.zeros(0, 1, 8, 8), "at least one image"),
        (torch.zeros(2, 3, 8, 8), "layer `normalize`: images have 3 channels, and this network was made for 1"),
        (torch.zeros(2, 1, 1, 1), r"layer `blocks\.0\.3` cannot take input"),
        (np.zeros((2, 1, 8, 8)), "images are a ndarray"),
        (torch.zeros(2, 1, 8, 8, device="meta"), "images are on meta, the network on cpu"),
    ],
)
def test_bad_images_are_refused_with_the_layer_or_the_remedy(images, text):
    with pytest.raises(InputError, match=text) as caught:
        spiking().simulate(images, 2)
    assert "\n" not in str(caught.value)


def test_a_threshold_vector_of_another_length_names_its_layer():
    snn = spiking()
    snn.layers.add_submodule("stem.2", IntegrateFire(torch.ones(5)))
    with pytest.raises(InputError, match=r"layer `stem\.2`: .*per-channel value"):
        snn.simulate(digits(), 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_conversion_simulation_and_errors_run_on_cuda_as_on_the_cpu():
    torch.manual_seed(0)
    ann, images = small_cnn().eval(), digits()
    snn = convert(ann, "percentile", images)
    expected = snn.simulate(images, 8)
    ann, moved = ann.cuda(), images.cuda()
    on_cuda = convert(ann, "percentile", moved)
    run = on_cuda.simulate(moved, 8)
    torch.testing.assert_close(expected.logits, run.logits.cpu(), rtol=0.05, atol=0.05)
    assert micelab.error_breakdown(ann, on_cuda, moved, 1).layers["stem.2"].timing.rms == 0
    with pytest.raises(InputError, match="images are on cpu, the network on cuda"):
        on_cuda.simulate(images, 8)
