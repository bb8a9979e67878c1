"""The spiking network: T steps simulated layer by layer, in chunks that fit the memory, exactly or in a fast mode."""

from micelab.network.grid import snap_to_grid
from micelab.network.records import LayerRun, SimulationRun
from micelab.network.spiking import Precision, SpikingNetwork

__all__ = ["LayerRun", "Precision", "SimulationRun", "SpikingNetwork", "snap_to_grid"]
