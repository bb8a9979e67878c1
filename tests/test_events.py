"""Convolutions that follow spikes: the numbers of a dense one up to rounding, its bits on a grid, the same for any chunk."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micelab import machine
from micelab.convert import convert
from micelab.models import resnet20
from micelab.network import events
from micelab.network.grid import snap_to_grid
from micelab.neuron import compiled

needs_compiler = pytest.mark.skipif(not events.has_events("cpu"), reason="no C compiler works here")


def pictures(images=5):
    return torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def wide():
    """A network whose second and third stage are wide enough: 32 and 64 channels."""
    torch.manual_seed(0)
    ann = resnet20(width=16, activation="quant_clip", theta=1.0)
    with torch.no_grad():
        ann.train()(pictures(32))
    return convert(ann.eval(), "qcfs")


def sent(shape, rate, theta):
    spikes = (torch.rand(shape) < rate).float() * (theta if theta.dim() == 0 else theta.view(1, -1, 1, 1))
    return spikes.contiguous(memory_format=torch.channels_last)


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (5, 1, 2), (3, 1, 0), (4, 3, 2)]
)
@pytest.mark.parametrize("channels", [(32, 32), (40, 64), (35, 96), (64, 160)])
def test_the_currents_are_those_of_a_dense_convolution(channels, kernel, stride, padding, bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, kernel, stride, padding, bias=bias).requires_grad_(False)
    for theta, rate in ((torch.tensor(0.7), 0.2), (torch.linspace(0.3, 2, channels[0]), 0.5), (torch.tensor(1.0), 0.0)):
        spikes = sent((3, channels[0], 9, 7), rate, theta)
        found = events.convolve(spikes, layer, theta)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, layer(spikes), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_sums_are_the_same_bits_for_any_number_of_images_and_threads(threads):
    torch.manual_seed(0)
    layer, theta = nn.Conv2d(32, 64, 3, padding=1).requires_grad_(False), torch.tensor(0.7)
    spikes = sent((40, 32, 16, 16), 0.2, theta)
    threads(1)
    expected = events.convolve(spikes, layer, theta)
    threads(3)
    assert torch.equal(expected, events.convolve(spikes, layer, theta))
    assert torch.equal(expected[7:9], events.convolve(spikes[7:9], layer, theta))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
def test_on_a_grid_a_network_gives_the_same_bits(wide):
    snapped = snap_to_grid(wide, shape=(3, 16, 16))
    dense, followed = (snapped.simulate(pictures(), 8, precision=mode) for mode in ("fp32", "events"))
    for name, layer in dense.layers.items():
        assert torch.equal(layer.count, followed.layers[name].count), name
        assert torch.equal(layer.residual, followed.layers[name].residual), name
        assert layer.count.any(), name


@needs_compiler
def test_a_network_gives_nearly_the_same_and_the_same_bits_for_any_chunk(wide):
    expected = wide.simulate(pictures(), 6, precision="events")
    dense = wide.simulate(pictures(), 6)
    torch.testing.assert_close(expected.logits, dense.logits, rtol=0.2, atol=0.2)
    other = [name for name, layer in dense.layers.items() if not torch.equal(layer.residual, expected.layers[name].residual)]
    assert other  # sums in another order
    assert all(name.startswith(("blocks.3", "blocks.4", "blocks.5", "blocks.6", "blocks.7", "blocks.8")) for name in other)
    for chunk in (1, 3):
        run = wide.simulate(pictures(), 6, chunk=chunk, precision="events")
        for name, layer in expected.layers.items():
            assert torch.equal(layer.count, run.layers[name].count), name


@needs_compiler
def test_narrow_layers_and_signed_spikes_are_convolved(narrow_snn):
    assert torch.equal(narrow_snn(pictures(), 4), narrow_snn(pictures(), 4, "events"))
    torch.manual_seed(0)
    signed = convert(resnet20(), "max", pictures(), signed=True)
    assert torch.equal(signed(pictures(), 4), signed(pictures(), 4, "events"))


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"padding": (1, 0)}],
)
def test_convolutions_of_other_kinds_do_not_suit(options, wide):
    neuron = next(iter(wide.neurons.values()))
    assert events.suits(nn.Conv2d(32, 32, 3), neuron)
    assert not events.suits(nn.Conv2d(32, 32, 3, **options), neuron)
    assert not events.suits(nn.Conv2d(32, 32, 3).double(), neuron)
    assert not events.suits(nn.Conv2d(32, 48, 3), neuron)
    assert not events.suits(nn.Conv2d(32, 32, 3), None)


def test_without_a_compiler_fp32_is_used_and_the_log_says_so_once(wide, monkeypatch, caplog):
    monkeypatch.setattr(events, "shared_library", lambda: None)
    machine.say_lacking.cache_clear()
    for _ in range(2):
        assert torch.equal(wide(pictures(), 3), wide(pictures(), 3, "events"))
    assert [record.getMessage() for record in caplog.records] == [
        "cpu has no compiled convolution of spikes (no C compiler works here): going on in fp32, which is exact"
    ]


@needs_compiler
def test_memory_that_does_not_suffice_is_said_as_such(monkeypatch):
    monkeypatch.setattr(compiled.shared_library(), "convolve_events", lambda *_: 1, raising=False)
    with pytest.raises(RuntimeError) as caught:
        compiled.convolve_events(torch.zeros(1, 32, 4, 4), torch.zeros(3, 3, 32, 32), torch.zeros(32), 1, 1)
    assert machine.ran_out(caught.value)


def test_a_spike_beside_the_edge_is_seen_where_it_is():
    spikes = torch.zeros(1, 32, 3, 3)
    spikes[0, 5, 2, 0] = 1.0
    layer = nn.Conv2d(32, 32, 3, padding=1, bias=False).requires_grad_(False)
    if events.has_events("cpu"):
        assert torch.equal(events.convolve(spikes, layer, torch.tensor(1.0)), F.conv2d(spikes, layer.weight, padding=1))
