"""The benchmark of the simulation runs: its rows, ratios, equality of counts and picture, on a small network."""

import json
import statistics
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

import micelab

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import peers
import simulation
import tricks

from micelab.network.folded import TimeFolded
from micelab.neuron import compiled, firing


@pytest.fixture(scope="module")
def snn():
    torch.manual_seed(0)
    return micelab.convert(micelab.resnet20(width=2, activation="quant_clip", theta=1.0), "qcfs")


def here():
    return list(peers.installed())


def test_every_row_has_its_share_of_the_floor_and_of_the_best_peer(snn):
    ticks = count(1)
    with torch.inference_mode():
        rows = simulation.timed(simulation.ways(snn, []), torch.rand(2, 3, 32, 32), 2, 2, lambda: float(next(ticks)))
    rows["a peer"] = {"images_per_second": 1.0, "lowest": 1.0, "highest": 1.0}
    rows = simulation.with_ratios(rows, ["a peer"])
    assert rows["micelab"] == {
        "images_per_second": 2.0,
        "lowest": 2.0,
        "highest": 2.0,
        "share_of_floor": 1.0,
        "ratio_to_best_peer": 2.0,
    }
    alone = [name for name in rows if name.startswith("convolutions alone")]
    assert len(alone) == (5 if torch.get_num_threads() > 1 else 3)
    assert max(rows[name]["share_of_floor"] for name in alone) == 1.0
    if "micelab, bf16" in rows:
        assert max(row["share_of_floor"] for name, row in rows.items() if name.startswith("bf16 conv")) == 1.0


def test_counts_of_micelab_are_those_of_fp64_on_a_grid(snn):
    assert simulation.counts_alike(snn, torch.rand(2, 3, 32, 32), 3, [])["micelab"] == 1.0


def test_accuracies_of_the_fast_modes_and_the_grid_are_beside_fp32s():
    data = micelab.load_data("digits")
    torch.manual_seed(0)
    digits = micelab.convert(micelab.small_cnn(width=8, activation="quant_clip", theta=1.0), "qcfs")
    found = simulation.accuracies(digits, data, 3, 50)
    assert {"fp32", "grid"} <= set(found)
    pixels, labels = next(data.test.batches(50))
    assert found["fp32"] == {
        "accuracy": round(float((digits(pixels, 3).argmax(1) == labels).double().mean()), 4),
        "same_as_fp32": 1.0,
        "lost": 0.0,
        "won": 0.0,
    }
    for row in found.values():
        assert row["accuracy"] == pytest.approx(found["fp32"]["accuracy"] - row["lost"] + row["won"])
    assert all(0.5 < row["same_as_fp32"] <= 1 for row in found.values())


def test_the_mean_cost_is_over_all_images_of_all_networks():
    rows = {
        "one": {"images": 100, "accuracy": {"grid": {"lost": 0.04, "won": 0.02}}},
        "other": {"images": 300, "accuracy": {"grid": {"lost": 0.02, "won": 0.02}}},
    }
    changes = [1] * (4 + 6) + [-1] * (2 + 6) + [0] * 382  # lost is a cost
    cost = simulation.mean_costs(rows)["grid"]
    assert cost["points"] == pytest.approx(100 * statistics.mean(changes), abs=1e-3)
    assert cost["standard_error"] == pytest.approx(100 * statistics.pstdev(changes) / 20, abs=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("spikingjelly, step by step" not in here(), reason="spikingjelly is not installed")
def test_spikingjelly_gives_the_same_counts_step_by_step_and_all_at_once(snn):
    names = [name for name in here() if name.startswith("spikingjelly")]
    with torch.inference_mode():
        found = simulation.counts_alike(snn, torch.rand(2, 3, 32, 32), 3, names)
    assert set(found.values()) == {1.0}


def test_picture_is_drawn_from_what_is_written_down(tmp_path):
    row = {"images_per_second": 3.0}
    points = {"1": {"micelab": row, "convolutions alone, 64 at a time": row, "sinabs": row}}
    scaling = {"1": {"time_steps": points, "batch": points, "width": points}}
    simulation.draw(json.loads(json.dumps({"scaling": scaling})), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_device_that_does_not_exist_is_one_clear_error(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        simulation.main(["--device", "cuda"])
    assert "device cuda does not exist here" in capsys.readouterr().err


def test_each_trick_left_out_gives_the_same_numbers_and_comes_back(narrow_snn):
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = tricks.measured(narrow_snn, images, time_steps=3, rounds=1)
    assert {f"dense, without: {name}" for name in tricks.LEFT_OUT} < found.keys()
    assert all(row["difference"] < 1e-5 and row["lowest"] > 0 for row in found.values()), found
    assert narrow_snn.layers.get_submodule("blocks.0.conv1").weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(compiled.shared_library() is None, reason="no C compiler works here")
@pytest.mark.parametrize("name", tricks.LEFT_OUT)
def test_a_trick_that_is_left_out_is_not_used(name, narrow_snn, monkeypatch):
    calls = {"loop": 0, "sums": 0, "largest": 0}

    def counting(owner, function, key):
        before = getattr(owner, function)
        monkeypatch.setattr(owner, function, lambda *a, **k: calls.update({key: calls[key] + 1}) or before(*a, **k))

    counting(firing, "step_by_step", "loop")
    counting(TimeFolded, "fire_sum", "sums")
    first = narrow_snn.layers.get_submodule("stem.0")
    hook = first.register_forward_pre_hook(lambda _, given: calls.update(largest=max(calls["largest"], len(given[0]))))
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def seen():
        calls.update(loop=0, sums=0, largest=0)
        narrow_snn.simulate(images, 3, record=False)
        ordered = first.weight.is_contiguous(memory_format=torch.channels_last)
        return {
            "neurons in compiled C": calls["loop"] == 0,
            "first convolution once": calls["largest"] <= len(images),
            "residual sum left to the neurons": calls["sums"] > 0,
            "weights laid out as the images": ordered,
            "chunks that stay in the cache": narrow_snn.chunk(images, 3) < 10**6,
            "chunks side by side": narrow_snn._lanes(images) > 1,
        }

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(seen().values())
        with tricks.LEFT_OUT[name](narrow_snn):
            assert [trick for trick, used in seen().items() if not used] == [name]
        assert all(seen().values())
    finally:
        torch.set_num_threads(threads)
        hook.remove()
