"""Stage 1: training of the network to be converted, on held-in images, with a state that survives being stopped.

Everything random in a step depends on (seed, epoch, step) only, so a run that was killed and resumed ends bit for bit
where an undisturbed one ends, on the same machine and thread count.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micelab import checkpoint, models
from micelab.activation import NoisyQuantClip, TrainableClip
from micelab.data import ImageData, load_data, to_float
from micelab.exceptions import InputError, TrainingError
from micelab.machine import compiled, has_bf16, ran_out
from micelab.train import card, history, state
from micelab.train.answers import accuracy, must_tell_the_classes
from micelab.train.augment import small_side
from micelab.train.batches import training_batches
from micelab.train.noise import measure_noise
from micelab.train.recipe import Recipe, TrainConfig
from micelab.train.teacher import Teacher

log = logging.getLogger(__name__)
NOISE_IMAGES = 256
"""So many validation images tell the conversion error that noise training (NQ) trains with."""
STORAGE = {"fp32": torch.float32, "fp16": torch.float16}
_COUNTERS = ("epoch", "step", "sums", "seconds")


def train(
    config: TrainConfig,
    out: str | Path,
    data: ImageData | None = None,
    resume: bool = False,
    progress: bool = True,
    folder: str | Path | None = None,
    command: str | None = None,
) -> models.ImageNetwork:
    """Trains, writes `model.safetensors` with its card into the folder `out`, and gives back the network (eval mode).

    `out` also holds `state.safetensors` (written whole after every epoch and when stopped) and `metrics.jsonl` (a line an
    epoch). `resume=True` goes on from there; it refuses other options than the run was started with. Raises
    TrainingError where the loss is no longer finite (the last state is kept) and KeyboardInterrupt when stopped.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     net = train(TrainConfig(epochs=1), folder, progress=False)
    ...     sorted(file.name for file in Path(folder).iterdir())
    ['metrics.jsonl', 'model.json', 'model.safetensors', 'state.safetensors']
    """
    return carry_out(Run, config, out, data, resume, progress, folder, command or f"micelab.train.train({config}, {str(out)!r})")


def carry_out(
    kind: Callable[..., Run],
    config: Recipe,
    out: str | Path,
    data: ImageData | None,
    resume: bool,
    progress: bool,
    folder: str | Path | None,
    command: str,
) -> Any:
    """Makes a run of that kind, begins or resumes it, brings it to its end and saves the network with its card."""
    from accelerate import Accelerator

    out = Path(out)
    data = data or load_data(config.dataset, folder)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    run = kind(config, out, data, accelerator)
    saves = bool(getattr(run.model, "spec", None))
    if saves:
        checkpoint.check_spec(run.model)
    if resume:
        run.read_state()
    elif (out / "state.safetensors").exists():
        raise InputError(f"{out} already holds a run: continue it with --resume, or choose another --out")
    checkpoint.make_folder(out)
    with _stop_signals() as stopped:
        while run.epoch < config.epochs:
            run.one_epoch(progress and accelerator.is_main_process, stopped)
    if accelerator.is_main_process and saves:
        run.finish()
        checkpoint.save(run.model, out / "model", run.card(command), STORAGE[config.storage])
    accelerator.wait_for_everyone()
    return run.model.eval()


class Run:
    """Model, optimizer and counters of one run, and how they are saved. Stage 2 (micelab.joint) is a kind of it."""

    help = "Lower --lr (now {config.lr}) or raise --theta (now {config.theta})"

    def __init__(self, config: Any, out: Path, data: ImageData, accelerator: Any):
        self.config, self.out, self.data, self.accelerator = config, out, data, accelerator
        self.metrics = out / "metrics.jsonl"
        self.batches = training_batches(
            data.train,
            config.batch_size,
            config.augment,
            config.seed,
            flip=data.name != "digits",
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            small_epochs=config.small_epochs,
            views=config.views,
            device=accelerator.device,
        )
        self.model: Any = self.make_model().to(accelerator.device).to(memory_format=torch.channels_last)
        self.teacher = self.make_teacher() if config.distill else None
        if config.small_epochs:
            self._try_small(data.train.images[:1])
        self.optimizer = self.make_optimizer(_groups(self.model, config))
        self.forward = self.make_forward()
        if config.precision == "bf16" and not has_bf16(str(accelerator.device)):
            log.warning("--precision bf16: %s only emulates it, which is slow; fp32 would be faster", accelerator.device)
        self.epoch, self.step, self.sums, self.seconds = 0, 0, [0.0, 0.0, 0.0], 0.0
        self.changed = False  # after the last epoch

    def _try_small(self, images: Tensor) -> None:
        """Raises InputError where the network does not take crops of these images."""
        side = small_side(images.shape[-1])
        try:
            with torch.no_grad():
                self.model.eval()(to_float(images[..., :side, :side]).to(self.accelerator.device))
        except RuntimeError as error:
            raise InputError(
                f"--small-crops {self.config.small_crops:g}: the network takes no images of {side} x {side}; leave it out, or "
                "end the network's convolutions with nn.AdaptiveAvgPool2d(1)"
            ) from error

    def make_model(self) -> nn.Module:
        """The network to train."""
        return self.config.build(self.data)

    def teaching_network(self) -> nn.Module:
        """The network whose answers are learned too."""
        if (name := self.config.teacher or self.config.start) is None:
            raise InputError("--distill learns another network's answers: name its checkpoint with --teacher")
        return checkpoint.load(name)

    def make_teacher(self) -> Teacher:
        """The teacher, once it is known to tell the classes of the data apart."""
        network = self.teaching_network()
        must_tell_the_classes(network, self.data, "--teacher" if self.config.teacher else "--start")
        return Teacher(network, self.accelerator.device, self.config.temperature)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer; each group carries its rate's `scale`."""
        config = self.config
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)

    def make_forward(self) -> Callable[..., Any]:
        """What is called with images in training."""
        wrapped = self.accelerator.prepare_model(self.model)
        return compiled(wrapped) if self.config.compile else wrapped

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(what is minimized, logits) of a batch."""
        with self.autocast():
            logits = self.forward(images).float()
        return self.loss_of(logits, images, labels), logits

    def loss_of(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the logits, and, with a teacher, their divergence from its own."""
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        if self.teacher is None:
            return loss
        key = (*self.batches.view(self.epoch), self.step) if self.config.views else None
        with self.autocast():
            return loss + self.config.distill * self.teacher.divergence(logits, images, key)

    def measure(self) -> dict[str, Any]:
        """What is measured after every epoch, on the validation images; "validation_accuracy" among it."""
        found: dict[str, Any] = {"validation_accuracy": accuracy(self.model, self.data.validation, self.accelerator.device)}
        bounds = [m.theta.detach().mean().item() for m in self.model.modules() if isinstance(m, TrainableClip)]
        if any(isinstance(module, NoisyQuantClip) for module in self.model.modules()):  # the next epoch trains with this noise
            images = to_float(self.data.validation.images[:NOISE_IMAGES]).to(self.accelerator.device)
            found["sigma"] = list(measure_noise(self.model, images).values())
        return found | ({"theta": bounds} if bounds else {})

    def autocast(self) -> torch.autocast:
        """bf16 where the recipe asks for it."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def rate(self) -> float:
        """Learning rate of the coming step: linear warm-up, then a cosine to zero."""
        config, done = self.config, self.epoch * len(self.batches) + self.step
        warm = min(config.warmup_epochs, config.epochs / 2) * len(self.batches)
        if done < warm:
            return config.lr * min(1.0, (done + 1) / warm)
        return config.lr * 0.5 * (1 + math.cos(math.pi * (done - warm) / (config.epochs * len(self.batches) - warm)))

    def one_epoch(self, progress: bool, stopped: list[int]) -> None:
        from tqdm import tqdm

        started, device = time.perf_counter(), self.accelerator.device
        self.model.train()
        bar = tqdm(
            total=len(self.batches) * self.config.batch_size,
            initial=self.step * self.config.batch_size,
            desc=f"epoch {self.epoch + 1}/{self.config.epochs}",
            unit=" images",
            disable=None if progress else True,  # None: only where a person is watching
            leave=False,
            mininterval=1.0,
        )
        with bar:
            for images, labels in self.batches.epoch(self.epoch, self.step):
                self._try_step(images.to(device), labels.to(device))
                bar.update(self.config.batch_size)
                if self._must_stop(stopped):
                    self.seconds += time.perf_counter() - started
                    self._check_weights()
                    self.write_state()
                    raise KeyboardInterrupt(stopped[0] if stopped else signal.SIGTERM)
        self.seconds += time.perf_counter() - started
        self._finish_epoch()

    def _one_step(self, images: Tensor, labels: Tensor) -> None:
        config, rate = self.config, self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss, logits = self.loss(images, labels)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        here = torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum(), torch.ones_like(labels).sum()])
        here = self.accelerator.reduce(here, "sum").tolist()
        if not math.isfinite(here[0]):
            raise self._diverged(f"the loss is {here[0]}")
        if max_norm := getattr(config, "max_norm", None):
            self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()
        self.sums = [a + b for a, b in zip(self.sums, here, strict=True)]
        self.step += 1

    def _try_step(self, images: Tensor, labels: Tensor) -> None:
        try:
            self._one_step(images, labels)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise TrainingError(
                f"the memory of {images.device} does not suffice for a step of {len(images)} images; {self._kept()}. "
                f"Begin again with a lower --batch-size (now {self.config.batch_size}), or free what else lies there and --resume"
            ) from error

    def _check_weights(self) -> None:
        """Raises TrainingError before weights that the last step spoiled take the place of good ones."""
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise self._diverged(f"`{name}` is no longer finite")

    def _diverged(self, what: str) -> TrainingError:
        where = f"epoch {self.epoch + 1}, step {self.step + 1}"
        return TrainingError(f"{what} in {where}: training has diverged; {self._kept()}. " + self.help.format(config=self.config))

    def _kept(self) -> str:
        state = self.out / "state.safetensors"
        return f"the last good state is kept in {state}" if state.exists() else "no epoch was finished before"

    def _must_stop(self, stopped: list[int]) -> bool:
        if self.accelerator.num_processes == 1:
            return bool(stopped)
        flag = torch.tensor([float(bool(stopped))], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item() > 0)

    def _finish_epoch(self) -> None:
        self._check_weights()
        loss, right, seen = self.sums
        line: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "loss": loss / seen,
            "train_accuracy": right / seen,
            "lr": self.rate(),
        }
        line |= self.measure()
        line["seconds"] = round(self.seconds, 2)
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, [0.0, 0.0, 0.0], 0.0
        if self.accelerator.is_main_process:
            history.add(self.metrics, line)
            self.write_state()
            log.info(
                "epoch %d/%d loss %.4f train %.2f %% validation %.2f %% %.0f s",
                *(self.epoch, self.config.epochs, line["loss"], 100 * line["train_accuracy"]),
                *(100 * line["validation_accuracy"], line["seconds"]),
            )

    def write_state(self) -> None:
        if self.accelerator.is_main_process:
            words = {"config": asdict(self.config)} | {name: getattr(self, name) for name in _COUNTERS}
            state.write(self.out / "state.safetensors", self.model, self.optimizer, words)

    def read_state(self) -> None:
        words = state.read(self.out / "state.safetensors", self.model, self.optimizer, self.config)
        for name in _COUNTERS:
            setattr(self, name, words[name])
        if self.accelerator.is_main_process:
            history.read(self.metrics, self.epoch)  # or it says so before hours of training

    def finish(self) -> None:
        """Makes the network what its file will hold, so that what is measured of it is true of the file."""
        self.changed |= self.config.storage != "fp32"
        for value in self.model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.to(STORAGE[self.config.storage]))

    def card(self, command: str) -> dict[str, Any]:
        """What goes beside the network: what it is, how it was made, what it reaches."""
        epochs = history.read(self.metrics, self.epoch)
        measured = self.measure() if self.changed else epochs[-1]
        reached = {"validation_accuracy": measured["validation_accuracy"]}
        reached |= {"test_accuracy": accuracy(self.model, self.data.test, self.accelerator.device)}
        hours = sum(line["seconds"] for line in epochs) / 3600
        return card.of_run(self.model, self.data, self.config, reached, hours, self.accelerator.num_processes, command)


def _groups(model: nn.Module, config: Recipe) -> list[dict[str, Any]]:
    """Parameters by what becomes of them: weights decay, batch-norm and biases do not, theta and v0 have their own rate."""
    named = list(model.named_parameters())
    bounds = [p for name, p in named if name.endswith(("log_theta", "v0_start"))]
    weights = [p for _, p in named if p.dim() > 1]
    others = [p for name, p in named if p.dim() <= 1 and not name.endswith(("log_theta", "v0_start"))]
    groups = [{"params": weights, "weight_decay": config.weight_decay, "scale": 1.0}]
    groups += [{"params": others, "weight_decay": 0.0, "scale": 1.0}]
    groups += [{"params": bounds, "weight_decay": 0.0, "scale": config.theta_lr}] if bounds else []
    return groups


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the step in hand ends and the state is written before the run stops."""
    caught: list[int] = []
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda n, _: caught.append(n))
    except ValueError:  # not the main thread: signals stay with whoever owns it
        pass
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
