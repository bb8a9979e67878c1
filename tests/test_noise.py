"""Noise training: the noise in training mode, its measurement, and that it travels with the network."""

import pytest
import torch
from torch import nn

import micelab
from micelab import checkpoint
from micelab.activation import NoisyQuantClip, QuantClip
from micelab.exceptions import InputError
from micelab.graph import trace
from micelab.graph.runner import InputCollector

IMAGES = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network(activation="noisy_quant_clip"):
    torch.manual_seed(2)
    ann = micelab.small_cnn(activation=activation, width=8, theta=1.0, levels=4)
    with torch.no_grad():
        ann.train()(IMAGES)
    return ann


def test_noise_is_added_in_training_only_and_has_the_spread_that_was_set():
    act, z = NoisyQuantClip(4, theta=2.0), torch.randn(50_000)
    quiet = QuantClip(4, theta=2.0)(z)
    act.sigma.fill_(0.3)
    assert torch.equal(act.eval()(z), quiet)
    torch.manual_seed(0)
    noise = act.train()(z) - quiet
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)


def test_noise_changes_no_gradient_and_is_not_trained():
    z = torch.randn(500)
    gradients = []
    for act in (NoisyQuantClip(4, theta=2.0), QuantClip(4, theta=2.0)):
        if isinstance(act, NoisyQuantClip):
            act.sigma.fill_(0.5)
        x = z.clone().requires_grad_()
        act(x).sum().backward()
        gradients.append((x.grad, act.log_theta.grad))
        assert [name for name, _ in act.named_parameters()] == ["log_theta"]
    torch.testing.assert_close(*gradients)


def test_measured_noise_is_the_spread_of_the_difference_between_network_and_rates():
    model = network()
    was = {name: value.clone() for name, value in model.state_dict().items()}
    sigmas = micelab.measure_noise(model, IMAGES, time_steps=3)
    assert model.training
    for name, value in model.state_dict().items():
        if not name.endswith("sigma"):
            assert torch.equal(value, was[name])
    run = micelab.convert(model, "noise").simulate(IMAGES, 3)
    collector = InputCollector(trace(model))
    with torch.no_grad():
        collector.run(IMAGES)
        for name, layer in run.layers.items():
            gap = collector.activations[name](collector.inputs[name]) - layer.rate
            assert sigmas[name] == pytest.approx(gap.std(unbiased=False).item(), rel=1e-3, abs=1e-5)
            assert model.get_submodule(name).sigma.item() == pytest.approx(sigmas[name], rel=1e-5)
    assert min(sigmas.values()) > 0


def test_an_activation_that_is_called_twice_gets_the_mean_square_of_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 16)
            self.act, self.act_1 = NoisyQuantClip(2, 1.0), NoisyQuantClip(2, 1.0)

        def forward(self, x):
            return self.act_1(self.b(self.act(self.b(self.act(self.a(x.flatten(1)))))))

    torch.manual_seed(0)
    model = Twice().eval()
    sigmas = micelab.measure_noise(model, IMAGES, 3)
    assert list(sigmas) == ["act", "act_1"]
    assert all(sigma > 0 for sigma in sigmas.values())


def test_a_network_without_noise_is_answered_with_the_remedy():
    with pytest.raises(InputError, match='build it with activation="noisy_quant_clip"'):
        micelab.measure_noise(network("quant_clip"), IMAGES)
    with pytest.raises(InputError, match="give it levels"):
        micelab.small_cnn(activation="noisy_quant_clip", levels=None)


def test_the_noise_travels_with_the_checkpoint_and_the_network_can_start_from_a_quiet_one(tmp_path):
    model = network()
    sigmas = micelab.measure_noise(model, IMAGES)
    back = micelab.load(micelab.save(model, tmp_path / "noisy"))
    assert back.spec["activation"] == "noisy_quant_clip"
    for name, sigma in sigmas.items():
        assert back.get_submodule(name).sigma.item() == pytest.approx(sigma)
    assert "noisy_quant_clip levels=4" in micelab.models.describe(back.spec)
    quiet = network("quant_clip")
    checkpoint.start_from(back, micelab.save(quiet, tmp_path / "quiet"))
    assert torch.equal(back.head.weight, quiet.head.weight)
    checkpoint.start_from(quiet, tmp_path / "noisy.safetensors")
    assert torch.equal(quiet.stem[0].weight, model.stem[0].weight)


def test_noise_training_runs_with_a_measurement_after_each_epoch():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    labels, losses = torch.arange(24) % 10, []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model.train()(IMAGES), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        micelab.measure_noise(model, IMAGES)
    assert losses[-1] < losses[0]
