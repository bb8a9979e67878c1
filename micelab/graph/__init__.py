"""A network read as a graph: what follows what, what may stand between its activations, and a walk through its layers."""

from micelab.graph.tracing import activations, is_activation, read, replace_activations, trace

__all__ = ["activations", "is_activation", "read", "replace_activations", "trace"]
