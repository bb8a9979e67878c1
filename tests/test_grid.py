"""Networks on a grid: the same spike counts in any order, batch, chunk and number of threads; what is refused, by layer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import micelab
from micelab.convert import convert
from micelab.exceptions import InputError
from micelab.models import small_cnn
from micelab.network.grid import on_grid, snap_to_grid

SIDE = (3, 16, 16)


def pictures(images=5, seed=1):
    return torch.rand(images, *SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def snapped(narrow_snn):
    return snap_to_grid(narrow_snn, bits=8, time_steps=8, shape=SIDE)


def permuted(snn, seed):
    """The same network with the channels inside every block in another order: every sum is made in another order."""
    snn, generator = copy.deepcopy(snn), torch.Generator().manual_seed(seed)
    for block in snn.layers.get_submodule("blocks").children():
        order = torch.randperm(block.conv1.out_channels, generator=generator)
        block.conv1.weight.copy_(block.conv1.weight[order])
        block.conv1.bias.copy_(block.conv1.bias[order])
        block.conv2.weight.copy_(block.conv2.weight[:, order])
    return snn


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    images=st.integers(1, 9),
    steps=st.integers(1, 8),
    chunk=st.integers(1, 9),
    threads=st.sampled_from([1, 2]),
    onednn=st.booleans(),
)
def test_counts_are_equal_for_any_order_batch_chunk_thread_count_and_library(
    snapped, seed, images, steps, chunk, threads, onednn
):
    batch = pictures(images, seed)
    expected = snapped.simulate(batch, steps)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch._C._set_mkldnn_enabled(onednn)  # torch.backends.mkldnn.flags warns of another setting
        runs = [snapped.simulate(batch, steps, chunk=chunk), permuted(snapped, seed).simulate(batch, steps)]
        alone = snapped.simulate(batch[-1:], steps)
    finally:
        torch.set_num_threads(before)
        torch._C._set_mkldnn_enabled(True)
    for name, layer in expected.layers.items():
        assert torch.equal(layer.count[-1:], alone.layers[name].count), name
        assert torch.equal(layer.residual[-1:], alone.layers[name].residual), name
        for run in runs:
            assert torch.equal(layer.count.sum((2, 3)).sort(1)[0], run.layers[name].count.sum((2, 3)).sort(1)[0]), name
        assert torch.equal(layer.count, runs[0].layers[name].count), name


def test_counts_in_fp64_are_those_in_fp32(snapped):
    expected = snapped.simulate(pictures(), 8)
    exact = copy.deepcopy(snapped).double().simulate(pictures(), 8)
    for name, layer in expected.layers.items():
        assert torch.equal(layer.count, exact.layers[name].count), name
        assert torch.equal(layer.residual.double(), exact.layers[name].residual), name


def test_numbers_lie_on_their_grids_and_the_model_is_not_changed(narrow_snn, snapped):
    off_grid = lambda tensor, bits: bool((tensor * 2**bits).frac().any())
    for module in snapped.layers.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert not off_grid(module.weight, 8)
            assert not off_grid(module.bias, 14)
    assert not any(off_grid(neuron.theta, 6) for neuron in snapped.neurons.values())
    assert off_grid(narrow_snn.layers.get_submodule("blocks.0.conv1").weight, 8)
    assert not hasattr(narrow_snn.layers, "image_grid")
    assert narrow_snn.most_steps is None


def test_largest_sum_of_a_small_network_is_the_one_worked_out_by_hand():
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, -1.0]]))
        net[0].bias.fill_(0.5)
    snn = convert(net, "max", torch.rand(4, 2), v0=0.0)
    # at most 3.5 a step; 2^-20 units: 3.5 * 2^20 * 4 steps < 2^24 <= 3.5 * 2^20 * 5 steps
    assert snap_to_grid(snn, 10, 10, time_steps=4, shape=(2,)).most_steps == 4
    with pytest.raises(InputError, match=r"layer `1`: membrane potentials within 5 steps could reach 17.5.*1 less in sum"):
        snap_to_grid(snn, 10, 10, time_steps=5, shape=(2,))


def test_a_longer_simulation_than_it_was_made_for_is_refused(snapped):
    with pytest.raises(InputError, match=r"time_steps is 9, but this network was put on a grid for at most 8"):
        snapped.simulate(pictures(), 9)


def test_a_snapped_network_is_saved_and_loaded_with_its_grid(snapped, tmp_path):
    again = micelab.load(micelab.save(snapped, tmp_path / "snapped"))
    assert again.most_steps == 8
    assert torch.equal(snapped.simulate(pictures(), 4).logits, again.simulate(pictures(), 4).logits)


class Threes(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.pool, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return torch.relu(self.conv(self.pool(torch.relu(self.stem(x))))).mean((2, 3))


def cnn():
    return convert(small_cnn(in_channels=3), "max", pictures())


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lambda: convert(Threes().eval(), "max", pictures()), {}, "layer `pool` is a mean over 9 values"),
        (cnn, {"bits": 0}, "bits is 0: give an integer from 1 to 16"),
        (cnn, {"value_bits": 2.5}, "value_bits is 2.5"),
        (
            lambda: convert(small_cnn(in_channels=3), "max", pictures()),
            {"bits": 16, "value_bits": 16},
            "layer `stem.0`: sums could reach",
        ),
        (cnn, {"time_steps": 0}, "time_steps is 0"),
        (lambda: small_cnn(in_channels=3), {}, "the model is a ImageNetwork: snap_to_grid takes what micelab.convert gives"),
        (
            lambda: convert(small_cnn(in_channels=3, activation="quant_clip"), "srp"),
            {"bits": 6},
            "has neurons of kind",
        ),
    ],
)
def test_what_cannot_be_put_on_a_grid_is_refused_by_name(make, options, text):
    torch.manual_seed(0)
    with pytest.raises(InputError, match=text):
        snap_to_grid(make(), shape=SIDE, **options)


def test_on_grid_rounds_to_the_nearest_multiple():
    values = torch.linspace(-2, 2, 101)
    assert float((on_grid(values, 5) - values).abs().max()) <= 2**-6
    assert torch.equal(on_grid(values, 5) * 32, (on_grid(values, 5) * 32).round())


def test_padding_with_zeros_stays_on_the_grid():
    layers = [nn.ZeroPad2d(1), nn.Conv2d(1, 16, 3), micelab.QuantClip(levels=4, theta=1.0), nn.Flatten(), nn.Linear(1024, 2)]
    snn = micelab.convert(nn.Sequential(*layers).eval(), "qcfs", time_steps=2)
    assert snap_to_grid(snn, bits=6, shape=(1, 8, 8)).most_steps == 2
