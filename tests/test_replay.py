"""A recorded simulation gives what the plain call gives: as a CUDA graph, which a list of torch's operations stands for here."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import micelab
from micelab.network import replay


class Graph(TorchDispatchMode):
    """Keeps every operation with the tensors it read and wrote, and does it again on those same tensors, as a graph does.

    What the host decided while recording stays decided, and memory that was not written by a recorded operation keeps what
    it held.
    """

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.inference_mode():
            for func, args, kwargs, out in self.done:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Stream:
    """A stream that does what it is given at once."""

    waited = 0

    def wait_stream(self, other):
        Stream.waited += 1


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that record on the CPU; gives the list of those made."""
    made, main = [], Stream()

    def new():
        made.append(Graph())
        return made[-1]

    @contextmanager
    def aside(stream):
        yield

    monkeypatch.setenv("MICELAB_COMPILE", "0")
    monkeypatch.setattr("micelab.neuron.compiled.shared_library", lambda: None)  # its work is no operation of torch's
    monkeypatch.setattr(replay, "recordable", lambda device: True)
    for name, stand_in in {"CUDAGraph": new, "graph": lambda graph: graph, "Stream": Stream, "stream": aside}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    return made


def converted(method="qcfs", seed=0, **options):
    torch.manual_seed(seed)
    ann = micelab.small_cnn(activation="quant_clip", in_channels=3, width=4, theta=0.5)
    return micelab.convert(ann, method, torch.rand(8, 3, 12, 12), time_steps=4, **options)


@pytest.mark.parametrize(("method", "options"), [("qcfs", {}), ("qcfs", {"signed": True}), ("max", {"per_channel": True})])
def test_replayed_answers_are_those_of_the_plain_call(graphs, method, options):
    snn = converted(method, **options)
    answer = snn.recorded(torch.rand(2, 3, 12, 12))
    assert len(graphs) == 1
    operations = len(graphs[0].done)
    for _ in range(3):
        images = torch.rand(2, 3, 12, 12)
        given = answer(images)
        assert torch.equal(given, snn(images))
    assert len(graphs[0].done) == operations  # nothing new is launched
    assert not torch.equal(given, answer(torch.rand(2, 3, 12, 12)))  # and what was given before is not written over
    assert torch.equal(given, snn(images))


def test_a_residual_network_is_replayed_too(graphs):
    torch.manual_seed(0)
    snn = micelab.convert(micelab.resnet20(width=4, activation="quant_clip", theta=0.5), "qcfs", time_steps=2)
    answer, images = snn.recorded(torch.rand(1, 3, 16, 16), 3), torch.rand(1, 3, 16, 16)
    assert torch.equal(answer(images), snn(images, 3))


def test_it_is_run_aside_before_it_is_recorded(graphs, monkeypatch):
    snn, runs = converted(), []
    monkeypatch.setattr(snn, "_simulate", lambda *given, own=snn._simulate: runs.append(given) or own(*given))
    before = Stream.waited
    snn.recorded(torch.rand(1, 3, 12, 12))
    assert len(runs) == replay.WARM_UP + 1
    assert Stream.waited == before + 2


def test_weights_changed_in_place_are_seen_and_new_tensors_are_refused(graphs):
    snn, images = converted(), torch.rand(1, 3, 12, 12)
    answer = snn.recorded(images)
    before = answer(images)
    snn.load_state_dict(converted(seed=1).state_dict())
    assert torch.equal(answer(images), snn(images))
    assert not torch.equal(answer(images), before)
    snn.double()
    with pytest.raises(micelab.MicelabError, match=r"moved, or got new tensors, .* record it again"):
        answer(images)


def test_without_graphs_it_walks():
    snn, images = converted(), torch.rand(3, 3, 12, 12)
    answer = snn.recorded(images, 2, precision="int8")
    assert answer.graph is None
    assert torch.equal(answer(images), snn(images, 2, precision="int8"))
    assert torch.equal(answer(images.double()), answer(images))  # into the type that was recorded


def test_other_images_than_those_it_was_recorded_for_are_refused():
    answer = converted().recorded(torch.rand(2, 3, 12, 12))
    with pytest.raises(micelab.MicelabError, match=r"\(1, 3, 12, 12\) on cpu, .* recorded for \(2, 3, 12, 12\) on cpu"):
        answer(torch.rand(1, 3, 12, 12))
    with pytest.raises(micelab.MicelabError, match="float tensor"):
        converted().recorded("an image")
    for wrong, why in ((torch.zeros(2, 3, 12, 12, dtype=torch.uint8), r"images.float\(\) / 255"), ([1], "images are a list")):
        with pytest.raises(micelab.MicelabError, match=why):
            answer(wrong)


def test_where_it_is_recorded_does_not_matter(graphs):
    snn, images = converted(), torch.rand(2, 3, 12, 12)
    with torch.inference_mode():
        answer = snn.recorded(images)
        inside = answer(images)
    assert torch.equal(answer(images), inside)
    assert torch.equal(inside, snn(images))
