"""Compiled convolutions of spikes: the numbers of a dense one up to rounding, its bits on a grid, the same for any chunk."""

import copy
import platform

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micelab
from micelab import machine
from micelab.convert import convert
from micelab.exceptions import InputError
from micelab.models import resnet20
from micelab.network import spike_convolutions
from micelab.network.grid import snap_to_grid
from micelab.network.spike_convolutions import WAYS, ByEvents, ByIntegers, Spikes
from micelab.neuron import building, compiled
from micelab.neuron.convolutions import fire_as_bits, packed, weight_gradient
from micelab.neuron.firing import IntegrateFire, left

LACKING = {"events": "no C compiler works here", "bf16x3": "no matrix unit (AMX) here"}
EITHER = [
    pytest.param(name, marks=pytest.mark.skipif(not way.is_here("cpu"), reason=LACKING[name])) for name, way in WAYS.items()
]
FIRING = [each for each in EITHER if WAYS[each.values[0]].kind.fires]


def pictures(images=5):
    return torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def wide():
    """A network of 16, 32 and 64 channels."""
    torch.manual_seed(0)
    ann = resnet20(width=16, activation="quant_clip", theta=1.0)
    with torch.no_grad():
        ann.train()(pictures(32))
    return convert(ann.eval(), "qcfs")


def sent(shape, rate, theta):
    spikes = (torch.rand(shape) < rate).float() * (theta if theta.dim() == 0 else theta.view(1, -1, 1, 1))
    return spikes.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", EITHER)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (5, 1, 2), (3, 1, 0), (4, 3, 2)]
)
@pytest.mark.parametrize("channels", [(16, 16), (32, 32), (19, 48), (40, 64), (35, 96), (64, 160), (3, 16), (16, 48)])
def test_the_currents_are_those_of_a_dense_convolution(name, channels, kernel, stride, padding, bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, kernel, stride, padding, bias=bias).requires_grad_(False)
    if not WAYS[name].suits(layer, IntegrateFire(torch.tensor(1.0))):
        assert name == "events"
        assert channels[0] < 16 or (channels[0] < 32 and kernel != 3)
        return
    shapes = [(3, channels[0], 9, 7), (2, channels[0], 6, 37)]  # a map narrower than a tile, and one that no tile divides
    for theta, rate in ((torch.tensor(0.7), 0.2), (torch.linspace(0.3, 2, channels[0]), 0.5), (torch.tensor(1.0), 0.0)):
        for shape in shapes:
            spikes = sent(shape, rate, theta)
            found = WAYS[name].kind(layer, theta).currents(Spikes(spikes))
            assert found.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(found, layer(spikes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EITHER)
def test_sums_are_the_same_bits_for_any_number_of_images_and_threads(name, threads):
    torch.manual_seed(0)
    layer, theta = nn.Conv2d(32, 64, 3, padding=1).requires_grad_(False), torch.tensor(0.7)
    spikes = sent((40, 32, 16, 16), 0.2, theta)
    threads(1)
    expected = WAYS[name].kind(layer, theta).currents(Spikes(spikes))
    threads(3)
    assert torch.equal(expected, WAYS[name].kind(layer, theta).currents(Spikes(spikes)))
    assert torch.equal(expected[7:9], WAYS[name].kind(layer, theta).currents(Spikes(spikes[7:9])))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64") or not WAYS["events"].is_here("cpu"), reason="not for here")
@pytest.mark.parametrize(
    "instructions", [(), ("-mavx2", "-mfma"), ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw")], ids=["sse2", "avx2", "avx512"]
)
@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("kind", [ByEvents, ByIntegers])
def test_other_processors_add_in_the_same_order(kind, instructions, channels, monkeypatch, tmp_path):
    if instructions and torch.backends.cpu.get_cpu_capability() not in ("AVX512", *(["AVX2"] if len(instructions) == 2 else [])):
        pytest.skip("this processor lacks them")
    torch.manual_seed(0)
    layer, theta = nn.Conv2d(channels, 32, 3, padding=1).requires_grad_(False), torch.tensor(0.7)
    spikes = sent((4, channels, 9, 7), 0.2, theta)
    layer.weight.normal_()
    expected = kind(layer, theta).currents(Spikes(spikes))
    bits, grad = packed(spikes), torch.randn_like(expected)
    of_weight = weight_gradient(bits, grad, channels, 3, 1)
    fired = fire_as_bits(expected.unflatten(0, (2, 2)), theta, torch.tensor(0.5), count=True)
    others = [option for option in building.OPTIONS if option != "-march=native"]
    monkeypatch.setattr(building, "OPTIONS", (*others, "-march=x86-64", *instructions, "-Werror=implicit-function-declaration"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = building.load(building.compiler())
    monkeypatch.setattr(compiled, "shared_library", lambda: library)
    assert torch.equal(kind(layer, theta).currents(Spikes(spikes)), expected)
    assert torch.equal(packed(spikes.bfloat16()), bits)
    assert torch.equal(weight_gradient(bits, grad, channels, 3, 1), of_weight)
    again = fire_as_bits(expected.unflatten(0, (2, 2)), theta, torch.tensor(0.5), count=True)
    assert all(torch.equal(*pair) for pair in zip(fired, again, strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", EITHER)
def test_on_a_grid_a_network_gives_the_same_bits(name, wide):
    snapped = snap_to_grid(wide, shape=(3, 16, 16))
    dense, followed = (snapped.simulate(pictures(), 8, precision=mode) for mode in ("fp32", name))
    for place, layer in dense.layers.items():
        assert torch.equal(layer.count, followed.layers[place].count), place
        assert torch.equal(layer.residual, followed.layers[place].residual), place
        assert layer.count.any(), place


@pytest.mark.parametrize("name", EITHER)
def test_a_network_gives_nearly_the_same_and_the_same_bits_for_any_chunk(name, wide):
    expected = wide.simulate(pictures(), 6, precision=name)
    dense = wide.simulate(pictures(), 6, precision="fp32")
    torch.testing.assert_close(expected.logits, dense.logits, rtol=0.2, atol=0.2)
    other = [place for place, layer in dense.layers.items() if not torch.equal(layer.residual, expected.layers[place].residual)]
    assert all(place.startswith("blocks.") for place in other)
    assert any(place.startswith("blocks.0") for place in other)  # sums in another order
    for chunk in (1, 3):
        run = wide.simulate(pictures(), 6, chunk=chunk, precision=name)
        for place, layer in expected.layers.items():
            assert torch.equal(layer.count, run.layers[place].count), place


@pytest.mark.parametrize("name", FIRING)
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride"), [(16, 16, 3, 1), (24, 32, 3, 2), (32, 96, 1, 1), (40, 64, 3, 1)]
)
@pytest.mark.parametrize("plus", ["currents", "spikes", "bits", None])
@pytest.mark.parametrize("each", [True, False], ids=["channels", "layer"])
def test_neurons_that_are_done_with_their_convolution_give_the_bits_of_those_after_it(
    name, channels, outputs, kernel, stride, plus, each, threads
):
    torch.manual_seed(0)
    layer, sender = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2).requires_grad_(False), torch.tensor(0.7)
    steps, images = 6, 5
    spikes, by = sent((steps * images, channels, 13, 11), 0.2, sender), WAYS[name].kind(layer, sender)
    due = by.due(Spikes(spikes))
    height = torch.linspace(0.2, 0.4, outputs) if each else torch.tensor(0.3)
    more = (
        sent(due.shape, 0.2, height)
        if plus != "currents"
        else torch.randn(due.shape).contiguous(memory_format=torch.channels_last)
    )
    given = {"currents": more, "spikes": Spikes(more), "bits": Spikes.of_bits(Spikes(more).bits, height, outputs), None: None}[
        plus
    ]
    theta = torch.linspace(0.3, 0.9, outputs) if each else torch.tensor(0.5)
    neurons = IntegrateFire(theta, torch.linspace(-0.2, 1, outputs) if each else 0.5)
    expected = due.currents().unflatten(0, (steps, images))
    did = neurons.respond(expected if plus is None else expected + more.unflatten(0, (steps, images)), expected, steps)
    for number in (1, 3):
        threads(number)
        out, found = by.fire(Spikes(spikes), neurons, steps, True, given)
        assert torch.equal(out.numbers.unflatten(0, (steps, images)), expected)
        assert torch.equal(found.count, did.count)
        assert torch.equal(found.residual, did.residual)
        assert 0 < did.count.mean() < steps
    assert torch.equal(by.fire(Spikes(spikes), neurons, steps, False, given)[0].bits, out.bits)


@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("each", [True, False], ids=["channels", "layer"])
def test_spikes_sent_as_bits_are_those_sent_as_numbers(channels, constant, each, threads):
    if compiled.shared_library() is None:
        pytest.skip(LACKING["events"])
    torch.manual_seed(0)
    steps, images = 7, 3
    current = torch.randn(1 if constant else steps, images, channels, 40, 11)
    current = current[0].expand(steps, *current.shape[1:]) if constant else current
    theta = torch.linspace(0.3, 0.9, channels) if each else torch.tensor(0.5)
    neurons = IntegrateFire(theta, torch.linspace(-0.2, 1, channels) if each else 0.5)
    expected = torch.empty(current.shape)
    did = neurons.respond(current, expected, steps)
    for number in (1, 2):
        threads(number)
        spikes, found = Spikes.fired(neurons, current, count=True)
        assert torch.equal(spikes.numbers.unflatten(0, (steps, images)), expected)
        assert torch.equal(found.count, did.count)
        assert torch.equal(found.residual, did.residual)
        assert 0 < did.count.mean() < steps
    spikes, found = Spikes.fired(neurons, current, count=False)
    assert torch.equal(spikes.bits, packed(expected.flatten(0, 1)))
    assert not found.count.numel()
    if constant:
        assert torch.equal(left(current[0], neurons.theta, neurons.v0, steps), did.residual)


@pytest.mark.parametrize("name", FIRING)
def test_a_network_fires_with_its_convolutions_wherever_plain_neurons_read_them(name, wide, monkeypatch):
    fired, first = [], []
    kind = WAYS[name].kind
    monkeypatch.setattr(kind, "fire", lambda self, *rest, fire=kind.fire: fired.append(self) or fire(self, *rest))
    monkeypatch.setattr(Spikes, "fired", lambda *given, fire=Spikes.fired: first.append(given) or fire(*given))
    together = wide.simulate(pictures(), 6, spikes=True, chunk=5, precision=name)
    assert len(first) == 1
    assert len(fired) == 18  # of 19 layers: the first reads the images
    monkeypatch.setattr(kind, "takes_along", lambda *_: False)
    apart = wide.simulate(pictures(), 6, spikes=True, chunk=5, precision=name)
    assert len(fired) == 18
    assert torch.equal(together.logits, apart.logits)
    for place, layer in apart.layers.items():
        for part in ("count", "residual", "spikes"):
            assert torch.equal(getattr(together.layers[place], part), getattr(layer, part)), place


class TwoReaders(nn.Module):
    """Currents that the neurons do not read alone: by two of them, in a sum of three, in a sum with one number a channel."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1)
        self.acts = nn.ModuleList(micelab.QuantClip(levels=4, theta=1.0) for _ in range(5))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 2)

    def forward(self, x):
        x = self.acts[0](self.first(x))
        z = self.second(x)
        x = self.acts[1](z) + self.acts[2](z)
        x = self.acts[3](self.third(x) + z + x)
        return self.head(self.pool(self.acts[4](self.second(x) + self.pool(x))).flatten(1))


@pytest.mark.parametrize("name", EITHER)
def test_currents_that_others_read_too_are_there_for_all(name):
    torch.manual_seed(0)
    snn = snap_to_grid(convert(TwoReaders().eval(), "qcfs"), shape=(3, 16, 16))
    dense, other = (snn.simulate(pictures(), 4, precision=mode) for mode in ("fp32", name))
    assert torch.equal(dense.logits, other.logits)
    assert all(torch.equal(layer.residual, other.layers[place].residual) for place, layer in dense.layers.items())


@pytest.mark.parametrize("name", EITHER)
def test_layers_that_do_not_suit_and_signed_spikes_are_convolved(name):
    torch.manual_seed(0)
    narrow = convert(resnet20(width=6, activation="quant_clip"), "qcfs")  # 6, 12 and 24 channels
    signed = convert(resnet20(), "max", pictures(), signed=True)
    for snn in (narrow, signed):
        dense, other = (snn.simulate(pictures(), 4, precision=mode) for mode in ("fp32", name))
        assert all(torch.equal(layer.residual, other.layers[place].residual) for place, layer in dense.layers.items())


@pytest.mark.parametrize("name", EITHER[1:])
def test_a_float_is_the_sum_of_its_three_parts(name):
    """Weights whose bits reach from 2^23 to 1, and silent ones beside: one spike gives them back whole."""
    values = torch.tensor([2.0**23 + 1, -(2.0**24) + 1, 1 / 3, -1e-30, 3.4e38, 0.0, 2e-30, -0.1]).repeat(2).view(16, 1, 1, 1)
    layer = nn.Conv2d(1, 16, 1, bias=False).requires_grad_(False)
    layer.weight.copy_(values)
    spikes = torch.ones(1, 1, 4, 4).contiguous(memory_format=torch.channels_last)
    found = WAYS[name].kind(layer, torch.tensor(1.0)).currents(Spikes(spikes))
    assert torch.equal(found, values.view(1, 16, 1, 1).expand_as(found))


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"padding": (1, 0)}],
)
def test_convolutions_of_other_kinds_do_not_suit(options, wide):
    neuron = next(iter(wide.neurons.values()))
    for way in WAYS.values():
        assert way.suits(nn.Conv2d(32, 32, 3), neuron)
        assert not way.suits(nn.Conv2d(32, 32, 3, **options), neuron)
        assert not way.suits(nn.Conv2d(32, 32, 3).double(), neuron)
        assert way.suits(nn.Conv2d(32, 48, 3), neuron)
        assert way.suits(nn.Conv2d(64, 48, 3), neuron) == (way is WAYS["bf16x3"])
        assert not way.suits(nn.Conv2d(32, 40, 3), neuron)
        assert not way.suits(nn.Conv2d(32, 32, 3), None)


@pytest.mark.parametrize("name", EITHER)
def test_a_layer_that_someone_watches_is_called(name, wide):
    expected, seen = wide.simulate(images := torch.rand(2, 3, 32, 32), 4, precision=name).logits, []
    layer = next(module for where, module in wide.layers.named_modules() if isinstance(module, nn.Conv2d) and "1" in where)
    handle = layer.register_forward_hook(lambda _, spikes, out: seen.append((spikes[0].shape, out)))
    try:
        assert torch.allclose(wide.simulate(images, 4, precision=name).logits, expected, atol=1e-4)
        ((shape, current),) = seen
        assert shape[0] == len(current) == 8
    finally:
        handle.remove()
    wide.simulate(images, 4, precision=name)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("events", "compiled convolution of spikes (no C compiler works here)"),
        ("bf16x3", "matrix unit (AMX) that a C compiler here knows"),
    ],
)
@pytest.mark.usefixtures("asked_anew")
def test_where_it_is_not_here_fp32_is_used_and_the_log_says_so_once(name, what, wide, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "shared_library", lambda: None)
    machine.say_lacking.cache_clear()
    for _ in range(2):
        assert torch.equal(wide(pictures(), 3), wide(pictures(), 3, name))
    assert [record.getMessage() for record in caplog.records] == [f"cpu has no {what}: going on in fp32, which is exact"]


def test_by_default_convolutions_follow_the_spikes_where_they_can(wide, monkeypatch, caplog):
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and WAYS["events"].is_here("cpu")
    usual = "events" if fast else "fp32"
    assert wide.precision_here("auto", "cpu") == usual
    assert wide.precision_here("auto", "cuda") == "fp32"
    assert torch.equal(wide(pictures(), 6), wide(pictures(), 6, usual))
    run = wide.simulate(pictures(), 6)
    assert all(
        torch.equal(layer.residual, run.layers[name].residual)
        for name, layer in wide.simulate(pictures(), 6, precision=usual).layers.items()
    )
    for _, part in wide.stream(pictures(), 6):
        assert torch.equal(part.logits, run.logits)
    double = copy.deepcopy(wide).double()
    assert double.precision_here("auto", "cpu") == "fp32"
    monkeypatch.setattr(compiled, "shared_library", lambda: None)
    assert wide.precision_here("auto", "cpu") == "fp32"
    assert torch.equal(wide(pictures(), 6), wide(pictures(), 6, "fp32"))
    assert not caplog.records  # the log has told of the compiler already


@pytest.mark.parametrize("name", EITHER)
def test_memory_that_does_not_suffice_is_said_as_such(name, monkeypatch):
    layer = WAYS[name].kind(nn.Conv2d(32, 32, 3, 1, 1).requires_grad_(False), torch.tensor(1.0))
    for function in ("fire_events", "convolve_matrix"):
        monkeypatch.setattr(compiled.shared_library(), function, lambda *_: 1, raising=False)
    with pytest.raises(RuntimeError) as caught:
        layer.currents(Spikes(torch.zeros(1, 32, 4, 4)))
    assert machine.ran_out(caught.value)


@pytest.mark.parametrize("name", EITHER)
def test_a_spike_beside_the_edge_is_seen_where_it_is(name):
    spikes = torch.zeros(1, 32, 3, 3)
    spikes[0, 5, 2, 0] = 1.0
    layer = nn.Conv2d(32, 32, 3, padding=1, bias=False).requires_grad_(False)
    assert torch.equal(
        WAYS[name].kind(layer, torch.tensor(1.0)).currents(Spikes(spikes)), F.conv2d(spikes, layer.weight, padding=1)
    )


@pytest.fixture
def asked_anew():
    """The matrix unit is looked for again, in this test and after it."""
    spike_convolutions._has_matrix_unit.cache_clear()
    yield
    spike_convolutions._has_matrix_unit.cache_clear()


@pytest.mark.parametrize("name", EITHER)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 3, 4])
def test_a_kernel_larger_than_its_map_is_refused_as_a_dense_one_is(name, stride, side):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 2, 1), micelab.QuantClip(levels=4, theta=1.0), nn.Conv2d(32, 32, 3, stride)]
    ann = nn.Sequential(*layers, micelab.QuantClip(levels=4, theta=1.0), nn.Flatten(), nn.Linear(32, 2)).eval()
    snn = convert(ann, "qcfs")
    for mode in ("fp32", name):
        with pytest.raises(InputError, match="layer `2`"):
            snn.simulate(torch.rand(1, 3, side, side), 4, precision=mode)


@pytest.mark.parametrize("name", EITHER)
@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("setting", ["float16", "float64", "meta", "autocast"])
def test_the_numbers_do_not_depend_on_torchs_defaults(name, setting, wide):
    expected = wide(pictures(), 3, name)
    images = pictures()
    spike_convolutions._has_matrix_unit.cache_clear()
    before = torch.get_default_dtype()
    try:
        if setting == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                assert WAYS[name].is_here("cpu")
            return
        if setting == "meta":
            with torch.device("meta"):
                assert WAYS[name].is_here("cpu")
                layer = wide.layers.get_submodule("blocks.4.conv2")
                spikes = sent_on_cpu((2, 32, 8, 8))
                found = WAYS[name].kind(layer, torch.tensor(0.5, device="cpu")).currents(Spikes(spikes))
        else:
            torch.set_default_dtype(getattr(torch, setting))
            found = None if WAYS[name].is_here("cpu") else pytest.fail("not found")
            assert torch.equal(wide(images, 3, name), expected)
    finally:
        torch.set_default_dtype(before)
    if found is not None:
        torch.testing.assert_close(found, layer(spikes), rtol=1e-5, atol=1e-5)


def sent_on_cpu(shape):
    generator = torch.Generator("cpu").manual_seed(0)
    return (torch.rand(shape, generator=generator, device="cpu") < 0.3).float() * 0.5


@pytest.mark.parametrize("name", EITHER)
def test_a_threshold_of_another_type_counts_in_that_of_the_weights(name):
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    theta = torch.linspace(0.5, 2, 32)
    spikes = sent((2, 32, 6, 6), 0.3, theta)
    found, expected = (WAYS[name].kind(layer, value).currents(Spikes(spikes)) for value in (theta.double(), theta))
    assert torch.equal(found, expected)
