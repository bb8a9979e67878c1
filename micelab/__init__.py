"""micelab: see, learn and use the conversion of a trained neural network into a spiking one."""

__version__ = "0.1.0"
