"""The integrate-and-fire neuron against twenty lines of NumPy, its charge balance, and what it refuses."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from micelab.exceptions import InputError
from micelab.neuron import IntegrateFire, fire, integrate_and_fire

cases = given(
    steps=st.integers(1, 40),
    theta=st.floats(0.05, 20),
    v0=st.floats(0, 1),
    scale=st.floats(0.01, 10),
    seed=st.integers(0, 999),
    signed=st.booleans(),
)


def drawn(*shape, scale=1.0, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


@cases
def test_neuron_equals_the_numpy_oracle_spike_for_spike(steps, theta, v0, scale, seed, signed):
    current = drawn(steps, 3, 5, scale=scale, seed=seed, dtype=torch.float64)
    spikes, residual = integrate_and_fire(current, torch.tensor(theta, dtype=torch.float64), v0, signed)
    expected, left = oracle.integrate_and_fire(current.numpy(), theta, v0, signed)
    np.testing.assert_array_equal(expected, spikes.numpy())
    np.testing.assert_array_equal(left, residual.numpy())


@cases
def test_charge_is_conserved_and_counts_stay_within_the_steps(steps, theta, v0, scale, seed, signed):
    current = drawn(steps, 4, 6, scale=scale, seed=seed)
    spikes, residual = integrate_and_fire(current, theta, v0, signed)
    count = spikes.sum(0)
    given_in, kept = theta * v0 + current.double().sum(0), theta * count.double() + residual.double()
    moved = theta + current.double().abs().sum(0)  # the charge that went through: what rounding is relative to
    assert float(((given_in - kept).abs() / moved).max()) < 1e-5
    assert int(count.min()) >= 0
    assert int(count.max()) <= steps
    assert set(spikes.unique().tolist()) <= ({-1.0, 0.0, 1.0} if signed else {0.0, 1.0})


def test_signed_neuron_takes_back_a_spike_only_after_it_has_fired():
    current = torch.tensor([[-1.0, 1.5], [-1.0, -2.0], [0.0, 0.0]])
    spikes, residual = integrate_and_fire(current, 1.0, v0=0.0, signed=True)
    assert spikes.T.tolist() == [[0, 0, 0], [1, -1, 0]]
    assert residual.tolist() == [-2.0, -0.5]


def test_plain_neuron_keeps_its_debt_where_the_signed_one_pays_it():
    current = torch.tensor([[2.0], [-3.0]])
    assert integrate_and_fire(current, 1.0, 0.0)[0].sum() == 1
    assert integrate_and_fire(current, 1.0, 0.0, signed=True)[0].sum() == 0


def test_theta_and_v0_of_a_channel_act_on_that_channel_only():
    current = drawn(7, 2, 3, 4, 4)
    theta, v0 = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.0, 0.5, 1.0])
    spikes, residual = integrate_and_fire(current, theta, v0)
    for channel in range(3):
        alone, left = integrate_and_fire(current[:, :, channel], theta[channel], v0[channel])
        assert torch.equal(alone, spikes[:, :, channel])
        assert torch.equal(left, residual[:, channel])


def test_channels_last_and_contiguous_memory_give_the_same_spikes():
    current = drawn(5 * 2, 3, 4, 4)
    last = current.contiguous(memory_format=torch.channels_last).unflatten(0, (5, 2))
    for a, b in zip(integrate_and_fire(current.unflatten(0, (5, 2)), 0.7), integrate_and_fire(last, 0.7), strict=True):
        assert torch.equal(a, b)


def test_the_callers_currents_stay_as_they_were_and_may_want_a_gradient():
    current = drawn(5, 2, 3).requires_grad_()
    before = current.detach().clone()
    spikes, _ = integrate_and_fire(current, 0.7)
    assert torch.equal(before, current.detach())
    assert not spikes.requires_grad


def test_layer_gives_theta_for_every_spike_and_keeps_its_numbers_in_the_state():
    layer = IntegrateFire(torch.tensor([0.5, 2.0]), v0=0.25)
    current = drawn(6, 3, 2, 4)
    spikes, _ = integrate_and_fire(current, torch.tensor([0.5, 2.0]), 0.25)
    assert torch.equal(spikes * torch.tensor([0.5, 2.0]).view(2, 1), layer(current))
    assert layer.state_dict().keys() == {"theta", "v0"}
    assert "channels=2" in repr(layer)
    assert "theta=2, v0=0.5, signed" in repr(IntegrateFire(2.0, signed=True))


def test_spikes_may_be_written_over_the_currents():
    current = drawn(6, 3, 2)
    expected, left = integrate_and_fire(current, 0.6)
    count, residual = fire(current, torch.tensor(0.6), 0.5, False, out=current, count=True)
    assert torch.equal(expected, current)
    assert torch.equal(left, residual)
    assert torch.equal(expected.sum(0), count)


@pytest.mark.parametrize(
    ("current", "theta", "text"),
    [
        (torch.zeros(0, 3), 1.0, "at least one time-step"),
        (torch.zeros(3), 1.0, r"must be \[T, N, ...\]"),
        (torch.zeros(2, 3, dtype=torch.int64), 1.0, "current.float()"),
        (torch.zeros(2, 3), 0.0, "theta holds 0"),
        (torch.zeros(2, 3), -1.5, "theta holds -1.5"),
        (torch.zeros(2, 3), float("nan"), "theta holds nan"),
        (torch.zeros(2, 3, 2), torch.tensor([1.0, float("inf")]), "theta holds inf"),
        (torch.zeros(2, 3, 4), torch.ones(5), r"shape \(5,\) does not fit"),
        (torch.zeros(2, 3), torch.ones(3), "does not fit"),
    ],
)
def test_what_no_neuron_can_take_is_refused_in_words(current, theta, text):
    with pytest.raises(InputError, match=text):
        integrate_and_fire(current, theta)


def test_a_bad_threshold_names_its_layer():
    with pytest.raises(InputError, match=r"layer `stem\.act`: theta holds -1"):
        IntegrateFire(-1.0, layer="stem.act")
