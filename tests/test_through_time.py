"""The gradient of every spike: against automatic differentiation, in the compiled kernel and in the loop, and in networks."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import micelab
from micelab.activation import straight_through
from micelab.joint import SpikesInTheLoop, SpikesThroughTime, convolutions, prepare
from micelab.joint import normed as together
from micelab.joint.normed import StraightThrough, ThroughTime, statistics, suits
from micelab.joint.through_time import spikes_through_time, time_gradient
from micelab.network.spike_convolutions import Way
from micelab.neuron import compiled
from micelab.neuron.layout import over_channels
from micelab.neuron.normed import NormedNeurons


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


LAYERS = {  # channels, outputs, size of the map, kernel, stride, padding
    "narrow": (16, 16, 12, 3, 1, 1),
    "twenty channels": (20, 48, 9, 3, 1, 1),
    "wide": (64, 32, 7, 3, 1, 1),
    "wider than it is listed at once": (96, 64, 5, 3, 1, 1),
    "one place": (32, 16, 10, 1, 1, 0),
    "without an edge": (32, 32, 17, 3, 1, 0),
    "with a wide edge": (16, 32, 6, 3, 1, 2),
    "many images of one place": (32, 32, 3, 3, 1, 0),
    "by twos": (16, 32, 12, 3, 2, 1),
    "one place by twos": (16, 32, 12, 1, 2, 0),
    "a large kernel": (32, 32, 9, 5, 1, 2),
    "an edge around one place": (32, 32, 6, 1, 1, 1),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_convolution_that_follows_the_spikes_has_the_gradient_of_a_dense_one(kind, dtype, threads):
    if compiled.shared_library() is None:
        pytest.skip("no C compiler is here")
    torch.manual_seed(3)
    channels, outputs, size, *shape = LAYERS[kind]
    layer, theta = (
        nn.Conv2d(channels, outputs, *shape),
        torch.linspace(0.5, 2, channels) if kind == "wide" else torch.tensor(0.75),
    )
    reference = copy.deepcopy(layer).double()
    spikes = (over_channels(theta, torch.empty(5, channels, 1, 1)) * (torch.rand(5, channels, size, size) < 0.3)).to(dtype)
    theta = theta.to(dtype).float()  # what bf16 spikes are
    spikes, dense = spikes.requires_grad_(), spikes.detach().double().requires_grad_()
    expected = reference(dense)
    grad = torch.randn_like(expected).to(dtype)
    expected.backward(grad.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert convolutions.suits(layer, spikes) or dtype == torch.bfloat16
        out = convolutions.convolve(layer, spikes, theta)
        out.backward(grad)
    finally:
        torch.set_num_threads(before)
    assert out.dtype == spikes.grad.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    pairs = (out, expected), (spikes.grad, dense.grad), (layer.weight.grad, reference.weight.grad)
    for found, wanted in (*pairs, (layer.bias.grad, reference.bias.grad)):
        assert found.shape == wanted.shape
        assert (found - wanted).norm() < 2 * rounding * wanted.norm()


@pytest.mark.parametrize("kind", [SpikesThroughTime, SpikesInTheLoop])
def test_whole_passes_that_follow_the_spikes_are_the_dense_ones(kind, monkeypatch):
    if compiled.shared_library() is None:
        pytest.skip("no C compiler is here")
    net = on_few_bits()
    images, found, asked, suits = (torch.rand(6, 1, 10, 10) * 64).round() / 64, [], [], convolutions.suits
    for follows in (True, False):

        def judged(layer, spikes, follows=follows):
            asked.append((layer.in_channels, suits(layer, spikes)))
            return follows and asked[-1][1]

        monkeypatch.setattr(convolutions, "suits", judged)
        net.zero_grad()
        logits, _ = kind(net)(images, time_steps=4)
        logits.square().sum().backward()
        found.append([logits.detach(), *(parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None)])
    assert asked == 2 * [(16, True), (16, True), (32, True), (32, True)]
    assert torch.equal(found[0][0], found[1][0])
    assert float(found[0][0].abs().max()) > 0
    assert_near(*found)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32, eps=0))
        self.activation = micelab.QuantClip(levels=4, theta=1.0)

    def forward(self, x):
        return self.activation(self.layers(x) + x)


def on_few_bits():
    """A network for T = 4 whose numbers have few bits, so that no current depends on the order of its sum."""
    torch.manual_seed(4)
    layers = []
    for channels, outputs in ((1, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(channels, outputs, 3, 1 + (outputs > channels > 1), 1, bias=channels != 16)]
        layers += [nn.BatchNorm2d(outputs, eps=0), micelab.QuantClip(levels=4, theta=1.0)]
    net = prepare(nn.Sequential(*layers, Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)), 4).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.endswith("log_theta"):
                parameter.copy_((parameter * 64).round() / 64)
    return net


@pytest.mark.parametrize("more", [["conv", "norm"], ["norm"], ["conv"]], ids=" ".join)
@pytest.mark.parametrize("kind", [SpikesThroughTime, SpikesInTheLoop])
def test_layers_may_follow_each_other_without_neurons_between(kind, more):
    torch.manual_seed(5)
    made = {"conv": lambda: nn.Conv2d(32, 32, 1, bias=False), "norm": lambda: nn.BatchNorm2d(32)}
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)]
    first = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), micelab.QuantClip(4, 1.0), made["conv"](), made["norm"]()]
    net = prepare(nn.Sequential(*first, *(made[layer]() for layer in more), micelab.QuantClip(4, 1.0), *head), 2).train()
    images, found, before = torch.rand(4, 3, 8, 10), [], copy.deepcopy(net.state_dict())
    for follows in (True, False):
        net.load_state_dict(before)
        net.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if not follows:
                patch.setattr(convolutions, "suits", lambda *_: False)
            logits, _ = kind(net)(images, 2)
            logits.square().sum().backward()
        found.append(logits.detach())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.02)  # spikes flip


class Branches(nn.Module):
    """A sum of what follows the spikes, whose channels come last in memory, and a dilated convolution, where they do not."""

    def __init__(self):
        super().__init__()
        for name, layer in (("dilated", nn.Conv2d(32, 64, 3, padding=2, dilation=2)), ("again", nn.Conv2d(64, 64, 3, padding=1))):
            self.add_module(name, layer)
        self.stem, self.aside = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=2, dilation=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(64) for _ in range(3))
        self.activations = nn.ModuleList(micelab.QuantClip(4, 1.0) for _ in range(3))
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = self.activations[0](self.stem(x))
        main = self.norms[1](self.again(self.activations[1](self.norms[0](self.dilated(x)))))
        return self.head(self.activations[2](main + self.norms[2](self.aside(x))).mean((2, 3)))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", [SpikesThroughTime, SpikesInTheLoop])
def test_one_image_has_the_gradient_of_a_batch(kind, steps):
    """torch's batch-norm gives others where the batch of one has a stride that no batch has."""
    torch.manual_seed(0)
    net = prepare(Branches().eval(), steps).eval()
    kind(net)(torch.rand(1, 3, 8, 8), steps)[0].square().sum().backward()
    torch.testing.assert_close(net.norms[1].bias.grad, net.norms[2].bias.grad)
    assert float(net.norms[1].bias.grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", [SpikesThroughTime, SpikesInTheLoop])
def test_a_copy_of_a_pass_is_one_of_its_own_network(kind):
    torch.manual_seed(0)
    whole = kind(prepare(micelab.small_cnn(activation="quant_clip"), 4).eval()).eval()
    images = torch.rand(4, 1, 8, 8)
    expected = whole(images, 4)[0]
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(other(images, 4)[0], expected)
        assert not other.training
        assert other.model is not whole.model


@pytest.mark.parametrize(
    ("kind", "steps", "watched"), [(SpikesThroughTime, 2, nn.Conv2d | nn.BatchNorm2d), (SpikesInTheLoop, 1, nn.Conv2d)]
)
def test_layers_that_someone_watches_are_called(kind, steps, watched):
    torch.manual_seed(0)
    model, seen = prepare(micelab.small_cnn(activation="quant_clip", width=16), 4).train(), []
    layers = [layer for layer in model.modules() if isinstance(layer, watched)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
        layer.register_full_backward_pre_hook(lambda layer, *_: seen.append(layer))
    kind(model)(torch.rand(4, 1, 8, 8), steps)[0].sum().backward()
    assert [sum(each is layer for each in seen) for layer in layers] == [2] * len(layers)


def test_convolutions_that_do_not_suit_are_dense(monkeypatch):
    if compiled.shared_library() is None:
        pytest.skip("no C compiler is here")
    monkeypatch.setitem(convolutions.WAYS, "bf16x3", Way(None, lambda: False))
    spikes, right = torch.zeros(2, 16, 8, 8), nn.Conv2d(16, 16, 3)
    assert convolutions.suits(right, spikes)
    assert convolutions.suits(right, spikes.bfloat16())
    for layer in (
        nn.Conv2d(16, 12, 3),
        nn.Conv2d(8, 16, 3),
        nn.Conv2d(16, 16, 3, groups=2),
        nn.Conv1d(16, 16, 3),
        nn.Linear(16, 16),
    ):
        assert not convolutions.suits(layer, spikes)
    assert not convolutions.suits(right, spikes.double())
    assert not convolutions.suits(right, spikes.to("meta"))
    monkeypatch.setitem(convolutions.WAYS, "bf16x3", Way(None, lambda: True))
    assert convolutions.suits(right, spikes)
    assert not convolutions.suits(right, spikes.bfloat16())
    monkeypatch.setitem(convolutions.WAYS, "events", Way(None, lambda: False))
    assert not convolutions.suits(right, spikes)


def test_too_little_memory_for_the_gradient_of_weights_is_said(monkeypatch):
    library = compiled.shared_library()
    if library is None:
        pytest.skip("no C compiler is here")
    layer, spikes = nn.Conv2d(16, 16, 3), torch.zeros(2, 16, 8, 8)
    out = convolutions.convolve(layer, spikes, torch.tensor(1.0))
    monkeypatch.setattr(compiled, "shared_library", lambda: type("Full", (), {"weight_gradient": staticmethod(lambda *_: 1)}))
    with pytest.raises(RuntimeError, match="can't allocate memory for a convolution of spikes"):
        out.sum().backward()


def normed_spikes(z, norm, log_theta, v0, steps, plus=None, constant=False):
    return ThroughTime.apply(z, plus, log_theta, v0, steps, constant, *statistics(norm, z)[0])


def normed(z, norm, log_theta, v0, steps, plus=None, constant=False):
    """Batch-norm, then the neurons, left to autograd. The statistics have torch's gradient and, to 1e-5, its value; to the last
    digit they are those of the pass, so that no spike flips."""
    found = NormedNeurons(z.detach(), None, 1.0, 0.5, steps, constant).moments(norm.running_mean)
    norm(z)  # for the running statistics
    dims = [0, 2, 3]
    statistics = []
    for value, true in zip(found, (z.mean(dims), z.var(dims, correction=0)), strict=True):
        torch.testing.assert_close(value, true.detach(), rtol=1e-5, atol=1e-6)
        statistics.append(value + (true - true.detach()))
    scale = norm.weight * (statistics[1] + norm.eps).rsqrt()
    current = z * scale.view(-1, 1, 1) + (norm.bias - statistics[0] * scale).view(-1, 1, 1)
    current = current if plus is None else current + plus
    current = current.expand(steps, *current.shape) if constant else current.unflatten(0, (steps, -1))
    return spikes_through_time(current, log_theta, v0).flatten(0, 1)


def with_batch_norm(function, z, plus, grad, steps, constant, momentum=0.1):
    norm = nn.BatchNorm2d(z.shape[1], momentum=momentum)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, z.shape[1]))
        norm.bias.copy_(torch.linspace(-0.3, 0.8, z.shape[1]))
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in (z, plus)]
    log_theta, v0 = (torch.tensor(value, requires_grad=True) for value in (0.1, 0.4))
    out = function(leaves[0], norm, log_theta, v0, steps, leaves[1], constant)
    out.backward(grad)
    parameters = [log_theta, v0, norm.weight, norm.bias]
    moments = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    return [out.detach(), *(leaf.grad for leaf in [*leaves, *parameters] if leaf is not None), *moments]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("steps", "channels", "kind"), [(4, 16, "sum"), (3, 48, ""), (8, 64, "sum"), (2, 16, "constant"), (1, 32, "sum")]
)
def test_batch_norm_and_neurons_in_one_pass_are_both_in_turn(steps, channels, kind, momentum, threads):
    if compiled.shared_library() is None:
        pytest.skip("no C compiler is here")
    torch.manual_seed(3)
    images, constant = 9, kind == "constant"
    z = (
        torch.randn(images * (1 if constant else steps), channels, 11, 13)
        .mul(1.3)
        .add(0.4)
        .contiguous(memory_format=torch.channels_last)
    )
    plus = torch.rand(steps * images, channels, 11, 13) if kind == "sum" else None
    grad = torch.randn(steps * images, channels, 11, 13)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = with_batch_norm(normed_spikes, z, plus, grad, steps, constant, momentum)
    finally:
        torch.set_num_threads(before)
    wanted = with_batch_norm(normed, z, plus, grad, steps, constant, momentum)
    assert torch.equal(found[0], wanted[0])
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert one.shape == other.shape
        assert (one - other).float().norm() <= 1e-4 * other.float().norm()


def test_in_bfloat16_only_what_is_stored_is_rounded():
    if compiled.shared_library() is None:
        pytest.skip("no C compiler is here")
    torch.manual_seed(4)
    z = torch.randn(8, 16, 9, 7).contiguous(memory_format=torch.channels_last).bfloat16()
    plus, grad = torch.rand(8, 16, 9, 7).bfloat16(), torch.randn(8, 16, 9, 7).bfloat16()
    found = with_batch_norm(normed_spikes, z, plus, grad, 4, False)
    wanted = with_batch_norm(normed, z.float(), plus.float(), grad.float(), 4, False)
    assert torch.equal(found[0], wanted[0].bfloat16())
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert (one - other).float().norm() <= 0.01 * other.float().norm()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("plus", [False, True])
def test_batch_norm_and_given_rates_in_one_pass_are_both_in_turn(plus, threads):
    if compiled.shared_library() is None:
        pytest.skip("no C compiler is here")
    torch.manual_seed(6)
    z = torch.randn(9, 32, 11, 13).contiguous(memory_format=torch.channels_last)
    plus = torch.rand(9, 32, 11, 13) if plus else None
    grad, rate = torch.randn(9, 32, 11, 13), torch.randint(0, 5, (9, 32, 11, 13)) / 4

    def together(z, norm, log_theta, v0, levels, plus, _):
        return StraightThrough.apply(z, plus, log_theta, v0, rate, levels, *statistics(norm, z)[0])

    def in_turn(z, norm, log_theta, v0, levels, plus, _):
        return straight_through(norm(z) if plus is None else norm(z) + plus, rate, log_theta, v0, levels)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = with_batch_norm(together, z, plus, grad, 4, False)
    finally:
        torch.set_num_threads(before)
    wanted = with_batch_norm(in_turn, z, plus, grad, 4, False)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).float().norm() <= 1e-3 * other.float().norm()  # a current may fall on the other side of a gate


class Residual(nn.Module):
    """Sums in both orders, of a batch-norm with its input and with another batch-norm; 20 channels somewhere."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 16), (16, 16), (16, 20), (20, 16)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in self.convs)
        self.acts = nn.ModuleList(micelab.QuantClip(levels=4, theta=1.5) for _ in self.convs)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.acts[0](self.norms[0](self.convs[0](x)))
        x = self.acts[1](x + self.norms[1](self.convs[1](x)))
        y = self.acts[2](self.norms[2](self.convs[2](x)) + x)
        y = self.acts[3](self.norms[3](self.convs[3](y)))
        return self.head(self.acts[4](self.norms[4](self.convs[4](y)) + x).mean((2, 3)))


class Spread(nn.Module):
    """Sums in which one current is spread over the other, in both orders, and layers that read a part of the channels."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, 16, 3, padding=1) for a in (3, 16, 16, 8))
        self.points = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in self.convs)
        self.acts = nn.ModuleList(micelab.QuantClip(levels=4, theta=1.5) for _ in self.convs)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.acts[0](self.norms[0](self.convs[0](x)))
        x = self.acts[1](self.norms[1](self.convs[1](x)) + self.points[0](self.pool(x)))
        x = self.acts[2](self.norms[2](self.points[1](self.pool(x))) + self.convs[2](x))
        x = self.acts[3](self.norms[3](self.convs[3](x[:, :8])) + x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "kind", "steps", "taken"),
    [
        (Residual, SpikesThroughTime, 3, 4),
        (Residual, SpikesInTheLoop, 3, 3),
        (Residual, SpikesInTheLoop, 1, 4),
        (Spread, SpikesThroughTime, 3, 4),
        (Spread, SpikesThroughTime, 1, 4),
        (Spread, SpikesInTheLoop, 3, 3),
        (Spread, SpikesInTheLoop, 1, 4),
    ],
)
def test_a_network_learns_the_same_with_both_in_one_pass(make, kind, steps, taken, monkeypatch):
    if compiled.shared_library() is None:
        pytest.skip("no C compiler is here")
    torch.manual_seed(5)
    start = prepare(make(), steps).to(memory_format=torch.channels_last).train()
    images = torch.rand(6, 3, 11, 11).contiguous(memory_format=torch.channels_last)
    calls, found = [], []

    def counted(norm, z):
        calls.append(z.shape[1])
        return statistics(norm, z)

    monkeypatch.setattr(together, "statistics", counted)
    for can in (NormedNeurons.suits, lambda *_: False):
        monkeypatch.setattr(NormedNeurons, "suits", staticmethod(can))
        net = copy.deepcopy(start)
        logits, _ = kind(net)(images, steps)
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in net.parameters()), *net.buffers()])
    # not the one with 20 channels, nor a constant one before several steps' rates, nor any of the second network
    assert calls == [16] * taken
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        (torch.zeros(4, 20, 5, 5).contiguous(memory_format=torch.channels_last), 4),
        (torch.zeros(4, 16, 5, 5), 4),
        (torch.zeros(4, 16, 5, 5).contiguous(memory_format=torch.channels_last).double(), 4),
        (torch.zeros(300, 16, 5, 5).contiguous(memory_format=torch.channels_last), 300),
        (torch.zeros(4, 16), 4),
    ],
    ids=["channels", "layout", "type", "steps", "no space"],
)
def test_what_one_pass_cannot_take_goes_the_ordinary_way(values, steps):
    assert not NormedNeurons.suits(values, steps)


def test_a_frozen_batch_norm_goes_the_ordinary_way():
    z = torch.zeros(4, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    neurons = micelab.QuantClip(levels=4)
    assert suits(nn.BatchNorm2d(16), neurons, z, 4) == (compiled.shared_library() is not None)
    assert not suits(nn.BatchNorm2d(16).eval(), neurons, z, 4)
    assert not suits(nn.BatchNorm2d(16, affine=False), neurons, z, 4)
