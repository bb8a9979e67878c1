"""Chunks that fit the memory: the budget asked of the driver, and a chunk halved where the memory runs out."""

import threading

import pytest
import torch

import micelab
from micelab.exceptions import InputError
from micelab.machine import ran_out
from micelab.network import memory
from micelab.network.folded import TimeFolded
from micelab.network.spiking import DEVICE_BUDGET


@pytest.fixture
def snn():
    torch.manual_seed(0)
    return micelab.convert(micelab.small_cnn(activation="quant_clip", theta=0.5), "qcfs")


@pytest.fixture(autouse=True)
def threads():
    """One thread, so that chunks come one after another; a test may set more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Card:
    """A device whose memory takes so many images at a time and no more; remembers what it was asked for."""

    def __init__(self, snn, monkeypatch, images):
        self.asked, simulate = [], snn._simulate

        def on_card(part, *options):
            self.asked.append(len(part))
            if len(part) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return simulate(part, *options)

        monkeypatch.setattr(snn, "_simulate", on_card)


def test_out_of_memory_halves_the_chunk_says_so_once_and_goes_on(snn, monkeypatch, caplog):
    images = torch.rand(13, 1, 8, 8)
    expected = snn.simulate(images, 3)
    card = Card(snn, monkeypatch, images=3)
    run = snn.simulate(images, 3, chunk=12)
    assert card.asked == [12, 6, 3, 3, 3, 3, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "cpu is out of memory with 12 images at a time: going on with 6"
    ]
    assert torch.equal(expected.logits, run.logits)
    for name, layer in run.layers.items():
        assert torch.equal(expected.layers[name].count, layer.count)


@pytest.mark.parametrize("record", [True, False])
def test_chunks_side_by_side_give_the_same_and_leave_the_threads_as_they_were(snn, threads, record):
    images = torch.rand(13, 1, 8, 8)
    expected = snn.simulate(images, 3, record=record, chunk=2)
    threads(3)
    run = snn.simulate(images, 3, record=record, chunk=2)
    assert torch.equal(expected.logits, run.logits)
    for name, layer in expected.layers.items():
        assert torch.equal(layer.count, run.layers[name].count)
        assert torch.equal(layer.mean_current, run.layers[name].mean_current)
    found = []
    kept = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    kept.start()
    kept.join()
    assert found == [3] == [torch.get_num_threads()]


def test_chunks_side_by_side_come_in_order_each_by_one_thread():
    threads, release = [], threading.Event()

    def work(part):
        threads.append((threading.get_ident(), torch.get_num_threads()))
        if part[0, 0] == 0:  # the first waits for a later one
            assert release.wait(20)
        else:
            release.set()
        return part.sum().item()

    images = torch.arange(6.0).unsqueeze(1)
    found = [(start, done) for start, _, done in memory.in_chunks(images, 1, work, lanes=2)]
    assert found == [(n, n) for n in range(6)]
    assert len({ident for ident, _ in threads}) == 2
    assert {count for _, count in threads} == {1}


def test_out_of_memory_side_by_side_halves_for_all_and_loses_nothing(snn, threads, monkeypatch, caplog):
    images = torch.rand(13, 1, 8, 8)
    expected = snn.simulate(images, 3, chunk=1)
    threads(2)
    Card(snn, monkeypatch, images=3)
    run = snn.simulate(images, 3, chunk=6)
    assert torch.equal(expected.logits, run.logits)
    assert torch.equal(expected.layers["stem.2"].count, run.layers["stem.2"].count)
    assert len(caplog.records) == 1


def test_few_images_are_left_to_one_thread_of_python(snn, threads, monkeypatch):
    threads(2)
    asked, side_by_side = [], memory._side_by_side
    monkeypatch.setattr(memory, "_side_by_side", lambda lanes: asked.append(lanes) or side_by_side(lanes))
    size = snn.chunk(torch.rand(1, 1, 8, 8), 3)
    runs = [snn.simulate(torch.rand(images, 1, 8, 8), 3, record=False) for images in (1, 2, size // 3, 2 * (size // 3))]
    assert asked == [1, 1, 1, 2]
    assert [run.logits.shape[1] for run in runs] == [1, 2, size // 3, 2 * (size // 3)]
    asked.clear()
    snn.simulate(torch.rand(2, 1, 8, 8), 3, chunk=1)  # as asked for
    assert asked == [2]


def test_a_simulation_that_is_left_early_ends_its_threads(snn, threads):
    threads(2)
    before = threading.active_count()
    parts = snn.stream(torch.rand(40, 1, 8, 8), 3)
    next(parts)
    parts.close()
    assert threading.active_count() == before


def test_a_chunk_that_did_not_fit_is_not_tried_again(snn, monkeypatch):
    images = torch.rand(8, 1, 8, 8)
    card = Card(snn, monkeypatch, images=4)
    monkeypatch.setattr("micelab.network.spiking.CACHE_BUDGET", 8 * 16 * 64 * 4 * 3)
    assert snn.chunk(images, 3) == 8
    assert [len(part) for part, _ in snn.stream(images, 3)] == [4, 4]
    snn.simulate(images, 3, record=False)
    assert card.asked == [8, 4, 4, 4, 4]


def test_memory_too_small_for_one_image_is_said_in_one_sentence(snn, monkeypatch):
    Card(snn, monkeypatch, images=0)
    with pytest.raises(InputError, match="the memory of cpu does not suffice for one image: use fewer"):
        snn.simulate(torch.rand(4, 1, 8, 8), 3)


def test_memory_too_small_for_what_every_layer_did_names_the_remedy(snn, monkeypatch):
    def full(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("micelab.network.records.LayerRun.room_for", full)
    with pytest.raises(InputError, match='for 4 images: use record="counts" or record=False, or `stream`'):
        snn.simulate(torch.rand(4, 1, 8, 8), 3, chunk=2)


def test_other_errors_are_no_shortage_of_memory(snn, monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(snn, "_simulate", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        snn.simulate(torch.rand(4, 1, 8, 8), 3)
    assert ran_out(RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED"))


@pytest.mark.parametrize(
    ("free", "held", "used", "budget"),
    [(80 * 2**30, 0, 0, DEVICE_BUDGET), (800, 0, 0, 100), (800, 1600, 800, 200), (0, 0, 0, 0)],
)
def test_budget_is_an_eighth_of_what_the_driver_and_the_allocator_have_free(free, held, used, budget, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 80 * 2**30))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: held)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: used)
    assert memory.device_budget(torch.device("cuda"), DEVICE_BUDGET) == budget
    assert memory.device_budget(torch.device("mps"), DEVICE_BUDGET) == DEVICE_BUDGET


def test_a_long_simulation_finds_the_fastest_chunk_and_keeps_it(snn, monkeypatch):
    images, seconds, asked = torch.rand(40, 1, 8, 8), {1: 3.0, 2: 2.0, 4: 1.0}, []
    expected = snn.simulate(images, 3, chunk=40)
    clock, simulate = [0.0], snn._simulate

    def timed(part, *options):
        asked.append(len(part))
        clock[0] += len(part) * seconds.get(len(part), 9.0) * (10 if asked.count(len(part)) == 1 else 1)
        return simulate(part, *options)

    monkeypatch.setattr(snn, "_simulate", timed)
    monkeypatch.setattr("micelab.network.memory.time.thread_time", lambda: clock[0])
    monkeypatch.setattr("micelab.network.spiking.CACHE_BUDGET", 2 * 16 * 64 * 4 * 3)
    run = snn.simulate(images, 3)
    assert asked == [2, 1, 4, 2, 1, 4, *[4] * 6, 2]
    assert torch.equal(expected.logits, run.logits)
    for name, layer in run.layers.items():
        assert torch.equal(expected.layers[name].count, layer.count)
    asked.clear()
    assert torch.equal(expected.logits, snn.simulate(images, 3).logits)
    assert asked == [4] * 10


def test_few_images_are_not_used_to_try_chunks(snn, monkeypatch):
    monkeypatch.setattr("micelab.network.spiking.CACHE_BUDGET", 2 * 16 * 64 * 4 * 3)
    assert [len(part) for part, _ in snn.stream(torch.rand(7, 1, 8, 8), 3)] == [2, 2, 2, 1]


def test_the_guess_stays_where_no_other_chunk_is_clearly_faster():
    pace = memory.Pace((4, 8, 16), guess=8)
    for size, seconds in ((8, 1.0), (4, 0.99), (16, 0.98)) * 2:
        pace.took(size, size * seconds)
    assert pace.best == 8


def test_a_chunk_is_halved_while_sizes_are_tried(snn, monkeypatch):
    images = torch.rand(20, 1, 8, 8)
    expected = snn.simulate(images, 3, record=False).logits
    card = Card(snn, monkeypatch, images=2)
    monkeypatch.setattr("micelab.network.spiking.CACHE_BUDGET", 4 * 16 * 64 * 4 * 3)
    assert torch.equal(expected, snn.simulate(images, 3, record=False).logits)
    assert card.asked == [4, *[2] * 10]


def test_the_machines_own_memory_running_out_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(caught.value)


@pytest.mark.parametrize("text", ["DefaultCPUAllocator: can't allocate memory: you tried", "not enough memory: you tried"])
def test_a_layer_that_finds_no_memory_on_the_cpu_halves_the_chunk(snn, monkeypatch, caplog, text):
    whole = TimeFolded.call_module

    def scarce(self, target, args, kwargs):
        if self.images > 3:
            raise RuntimeError(text)
        return whole(self, target, args, kwargs)

    images = torch.rand(6, 1, 8, 8)
    expected = snn.simulate(images, 3, chunk=3)
    monkeypatch.setattr(TimeFolded, "call_module", scarce)
    caplog.clear()
    run = snn.simulate(images, 3, chunk=6)
    assert [record.getMessage() for record in caplog.records] == ["cpu is out of memory with 6 images at a time: going on with 3"]
    assert torch.equal(expected.logits, run.logits)
