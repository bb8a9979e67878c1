"""The integrate-and-fire neuron: one contract, as a loop over the steps, compiled for the CPU, and as a kernel for CUDA."""

from micelab.neuron.firing import Firing, IntegrateFire, check_theta, fire, integrate_and_fire, over_time, step_by_step

__all__ = ["Firing", "IntegrateFire", "check_theta", "fire", "integrate_and_fire", "over_time", "step_by_step"]
