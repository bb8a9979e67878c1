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
from micelab import checkpoint, methods, models
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
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        checkpoint.load(file)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_sound_file_of_torch_is_not_called_damaged(tmp_path, zipped):
    file = tmp_path / "weights.pt"
    torch.save(network().state_dict(), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"weights.pt is no safetensors file, .* weights_only=True.* micelab.save"):
        checkpoint.load(file)


@pytest.mark.parametrize("name", [None, 3, b"net"])
def test_what_is_neither_name_nor_path_is_no_checkpoint(name):
    with pytest.raises(CheckpointError, match=f"asked for as {name!r}: give its name or its path"):
        checkpoint.load(name)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"spec": 5}, "names no network: its `spec` is 5"),
        ({"spec": None}, "names no network: its `spec` is None"),
        ({"spec": {"name": ["small_cnn"]}}, "names a network that this version does not know"),
        ({"spec": {"name": "small_cnn", "mean": "dark"}}, "names a network that this version does not know"),
        (
            {"spec": {"ann": 5, "method": "qcfs", "signed": False, "fold": True}},
            "names a network that this version does not know",
        ),
        (5, "was not written by micelab"),
        ([], "was not written by micelab"),
    ],
)
def test_words_that_describe_no_network_are_named(tmp_path, words, text):
    checkpoint.write_tensors(tmp_path / "odd.safetensors", {"a": torch.zeros(1)}, words)
    with pytest.raises(CheckpointError, match=rf"odd.safetensors {text}"):
        checkpoint.load(tmp_path / "odd.safetensors")


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


def test_a_network_for_other_classes_lends_all_but_its_last_layer(tmp_path, caplog):
    lent = models.small_cnn(activation="quant_clip", mean=[0.9], std=[0.9])
    path = checkpoint.save(lent, tmp_path / "ten")
    own = models.small_cnn(activation="relu", num_classes=7)
    head, mean = own.head.weight.clone(), own.normalize.mean.clone()
    checkpoint.start_from(own, path)
    assert torch.equal(own.head.weight, head)
    assert torch.equal(own.normalize.mean, mean)  # of the images to come
    assert torch.equal(own.stem[0].weight, lent.stem[0].weight)
    told = f"{path} tells 10 classes apart, the network here 7: head.bias and head.weight begin anew"
    assert [record.getMessage() for record in caplog.records] == [told]
    with pytest.raises(CheckpointError, match="another network"):
        checkpoint.start_from(models.small_cnn(num_classes=7, width=8), path)


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
    net, file = network(), tmp_path / "new.safetensors"
    net.spec = net.spec | {"name": "resnet2000"}
    checkpoint.write_tensors(file, net.state_dict(), {"spec": net.spec})
    with pytest.raises(CheckpointError, match=r"new.safetensors names a network that this version does not know"):
        checkpoint.load(file)
    with pytest.raises(CheckpointError, match="the network's `spec` names a network that this version does not know"):
        checkpoint.save(net, file)


def changed(**layers):
    """The network with some layers set anew."""
    net = network()
    for name, layer in layers.items():
        net.set_submodule(name.replace("_", "."), layer)
    return net


def with_levels(levels):
    net = network()
    net.blocks[1][2].levels = levels
    return net


def spiking(net, **changes):
    snn = micelab.convert(net, "qcfs", time_steps=4)
    for name, value in changes.items():
        setattr(snn, name, value)
    return snn


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: with_levels(16), "layer `blocks.1.2`: levels is 16, and its `spec` builds 4"),
        (lambda: changed(blocks_0_3=nn.AvgPool2d(2, stride=1)), "layer `blocks.0.3`: stride is 1, and its `spec` builds 2"),
        (lambda: changed(stem_2=nn.ReLU()), "layer `stem.2`: kind is ReLU, and its `spec` builds QuantClip"),
        (lambda: changed(head=nn.Linear(32, 5)), "layer `head`: out_features is 5, and its `spec` builds 10"),
        (lambda: changed(head=nn.Linear(32, 10, bias=False)), "layer `head`: shapes is .*, and its `spec` builds .*bias"),
        (lambda: changed(stem_3=nn.Identity()), "layer `stem.3`: kind is Identity, and its `spec` builds none"),
        (lambda: changed(stem=network().stem[:2]), "layer `stem.2`: kind is none, and its `spec` builds QuantClip"),
        (lambda: spiking(changed(head=nn.Linear(32, 5))), "layer `layers.head`: out_features is 5"),
        (lambda: spiking(network(), time_steps=2), "the network: time_steps is 2, and its `spec` builds 4"),
        (lambda: network().double(), "the network is in torch.float64, and `load` gives back torch.float32"),
        (lambda: spiking(network()).half(), "the network is in torch.float16, and `load` gives back torch.float32"),
    ],
)
def test_a_network_that_would_not_come_back_as_it_is_is_not_saved(tmp_path, make, text):
    with pytest.raises(CheckpointError, match=text):
        checkpoint.save(make(), tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", methods.METHODS)
def test_networks_of_every_method_and_in_training_are_what_their_spec_builds(tmp_path, method):
    torch.manual_seed(0)
    images = torch.rand(8, 1, 8, 8)
    ann = models.small_cnn(activation=methods.get(method).trained_with, width=4).train()
    before = torch.get_rng_state()
    checkpoint.save(ann, tmp_path / "ann")
    assert torch.equal(torch.get_rng_state(), before)  # saving takes no part in a training's chance
    snn = micelab.convert(ann, method, images, time_steps=4, per_channel=True, fold=method != "max")
    back = micelab.load(micelab.save(snn, tmp_path / "snn"))
    assert torch.equal(back(images), snn(images))


def test_a_network_of_the_callers_own_making_cannot_be_saved_by_spec(tmp_path):
    with pytest.raises(CheckpointError, match="Sequential has no `spec`"):
        checkpoint.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "own")


def test_a_place_without_a_name_is_refused(saved):
    with pytest.raises(CheckpointError, match="is no file that a network could be written to"):
        checkpoint.save(checkpoint.load(saved), "")


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
