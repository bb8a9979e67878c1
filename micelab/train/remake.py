"""A trained network made again from its card: every run that led to it, one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from micelab import checkpoint
from micelab.exceptions import CheckpointError, InputError
from micelab.train.recipe import JointConfig, ThroughTimeConfig, TrainConfig
from micelab.train.run import train
from micelab.train.state import differences


def runs(name: str | Path) -> list[dict[str, Any]]:
    """What the card of the checkpoint `name` tells of every run that led to it, from the first to its own.

    Raises CheckpointError where it tells nothing.
    """
    card = getattr(checkpoint.load(name), "card", {})
    if "recipe" not in card:
        raise CheckpointError(f"{name} has no card that tells how it was trained, so that it cannot be made again")
    return [*card.get("stages_before", []), card]


def recipes(name: str | Path) -> list[TrainConfig | JointConfig]:
    """The recipe of every run that led to the checkpoint `name`, from the first to its own, as its card has them.

    >>> [type(recipe).__name__ for recipe in recipes("resnet20a-cifar100-qcfs")]
    ['TrainConfig', 'TrainConfig']

    Raises CheckpointError where the card tells no recipe, or one of another version.
    """
    return [_recipe(run["recipe"], name) for run in runs(name)]


def remake(name: str | Path, out: str | Path, folder: str | Path | None = None, progress: bool = True) -> Any:
    """Trains the checkpoint `name` again from nothing and gives back the network with its new card.

    Run 1, 2, ... is in the folder `out`/1, `out`/2, ... Each starts from what the one before it left, whatever its card called
    that; a teacher is the shipped one. Runs that are there are not made again, one that was stopped goes on. On the same
    machine, with the same threads and torch, the weights are the same.
    """
    from micelab import joint

    start = None
    for number, recipe in enumerate(recipes(name), 1):
        place = Path(out) / str(number)
        recipe = recipe if start is None else replace(recipe, start=str(start))
        start = place / "model.safetensors"
        if start.exists():
            _check_same(place, recipe)
            continue
        resume, command = (place / "state.safetensors").exists(), f"micelab remake {name}"
        if isinstance(recipe, JointConfig):
            joint.train(recipe, place, None, None, resume, progress, folder, command)
        else:
            train(recipe, place, None, resume, progress, folder, command)
    return checkpoint.load(str(start))


def _check_same(place: Path, recipe: TrainConfig | JointConfig) -> None:
    """Raises InputError where the run in the folder `place` is another than the one that is to be made there."""
    was = getattr(checkpoint.load(place / "model.safetensors"), "card", {}).get("recipe", {})
    was = was | {"start": recipe.start}  # the run before it, whatever its folder was called
    if differ := differences(was, recipe):
        raise InputError(f"{place} holds another network's run ({'; '.join(differ)}): choose another --out")


def _recipe(words: dict[str, Any], name: str | Path) -> TrainConfig | JointConfig:
    joint = ThroughTimeConfig if words.get("gradient") == "time" else JointConfig
    try:
        if "network" in words:
            return TrainConfig(**words)
        return joint(**words | {"time_steps": tuple(words["time_steps"])})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"the card of {name} is of another version of micelab: {error}") from error
