"""Thresholds against NumPy, and the registry that new methods join."""

import dataclasses
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from micelab import methods
from micelab.activation import QuantClip
from micelab.convert import convert
from micelab.exceptions import ConversionError, InputError
from micelab.methods import Method, Observation
from micelab.models import small_cnn


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(methods.registry, "METHODS", dict(methods.METHODS))


def observed(v0=0.5, steps=4, percentile=99.0, activation=None):
    z = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [2.0], [5.0]])
    return Observation("act", activation or nn.ReLU(), z, z.amax(1), steps, percentile, v0)


def test_max_takes_the_largest_activation():
    seen = observed()
    np.testing.assert_array_equal(seen.samples.numpy().max(1), methods.highest(seen).numpy())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_a_percentile_has_the_type_of_the_network(kind):
    seen = replace(observed(), samples=observed().samples.to(kind))
    found = methods.percentile(seen)
    assert found.dtype == kind
    torch.testing.assert_close(found.float(), methods.percentile(observed()), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0])
def test_percentile_equals_numpys_of_the_positive_part(percent):
    seen = observed(percentile=percent)
    expected = np.percentile(np.maximum(seen.samples.numpy(), 0), percent, axis=1)
    np.testing.assert_allclose(methods.percentile(seen).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("v0", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_mse_finds_the_least_square_error_that_numpy_finds(v0, steps):
    seen = observed(v0, steps)
    for row, highest, found in zip(seen.samples.numpy(), seen.highest.numpy(), methods.mean_square_optimal(seen), strict=True):
        thetas = highest * np.arange(1, 101, dtype=np.float32) / 100
        errors = [np.square(oracle.staircase(row, theta, v0, steps) - np.maximum(row, 0)).mean() for theta in thetas]
        reached = np.square(oracle.staircase(row, found.numpy(), v0, steps) - np.maximum(row, 0)).mean()
        assert reached == pytest.approx(min(errors), rel=1e-4)
        assert reached < errors[-1]


def test_trained_bound_is_the_activations_own_theta():
    seen = observed(activation=QuantClip(4, theta=1.75))
    assert methods.trained_bound(seen).item() == pytest.approx(1.75)
    with pytest.raises(ConversionError, match=r"layer `act` is nn\.ReLU and has no trained bound"):
        methods.trained_bound(observed())


def test_a_new_method_joins_without_touching_the_rest(registry):
    twice = methods.register(Method("twice", "this test", lambda seen: 2 * seen.highest, v0=0.25, hidden_steps=4))
    assert methods.get("twice") is twice
    images = torch.rand(4, 1, 8, 8)
    ann = small_cnn()
    snn, plain = convert(ann, "twice", images), convert(ann, "max", images)
    assert (snn.method, snn.hidden_steps) == ("twice", 4)
    for name, neuron in snn.neurons.items():
        assert neuron.v0 == 0.25
        torch.testing.assert_close(neuron.theta, 2 * plain.neurons[name].theta)


def test_a_name_is_given_only_once_and_an_unknown_one_lists_what_there_is(registry):
    with pytest.raises(InputError, match="'max' is registered already"):
        methods.register(dataclasses.replace(methods.get("tcl"), name="max"))
    assert methods.get("max").theta is methods.highest
    with pytest.raises(InputError, match=r"\['max'\] is unknown"):
        methods.get(["max"])
    with pytest.raises(InputError, match="'maxx' is unknown: choose one of max, percentile, mse, tcl, qcfs"):
        convert(small_cnn(), "maxx")


def test_every_method_says_where_it_comes_from():
    known = {"max", "percentile", "mse", "tcl", "qcfs", "half_start", "calibrated", "signed", "srp", "cos", "step_bias", "noise"}
    assert known | {"accumulate"} <= methods.METHODS.keys()
    for name, method in methods.METHODS.items():
        assert name == method.name
        assert any(year in method.source for year in map(str, range(2015, 2030)))
