"""The Triton kernel on CPU tensors, in Triton's interpreter: run by test_triton_neuron.py in a process of its own, because
TRITON_INTERPRET=1 must be set before triton is imported.

    TRITON_INTERPRET=1 pytest tests/triton_interpreted.py
"""

import itertools
import os

import numpy as np
import pytest
import torch

import micelab
from micelab import neuron
from micelab.exceptions import InputError
from micelab.neuron import triton_kernel
from micelab.neuron.layout import over_channels

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs under TRITON_INTERPRET=1 only")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((3, 5, 9, 11), (2, 1, 1, 1), (2, 4, 16, 16))
"""[N, C, H, W]: 1,485 neurons, 2, and 2,048, the one that is a multiple of the kernel's block."""


@pytest.fixture(scope="module", autouse=True)
def _kernel_takes_cpu_tensors():
    """The operator also for CPU tensors; and bf16 rounded to nearest as a GPU does: the interpreter cuts the bits off.

    That the compiled code rounds to nearest is a test of its own (cvt.rn in test_triton_neuron.py).
    """
    from triton import language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        data = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(data, dst_type.scalar)

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)
    triton_kernel._fire_op.register_kernel("cpu")(triton_kernel.run_kernel)
    yield
    patch.undo()


def drawn(steps, shape, dtype=torch.float32, last=True, seed=0):
    """Currents [T, N, C, H, W], in channels_last or contiguous memory."""
    layout = torch.channels_last if last else torch.contiguous_format
    z = torch.randn(steps * shape[0], *shape[1:], generator=torch.Generator().manual_seed(seed)).to(dtype)
    return z.contiguous(memory_format=layout).unflatten(0, (steps, shape[0]))


def parameters(channels, per_channel):
    """theta and v0, one for each channel or one for all."""
    if not per_channel:
        return torch.tensor(0.7), 0.5
    return torch.linspace(0.3, 1.7, channels), torch.linspace(0, 1, channels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 16, 17])
def test_kernel_equals_the_loop_spike_for_spike(steps, dtype):
    shapes = SHAPES if dtype == torch.float32 else SHAPES[:1]
    for shape, last, signed, per_channel in itertools.product(shapes, *[(False, True)] * 3):
        current, amplitude = drawn(steps, shape, dtype, last), per_channel
        theta, v0 = parameters(shape[1], per_channel)
        expected, found = torch.empty_like(current), torch.empty_like(current)
        count, residual = neuron.fire(current, theta, v0, signed, expected, amplitude, count=True)
        results = triton_kernel.fire(current, theta, v0, signed, found, amplitude, count=True)
        case = (shape, last, signed, per_channel)
        assert torch.equal(expected, found), case
        assert torch.equal(count, results[0]), case
        assert torch.equal(residual, results[1]), case
        assert residual.stride() == results[1].stride(), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_current_is_summed_in_as_the_loop_does(dtype):
    current, plus = drawn(8, SHAPES[0], dtype), drawn(8, SHAPES[0], dtype, seed=1)
    expected, found = torch.empty_like(current), torch.empty_like(current)
    theta, v0 = parameters(5, True)
    wanted = neuron.step_by_step(current, theta, v0, True, expected, amplitude=True, count=True, plus=plus)
    results = triton_kernel.fire(current, theta, v0, True, found, amplitude=True, count=True, plus=plus)
    assert torch.equal(expected, found)
    for a, b in zip(wanted, results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "signed"), [(torch.uint8, False), (torch.int8, True), (torch.bfloat16, True)], ids=str)
def test_spikes_are_also_written_as_small_numbers(kind, signed):
    current = drawn(8, SHAPES[0])
    expected = torch.empty_like(current)
    count, residual = neuron.fire(current, torch.tensor(0.7), 0.5, signed, expected, count=True)
    found = torch.empty_like(current, dtype=kind)
    results = triton_kernel.fire(current, torch.tensor(0.7), 0.5, signed, found, count=True)
    assert torch.equal(expected, found.float())
    assert torch.equal(count, results[0])
    assert torch.equal(residual, results[1])


def test_the_membrane_is_exact_where_what_is_sent_is_rounded_to_a_smaller_type():
    current, theta = drawn(8, SHAPES[0]), torch.tensor(0.7)
    sent = torch.empty_like(current, dtype=torch.bfloat16)
    count, residual = triton_kernel.fire(current, theta, 0.5, False, sent, amplitude=True, count=True)
    assert set(sent.unique().tolist()) == {0.0, float(theta.bfloat16())}
    assert torch.equal(count, (sent > 0).sum(0).float())
    torch.testing.assert_close(residual, 0.35 + current.sum(0) - theta * count)


def test_spikes_may_be_written_over_the_currents_and_an_empty_batch_is_no_error():
    current = drawn(5, SHAPES[0])
    expected = torch.empty_like(current)
    count, residual = neuron.fire(current, torch.tensor(0.6), 0.5, False, expected, count=True)
    results = triton_kernel.fire(current, torch.tensor(0.6), 0.5, False, out=current, count=True)
    assert torch.equal(expected, current)
    assert torch.equal(count, results[0])
    assert torch.equal(residual, results[1])
    nothing = torch.empty(4, 0, 3)
    assert triton_kernel.fire(nothing, torch.tensor(1.0), 0.5, False, nothing, count=True)[0].shape == (0, 3)


def test_a_constant_current_is_read_from_one_place_and_spikes_nobody_reads_need_one_step_of_room():
    z = drawn(1, SHAPES[0])[0]
    current = z.expand(6, *z.shape)
    expected, found = torch.empty(6, *z.shape), torch.empty_like(z).expand_as(current)
    count, residual = neuron.fire(current, torch.tensor(0.6), 0.5, False, expected, count=True)
    results = triton_kernel.fire(current, torch.tensor(0.6), 0.5, False, found, count=True)
    assert torch.equal(count, results[0])
    assert torch.equal(residual, results[1])
    assert torch.equal(expected[-1], found[0])


@pytest.mark.parametrize("constant", [False, True], ids=["changing", "constant"])
def test_spikes_of_another_memory_order_or_with_holes_are_the_same(constant):
    current = drawn(4, SHAPES[0], last=False)
    current = current[:1].expand_as(current) if constant else current
    expected = torch.empty(current.shape)
    count, residual = neuron.fire(current, torch.tensor(0.6), 0.5, False, expected, count=True)
    holes = torch.zeros(4, 3, 5, 9, 22)
    for found in (torch.empty_like(drawn(4, SHAPES[0], last=True)), holes[..., ::2]):
        results = triton_kernel.fire(current, torch.tensor(0.6), 0.5, False, found, count=True)
        assert torch.equal(expected, found)
        assert torch.equal(count, results[0])
        assert torch.equal(residual, results[1])
    assert not holes[..., 1::2].any()


def test_neurons_without_channels_and_layers_of_vectors_fire_alike():
    for shape, theta in (((7, 33), torch.tensor(0.4)), ((7, 3, 4), torch.linspace(0.2, 1, 4)), ((7, 3, 4, 5), torch.ones(4))):
        current = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        expected, found = torch.empty_like(current), torch.empty_like(current)
        _, residual = neuron.fire(current, theta, 0.5, False, expected)
        assert torch.equal(residual, triton_kernel.fire(current, theta, 0.5, False, found)[1])
        assert torch.equal(expected, found)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_every_neuron_may_start_at_a_potential_of_its_own(last):
    current, theta = drawn(3, SHAPES[0], last=last), torch.linspace(0.3, 1.7, 5)
    v0 = torch.rand(SHAPES[0], generator=torch.Generator().manual_seed(3))
    found = torch.empty_like(current)
    _, residual = triton_kernel.fire(current, theta, v0, False, found)
    for place in ((0, 0, 0, 0), (2, 4, 8, 10), (1, 3, 5, 2)):
        here = (slice(None), *place)
        alone, left = neuron.integrate_and_fire(current[here][:, None], float(theta[place[1]]), v0[place])
        assert torch.equal(alone[:, 0], found[here])
        assert torch.equal(left[0], residual[place])


def test_what_the_spikes_type_cannot_hold_is_refused_in_words():
    current = drawn(2, SHAPES[1])
    bits = torch.empty_like(current, dtype=torch.uint8)
    with pytest.raises(InputError, match="also sends -1: use int8"):
        triton_kernel.fire(current, torch.tensor(1.0), 0.5, True, bits)
    with pytest.raises(InputError, match="real number: use a floating type"):
        triton_kernel.fire(current, torch.tensor(1.0), 0.5, False, bits, amplitude=True)
    with pytest.raises(InputError, match="does not fit"):
        over_channels(torch.ones(3), current, 2)


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signed"])
def test_a_whole_simulation_through_the_kernel_equals_the_cpus(signed, monkeypatch):
    torch.manual_seed(0)
    ann, images = micelab.small_cnn(activation="quant_clip", theta=0.5), torch.rand(3, 1, 8, 8)
    snn = micelab.convert(ann, "qcfs", signed=signed)
    expected = snn.simulate(images, 4, spikes=True)
    monkeypatch.setattr(neuron.firing, "FUSED", {"cpu": "micelab.neuron.triton_kernel"})
    run = snn.simulate(images, 4, spikes=True)
    assert torch.equal(expected.logits, run.logits)
    for name, layer in run.layers.items():
        for kind, (tensor, _) in layer.tensors().items():
            assert torch.equal(tensor, expected.layers[name].tensors()[kind][0]), (name, kind)
        assert layer.count.any()
