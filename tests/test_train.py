"""Training that survives what happens to it: kills, signals, several processes, a diverging loss."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import micelab
from micelab import checkpoint, joint, train
from micelab.data import Split, load_data
from micelab.exceptions import CheckpointError, ConversionError, InputError, TrainingError
from micelab.models import resnet20, small_cnn
from micelab.train import TrainConfig, recipe, remake
from micelab.train.recipe import JointConfig, ThroughTimeConfig
from micelab.train.teacher import Teacher

SMALL = {"epochs": 3, "batch_size": 64, "theta": 2.0, "width": 8, "levels": 4}
OPTIONS = ["--dataset", "digits", "--epochs", "10", "--theta", "2", "--levels", "4", "--seed", "5"]
ALONE = [sys.executable, "-m", "micelab", "train"]
# `accelerate launch --cpu` starts one process only, unless MPI is there; `--multi_gpu` starts torchrun, on CPUs too
TWO = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
TWO += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "micelab", "train"]


@pytest.fixture(scope="module")
def digits():
    """The digits with a tenth of the training images: an epoch of two steps at 64, four at 32."""
    whole = load_data()
    return type(whole)(**(vars(whole) | {"train": Split(whole.train.images[:160], whole.train.labels[:160])}))


def start(out, *options, launcher=ALONE):
    """A training of the command line in a process of its own, one thread to each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, *OPTIONS, "--out", str(out), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process, status=0):
    """What the process said, once it has ended with `status`."""
    said, _ = process.communicate(timeout=240)
    assert process.returncode == status, said
    return said


def wait_for_epochs(process, out, count):
    """Until `count` epochs are in the metrics; then the run is in the middle of the next."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{count} epochs were not reached: {process.communicate(timeout=60)[0]}")


def weights(out):
    return checkpoint.load(out / "model.safetensors").state_dict()


def history(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert history(one) == history(other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(start(out))
    return out


# Killed, stopped, resumed: real processes


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_ends_bit_for_bit_where_an_undisturbed_one_ends(tmp_path, undisturbed):
    out = tmp_path / "run"
    process = start(out)
    wait_for_epochs(process, out, 3)
    process.kill()
    finished(process, -signal.SIGKILL)
    assert not (out / "model.safetensors").exists()
    finished(start(out, "--resume"))
    assert_same_run(out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_was_asked_to_stop_saves_its_step_and_resumes_bit_for_bit(tmp_path, undisturbed, number, status):
    out = tmp_path / "run"
    process = start(out)
    wait_for_epochs(process, out, 2)
    process.send_signal(number)
    said = finished(process, status)
    assert "Traceback" not in said
    _, state = checkpoint.read_tensors(out / "state.safetensors")
    assert state["epoch"] >= 2
    assert state["step"] >= 1
    finished(start(out, "--resume"))
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_two_processes_train_one_network_the_same_way_each_time(tmp_path):
    for name in ("one", "two"):
        finished(start(tmp_path / name, launcher=TWO))
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == [
            "metrics.jsonl",
            "model.json",
            "model.safetensors",
            "state.safetensors",
        ]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "one").values())
    card = json.loads((tmp_path / "one" / "model.json").read_text())
    assert card["test_accuracy"] > 0.5
    assert card["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["rates", "time"])
def test_two_processes_train_one_network_jointly_the_same_way_each_time(tmp_path, undisturbed, gradient):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["--joint", "--gradient", gradient, "--time-steps", "2", "--start", str(undisturbed / "model.safetensors")]
    options += ["--epochs", "1", "--lr", "1e-3"]
    for name in ("one", "two"):
        command = [*TWO, *options, "--out", str(tmp_path / name)]
        finished(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    card = json.loads((tmp_path / "one" / "model.json").read_text())
    assert card["processes"] == 2
    assert card["test_accuracy"] > 0.5


# Resumed at every kind of step: in this process


def stop_at(monkeypatch, epoch, step):
    """Sends SIGTERM to this process right after the step `step` of `epoch`, both counted from 0."""
    whole = train.run.Run._one_step

    def one_step(run, images, labels):
        here = (run.epoch, run.step)
        whole(run, images, labels)
        if here == (epoch, step):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.run.Run, "_one_step", one_step)


@pytest.mark.parametrize("activation", ["relu", "clip", "quant_clip"])
@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (1, 2), (2, 4)])
def test_a_run_stopped_after_any_step_resumes_to_the_same_network(tmp_path, digits, monkeypatch, activation, epoch, step):
    config = TrainConfig(**SMALL | {"batch_size": 32, "activation": activation})
    train.train(config, tmp_path / "whole", digits)
    with monkeypatch.context() as patch:
        stop_at(patch, epoch, step)
        with pytest.raises(KeyboardInterrupt) as stopped:
            train.train(config, tmp_path / "cut", digits)
    assert stopped.value.args == (signal.SIGTERM,)
    _, state = checkpoint.read_tensors(tmp_path / "cut" / "state.safetensors")
    assert (state["epoch"], state["step"]) == (epoch, step + 1)
    train.train(config, tmp_path / "cut", digits, resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_signals_are_the_callers_again_after_training(tmp_path, digits):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train.train(TrainConfig(**SMALL), tmp_path, digits)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_is_the_same_for_a_seed_and_another_for_another(tmp_path, digits):
    for name, seed in (("one", 7), ("same", 7), ("other", 8)):
        torch.manual_seed(len(name))  # the caller's own seed plays no part
        train.train(TrainConfig(**SMALL, seed=seed), tmp_path / name, digits)
    assert_same_run(tmp_path / "one", tmp_path / "same")
    assert not torch.equal(weights(tmp_path / "one")["head.weight"], weights(tmp_path / "other")["head.weight"])


def test_a_finished_run_resumes_to_itself(tmp_path, digits):
    first = train.train(TrainConfig(**SMALL), tmp_path, digits)
    again = train.train(TrainConfig(**SMALL), tmp_path, digits, resume=True)
    assert torch.equal(first.head.weight, again.head.weight)
    assert len(history(tmp_path)) == SMALL["epochs"]


def test_one_epoch_is_a_run(tmp_path, digits):
    train.train(TrainConfig(**SMALL | {"epochs": 1}), tmp_path, digits)
    assert [line["epoch"] for line in history(tmp_path)] == [1]


def test_the_card_tells_what_was_trained_how_and_on_what(tmp_path, digits):
    net = train.train(TrainConfig(**SMALL, seed=3), tmp_path, digits, command="micelab train --seed 3")
    card = checkpoint.load(tmp_path / "model.safetensors").card
    assert card["recipe"]["seed"] == 3
    assert card["command"] == "micelab train --seed 3"
    assert card["images"] == {"train": 160, "validation": 143, "test": 359}
    assert card["parameters"] == sum(p.numel() for p in net.parameters())
    assert card["validation_accuracy"] == history(tmp_path)[-1]["validation_accuracy"]
    assert card["test_accuracy"] == train.accuracy(net, digits.test)
    assert torch.__version__ in card["machine"]
    assert card["processes"] == 1


def test_the_rate_climbs_then_falls_to_zero(tmp_path, digits, monkeypatch):
    rates, whole = [], train.run.Run.rate
    monkeypatch.setattr(train.run.Run, "rate", lambda run: rates.append(whole(run)) or rates[-1])
    train.train(TrainConfig(**SMALL | {"epochs": 6}, lr=0.1), tmp_path, digits)
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0)


@pytest.mark.parametrize("warmup_epochs", [0.1, 0.3, 1.7])
def test_a_warm_up_of_no_whole_number_of_steps_stays_below_the_highest_rate(tmp_path, digits, monkeypatch, warmup_epochs):
    rates, whole = [], train.run.Run.rate
    monkeypatch.setattr(train.run.Run, "rate", lambda run: rates.append(whole(run)) or rates[-1])
    train.train(TrainConfig(**SMALL | {"epochs": 4}, lr=0.1, warmup_epochs=warmup_epochs), tmp_path, digits)
    assert 0.09 < max(rates) <= 0.1


# What goes wrong


def test_smaller_crops_are_for_networks_and_augmentations_that_take_them(tmp_path, digits):
    net = train.train(TrainConfig(**SMALL | {"small_crops": 0.5}), tmp_path / "run", digits)
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert [JointConfig(epochs=5, small_crops=share).small_epochs for share in (0, 0.4, 1)] == [0, 2, 5]
    for options in ({"small_crops": 1.2}, {"small_crops": 0.5, "augment": "none"}):
        with pytest.raises(InputError, match=r"--small-crops is .*: give a share from 0 to 1, and an --augment that crops"):
            TrainConfig(**options)
    ann = nn.Sequential(nn.Conv2d(1, 4, 3), micelab.QuantClip(4), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(InputError, match=r"--small-crops 0.5: the network takes no images of 6 x 6; leave it out, or end"):
        joint.train(JointConfig(epochs=2, small_crops=0.5, batch_size=64), tmp_path / "own", digits, model=ann)
    assert not (tmp_path / "own" / "state.safetensors").exists()


def test_a_network_that_learns_from_a_teacher_answers_more_like_it(tmp_path):
    whole = load_data()
    teacher = train.train(TrainConfig(epochs=12, activation="relu", levels=None), tmp_path / "teacher", whole)
    name = str(tmp_path / "teacher" / "model.safetensors")
    with torch.inference_mode():
        images = whole.test.images.float() / 255
        wanted = teacher(images).log_softmax(1)

        def far(distill):
            options = {"distill": distill, "teacher": name} if distill else {}
            config = TrainConfig(**SMALL | {"epochs": 10, "lr": 0.03}, **options)
            with torch.inference_mode(False):
                student = train.train(config, tmp_path / f"{distill}", whole)
            said = student(images).log_softmax(1)
            return nn.functional.kl_div(said, wanted, log_target=True, reduction="batchmean").item()

        assert far(4.0) < 0.8 * far(0.0)


def test_a_teacher_is_the_start_where_none_is_named_and_must_know_the_classes(tmp_path, digits):
    with pytest.raises(InputError, match=r"--distill learns another network's answers: name its checkpoint with --teacher"):
        train.train(TrainConfig(**SMALL, distill=1.0), tmp_path / "run", digits)
    start = str(checkpoint.save(small_cnn(width=8), tmp_path / "start"))
    run = train.run.Run(TrainConfig(**SMALL, distill=1.0, start=start), tmp_path / "run", digits, Accelerator(cpu=True))
    seen = run.teacher.network
    assert torch.equal(seen.head.weight, checkpoint.load(start).head.weight)
    assert not seen.training
    assert not any(parameter.requires_grad for parameter in seen.parameters())
    seven = str(checkpoint.save(small_cnn(width=8, num_classes=7), tmp_path / "seven"))
    for options, name in (({"teacher": seven}, "--teacher"), ({"start": seven}, "--start")):
        with pytest.raises(InputError, match=f"{name} tells 7 classes apart, digits has 10: choose another"):
            train.train(TrainConfig(**SMALL, distill=1.0, **options), tmp_path / "run", digits)
    assert not (tmp_path / "run").exists()


def test_a_teachers_divergence_is_that_of_softened_answers_and_its_gradient_keeps_its_size():
    torch.manual_seed(0)
    net, images = small_cnn(width=8).eval(), torch.rand(64, 1, 8, 8)
    wanted, logits = net(images).detach(), torch.randn(64, 10, requires_grad=True)
    sizes = {}
    for temperature in (1.0, 4.0):
        found = Teacher(net, temperature=temperature).divergence(logits, images)
        soft, own = (torch.softmax(x.detach().double() / temperature, 1) for x in (wanted, logits))
        assert found.item() == pytest.approx(temperature**2 * (soft * (soft / own).log()).sum(1).mean().item(), rel=1e-5)
        sizes[temperature] = torch.autograd.grad(found, logits)[0].norm().item()
    assert 0.3 < sizes[4.0] / sizes[1.0] < 1


def test_a_teacher_is_asked_once_about_a_view_that_comes_again_and_the_run_is_the_same(tmp_path, digits, monkeypatch):
    name = str(checkpoint.save(small_cnn(width=8), tmp_path / "teacher"))
    asked = []
    logits = Teacher.logits

    def counted(teacher, images, key=None):
        asked.append(key not in teacher.remembered)
        return logits(teacher, images, key)

    monkeypatch.setattr(Teacher, "logits", counted)
    config = TrainConfig(**SMALL | {"epochs": 5, "views": 2, "small_crops": 0.4}, distill=1.0, teacher=name)
    train.train(config, tmp_path / "run", digits)
    steps = len(digits.train) // config.batch_size
    assert [sum(asked[epoch * steps :][:steps]) for epoch in range(5)] == [steps, steps, steps, steps, 0]
    monkeypatch.setattr(Teacher, "logits", lambda teacher, images, key=None: logits(teacher, images))  # as if it forgot
    train.train(config, tmp_path / "forgetful", digits)
    assert_same_run(tmp_path / "run", tmp_path / "forgetful")


def test_a_run_with_views_that_come_again_resumes_bit_for_bit(tmp_path, digits, monkeypatch):
    name = str(checkpoint.save(small_cnn(width=8), tmp_path / "teacher"))
    config = TrainConfig(**SMALL | {"epochs": 4, "views": 2}, distill=1.0, teacher=name)
    train.train(config, tmp_path / "whole", digits)
    with monkeypatch.context() as patched:
        stop_at(patched, epoch=2, step=1)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path / "stopped", digits)
    train.train(config, tmp_path / "stopped", digits, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_bounds_begin_where_the_staircase_is_nearest_to_what_the_relu_network_does(tmp_path):
    whole = load_data()
    relu = train.train(TrainConfig(epochs=12, activation="relu", levels=None, width=8), tmp_path / "relu", whole)
    start = str(tmp_path / "relu" / "model.safetensors")
    plain, fitted = (TrainConfig(width=8, levels=3, theta=40.0, start=start, fit_theta=fit).build(whole) for fit in (False, True))
    assert train.accuracy(plain, whole.test) < 0.5 < 0.8 < train.accuracy(fitted, whole.test)
    clips = {name: module for name, module in fitted.named_modules() if isinstance(module, micelab.QuantClip)}
    assert len(clips) == 4
    seen = {}
    for name in clips:
        relu.get_submodule(name).register_forward_hook(lambda module, inputs, out, name=name: seen.update({name: (*inputs, out)}))
    with torch.inference_mode():
        relu(whole.train.images[:256].float() / 255)
        for name, clip in clips.items():
            z, wanted = seen[name]
            errors = [
                (micelab.QuantClip(3, float(clip.theta) * factor)(z) - wanted).square().mean() for factor in (0.9, 1.0, 1.1)
            ]
            assert errors[1] == min(errors), name
    assert not any(module._forward_hooks for module in fitted.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--fit-theta fits bounds to a ReLU network's activations: name one with --start"),
        ({"start": "clips"}, "--fit-theta fits bounds to a ReLU network's activations: name one with --start"),
        ({"start": "relu", "activation": "clip", "levels": None}, "--fit-theta is for bounds with levels, and --activation clip"),
    ],
)
def test_bounds_are_fitted_to_a_relu_network_and_have_levels(tmp_path, monkeypatch, digits, options, words):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(small_cnn(width=8, activation="quant_clip"), "clips.safetensors")
    checkpoint.save(small_cnn(width=8), "relu.safetensors")
    options = {key: f"{value}.safetensors" if key == "start" else value for key, value in options.items()}
    with pytest.raises(InputError, match=words):
        train.train(TrainConfig(**SMALL | options, fit_theta=True), "run", digits)


def test_a_start_with_a_silent_layer_has_nothing_to_fit_a_bound_to(tmp_path, digits):
    silent = small_cnn(width=8)
    silent.stem[1].bias.data.fill_(-1e3)
    start = str(checkpoint.save(silent, tmp_path / "silent"))
    with pytest.raises(ConversionError, match=r"--start .*silent.*: layer `stem.2` is never above 0.*or leave out --fit-theta"):
        train.train(TrainConfig(**SMALL, start=start, fit_theta=True), tmp_path / "run", digits)
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_options_names_those_that_differ(tmp_path, digits):
    train.train(TrainConfig(**SMALL), tmp_path, digits)
    with pytest.raises(InputError, match=r"other options: lr was 0.1, is 0.2; theta was 2.0, is 3.0. Resume with the same ones"):
        train.train(TrainConfig(**SMALL | {"theta": 3.0, "lr": 0.2}), tmp_path, digits, resume=True)


def test_resuming_nothing_says_so(tmp_path, digits):
    with pytest.raises(CheckpointError, match="holds no run to resume: start it without --resume"):
        train.train(TrainConfig(**SMALL), tmp_path, digits, resume=True)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (
            lambda file: file.unlink(),
            "metrics.jsonl cannot be read .*No such file.* put it back, or begin again",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:-20]), "metrics.jsonl cannot be read"),
        (lambda file: file.write_text(file.read_text().splitlines()[0]), f"tells of 1 epochs, and {SMALL['epochs']} are over"),
    ],
    ids=["lost", "cut off", "of fewer epochs"],
)
def test_what_the_card_is_made_from_must_be_there_when_a_run_goes_on(tmp_path, digits, spoil, text):
    train.train(TrainConfig(**SMALL), tmp_path, digits)
    spoil(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=text):
        train.train(TrainConfig(**SMALL), tmp_path, digits, resume=True)


def test_a_network_is_not_taken_for_the_state_of_a_run(tmp_path, digits):
    train.train(TrainConfig(**SMALL), tmp_path, digits)
    (tmp_path / "state.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"state.safetensors holds a network and no state of a run"):
        train.train(TrainConfig(**SMALL), tmp_path, digits, resume=True)


def test_a_folder_that_cannot_be_is_said_before_the_first_epoch(tmp_path, digits, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(train.run.Run, "one_epoch", lambda *_: pytest.fail("it trained"))
    with pytest.raises(CheckpointError, match=r"file is no folder that can be written .*choose another"):
        train.train(TrainConfig(**SMALL), tmp_path / "file", digits)


def test_images_that_are_no_squares_are_trained_on_as_they_are_or_not_at_all(digits):
    tall = dataclasses.replace(digits.train, images=digits.train.images.repeat_interleave(2, 2))
    with pytest.raises(InputError, match="images are of 16 x 8 pixels, and --augment standard crops squares"):
        train.batches.TrainingBatches(tall, 32, "standard", 0)
    images, _ = next(train.batches.TrainingBatches(tall, 32, "none", 0).epoch(0))
    assert images.shape == (32, 1, 16, 8)


def test_a_run_is_not_overwritten_by_another(tmp_path, digits):
    train.train(TrainConfig(**SMALL), tmp_path, digits)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(InputError, match="already holds a run: continue it with --resume, or choose another --out"):
        train.train(TrainConfig(**SMALL, seed=1), tmp_path, digits)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_half_written_state_is_named(tmp_path, digits):
    train.train(TrainConfig(**SMALL), tmp_path, digits)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state.safetensors is damaged or only half written"):
        train.train(TrainConfig(**SMALL), tmp_path, digits, resume=True)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(tmp_path, digits, monkeypatch):
    whole = train.run.Run.rate
    monkeypatch.setattr(train.run.Run, "rate", lambda run: 1e30 if run.epoch == 1 else whole(run))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch 2, step 2: .* kept in .*Lower --lr \(now 0.1\)"):
        train.train(TrainConfig(**SMALL), tmp_path, digits)
    tensors, state = checkpoint.read_tensors(tmp_path / "state.safetensors")
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(torch.isfinite(value).all() for value in tensors.values())
    assert not (tmp_path / "model.safetensors").exists()


def test_a_loss_that_is_no_number_from_the_start_does_not_point_to_a_state_that_is_not_there(tmp_path, digits):
    with pytest.raises(TrainingError, match="training has diverged; no epoch was finished before"):
        train.train(TrainConfig(**SMALL, lr=1e30), tmp_path, digits)
    assert not (tmp_path / "state.safetensors").exists()


def spoil(run):
    with torch.no_grad():
        run.model.head.weight[0, 0] = float("nan")


def test_weights_that_the_last_step_spoils_do_not_take_the_place_of_good_ones(tmp_path, digits, monkeypatch):
    whole = train.run.Run._one_step

    def last_one_spoils(run, images, labels):
        whole(run, images, labels)
        if run.epoch == 1 and run.step == len(run.batches):
            spoil(run)

    monkeypatch.setattr(train.run.Run, "_one_step", last_one_spoils)
    said = r"`head.weight` is no longer finite in epoch 2, step \d+: training has diverged; the last good state is kept in"
    with pytest.raises(TrainingError, match=said):
        train.train(TrainConfig(**SMALL), tmp_path, digits)
    tensors, state = checkpoint.read_tensors(tmp_path / "state.safetensors")
    assert state["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in tensors.values())
    assert not (tmp_path / "model.safetensors").exists()


def test_a_run_that_is_stopped_after_a_spoiled_step_keeps_the_last_good_state(tmp_path, digits, monkeypatch):
    whole = train.run.Run._one_step

    def spoils(run, images, labels):
        whole(run, images, labels)
        if run.epoch == 1:
            spoil(run)

    monkeypatch.setattr(train.run.Run, "_one_step", spoils)
    monkeypatch.setattr(train.run.Run, "_must_stop", lambda run, _: run.epoch == 1)
    with pytest.raises(TrainingError, match="is no longer finite"):
        train.train(TrainConfig(**SMALL), tmp_path, digits)
    assert checkpoint.read_tensors(tmp_path / "state.safetensors")[1]["epoch"] == 1


def test_a_step_without_memory_names_the_remedy(tmp_path, digits, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(train.run.Run, "loss", full)
    with pytest.raises(TrainingError, match=r"memory of cpu does not suffice for a step of \d+ images; .* lower --batch-size"):
        train.train(TrainConfig(**SMALL), tmp_path, digits)


def test_an_option_that_is_newer_than_a_state_had_its_default_there(tmp_path, digits):
    config = TrainConfig(**SMALL)
    train.train(config, tmp_path, digits)
    tensors, words = checkpoint.read_tensors(tmp_path / "state.safetensors")
    del words["config"]["label_smoothing"]
    checkpoint.write_tensors(tmp_path / "state.safetensors", tensors, words)
    train.train(config, tmp_path, digits, resume=True)
    with pytest.raises(InputError, match=r"label_smoothing was 0.0, is 0.2"):
        train.train(dataclasses.replace(config, label_smoothing=0.2), tmp_path, digits, resume=True)


def test_where_torch_compile_fails_training_goes_on_without_it_and_says_so_once(tmp_path, digits, monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler here")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: real(network, backend=broken))
    plain = train.train(TrainConfig(**SMALL), tmp_path / "plain", digits)
    tried = train.train(TrainConfig(**SMALL, compile=True), tmp_path / "tried", digits)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), tried.parameters(), strict=True))
    said = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert len(said) == 1
    assert "no C++ compiler here" in said[0]


def test_bf16_that_is_only_emulated_is_said(tmp_path, digits, monkeypatch, caplog):
    monkeypatch.setattr(train.run, "has_bf16", lambda device: False)
    train.train(TrainConfig(**SMALL, precision="bf16"), tmp_path, digits)
    assert "--precision bf16: cpu only emulates it, which is slow; fp32 would be faster" in caplog.text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("theta_lr", float("nan")),
        ("warmup_epochs", -1.0),
        ("label_smoothing", 1.0),
        ("seed", -1),
        ("precision", "fp16"),
    ],
)
def test_an_option_out_of_its_range_is_named_as_it_is_typed(option, value):
    with pytest.raises(InputError, match=f"^--{option.replace('_', '-')} is .* out of range"):
        TrainConfig(**{option: value})


def test_a_network_kept_in_16_bits_is_measured_as_its_file_holds_it(tmp_path, digits):
    files = {}
    for storage in ("fp32", "fp16"):
        out = tmp_path / storage
        model = train.train(TrainConfig(**SMALL | {"storage": storage}), out, digits)
        files[storage] = (out / "model.safetensors").stat().st_size
        again = checkpoint.load(out / "model.safetensors")
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])
        assert again.card["validation_accuracy"] == train.accuracy(again, digits.validation)
        assert again.card["test_accuracy"] == train.accuracy(again, digits.test)
    assert again.head.weight.dtype == torch.float32
    assert torch.equal(again.head.weight, again.head.weight.half().float())
    assert files["fp16"] < 0.7 * files["fp32"]
    assert recipe.choose("cifar10-c", joint=True, given={}).storage == "fp16"


@pytest.mark.parametrize("name", recipe.RECIPES)
def test_a_recipe_names_a_network_that_can_be_built_and_options_go_before_it(name):
    first = recipe.choose(name, joint=False, given={"epochs": 3, "seed": 7})
    assert (first.epochs, first.seed, first.dataset) == (3, 7, name.split("-")[0])
    assert recipe.choose(name, joint=False, given={}).epochs >= 60
    classes = {"cifar10": 10, "cifar100": 100}[first.dataset]
    network = resnet20(kind=first.kind, activation=first.activation, levels=first.levels, num_classes=classes)
    assert sum(p.numel() for p in network.parameters()) // 10**5 == {"a": 2, "b": 112, "c": 43}[name[-1]]
    second = recipe.choose(name, joint=True, given={"time_steps": (4,)})
    assert (second.dataset, second.time_steps) == (first.dataset, (4,))
    assert second.start


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network": "vgg"}, "network 'vgg' is unknown"),
        ({"activation": "gelu"}, "activation 'gelu' is unknown"),
        ({"theta": -1.0}, "must be a finite number above 0"),
        ({"levels": 0}, "integer of at least 1"),
        ({"augment": "strong"}, "'strong' is unknown"),
        ({"batch_size": 161}, "batch size 161 must be"),
        ({"kind": "A"}, "does not take these options"),
    ],
)
def test_a_network_or_batch_that_cannot_be_is_refused_before_anything_is_written(tmp_path, digits, options, words):
    with pytest.raises(InputError, match=words):
        train.train(TrainConfig(**SMALL | options), tmp_path / "run", digits)
    assert not (tmp_path / "run").exists()


def test_training_goes_on_from_a_checkpoint_whose_activation_may_be_another(tmp_path):
    data = load_data("digits")
    first = train.train(TrainConfig(activation="relu", epochs=3), tmp_path / "relu", data, progress=False)
    start = str(tmp_path / "relu" / "model.safetensors")
    model = TrainConfig(activation="quant_clip", theta=3.0, start=start).build(data)
    for name, tensor in first.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert all(torch.isclose(m.theta, torch.tensor(3.0)) for m in model.modules() if hasattr(m, "log_theta"))
    staircase = TrainConfig(activation="spike_clip", theta=3.0, start=start).build(data)
    assert all(m.v0.item() == 0.5 for m in staircase.modules() if hasattr(m, "v0_start"))
    back = tmp_path / "quantized"
    checkpoint.save(model, back)
    assert torch.equal(TrainConfig(activation="relu", start=str(back)).build(data).head.weight, first.head.weight)


def test_noise_training_measures_its_noise_after_every_epoch_and_resumes_with_it(tmp_path, digits):
    config = TrainConfig(**SMALL | {"activation": "noisy_quant_clip", "epochs": 2})
    net = train.train(config, tmp_path, digits)
    lines = history(tmp_path)
    for line in lines:
        first, *others = line["sigma"]
        assert first == 0  # T = levels = 4, and a constant current: what the layer says is what it was trained to say
        assert len(others) == 3
        assert min(others) > 0
    assert [module.sigma.item() for module in net.modules() if hasattr(module, "sigma")] == pytest.approx(lines[-1]["sigma"])
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    assert loaded.blocks[0][2].sigma == net.blocks[0][2].sigma > 0


def test_a_card_remembers_the_runs_before_it(tmp_path, digits):
    start, steps = None, []
    for seed in range(3):
        out = tmp_path / str(seed)
        train.train(TrainConfig(**SMALL | {"epochs": 1}, seed=seed, start=start), out, digits, command=f"run {seed}")
        start = str(out / "model.safetensors")
        steps.append([stage["command"] for stage in checkpoint.load(start).card["stages_before"]])
    assert steps == [[], ["run 0"], ["run 0", "run 1"]]


def test_starting_from_another_network_names_what_does_not_fit(tmp_path):
    data = load_data("digits")
    checkpoint.save(small_cnn(width=4), tmp_path / "narrow")
    with pytest.raises(CheckpointError, match="of another network: `"):
        TrainConfig(start=str(tmp_path / "narrow")).build(data)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A network of two runs on the digits, as it would be shipped: its checkpoint."""
    folder = tmp_path_factory.mktemp("chain")
    first = TrainConfig(epochs=1, width=4, levels=2, theta=2.0, lr=0.05)
    train.train(first, folder / "first", load_data())
    second = ThroughTimeConfig(epochs=1, time_steps=(2,), start=str(folder / "first" / "model.safetensors"), distill=0.5)
    network = joint.train(second, folder / "second", load_data())
    card = json.loads((folder / "second" / "model.json").read_text())
    return checkpoint.save(network, folder / "shipped", card)


def test_a_network_is_made_again_from_its_card_alone(chain, tmp_path, monkeypatch):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(chain.read_bytes())
    again = remake.remake(moved, tmp_path / "runs", progress=False)
    was = checkpoint.load(chain)
    assert all(torch.equal(a, b) for a, b in zip(was.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.card["test_accuracy"] == was.card["test_accuracy"]
    assert again.card["command"] == f"micelab remake {moved}"
    assert [stage["recipe"]["start"] for stage in again.card["stages_before"]] == [None]
    trained = []
    monkeypatch.setattr(remake, "train", lambda *args: trained.append(args))
    (tmp_path / "runs" / "2" / "model.safetensors").unlink()  # stopped before it was written: the state is there
    assert remake.remake(moved, tmp_path / "runs", progress=False).card["test_accuracy"] == was.card["test_accuracy"]
    assert trained == []


def test_the_command_lists_the_runs_and_makes_them_again(chain, tmp_path):
    command = [sys.executable, "-m", "micelab", "remake", str(chain), "--out", str(tmp_path / "runs")]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line[:13] for line in listed] == ["1/2  1 epoch,", "2/2  1 epoch,"]
    assert not (tmp_path / "runs").exists()
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    accuracy = f"{100 * checkpoint.load(chain).card['test_accuracy']:.2f} %"
    assert f"test: {accuracy}, {accuracy} on the card" in said


def test_a_folder_with_another_networks_runs_is_refused(chain, tmp_path):
    remake.remake(chain, tmp_path, progress=False)
    network = checkpoint.load(chain)
    network.card["recipe"]["lr"] = 0.01
    other = checkpoint.save(network, tmp_path / "other", network.card)
    with pytest.raises(InputError, match=r"2 holds another network's run \(lr was 0.05, is 0.01\): choose another --out"):
        remake.remake(other, tmp_path, progress=False)


def test_networks_that_cannot_be_made_again_say_why(chain, tmp_path):
    plain = checkpoint.save(small_cnn(), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="has no card that tells how it was trained"):
        remake.remake(plain, tmp_path / "runs")
    network = checkpoint.load(chain)
    network.card["recipe"]["from_the_future"] = 1
    odd = checkpoint.save(network, tmp_path / "odd", network.card)
    with pytest.raises(CheckpointError, match=r"card of .*odd.* is of another version of micelab: .*from_the_future"):
        remake.remake(odd, tmp_path / "runs")


@pytest.mark.parametrize("name", checkpoint.shipped())
def test_every_shipped_network_has_a_recipe_for_each_of_its_runs(name):
    card = checkpoint.load(name).card
    assert len(remake.recipes(name)) == len(card.get("stages_before", [])) + 1
    assert remake.recipes(name)[-1].dataset == card["dataset"]
    assert remake.recipes(name)[0].start is None


def test_a_run_that_python_started_says_so_in_its_card(tmp_path):
    data = micelab.load_data("digits")
    small = dataclasses.replace(data, train=data.train.head(64), validation=data.validation.head(16), test=data.test.head(16))
    train.train(TrainConfig(epochs=1, batch_size=32), tmp_path / "run", small, progress=False)
    card = json.loads((tmp_path / "run" / "model.json").read_text())
    assert card["command"].startswith("micelab.train.train(TrainConfig(dataset='digits', epochs=1")
    assert str(tmp_path / "run") in card["command"]


def test_an_accuracy_leaves_every_layer_in_its_mode():
    model = micelab.small_cnn().train()
    model.stem[1].eval()
    before = [module.training for module in model.modules()]
    split = micelab.load_data("digits").test.head(8)
    train.accuracy(model, split)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(InputError, match="no images"):
        train.accuracy(model, split.head(0))
    with pytest.raises(InputError, match="this network was made for 1"):
        train.accuracy(model, dataclasses.replace(split, images=split.images.repeat(1, 3, 1, 1)))
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("option", "wanted"), [({"precision": "fp16"}, "bf16 or fp32"), ({"label_smoothing": 1.0}, "at least 0, less than 1")]
)
def test_an_option_out_of_range_is_named_with_its_range(option, wanted):
    with pytest.raises(InputError, match=f"out of range: give {wanted}"):
        TrainConfig(**option)
