"""Networks on disk: whole or not at all, and every damage named."""

import errno
import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import micelab
from micelab import checkpoint, models
from micelab.exceptions import CheckpointError


def network(**options):
    torch.manual_seed(0)
    net = models.small_cnn(activation="quant_clip", levels=4, theta=1.5, **options)
    net.train()(torch.rand(8, 1, 8, 8))  # batch-norm statistics that are not the starting ones
    return net.eval()


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(network(), tmp_path / "net", {"seed": 0})


def test_a_network_comes_back_as_it_was_saved(tmp_path, saved):
    net, back = network(), checkpoint.load(saved)
    assert saved == tmp_path / "net.safetensors"
    assert back.spec == net.spec
    assert not back.training
    assert back.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in net.state_dict().items())
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(back(images), net(images))


def test_a_name_with_a_dot_keeps_all_of_it(tmp_path):
    first, second = (checkpoint.save(network(), tmp_path / f"lr0.{n}", {"n": n}) for n in (1, 2))
    assert [file.name for file in (first, second)] == ["lr0.1.safetensors", "lr0.2.safetensors"]
    assert checkpoint.load(tmp_path / "lr0.1").card == {"n": 1}
    assert checkpoint.load(checkpoint.save(network(), tmp_path / "whole.safetensors", {"n": 3})).card == {"n": 3}
    assert (tmp_path / "lr0.2.json").exists()


def test_the_card_comes_back_and_lies_beside_the_network_for_people_to_read(tmp_path, saved):
    assert checkpoint.load(saved).card == json.loads((tmp_path / "net.json").read_text()) == {"seed": 0}


def test_half_precision_halves_the_file_and_loads_as_single(tmp_path, saved):
    small = checkpoint.save(network(), tmp_path / "half", dtype=torch.float16)
    assert small.stat().st_size < 0.7 * saved.stat().st_size
    assert checkpoint.load(small).head.weight.dtype == torch.float32


def test_a_network_is_found_by_name_and_by_path_with_or_without_its_ending(tmp_path, saved, monkeypatch):
    for name, folder in ((saved, None), (str(saved), None), (tmp_path / "net", None), ("net", tmp_path)):
        assert checkpoint.find(name, folder) == saved
    monkeypatch.chdir(tmp_path.parent)
    assert checkpoint.find(f"{tmp_path.name}/net").samefile(saved)
    (tmp_path / "checkpoints").mkdir()
    saved.rename(tmp_path / "checkpoints" / "net.safetensors")
    monkeypatch.setenv("MICELAB_DATA", str(tmp_path))
    assert checkpoint.find("net") == tmp_path / "checkpoints" / "net.safetensors"


def test_an_unknown_name_is_answered_with_the_names_there_are(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"no checkpoint is named 'nett'; here are: .*\bnet\b"):
        checkpoint.load("nett", tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint .*absent.safetensors does not exist"):
        checkpoint.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_half_written_file_is_named_as_such(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=re.escape(f"{saved} is damaged or only half written")):
        checkpoint.load(saved)


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    file = tmp_path / "trap.safetensors"
    torch.save(Trap(), file)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(file)
    assert not (tmp_path / "sprung").exists()


def test_safetensors_of_someone_else_are_named_as_such(tmp_path):
    file = tmp_path / "theirs.safetensors"
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="was not written by micelab"):
        checkpoint.load(file)


def test_the_weights_of_another_network_are_refused_with_the_first_that_differs(saved):
    tensors, _ = checkpoint.read_tensors(saved)
    with pytest.raises(
        CheckpointError, match=r"another network: `blocks.0.0.weight` has shape \(16, 16, 3, 3\) in the file, \(8, 8"
    ):
        checkpoint.load_weights(network(width=8), tensors, saved)
    with pytest.raises(CheckpointError, match=r"`blocks.0.0.weight` is only in the file"):
        checkpoint.load_weights(models.resnet20(), tensors, saved)


def test_a_refused_file_leaves_the_model_as_it_was(saved):
    tensors, _ = checkpoint.read_tensors(saved)
    tensors["stem.0.weight"][0] = torch.nan
    net = models.small_cnn(activation="quant_clip")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"holds NaN or infinite numbers in `stem.0.weight`"):
        checkpoint.load_weights(net, tensors, saved)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_found_and_named(tmp_path, bad):
    net = network()
    net.head.bias.data[3] = bad
    file = checkpoint.save(net, tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"bad.safetensors holds NaN or infinite numbers in `head.bias`"):
        checkpoint.load(file)


def test_a_network_that_this_version_does_not_know_is_named(tmp_path):
    net = network()
    net.spec = net.spec | {"name": "resnet2000"}
    with pytest.raises(CheckpointError, match="names a network that this version does not know"):
        checkpoint.load(checkpoint.save(net, tmp_path / "new"))


def test_a_network_of_the_callers_own_making_cannot_be_saved_by_spec(tmp_path):
    with pytest.raises(CheckpointError, match="Sequential has no `spec`"):
        checkpoint.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "own")


def test_a_disk_that_fills_up_leaves_the_old_file_whole(saved, monkeypatch):
    before = saved.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"net.safetensors could not be written \(No space left on device\)"):
        checkpoint.save(network(width=8), saved)
    assert saved.read_bytes() == before
    assert sorted(file.name for file in saved.parent.iterdir()) == ["net.json", "net.safetensors"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/net.safetensors could not be written"):
        checkpoint.save(network(), tmp_path / "file" / "net")


def test_the_state_of_a_run_is_not_taken_for_a_network(tmp_path):
    checkpoint.write_tensors(tmp_path / "state.safetensors", {"model.a": torch.zeros(1)}, {"config": {}})
    with pytest.raises(CheckpointError, match="holds the state of a run and no network"):
        micelab.load(tmp_path / "state.safetensors")
