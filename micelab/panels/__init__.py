"""Interactive panels for notebooks: ipywidgets around the figures, alive in JupyterLab, a picture where nothing runs.

Each holds its state in one object, `panel.state`; callbacks read nothing else, so any order of clicks is fine.
"""

from micelab.panels.checkup import CheckupPanel
from micelab.panels.image import ImagePanel
from micelab.panels.layers import DepthPanel, ThresholdPanel
from micelab.panels.methods import MethodPanel
from micelab.panels.one_neuron import NeuronPanel, OrderPanel, StaircasePanel
from micelab.panels.panel import Panel
from micelab.panels.remedies import RemedyPanel

__all__ = [
    "CheckupPanel",
    "DepthPanel",
    "ImagePanel",
    "MethodPanel",
    "NeuronPanel",
    "OrderPanel",
    "Panel",
    "RemedyPanel",
    "StaircasePanel",
    "ThresholdPanel",
]
