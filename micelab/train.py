"""Stage 1: training of the network to be converted, on held-in images, with a state that survives being stopped.

Everything random in a step depends on (seed, epoch, step) only, so a run that was killed and resumed ends bit for bit
where an undisturbed one ends, on the same machine and thread count.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micelab import checkpoint, models
from micelab.activation import TrainableClip
from micelab.batches import training_batches
from micelab.data import Augmentation, ImageData, Split, data_folder, load_data
from micelab.exceptions import CheckpointError, InputError, TrainingError
from micelab.machine import default_precision as default_precision
from micelab.machine import machine

log = logging.getLogger(__name__)
_COUNTERS = ("epoch", "step", "sums", "seconds")


@dataclass(frozen=True)
class TrainConfig:
    """Every choice of a stage-1 run. The recipe is the field's: SGD with Nesterov momentum 0.9, weight decay 5e-4 on
    weights only, warm-up, cosine to zero; bounds theta have a rate of their own (`theta_lr` times `lr`)."""

    dataset: str = "digits"
    network: str = "small_cnn"
    kind: models.Kind | None = None
    width: int | None = None
    activation: str = "quant_clip"
    levels: int | None = 8
    theta: float = 4.0
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    theta_lr: float = 0.1
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    augment: Augmentation = "standard"
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "fp32"
    compile: bool = False
    start: str | None = None

    def __post_init__(self) -> None:
        ranges = {
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "lr": 0 < self.lr < math.inf,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "theta_lr": 0 <= self.theta_lr < math.inf,
            "warmup_epochs": 0 <= self.warmup_epochs < math.inf,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "seed": self.seed >= 0,
            "precision": self.precision in ("bf16", "fp32"),
        }
        for name, good in ranges.items():
            if not good:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}, which is out of range")

    def build(self, data: ImageData) -> models.ImageNetwork:
        """The network to train, fitted to the data: weights drawn from `seed`, or those of the checkpoint `start`."""
        spec: dict[str, Any] = {"name": self.network, "activation": self.activation, "levels": self.levels}
        spec |= {"theta": self.theta, "num_classes": len(data.classes), "in_channels": data.shape[0]}
        spec |= {"mean": list(data.mean), "std": list(data.std)}
        spec |= {key: value for key in ("kind", "width") if (value := getattr(self, key)) is not None}
        torch.manual_seed(self.seed)
        model = models.build(spec)
        if self.start is not None:
            checkpoint.start_from(model, self.start)
        return model


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
    """
    from accelerate import Accelerator

    out = Path(out)
    data = data or load_data(config.dataset, folder)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    run = _Run(config, out, data, accelerator)
    if resume:
        run.read_state()
    elif (out / "state.safetensors").exists():
        raise InputError(f"{out} already holds a run: continue it with --resume, or choose another --out")
    with _stop_signals() as stopped:
        while run.epoch < config.epochs:
            run.one_epoch(progress and accelerator.is_main_process, stopped)
    if accelerator.is_main_process:
        card = run.card(command or " ".join(["micelab", *sys.argv[1:]]), data_folder(folder))
        checkpoint.save(run.model, out / "model", card)
    accelerator.wait_for_everyone()
    return run.model.eval()


class _Run:
    """Model, optimizer and counters of one run, and how they are saved."""

    def __init__(self, config: TrainConfig, out: Path, data: ImageData, accelerator: Any):
        self.config, self.out, self.data, self.accelerator = config, out, data, accelerator
        self.batches = training_batches(
            data.train,
            config.batch_size,
            config.augment,
            config.seed,
            flip=data.name != "digits",
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
        )
        self.model = config.build(data).to(accelerator.device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self._groups(), lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
        self.wrapped = accelerator.prepare_model(self.model)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        self.epoch, self.step, self.sums, self.seconds = 0, 0, [0.0, 0.0, 0.0], 0.0

    def _groups(self) -> list[dict[str, Any]]:
        config, named = self.config, list(self.model.named_parameters())
        bounds = [p for name, p in named if name.endswith("log_theta")]
        weights = [p for name, p in named if p.dim() > 1]
        others = [p for name, p in named if p.dim() <= 1 and not name.endswith("log_theta")]
        groups = [{"params": weights, "weight_decay": config.weight_decay, "scale": 1.0}]
        groups += [{"params": others, "weight_decay": 0.0, "scale": 1.0}]
        groups += [{"params": bounds, "weight_decay": 0.0, "scale": config.theta_lr}] if bounds else []
        return groups

    def rate(self) -> float:
        """Learning rate of the coming step: linear warm-up, then a cosine to zero."""
        config, done = self.config, self.epoch * len(self.batches) + self.step
        warm = min(config.warmup_epochs, config.epochs / 2) * len(self.batches)
        if done < warm:
            return config.lr * (done + 1) / warm
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
                self._one_step(images.to(device), labels.to(device))
                bar.update(self.config.batch_size)
                if self._must_stop(stopped):
                    self.seconds += time.perf_counter() - started
                    self.write_state()
                    raise KeyboardInterrupt(stopped[0] if stopped else signal.SIGTERM)
        self.seconds += time.perf_counter() - started
        self._finish_epoch()

    def _one_step(self, images: Tensor, labels: Tensor) -> None:
        config, rate = self.config, self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = self.forward(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        here = torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum(), torch.ones_like(labels).sum()])
        here = self.accelerator.reduce(here, "sum").tolist()
        if not math.isfinite(here[0]):
            state = self.out / "state.safetensors"
            kept = f"the last good state is kept in {state}" if state.exists() else "no epoch was finished before"
            raise TrainingError(
                f"the loss is {here[0]} in epoch {self.epoch + 1}, step {self.step + 1}: training has diverged; {kept}. "
                f"Lower --lr (now {config.lr}) or raise --theta (now {config.theta})"
            )
        self.optimizer.step()
        self.sums = [a + b for a, b in zip(self.sums, here, strict=True)]
        self.step += 1

    def _must_stop(self, stopped: list[int]) -> bool:
        if self.accelerator.num_processes == 1:
            return bool(stopped)
        flag = torch.tensor([float(bool(stopped))], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item() > 0)

    def _finish_epoch(self) -> None:
        loss, right, seen = self.sums
        line: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "loss": loss / seen,
            "train_accuracy": right / seen,
            "validation_accuracy": accuracy(self.model, self.data.validation, self.accelerator.device),
            "lr": self.rate(),
        }
        bounds = [m.theta.detach().mean().item() for m in self.model.modules() if isinstance(m, TrainableClip)]
        line |= {"theta": bounds} if bounds else {}
        line["seconds"] = round(self.seconds, 2)
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, [0.0, 0.0, 0.0], 0.0
        if self.accelerator.is_main_process:
            kept = self.history()[: self.epoch - 1]
            lines = "".join(json.dumps(entry) + "\n" for entry in [*kept, line])
            checkpoint.write_whole(self.out / "metrics.jsonl", lines.encode())
            self.write_state()
            log.info(
                "epoch %d/%d loss %.4f train %.2f %% validation %.2f %% %.0f s",
                *(self.epoch, self.config.epochs, line["loss"], 100 * line["train_accuracy"]),
                *(100 * line["validation_accuracy"], line["seconds"]),
            )

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        file = self.out / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() and self.epoch else []

    def write_state(self) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        words = {"config": asdict(self.config)} | {name: getattr(self, name) for name in _COUNTERS}
        checkpoint.write_tensors(self.out / "state.safetensors", tensors, words)

    def read_state(self) -> None:
        path = self.out / "state.safetensors"
        if not path.exists():
            raise CheckpointError(f"{self.out} holds no run to resume: start it without --resume")
        tensors, words = checkpoint.read_tensors(path)
        was, now = words["config"], asdict(self.config)
        differ = [f"{name} was {was.get(name)!r}, is {now[name]!r}" for name in now if was.get(name) != now[name]]
        if differ:
            raise InputError(f"{self.out} was started with other options: {'; '.join(differ)}. Resume with the same ones")
        weights = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
        checkpoint.load_weights(self.model, weights, path)
        for name, parameter in self.model.named_parameters():
            if f"momentum.{name}" in tensors:
                momentum = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(tensors[f"momentum.{name}"])
                self.optimizer.state[parameter]["momentum_buffer"] = momentum
        for name in _COUNTERS:
            setattr(self, name, words[name])

    def card(self, command: str, folder: Path) -> dict[str, Any]:
        history = self.history()
        return {
            "network": models.describe(self.model.spec),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dataset": self.data.name,
            "images": {name: len(self.data.split(name)) for name in ("train", "validation", "test")},
            "validation_accuracy": history[-1]["validation_accuracy"],
            "test_accuracy": accuracy(self.model, self.data.test, self.accelerator.device),
            "chosen": "the last epoch",
            "recipe": asdict(self.config),
            "hours": round(sum(line["seconds"] for line in history) / 3600, 3),
            "machine": machine(),
            "processes": self.accelerator.num_processes,
            "command": command,
        }


def accuracy(model: nn.Module, split: Split, device: torch.device | str = "cpu") -> float:
    """Share of `split` that `model` (eval mode, fp32) classifies rightly, in [0, 1]."""
    was = model.training
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in split.batches(device=device))
    model.train(was)
    return right / len(split)


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
