"""One neuron looked at closely agrees with the oracle, and its staircase errors with a count over many inputs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import integrate_and_fire, staircase

from micelab.exceptions import InputError
from micelab.one_neuron import staircase_error, threshold_errors, trace_neuron

currents = st.lists(st.integers(-12, 16).map(lambda k: k / 8), min_size=1, max_size=16)
starts = st.integers(0, 8).map(lambda k: k / 8)


@given(currents, starts)
def test_a_trace_is_what_the_oracle_says(current, v0):
    trace = trace_neuron(torch.tensor(current), 1.0, v0)
    spikes, residual = integrate_and_fire(np.array(current)[:, None], 1.0, v0 + 1e-9)
    assert trace.spikes.tolist() == spikes[:, 0].tolist()
    assert trace.residual == pytest.approx(residual[0], abs=1e-6)
    assert trace.theta * trace.count + trace.residual == pytest.approx(v0 + sum(current))
    assert trace.before.tolist() == pytest.approx((trace.after + trace.spikes).tolist())
    assert trace.running_rate[-1].item() == pytest.approx(trace.rate)


@given(currents, starts)
def test_only_neurons_that_over_or_under_fire_have_timing_error(current, v0):
    trace = trace_neuron(torch.tensor(current), 1.0, v0)
    wanted = staircase(trace.mean_current, 1.0, v0 + 1e-9, trace.time_steps)
    assert trace.asked == pytest.approx(wanted * trace.time_steps)
    assert trace.timing_error == pytest.approx(trace.rate - wanted)
    extra = trace.count - trace.asked
    said = "fires as often" if not extra else f"{'over' if extra > 0 else 'under'}-fires by {abs(extra)}"
    assert trace.verdict().startswith(said)


def test_decimals_that_reach_the_threshold_on_paper_fire():
    assert trace_neuron(torch.full((10,), 0.1, dtype=torch.float64), 1.0, 0.0).count == 1


@pytest.mark.parametrize("v0", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("theta", [0.5, 2.0])
def test_the_staircase_error_is_that_of_many_inputs(steps, v0, theta):
    z = (np.arange(60_000) + 0.5) / 60_000 * theta
    error = staircase(z, theta, v0, steps) - z
    exact = staircase_error(steps, v0, theta)
    assert exact.mean == pytest.approx(error.mean(), abs=1e-4)
    assert exact.rms == pytest.approx(np.sqrt((error**2).mean()), abs=1e-4)
    assert exact.largest == pytest.approx(np.abs(error).max(), abs=1e-3)


def test_threshold_errors_are_those_of_the_oracle_and_add_up_in_squares():
    z = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    thetas = torch.tensor([0.3, 1.0, 2.5])
    errors = threshold_errors(z, thetas, time_steps=4)
    for place, theta in enumerate(thetas.double().tolist()):
        said, positive = staircase(z.numpy(), theta, 0.5, 4), np.maximum(z.numpy(), 0)
        assert float(errors.total[place]) == pytest.approx(np.sqrt(((said - positive) ** 2).mean()))
        assert float(errors.clipping[place]) == pytest.approx(np.sqrt(((np.clip(z.numpy(), 0, theta) - positive) ** 2).mean()))
    assert errors.best == int(errors.total.argmin())


def test_wrong_input_is_named():
    with pytest.raises(InputError, match=r"\(2, 2\): one neuron takes one number a step"):
        trace_neuron(torch.zeros(2, 2))
    with pytest.raises(InputError, match="z is empty"):
        threshold_errors(torch.zeros(0), torch.ones(1), 4)
    with pytest.raises(InputError, match="time_steps is 0"):
        staircase_error(0)
    with pytest.raises(InputError, match="v0 2"):
        staircase_error(4, v0=2)
