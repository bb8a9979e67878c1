"""What a conversion reaches and costs: accuracy over time, the points lost to each error, spikes and energy."""

from micelab.metrics.accuracy import AccuracyCurve, accuracy_curve
from micelab.metrics.energy import ENERGY_ASSUMPTIONS, Energy, Size, energy, size
from micelab.metrics.points import LostPoints, lost_points

__all__ = [
    "ENERGY_ASSUMPTIONS",
    "AccuracyCurve",
    "Energy",
    "LostPoints",
    "Size",
    "accuracy_curve",
    "energy",
    "lost_points",
    "size",
]
