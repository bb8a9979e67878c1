"""The panel of one image on its way through a spiking network: its spikes layer by layer, and the answer so far."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from micelab import figures
from micelab.exceptions import InputError
from micelab.figures.style import Spec
from micelab.network.spiking import SpikingNetwork
from micelab.panels.panel import Panel, choice, slider


@dataclass(frozen=True)
class Look:
    """Where the reader looks: at which image, after which step, into which layer."""

    image: int
    step: int
    layer: str


class ImagePanel(Panel):
    """Sliders for image, step and layer: which neurons of the layer fire at this step, and what the network says by then.

    images [N, C, H, W] in [0, 1] with labels [N]; `classes` names them; each image is simulated for `time_steps` steps.

    >>> import micelab
    >>> snn, digits = micelab.convert(micelab.small_cnn(activation="quant_clip"), "qcfs"), micelab.load_data("digits")
    >>> images, labels = next(digits.test.head(4).batches())
    >>> ImagePanel(snn, images, labels, digits.classes, time_steps=4).state
    Look(image=0, step=4, layer='stem.2')
    """

    def __init__(self, snn: SpikingNetwork, images: Tensor, labels: Tensor, classes: Sequence[str], time_steps: int = 8):
        if not len(images) or len(images) != len(labels):
            raise InputError(
                f"there are {len(images)} images and {len(labels)} labels: give one label for each, and at least one"
            )
        self.images, self.labels, self.classes = images.detach().cpu(), labels.cpu(), tuple(classes)
        run = snn.simulate(images, time_steps, spikes=True)
        self.answers = run.logits.softmax(-1).cpu()
        self.spikes = {name: layer.spikes.cpu() for name, layer in run.layers.items() if layer.spikes is not None}
        names = list(self.spikes)
        self.state = Look(0, time_steps, names[0])
        last = len(images) - 1
        self.image = slider("image", 0, 0, last, 1, lambda value: self.choose(replace(self.state, image=int(value))))
        self.step = slider(
            "step t", time_steps, 1, time_steps, 1, lambda value: self.choose(replace(self.state, step=int(value)))
        )
        self.layer = choice("layer", names, names[0], lambda name: self.choose(replace(self.state, layer=name)))
        self.build([self.image, self.step, self.layer])

    def specs(self) -> list[Spec]:
        now = self.state
        spikes = self.spikes[now.layer][now.step - 1, now.image]
        answer = self.answers[now.step - 1, now.image].tolist()
        return [figures.spike_map.spec(spikes, now.layer, now.step), figures.running_answer.spec(answer, self.classes, now.step)]

    def answer(self) -> str:
        """The class that the network names after this step."""
        return self.classes[int(self.answers[self.state.step - 1, self.state.image].argmax())]

    def sentence(self) -> str:
        now = self.state
        spikes = self.spikes[now.layer][now.step - 1, now.image]
        return (
            f"image {now.image} (a {self.classes[int(self.labels[now.image])]}) after step {now.step}: the answer is "
            f"{self.answer()}; in layer {now.layer} ≈ {100 * float((spikes != 0).double().mean()):.0f} % of the neurons fire."
        )

    def __repr__(self) -> str:
        steps = self.answers.shape[0]
        return f"ImagePanel: {len(self.images)} images on their way through {len(self.spikes)} spiking layers in {steps} steps"

    def live(self) -> str:
        right = self.answer() == self.classes[int(self.labels[self.state.image])]
        mark, colour = ("✓", "#007a5a") if right else ("✗", "#b34700")
        source = base64.b64encode(as_png(self.images[self.state.image])).decode()
        return (
            f'<img src="data:image/png;base64,{source}" width="72" height="72" alt="image {self.state.image}" '
            'style="image-rendering:pixelated;float:left;margin-right:12px">'
            f'{self.sentence()} <b style="color:{colour}">{mark}</b>'
        )


def as_png(image: Tensor) -> bytes:
    """One image [C, H, W] in [0, 1] as PNG."""
    from torchvision.transforms.v2.functional import to_pil_image

    out = io.BytesIO()
    to_pil_image(image.clamp(0, 1).cpu()).save(out, "PNG")
    return out.getvalue()
