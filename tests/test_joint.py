"""Joint training: the spikes of the simulator forward, the gradient of rates or spikes backward, and runs that survive."""

import copy
import json

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import micelab
from micelab import checkpoint, joint
from micelab.activation import QuantClip, SpikeClip, straight_through
from micelab.data import Split, load_data
from micelab.exceptions import CheckpointError, ConversionError, InputError, TrainingError
from micelab.joint import prepare
from micelab.joint.loop import SpikesInTheLoop, residual_penalty
from micelab.joint.through_time import SpikesThroughTime
from micelab.train.recipe import JointConfig, ThroughTimeConfig, TrainConfig, choose
from micelab.train.run import Run


@pytest.fixture(scope="module")
def digits():
    return load_data()


@pytest.fixture(scope="module")
def few(digits):
    """The digits with an eighth of the training images: two steps an epoch at 64."""
    return type(digits)(**(vars(digits) | {"train": Split(digits.train.images[:160], digits.train.labels[:160])}))


@pytest.fixture(scope="module")
def stage1(digits, tmp_path_factory):
    """A quantized network trained for the digits, in seconds, with its checkpoint."""
    out = tmp_path_factory.mktemp("stage1")
    config = TrainConfig(activation="quant_clip", levels=8, epochs=30, lr=0.05, theta=2.0)
    return micelab.train.train(config, out, digits, progress=False), str(out / "model.safetensors")


def settled(net, images):
    """`net` with batch-norm statistics of its own and starts that differ from layer to layer."""
    net.train()
    for _ in range(3):
        net(images)
    for number, module in enumerate(m for m in net.modules() if isinstance(m, SpikeClip)):
        module.v0_start.data.fill_((0.1 + 0.37 * number) % 1)
    return net.eval()


class Branches(nn.Module):
    """Concatenation, a linear layer with batch-norm, a batch-norm without a layer before it, dropout."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.act_a, self.act_b = QuantClip(4, 1.0), QuantClip(4, 0.7, channels=8)
        self.norm, self.pool, self.drop = nn.BatchNorm2d(16), nn.AvgPool2d(2), nn.Dropout(0.5)
        self.act_c, self.linear, self.norm1 = QuantClip(4, 1.5), nn.Linear(64, 12), nn.BatchNorm1d(12)
        self.act_d, self.head = QuantClip(4, 1.0), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.cat([self.act_a(self.a(x)), self.act_b(self.b(x))], 1)
        x = self.act_c(self.norm(self.pool(x)))
        return self.head(self.act_d(self.norm1(self.linear(self.drop(x.flatten(1))))))


class Plain(Branches):
    """The same with batch-norms that have no weight and no bias."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm1 = nn.BatchNorm2d(16, affine=False), nn.BatchNorm1d(12, affine=False)


NETWORKS = {
    "small_cnn": (lambda: micelab.small_cnn(width=8, activation="quant_clip", theta=0.8), (1, 8, 8)),
    "resnet20": (lambda: micelab.resnet20(width=8, activation="quant_clip", theta=0.8), (3, 16, 16)),
    "branches": (Branches, (3, 4, 4)),
    "plain batch-norm": (Plain, (3, 4, 4)),
}


@pytest.mark.parametrize("kind", [SpikesInTheLoop, SpikesThroughTime])
@pytest.mark.parametrize("time_steps", [1, 2, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_forward_pass_is_the_simulation(name, time_steps, kind):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    images = torch.rand(6, *shape)
    net = settled(prepare(make(), time_steps), images)
    logits, _ = kind(net)(images, time_steps)
    simulated = micelab.convert(net, "mice").simulate(images, time_steps).logits[-1]
    torch.testing.assert_close(logits, simulated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_in_training_batch_norm_is_that_of_the_mean_current_at_every_step(name):
    torch.manual_seed(1)
    make, shape = NETWORKS[name]
    images = torch.rand(6, *shape)
    net = settled(prepare(make(), 4), images)
    frozen = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0  # the running statistics become this batch's
    logits, _ = SpikesInTheLoop(net.train())(images, 4)
    # the running variance is the unbiased one: undo that, layer by layer, from the number of values it was taken over
    counts, trained, hooks = {}, dict(net.named_modules()), []

    def count(path):
        return lambda module, args: counts.__setitem__(path, args[0].numel() // args[0].shape[1])

    for path, own in frozen.named_modules():
        if isinstance(own, (nn.BatchNorm1d, nn.BatchNorm2d)):
            own.load_state_dict(trained[path].state_dict())
            hooks.append(own.register_forward_pre_hook(count(path)))
    frozen(images)
    for hook in hooks:
        hook.remove()
    for path, own in frozen.named_modules():
        if path in counts:
            own.running_var.mul_((counts[path] - 1) / counts[path])
    simulated = micelab.convert(frozen, "mice").simulate(images, 4).logits[-1]
    torch.testing.assert_close(logits, simulated, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_chunks_of_the_images_do_not_change_what_is_learned(name, monkeypatch):
    torch.manual_seed(3)
    make, shape = NETWORKS[name]
    images = torch.rand(7, *shape)
    net = settled(prepare(make(), 3), images).train()
    if name == "branches":
        net.drop.p = 0.0
    found = []
    for chunk in (7, 3):
        own = copy.deepcopy(net)
        spikes = SpikesInTheLoop(own)
        monkeypatch.setattr(spikes, "_chunk", lambda images, time_steps, chunk=chunk: chunk)
        logits, penalty = spikes(images, 3, penalize=True)
        (logits.square().sum() + penalty).backward()
        found.append([logits, penalty, *(p.grad for p in own.parameters()), *own.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_at_one_step_the_gradient_is_that_of_the_staircase():
    torch.manual_seed(2)
    images = torch.rand(4, 1, 8, 8)
    net = settled(prepare(micelab.small_cnn(activation="quant_clip", theta=0.8), 1), images)
    plain = copy.deepcopy(net)
    SpikesInTheLoop(net)(images, 1).logits.square().sum().backward()
    plain(images).square().sum().backward()
    for (name, one), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        if not name.endswith(("log_theta", "v0_start")):  # those are scaled down
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
        elif other.grad.abs().sum():
            assert 0 < one.grad.abs().sum() < other.grad.abs().sum()
            assert torch.equal(one.grad.sign(), other.grad.sign())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.floats(0.3, 3), st.floats(0, 1), st.integers(0, 1000))
def test_the_straight_through_gradient_is_eulers(levels, theta, v0, seed):
    generator = torch.Generator().manual_seed(seed)
    z = (2 * torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
    log_theta = torch.tensor(theta, dtype=torch.float64).log().requires_grad_()
    start = torch.tensor(v0, dtype=torch.float64, requires_grad=True)
    rate = torch.from_numpy(oracle.staircase(z.detach().numpy(), theta, v0, levels))
    out = straight_through(z, rate, log_theta, start, levels)
    assert torch.equal(out, rate)
    out.sum().backward()
    gate = ((z > 0) & (z < theta)).double()
    assert torch.equal(z.grad, gate)
    torch.testing.assert_close(log_theta.grad, (rate - gate * z.detach()).sum())
    near = ((z > -theta / levels) & (z < theta)).double()
    torch.testing.assert_close(start.grad, near.sum() * theta / levels)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.floats(0.3, 3), st.floats(0, 1), st.integers(0, 1000))
def test_the_penalty_is_that_of_the_neurons_own_residual(time_steps, theta, v0, seed):
    generator = torch.Generator().manual_seed(seed)
    current = torch.randn(time_steps, 40, generator=generator, dtype=torch.float64)
    spikes, residual = micelab.neuron.integrate_and_fire(current, theta, v0)
    count = spikes.sum(0)
    found = residual_penalty(
        current.mean(0), count, torch.tensor(theta, dtype=torch.float64), torch.tensor(v0, dtype=torch.float64), time_steps
    )
    u = residual.numpy() / theta
    wanted = (np.maximum(-u, 0) ** 2 + np.maximum(u - 1, 0) ** 2) * (count.numpy() < time_steps)
    assert found.item() == pytest.approx(wanted.mean(), rel=1e-6, abs=1e-9)


def test_the_callers_network_is_not_changed(few, stage1, tmp_path):
    net, _ = stage1
    before = copy.deepcopy(net.state_dict())
    joint.train(JointConfig(time_steps=(2,), epochs=1), tmp_path, few, model=net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert isinstance(net.stem[2], QuantClip)
    assert not isinstance(net.stem[2], SpikeClip)


@pytest.mark.slow
def test_on_the_digits_joint_training_wins_five_points_at_two_steps(digits, stage1, tmp_path):
    net, _ = stage1
    before = micelab.accuracy_curve(micelab.convert(net, "qcfs"), digits.test.batches(), (2,)).at(2)
    trained = joint.train(JointConfig(time_steps=(2,), epochs=10, batch_size=64), tmp_path, digits, model=net, progress=False)
    after = micelab.accuracy_curve(micelab.convert(trained, "mice"), digits.test.batches(), (2,)).at(2)
    assert after >= before + 0.05


@pytest.mark.slow
def test_on_the_digits_the_gradient_of_every_spike_wins_five_points_at_two_steps(digits, stage1, tmp_path):
    net, _ = stage1
    before = micelab.accuracy_curve(micelab.convert(net, "qcfs"), digits.test.batches(), (2,)).at(2)
    config = ThroughTimeConfig(time_steps=(2,), epochs=10, batch_size=64)
    trained = joint.train(config, tmp_path, digits, model=net, progress=False)
    after = micelab.accuracy_curve(micelab.convert(trained, "mice"), digits.test.batches(), (2,)).at(2)
    assert after >= before + 0.05
    assert json.loads((tmp_path / "model.json").read_text())["recipe"]["gradient"] == "time"


@pytest.mark.parametrize("name", NETWORKS)
def test_through_time_every_parameter_learns_and_batch_norm_sees_every_step(name):
    torch.manual_seed(4)
    make, shape = NETWORKS[name]
    images = torch.rand(6, *shape)
    net = settled(prepare(make(), 3), images).train()
    seen = {}
    for path, module in net.named_modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.register_forward_pre_hook(lambda module, args, path=path: seen.__setitem__(path, len(args[0])))
    SpikesThroughTime(net)(images, 3).logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in net.named_parameters() if "norm" not in name)
    assert len(images) * 3 in seen.values()


def test_one_network_for_every_t_meets_each_of_them(few, stage1, tmp_path, monkeypatch):
    seen, whole = set(), SpikesInTheLoop.forward

    def forward(loop, images, time_steps, penalize=False):
        seen.add(time_steps)
        return whole(loop, images, time_steps, penalize)

    monkeypatch.setattr(SpikesInTheLoop, "forward", forward)
    net = joint.train(JointConfig(time_steps=(1, 2, 4), epochs=6, batch_size=32), tmp_path, few, model=stage1[0])
    assert seen == {1, 2, 4}
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    by_t = line["validation_accuracy_by_time_steps"]
    assert list(by_t) == ["1", "2", "4"]
    assert line["validation_accuracy"] == pytest.approx(sum(by_t.values()) / 3)
    assert net.spec["levels"] == 4


@pytest.mark.parametrize(("kind", "own"), [(JointConfig, {"penalty": 0.1}), (ThroughTimeConfig, {})])
def test_a_stopped_run_resumes_bit_for_bit(kind, own, few, stage1, tmp_path, monkeypatch):
    config = kind(time_steps=(1, 2), epochs=3, batch_size=32, distill=0.5, start=stage1[1], **own)
    whole = joint.train(config, tmp_path / "whole", few)
    one_step, calls = Run._one_step, []

    def stop(run, images, labels):
        one_step(run, images, labels)
        calls.append(None)
        if len(calls) == 7:
            run._must_stop = lambda stopped: True

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_one_step", stop)
        with pytest.raises(KeyboardInterrupt):
            joint.train(config, tmp_path / "stopped", few)
    again = joint.train(config, tmp_path / "stopped", few, resume=True)
    assert len(calls) == 7
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_is_saved_loads_converts_and_says_what_it_is(digits, few, stage1, tmp_path):
    net = joint.train(JointConfig(time_steps=(2,), epochs=1, start=stage1[1]), tmp_path, few, command="micelab train --joint")
    again = micelab.load(tmp_path / "model.safetensors")
    card = again.card
    assert "spike_clip levels=2" in card["network"]
    assert card["recipe"]["time_steps"] == [2]
    assert card["hidden_steps"] == 0
    snn, other = micelab.convert(net, "mice"), micelab.convert(again, "mice")
    for name, neuron in snn.neurons.items():
        assert torch.equal(neuron.v0, other.neurons[name].v0)
        assert torch.equal(neuron.v0, dict(net.named_modules())[name].v0)
    curve = micelab.accuracy_curve(snn, digits.test.batches(), (2,))
    assert card["test_accuracy"] == pytest.approx(curve.at(2))
    checkpoint.save(snn, tmp_path / "spiking")
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(micelab.load(tmp_path / "spiking").simulate(images, 2).logits, snn.simulate(images, 2).logits)


def test_joint_training_goes_on_from_joint_training_with_its_starts(stage1):
    net = prepare(stage1[0], 2)
    net.stem[2].v0_start.data.fill_(0.3)
    longer = prepare(net, 8)
    assert longer.stem[2].v0.item() == pytest.approx(0.3)
    assert longer.stem[2].levels == 8


# What goes wrong


def test_a_network_without_trained_bounds_names_the_layer_and_the_remedy():
    with pytest.raises(ConversionError, match=r"layer `stem\.2` is nn\.ReLU and has no trained bound: train stage 1 first"):
        prepare(micelab.small_cnn(activation="relu"))
    with pytest.raises(ConversionError, match=r"layer `1` is nn\.ReLU6 and has no trained bound: train stage 1 first"):
        prepare(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 10)))
    with pytest.raises(ConversionError, match=r"`stem\.2` is QuantClip and has no trained initial potential"):
        micelab.convert(micelab.small_cnn(activation="quant_clip"), "mice")


def test_a_network_that_cannot_be_converted_is_refused_by_name():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), QuantClip(4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))
    with pytest.raises(ConversionError, match=r"layer `2` is nn\.MaxPool2d"):
        prepare(net)


def test_an_activation_called_twice_is_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.act, self.head = nn.Linear(4, 4), nn.Linear(4, 4), QuantClip(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.act(self.two(self.act(self.one(x)))))

    with pytest.raises(ConversionError, match="`act_1` is a second call of one activation: give each call a module of its own"):
        prepare(Twice())


@pytest.mark.parametrize("time_steps", [0, -1, 2.0])
def test_a_number_of_steps_that_cannot_be_is_refused(time_steps):
    with pytest.raises(InputError, match="joint training needs an integer of at least 1"):
        prepare(micelab.small_cnn(activation="quant_clip"), time_steps)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("time_steps", ()),
        ("time_steps", (0,)),
        ("time_steps", (4, 300)),
        ("distill", -1.0),
        ("penalty", float("nan")),
        ("max_norm", 0.0),
        ("lr", 0.0),
        ("gradient", "space"),
    ],
)
def test_an_option_out_of_its_range_is_named_as_it_is_typed(option, value):
    with pytest.raises(InputError, match=f"^--{option.replace('_', '-')} is .* out of range"):
        JointConfig(**{option: value})


def test_the_gradient_of_every_spike_has_a_recipe_of_its_own_and_no_penalty():
    config = choose("cifar10-a", True, {"gradient": "time", "time_steps": (2,)})
    assert isinstance(config, ThroughTimeConfig)
    assert (config.lr, config.weight_decay, config.start) == (0.05, 1e-4, "resnet20a-cifar10-qcfs")
    with pytest.raises(InputError, match="--penalty goes with the gradient of the rates"):
        choose(None, True, {"gradient": "time", "penalty": 1.0})
    with pytest.raises(InputError, match='gradient is "time": use ThroughTimeConfig'):
        JointConfig(gradient="time")
    with pytest.raises(InputError, match='gradient is "rates": use JointConfig'):
        ThroughTimeConfig(gradient="rates")


class Turned(nn.Module):
    """The activation between two transpositions, or between none."""

    def __init__(self, turned):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.one, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), QuantClip(4, 1.0)
        self.first, self.turned, self.head = QuantClip(4, 1.0), turned, nn.Linear(4, 5)

    def forward(self, x):
        x = self.one(self.first(self.norm(self.conv(x))))
        x = self.act(x.permute(0, 3, 2, 1)).transpose(1, 3) if self.turned else self.act(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("kind", [SpikesInTheLoop, SpikesThroughTime])
def test_a_transposition_moves_currents_and_gradients_and_changes_none(kind):
    images, found = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(1)), []
    for turned in (False, True):
        net = prepare(Turned(turned), 3).train()
        logits, _ = kind(net)(images, 3)
        logits.square().sum().backward()
        found.append([logits.detach(), *(parameter.grad for parameter in net.parameters())])
    for plain, moved in zip(*found, strict=True):
        torch.testing.assert_close(moved, plain)


def test_a_start_is_needed_and_must_know_the_classes(few, tmp_path):
    with pytest.raises(InputError, match="name its checkpoint with --start"):
        joint.train(JointConfig(), tmp_path / "run", few)
    other = micelab.small_cnn(num_classes=7, activation="quant_clip")
    with pytest.raises(InputError, match="the network tells 7 classes apart, digits has 10"):
        joint.train(JointConfig(), tmp_path / "run", few, model=other)
    checkpoint.save(other, tmp_path / "seven")
    config = JointConfig(distill=1.0, teacher=str(tmp_path / "seven.safetensors"))
    with pytest.raises(InputError, match="--teacher tells 7 classes apart, digits has 10"):
        joint.train(config, tmp_path / "run", few, model=micelab.small_cnn(activation="quant_clip"))
    assert not (tmp_path / "run").exists()


def test_a_network_that_its_spec_does_not_describe_is_refused_before_the_training(tmp_path):
    ann = micelab.small_cnn(activation="quant_clip")
    ann.head = nn.Linear(32, 10, bias=False)
    with pytest.raises(CheckpointError, match="layer `head`"):
        joint.train(JointConfig(epochs=1, time_steps=(2,)), tmp_path / "run", model=ann, progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_network_whose_spec_is_empty_is_one_without_and_trains(few, tmp_path):
    ann = micelab.small_cnn(activation="quant_clip")
    ann.spec, ann.head = {}, nn.Linear(32, 10, bias=False)
    net = joint.train(JointConfig(epochs=1, time_steps=(1,), batch_size=64), tmp_path, few, model=ann, progress=False)
    assert net.spec == {}
    assert (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "model.safetensors").exists()


class InTwoModes(nn.Module):
    """A network that does something else in training, and whose last convolution has two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.again, self.head = self.second, nn.Linear(144, 10)
        self.acts = nn.ModuleList([QuantClip(4, 1.0) for _ in range(3)])

    def forward(self, x):
        x = nn.functional.dropout(self.acts[0](self.first(x)), 0.5, training=self.training)
        x = self.acts[2](self.again(self.acts[1](self.second(x))))
        return self.head(x.flatten(1)) * (10 if self.training else 1)


@pytest.mark.parametrize("kind", [SpikesInTheLoop, SpikesThroughTime])
def test_what_is_trained_is_the_network_in_evaluation(kind):
    net = prepare(InTwoModes(), 4).train()
    images = torch.rand(3, 1, 8, 8)
    logits, _ = kind(net)(images, 4)
    simulated = micelab.convert(net, "mice").simulate(images, 4).logits[-1]
    torch.testing.assert_close(logits, simulated, rtol=1e-4, atol=1e-5)
    assert all(module.training for module in net.modules())


def test_weights_of_two_names_are_trained_kept_and_resumed(few, tmp_path):
    config = JointConfig(epochs=1, time_steps=(2,), batch_size=64)
    net = joint.train(config, tmp_path, few, model=InTwoModes(), progress=False)
    again = joint.train(config, tmp_path, few, model=InTwoModes(), progress=False, resume=True)
    assert torch.equal(net.second.weight, again.second.weight)
    assert again.again is again.second


def test_a_frozen_bound_stays_frozen():
    ann = micelab.small_cnn(activation="quant_clip").requires_grad_(False)
    net = prepare(ann, 2)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(parameter.requires_grad for parameter in prepare(micelab.small_cnn(activation="quant_clip"), 2).parameters())


@pytest.mark.parametrize("time_steps", [1, 4])
def test_batch_norm_of_one_value_a_channel_is_named(time_steps):
    net = prepare(nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2), QuantClip(4, 1.0), nn.Linear(2, 3)), 4)
    with pytest.raises(InputError, match=r"layer `2` is batch-norm, and has one value a channel .* a higher --batch-size"):
        SpikesInTheLoop(net.train())(torch.rand(1, 1, 2, 2), time_steps)
    assert net[2].running_var.isfinite().all()


@pytest.mark.parametrize("kind", [TrainConfig, JointConfig, ThroughTimeConfig])
def test_a_teacher_that_teaches_nothing_is_refused(kind):
    with pytest.raises(InputError, match=r"--teacher nobody teaches nothing where --distill is 0: give its weight"):
        kind(teacher="nobody")


def test_a_network_for_other_channels_is_refused(few, tmp_path):
    with pytest.raises(InputError, match=r"cannot take images of digits.* 1 channels, and this network was made for 3"):
        joint.train(JointConfig(), tmp_path, few, model=micelab.small_cnn(activation="quant_clip", in_channels=3))
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), QuantClip(4, 1.0), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(InputError, match=r"the network cannot take images of digits, \(1, 8, 8\): "):
        joint.train(JointConfig(), tmp_path, few, model=bare)


def test_a_diverged_run_stops_keeps_its_state_and_says_so(few, stage1, tmp_path, monkeypatch):
    whole = F.cross_entropy

    def broken(logits, labels, **options):
        return whole(logits, labels, **options) * (float("nan") if len(calls) > 2 else 1)

    calls = []
    one_step = Run._one_step
    monkeypatch.setattr(Run, "_one_step", lambda run, *batch: calls.append(0) or one_step(run, *batch))
    monkeypatch.setattr(F, "cross_entropy", broken)
    config = JointConfig(time_steps=(2,), epochs=3, batch_size=64)
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch 2, step 1: .*kept in .*Lower --lr \(now 0.001\)"):
        joint.train(config, tmp_path, few, model=stage1[0])
    _, state = checkpoint.read_tensors(tmp_path / "state.safetensors")
    assert (state["epoch"], state["step"]) == (1, 0)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_average_is_of_the_weights_at_both_ends(few, stage1, tmp_path):
    first = joint.train(JointConfig(time_steps=(2,), epochs=1, start=stage1[1]), tmp_path / "first", few, progress=False)
    again = {"time_steps": (2,), "epochs": 1, "lr": 1e-2, "start": str(tmp_path / "first" / "model.safetensors")}
    ends = [first, joint.train(JointConfig(**again), tmp_path / "end", few, progress=False)]
    mean = joint.train(JointConfig(**again, average=True), tmp_path / "mean", few, progress=False)
    begun, end = (net.state_dict() for net in ends)
    for name, value in mean.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (begun[name] + end[name]) / 2)
    assert not torch.equal(begun["head.weight"], end["head.weight"])
    card = json.loads((tmp_path / "mean" / "model.json").read_text())
    curve = micelab.accuracy_curve(micelab.convert(mean, "mice"), few.validation.batches(), (2,))
    assert card["validation_accuracy"] == curve.at(2)
    assert card["recipe"]["average"]


def test_an_average_needs_a_start_that_was_trained_jointly(few, stage1, tmp_path):
    config = JointConfig(time_steps=(2,), epochs=1, start=stage1[1], average=True)
    with pytest.raises(InputError, match=r"--average: layer `stem.2` of --start was not trained jointly"):
        joint.train(config, tmp_path, few, progress=False)
