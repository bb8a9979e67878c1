"""Networks on disk: safetensors for the numbers, JSON for the words, written whole or not at all, never a pickle."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from micelab import models
from micelab.exceptions import CheckpointError, MicelabError

log = logging.getLogger(__name__)


def write_whole(path: Path, content: bytes) -> None:
    """Puts `content` at `path` in one step: a reader sees the old file or the new one, never a half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        why = error.strerror or error
        raise CheckpointError(f"{path} could not be written ({why}); what was there before is whole") from error


def make_folder(path: Path) -> None:
    """A folder to write into, made where there is none. Raises CheckpointError where there cannot be one."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise CheckpointError(f"{path} is no folder that can be written ({error.strerror or error}): choose another") from error


def write_json(path: Path, words: Any) -> None:
    """`words` as indented JSON, in one step."""
    write_whole(path, (json.dumps(words, indent=1) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], words: dict[str, Any]) -> None:
    """Tensors and a JSON dict in one safetensors file; each has its own numbers there, also where two share their memory."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        plain[name] = own.clone() if (place := own.untyped_storage().data_ptr()) in taken else own
        taken.add(place)
    write_whole(path, to_bytes(plain, {"micelab": json.dumps(words)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises CheckpointError where the file is missing, cut off, of another kind or not micelab's."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] not in (b"", b"{"):  # behind eight bytes that tell its length, a safetensors file has words
            raise CheckpointError(
                f"{path} is no safetensors file, and one of torch.save is not opened, since it may run code: load its weights "
                "yourself (torch.load with weights_only=True) into a network of micelab.resnet20 or micelab.small_cnn, and "
                "micelab.save that"
            )
        with safe_open(str(path), framework="pt") as file:
            words = json.loads((file.metadata() or {})["micelab"])
            if not isinstance(words, dict):
                raise KeyError("micelab")
            return {name: file.get_tensor(name) for name in file.keys()}, words  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or only half written ({error}): fetch or make it again") from error
    except KeyError as error:
        raise CheckpointError(f"{path} was not written by micelab: load its weights into your own model instead") from error


def save(model: nn.Module, path: str | Path, card: dict[str, Any] | None = None, dtype: torch.dtype | None = None) -> Path:
    """Writes a network built by micelab (its `spec` goes along) and, beside it, its card as JSON; gives back the path.

    `card`: recipe, seed, epochs, machine, accuracies, command; `dtype`: torch.float16 halves the file, and `load` gives back
    float32 all the same. Raises CheckpointError where `load` would give back another network: `model` is not in float32, or a
    layer is not what the `spec` builds.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(models.small_cnn(), Path(folder) / "mine", {"seed": 0})
    ...     print(path.name, load(path).card)
    mine.safetensors {'seed': 0}
    """
    check_spec(model)
    path = Path(path)
    if not path.name:
        raise CheckpointError(f"{str(path)!r} is no file that a network could be written to: give one")
    path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")  # "lr0.1" is no ending
    tensors = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in model.state_dict().items()}
    write_tensors(path, tensors, {"spec": model.spec, "card": card or {}})
    if card:
        write_json(path.with_suffix(".json"), card)
    return path


def check_spec(model: nn.Module) -> None:
    """Raises CheckpointError, naming the first layer that differs, where `model` is not the network that its `spec` builds."""
    spec: Any = getattr(model, "spec", None)
    if not isinstance(spec, dict) or not spec.get("ann", spec):
        raise CheckpointError(
            f"{type(model).__name__} has no `spec` to rebuild it from: use micelab.resnet20 or micelab.small_cnn, or torch.save"
        )
    tensors = model.state_dict()
    if others := {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} - {torch.float32}:
        raise CheckpointError(f"the network is in {others.pop()}, and `load` gives back torch.float32: save network.float()")
    with torch.random.fork_rng(devices=[]):  # the weights it begins with are drawn, which a training must not notice
        rebuilt = _restore(spec, tensors, "the network's `spec`")
    own, told = ({name: _described(module) for name, module in network.named_modules()} for network in (model, rebuilt))
    for name in own | told:
        here, there = own.get(name, {"kind": "none"}), told.get(name, {"kind": "none"})
        for key in there:
            if here.get(key) != there.get(key):
                layer = f"layer `{name}`" if name else "the network"
                raise CheckpointError(
                    f"{layer}: {key} is {here.get(key)}, and its `spec` builds {there[key]}, which `load` would give back: make "
                    "the network with that option, if there is one, or use torch.save"
                )


def _described(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint does not hold of a module, children aside: its kind, its options and the shapes of its tensors."""
    options = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
    plain = {key: value for key, value in options.items() if isinstance(value, (int, float, str, tuple, type(None)))}
    tensors = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return {"kind": type(module).__name__, **plain, "shapes": {name: tuple(tensor.shape) for name, tensor in tensors}}


def load(name: str | Path, folder: str | Path | None = None) -> nn.Module:
    """The network of a checkpoint, in eval mode, by name ("resnet20a-cifar10-relu") or path; its card is `.card`.

    Names are looked for in `folder`, then $MICELAB_DATA/checkpoints, data/checkpoints, and the repository's own.

    >>> net = load("resnet20a-cifar10-mice-t4")
    >>> net(torch.zeros(1, 3, 32, 32)).shape, net.card["dataset"]
    (torch.Size([1, 10]), 'cifar10')
    """
    path = find(name, folder)
    tensors, words = read_tensors(path)
    if "spec" not in words:
        raise CheckpointError(f"{path} holds the state of a run and no network: give the model.safetensors beside it")
    model = _restore(words["spec"], tensors, path)
    load_weights(model, tensors, path)
    model.card = words.get("card", {})
    return model.eval()


def start_from(model: nn.Module, name: str | Path) -> None:
    """Copies the weights of a checkpoint into `model`, whose activations may be others: what only one of them has stays.

    Of a network for another number of classes, what has one row for each begins anew, as `model` has it, and the log says so.
    """
    path = find(name)
    tensors, words = read_tensors(path)
    own = model.state_dict()
    there, here = (spec.get("num_classes") if spec else None for spec in (words.get("spec"), getattr(model, "spec", None)))
    if there != here and (anew := _by_classes(own, here) & _by_classes(tensors, there)):
        names = " and ".join(sorted(anew))
        log.warning("%s tells %s classes apart, the network here %s: %s begin anew", path, there, here, names)
        tensors |= {key: value for key, value in own.items() if key in anew or key.startswith("normalize.")}
    of_activations = (".log_theta", ".sigma", ".v0_start")
    bounds = {key: value for key, value in own.items() if key.endswith(of_activations) and key not in tensors}
    weights = {key: value for key, value in tensors.items() if key in own or not key.endswith(of_activations)}
    load_weights(model, weights | bounds, path)


def _by_classes(tensors: dict[str, Tensor], classes: Any) -> set[str]:
    """The names of those that have one row for each class."""
    return {name for name, tensor in tensors.items() if tensor.shape[:1] == (classes,)}


def _restore(spec: Any, tensors: dict[str, Tensor], source: Any) -> nn.Module:
    """The network of a `spec` that `source` holds, its numbers not loaded."""
    if not isinstance(spec, dict):
        raise CheckpointError(f"{source} names no network: its `spec` is {spec!r}, where the options of one are needed")
    from micelab.convert import restore  # convert stands above this module

    try:
        return restore(spec, tensors) if "ann" in spec else models.build(spec)
    except (KeyError, TypeError, ValueError, MicelabError) as error:
        raise CheckpointError(f"{source} names a network that this version does not know: {error}") from error


def load_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies `tensors` into `model`; names the first mismatch where they are another network's."""
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or name not in own:
            raise CheckpointError(f"{path} is of another network: `{name}` is only in the {'model' if name in own else 'file'}")
        if own[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            raise CheckpointError(f"{path} is of another network: `{name}` has shape {shapes}")
        if tensors[name].is_floating_point() and not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(f"{path} holds NaN or infinite numbers in `{name}`: it cannot be used")
    model.load_state_dict(tensors)


def find(name: str | Path, folder: str | Path | None = None) -> Path:
    """The file of a checkpoint by name or path. Raises CheckpointError that lists what there is."""
    if not isinstance(name, (str, os.PathLike)):
        raise CheckpointError(f"a checkpoint is asked for as {name!r}: give its name or its path")
    direct = Path(name)
    if direct.suffix == ".safetensors" or direct.is_file():
        if not direct.is_file():
            raise CheckpointError(f"checkpoint {direct} does not exist")
        return direct
    places = [*([Path(folder)] if folder else []), Path(), *_places()]  # the second: a path without its ending
    for place in places:
        if (place / f"{name}.safetensors").is_file():
            return place / f"{name}.safetensors"
    raise CheckpointError(
        f"no checkpoint is named {str(name)!r}; here are: {', '.join(shipped(folder)) or 'none'}. "
        "The shipped ones come with the repository (data/checkpoints)"
    )


def shipped(folder: str | Path | None = None) -> list[str]:
    """The names that `load` knows, in alphabetical order."""
    places = [*([Path(folder)] if folder else []), *_places()]
    return sorted({file.stem for place in places for file in place.glob("*.safetensors")})


def _places() -> list[Path]:
    own = [Path(os.environ["MICELAB_DATA"]) / "checkpoints"] if os.environ.get("MICELAB_DATA") else []
    return [*own, Path("data/checkpoints"), Path(__file__).parent.parent / "data" / "checkpoints"]
