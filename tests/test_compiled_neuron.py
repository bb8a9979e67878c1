"""The compiled neuron against the loop, bit for bit, in every layout; and what happens without a compiler that works."""

import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from micelab import neuron
from micelab.convert import convert
from micelab.models import resnet20
from micelab.network import SpikingNetwork
from micelab.neuron import building, compiled

try:
    building.compiler()
    HERE = True
except OSError:
    HERE = False
needs_compiler = pytest.mark.skipif(not HERE, reason="no C compiler")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(current, theta, v0, signed, amplitude, count, plus, same_place=False):
    """(spikes, count, residual) of the compiled neuron and of the loop."""
    results = []
    for way in (compiled.fire, neuron.step_by_step):
        given = current.clone() if same_place else current
        out = given if same_place else torch.full_like(current, torch.nan)
        results.append((out, *way(given, theta, v0, signed, out, amplitude, count, plus)))
    return results


@needs_compiler
@given(
    steps=st.integers(1, 40),
    images=st.integers(1, 3),
    channels=st.integers(1, 9),
    side=st.integers(1, 7),
    theta=st.sampled_from(["number", "channel"]),
    start=st.sampled_from(["number", "channel", "neuron"]),
    channels_last=st.booleans(),
    constant=st.booleans(),
    seed=st.integers(0, 999),
    flags=st.tuples(*[st.booleans()] * 5),
    kind=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_compiled_neuron_equals_the_loop_bit_for_bit(
    steps, images, channels, side, theta, start, channels_last, constant, seed, flags, kind
):
    signed, amplitude, count, with_plus, same_place = flags
    shape = (images, channels, side, side)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    make = lambda n, seed: (
        drawn(n * images, *shape[1:], seed=seed).to(kind).contiguous(memory_format=layout).unflatten(0, (n, images))
    )
    current = make(1, seed).expand(steps, *shape) if constant else make(steps, seed)
    theta = torch.tensor(0.7) if theta == "number" else drawn(channels, seed=seed).abs() + 0.1
    v0 = {"number": 0.5, "channel": drawn(channels, seed=1), "neuron": drawn(*shape, seed=2)}[start]
    plus = make(steps, seed + 1) if with_plus else None
    (a, *others), (b, *expected) = both(current, theta, v0, signed, amplitude, count, plus, same_place)
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(others[not count :], expected[not count :], strict=True))


def laid_out(shape, kind, channels_last, seed):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return drawn(*shape, seed=seed).to(kind).contiguous(memory_format=layout)


@needs_compiler
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 25), st.integers(1, 25)),
    levels=st.integers(1, 16),
    theta=st.floats(0.2, 3),
    v0=st.floats(0, 1),
    channels_last=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_staircase_and_its_gradient_in_one_pass_are_those_of_torch(shape, levels, theta, v0, channels_last, seed):
    z, grad = (laid_out(shape, torch.float32, channels_last, s) for s in (seed, seed + 1))
    theta = torch.tensor(theta)
    rate = compiled.staircase(z, theta, v0, levels)
    expected = torch.floor((z * (levels / theta)).add_(v0)).clamp_(0, levels).mul_(theta / levels)
    assert torch.equal(rate, expected)
    assert rate.stride() == z.stride()
    grad_z, of_theta, of_start = compiled.rate_gradient(grad, z, rate, theta, levels)
    gate = (z > 0) & (z < theta)
    assert torch.equal(grad_z, grad * gate)
    torch.testing.assert_close(of_theta, (grad * rate - grad * gate * z).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_start, (grad * ((z > -theta / levels) & (z < theta))).sum(), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_diverged_layer_stays_seen(kind):
    z = torch.tensor([[torch.nan] + [torch.inf] * 9]).to(kind)
    assert compiled.staircase(z, torch.tensor(1.0), 0.5, 4).isnan().tolist() == [[True] + [False] * 9]


@needs_compiler
def test_in_bf16_the_staircase_is_rounded_once_and_gradients_are_summed_in_fp32():
    z, grad = (laid_out((4, 8, 33, 33), torch.bfloat16, True, s) for s in (0, 1))
    theta = torch.tensor(1.3)
    rate = compiled.staircase(z, theta, 0.5, 8)
    expected = torch.floor(z.float() * (8 / theta) + 0.5).clamp(0, 8) * (theta / 8)
    assert torch.equal(rate, expected.to(torch.bfloat16))
    grad_z, of_theta, _ = compiled.rate_gradient(grad, z, rate, theta, 8)
    assert torch.equal(grad_z, grad * ((z > 0) & (z.float() < theta)))
    torch.testing.assert_close(of_theta, (grad.float() * rate.float() - grad_z.float() * z.float()).sum(), rtol=1e-4, atol=1e-2)


@needs_compiler
def test_what_has_holes_or_a_bound_for_each_channel_is_left_to_torch():
    z, theta = drawn(2, 3, 4, 4), torch.tensor(1.0)
    assert compiled.staircase(z, torch.ones(3), 0.5, 4) is None
    assert compiled.staircase(z.double(), theta, 0.5, 4) is None
    assert compiled.rate_gradient(z.bfloat16(), z, z, theta, 4) is None
    assert compiled.rate_gradient(z[:, :, ::2], z[:, :, ::2], z[:, :, ::2], theta, 4) is None


@needs_compiler
def test_a_gradient_may_lie_otherwise_in_memory():
    z = drawn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    theta, grad = torch.tensor(1.0), drawn(2, 3, 4, 4, seed=1)
    rate = compiled.staircase(z, theta, 0.5, 4)
    for other in (grad, grad[:, :, :1, :1].expand_as(z)):
        found = compiled.rate_gradient(other, z, rate, theta, 4)
        expected = compiled.rate_gradient(torch.empty_like(z).copy_(other), z, rate, theta, 4)
        assert all(map(torch.equal, found, expected))


@needs_compiler
def test_compiled_neuron_takes_flat_layers_and_any_number_of_threads():
    current = drawn(9, 5, 4001)
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            (a, *others), (b, *expected) = both(current, drawn(4001).abs() + 0.1, 0.5, False, True, True, None)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(a, b)
        assert all(map(torch.equal, others, expected))


@needs_compiler
@pytest.mark.parametrize("record", [True, False])
def test_a_network_gives_the_same_numbers_with_and_without_it(record, monkeypatch):
    torch.manual_seed(0)
    ann, images = resnet20(width=4), torch.rand(5, 3, 16, 16)
    snn = convert(ann, "max", images)
    fast = snn.simulate(images, 6, record=record)
    monkeypatch.delitem(neuron.firing.FUSED, "cpu")
    slow = snn.simulate(images, 6, record=record)
    assert torch.equal(fast.logits, slow.logits)
    for name, layer in slow.layers.items():
        assert torch.equal(layer.count, fast.layers[name].count)
        assert torch.equal(layer.residual, fast.layers[name].residual)


@pytest.mark.parametrize("record", [True, False])
def test_sums_of_two_currents_are_left_to_the_neurons(record, monkeypatch):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16)
    snn, joined = convert(resnet20(width=4), "max", images), []
    fire = neuron.fire
    monkeypatch.setattr(
        neuron.firing, "fire", lambda *args, plus=None, **more: joined.append(plus) or fire(*args, plus=plus, **more)
    )
    run = snn.simulate(images, 3, record=record, chunk=2, precision="fp32")
    assert sum(plus is not None for plus in joined) == 9  # one a residual block
    assert len(run.layers) == (19 if record else 0)


def test_a_sum_that_somebody_else_reads_is_made_for_both():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.act1, self.act2, self.c, self.d = nn.ReLU(), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.act1(self.a(x) + self.b(x))
            total = self.c(x) + self.d(x)
            return self.head((self.act2(total) + total).mean((2, 3)))

    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 8)
    snn = convert(Reused(), "max", images)
    run, last = snn.simulate(images, 4), snn(images, 4)
    torch.testing.assert_close(run.logits[-1], last)
    layers = run.layers["act2"], run.layers["act1"]
    spikes = snn.simulate(images, 4, spikes=True).layers["act1"].spikes.float() * layers[1].theta
    current = snn.layers.c(spikes.flatten(0, 1)) + snn.layers.d(spikes.flatten(0, 1))
    torch.testing.assert_close(layers[0].mean_current, current.unflatten(0, (4, 2)).mean(0), rtol=1e-4, atol=1e-5)


def test_other_types_and_scattered_room_are_left_to_the_loop():
    current = drawn(3, 2, 4)
    assert compiled.fire(current.double(), torch.tensor(1.0), 0.5, False, current.double()) is None
    assert compiled.fire(current, torch.tensor(1.0), 0.5, False, drawn(3, 2, 8)[..., ::2]) is None


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MICELAB_COMPILE", raising=False)
    compiled._shared_library.cache_clear()
    yield tmp_path
    compiled._shared_library.cache_clear()


def spikes_of(snn: SpikingNetwork):
    return snn.simulate(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)), 3, record=False).logits


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (None, "no C compiler is here (/nowhere/cc): neurons run step by step instead"),
        ("#!/bin/sh\necho 'fatal error: no such thing' >&2\nexit 1\n", "failed (fatal error: no such thing): neurons run"),
        ("#!/bin/sh\nexit 0\n", "neurons run step by step instead"),
    ],
    ids=["missing", "fails", "makes nothing"],
)
def test_without_a_compiler_that_works_the_loop_runs_and_the_log_says_so_once(script, text, fresh, monkeypatch, caplog):
    torch.manual_seed(0)
    snn = convert(resnet20(width=4), "max", torch.rand(2, 3, 16, 16))
    expected = spikes_of(snn)
    compiled._shared_library.cache_clear()
    caplog.clear()
    place = fresh / "cc"
    if script is not None:
        place.write_text(script)
        place.chmod(0o755)
    monkeypatch.setenv("CC", "/nowhere/cc" if script is None else str(place))
    monkeypatch.setattr(building, "SOURCES", copied(building.SOURCES, fresh))
    assert torch.equal(expected, spikes_of(snn))
    assert torch.equal(expected, spikes_of(snn))
    assert len(caplog.records) == 1
    assert text in caplog.records[0].getMessage()


@needs_compiler
def test_a_neuron_that_gives_other_numbers_is_not_used(fresh, monkeypatch, caplog):
    sources = copied(building.SOURCES, fresh)
    wrong = next(source for source in sources if source.name == "neuron.c")
    wrong.write_text(wrong.read_text().replace("v[i] >= theta[i]", "v[i] > 0.5f * theta[i]"))
    monkeypatch.setattr(building, "SOURCES", sources)
    assert compiled.shared_library() is None
    assert "gives other numbers than the loop" in caplog.text


@needs_compiler
def test_the_compiled_neuron_is_kept_and_made_once(fresh, monkeypatch):
    assert compiled.shared_library() is not None
    assert len(list((fresh / "micelab").glob("neuron-*.so"))) == 1
    compiled._shared_library.cache_clear()

    def never(*_, **__):
        raise AssertionError("it was compiled again")

    monkeypatch.setattr(subprocess, "run", never)
    assert compiled.shared_library() is not None


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(fresh, monkeypatch, caplog):
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert compiled.shared_library() is not None
    assert not caplog.records


def test_the_loop_can_be_asked_for(fresh, monkeypatch, caplog):
    monkeypatch.setenv("MICELAB_COMPILE", "0")
    assert compiled.shared_library() is None
    assert not caplog.records


def copied(sources, folder):
    """The sources under another date, so that what the cache holds of them is not taken."""
    places = [folder / source.name for source in sources]
    for source, place in zip(sources, places, strict=True):
        place.write_text(source.read_text() + "\n")
    return places
