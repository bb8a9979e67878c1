"""Interactive figures as pure functions: data in, plotly Figure out; no state, no widgets.

Every figure carries a sentence for those who cannot see it in `figure.layout.meta["alt"]`, made from its own numbers.
"""

from micelab.figures.checkup import VERDICT_COLOURS, checkup_map
from micelab.figures.errors import before_and_after, error_bars, error_over_depth
from micelab.figures.network import running_answer, spike_map
from micelab.figures.neurons import (
    activation_histogram,
    input_order,
    neuron_timeline,
    staircase_over_relu,
    start_choice,
    threshold_choice,
)
from micelab.figures.results import (
    accuracy_over_time,
    images_strip,
    lost_points_waterfall,
    spike_rates,
)
from micelab.figures.style import METHOD_SYMBOLS, TOTAL
from micelab.pictures import COLOURS, METHOD_COLOURS

__all__ = [
    "COLOURS",
    "METHOD_COLOURS",
    "METHOD_SYMBOLS",
    "TOTAL",
    "VERDICT_COLOURS",
    "accuracy_over_time",
    "activation_histogram",
    "before_and_after",
    "checkup_map",
    "error_bars",
    "error_over_depth",
    "images_strip",
    "input_order",
    "lost_points_waterfall",
    "neuron_timeline",
    "running_answer",
    "spike_map",
    "spike_rates",
    "staircase_over_relu",
    "start_choice",
    "threshold_choice",
]
