"""The four error terms: their sum, the cases in which a term must vanish, NumPy on a real simulation, words and refusals."""

import copy
import json

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from micelab.convert import convert
from micelab.errors import KINDS, error_breakdown, split_error
from micelab.exceptions import InputError
from micelab.graph import trace
from micelab.models import resnet20, small_cnn
from micelab.neuron import integrate_and_fire

IMAGES = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network(seed=0, activation="relu", **options):
    torch.manual_seed(seed)
    ann = small_cnn(activation=activation, width=4, **options)
    with torch.no_grad():
        ann.train()(IMAGES)
    return ann.eval()


def simulated(ann, steps, seed=0, signed=False, v0=0.5, per_channel=False):
    """(spiking network, its run, the ANN's inputs of every activation), thresholds drawn around the largest activation."""
    snn = convert(ann, "max", IMAGES, v0=v0, signed=signed, per_channel=per_channel)
    draw = torch.Generator().manual_seed(seed)
    for neuron in snn.neurons.values():
        neuron.theta.mul_(0.05 + 1.5 * torch.rand(neuron.theta.shape, generator=draw))
    inputs = {}
    traced = trace(ann)
    for name in snn.neurons:
        traced.get_submodule(name).register_forward_hook(lambda _, args, __, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        traced(IMAGES)
    return snn, snn.simulate(IMAGES, steps), inputs


drawn_networks = given(
    seed=st.integers(0, 999), steps=st.integers(1, 24), v0=st.floats(0, 1), signed=st.booleans(), per_channel=st.booleans()
)


@drawn_networks
def test_the_four_terms_sum_to_the_total_in_every_layer(seed, steps, v0, signed, per_channel):
    _, run, inputs = simulated(network(seed), steps, seed, signed, v0, per_channel)
    for name, layer in run.layers.items():
        terms = split_error(layer.rate, layer.mean_current, inputs[name], layer.theta, layer.v0, steps)
        total = layer.rate.double() - inputs[name].double().clamp(min=0)
        size = 1e-30 + sum(terms[kind].double().abs() for kind in KINDS) + layer.rate + layer.mean_current.abs()
        assert float(((sum(terms[kind].double() for kind in KINDS) - total).abs() / size).max()) < 1e-5
        assert float(((terms["total"].double() - total).abs() / size).max()) < 1e-5


@drawn_networks
def test_timing_is_exactly_zero_in_the_first_layer_at_any_number_of_steps(seed, steps, v0, signed, per_channel):
    ann = network(seed)
    snn, run, inputs = simulated(ann, steps, seed, signed, v0, per_channel)
    layer = run.layers["stem.2"]
    terms = split_error(layer.rate, layer.mean_current, inputs["stem.2"], layer.theta, layer.v0, steps)
    assert int(terms["timing"].count_nonzero()) == 0
    table = error_breakdown(ann, snn, IMAGES, steps)
    assert table.layers["stem.2"].timing.mean_abs == 0
    if steps > 4 and not signed and v0 < 0.9:
        assert any(errors.timing.mean_abs > 0 for errors in table.layers.values())


@given(seed=st.integers(0, 999), v0=st.floats(0, 1), signed=st.booleans(), per_channel=st.booleans())
def test_timing_is_exactly_zero_in_every_layer_of_one_step(seed, v0, signed, per_channel):
    ann = network(seed)
    snn, _, _ = simulated(ann, 1, seed, signed, v0, per_channel)
    for layer in error_breakdown(ann, snn, IMAGES, 1).layers.values():
        assert layer.timing.mean_abs == 0
        assert layer.over_firing == layer.under_firing == 0


@given(
    z=st.floats(-2, 4, width=32), theta=st.floats(0.125, 3, width=32), v0=st.sampled_from([0.0, 0.5]), steps=st.integers(1, 64)
)
def test_a_constant_current_has_no_timing_error_even_on_the_edge_of_a_step(z, theta, v0, steps):
    edges = [theta * (k - v0) / steps for k in range(steps + 1)]
    current = torch.tensor([[z, *edges]]).expand(steps, 1, -1)
    spikes, _ = integrate_and_fire(current, theta, v0)
    rate = spikes.sum(0) * torch.tensor(theta) / steps
    assert int(split_error(rate, current[0], current[0], theta, v0, steps)["timing"].count_nonzero()) == 0


@pytest.mark.parametrize("v0", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signed"])
def test_over_and_under_firing_are_timing_errors_above_and_below_zero(v0, signed):
    draw = torch.Generator().manual_seed(1)
    steps, theta = 8, 0.5  # with currents on a grid of 1/64 every sum and mean is exact
    current = torch.randint(-64, 96, (steps, 1, 20000), generator=draw) / 64
    spikes, residual = integrate_and_fire(current, theta, v0, signed)
    count, mean = spikes.sum(0), current.mean(0)
    timing = split_error(theta * count / steps, mean, mean, theta, v0, steps)["timing"]
    over, under = (residual < 0) & (count > 0), (residual >= theta) & (count < steps)
    assert torch.equal(over, timing > 0)
    assert torch.equal(under, timing < 0)
    assert over.any()
    assert under.any()


@pytest.mark.parametrize("per_channel", [False, True])
def test_terms_of_a_real_simulation_equal_the_numpy_oracle(per_channel):
    steps = 5
    _, run, inputs = simulated(network(), steps, v0=0.3, per_channel=per_channel)
    for name, layer in run.layers.items():
        theta = layer.theta.double().numpy().reshape(-1, 1, 1) if per_channel else float(layer.theta)
        phi, mean, z = (value.double().numpy() for value in (layer.rate, layer.mean_current, inputs[name]))
        expected = oracle.four_terms(phi, mean, z, theta, float(layer.v0), steps)
        found = split_error(layer.rate, layer.mean_current, inputs[name], layer.theta, layer.v0, steps)
        position = steps * mean / theta + float(layer.v0)
        clear = np.abs(position - np.round(position)) > 1e-4  # away from the edges, where float32 and float64 may differ
        assert clear.mean() > 0.99
        for kind, term in expected.items():
            np.testing.assert_allclose(found[kind].numpy()[clear], term[clear], atol=1e-5 * float(layer.theta.max()) + 1e-6)


def test_the_table_holds_the_means_and_shares_of_all_neurons():
    ann, steps = network(), 6
    snn, run, inputs = simulated(ann, steps)
    table = error_breakdown(ann, snn, IMAGES, steps)
    assert (table.time_steps, table.images, table.method) == (steps, 12, "max")
    assert list(table.layers) == list(run.layers)
    for name, layer in run.layers.items():
        errors = table.layers[name]
        terms = split_error(layer.rate, layer.mean_current, inputs[name], layer.theta, layer.v0, steps)
        for kind, term in terms.items():
            found = getattr(errors, kind)
            term = term.double()
            assert found.mean == pytest.approx(term.mean().item(), rel=1e-4, abs=1e-7)
            assert found.mean_abs == pytest.approx(term.abs().mean().item(), rel=1e-4, abs=1e-7)
            assert found.rms == pytest.approx(term.square().mean().sqrt().item(), rel=1e-4, abs=1e-7)
        assert sum(getattr(errors, kind).mean for kind in KINDS) == pytest.approx(errors.total.mean, rel=1e-5, abs=1e-6)
        assert errors.saturated == pytest.approx((layer.count == steps).double().mean().item())
        assert errors.over_firing == pytest.approx(((layer.residual < 0) & (layer.count > 0)).double().mean().item())
        assert errors.under_firing + errors.over_firing + errors.saturated <= 1
        assert errors.signal == pytest.approx(inputs[name].clamp(min=0).square().mean().sqrt().item(), rel=1e-4)
        assert errors.relative == pytest.approx(errors.total.rms / errors.signal)


def test_inherited_error_of_the_first_layer_is_nothing_but_rounding():
    ann = network()
    for fold in (True, False):
        snn = convert(ann, "max", IMAGES, fold=fold)
        first = error_breakdown(ann, snn, IMAGES, 4).layers["stem.2"]
        assert first.inherited.mean_abs < 1e-6 * first.signal


def test_batches_and_a_tensor_give_the_same_table():
    ann = network()
    snn = convert(ann, "max", IMAGES)
    whole = error_breakdown(ann, snn, IMAGES, 3).to_dict()
    for form in ([(IMAGES[:5], None), (IMAGES[5:], None)], iter(IMAGES.split(1))):
        parts = error_breakdown(ann, snn, form, 3).to_dict()
        assert parts["images"] == 12
        for name, layer in whole["layers"].items():
            for kind in (*KINDS, "total"):
                noise = 1e-7  # of fp32 sums in another order
                assert parts["layers"][name][kind] == pytest.approx(layer[kind], rel=1e-5, abs=noise)


def test_the_table_is_plain_json():
    ann = network(0, "quant_clip")
    table = error_breakdown(ann, convert(ann, "qcfs"), IMAGES, 2)
    again = json.loads(json.dumps(table.to_dict()))
    assert again["layers"]["stem.2"]["timing"] == {"mean": 0.0, "mean_abs": 0.0, "rms": 0.0}
    assert again["time_steps"] == 2


def test_words_name_the_worst_layer_its_worst_error_and_a_remedy():
    ann = network()
    snn = convert(ann, "max", IMAGES, v0=0.5)
    snn.neurons["blocks.1.2"].theta.mul_(0.05)
    table = error_breakdown(ann, snn, IMAGES, 32)
    words = table.words()
    assert "layer `blocks.1.2` adds the most error" in words
    assert "by clipping" in words
    assert "What helps against clipping: a larger threshold" in words
    snn.neurons["blocks.1.2"].theta.mul_(20 * 30)
    words = error_breakdown(ann, snn, IMAGES, 2).words()
    assert "layer `blocks.1.2` adds the most error" in words
    assert "What helps against quantization: more time-steps" in words


def test_clipping_that_the_ann_does_itself_is_not_blamed():
    ann = network(0, "clip", theta=0.3)
    table = error_breakdown(ann, convert(ann, "tcl"), IMAGES, 16)
    assert all(layer.trained_clip for layer in table.layers.values())
    assert all("clipping" not in layer.own() for layer in table.layers.values())
    assert "the ANN was trained with the same bound" in table.words()
    other = convert(ann, "tcl")
    for neuron in other.neurons.values():
        neuron.theta.mul_(0.9)
    assert not any(layer.trained_clip for layer in error_breakdown(ann, other, IMAGES, 4).layers.values())


def test_a_network_that_says_nothing_has_nothing_to_lose():
    ann = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU())
    snn = convert(ann, "max", IMAGES)
    for layer in (ann[1], snn.layers.get_submodule("1")):
        layer.weight.data.zero_()
        layer.bias.data.fill_(-1)
    table = error_breakdown(ann, snn, IMAGES, 4)
    assert table.layers["2"].relative == 0
    assert "exactly what the ANN says" in table.words()


def test_networks_that_do_not_match_are_refused():
    snn = convert(network(), "max", IMAGES)
    with pytest.raises(InputError, match=r"the networks do not match: .*blocks\.0\.act1"):
        error_breakdown(resnet20(width=4, in_channels=1), snn, IMAGES)
    with pytest.raises(
        InputError, match=r"do not match: layer `stem\.2` has neurons \(\d+, 4, 8, 8\), the ANN's activation \(\d+, 8, 8, 8\)"
    ):
        error_breakdown(small_cnn(width=8), snn, IMAGES)


@pytest.mark.parametrize(
    ("images", "text"),
    [([], "no images"), (IMAGES[:0], "at least one image"), (IMAGES * torch.nan, "NaN"), ([(IMAGES.byte(), 0)], "images.float")],
)
def test_images_that_are_none_are_refused(images, text):
    ann = network()
    with pytest.raises(InputError, match=text):
        error_breakdown(ann, convert(ann, "max", IMAGES), images, 2)


def test_networks_may_be_of_two_types():
    ann = network()
    snn = convert(ann, "max", IMAGES)
    plain = error_breakdown(ann, snn, IMAGES, 3).layers["stem.2"].total.rms
    for two in ((copy.deepcopy(ann).double(), snn), (ann, copy.deepcopy(snn).double())):
        assert error_breakdown(*two, IMAGES, 3).layers["stem.2"].total.rms == pytest.approx(plain, rel=1e-4)


def test_error_of_a_layer_wants_numbers_of_one_shape_and_a_positive_threshold():
    one = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"z_ann \(2, 4\) must be of one shape"):
        split_error(one, one, torch.ones(2, 4), 1.0, 0.5, 4)
    with pytest.raises(InputError, match="theta holds 0"):
        split_error(one, one, one, 0.0, 0.5, 4)
