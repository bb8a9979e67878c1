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


@pytest.fixture(scope="module", params=[8, None], ids=["8 bits", "as many bits as fit"])
def snapped(narrow_snn, request):
    return snap_to_grid(narrow_snn, bits=request.param, time_steps=8, shape=SIDE)


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
    bits = snapped.spec["grid"]["bits"]
    for name, module in snapped.layers.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert not off_grid(module.weight, bits[name])
            assert not off_grid(module.bias, bits[name] + 6)
    assert not any(off_grid(neuron.v0, bits[name]) for name, neuron in snapped.neurons.items())
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


def loud():
    """Two layers, of which the second has sums a thousand times as large as the first's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 2))
    with torch.no_grad():
        net[2].weight.mul_(1000)
    return convert(net, "max", pictures(), time_steps=8)


def test_by_default_each_layer_has_as_many_bits_as_its_sums_have_room_for():
    snn = loud()
    snapped = snap_to_grid(snn, shape=SIDE)
    bits = snapped.spec["grid"]["bits"]
    assert bits["0"] > bits["2"] + 3  # where the sums are large
    assert bits["5"] == 16  # before no neuron
    for layer in ("0", "2"):  # with one more it is refused: that is all there is room for
        with pytest.raises(InputError, match=rf"layer `{int(layer) + 1}`: membrane potentials within 8 steps could reach"):
            snap_to_grid(snn, bits=bits[layer] + 1, shape=SIDE)
    with pytest.raises(InputError, match="layer `2`: sums could reach"):
        snap_to_grid(snn, bits=bits["0"], shape=SIDE)
    expected = copy.deepcopy(snapped).double().simulate(pictures(), 8)
    run = snapped.simulate(pictures(), 8, chunk=2)
    for name, layer in run.layers.items():
        assert torch.equal(layer.residual.double(), expected.layers[name].residual), name
        assert layer.count.any(), name


def test_where_not_one_bit_fits_it_is_refused_by_name():
    with pytest.raises(InputError, match=r"layer `3`: membrane potentials within 4096 steps .* give fewer bits or value_bits"):
        snap_to_grid(loud(), value_bits=12, time_steps=4096, shape=SIDE)


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
        (cnn, {"time_steps": True}, "time_steps is True"),
        (lambda: cnn().half(), {}, "the network is in torch.float16, .* put model.float"),
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


@pytest.mark.parametrize("shape", [None, (1, 16, 16), (3, 1, 1), 16, ("a",), (3, -1, 16)])
def test_a_shape_that_the_network_does_not_take_is_named(shape):
    snn = convert(nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 12 * 12, 2)), "max", pictures())
    assert snap_to_grid(snn, bits=4, shape=[3, 16, 16]).most_steps == 8
    with pytest.raises(InputError, match=r"shape is .*, which the network does not take: give \[C, H, W\]"):
        snap_to_grid(snn, bits=4, shape=shape)


@pytest.mark.parametrize(
    ("pool", "values"),
    [
        (nn.AvgPool2d(4, stride=3, padding=1, count_include_pad=False), 9),
        (nn.AvgPool2d((2, 4), stride=(2, 13), ceil_mode=True), 6),
        (nn.AvgPool2d(2, divisor_override=3), 3),
        (nn.AdaptiveAvgPool2d((3, 8)), 12),
        (nn.AvgPool2d(4, stride=3, padding=1), None),
        (nn.AvgPool2d((2, 4), padding=(1, 0), count_include_pad=False), None),
        (nn.AvgPool2d(3, divisor_override=8), None),
        (nn.AvgPool2d(4, stride=4, padding=2, ceil_mode=True), None),
        (nn.AdaptiveAvgPool2d((5, 8)), None),
        (nn.AdaptiveAvgPool2d((32, None)), None),
    ],
)
def test_every_window_of_a_pooling_divides_by_a_power_of_two(pool, values):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Flatten())
    snn = convert(net, "max", pictures(), time_steps=2)
    if values:
        with pytest.raises(InputError, match=f"layer `2` is a mean over {values} values"):
            snap_to_grid(snn, bits=4, shape=SIDE)
        return
    snapped = snap_to_grid(snn, bits=4, shape=SIDE)
    residual = snapped.simulate(pictures(), 2).layers["4"].residual
    assert not bool((residual * 2**14).frac().any())  # 4 bits of the weights, 6 of the values, 4 at most of a mean


class Wide(nn.Module):
    """Spikes of two layers beside each other, as in a DenseNet."""

    def __init__(self, cat):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.pool, self.head, self.cat = nn.AvgPool2d(16), nn.Linear(8, 2), cat

    def forward(self, x):
        a = torch.relu(self.one(x))
        both = self.pool(self.cat(a, torch.relu(self.two(a))))
        return torch.relu(self.head(torch.flatten(input=both, start_dim=1)))


@pytest.mark.parametrize(
    "cat",
    [
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b: torch.cat((a, b), dim=1),
        lambda a, b: torch.cat(tensors=[a, b], dim=1),
        lambda a, b: torch.concat([a, b], 1),
        lambda a, b: torch.cat([a.transpose(2, 3), b.permute(0, 1, 3, 2)], 1),
    ],
    ids=["list", "tuple", "by name", "concat", "transposed"],
)
def test_networks_that_concatenate_are_put_on_a_grid(cat):
    torch.manual_seed(0)
    snn = convert(Wide(cat).eval(), "max", pictures(), time_steps=4)
    snapped = snap_to_grid(snn, bits=6, shape=SIDE)
    expected = copy.deepcopy(snapped).double().simulate(pictures())
    for name, layer in snapped.simulate(pictures(), chunk=2).layers.items():
        assert torch.equal(layer.residual.double(), expected.layers[name].residual), name


def test_a_network_in_fp64_is_put_on_the_grid_of_its_fp32_copy():
    torch.manual_seed(0)
    ann = Wide(lambda a, b: torch.cat([a, b], 1)).eval()
    snn = convert(ann, "max", pictures(), time_steps=4)
    snapped, exact = (snap_to_grid(each, bits=6, shape=SIDE) for each in (snn, copy.deepcopy(snn).double()))
    assert exact.layers.get_submodule("head").weight.dtype == torch.float64
    run = exact.simulate(pictures())
    for name, layer in snapped.simulate(pictures()).layers.items():
        assert torch.equal(layer.residual.double(), run.layers[name].residual), name
    mixed = convert(copy.deepcopy(ann).double(), "max", pictures(), time_steps=4)  # thresholds are fp32 all the same
    assert snap_to_grid(mixed, bits=6, shape=SIDE).most_steps == 4


def test_on_grid_rounds_to_the_nearest_multiple():
    values = torch.linspace(-2, 2, 101)
    assert float((on_grid(values, 5) - values).abs().max()) <= 2**-6
    assert torch.equal(on_grid(values, 5) * 32, (on_grid(values, 5) * 32).round())


def test_padding_with_zeros_stays_on_the_grid():
    layers = [nn.ZeroPad2d(1), nn.Conv2d(1, 16, 3), micelab.QuantClip(levels=4, theta=1.0), nn.Flatten(), nn.Linear(1024, 2)]
    snn = micelab.convert(nn.Sequential(*layers).eval(), "qcfs", time_steps=2)
    assert snap_to_grid(snn, bits=6, shape=(1, 8, 8)).most_steps == 2
