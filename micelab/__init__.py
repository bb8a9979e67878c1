"""micelab: see, learn and use the conversion of a trained neural network into a spiking one.

ann   = micelab.load("resnet20a-cifar10-qcfs")
snn   = micelab.convert(ann, method="qcfs")
run   = snn.simulate(images, time_steps=8)
table = micelab.error_breakdown(ann, snn, images, time_steps=8)
curve = micelab.accuracy_curve(snn, loader)
"""

from micelab import joint, methods, neuron, train
from micelab.activation import NoisyQuantClip, QuantClip, SpikeClip, TrainableClip
from micelab.checkpoint import load, save
from micelab.convert import convert
from micelab.data import load_data
from micelab.errors import error_breakdown
from micelab.exceptions import MicelabError
from micelab.graph.checkup import checkup
from micelab.metrics import accuracy_curve, energy, lost_points
from micelab.models import resnet20, small_cnn
from micelab.network.grid import snap_to_grid
from micelab.network.spiking import SpikingNetwork
from micelab.train.noise import measure_noise

__version__ = "0.1.0"

__all__ = [
    "MicelabError",
    "NoisyQuantClip",
    "QuantClip",
    "SpikeClip",
    "SpikingNetwork",
    "TrainableClip",
    "accuracy_curve",
    "checkup",
    "convert",
    "energy",
    "error_breakdown",
    "joint",
    "load",
    "load_data",
    "lost_points",
    "measure_noise",
    "methods",
    "neuron",
    "resnet20",
    "save",
    "small_cnn",
    "snap_to_grid",
    "train",
]
