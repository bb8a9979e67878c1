"""`make gpu`, part by part, on the CPU and with the smallest networks: what a person with a card will run."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch

import micelab

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpu():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    patch.undo()


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    ann = micelab.small_cnn(activation="quant_clip", theta=0.5, width=4, in_channels=3)
    return micelab.convert(ann, "qcfs")


def test_the_whole_command_writes_numbers_and_a_page(gpu, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "networks", lambda small: {"a small network": tiny})
    code = gpu.main(["--device", "cpu", "--small", "--images", "3", "--minutes", "0", "--out", str(tmp_path / "gpu")])
    assert code == 0
    results, page = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert page in capsys.readouterr().out
    assert len(results["neurons"]) == 12
    assert not any(row["different"] for row in results["neurons"])
    network = results["networks"]["a small network"]
    assert network["counts"]["different"] == 0
    assert network["counts"]["spikes"] > 1000
    for kind in ("fp32", "bf16"):
        assert network["speeds"][f"micelab, {kind}"]["share_of_floor"] > 0
        assert f"| convolutions alone, {kind} | " in page
    for name, row in network["speeds"].items():
        assert row.get("same_predictions", 1) == 1 or "spikingjelly" not in name
    for count in (1, 3):  # of three images eight cannot be taken
        row = network["few"][f"{count} at a time, recorded"]
        assert row["images_per_second"] > 0
        assert row["largest_difference"] == 0
        assert f"| {count} at a time, called | " in page
    assert "12 of 12 cases equal the CPU's" in page
    assert results["training"] == {}


def test_a_trained_network_is_measured_with_its_spikes(gpu, tmp_path):
    config = micelab.train.TrainConfig(epochs=1, width=4, theta=2.0)
    micelab.train.train(config, tmp_path, progress=False)
    found = gpu.spiking(tmp_path / "model.safetensors", 4, "cpu")
    ann, data = micelab.load(tmp_path / "model.safetensors"), micelab.load_data("digits")
    assert found["test_accuracy"] == ann.card["test_accuracy"]
    assert (
        found["test_accuracy_with_spikes"]
        == micelab.accuracy_curve(micelab.convert(ann, "qcfs"), data.test.batches(), (4,)).accuracy[0]
    )


def test_a_peer_that_does_not_run_is_a_line_in_the_table(gpu, tiny, monkeypatch):
    def broken(_):
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(gpu, "spikingjelly_ways", lambda *_: {"spikingjelly, cupy backend": broken})
    rows = gpu.speeds(tiny, torch.rand(2, 3, 32, 32), 2, "cpu", 1)
    assert rows["spikingjelly, cupy backend, fp32"] == {"failed": "no kernel image is available"}


def trainer(tmp_path, body):
    """A stand-in for `python -m micelab train ... --out FOLDER`."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\nfor out; do :; done\nmkdir -p "$out"\n' + body)
    script.chmod(0o755)
    return str(script)


def test_training_is_stopped_at_the_limit_and_its_last_epoch_kept(gpu, tmp_path, monkeypatch):
    line = json.dumps({"epoch": 3, "validation_accuracy": 0.5})
    monkeypatch.setattr(gpu.sys, "executable", trainer(tmp_path, f"echo '{line}' > \"$out\"/metrics.jsonl\nexec sleep 60\n"))
    found = gpu.trained("--epochs 9", tmp_path / "run", minutes=0.02)
    assert found["stopped"]
    assert (found["epochs"], found["validation_accuracy"]) == (3, 0.5)
    assert "failed" not in found


def test_training_that_fails_says_why(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", trainer(tmp_path, "echo 'cifar10 is not in data' >&2\nexit 2\n"))
    found = gpu.trained("--dataset cifar10", tmp_path / "run", minutes=1)
    assert found["failed"] == "cifar10 is not in data"


def test_recipes_are_options_that_training_knows(gpu):
    from typer.testing import CliRunner

    from micelab.cli import app

    known = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for words in (*gpu.RECIPES.values(), *gpu.SMALL_RECIPES.values()):
        for option in words.split():
            assert not option.startswith("--") or option in known


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_card_one_sentence_says_what_to_do(gpu, capsys):
    assert gpu.main([]) == 2
    assert "no CUDA device was found" in capsys.readouterr().out


def test_make_gpu_runs_the_script_with_what_is_asked_for():
    asked = ["make", "-n", "gpu", "DEVICE=cpu", "SMALL=1", "MINUTES=2"]
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv/bin/python benchmarks/gpu.py --device cpu --small --minutes 2" in said
