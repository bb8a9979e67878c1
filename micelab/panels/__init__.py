"""Interactive panels for notebooks: ipywidgets around the figures, alive in JupyterLab, a picture where nothing runs.

Each holds its state in one object, `panel.state`; callbacks read nothing else, so any order of clicks is fine.
"""

from micelab.panels.image import ImagePanel
from micelab.panels.layers import DepthPanel, ThresholdPanel
from micelab.panels.one_neuron import NeuronPanel, OrderPanel, StaircasePanel
from micelab.panels.over_time import TimePanel
from micelab.panels.panel import Panel

__all__ = ["DepthPanel", "ImagePanel", "NeuronPanel", "OrderPanel", "Panel", "StaircasePanel", "ThresholdPanel", "TimePanel"]
