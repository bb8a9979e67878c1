"""How fast a converted network runs, beside its convolutions alone and beside other simulators, in one run.

    make bench                                          # everything, eleven minutes on two cores: JSON and a picture
    python benchmarks/simulation.py --rounds 3 --quick  # the table only, with the peers that are installed
    python benchmarks/simulation.py --memory            # peak memory of 1,000 images at T = 64
    python benchmarks/simulation.py --accuracy          # what the fast modes and the grid cost on all test images

Same weights, thresholds, starts and images for all; the ways alternate, `--rounds` times; medians, lowest and highest are written
down. "convolutions alone" is the floor: T times the network's own convolutions, no neurons at all, in batches of several sizes,
one after another or side by side. Spike counts are compared on the network put on a grid, where every sum is exact, with a
simulation in fp64. A timing is a ratio within one run: compare no two machines by it. `--clock cpu` counts the seconds of the
process instead of those on the wall, for one thread on a machine that others use too.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn

import micelab
from micelab.checkpoint import write_json
from micelab.graph import replace_activations
from micelab.machine import full_precision, has_bf16, machine
from micelab.network.memory import in_chunks
from micelab.network.spiking import PRECISIONS, Precision, is_here

Way = Callable[[Tensor, int], Any]
STEPS, BATCHES, WIDTHS = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16, 64, 256, 1024), (16, 32, 64)


def convolutions_alone(
    snn: micelab.SpikingNetwork, time_steps: int, batch: int, lanes: int = 1, kind: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """The floor: the network's own convolutions on T images for each one, `batch` at a time, with no neuron work at all.

    lanes: how many batches go side by side, each by one thread; 1: one after another, each by all threads. kind: what is
    multiplied, or None for the network's own numbers.
    """
    net = replace_activations(copy.deepcopy(snn.layers), lambda *_: nn.Identity()).to(kind, memory_format=torch.channels_last)

    def steps(part: Tensor) -> Tensor:
        with torch.inference_mode():
            for _ in range(time_steps):
                out = net(part)
            return out

    def run(images: Tensor) -> Tensor:
        images = images.to(kind or images.dtype, memory_format=torch.channels_last)
        return [out for _, _, out in in_chunks(images, batch, steps, lanes=lanes)][-1]

    return run


def peak_memory(snn: micelab.SpikingNetwork) -> dict[str, int]:
    """Largest resident memory, in MB, of a process that imports torch and no more, and of this one before T = 64 steps of 1,000
    images, after them with the logits alone kept, with every layer's run given chunk by chunk, with every layer's spike counts
    kept, and with all of it kept at once."""

    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    script = "import torch; print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    alone = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    images = torch.rand(1000, 3, 32, 32)
    found = {"time_steps": 64, "images": 1000, "torch_mb": int(alone) // 1024, "before_mb": resident()}
    assert not snn.simulate(images, 64, record=False).layers
    found["logits_mb"] = resident()
    assert sum(len(part) for part, run in snn.stream(images, 64) if run.layers) == 1000
    found["stream_mb"] = resident()
    assert len(snn.simulate(images, 64, record="counts").layers) == len(snn.neurons)
    found["counts_mb"] = resident()
    assert len(snn.simulate(images, 64).layers) == len(snn.neurons)
    return found | {"all_kept_mb": resident()}


def accuracies(snn: micelab.SpikingNetwork, data: micelab.data.ImageData, time_steps: int, images: int) -> dict[str, Any]:
    """Accuracy in fp32, of the fast modes that the device has and on the grid, on so many test images; for how many of them, as a
    share, the answer is that of fp32; and the shares that only fp32 had right (lost), and only the other way (won)."""
    device = next(snn.layers.parameters()).device
    ways: dict[str, Any] = {mode: (snn, mode) for mode in PRECISIONS[1:] if is_here(mode, device)}
    ways["grid"] = (micelab.snap_to_grid(snn, time_steps=time_steps), "auto")
    answers: dict[str, list[Tensor]] = {name: [] for name in ways}
    labels = []
    for pixels, classes in data.test.head(images).batches(500, device=device):
        labels.append(classes)
        for name, (network, precision) in ways.items():
            answers[name].append(network(pixels, time_steps, precision=precision).argmax(1))
    right, exact = torch.cat(labels), torch.cat(answers["fp32"])
    found = {}
    for name, parts in answers.items():
        answer = torch.cat(parts)
        shares = {"accuracy": answer == right, "same_as_fp32": answer == exact}
        shares |= {"lost": (exact == right) & (answer != right), "won": (exact != right) & (answer == right)}
        found[name] = {key: round(float(share.double().mean()), 4) for key, share in shares.items()}
    found["grid"]["fewest_bits"] = min(ways["grid"][0].spec["grid"]["bits"].values())
    return found


def mean_costs(networks: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What each way costs over all `networks`, in points of accuracy, mean and standard error: every changed answer counts as a
    draw of its own, since which answers change differs from network to network."""
    total = sum(row["images"] for row in networks.values())
    costs = {}
    for way in next(iter(networks.values()))["accuracy"]:
        rows = [(row["images"], row["accuracy"][way]) for row in networks.values()]
        mean = sum(n * (row["lost"] - row["won"]) for n, row in rows) / total
        square = sum(n * (row["lost"] + row["won"]) for n, row in rows) / total
        error = math.sqrt((square - mean * mean) / total)
        costs[way] = {"points": round(100 * mean, 3), "standard_error": round(100 * error, 3)}
    return costs


def all_accuracies(names: list[str], time_steps: int | None, images: int, device: str) -> dict[str, Any]:
    """`accuracies` of every network at T = `time_steps` (None: those it was trained for), and what they cost in the mean."""
    found = {}
    for name in names:
        ann, snn = converted(name, device)
        steps = time_steps or max(ann.card["recipe"].get("time_steps", [8]))
        row = {"time_steps": steps, "images": images}
        found[name] = row | {"accuracy": accuracies(snn, micelab.load_data(ann.card["dataset"]), steps, images)}
    return {"networks": found, "mean_cost": mean_costs(found)}


def converted(name: str, device: str) -> tuple[Any, micelab.SpikingNetwork]:
    """A shipped network, and what conversion makes of it."""
    ann: Any = micelab.load(name)
    return ann, micelab.convert(ann, "mice" if ann.spec.get("activation") == "spike_clip" else "qcfs").to(device)


def ways(snn: micelab.SpikingNetwork, names: list[str], floor: int = 64) -> dict[str, Way]:
    """micelab as it is by default, in its other precisions where the device has them, the floor, and the peers `names`."""
    found: dict[str, Way] = {"micelab": lambda x, t: snn.simulate(x, t, record=False).logits[-1]}
    found["micelab, everything recorded"] = lambda x, t: snn.simulate(x, t).logits[-1]
    for mode in others(snn):
        found[f"micelab, {mode}"] = lambda x, t, mode=mode: snn.simulate(x, t, record=False, precision=mode).logits[-1]
    kinds = {"": None} | ({"bf16 ": torch.bfloat16} if "micelab, bf16" in found else {})
    for label, kind in kinds.items():
        for batch in (floor // 4, floor, 4 * floor):
            name = f"{label}convolutions alone, {batch} at a time"
            found[name] = lambda x, t, batch=batch, kind=kind: convolutions_alone(snn, t, batch, 1, kind)(x)
        if (threads := torch.get_num_threads()) > 1 and not next(snn.layers.parameters()).is_cuda:
            for batch in (floor // 8, floor // 4):
                name = f"{label}convolutions alone, {batch} at a time, side by side"
                found[name] = lambda x, t, batch=batch, kind=kind: convolutions_alone(snn, t, batch, threads, kind)(x)
    for name in names:
        found[name] = peers.peer(name, snn).run
    return found


def others(snn: micelab.SpikingNetwork) -> list[Precision]:
    """The precisions that the network's device has, beside the default."""
    device = next(snn.layers.parameters()).device
    usual = ("auto", snn.precision_here("auto", device))
    return [mode for mode in PRECISIONS if mode not in usual and is_here(mode, device)]


def timed(found: dict[str, Way], images: Tensor, time_steps: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Images a second of every way: median, lowest and highest of `rounds` alternating runs, after one to warm up."""
    wait: Callable[[], None] = torch.cuda.synchronize if images.is_cuda else lambda: None
    speeds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 2):  # micelab tries its chunks in the first two
        for name, run in found.items():
            if number == 1 and not name.startswith("micelab"):
                continue
            wait()
            started = clock()
            run(images, time_steps)
            wait()
            if number > 1:
                speeds[name].append(len(images) / max(clock() - started, 1e-9))
    rows = {}
    for name, values in speeds.items():
        row = {"images_per_second": statistics.median(values), "lowest": min(values), "highest": max(values)}
        rows[name] = {key: round(value, 1) for key, value in row.items()}
    return rows


def with_ratios(rows: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The rows, each with its ratio to the floor (the best way to do the convolutions alone; for bf16 that of bf16) and to the
    best peer."""
    speed = lambda name: rows[name]["images_per_second"]
    floors = {kind: [speed(name) for name in rows if name.startswith(f"{kind}convolutions")] for kind in ("", "bf16 ")}
    best = max((speed(name) for name in names), default=None)
    for name, row in rows.items():
        kind = "bf16 " if name.startswith("bf16 ") or name.endswith(" bf16") else ""
        row["share_of_floor"] = round(row["images_per_second"] / max(floors[kind]), 3)
        row["ratio_to_best_peer"] = None if best is None else round(row["images_per_second"] / best, 2)
    return rows


def counts_alike(snn: micelab.SpikingNetwork, images: Tensor, time_steps: int, names: list[str]) -> dict[str, float]:
    """Share of neurons whose spike count is that of a simulation in fp64, on the network put on a grid."""
    snapped = micelab.snap_to_grid(snn, time_steps=time_steps)
    oracle = copy.deepcopy(snapped).double().simulate(images, time_steps).layers
    found = {}
    here = [mode for mode in others(snn) if mode not in ("bf16", "int8")]
    for name, mode in {"micelab": "auto", **{f"micelab, {mode}": mode for mode in here}}.items():
        run = snapped.simulate(images, time_steps, record="counts", precision=mode)
        found[name] = {layer: did.count for layer, did in run.layers.items()}
    for name in names:
        network = peers.peer(name, snapped)
        network.run(images, time_steps, count=True)
        found[name] = network.counts
    neurons = sum(layer.count.numel() for layer in oracle.values())
    return {
        name: sum(int((counts[layer] == run.count).sum()) for layer, run in oracle.items()) / neurons
        for name, counts in found.items()
    }


def scaling(snn: micelab.SpikingNetwork, images: Tensor, names: list[str], rounds: int, clock: Any) -> dict[str, Any]:
    """Images a second over T, batch and width."""
    chosen = {name: way for name, way in ways(snn, names).items() if _drawn(name)}
    out: dict[str, Any] = {"time_steps": {}, "batch": {}, "width": {}}
    for steps in STEPS:
        out["time_steps"][steps] = timed(chosen, images[:32], steps, rounds, clock)
    for batch in BATCHES:
        many = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
        out["batch"][batch] = timed(chosen, many, 8, rounds, clock)
    for width in WIDTHS:
        torch.manual_seed(0)
        wide = micelab.convert(micelab.resnet20(width=width, activation="quant_clip"), "qcfs").to(images.device)
        found = {name: way for name, way in ways(wide, names, floor=32).items() if _drawn(name)}
        out["width"][width] = timed(found, images[:16], 8, rounds, clock)
    return out


def _drawn(name: str) -> str | None:
    """The line in the picture that the way `name` belongs to, if any."""
    if name.startswith(("micelab,", "bf16")):
        return None
    return name if name == "micelab" else "convolutions alone" if name.startswith("convolutions") else "best peer"


def cost_of_steps(snn: micelab.SpikingNetwork, images: Tensor, rounds: int, clock: Callable[[], float]) -> float:
    """What T = 32 costs over T = 8, the two in turn."""
    found = {f"micelab, T = {steps}": lambda x, _, steps=steps: snn(x, steps) for steps in (8, 32)}
    few, many = (row["images_per_second"] for row in timed(found, images, 8, rounds, clock).values())
    return round(few / many, 2)


def draw(results: dict[str, Any], path: Path) -> None:
    """Image-steps a second over T, batch and width: micelab, the floor and the peer, a line for each number of threads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.1), layout="constrained")
    axes = figure.subplots(1, 3)
    for number, (threads, found) in enumerate(results["scaling"].items()):
        for ax, (over, points) in zip(axes, found.items(), strict=True):
            for colour, label in {"C0": "micelab", "0.5": "convolutions alone", "C1": "best peer"}.items():
                values = {}
                for at, rows in points.items():
                    speeds = [row["images_per_second"] for name, row in rows.items() if _drawn(name) == label]
                    if speeds:
                        values[int(at)] = max(speeds) * (int(at) if over == "time_steps" else 8)
                style = {"color": colour, "linestyle": ("-", "--")[number % 2], "marker": "."}
                ax.plot(list(values), list(values.values()), label=f"{label}, threads: {threads}", **style)
            ax.set(xscale="log", yscale="log", xlabel={"time_steps": "T", "batch": "images", "width": "width"}[over])
            ax.set_xticks(list(map(int, points)), labels=list(map(str, points)), fontsize=8)
            ax.minorticks_off()
            heights = [h for h in (50, 100, 200, 500, 1000, 2000, 5000, 10_000) if ax.get_ylim()[0] < h < ax.get_ylim()[1]]
            ax.set_yticks(heights, labels=[f"{h:,}" for h in heights], fontsize=8)
    axes[0].set_ylabel("image-steps a second")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-steps", type=int, help="T [8; --accuracy: what each network was trained for]")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint", nargs="+", default=["resnet20a-cifar10-qcfs"], help="--accuracy takes several")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--quick", action="store_true", help="the table only, no scaling")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--images", type=int, default=10_000, help="test images for --accuracy")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"device {options.device} does not exist here: leave --device out")
    results: dict[str, Any] = {"machine": machine(), "clock": options.clock}
    results["command"] = shlex.join(["python", "benchmarks/simulation.py", *(sys.argv[1:] if arguments is None else arguments)])
    if options.accuracy:
        found = all_accuracies(options.checkpoint, options.time_steps, options.images, options.device)
        return save(options.out, results | found)
    if len(options.checkpoint) > 1:
        parser.error("only --accuracy takes several networks: name one with --checkpoint")
    options.time_steps = options.time_steps or 8
    ann, snn = converted(options.checkpoint[0], options.device)
    results["network"] = options.checkpoint[0]
    if options.memory:
        return save(options.out, results | peak_memory(snn))
    try:
        data = micelab.load_data(ann.card["dataset"], download=False)
        images = next(data.test.batches(max(options.batch, 64)))[0].to(options.device)
    except micelab.MicelabError:
        images = torch.rand(max(options.batch, 64), 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(options.device)
        results["images"] = "random"
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    found = peers.installed()
    names = list(found)
    results |= {"peers": found, "time_steps": options.time_steps, "batch": options.batch, "rounds": options.rounds}
    results |= {"native_bf16": has_bf16(options.device), "default": snn.precision_here("auto", options.device)}
    results |= {"table": {}, "scaling": {}}
    with torch.inference_mode(), full_precision(images.device):
        results["counts_equal_to_fp64"] = counts_alike(snn, images[:8], min(options.time_steps, 8), names)
        for name, share in results["counts_equal_to_fp64"].items():
            print(f"{name:32s} {100 * share:8.4f} % of spike counts are those of fp64, on a grid", flush=True)
        for threads in options.threads:
            torch.set_num_threads(threads)
            rows = timed(ways(snn, names), images[: options.batch], options.time_steps, options.rounds, clock)
            results["table"][threads] = with_ratios(rows, names)
            for name, row in rows.items():
                spread = f"({row['lowest']:.1f} .. {row['highest']:.1f})"
                print(f"threads {threads}  {name:38s} {row['images_per_second']:8.1f} images/s {spread}", flush=True)
            one = timed(ways(snn, []), images[:1], options.time_steps, 4 * options.rounds, clock)["micelab"]
            results.setdefault("one_image_ms", {})[threads] = round(1000 / one["images_per_second"], 1)
            print(f"threads {threads}  one image: {results['one_image_ms'][threads]} ms", flush=True)
            ratio = cost_of_steps(snn, images[: options.batch], options.rounds, clock)
            results.setdefault("cost_of_32_steps_over_8", {})[threads] = ratio
            print(f"threads {threads}  T = 32 over T = 8: {ratio}", flush=True)
            save(options.out, results)
        for threads in () if options.quick else options.threads:
            torch.set_num_threads(threads)
            results["scaling"][threads] = scaling(snn, images, names[:1], max(1, options.rounds // 2), clock)
            save(options.out, results)
    if options.plot and results["scaling"]:
        draw(json.loads(json.dumps(results)), options.plot)


def save(path: Path | None, words: dict[str, Any]) -> None:
    if path:
        write_json(path, words)
    else:
        print({key: value for key, value in words.items() if key not in ("table", "scaling")})


if __name__ == "__main__":
    main()
