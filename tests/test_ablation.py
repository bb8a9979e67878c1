"""The ablation runs: every row is trained from one start and measured, and a second call goes on from what is there."""

import json
import sys
from pathlib import Path

import pytest

from micelab.train import train
from micelab.train.recipe import TrainConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import ablation


@pytest.mark.slow
def test_every_row_starts_from_the_same_network_and_is_measured_in_the_four_errors(tmp_path):
    train(TrainConfig(epochs=2, lr=0.05, theta=2.0), tmp_path / "start", progress=False)
    start, out = str(tmp_path / "start" / "model.safetensors"), tmp_path / "ablation.json"
    words = ["--start", start, "--time-steps", "2", "--images", "32", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    found = ablation.main(words)
    assert list(found) == list(json.loads(out.read_text())["rows"])
    assert len(found) == 7
    assert found["+ joint"]["errors"] != found["qcfs"]["errors"]
    for row in found.values():
        assert 0 <= row["accuracy"] <= 1
        lost = sum(row["points_lost"].values())
        assert lost == pytest.approx(row["ann_accuracy"] - row["accuracy"], abs=1e-9)
    assert ablation.main(words)["+ joint"] == found["+ joint"]
