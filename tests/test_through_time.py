"""The gradient of every spike: against automatic differentiation, in the compiled kernel and in the loop, and in networks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micelab.activation import over_channels, straight_through
from micelab.joint.through_time import spikes_through_time, time_gradient
from micelab.neuron import compiled


class Spike(torch.autograd.Function):
    """1 where u = v/theta reaches 1, with the gradient 1 where |u - 1| < 1/2."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 1).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * ((u - 1).abs() < 0.5)


def differentiated(current, log_theta, v0):
    """theta*s(t) step by step, left to autograd: slow, and obviously what is meant."""
    theta = over_channels(log_theta.exp(), current[0])
    v, out = over_channels(v0, current[0]) * theta, []
    for step in current:
        v = v + step
        sent = theta * Spike.apply(v / theta)
        v = v - sent
        out.append(sent)
    return torch.stack(out)


def gradients(function, current, log_theta, v0, grad):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (current, log_theta, v0)]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_near(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 70), st.floats(0.3, 2), st.floats(0, 1), st.integers(0, 1000), st.booleans())
def test_the_gradient_is_that_of_the_membrane_with_a_gradient_for_the_spike(steps, neurons, theta, v0, seed, loop):
    generator = torch.Generator().manual_seed(seed)
    current = 0.7 * torch.randn(steps, 2, neurons, generator=generator)
    grad = torch.randn(steps, 2, neurons, generator=generator)
    given = current, torch.tensor(theta).log(), torch.tensor(v0), grad
    with pytest.MonkeyPatch.context() as patch:
        if loop:
            patch.setattr(compiled, "time_gradient", lambda *_: None)
        assert_near(gradients(spikes_through_time, *given), gradients(differentiated, *given))


@pytest.mark.parametrize("start", ["scalar", "channel"])
@pytest.mark.parametrize("bound", ["scalar", "channel"])
def test_a_bound_and_a_start_for_each_channel_have_a_gradient_each(bound, start):
    torch.manual_seed(0)
    current, grad = 0.7 * torch.randn(4, 3, 5, 6, 6), torch.randn(4, 3, 5, 6, 6)
    log_theta = torch.linspace(-0.5, 0.3, 5) if bound == "channel" else torch.tensor(-0.2)
    v0 = torch.linspace(0.1, 0.9, 5) if start == "channel" else torch.tensor(0.4)
    assert_near(*(gradients(function, current, log_theta, v0, grad) for function in (spikes_through_time, differentiated)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "same at every step", "mean over the steps"])
def test_the_kernel_gives_the_loops_gradient(layout, dtype, threads, monkeypatch):
    if compiled.shared_library() is None:
        pytest.skip("no C compiler is here")
    torch.manual_seed(1)
    shape = (4, 3, 8, 20, 20)
    current, grad = (0.7 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    if layout == "channels_last":
        current = current.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    if layout == "same at every step":
        current = current[:1].expand(shape)
    if layout == "mean over the steps":
        grad = grad[:1].expand(shape)
    theta, v0 = torch.tensor(0.8), torch.tensor(0.3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fused = compiled.time_gradient(grad, current, theta, v0)
    finally:
        torch.set_num_threads(before)
    assert fused is not None
    monkeypatch.setattr(compiled, "time_gradient", lambda *_: None)
    of_current, *sums = time_gradient(grad, current, theta, v0)
    assert torch.equal(fused[0], of_current)
    for one, other in zip(fused[1:], sums, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


def test_more_steps_than_the_kernel_has_room_for_are_the_loops():
    current, grad = torch.rand(300, 1, 20), torch.rand(300, 1, 20)
    assert compiled.time_gradient(grad, current, torch.tensor(1.0), torch.tensor(0.5)) is None
    given = current, torch.tensor(0.0), torch.tensor(0.5), grad
    assert_near(*(gradients(function, *given) for function in (spikes_through_time, differentiated)))


def test_at_one_step_it_is_the_straight_through_gradient():
    torch.manual_seed(2)
    z, grad, log_theta, half = torch.randn(1, 4, 50), torch.randn(1, 4, 50), torch.tensor(0.1), torch.tensor(0.5)
    found = gradients(spikes_through_time, z, log_theta, half, grad)
    rate = found[0][0]
    wanted = gradients(lambda z, log_theta, v0: straight_through(z, rate, log_theta, v0, 1), z[0], log_theta, half, grad[0])
    torch.testing.assert_close(found[1][0], wanted[1])
    torch.testing.assert_close(found[2], wanted[2])
