"""The card of a trained network: what it is, how it was made, on what machine, and what it reaches."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from micelab import checkpoint, models
from micelab.data import ImageData
from micelab.machine import machine
from micelab.train.recipe import Recipe


def of_run(
    model: Any, data: ImageData, config: Recipe, reached: dict[str, float], hours: float, processes: int, command: str
) -> dict[str, Any]:
    """The card of `model` (one with a `spec`), trained on `data` by `command`; `reached`: its accuracies."""
    return {
        "network": models.describe(model.spec),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dataset": data.name,
        "images": {name: len(data.split(name)) for name in ("train", "validation", "test")},
        **reached,
        "chosen": "the last epoch",
        "recipe": asdict(config),
        "hours": round(hours, 3),
        "machine": machine(),
        "processes": processes,
        "command": command,
        "stages_before": stages(config.start),
    }


def stages(start: str | None) -> list[dict[str, Any]]:
    """What was trained before, first to last: recipe, command and hours of every run that led to the checkpoint `start`."""
    if start is None:
        return []
    card = getattr(checkpoint.load(start), "card", {})
    own = {key: card[key] for key in ("recipe", "command", "hours", "machine", "validation_accuracy") if key in card}
    return [*card.get("stages_before", []), *([own] if own else [])]
