"""Methods of conversion: the registry, the rivals' neurons, and the thresholds that are calibrated."""

from micelab.methods.registry import METHODS, Method, get, register
from micelab.methods.thresholds import Observation, highest, mean_square_optimal, percentile, trained_bound, trained_start

__all__ = [
    "METHODS",
    "Method",
    "Observation",
    "get",
    "highest",
    "mean_square_optimal",
    "percentile",
    "register",
    "trained_bound",
    "trained_start",
]
