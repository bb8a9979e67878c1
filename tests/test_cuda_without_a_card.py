"""Conversion, simulation, errors, accuracy and training on a CUDA device that computes nothing (fake_cuda.py): every tensor
is on the right device, and inside a simulation the host never waits for the device."""

import subprocess
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from fake_cuda import backward, fake_cuda

import micelab
from micelab import neuron
from micelab.data import ImageData, Split
from micelab.joint.run import _JointRun
from micelab.machine import default_precision
from micelab.network.folded import TimeFolded
from micelab.neuron import triton_kernel
from micelab.train.recipe import JointConfig, ThroughTimeConfig
from micelab.train.run import Run, TrainConfig

CASES = {
    "qcfs": (micelab.resnet20, {}),
    "percentile": (micelab.small_cnn, {"per_channel": True}),
    "max": (micelab.small_cnn, {"signed": True}),
    "tcl": (micelab.small_cnn, {"fold": False}),
}


def network(make=micelab.resnet20):
    torch.manual_seed(0)
    return make(width=4, activation="quant_clip", in_channels=3)


def tensors_of(run):
    return [run.logits, *(tensor for layer in run.layers.values() for tensor, _ in layer.tensors().values())]


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference mode"])
def test_the_fake_device_notices_what_it_is_here_for(inference):
    with fake_cuda() as waits, torch.inference_mode(inference):
        x = torch.rand(3, device="cuda")
        for wait, why in (
            (lambda: bool((x > 0).all()), "read"),
            (lambda: float(x.sum()), "read"),
            (lambda: x.tolist(), "read"),
            (lambda: torch.allclose(x, x), "read"),
            (lambda: x.cpu(), "copy to the CPU"),
            (lambda: torch.empty(3).copy_(x), "copy to the CPU"),
            (lambda: x + torch.ones(3).to("cuda"), "copy to the device"),
        ):
            waits.clear()
            wait()
            assert waits == [why]
        with pytest.raises(RuntimeError, match="device"):
            x + torch.rand(3)


@pytest.mark.parametrize("method", CASES)
def test_conversion_and_simulation_stay_on_the_device(method):
    make, options = CASES[method]
    ann = network(make)
    with fake_cuda() as waits:
        images = torch.rand(6, 3, 16, 16, device="cuda")
        snn = micelab.convert(ann.to("cuda"), method, images, **options)
        assert {tensor.device.type for tensor in snn.state_dict().values()} == {"cuda"}
        waits.clear()
        run = snn.simulate(images, 4, spikes=True, chunk=4)
        assert {tensor.device.type for tensor in tensors_of(run)} == {"cuda"}
        assert run.logits.shape == (4, 6, 10)
        # one check that the images are finite, whatever the number of chunks, layers and steps
        assert waits == ["read"]


def test_nothing_is_read_or_copied_between_the_images_and_the_logits():
    ann = network()
    with fake_cuda() as waits:
        snn = micelab.convert(ann.to("cuda"), "qcfs")
        images = torch.rand(4, 3, 16, 16, device="cuda")
        for record in (False, True):
            waits.clear()
            snn._simulate(images, 8, record, spikes=record)
            assert waits == []


def test_neurons_on_cuda_go_through_the_fused_operator_in_the_memory_order_of_their_currents(monkeypatch):
    ann, seen = network(), []
    fused = triton_kernel._fire_op
    monkeypatch.setattr(triton_kernel, "_fire_op", lambda *given: seen.append(given) or fused(*given))
    monkeypatch.setattr(triton_kernel, "triton", object())  # also where triton is absent: nothing is launched here
    with fake_cuda():
        snn = micelab.convert(ann.to("cuda"), "qcfs")
        snn.simulate(torch.rand(4, 3, 16, 16, device="cuda"), 8)
        assert len(seen) == len(snn.neurons) == 19
        assert sum(plus is not None for _, plus, *_ in seen) == 9  # the sums at the end of the residual blocks
        for current, _, _, _, out, *_ in seen:
            assert current.shape == out.shape
            assert current.stride()[2:] == out.stride()[2:]
            assert out.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert sum(current.stride(0) == 0 for current, *_ in seen) == 1  # the first layer's, kept once


@pytest.mark.parametrize("method", CASES)
def test_in_bf16_the_neurons_write_what_the_next_layer_takes(method, monkeypatch):
    make, options = CASES[method]
    ann, rooms, sent = network(make), [], []
    room, activate = TimeFolded.room, TimeFolded.activate
    monkeypatch.setattr(TimeFolded, "room", lambda *given: rooms.append(room(*given)) or rooms[-1])
    monkeypatch.setattr(TimeFolded, "activate", lambda *given: sent.append(activate(*given)) or sent[-1])
    monkeypatch.setattr("micelab.network.spiking.has_bf16", lambda device: True)
    with fake_cuda(), half_precision(set()):
        images = torch.rand(4, 3, 16, 16, device="cuda")
        snn = micelab.convert(ann.to("cuda"), method, images, **options)
        snn.simulate(images, 4, record=False, precision="bf16")
    assert len(rooms) == len(sent) > 0
    assert all(a is b and a.dtype == torch.bfloat16 for a, b in zip(rooms, sent, strict=True))  # no cast behind it


def test_error_table_accuracy_and_energy_are_right_about_devices():
    ann = network(micelab.small_cnn)
    with fake_cuda() as waits:
        images = torch.rand(6, 3, 16, 16, device="cuda")
        snn = micelab.convert(ann.to("cuda"), "qcfs")
        table = micelab.error_breakdown(ann, snn, images, 4)
        assert list(table.layers) == list(snn.neurons)
        on_card, on_cpu = torch.zeros(6, dtype=torch.long, device="cuda"), torch.zeros(6, dtype=torch.long)
        assert micelab.accuracy_curve(snn, [(images, on_card), (images, on_cpu)], (1, 2, 4)).images == 12
        micelab.lost_points(ann, snn, [(images, on_card)], 4)
        micelab.energy(snn, images, 4)
        print("reads and copies of the tables:", Counter(waits))


class OneDevice:
    """What micelab.train asks of an accelerator, for one CUDA device."""

    device = torch.device("cuda")
    process_index, num_processes, is_main_process = 0, 1, True

    def prepare_model(self, model):
        return model

    def backward(self, loss):
        backward(loss)

    def reduce(self, tensor, reduction):
        return tensor

    def clip_grad_norm_(self, parameters, max_norm):
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)


@contextmanager
def half_precision(seen):
    """Autocast to bf16 on the fake device, as on a card that has it; the types that convolutions take and give go to `seen`."""
    convolve = torch.nn.functional.conv2d

    def noting(images, *args, **options):
        out = convolve(images, *args, **options)
        seen.add((images.device.type, out.dtype))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr("torch.nn.functional.conv2d", noting)
        yield


def small_data():
    images, labels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8) % 2
    split = Split(images, labels)
    return ImageData("small", split, split, split, ("a", "b"), (0.5,) * 3, (0.25,) * 3)


def test_gradients_node_by_node_are_those_of_torchs_engine():
    """That `backward` of fake_cuda.py, which the next test goes by, computes what it stands for."""
    grads = []
    for run in (torch.Tensor.backward, backward):
        model = network()
        run(model(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).square().mean())
        grads.append([parameter.grad for parameter in model.parameters()])
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("augment", ["none", "cutout", "auto"])
def test_a_training_step_makes_its_batch_and_its_update_on_the_device(augment, tmp_path):
    config = TrainConfig(epochs=1, batch_size=4, augment=augment)
    data, model = small_data(), network(micelab.resnet20 if augment == "none" else micelab.small_cnn)
    with fake_cuda() as waits, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainConfig, "build", lambda *_: model)
        run = Run(config, tmp_path, data, OneDevice())
        (images, labels), *_ = run.batches.epoch(0)
        made = "cpu" if augment == "auto" else "cuda"
        assert images.device.type == labels.device.type == made
        waits.clear()
        run._one_step(images.to("cuda"), labels.to("cuda"))
        assert run.step == 1
        assert {parameter.grad.device.type for parameter in run.model.parameters()} == {"cuda"}
        assert [wait for wait in waits if wait != "copy to the device"] == ["read"]  # the loss, once a step: is it finite?


@pytest.mark.parametrize("joint", [False, True], ids=["stage 1", "joint"])
def test_a_training_step_in_bf16_convolves_in_it_and_keeps_its_gradients_in_fp32(joint, tmp_path):
    common = {"epochs": 1, "batch_size": 4, "precision": "bf16"}
    data, model, seen = small_data(), micelab.resnet20(num_classes=2, width=8, activation="quant_clip"), set()
    with fake_cuda() as waits, half_precision(seen), pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainConfig, "build", lambda *_: model)
        if joint:
            run = _JointRun(JointConfig(**common, time_steps=(4,)), tmp_path, data, OneDevice(), model=model.to("cuda"))
        else:
            run = Run(TrainConfig(**common), tmp_path, data, OneDevice())
        (images, labels), *_ = run.batches.epoch(0)
        waits.clear()
        seen.clear()
        run._one_step(images, labels)
        assert {(p.grad.device.type, p.grad.dtype) for p in run.model.parameters()} == {("cuda", torch.float32)}
        assert [wait for wait in waits if wait != "copy to the device"] == ["read"]
    assert seen == {("cuda", torch.bfloat16)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(JointConfig, {}), (JointConfig, {"distill": 1.0, "penalty": 0.1}), (ThroughTimeConfig, {})],
    ids=["plain", "distillation and penalty", "through time"],
)
def test_a_joint_training_step_runs_its_spikes_on_the_device(kind, options, tmp_path):
    config = kind(epochs=1, batch_size=4, time_steps=(4,), **options)
    data, model = small_data(), micelab.resnet20(num_classes=2, width=8, activation="quant_clip")
    with fake_cuda() as waits:
        run = _JointRun(config, tmp_path, data, OneDevice(), model=model.to("cuda"))
        (images, labels), *_ = run.batches.epoch(0)
        waits.clear()
        run._one_step(images, labels)
        assert run.step == 1
        assert {parameter.grad.device.type for parameter in run.model.parameters()} == {"cuda"}
        assert [wait for wait in waits if wait != "copy to the device"] == ["read"]  # the loss, once a step: is it finite?


SETTINGS = """
import warnings
warnings.simplefilter("error")
import torch
from micelab.machine import full_precision

def check(*more):
    seen = lambda: [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision, *[f() for f in more]]
    before = seen()
    with full_precision(torch.device("cpu")):
        assert seen() == before
    with full_precision(torch.device("cuda")):
        assert not {"tf32", "bf16", True} & set(seen()), seen()
    assert seen() == before

older = torch._C._get_cudnn_allow_tf32, torch._C._get_cublas_allow_tf32
check(*older)
torch.set_float32_matmul_precision("high")
check(*older)
torch.backends.cudnn.conv.fp32_precision = "ieee"  # from here on the older settings cannot be read
check()
torch.backends.cuda.matmul.fp32_precision = "tf32"
check()
"""


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has the older settings only")
def test_convolutions_and_products_on_cuda_are_set_to_full_fp32_and_set_back():
    """In a process of its own: the settings hold for all of it, and torch forbids to mix older and newer ones."""
    ran = subprocess.run([sys.executable, "-c", SETTINGS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_loop_takes_over_on_the_device_where_the_kernel_cannot_run(monkeypatch):
    monkeypatch.setattr(triton_kernel, "triton", None)
    monkeypatch.setattr(triton_kernel, "_fire_op", None)
    with fake_cuda():
        current = torch.rand(4, 2, 3, device="cuda")
        _, residual = neuron.fire(current, torch.tensor(1.0, device="cuda"), 0.5, True, torch.empty_like(current))
        assert residual.device.type == "cuda"


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_training_is_in_the_precision_of_the_card_where_there_is_one(native, precision, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert default_precision() == precision
