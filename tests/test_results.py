"""What is shipped: checkpoints that load and hold what their cards say, and pages that show the stored results."""

import json
from pathlib import Path

import pytest

import micelab
from micelab.data import to_float
from micelab.errors import KINDS

ROOT = Path(__file__).parent.parent
CHECKPOINTS = ROOT / "data" / "checkpoints"
RESULTS = {name: ROOT / "data" / "results" / f"{name}-accuracy-over-time.json" for name in ("cifar10", "cifar100")}
ANNS = {  # shipped networks that are no spiking ones: the least that each knows of the test images, and its epochs
    "resnet20a-cifar10-relu": (0.915, 81),
    "resnet20a-cifar10-qcfs": (0.905, 60),
    "resnet20a-cifar10-noise": (0.885, 66),
    "resnet20a-cifar100-relu": (0.655, 40),
    "resnet20a-cifar100-relu-long": (0.67, 120),
    "resnet20a-cifar100-qcfs": (0.645, 54),
    "resnet20c-cifar10-qcfs": (0.915, 33),
    "resnet20c-cifar10-relu": (0.92, 31),
    "resnet20c-cifar10-relu-long": (0.93, 43),
    "resnet20c-cifar100-relu": (0.735, 35),
    "resnet20c-cifar100-relu-long": (0.765, 59),
    "resnet20c-cifar100-qcfs": (0.755, 60),
}
JOINT = {  # those trained jointly: T, and the least that they gain there over the quantized network on 500 images, of 1
    "resnet20a-cifar10-mice-t1": (1, 0.2),
    "resnet20a-cifar10-mice-t2": (2, 0.2),
    "resnet20a-cifar10-mice-t4": (4, 0.1),
    "resnet20a-cifar10-mice-t8": (8, 0.02),
    "resnet20a-cifar100-mice-t1": (1, 0.2),
    "resnet20a-cifar100-mice-t2": (2, 0.2),
    "resnet20a-cifar100-mice-t4": (4, 0.1),
    "resnet20a-cifar100-mice-t8": (8, 0.02),
    "resnet20c-cifar10-mice-t8": (8, 0.0),  # on 200 images
    "resnet20c-cifar100-mice-t8": (8, 0.0),
}


def data_of(name):
    return name.split("-")[1]


@pytest.fixture(scope="module")
def cifar():
    """The data set that a network's name holds."""
    found = {}

    def load(name):
        kind = data_of(name)
        if kind not in found:
            try:
                found[kind] = micelab.load_data(kind, download=False)
            except micelab.MicelabError as error:
                pytest.skip(str(error))
        return found[kind]

    return load


def stages(card):
    return [*card.get("stages_before", []), card]


@pytest.mark.parametrize(("name", "least", "epochs"), [(name, *wanted) for name, wanted in ANNS.items()])
def test_a_shipped_card_tells_recipe_seed_machine_accuracies_and_command(name, least, epochs):
    card = micelab.load(name, CHECKPOINTS).card
    assert card == json.loads((CHECKPOINTS / f"{name}.json").read_text())
    assert sum(stage["recipe"]["epochs"] for stage in stages(card)) == epochs
    assert {"seed", "lr", "augment", "precision"} <= card["recipe"].keys()
    assert card["machine"]
    assert card["command"].startswith("micelab train ")
    assert f"--dataset {data_of(name)} " in card["command"] or f"--recipe {data_of(name)}-" in card["command"]
    assert card["images"]["test"] == 10_000
    assert least < card["test_accuracy"] < 1
    assert least < card["validation_accuracy"] < 1


@pytest.mark.cifar
@pytest.mark.parametrize("name", ANNS)
def test_a_shipped_network_classifies_as_its_card_says(name, cifar):
    model = micelab.load(name, CHECKPOINTS)
    found = micelab.train.accuracy(model, cifar(name).test.head(1000))
    wanted = model.card["test_accuracy"]
    assert found == pytest.approx(wanted, abs=3 * (wanted * (1 - wanted) / 1000) ** 0.5)


@pytest.mark.parametrize(("name", "time_steps"), [(name, t) for name, (t, _) in JOINT.items()])
def test_a_jointly_trained_card_tells_its_t_its_stages_and_that_no_step_is_hidden(name, time_steps):
    card = micelab.load(name, CHECKPOINTS).card
    assert card["recipe"]["time_steps"] == [time_steps]
    assert stages(card)[0]["recipe"]["network"] == "resnet20"  # stage 1 comes first
    for number, stage in enumerate(stages(card)):  # every start is shipped, or is what a command before it wrote; none itself
        start = stage["recipe"].get("start")
        before = [f"{word}/model.safetensors" for earlier in stages(card)[:number] for word in earlier["command"].split()]
        assert start != name
        assert not start or (CHECKPOINTS / f"{start}.json").exists() or start in before
    assert card["hidden_steps"] == 0
    assert card["test_accuracy"] == card["test_accuracy_by_time_steps"][str(time_steps)]
    assert card["command"].startswith("micelab train ")
    for words in ("--joint", f"--time-steps {time_steps}"):
        assert f" {words} " in card["command"]
    by_recipe = f" --recipe {data_of(name)}-" in card["command"]  # which names both data and gradient
    assert by_recipe or f" --dataset {data_of(name)} " in card["command"]
    assert (by_recipe or " --gradient time " in card["command"]) == (card["recipe"].get("gradient") == "time")
    for stage in stages(card):
        assert "/work" not in stage["command"]


@pytest.mark.cifar
@pytest.mark.parametrize(("name", "time_steps", "gain"), [(name, *joint) for name, joint in JOINT.items()])
def test_a_jointly_trained_network_spikes_as_its_card_says_and_better_than_its_start_at_that_t(name, time_steps, gain, cifar):
    net = micelab.load(name, CHECKPOINTS)
    part = cifar(name).test.head(500 if name.startswith("resnet20a") else 200)

    def reached(network, method):
        snn = micelab.convert(network, method)
        return micelab.accuracy_curve(snn, part.batches(), (time_steps,)).at(time_steps)

    found, wanted = reached(net, "mice"), net.card["test_accuracy"]
    assert found == pytest.approx(wanted, abs=3.5 * (wanted * (1 - wanted) / len(part)) ** 0.5)
    start = micelab.load(name.split("-mice")[0] + "-qcfs", CHECKPOINTS)
    assert found > reached(start, "qcfs") + gain


@pytest.mark.cifar
def test_the_stored_curve_is_what_a_simulation_gives(cifar):
    stored = json.loads(RESULTS["cifar10"].read_text())["results"]["qcfs"]
    snn = micelab.convert(micelab.load("resnet20a-cifar10-qcfs", CHECKPOINTS), "qcfs")
    curve = micelab.accuracy_curve(snn, cifar("-cifar10").test.head(500).batches(), (1, 2, 4, 8))
    wanted = dict(zip(stored["curve"]["time_steps"], stored["curve"]["accuracy"], strict=True))
    for t, found in zip(curve.time_steps, curve.accuracy, strict=True):
        spread = 3.5 * (wanted[t] * (1 - wanted[t]) / 500) ** 0.5
        assert found == pytest.approx(wanted[t], abs=spread)


@pytest.mark.cifar
def test_on_cifar_the_four_terms_sum_and_the_first_layer_has_no_timing_error(cifar):
    ann = micelab.load("resnet20a-cifar10-qcfs", CHECKPOINTS)
    snn = micelab.convert(ann, "qcfs")
    table = micelab.error_breakdown(ann, snn, to_float(cifar("-cifar10").test.images[:16]), 4)
    for layer in table.layers.values():
        terms = sum(getattr(layer, kind).mean for kind in ("timing", "quantization", "clipping", "inherited"))
        assert terms == pytest.approx(layer.total.mean, abs=1e-5)
    assert next(iter(table.layers.values())).timing.rms == 0


@pytest.mark.parametrize("data", RESULTS)
def test_the_docs_show_the_stored_results_digit_for_digit(data):
    stored = json.loads(RESULTS[data].read_text())
    page = (ROOT / "docs" / "results.md").read_text()
    table = page.split(f"## {stored['dataset'].replace('cifar', 'CIFAR-')}\n")[1].split("\n#")[0]
    assert stored["images"] == 10_000
    assert stored["split"] == "test"
    for name, row in stored["results"].items():
        assert row["command"] in table
        numbers = [row["ann_accuracy"], *row["curve"]["accuracy"]]
        cells = " | ".join(f"{100 * number:.2f}" for number in numbers)
        line = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        assert cells in line


@pytest.mark.parametrize("data", RESULTS)
def test_the_readme_shows_the_stored_results_of_some_methods(data):
    stored = json.loads(RESULTS[data].read_text())
    lines = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith(f"| {stored['dataset']} |".replace("cifar", "CIFAR-"))
    ]
    rows = stored["results"]
    reached = {name: dict(zip(row["curve"]["time_steps"], row["curve"]["accuracy"], strict=True)) for name, row in rows.items()}
    reached["mice"] = {t: reached[f"mice T={t}"][t] for t in (1, 2, 4, 8)}
    for name in ("percentile", "qcfs", "step_bias", "mice", "signed", "cos"):
        numbers = [rows["qcfs" if name == "mice" else name]["ann_accuracy"], *(reached[name][t] for t in (1, 2, 4, 8))]
        (line,) = (line for line in lines if f"`{name}`" in line)
        assert " | ".join(f"{100 * number:.2f}" for number in numbers) in line
    assert len(lines) == 6


def test_the_readme_shows_the_stored_speeds():
    table = json.loads((ROOT / "data" / "results" / "benchmark-simulation.json").read_text())["table"]["2"]
    readme = (ROOT / "README.md").read_text()
    alone = max((row for name, row in table.items() if name.startswith("convolutions")), key=lambda row: row["images_per_second"])
    table["convolutions alone, best of five ways"] = alone
    modes = [name for name in table if name.startswith("micelab") and "recorded" not in name]
    for name in (*modes, "spikingjelly, step by step", "snnTorch", "sinabs", "convolutions alone, best of five ways"):
        row = table[name]
        numbers = f"{row['images_per_second']} | {row['lowest']}, {row['highest']} | {row['ratio_to_best_peer']:.2f} |"
        (line,) = (line for line in readme.splitlines() if line.startswith((f"| {name} |", f"| {name} (")))
        assert numbers in line


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_docs_show_the_stored_errors_of_shipped_networks(name):
    stored = json.loads((ROOT / "data" / "results" / f"{name}-accuracy-over-time.json").read_text())
    page = (ROOT / "docs" / "method.md").read_text()
    assert f"{stored['error_images']} test images at\nT = {stored['errors_at_time_steps']} " in page
    for row in ("qcfs", "mice T=2", "mice T=4", "mice T=8"):
        layers = stored["results"][row]["errors"]["layers"].values()
        means = [sum(layer[kind]["rms"] / layer["signal"] for layer in layers) / len(layers) for kind in (*KINDS, "total")]
        cells = " | ".join(f"{100 * mean:.1f}" for mean in means)
        assert f"| {name.replace('cifar', 'CIFAR-')}, `{row}` | {cells} |" in page


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_the_docs_show_the_stored_accuracies_of_the_fast_modes(data):
    stored = json.loads((ROOT / "data" / "results" / f"benchmark-accuracy-{data}.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    assert stored["command"] in page
    ways = ("events", "bf16", "int8", "grid")
    for name, row in stored["networks"].items():
        found = row["accuracy"]
        cells = [f"{100 * found['fp32']['accuracy']:.2f}"]
        cells += [f"{100 * found[way]['accuracy']:.2f} ({100 * found[way]['same_as_fp32']:.1f})" for way in ways]
        assert f"| `{name}` | {row['time_steps']} | {' | '.join(cells)} |" in page
    costs = [f"{stored['mean_cost'][way]['points']:.2f} ± {stored['mean_cost'][way]['standard_error']:.2f}" for way in ways]
    assert f"| mean cost in points, and its standard error | | | {' | '.join(costs)} |" in page


@pytest.mark.parametrize("file", ["benchmark-simulation", "benchmark-simulation-xeon"])
def test_the_docs_show_the_stored_table_of_speeds(file):
    stored = json.loads((ROOT / "data" / "results" / f"{file}.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    for row in stored["table"]["2"].values():
        ratio = f"{row['share_of_floor']:.2f} | {row['ratio_to_best_peer']:.2f}"
        speeds = f"{row['images_per_second']:.0f} | {row['lowest']:.0f}, {row['highest']:.0f}"
        assert f"| {speeds} | {ratio} |" in page


def test_the_docs_show_the_stored_milliseconds_of_convolutions_that_follow_spikes():
    stored = json.loads((ROOT / "data" / "results" / "benchmark-events.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"    {stored['command']}\n" in page
    for name, row in stored["layers"].items():
        ways = ("dense", "followed", "matrix unit", "scattered", "columns", "columns, product alone", "packed")
        cells = [str(row[way]["ms"]) for way in ways if way in row]
        assert f"| `{name}` | {row['shape'][1]} | {row['rate']:.3f} | {' | '.join(cells)} |" in page
    for channels, row in stored["rates"].items():
        assert f"| {channels} | {' | '.join(f'{ratio:.2f}' for ratio in row.values())} |" in page


@pytest.mark.parametrize("name", ["digits-t2", "cifar10-t4"])
def test_an_ablation_in_the_docs_is_the_stored_one_digit_for_digit(name):
    stored = json.loads((ROOT / "data" / "results" / f"ablation-{name}.json").read_text())
    page = (ROOT / "docs" / "method.md").read_text()
    assert stored["command"] in page
    shown = ("timing", "quantization", "clipping", "inherited", "total", "over_firing", "under_firing")
    for name, row in stored["rows"].items():
        numbers = [row["accuracy"], *(row["errors"][kind] for kind in shown)]
        cells = [f"{100 * number:.1f}" for number in numbers] + [f"{100 * row['points_lost']['timing']:+.1f}"]
        assert f"| {name} | {' | '.join(cells)} |" in page


def test_the_docs_show_the_stored_memory():
    stored = json.loads((ROOT / "data" / "results" / "benchmark-memory.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    for kept in ("logits", "stream", "counts", "all_kept"):
        assert f" | {stored[f'{kept}_mb']:,} |\n" in page


def test_the_docs_show_what_events_give_the_wide_network():
    stored = json.loads((ROOT / "data" / "results" / "benchmark-tricks-wide.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    dense, events = (stored["rows"][name] for name in ("dense", "events"))
    said = f"{events['images_per_second']:.0f} images/s by events, {dense['images_per_second']:.0f} by dense convolutions"
    assert f"{said}, {events['share']:.2f} times" in page
    assert f"    {stored['command']}\n" in page


def test_the_docs_show_what_each_trick_gives():
    stored = json.loads((ROOT / "data" / "results" / "benchmark-tricks.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"    {stored['command']}\n" in page
    for name, row in stored["rows"].items():
        cells = f"{row['images_per_second']:.0f} | {row['lowest']:.0f}, {row['highest']:.0f} | {row['share']:.2f}"
        assert f"| {name} | {cells} |" in page
