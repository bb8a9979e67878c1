"""Where the clipping bounds of a network begin that training starts from another network's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micelab.activation import QuantClip
from micelab.graph.tracing import evaluating
from micelab.methods.thresholds import Observation, mean_square_optimal

IMAGES = 256
"""So many training images, without augmentation, tell where the bounds begin."""
SAMPLES = 2**18
"""At most so many inputs of a layer, evenly chosen, decide on its bound."""


def fit_bounds(model: nn.Module, images: Tensor) -> None:
    """Sets the theta of every `QuantClip` of `model`: that of the staircase nearest to relu(z), in the mean square.

    images: [N, C, H, W] in [0, 1], in one forward pass in eval mode, with ReLU in the clips' places: `model` has the weights of
    a network that was trained with it. A layer that is never above 0 keeps its own theta. Source: the search of Li et al.
    (ICML 2021) for thresholds, here for bounds that training goes on from.

    >>> import micelab
    >>> model = micelab.small_cnn(activation="quant_clip", theta=100.0)
    >>> fit_bounds(model, torch.rand(8, 1, 8, 8))
    >>> bool(model.stem[2].theta < 10)
    True
    """

    def fit(activation: QuantClip, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        z = inputs[0].flatten()
        stride = -(-len(z) // SAMPLES)
        z = z[:: stride + (stride % 2 == 0)][None]  # odd, so that it does not fall in step with the image's rows
        if (highest := z.amax(1)) > 0:
            seen = Observation("", activation, z, highest, activation.levels, 100.0, activation.v0)
            activation.log_theta.copy_(mean_square_optimal(seen).log().squeeze(0).expand_as(activation.log_theta))
        return F.relu(inputs[0])

    hooks = [module.register_forward_hook(fit) for module in model.modules() if isinstance(module, QuantClip)]
    try:
        with evaluating(model), torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
