"""Stage 2, joint training: the spikes run in the loop, so that quantization, clipping and timing errors are all in the loss.

The scheme follows MiCE (Ho & Chang, JETCAS 2023) as far as its abstract tells; docs/method.md says what is documented, what
inferred and what our choice. `joint.loop` holds the pass itself; a run is one of stage 1 (micelab.train) with other parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from micelab import checkpoint
from micelab.activation import SpikeClip, TrainableClip
from micelab.convert import convert
from micelab.data import ImageData
from micelab.exceptions import ConversionError, InputError
from micelab.graph.tracing import activations, trace
from micelab.joint.loop import SpikesInTheLoop
from micelab.joint.through_time import SpikesThroughTime
from micelab.metrics import accuracy_curve
from micelab.train.answers import accuracy, must_tell_the_classes
from micelab.train.batches import mix
from micelab.train.recipe import JointConfig
from micelab.train.run import Run, carry_out


def prepare(model: nn.Module, time_steps: int = 8) -> Any:
    """A copy of `model` whose every bounded activation is a SpikeClip of T = `time_steps` levels, ready for joint training.

    Bounds (and starts, where the network was trained jointly before) are kept. Raises ConversionError naming the layer
    where the network cannot be converted or an activation has no trained bound.

    >>> import micelab
    >>> net = prepare(micelab.small_cnn(activation="quant_clip"), time_steps=2)
    >>> net.stem[2]
    SpikeClip(theta=2, levels=2)
    """
    if not isinstance(time_steps, int) or time_steps < 1:
        raise InputError(f"time_steps is {time_steps!r}: joint training needs an integer of at least 1")
    found = activations(trace(model))
    net: Any = copy.deepcopy(model)
    own = dict(net.named_modules())
    for name, activation in found.items():
        if not isinstance(activation, TrainableClip):
            raise ConversionError(
                f"layer `{name}` is nn.{type(activation).__name__} and has no trained bound: train stage 1 first, with "
                'activation="quant_clip" (micelab.QuantClip)'
            )
        if name not in own:
            raise ConversionError(f"`{name}` is a second call of one activation: give each call a module of its own")
        net.set_submodule(name, SpikeClip.like(activation, time_steps))
    if getattr(net, "spec", None):
        net.spec = net.spec | {"activation": "spike_clip", "levels": time_steps}
    return net


def train(
    config: JointConfig,
    out: str | Path,
    data: ImageData | None = None,
    model: nn.Module | None = None,
    resume: bool = False,
    progress: bool = True,
    folder: str | Path | None = None,
    command: str | None = None,
) -> Any:
    """Stage 2: trains `model` (or the checkpoint `config.start`) with spikes in the loop; gives back the network.

    `model`: any convertible network with trained bounds; it is not changed. One without a `spec` is given back and not saved; one
    that its `spec` does not describe is refused before the first epoch. Folder, resuming and errors as in
    `micelab.train.train`. Convert what comes back with method="mice".

    >>> import tempfile
    >>> import micelab
    >>> start, recipe = micelab.small_cnn(activation="quant_clip"), micelab.joint.ThroughTimeConfig(time_steps=(2,), epochs=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     net = train(recipe, folder, model=start, progress=False)
    >>> micelab.convert(net, "mice", time_steps=2).method
    'mice'
    """

    def kind(*args: Any) -> Run:
        return _JointRun(*args, model=model)

    typed = command or f"micelab.joint.train({config}, {str(out)!r})"
    return carry_out(kind, config, out, data, resume, progress, folder, typed)


class _JointRun(Run):
    help = "Lower --lr (now {config.lr})"

    def __init__(self, *args: Any, model: nn.Module | None):
        self.given = model
        self.begun: dict[str, Tensor] = {}
        super().__init__(*args)

    def make_model(self) -> nn.Module:
        config = self.config
        if self.given is None and config.start is None:
            raise InputError("joint training starts from a stage-1 network: name its checkpoint with --start")
        start = self.given if self.given is not None else checkpoint.load(config.start)
        must_tell_the_classes(start, self.data, "--start" if self.given is None else "the network")
        net = prepare(start, max(config.time_steps)).train()
        if config.average:
            if other := next((name for name, kind in activations(trace(start)).items() if not isinstance(kind, SpikeClip)), None):
                raise InputError(
                    f"--average: layer `{other}` of --start was not trained jointly: leave it out, or name one that was"
                )
            self.begun = {name: value.clone() for name, value in net.state_dict().items()}
        return net

    def teaching_network(self) -> nn.Module:
        return self.given if self.given is not None and self.config.teacher is None else super().teaching_network()

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self.config.gradient == "time":
            return torch.optim.SGD(groups, lr=self.config.lr, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=self.config.lr)

    def make_forward(self) -> Callable[..., Any]:
        kind = SpikesThroughTime if self.config.gradient == "time" else SpikesInTheLoop
        return self.accelerator.prepare_model(kind(self.model))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        drawn = mix(config.seed, self.epoch, self.step) % len(config.time_steps)
        with self.autocast():
            logits, penalty = self.forward(images, config.time_steps[drawn], penalize=config.penalty > 0)
        logits = logits.float()
        loss = self.loss_of(logits, images, labels)
        return (loss + config.penalty * penalty if config.penalty else loss), logits

    def finish(self) -> None:
        if self.config.average:
            self.changed = True
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(self.begun[name].to(value), 0.5)
        super().finish()

    def measure(self) -> dict[str, Any]:
        return self._reached("validation")

    def _reached(self, split: str) -> dict[str, Any]:
        """Accuracy of the spiking network, mean over the T it is trained for and at each, and of its staircase as an ANN."""
        images = self.data.split(split)  # type: ignore[arg-type]
        snn = convert(self.model, "mice").to(self.accelerator.device)
        curve = accuracy_curve(snn, images.batches(device=self.accelerator.device), self.config.time_steps)
        return {
            f"{split}_accuracy": sum(curve.accuracy) / len(curve.accuracy),
            f"{split}_accuracy_by_time_steps": dict(zip(map(str, curve.time_steps), curve.accuracy, strict=True)),
            f"{split}_accuracy_of_ann": accuracy(self.model, images, self.accelerator.device),
        }

    def card(self, command: str) -> dict[str, Any]:
        words = super().card(command) | self._reached("test")
        if self.config.average:
            words |= {"chosen": "the last epoch, averaged with the start"}
        return words | {"neuron": "plain integrate-and-fire, soft reset", "hidden_steps": 0}
