"""Rival methods: their neurons against NumPy and a loop over the steps, their biases, and what every method must keep."""

import copy

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import micelab
from micelab import methods
from micelab.convert import convert
from micelab.errors import KINDS, error_breakdown, split_error
from micelab.exceptions import ConversionError, InputError
from micelab.graph import activations, trace
from micelab.graph.runner import InputCollector
from micelab.methods.calibration import rate_bias, step_biases
from micelab.methods.rivals import Accumulating, ChannelBias, Muting, StepBias, shifted_start
from micelab.metrics import accuracy_curve, energy, lost_points
from micelab.neuron import fire
from micelab.report.compare import compare, fitting

IMAGES = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 10
TRAINED_WITH = {name: method.trained_with for name, method in methods.METHODS.items()}
RIVALS = ("half_start", "calibrated", "signed", "srp", "cos", "step_bias", "noise", "accumulate")


def network(activation="quant_clip", **options):
    torch.manual_seed(1)
    ann = micelab.small_cnn(activation=activation, width=8, theta=1.0, **options)
    with torch.no_grad():
        ann.train()(IMAGES)
    return ann.eval()


def converted(method, **options):
    ann = network(TRAINED_WITH[method])
    return ann, convert(ann, method, IMAGES, **options)


def currents(steps, neurons=4000, seed=0):
    """Currents on a grid of 1/64, so that every sum is exact."""
    return torch.randint(-80, 96, (steps, 1, neurons), generator=torch.Generator().manual_seed(seed)) / 64


def inputs_of(ann):
    collector = InputCollector(trace(ann))
    with torch.no_grad():
        collector.run(IMAGES)
    return collector


# neurons, one layer


@given(seed=st.integers(0, 999), theta=st.sampled_from([0.5, 1.0, 2.0]), steps=st.integers(1, 9))
def test_muted_neurons_never_fire_and_the_others_fire_as_if_nothing_had_been(seed, theta, steps):
    current = currents(4 + steps, 200, seed)
    sent = Muting(theta, 0.5)(current)[4:]
    spikes, silent = oracle.muted(current.numpy(), theta, 0.5, hidden=4)
    np.testing.assert_array_equal(sent.numpy(), theta * spikes)
    assert not sent[:, torch.from_numpy(silent)].any()
    assert 0 < silent.mean() < 1


@given(seed=st.integers(0, 999), theta=st.sampled_from([0.5, 1.0, 2.0]), v0=st.sampled_from([0.0, 0.25, 0.5]))
def test_shifted_starts_equal_the_numpy_oracle(seed, theta, v0):
    current = currents(4, 100, seed)
    spikes, left = oracle.integrate_and_fire(current.numpy(), theta, v0)
    found = shifted_start(current, torch.from_numpy(theta * spikes), torch.from_numpy(left), theta, v0)
    expected = [oracle.shifted_start(neuron, theta, v0) for neuron in current[:, 0].T.numpy()]
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5)


@given(seed=st.integers(0, 999), theta=st.sampled_from([0.5, 1.0, 2.0]))
def test_a_shifted_start_sends_fewer_spikes_from_below_zero_more_from_above_theta_and_else_the_same(seed, theta):
    current = currents(4, 300, seed)
    spikes, left = (torch.from_numpy(a) for a in oracle.integrate_and_fire(current.numpy(), theta, 0.5))
    start = shifted_start(current, theta * spikes, left, theta, 0.5)
    again, _ = fire(current, torch.tensor(theta), start, False, torch.empty_like(current), count=True)
    count = spikes.sum(0)
    down, up = (left < 0) & (count > 0), (left >= theta) & (count < 4)
    assert (again[down] < count[down]).all()
    assert (again[up] > count[up]).all()
    assert torch.equal(again[~down & ~up], count[~down & ~up])
    # counted from the start they were given, neurons come nearer to a potential in [0, theta)
    kept = 0.5 * theta + current.sum(0) - theta * again
    outside, before = (torch.relu(-v) + torch.relu(v - theta) for v in (kept, left))
    single = (down | up) & ((start - 0.5).abs() == 1)
    assert (outside[single] <= before[single]).all()
    assert single.sum() > 0.5 * (down | up).sum()


def test_accumulating_neurons_fire_the_staircase_of_their_mean_current_whatever_its_order():
    current = currents(8)
    neuron = Accumulating(0.5, 0.5)
    count = (neuron(current) / 0.5).sum(0)
    expected = oracle.staircase(current.numpy().mean(0), 0.5, 0.5, 8) * 8 / 0.5
    np.testing.assert_array_equal(count.numpy(), expected)
    assert torch.equal(count, (neuron(current.flip(0)) / 0.5).sum(0))


def test_a_bias_is_part_of_the_current_in_every_step_or_in_its_own():
    current, theta = torch.zeros(4, 2, 3), 1.0
    constant, stepwise = ChannelBias(theta, 0.0), StepBias(theta, 0.0)
    constant.bias = torch.tensor([0.0, 0.5, 1.0])
    stepwise.bias = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert constant(current)[:, 0].T.tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]
    assert stepwise(current)[:, 0].T.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]  # none after its last step
    assert stepwise(current[:1])[:, 0].tolist() == [[1, 0, 0]]
    assert not current.any()


# whole networks, against loops


class StepwiseMuting(torch.nn.Module):
    """A muting neuron that sees one step at a time, as the authors' does."""

    def __init__(self, neuron):
        super().__init__()
        self.neuron, self.t = neuron, 0

    def forward(self, current):
        theta = self.neuron.theta
        if self.t in (0, 4):
            if self.t == 4:
                self.live = (self.v > 1e-3 * theta).float()
            self.v = torch.zeros_like(current) + 0.5 * theta
        self.v = self.v + current
        spike = (self.v >= theta).float()
        self.v = self.v - theta * spike
        self.t += 1
        return theta * (spike * self.live if self.t > 4 else spike)


def on_a_grid(snn):
    snn.layers.normalize.mean.fill_(0.5)
    snn.layers.normalize.std.fill_(0.25)
    for tensor in (*snn.layers.parameters(), *snn.layers.buffers()):
        tensor.copy_((tensor * 64).round() / 64)
    for neuron in snn.neurons.values():
        neuron.theta.fill_(0.5)
    return snn


def test_srp_equals_a_loop_in_which_the_whole_network_runs_its_hidden_steps_first():
    snn, steps = on_a_grid(converted("srp")[1]), 6
    images = IMAGES.mul(16).round() / 16
    layers = copy.deepcopy(snn.layers)
    for name, neuron in activations(layers).items():
        layers.add_submodule(name, StepwiseMuting(neuron))
    with torch.no_grad():
        outputs = torch.stack([layers(images) for _ in range(4 + steps)])[4:]
    run = snn.simulate(images, steps)
    mean = outputs.cumsum(0) / torch.arange(1, steps + 1).view(-1, 1, 1)
    torch.testing.assert_close(run.logits, mean)
    silent = [~layers.get_submodule(name).live.bool() for name in run.layers]
    assert all(not layer.count[mute].any() for layer, mute in zip(run.layers.values(), silent, strict=True))
    assert any(layer.hidden[mute].any() for layer, mute in zip(run.layers.values(), silent, strict=True))


def test_cos_shifts_each_layer_by_what_its_own_first_four_steps_would_have_done():
    ann, snn = converted("cos")
    plain = convert(ann, "qcfs")
    run, before = snn.simulate(IMAGES, 8, spikes=True), plain.simulate(IMAGES, 4)
    first = run.layers["stem.2"]  # its current is constant: nothing to mend
    assert torch.equal(first.v0, torch.full_like(first.v0, 0.5))
    assert torch.equal(first.hidden, before.layers["stem.2"].count)
    shifts = torch.stack([(layer.v0 - 0.5).abs().amax() for layer in list(run.layers.values())[1:]])
    assert (shifts >= 1).all()
    for layer in run.layers.values():
        moved = (layer.v0 - 0.5).abs()
        assert ((moved == 0) | (moved > 0.999)).all()


@pytest.mark.parametrize("method", ["srp", "cos"])
def test_fewer_steps_than_hidden_ones_are_the_beginning_of_a_longer_run(method):
    snn = converted(method)[1]
    long, short = snn.simulate(IMAGES, 8), snn.simulate(IMAGES, 2)
    torch.testing.assert_close(long.logits[:2], short.logits)
    longer = snn.simulate(IMAGES, 8, spikes=True)
    for name, layer in short.layers.items():
        assert torch.equal(layer.count, longer.layers[name].spikes[:2].sum(0).to(layer.count))
        assert torch.equal(layer.v0, longer.layers[name].v0)


# what every method must keep


@pytest.mark.parametrize("method", methods.METHODS)
def test_counts_alone_are_those_of_the_whole_record_in_a_fraction_of_its_memory(method):
    _, snn = converted(method, time_steps=4)
    full, counts = snn.simulate(IMAGES, 3), snn.simulate(IMAGES, 3, record="counts", chunk=5)
    assert torch.equal(full.logits, counts.logits)
    for name, layer in counts.layers.items():
        assert torch.equal(full.layers[name].count, layer.count)
        assert torch.equal(full.layers[name].rate, layer.rate)
        assert layer.count.nbytes == full.layers[name].residual.nbytes // 4
        assert "membrane" not in layer.tensors()
        with pytest.raises(InputError, match="spike counts alone were recorded: simulate with record=True"):
            layer.mean_current  # noqa: B018
    assert set(next(iter(counts.to_dict()["layers"].values()))) == {"theta", "v0", "spike_rate"}
    spikes = snn.simulate(IMAGES, 3, record="counts", spikes=True).layers
    assert all(torch.equal(layer.spikes.sum(0), layer.count.long()) for layer in spikes.values())


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_four_terms_sum_and_charge_is_kept_for_every_method(method, steps):
    ann, snn = converted(method, time_steps=4)
    inputs, run = inputs_of(ann).inputs, snn.simulate(IMAGES, steps)
    for name, layer in run.layers.items():
        terms = split_error(layer.rate, layer.mean_current, inputs[name], layer.theta, layer.v0, steps)
        torch.testing.assert_close(sum(terms[kind] for kind in KINDS), layer.rate - inputs[name].relu(), rtol=1e-5, atol=1e-5)
        kept = layer.theta * layer.count + layer.residual
        torch.testing.assert_close(kept, layer.theta * layer.v0 + steps * layer.mean_current, rtol=1e-4, atol=1e-4)
    table = error_breakdown(ann, snn, IMAGES, steps)
    for errors in table.layers.values():
        assert sum(getattr(errors, kind).mean for kind in KINDS) == pytest.approx(errors.total.mean, abs=1e-6)
    first = table.layers["stem.2"].timing.mean_abs
    if method not in ("srp", "step_bias"):  # a muted neuron is silent whatever its current, a step's bias comes in steps
        assert first == 0
    if steps == 1 and method != "srp":
        assert all(errors.timing.mean_abs == 0 for errors in table.layers.values())


@pytest.mark.parametrize("method", methods.METHODS)
def test_chunks_copies_states_and_files_give_the_same_run(method, tmp_path):
    snn = converted(method)[1]
    whole = snn.simulate(IMAGES, 5, spikes=True)
    there = convert(network(TRAINED_WITH[method]), method, torch.rand_like(IMAGES))
    there.load_state_dict(snn.state_dict())
    loaded = micelab.load(micelab.save(snn, tmp_path / "snn"))
    assert (loaded.method, loaded.hidden_steps, loaded.turns) == (snn.method, snn.hidden_steps, snn.turns)
    assert all(type(loaded.neurons[name]) is type(neuron) for name, neuron in snn.neurons.items())
    for other, chunk in ((snn, 3), (copy.deepcopy(snn), None), (there, None), (loaded, 7)):
        run = other.simulate(IMAGES, 5, spikes=True, chunk=chunk)
        torch.testing.assert_close(run.logits, whole.logits)
        for name, layer in whole.layers.items():
            for key, (tensor, _) in layer.tensors().items():
                torch.testing.assert_close(getattr(run.layers[name], key), tensor)
    logits = copy.deepcopy(snn).double().simulate(IMAGES, 5).logits
    assert logits.dtype == torch.float64


@pytest.mark.parametrize("method", [name for name in RIVALS if name != "calibrated"])
def test_a_network_without_bounds_is_refused_by_layer_and_remedy(method):
    with pytest.raises(ConversionError, match=r'layer `stem\.2` .*train with activation="'):
        convert(network("relu"), method, IMAGES)


def test_noise_wants_a_network_that_was_trained_with_noise():
    with pytest.raises(ConversionError, match=r"layer `stem\.2` is QuantClip, which knows no conversion noise"):
        convert(network("quant_clip"), "noise")


@pytest.mark.parametrize("method", ["calibrated", "step_bias"])
def test_methods_with_biases_want_calibration_images(method):
    with pytest.raises(InputError, match=f"method '{method}' sets .* from data: give calibration=images"):
        convert(network(TRAINED_WITH[method]), method)


@pytest.mark.parametrize(
    ("method", "words", "true"),
    [("cos", "T + 4", (5, 8)), ("srp", "T + 4", (5, 8)), ("signed", "T", (1, 4)), ("accumulate", "4 T", (4, 16))],
)
def test_tables_count_the_true_steps(method, words, true):
    snn = converted(method)[1]
    curve = accuracy_curve(snn, [(IMAGES, LABELS)], (1, 4))
    assert (curve.true_words, curve.true_steps) == (words, true)
    assert tuple(snn.true_steps(t) for t in (1, 4)) == true
    assert curve.within(4) == (curve.at(1) if true[0] <= 4 < true[1] else curve.at(4) if true[1] <= 4 else None)


def test_layers_in_parallel_wait_for_each_other_only_once():
    ann = micelab.resnet20(width=4, activation="quant_clip")
    assert convert(ann, "accumulate").turns == 19


def test_the_upper_bound_has_no_timing_error_and_is_measured_at_each_number_of_steps():
    ann, snn = converted("accumulate")
    assert all(layer.timing.mean_abs == 0 for layer in error_breakdown(ann, snn, IMAGES, 3).layers.values())
    loader = [(IMAGES, LABELS)]
    assert lost_points(ann, snn, loader, 3).timing == 0
    curve = accuracy_curve(snn, loader, (1, 3, 8))
    assert curve.accuracy == tuple(accuracy_curve(snn, loader, (t,)).at(t) for t in (1, 3, 8))


def test_energy_counts_the_spikes_of_hidden_steps_and_those_taken_back():
    srp, signed = converted("srp")[1], converted("signed")[1]
    run = srp.simulate(IMAGES, 3)
    spent = sum(float((layer.count + layer.hidden).sum()) for layer in run.layers.values()) / len(IMAGES)
    assert energy(srp, IMAGES, 3).spikes == pytest.approx(spent)
    run = signed.simulate(IMAGES, 8, spikes=True)
    assert any((layer.spikes < 0).any() for layer in run.layers.values())
    spent = sum(float(layer.spikes.abs().sum()) for layer in run.layers.values()) / len(IMAGES)
    assert energy(signed, IMAGES, 8).spikes == pytest.approx(spent)


# biases


def test_step_bias_brings_the_mean_of_every_channel_to_the_anns_at_every_step():
    ann, snn = converted("step_bias", time_steps=6)
    collector, run = inputs_of(ann), snn.simulate(IMAGES, 6, spikes=True)
    before = convert(ann, "qcfs").simulate(IMAGES, 6, spikes=True)
    for name, layer in run.layers.items():
        target = oracle.channel_means(collector.activations[name](collector.inputs[name]).detach())
        theta, errors = float(layer.theta), []
        for spikes in (layer.spikes, before.layers[name].spikes):
            errors.append(max(np.abs(theta * oracle.channel_means(step.float()) - target).max() for step in spikes))
        step = theta / (20 * layer.count[0, 0].numel())  # what one spike more or less changes
        assert errors[0] <= step * (1 + 1e-5)  # means of fp32 numbers
        assert errors[0] < 0.1 * errors[1]


def test_biases_for_many_steps_begin_as_those_for_few_and_end_with_them():
    few, many = (converted("step_bias", time_steps=t)[1] for t in (3, 6))
    for name, neuron in few.neurons.items():
        assert neuron.bias.shape == (3, len(many.neurons[name].bias[0]))
        torch.testing.assert_close(many.neurons[name].bias[:3], neuron.bias)
    torch.testing.assert_close(few.simulate(IMAGES, 8).logits[:3], many.simulate(IMAGES, 8).logits[:3])
    for neuron in many.neurons.values():
        neuron.bias[3:] = 0
    torch.testing.assert_close(few.simulate(IMAGES, 8).logits, many.simulate(IMAGES, 8).logits)


def test_biases_of_steps_follow_the_membrane_that_earlier_biases_left():
    current = currents(5, 600).reshape(5, 100, 2, 3)
    target = torch.tensor([0.2, 0.6])
    bias = step_biases(current, torch.tensor(1.0), torch.tensor(0.5), target)
    spikes, _ = oracle.integrate_and_fire(current.numpy() + bias.numpy()[:, None, :, None], 1.0, 0.5)
    for step in spikes:
        np.testing.assert_allclose(oracle.channel_means(step), target, atol=0.02)  # currents lie on a grid and come in groups


def test_calibrated_biases_bring_the_mean_rate_of_every_channel_near_the_anns():
    ann, snn = converted("calibrated", time_steps=4)
    plain, collector = convert(ann, "mse", IMAGES, time_steps=4), inputs_of(ann)
    for name, layer in snn.simulate(IMAGES, 4).layers.items():
        target = oracle.channel_means(collector.activations[name](collector.inputs[name]))
        errors = [oracle.channel_means(rate) - target for rate in (layer.rate, plain.simulate(IMAGES, 4).layers[name].rate)]
        assert np.abs(errors[0]).mean() < 0.5 * np.abs(errors[1]).mean()


def test_with_rounds_enough_the_mean_rate_of_every_channel_is_the_anns():
    current = torch.randn(4, 400, 3, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0.1, 0.4, 0.8])
    bias = rate_bias(current, torch.tensor(1.0), torch.tensor(0.5), target, rounds=40)
    spikes, _ = oracle.integrate_and_fire(current.numpy() + bias.numpy()[:, None], 1.0, 0.5)
    np.testing.assert_allclose(oracle.channel_means(spikes.mean(0)), target, atol=1e-3)


# digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    data = micelab.load_data("digits")
    networks = {}
    for activation in ("relu", "quant_clip"):
        config = micelab.train.TrainConfig(activation=activation, epochs=12, lr=0.1, theta=2.0)
        networks[activation] = micelab.train.train(config, tmp_path_factory.mktemp(activation), data, progress=False)
    return compare(fitting(networks), data, time_steps=(1, 2, 4, 8), explain_at=4, error_images=32)


def test_on_digits_every_rival_works_and_those_against_timing_errors_beat_qcfs(digits):
    rows = digits.results
    assert set(rows) == set(methods.METHODS) - {"noise", "mice"}
    ann = rows["qcfs"].ann_accuracy
    assert ann > 0.9
    for name in ("half_start", "signed", "srp", "cos", "step_bias", "accumulate"):
        assert rows[name].curve.at(8) > ann - 0.05, name
    for name in ("signed", "cos", "accumulate"):
        assert rows[name].curve.at(4) >= rows["qcfs"].curve.at(4) - 0.01, name
    assert rows["calibrated"].curve.at(4) > rows["mse"].curve.at(4)
    assert rows["accumulate"].points.timing == pytest.approx(0, abs=1e-6)


def test_the_best_method_is_the_best_in_as_many_true_steps(digits):
    best = digits.best().curve
    assert best.method != "accumulate"
    assert best.within(4) == max(row.curve.within(4) or 0 for row in digits.results.values())
