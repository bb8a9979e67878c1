"""What is shipped: checkpoints that load and hold what their cards say, and a README that shows the stored results."""

import json
from pathlib import Path

import pytest

import micelab
from micelab.data import to_float

ROOT = Path(__file__).parent.parent
CHECKPOINTS = ROOT / "data" / "checkpoints"
RESULTS = ROOT / "data" / "results" / "cifar10-accuracy-over-time.json"
NAMES = ("resnet20a-cifar10-relu", "resnet20a-cifar10-qcfs")
JOINT = {4: 0.1, 8: 0.02}  # T, and the least that joint training gains there over its start on the first 500 images, of 1


@pytest.fixture(scope="module")
def cifar10():
    try:
        return micelab.load_data("cifar10", download=False)
    except micelab.MicelabError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_card_tells_recipe_seed_machine_accuracies_and_command(name):
    card = micelab.load(name, CHECKPOINTS).card
    assert card == json.loads((CHECKPOINTS / f"{name}.json").read_text())
    assert sum(stage["recipe"]["epochs"] for stage in [card, *card.get("stages_before", [])]) >= 60
    assert {"seed", "lr", "augment", "precision"} <= card["recipe"].keys()
    assert card["machine"]
    assert card["command"].startswith("micelab train ")
    assert "--dataset cifar10" in card["command"]
    assert card["images"]["test"] == 10_000
    assert 0.9 < card["test_accuracy"] < 1
    assert 0.9 < card["validation_accuracy"] < 1


@pytest.mark.cifar
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_network_classifies_as_its_card_says(name, cifar10):
    model = micelab.load(name, CHECKPOINTS)
    part = cifar10.test.head(1000)
    found = micelab.train.accuracy(model, part)
    assert found == pytest.approx(model.card["test_accuracy"], abs=0.025)  # 1,000 of 10,000 images: three standard errors


@pytest.mark.parametrize("time_steps", JOINT)
def test_a_jointly_trained_card_tells_its_t_its_start_and_that_no_step_is_hidden(time_steps):
    card = micelab.load(f"resnet20a-cifar10-mice-t{time_steps}", CHECKPOINTS).card
    assert card["recipe"]["time_steps"] == [time_steps]
    assert card["recipe"]["start"] == "resnet20a-cifar10-qcfs"
    assert card["hidden_steps"] == 0
    assert card["test_accuracy"] == card["test_accuracy_by_time_steps"][str(time_steps)]
    assert card["command"].startswith(f"micelab train --joint --time-steps {time_steps} --dataset cifar10")


@pytest.mark.cifar
@pytest.mark.parametrize(("time_steps", "gain"), JOINT.items())
def test_a_jointly_trained_network_spikes_as_its_card_says_and_better_than_its_start_at_that_t(cifar10, time_steps, gain):
    net = micelab.load(f"resnet20a-cifar10-mice-t{time_steps}", CHECKPOINTS)
    part = cifar10.test.head(500)
    found = micelab.accuracy_curve(micelab.convert(net, "mice"), part.batches(), (time_steps,)).at(time_steps)
    wanted = net.card["test_accuracy"]
    assert found == pytest.approx(wanted, abs=3.5 * (wanted * (1 - wanted) / 500) ** 0.5)
    start = micelab.convert(micelab.load("resnet20a-cifar10-qcfs", CHECKPOINTS), "qcfs")
    assert found > micelab.accuracy_curve(start, part.batches(), (time_steps,)).at(time_steps) + gain


@pytest.mark.cifar
def test_the_stored_curve_is_what_a_simulation_gives(cifar10):
    stored = json.loads(RESULTS.read_text())["results"]["qcfs"]
    snn = micelab.convert(micelab.load("resnet20a-cifar10-qcfs", CHECKPOINTS), "qcfs")
    curve = micelab.accuracy_curve(snn, cifar10.test.head(500).batches(), (1, 2, 4, 8))
    wanted = dict(zip(stored["curve"]["time_steps"], stored["curve"]["accuracy"], strict=True))
    for t, found in zip(curve.time_steps, curve.accuracy, strict=True):
        spread = 3.5 * (wanted[t] * (1 - wanted[t]) / 500) ** 0.5
        assert found == pytest.approx(wanted[t], abs=spread)


@pytest.mark.cifar
def test_on_cifar_the_four_terms_sum_and_the_first_layer_has_no_timing_error(cifar10):
    ann = micelab.load("resnet20a-cifar10-qcfs", CHECKPOINTS)
    snn = micelab.convert(ann, "qcfs")
    table = micelab.error_breakdown(ann, snn, to_float(cifar10.test.images[:16]), 4)
    for layer in table.layers.values():
        terms = sum(getattr(layer, kind).mean for kind in ("timing", "quantization", "clipping", "inherited"))
        assert terms == pytest.approx(layer.total.mean, abs=1e-5)
    assert next(iter(table.layers.values())).timing.rms == 0


def test_the_readme_shows_the_stored_results_digit_for_digit():
    stored = json.loads(RESULTS.read_text())
    readme = (ROOT / "README.md").read_text()
    assert stored["images"] == 10_000
    assert stored["split"] == "test"
    for name, row in stored["results"].items():
        assert row["command"] in readme
        numbers = [row["ann_accuracy"], *row["curve"]["accuracy"]]
        cells = " | ".join(f"{100 * number:.2f}" for number in numbers)
        line = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
        assert cells in line


def test_the_readme_shows_the_stored_speeds():
    table = json.loads((ROOT / "data" / "results" / "benchmark-simulation.json").read_text())["table"]["2"]
    readme = (ROOT / "README.md").read_text()
    alone = max((row for name, row in table.items() if name.startswith("convolutions")), key=lambda row: row["images_per_second"])
    names = ("micelab", "spikingjelly, step by step", "snnTorch", "sinabs")
    for name, row in [(name, table[name]) for name in names] + [("convolutions alone, best of three batches", alone)]:
        numbers = f"{row['images_per_second']} | {row['lowest']}, {row['highest']} | {row['ratio_to_best_peer']:.2f} |"
        assert f"| {name} | {numbers}" in readme


def test_the_ablation_in_the_docs_is_the_stored_one_digit_for_digit():
    stored = json.loads((ROOT / "data" / "results" / "ablation-digits-t2.json").read_text())
    page = (ROOT / "docs" / "method.md").read_text()
    assert stored["command"] in page
    shown = ("timing", "quantization", "clipping", "inherited", "total", "over_firing", "under_firing")
    for name, row in stored["rows"].items():
        numbers = [row["accuracy"], *(row["errors"][kind] for kind in shown)]
        cells = [f"{100 * number:.1f}" for number in numbers] + [f"{100 * row['points_lost']['timing']:+.1f}"]
        assert f"| {name} | {' | '.join(cells)} |" in page
