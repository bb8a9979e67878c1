"""The command line: what a person types, what comes back, and how errors end."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import micelab
from micelab.cli import app
from micelab.train import TrainConfig, train

runner = CliRunner()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(TrainConfig(epochs=4, lr=0.05, theta=2.0), folder, progress=False)
    return folder / "model.safetensors"


def run(*words):
    return runner.invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "x", "--picture"),
        ("evaluate", "x", "--out"),
        ("explain", "x", "--report"),
        ("demo", "--report"),
        ("convert", "x", "--method", "qcfs", "--out"),
        ("train", "--save"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(words, tmp_path):
    (tmp_path / "file").write_text("a file, so no folder")
    for place, text in ((tmp_path, "is a folder"), (tmp_path / "file" / "page", "cannot be written")):
        result = run(*words, place)
        assert result.exit_code == 2
        assert f"Invalid value for '{words[-1]}'" in result.output
        assert text in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("command", ["demo", "train", "remake", "convert", "evaluate", "explain", "data"])
def test_every_command_has_help_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"micelab {command}" in " ".join(result.output.split())


def test_evaluate_prints_json_with_its_circumstances_and_writes_the_same_to_a_file(checkpoint, tmp_path):
    out = tmp_path / "results.json"
    result = run(
        "evaluate",
        checkpoint,
        "--time-steps",
        "1,4",
        "--limit",
        60,
        "--out",
        out,
        "--json",
        "--method",
        "qcfs",
        "--method",
        "max",
    )
    assert result.exit_code == 0, result.output
    words = json.loads(result.stdout[result.stdout.index("{") :])
    assert words["results"].keys() == {"qcfs", "max"}
    assert words["images"] == 60
    assert all(row["machine"] for row in words["results"].values())
    stored = json.loads(out.read_text())
    assert stored["results"]["qcfs"]["curve"]["time_steps"] == [1, 4]
    assert stored["results"]["qcfs"]["curve"]["accuracy"] == words["results"]["qcfs"]["curve"]["accuracy"]


def test_explain_names_every_layer_and_the_worst_one_in_words(checkpoint):
    result = run("explain", checkpoint, "--method", "qcfs", "--time-steps", 4, "--images", 50)
    assert result.exit_code == 0, result.output
    for name in micelab.convert(micelab.load(checkpoint), "qcfs").neurons:
        assert name in result.output
    assert "What helps against" in result.output
    assert "validation" in result.output


def test_a_network_is_trained_jointly_and_held_against_its_start_layer_by_layer(checkpoint, tmp_path):
    words = ["--joint", "--time-steps", "1,2", "--start", checkpoint, "--epochs", 1, "--save", tmp_path / "joint"]
    result = run("train", *words, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "spike_clip levels=2" in result.output
    joint = tmp_path / "joint.safetensors"
    result = run("explain", joint, "--before", checkpoint, "--time-steps", 2, "--images", 40, "--report", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "Each layer at T = 2, qcfs -> mice" in result.output
    assert result.output.count("->") > 7 * len(micelab.convert(micelab.load(joint), "mice").neurons)
    result = run("evaluate", joint, "--time-steps", "1,2", "--limit", 30, "--explain-at", 2, "--out", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    words = ["--time-steps", "1,2", "--limit", 30, "--explain-at", 2, "--out", tmp_path / "rows.json"]
    result = run("evaluate", checkpoint, "--method", "qcfs", *words)
    stored = json.loads((tmp_path / "rows.json").read_text())["results"]
    assert stored.keys() == {"mice", "qcfs"}
    assert all(row["command"] and row["machine"] for row in stored.values())


def test_a_converted_network_is_saved_and_loaded_with_the_same_answers(checkpoint, tmp_path):
    out = tmp_path / "spiking.safetensors"
    result = run("convert", checkpoint, "--method", "mse", "--per-channel", "--signed", "--out", out)
    assert result.exit_code == 0, result.output
    again = micelab.load(out)
    data = micelab.load_data("digits")
    images = micelab.data.to_float(data.test.images[:20])
    calibration = micelab.data.to_float(data.train.images[:256])
    direct = micelab.convert(micelab.load(checkpoint), "mse", calibration, per_channel=True, signed=True)
    assert direct(images, 8).tolist() == again(images, 8).tolist()
    assert again.method == "mse"


def test_data_says_what_is_in_it():
    result = run("data", "digits")
    assert "1,295 train" in result.output
    assert json.loads(run("data", "digits", "--json").stdout)["images"]["test"] == 359


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["evaluate", "no-such-network"], "no checkpoint is named 'no-such-network'"),
        (["data", "no-such-data"], "data set 'no-such-data' is unknown"),
        (["train", "--lr", "-1"], "--lr is -1.0"),
        (["train", "--recipe", "cifar10-d"], "--recipe cifar10-d is unknown: choose cifar10-a, cifar100-a"),
        (["train", "--joint", "--time-steps", "4"], "name its checkpoint with --start"),
        (["train", "--joint", "--levels", "4"], "--levels is for stage 1: leave out --joint"),
        (["train", "--penalty", "1"], "--penalty is for joint training: add --joint"),
        (["train", "--joint", "--start", "no-such-network"], "no checkpoint is named 'no-such-network'"),
        (["train", "--kind", "D", "--dataset", "digits", "--network", "resnet20"], "kind 'D'"),
        (["demo", "--time-steps", "1,x"], "--time-steps '1,x'"),
        (["demo", "--time-steps", "0,4"], "--time-steps '0,4'"),
        (["demo", "--dataset", "cifar100"], "cifar100"),
    ],
)
def test_an_error_is_one_sentence_and_status_2_without_a_traceback(words, part, tmp_path):
    environment = os.environ | {"MICELAB_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "micelab", *words], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert process.returncode == 2
    assert part in process.stderr
    assert "Traceback" not in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1


def test_a_method_that_does_not_fit_the_network_says_which_layer_and_what_to_do(tmp_path):
    model = micelab.small_cnn(activation="relu")
    micelab.save(model, tmp_path / "relu", {"dataset": "digits"})
    result = run("explain", tmp_path / "relu.safetensors", "--method", "qcfs")
    assert result.exit_code == 2
    assert "layer `stem.2`" in result.output
    assert "no trained bound" in result.output


def test_a_calibrating_method_that_fits_no_network_is_said_too(tmp_path):
    micelab.save(micelab.small_cnn(activation="spike_clip", levels=2), tmp_path / "joint", {"dataset": "digits"})
    for method in ("mse", "tcl"):
        result = run("evaluate", tmp_path / "joint.safetensors", "--method", method, "--limit", 10)
        assert result.exit_code == 2
        assert f"method '{method}' takes none of these networks (small_cnn (width 16), spike_clip levels=2)" in result.output


def test_a_method_that_needs_a_trained_bound_and_images_names_the_layer(tmp_path):
    net = micelab.small_cnn(activation="relu")
    net.card = {"dataset": "digits"}
    path = micelab.save(net, tmp_path / "relu", net.card)
    result = run("evaluate", path, "--method", "step_bias")
    assert result.exit_code == 2
    assert "layer `stem.2`" in result.stderr
    assert "calibration=" not in result.stderr


def test_networks_of_two_shapes_are_not_held_against_each_other(checkpoint, tmp_path, monkeypatch):
    other = micelab.save(micelab.resnet20(width=4, in_channels=1, activation="quant_clip"), tmp_path / "b", {"dataset": "digits"})
    monkeypatch.setattr("micelab.report.compare.accuracy", lambda *_: pytest.fail("it measured"))
    result = run("explain", checkpoint, "--before", other, "--images", 20)
    assert result.exit_code == 2
    assert "is not in" in result.stderr
    assert "networks of one shape alone" in result.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--kind", "A"), "--kind is for resnet20, and the network is small_cnn"),
        (("--activation", "relu", "--levels", "4"), "--levels is for quant_clip, and --activation relu has none"),
    ],
)
def test_an_option_of_another_network_is_not_dropped_in_silence(words, text, tmp_path):
    result = run("train", *words, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_on_a_card_begins_a_run(tmp_path, monkeypatch):
    words = ["train", "--epochs", "1", "--out", str(tmp_path / "run")]
    for more in ((), ("--resume",)):
        monkeypatch.setattr("sys.argv", ["micelab", *words, *more])
        assert run(*words, *more).exit_code == 0
        assert json.loads((tmp_path / "run" / "model.json").read_text())["command"] == f"micelab {' '.join(words)}"


def test_networks_of_different_data_are_not_measured_on_the_first_ones(tmp_path):
    for name, data in (("a", "digits"), ("b", "cifar10")):
        micelab.save(micelab.small_cnn(activation="relu" if name == "a" else "quant_clip"), tmp_path / name, {"dataset": data})
    for words in (("evaluate",), ("explain", "--before")):
        result = run(words[0], tmp_path / "a.safetensors", *words[1:], tmp_path / "b.safetensors")
        assert result.exit_code == 2
        assert "trained on different data" in result.output
        assert "b.safetensors on cifar10" in result.output


@pytest.mark.parametrize("stored", ["{", "[]", '{"results": 1}', '{"results": {}, "dataset": "cifar10"}'])
def test_what_cannot_be_added_to_is_refused_before_anything_is_measured(stored, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "out.json").write_text(stored)
    monkeypatch.setattr("micelab.report.compare.compare", lambda *_, **__: pytest.fail("measured"))
    result = run("evaluate", checkpoint, "--limit", 10, "--out", tmp_path / "out.json")
    assert result.exit_code == 2
    assert "choose another --out" in result.output
    assert (tmp_path / "out.json").read_text() == stored


def test_the_data_of_a_checkpoint_is_what_its_recipe_names():
    from micelab.cli.networks import dataset_of

    model = micelab.small_cnn()
    model.card = {"dataset": "flowers", "recipe": {"dataset": "pictures/flowers"}}
    assert dataset_of({"mine": model}, None) == "pictures/flowers"
    assert dataset_of({"mine": model}, "digits") == "digits"
    model.card = {}
    with pytest.raises(micelab.MicelabError, match="mine does not say which data"):
        dataset_of({"mine": model}, None)


def test_evaluate_simulates_in_the_precision_that_is_asked_for_and_keeps_what_it_ran_in(checkpoint, tmp_path, monkeypatch):
    from micelab.network.spike_convolutions import WAYS
    from micelab.network.spiking import SpikingNetwork

    asked, simulate = [], SpikingNetwork.simulate
    monkeypatch.setattr(SpikingNetwork, "simulate", lambda *a, **k: asked.append(k.get("precision", "auto")) or simulate(*a, **k))
    out = tmp_path / "results.json"
    words = ("evaluate", checkpoint, "--time-steps", "2", "--explain-at", 2, "--limit", 40, "--method", "qcfs", "--out", out)
    assert run(*words, "--precision", "events").exit_code == 0
    assert "events" in asked
    assert "auto" in asked  # the errors are told as ever
    ran = "events" if WAYS["events"].is_here("cpu") else "fp32"
    assert json.loads(out.read_text())["results"]["qcfs"]["precision"] == ran
    monkeypatch.setattr(WAYS["events"].__class__, "is_here", lambda *_: False)
    assert run(*words, "--precision", "events").exit_code == 0
    assert json.loads(out.read_text())["results"]["qcfs"]["precision"] == "fp32"
    wrong = run(*words, "--precision", "fp64")
    assert wrong.exit_code == 2
    assert "--precision 'fp64' is unknown: choose auto, fp32, events, bf16x3, bf16, int8" in " ".join(wrong.output.split())


def test_a_spiking_network_is_not_evaluated_as_if_it_were_trained(checkpoint, tmp_path):
    run("convert", checkpoint, "--out", tmp_path / "spiking")
    result = run("evaluate", tmp_path / "spiking.safetensors")
    assert result.exit_code == 2
    assert "is a spiking network already" in result.output


def test_debug_shows_the_traceback(tmp_path):
    words = ["--debug", "data", "no-such-data"]
    process = subprocess.run([sys.executable, "-m", "micelab", *words], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 2
    assert "Traceback" in process.stderr
    assert "data set 'no-such-data' is unknown" in process.stderr
