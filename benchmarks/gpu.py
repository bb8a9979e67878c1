"""One command for a person with an NVIDIA card: does it compute what the CPU computes, how fast, in how much memory?

    make gpu                      # or: python benchmarks/gpu.py
    make gpu DEVICE=cpu SMALL=1   # the same steps on the CPU with small networks, in a minute: to see that the command works

Four parts: neurons alone against the CPU's; spike counts of whole networks with weights on a 2^-k grid, where every sum is exact
in any order, against the CPU's; images per second and peak memory beside the convolutions alone and spikingjelly, where it is
installed; training by `micelab train`, stopped after `--minutes`. Writes one JSON and one Markdown page.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from simulation import convolutions_alone
from torch import Tensor, nn

import micelab
from micelab import neuron
from micelab.machine import full_precision, machine

RECIPES = {name: f"--recipe {name} --epochs 20 --batch-size 256 --precision bf16" for name in ("cifar10-c", "cifar100-c")}
SMALL_RECIPES = {"digits": "--dataset digits --epochs 1"}


def neurons_alike(device: str, small: bool) -> list[dict[str, Any]]:
    """Spikes, counts and residuals of random currents on `device` and on the CPU: how many numbers differ, case by case."""
    rows, side = [], 8 if small else 32
    for dtype in (torch.float32, torch.bfloat16):
        for steps in (1, 8, 32):
            for signed in (False, True):
                generator = torch.Generator().manual_seed(steps)
                current = torch.randn(steps * 3, 16, side, side, generator=generator).to(dtype)
                current = current.contiguous(memory_format=torch.channels_last).unflatten(0, (steps, 3))
                theta = torch.linspace(0.3, 1.5, 16)
                results = []
                for place in ("cpu", device):
                    moved, out = current.to(place), torch.empty_like(current, device=place)
                    fired = neuron.fire(moved, theta.to(place), 0.5, signed, out, amplitude=True, count=True)
                    results.append([tensor.cpu() for tensor in (out, *fired)])
                different = sum(int((a != b).sum()) for a, b in zip(*results, strict=True))
                rows.append({"type": str(dtype)[6:], "time_steps": steps, "signed": signed, "different": different})
    return rows


def counts_alike(snn: micelab.SpikingNetwork, images: Tensor, time_steps: int, device: str) -> dict[str, Any]:
    """Spike counts of every layer on `device` and on the CPU, weights on a grid: how many neurons differ."""
    snapped = micelab.snap_to_grid(snn, time_steps=time_steps)
    expected = snapped.simulate(images, time_steps, record="counts")
    run = copy.deepcopy(snapped).to(device).simulate(images.to(device), time_steps, record="counts")
    pairs = [(layer.count, run.layers[name].count.cpu()) for name, layer in expected.layers.items()]
    found = {"neurons": sum(here.numel() for here, _ in pairs), "spikes": sum(int(here.sum()) for here, _ in pairs)}
    found |= {"different": sum(int((here != there).sum()) for here, there in pairs), "time_steps": time_steps}
    return found | {"fewest_bits": min(snapped.spec["grid"]["bits"].values()), "images": len(images), "layers": len(pairs)}


def spikingjelly_ways(snn: micelab.SpikingNetwork, time_steps: int, chunk: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """One way for each backend that the installed spikingjelly offers (version 2 chooses by itself); none where it is absent."""
    try:
        from spikingjelly.activation_based import neuron as theirs
    except ImportError:
        return {}
    node = theirs.IFNode(step_mode="m")
    backends: tuple[str | None, ...] = tuple(getattr(node, "supported_backends", ())) or (None,)

    def way(backend: str | None) -> Callable[[Tensor], Tensor]:
        network = peers.peer("spikingjelly, multi-step", snn)
        for layer in network.neurons.values():
            layer.node.step_mode = "m"
            if backend is not None:
                layer.node.backend = backend
        return lambda images: torch.cat([network.run(part, time_steps) for part in images.split(chunk)])

    return {f"spikingjelly, {backend or 'its own'} backend": way(backend) for backend in backends}


def measured(run: Callable[[Tensor], Tensor], images: Tensor, rounds: int) -> dict[str, Any]:
    """Images per second (median, lowest, highest of `rounds`, after one run to warm up) and peak memory in MB (CUDA only)."""
    run(images)
    wait, speeds = (torch.cuda.synchronize if images.is_cuda else lambda: None), []
    wait()
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        started = time.perf_counter()
        run(images)
        wait()
        speeds.append(len(images) / (time.perf_counter() - started))
    peak = torch.cuda.max_memory_allocated() // 2**20 if images.is_cuda else None
    speed = {"images_per_second": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds)}
    return {name: round(value, 1) for name, value in speed.items()} | {"peak_mb": peak}


def speeds(snn: micelab.SpikingNetwork, images: Tensor, time_steps: int, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Rows of `measured` for micelab, its convolutions alone (the best of three batches) and spikingjelly, in fp32 and bf16."""
    rows = {}
    for kind, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        net, pixels = copy.deepcopy(snn).to(device, kind), images.to(device, kind)
        chunk = net.chunk(pixels, time_steps)
        with torch.inference_mode(), full_precision(pixels.device):
            floors = [measured(convolutions_alone(net, time_steps, size), pixels, rounds) for size in (64, 256, 1024)]
            floor = max(floors, key=lambda row: row["images_per_second"])
            ways: dict[str, Callable[[Tensor], Tensor]] = {
                "micelab": lambda x, net=net: net.simulate(x, time_steps, record=False).logits[-1],
                "micelab, everything recorded": lambda x, net=net: net.simulate(x, time_steps).logits[-1],
            }
            ways |= spikingjelly_ways(net, time_steps, chunk) if kind == torch.float32 else {}
            expected = ways["micelab"](pixels).argmax(1)
            for name, run in ways.items():
                try:
                    row = measured(run, pixels, rounds)
                    row["same_predictions"] = float((run(pixels).argmax(1) == expected).float().mean())
                except Exception as error:  # a peer's backend that does not run here is a line in the table, not the end
                    if name.startswith("micelab"):
                        raise
                    row = {"failed": str(error).splitlines()[0][:120]}
                rows[f"{name}, {label}"] = row
        rows[f"convolutions alone, {label}"] = floor
        for name, row in rows.items():
            if name.endswith(label) and "images_per_second" in row:
                row["share_of_floor"] = round(row["images_per_second"] / floor["images_per_second"], 3)
    return rows


def few(snn: micelab.SpikingNetwork, images: Tensor, time_steps: int, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Rows of `measured` for one image and for eight: the plain call, and the simulation recorded once (a CUDA graph)."""
    net, rows = copy.deepcopy(snn).to(device), {}
    for count in sorted({1, min(8, len(images))}):
        pixels = images[:count].to(device)
        recorded = net.recorded(pixels, time_steps)
        for name, run in {"called": lambda x: net(x, time_steps), "recorded": recorded}.items():
            rows[f"{count} at a time, {name}"] = measured(run, pixels, 10 * rounds)
        walked = net.simulate(pixels, time_steps, record=False, chunk=count).logits[-1]
        rows[f"{count} at a time, recorded"]["largest_difference"] = float((recorded(pixels) - walked).abs().max())
    return rows


def trained(options: str, out: Path, minutes: float) -> dict[str, Any]:
    """What `micelab train` reaches with these options within so many minutes; a run that is stopped keeps its state in `out`."""
    command = [sys.executable, "-m", "micelab", "train", *options.split(), "--out", str(out)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    stopped = False
    try:
        _, said = process.communicate(timeout=minutes * 60)
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    found: dict[str, Any] = {"options": options, "minutes": round((time.perf_counter() - started) / 60, 2), "stopped": stopped}
    if (metrics := out / "metrics.jsonl").exists():
        last = json.loads(metrics.read_text().splitlines()[-1])
        found |= {"epochs": last["epoch"], "validation_accuracy": last["validation_accuracy"]}
    if process.returncode and not stopped:
        found["failed"] = said.strip().splitlines()[-1] if said.strip() else f"exit status {process.returncode}"
    return found


def spiking(checkpoint: Path, time_steps: int, device: str) -> dict[str, float]:
    """Accuracy on the test images of the network that a training left, and of what conversion makes of it at T = `time_steps`."""
    ann: Any = micelab.load(checkpoint)
    snn = micelab.convert(ann, "qcfs", time_steps=time_steps).to(device)
    batches = micelab.load_data(ann.card["dataset"]).test.batches(500, device=device)
    curve = micelab.accuracy_curve(snn, batches, (time_steps,))
    return {"test_accuracy": ann.card["test_accuracy"], "test_accuracy_with_spikes": curve.accuracy[0]}


def networks(small: bool) -> dict[str, micelab.SpikingNetwork]:
    """The networks that are measured: A as shipped, C with random weights (a speed does not depend on them, spikes aside)."""
    torch.manual_seed(0)
    if small:
        return {"ResNet-20, width 4, random weights": micelab.convert(random_network(width=4), "qcfs")}
    return {
        "ResNet-20 kind A, resnet20a-cifar10-qcfs": micelab.convert(micelab.load("resnet20a-cifar10-qcfs"), "qcfs"),
        "ResNet-20 kind C, random weights": micelab.convert(random_network(kind="C"), "qcfs"),
    }


def random_network(**options: Any) -> nn.Module:
    """A ResNet-20 whose batch-norms have statistics of their own, so that its neurons fire."""
    ann = micelab.resnet20(activation="quant_clip", theta=1.0, **options)
    with torch.no_grad():
        ann.train()(torch.rand(32, 3, 32, 32))
    return ann.eval()


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"# micelab on {results['machine']}", "", f"`{results['command']}`, T = {results['time_steps']}.", ""]
    cases, wrong = len(results["neurons"]), [row for row in results["neurons"] if row["different"]]
    lines += [f"Neurons alone: {cases - len(wrong)} of {cases} cases equal the CPU's, number for number."]
    lines += [f"- differs: {row}" for row in wrong]
    for name, found in results["networks"].items():
        counts = found["counts"]
        lines += ["", f"## {name}", ""]
        lines.append(
            f"Spike counts, weights on grids of 2^-{counts['fewest_bits']} and finer: {counts['different']} of "
            f"{counts['neurons']:,} neurons in {counts['layers']} layers differ from the CPU's ({counts['images']} images, "
            f"T = {counts['time_steps']}, {counts['spikes']:,} spikes)."
        )
        lines += ["", f"{found['images']} images:", ""]
        columns = ("images_per_second", "lowest", "highest", "share_of_floor", "peak_mb", "same_predictions")
        lines += ["| way | " + " | ".join(column.replace("_", " ") for column in columns) + " |", "|---" * 7 + "|"]
        for way, row in found["speeds"].items():
            cells = [row["failed"], *[""] * 5] if "failed" in row else [row.get(column) for column in columns]
            lines.append(f"| {way} | " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |")
        lines += ["", "Few images, fp32:", "", "| way | images per second | lowest | highest | largest difference |"]
        lines.append("|---" * 5 + "|")
        for way, row in found["few"].items():
            cells = [row[column] for column in columns[:3]] + [row.get("largest_difference", "-")]
            lines.append(f"| {way} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## Training", "", "| run | epochs | minutes | validation | test | test with spikes | |", "|---" * 7 + "|"]
    for name, run in results["training"].items():
        splits = ("validation_accuracy", "test_accuracy", "test_accuracy_with_spikes")
        reached = " | ".join(f"{100 * run[split]:.2f} %" if split in run else "-" for split in splits)
        note = run.get("failed", "stopped by the time limit" if run["stopped"] else "")
        lines.append(f"| {name} | {run.get('epochs', 0)} | {run['minutes']} | {reached} | {note} |")
    return "\n".join(lines) + "\n"


def write(out: Path, results: dict[str, Any]) -> None:
    """Results so far as OUT.json and OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(results))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks and few images, for a try")
    parser.add_argument("--time-steps", type=int, default=8)
    parser.add_argument("--images", type=int, help="images a measurement [10,000; 32 with --small]")
    parser.add_argument("--rounds", type=int, help="repeats of a measurement [5; 1 with --small]")
    parser.add_argument("--minutes", type=float, default=15.0, help="time limit of each training; 0 trains nothing")
    parser.add_argument("--out", type=Path, help="results without their ending [data/results/gpu...]")
    options = parser.parse_args(arguments)
    device, small = options.device, options.small
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device was found (is the driver installed?): DEVICE=cpu SMALL=1 runs the same steps on the CPU")
        return 2
    name = "gpu" if device.startswith("cuda") and not small else f"gpu-try-{device.replace(':', '')}"
    out = options.out or Path("data/results") / name
    count, rounds = options.images or (32 if small else 10_000), options.rounds or (1 if small else 5)
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    command = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    results = {"machine": machine(), "command": command, "time_steps": options.time_steps, "small": small}
    results |= {"neurons": neurons_alike(device, small), "networks": {}, "training": {}}
    for title, snn in networks(small).items():
        print(f"{title} ...", flush=True)
        counts = counts_alike(snn, images[: 4 if small else 16], options.time_steps, device)
        rows = speeds(snn, images, options.time_steps, device, rounds)
        results["networks"][title] = {"counts": counts, "images": count, "speeds": rows}
        results["networks"][title]["few"] = few(snn, images, options.time_steps, device, rounds)
        write(out, results)
    for recipe, words in (SMALL_RECIPES if small else RECIPES).items() if options.minutes > 0 else ():
        print(f"training {recipe}, at most {options.minutes:g} minutes ...", flush=True)
        folder = Path("data/runs") / f"{out.name}-{recipe}-{int(time.time())}"
        results["training"][recipe] = run = trained(words, folder, options.minutes)
        if (folder / "model.safetensors").exists():
            run |= spiking(folder / "model.safetensors", options.time_steps, device)
        write(out, results)
    print(f"{page(results)}\nwritten to {out}.json and {out}.md")
    return int(any(row["different"] for row in results["neurons"]))


if __name__ == "__main__":
    sys.exit(main())
