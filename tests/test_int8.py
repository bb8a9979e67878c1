"""Convolutions of spikes by 8-bit weights: exact integer sums, the same for any chunk and thread count; and what falls back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micelab import machine
from micelab.convert import convert
from micelab.exceptions import InputError
from micelab.models import resnet20
from micelab.network import int8
from micelab.network.grid import snap_to_grid
from micelab.network.spike_convolutions import INTEGERS, ByIntegers, Spikes
from micelab.neuron.compiled import as_bytes
from micelab.neuron.firing import IntegrateFire

needs_events = pytest.mark.skipif(not INTEGERS.is_here("cpu"), reason="no C compiler works here")
needs_int8 = pytest.mark.skipif(not int8.has_int8("cpu"), reason="no quantized convolution here")


def pictures(images=5):
    return torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@needs_int8
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("theta", [torch.tensor(0.7), torch.linspace(0.3, 2, 8)], ids=["number", "channel"])
def test_a_convolution_of_bytes_is_that_of_the_rounded_weights(theta, stride, groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 6, 3, stride, padding=1, groups=groups).requires_grad_(False)
    spikes = (torch.rand(4, 8, 9, 9) < 0.3).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    found = int8.convolve(spikes, int8.packed(layer, theta, list(spikes.shape)))
    sent = spikes * (theta if theta.dim() == 0 else theta.view(1, -1, 1, 1))
    expected = layer(sent)
    largest = (layer.weight.abs().amax() * theta.max() / 254 * layer.weight[0].numel()).item()  # half a step a weight
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) <= largest
    assert found.is_contiguous(memory_format=torch.channels_last)
    if theta.dim() == 0 and groups == 1:
        integers, scale = int8.rounded(layer.weight, theta)
        sums = F.conv2d(spikes.double(), integers.double(), stride=stride, padding=1)
        by_hand = sums * scale.double().view(1, -1, 1, 1) + layer.bias.double().view(1, -1, 1, 1)
        torch.testing.assert_close(found.double(), by_hand, rtol=1e-6, atol=1e-6)


@needs_int8
def test_counts_do_not_depend_on_chunks_or_threads_or_on_what_is_kept(narrow_snn):
    expected = narrow_snn.simulate(pictures(), 6, precision="int8")
    before = torch.get_num_threads()
    try:
        for threads, chunk in ((1, 1), (1, 3), (2, 5)):
            torch.set_num_threads(threads)
            run = narrow_snn.simulate(pictures(), 6, chunk=chunk, precision="int8")
            for name, layer in expected.layers.items():
                assert torch.equal(layer.count, run.layers[name].count), name
    finally:
        torch.set_num_threads(before)
    bare = narrow_snn.simulate(pictures(), 6, record=False, precision="int8")
    torch.testing.assert_close(expected.logits, bare.logits)
    exact = narrow_snn.simulate(pictures(), 6)
    assert any(not torch.equal(layer.count, exact.layers[name].count) for name, layer in expected.layers.items())


@needs_int8
@needs_events
@pytest.mark.parametrize("theta", [torch.tensor(0.7), torch.linspace(0.3, 2, 32)], ids=["number", "channel"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (5, 1, 2)])
@pytest.mark.parametrize("channels", [(16, 16), (19, 48), (32, 32), (64, 96)])
def test_integers_are_added_spike_by_spike_as_by_the_quantized_convolution(channels, kernel, stride, padding, theta):
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, kernel, stride, padding).requires_grad_(False)
    layer.weight.normal_()
    theta = theta if theta.dim() == 0 else theta.repeat(2)[: channels[0]]
    spikes = (torch.rand(3, channels[0], 11, 9) < 0.3).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    if not INTEGERS.suits(layer, IntegrateFire(theta)):
        assert kernel == 5  # narrow layers by events are 1x1 or 3x3, and 1,600 weights may pass 16 bits
        return
    expected = int8.convolve(spikes, int8.packed(layer, theta, list(spikes.shape)))
    found = ByIntegers(layer, theta).currents(Spikes(spikes.float()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # one product and one sum round
    layer.bias.zero_()
    bare = ByIntegers(layer, theta)
    scale = bare.layer.scale.view(1, -1, 1, 1)
    integers, _ = int8.rounded(layer.weight, theta)
    sums = F.conv2d(spikes.double(), integers.double(), stride=stride, padding=padding)
    assert torch.equal(bare.currents(Spikes(spikes.float())), sums.float() * scale)


@needs_int8
@needs_events
def test_weights_whose_sums_pass_16_bits_are_left_to_the_quantized_convolution():
    layer, neuron = nn.Conv2d(32, 32, 3).requires_grad_(False), IntegrateFire(torch.tensor(1.0))
    layer.weight.fill_(0.5)
    assert not INTEGERS.suits(layer, neuron)  # 288 * 127
    layer.weight[:, 0] = 100.0
    assert INTEGERS.suits(layer, neuron)
    layer.weight[:, 0] = -0.5
    assert not INTEGERS.suits(layer, neuron)
    layer.weight[:, ::2] = -0.5  # half of them, and none of those can fire the other half away
    assert INTEGERS.suits(layer, neuron)
    assert not INTEGERS.suits(layer, IntegrateFire(torch.tensor(1.0), signed=True))


@needs_int8
@needs_events
@pytest.mark.parametrize("record", [True, "counts", False])
def test_a_network_has_the_spikes_of_the_quantized_convolution(record, monkeypatch):
    torch.manual_seed(0)
    ann = resnet20(width=16, activation="quant_clip", theta=1.0)
    with torch.no_grad():
        ann.train()(pictures(32))
    snn = convert(ann.eval(), "qcfs")
    found = snn.simulate(pictures(), 6, precision="int8", record=record)
    monkeypatch.setattr(INTEGERS.__class__, "is_here", lambda *_: False)
    expected = snn.simulate(pictures(), 6, precision="int8", record=record)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for name, layer in expected.layers.items():
        assert (layer.count != found.layers[name].count).float().mean() < 1e-3, name


@needs_int8
def test_signed_spikes_are_left_to_fp32():
    torch.manual_seed(0)
    signed = convert(resnet20(width=4), "max", pictures(), signed=True)
    assert torch.equal(signed(pictures(), 4), signed(pictures(), 4, "int8"))


def test_int8_falls_back_to_fp32_and_says_so_once(narrow_snn, monkeypatch, caplog):
    monkeypatch.setattr(int8, "has_int8", lambda device: False)
    machine.say_lacking.cache_clear()
    for _ in range(2):
        assert torch.equal(narrow_snn(pictures(), 3), narrow_snn(pictures(), 3, "int8"))
    assert [record.getMessage() for record in caplog.records] == [
        "cpu has no quantized convolution here: going on in fp32, which is exact"
    ]


def test_a_network_on_a_grid_refuses_fast_modes(narrow_snn):
    snapped = snap_to_grid(narrow_snn, shape=(3, 16, 16))
    for mode in ("int8", "bf16"):
        with pytest.raises(InputError, match=f"precision is '{mode}', and this network is on a grid to be exact"):
            snapped.simulate(pictures(), 3, precision=mode)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_bytes_are_one_where_values_are_not_zero(layout):
    values = (torch.randn(3, 5, 7, 7) * (torch.rand(3, 5, 7, 7) < 0.4)).contiguous(memory_format=layout)
    made = as_bytes(values)
    assert torch.equal(made, values.ne(0).to(torch.uint8))
    assert made.stride() == values.stride()
