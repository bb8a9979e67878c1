"""Activations against 20 lines of NumPy, and their gradients against the formula."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from micelab.activation import QuantClip, TrainableClip, clip, make_activation, quantize
from micelab.exceptions import InputError
from micelab.neuron.layout import over_channels


def numpy_clip(z, theta):
    return np.minimum(np.maximum(z, 0), theta)


def numpy_quantize(z, theta, levels, v0=0.5):
    return theta * np.clip(np.floor(levels * z / theta + v0), 0, levels) / levels


def drawn(shape=(6, 3, 5, 4), seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


@given(theta=st.floats(0.05, 20), levels=st.integers(1, 64), v0=st.floats(0, 1), seed=st.integers(0, 99))
def test_clip_and_staircase_equal_the_numpy_oracle(theta, levels, v0, seed):
    z = drawn(seed=seed)
    np.testing.assert_allclose(clip(z, theta).numpy(), numpy_clip(z.numpy(), theta), rtol=1e-12)
    np.testing.assert_allclose(quantize(z, theta, levels, v0).numpy(), numpy_quantize(z.numpy(), theta, levels, v0), rtol=1e-9)


@given(theta=st.floats(0.05, 20), levels=st.integers(1, 64), seed=st.integers(0, 99))
def test_the_staircase_stays_within_half_a_step_of_the_clip(theta, levels, seed):
    z = drawn(seed=seed)
    away = (quantize(z, theta, levels) - clip(z, theta)).abs().max().item()
    assert away <= theta / levels / 2 * (1 + 1e-9)


def test_a_bound_for_each_channel_acts_on_its_channel_only():
    z, theta = drawn(), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for channel in range(3):
        assert torch.equal(clip(z, theta)[:, channel], clip(z, theta[channel])[:, channel])
        assert torch.equal(quantize(z, theta, 4)[:, channel], quantize(z, theta[channel], 4)[:, channel])


@pytest.mark.parametrize("channels", [None, 3])
def test_the_trainable_clip_has_the_gradient_that_numbers_give(channels):
    layer = TrainableClip(theta=1.3, channels=channels).double()
    z = drawn().requires_grad_()

    def run(z, log_theta):
        return torch.func.functional_call(layer, {"log_theta": log_theta}, (z,))

    assert torch.autograd.gradcheck(run, (z, layer.log_theta.detach().clone().requires_grad_()))


@pytest.mark.parametrize("channels", [None, 3])
def test_the_quantized_clip_has_the_straight_through_gradient_of_the_formula(channels):
    levels = 4
    layer = QuantClip(levels=levels, theta=1.3, channels=channels).double()
    z, weight = drawn().requires_grad_(), drawn(seed=1)
    (layer(z) * weight).sum().backward()

    theta = over_channels(layer.theta.detach(), z)
    inside = ((z > 0) & (z < theta)).double()
    y = torch.from_numpy(numpy_quantize(z.detach().numpy(), theta.numpy(), levels))
    # y = theta * u(z/theta), floor passing its gradient: dy/dz = inside, dy/dtheta = (y - inside*z)/theta, dtheta/dlog = theta
    of_log_theta = weight * (y - inside * z.detach())
    assert torch.equal(z.grad, weight * inside)
    expected = of_log_theta.sum() if channels is None else of_log_theta.sum((0, 2, 3))
    torch.testing.assert_close(layer.log_theta.grad, expected)


def test_the_quantized_clip_has_the_gradient_of_autograd_with_a_detached_floor():
    theta, levels = torch.tensor(1.3, dtype=torch.float64, requires_grad=True), 8
    z = drawn().requires_grad_()
    u = levels * z / theta + 0.5
    floored = u - 0.5 + (torch.floor(u) - u + 0.5).detach()
    gate = ((z > 0) & (z < theta)).double()
    stairs = torch.where(gate.bool(), floored, torch.floor(u).clamp(0, levels).detach())
    (theta * stairs / levels).sum().backward()

    layer = QuantClip(levels=levels, theta=1.3).double()
    z2 = z.detach().clone().requires_grad_()
    layer(z2).sum().backward()
    torch.testing.assert_close(z2.grad, z.grad)
    torch.testing.assert_close(layer.log_theta.grad, theta.grad * theta.detach())


@pytest.mark.parametrize("make", [TrainableClip, lambda theta: QuantClip(4, theta)])
@pytest.mark.parametrize("direction", [-1, 1])
def test_theta_stays_above_zero_whatever_pulls_at_it(make, direction):
    layer = make(theta=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        (-direction * layer(torch.full((4, 2), 3.0)).sum()).backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
    assert layer.theta.item() > 0
    assert direction * (layer.theta.item() - 0.5) > 0


def test_what_comes_in_is_not_changed():
    z = drawn()
    before = z.clone()
    for layer in (TrainableClip(1.0).double(), QuantClip(4, 1.0).double()):
        layer(z)
    assert torch.equal(z, before)


def test_activations_come_by_name():
    assert isinstance(make_activation("relu"), nn.ReLU)
    assert type(make_activation("clip", theta=3.0)) is TrainableClip
    assert type(make_activation("quant_clip", levels=None)) is TrainableClip
    assert make_activation("quant_clip", levels=16).levels == 16
    assert "theta=4, levels=8" in repr(QuantClip())
    assert "channels=5" in repr(TrainableClip(channels=5))


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_not_above_zero_is_refused(theta):
    with pytest.raises(InputError, match="must be a finite number above 0"):
        TrainableClip(theta)
    with pytest.raises(InputError, match="must be a finite number above 0"):
        QuantClip(8, theta)


@pytest.mark.parametrize("levels", [0, -1, 2.5, None])
def test_levels_that_are_no_positive_integer_are_refused(levels):
    with pytest.raises(InputError, match="integer of at least 1"):
        QuantClip(levels)


def test_an_unknown_activation_is_answered_with_the_known_ones():
    known = r"choose 'relu', 'clip', 'quant_clip', 'noisy_quant_clip', 'spike_clip'"
    with pytest.raises(InputError, match=f"'gelu' is unknown: {known}"):
        make_activation("gelu")


def test_a_bound_that_does_not_fit_the_channels_names_both_shapes():
    with pytest.raises(InputError, match=r"\(4,\) does not fit a tensor of shape \(6, 3, 5, 4\)"):
        clip(drawn(), torch.ones(4))
    with pytest.raises(InputError, match="one value per channel"):
        QuantClip(channels=4)(drawn())


def test_a_staircase_without_levels_is_refused():
    with pytest.raises(InputError, match="levels is 0"):
        quantize(torch.rand(3), 1.0, 0)
