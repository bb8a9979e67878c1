"""What converts, what is refused by name, and that the caller's network stays as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from micelab.activation import QuantClip, TrainableClip
from micelab.convert import convert
from micelab.exceptions import ConversionError, InputError
from micelab.graph import activations, trace
from micelab.graph.checkup import checkup
from micelab.graph.runner import LayerRunner, check_images
from micelab.models import Normalize

IMAGES = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A network whose forward is given: Net(lambda m, x: ..., conv=nn.Conv2d(...))."""

    def __init__(self, run, **modules):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def seeded(make):
    torch.manual_seed(0)
    net = make().eval()
    for module in net.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.data.uniform_(0.5, 2)
                module.bias.data.normal_()
    return net


def agrees(net, images=IMAGES, fold=True):
    """Traced and original network say the same; the graph is given back."""
    expected = net(images.clone())
    traced = trace(net, fold)
    with torch.no_grad():
        torch.testing.assert_close(LayerRunner(traced).run(images.clone()), expected, rtol=1e-4, atol=1e-4)
    return traced


LAYERS = {
    "convolution": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
    "convolution without bias": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
    "grouped": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
    "one-dimensional": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.AvgPool1d(2)),
    "given by name": lambda: Net(lambda m, x: m.act(input=m.bn(input=m.conv(x))), bn=nn.BatchNorm2d(4), act=nn.ReLU()),
    "behind dropout": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Dropout2d(), nn.BatchNorm2d(6), nn.ReLU()),
    "several": lambda: nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()] * 3),
}
KEPT = {
    "without weight": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 5), nn.BatchNorm1d(5, affine=False), nn.ReLU()),
    "of sequences": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 6), nn.BatchNorm1d(4), nn.ReLU()),
    "grouped transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
    "depthwise transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU()),
    "before any weights": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
    "behind pooling": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.ReLU()),
    "read twice": lambda: Net(lambda m, x: F.relu(m.bn(y := m.conv(x)) + y), bn=nn.BatchNorm2d(4)),
    "weights used twice": lambda: Net(lambda m, x: F.relu(m.bn(m.conv(m.conv(x)))), bn=nn.BatchNorm2d(4)),
}


def norms(traced):
    return [
        n for n in traced.graph.nodes if n.op == "call_module" and "BatchNorm" in type(traced.get_submodule(n.target)).__name__
    ]


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "several"])
def test_folded_batch_norm_agrees_with_unfolded(kind):
    net = seeded(LAYERS[kind])
    assert not norms(agrees(net))
    assert len(norms(agrees(net, fold=False))) == 1


@pytest.mark.parametrize("kind", KEPT)
def test_batch_norm_that_cannot_be_folded_stays_an_affine_layer(kind):
    assert len(norms(agrees(seeded(KEPT[kind])))) == 1


@pytest.mark.parametrize("kind", [*LAYERS, *KEPT])
def test_a_checkup_says_of_batch_norm_what_tracing_does_with_it(kind):
    net = seeded((LAYERS | KEPT)[kind])
    said = [finding.verdict for finding in checkup(net).findings if "BatchNorm" in finding.kind]
    kept = len(norms(trace(net)))
    assert said == ["stays"] * kept + ["folds away"] * (len(said) - kept)


def test_two_batch_norms_in_a_row_both_go_into_the_layer_before():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.ReLU()))
    assert not norms(agrees(net))
    assert checkup(net).count("folds away") == 2


def test_sequences_of_as_many_steps_as_features_are_refused_where_batch_norm_was_folded():
    net = seeded(lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU()))
    for given in (net, trace(net)):  # also where the folded network is read once more
        with pytest.raises(ConversionError, match=r"layer `1`: batch-norm was folded .* gets \(\d+, 4, 64\).*: use fold=False"):
            LayerRunner(trace(given)).run(IMAGES)
    assert len(norms(agrees(net, fold=False))) == 1


def test_layers_used_several_times_become_activations_of_their_own():
    assert list(activations(agrees(seeded(LAYERS["several"])))) == ["2", "2_1", "2_2"]


NAMES = {
    "module": (lambda m, x: m.relu(m.conv(x)), ["relu"]),
    "module twice": (lambda m, x: m.relu(m.conv(m.relu(m.conv(x)))), ["relu", "relu_1"]),
    "F.relu": (lambda m, x: F.relu(m.conv(x)), ["relu"]),
    "torch.relu": (lambda m, x: torch.relu(m.conv(x)), ["relu"]),
    "method": (lambda m, x: m.conv(x).relu(), ["relu"]),
    "in place": (lambda m, x: F.relu(m.conv(x), inplace=True), ["relu"]),
    "in-place method": (lambda m, x: m.conv(x).relu_(), ["relu"]),
    "by keyword": (lambda m, x: F.relu(input=m.conv(x)), ["relu"]),
    "module and function": (lambda m, x: m.relu(m.conv(F.relu(x))), ["relu_1", "relu"]),
    "inner": (lambda m, x: m.inner(x), ["inner.relu"]),
    "ReLU6": (lambda m, x: m.six(m.conv(m.six(x * 9))), ["six", "six_1"]),
    "F.relu6": (lambda m, x: F.relu6(m.conv(x * 9)), ["relu6"]),
    "F.relu6 in place, read again": (lambda m, x: F.relu6(y := m.conv(x * 9), inplace=True) + y, ["relu6"]),
    "a fixed clip": (lambda m, x: m.conv(m.hard(x)), ["hard"]),
    "clips": (lambda m, x: m.clip(m.quant(m.clip(m.conv(x)))), ["clip", "quant", "clip_1"]),
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_activation_is_found_under_the_models_name(kind):
    run, names = NAMES[kind]
    inner = Net(lambda m, x: F.relu(m.conv(x)))
    fixed = {"six": nn.ReLU6(inplace=True), "hard": nn.Hardtanh(0, 0.5, inplace=True)}
    net = seeded(lambda: Net(run, relu=nn.ReLU(), inner=inner, clip=TrainableClip(0.7), quant=QuantClip(4, 0.8), **fixed))
    found = activations(agrees(net))
    assert list(found) == names
    assert len({id(module) for module in found.values()}) == len(names)


AFFINE = {
    "residual": lambda m, x: F.relu(m.conv(x) + x),
    "in-place residual": lambda m, x: F.relu(m.grow(m.conv(x), F.relu(x))),
    "torch.add with a factor": lambda m, x: F.relu(torch.add(m.conv(x), x, alpha=2)),
    "difference": lambda m, x: F.relu(m.conv(x) - F.relu(x)),
    "negative": lambda m, x: F.relu(-m.conv(x)),
    "one minus": lambda m, x: F.relu(1 - m.conv(x)),
    "scaled": lambda m, x: F.relu(m.conv(x) * 2 / 3),
    "concatenation": lambda m, x: F.relu(torch.cat([m.conv(x), F.relu(x)], 1)),
    "concatenation by keyword": lambda m, x: F.relu(torch.cat([m.conv(x), x], dim=-3)),
    "flatten": lambda m, x: torch.flatten(F.relu(m.conv(x)), 1),
    "flatten method": lambda m, x: F.relu(m.conv(x)).flatten(start_dim=1),
    "view": lambda m, x: F.relu(m.conv(x)).view(x.size(0), -1),
    "size that is counted on": lambda m, x: F.relu(m.conv(x)).view(x.size(0), grow(n := x.size(1), 4) * 8 * n),
    "view of a later size": lambda m, x: (y := F.relu(m.conv(x))).view(y.shape[0], -1),
    "view to minus one": lambda m, x: F.relu(m.conv(x)).view(-1, 4 * 8 * 8),
    "view to a tuple": lambda m, x: F.relu(m.conv(x)).view((x.size(0), x.size(1) * 64)),
    "reshape": lambda m, x: torch.reshape(F.relu(m.conv(x)), (x.shape[0], -1)),
    "dropout": lambda m, x: F.dropout(F.relu(m.drop(m.conv(x))), 0.5, m.training),
    "identity": lambda m, x: m.same(F.relu(m.same(m.conv(x)))),
    "adaptive pool": lambda m, x: F.adaptive_avg_pool2d(F.relu(m.conv(x)), 1).flatten(1),
    "pool over the rest": lambda m, x: F.avg_pool2d(F.relu(m.conv(x)), x.size()[2:]),
    "mean": lambda m, x: F.relu(m.conv(x)).mean((2, 3)),
    "mean by keyword": lambda m, x: F.relu(m.conv(x)).mean(dim=[-1, -2]),
    "sum and squeeze": lambda m, x: F.relu(m.conv(x)).sum(3, keepdim=True).squeeze(3),
    "slice": lambda m, x: F.relu(m.conv(x)[:, :2]),
    "padded shortcut": lambda m, x: F.relu(F.pad(F.relu(m.conv(x))[:, :2, ::2, ::2], (0, 0, 0, 0, 1, 1)) + 0.1),
    "two views of one tensor": lambda m, x: F.relu((y := m.conv(x)).flatten(1)) + y.mean((2, 3)).sum(1, keepdim=True),
    "clipped at six": lambda m, x: F.relu6(20 * m.conv(F.relu6(8 * x))),
    "transposed sequence": lambda m, x: F.relu(m.long(F.relu(m.conv(x)).flatten(2).transpose(1, 2))).permute((0, 2, 1)),
    "permuted currents": lambda m, x: F.relu(torch.permute(m.conv(x), (0, 2, 3, 1))).permute(0, 3, -2, -3),
    "transposed by keyword": lambda m, x: torch.transpose(F.relu(m.conv(x)), dim0=1, dim1=3) + x.permute(dims=(0, 3, 2, 1)),
    "shuffled channels": lambda m, x: m.conv(F.relu(m.conv(x)).view(-1, 2, 2, 8, 8).transpose(1, 2).reshape(-1, 4, 8, 8)),
    "in place and read again": lambda m, x: m.inplace(y := m.conv(F.relu(x))) + y,
    "in place, result dropped": lambda m, x: (y := m.conv(x), m.inplace(y), m.conv(y))[2],
    "in place on the images": lambda m, x: m.conv(m.inplace(x)) + x,
    "in place, another name read": lambda m, x: (y := m.conv(x), k := m.same(y), m.conv(m.inplace(y)) + k)[2],
    "in place by another name": lambda m, x: (y := m.conv(x), m.inplace(m.same(m.same(y))) + y)[1],
    "in-place sum, the tensor read again": lambda m, x: (y := m.conv(x), grow(y, x), F.relu(y))[2],
    "in-place sum, another name read": lambda m, x: (y := m.conv(x), k := m.same(y), grow(y, x), F.relu(k))[3],
    "in place twice, names between": lambda m, x: (y := m.conv(x), k := m.same(m.inplace(y)), grow(y, x), k)[3],
    "in place, a name no longer read": lambda m, x: (y := m.conv(x), k := m.same(y) + 1, m.inplace(y) + k)[2],
    "in place, a view no longer read": lambda m, x: (y := m.conv(x), k := y.flatten(2).mean(2), m.inplace(y).mean((2, 3)) + k)[2],
}


def halves(x, y):
    x[:, :2] += y[:, :2]
    x[:, 2:] += y[:, 2:]
    return x


def grow(x, y):
    x += y
    return x


@pytest.mark.parametrize("kind", AFFINE)
def test_affine_parts_convert_and_agree_in_the_ann_and_over_time(kind):
    parts = {"drop": nn.Dropout2d(), "same": nn.Identity(), "inplace": nn.ReLU(inplace=True), "long": nn.Linear(4, 6)}
    net = seeded(lambda: Net(AFFINE[kind], **parts))
    net.grow = grow
    agrees(net)
    images, steps = IMAGES.clone(), 512  # a rate comes as close to its clip as 1/T
    snn = convert(net, "max", images, v0=0.5)
    assert torch.equal(IMAGES, images)
    run = snn.simulate(images, steps)
    assert torch.equal(IMAGES, images)
    with torch.no_grad():
        expected = net(images.clone())
    worst = float((run.logits[-1] - expected).abs().max() / expected.abs().max())
    assert worst < 0.03
    one = torch.cat([snn.simulate(image, steps).logits for image in images.split(1)], 1)
    torch.testing.assert_close(one[-1], run.logits[-1], rtol=1e-4, atol=0.02 * float(expected.abs().max()))


class Stem(nn.Module):
    """Takes more than images, all of it with a default that decides what it does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x, mask=None, scale=2.0, sizes=(1, 2), *rest, return_features=False, pool=F.avg_pool2d, **options):
        features = F.relu(self.conv(x if mask is None else x * mask)) * scale + sizes[1] + len(rest) + len(options)
        return (pool(features, 2), features) if return_features else pool(features, 2)


def test_what_a_network_takes_beyond_images_keeps_its_default():
    assert list(activations(agrees(seeded(Stem)))) == ["relu"]
    assert checkup(Stem(), IMAGES)


def test_a_torchvision_resnet_converts_once_its_max_pool_is_an_average():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=5).eval()
    with pytest.raises(ConversionError, match=r"`maxpool` is nn.MaxPool2d.*AvgPool2d"):
        trace(net)
    net.maxpool = nn.AvgPool2d(2)
    images = torch.rand(2, 3, 32, 32)
    traced = agrees(net, images)
    names = list(activations(traced))
    assert names[:3] == ["relu", "layer1.0.relu", "layer1.0.relu_1"]
    assert len(names) == 17
    assert not norms(traced)


def test_a_torchvision_mobilenet_with_its_relu6_converts_as_it_is():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    found = activations(agrees(torchvision.models.mobilenet_v2(num_classes=5).eval(), torch.rand(2, 3, 32, 32)))
    assert len(found) == 35
    assert {module.max_val for module in found.values()} == {6}


class Branching(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.sum() > 0 else x


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return F.relu(x + y)


class NamedInput(nn.Module):
    def forward(self, x, size=3, *, mask):
        return F.relu(x + mask) * size


class Compiled(nn.Module):
    """What torch.compile gives back, for all that shows; the real one takes 20 s to import."""

    def __init__(self, net):
        super().__init__()
        self._orig_mod = net


def with_hook(net, register, hook):
    getattr(net[0], register)(hook)
    return net


def pruned(net):
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


class Wordless(nn.Module):
    def forward(self, x):
        assert type(x) is torch.Tensor
        return F.relu(x)


REFUSED = {
    "GELU": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.GELU()), "layer `1` is nn.GELU"),
    "LeakyReLU": (lambda: nn.Sequential(nn.LeakyReLU()), "layer `0` is nn.LeakyReLU"),
    "a clip below 0": (
        lambda: nn.Sequential(nn.ReLU(), nn.Hardtanh(-1, 1.5)),
        r"layer `1` is nn.Hardtanh from -1 on.* below 0: train it with nn.Hardtanh\(0, 1.5\) or micelab.TrainableClip\(1.5\)",
    ),
    "a clip above 0": (lambda: nn.Sequential(nn.ReLU(), nn.Hardtanh(0.5, 2)), r"layer `1` is nn.Hardtanh from 0.5 on"),
    "MaxPool": (lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), "layer `1` is nn.MaxPool2d.*AvgPool2d"),
    "Softmax": (lambda: nn.Sequential(nn.ReLU(), nn.Softmax(1)), "layer `1` is nn.Softmax.*leave it out"),
    "LayerNorm": (lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), "layer `1` is nn.LayerNorm.*BatchNorm"),
    "GroupNorm": (lambda: nn.Sequential(nn.ReLU(), nn.GroupNorm(2, 4)), "layer `1` is nn.GroupNorm.*BatchNorm"),
    "InstanceNorm": (lambda: nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(4)), "layer `1` is nn.InstanceNorm2d"),
    "no statistics": (lambda: nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()), "layer `0`.*track_running"),
    "Flatten from 0": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten(0)), r"layer `1` flattens.*start_dim=1"),
    "LSTM": (lambda: nn.Sequential(nn.LSTM(8, 8)), "layer `0` is nn.LSTM"),
    "control flow": (Branching, "Branching.forward cannot be read"),
    "an assertion": (Wordless, "Wordless.forward cannot be read as a fixed graph of layers .assert"),
    "two inputs": (TwoInputs, r"takes 2 inputs \(x, y\)"),
    "an input by name": (NamedInput, r"takes 2 inputs \(x, mask\)"),
    "no ReLU": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3)), "nothing to convert"),
    "a parametrized weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.ReLU()),
        "layer `0` has a parametrized weight.*remove_parametrizations",
    ),
    "spectral_norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), nn.ReLU()),
        "layer `0` has a weight that spectral_norm makes anew.*: make it plain with torch.nn.utils.remove_spectral_norm",
    ),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(4, 4, 3)), nn.ReLU()),
        "layer `0` has a weight that weight_norm makes anew.*: make it plain with torch.nn.utils.remove_weight_norm",
    ),
    "pruning": (
        lambda: pruned(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())),
        "layer `0` has a weight that pruning makes anew.*: make it plain with torch.nn.utils.prune.remove",
    ),
    "a hook": (
        lambda: with_hook(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), "register_forward_hook", lambda m, x, y: 2 * y),
        r"layer `0` has a forward hook.* only watches: take it away with handle.remove\(\)",
    ),
    "a hook before": (
        lambda: with_hook(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), "register_forward_pre_hook", lambda m, x: None),
        "layer `0` has a forward hook.*: take it away",
    ),
    "a lazy layer": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), "layer `0` has no weights yet: run the network once"),
    "a wrapped network": (
        lambda: nn.DataParallel(nn.Sequential(nn.ReLU())),
        "DataParallel only wraps.*: use its .module instead",
    ),
    "a wrapped layer": (
        lambda: nn.Sequential(nn.ReLU(), nn.DataParallel(nn.Conv2d(4, 4, 3))),
        "layer `1` only wraps.*its .module",
    ),
    "a compiled network": (
        lambda: Compiled(nn.Sequential(nn.ReLU())),
        "Compiled only wraps a network.*: use its ._orig_mod instead",
    ),
    "a scripted network": (lambda: torch.jit.script(nn.Sequential(nn.ReLU())), "use the Python module that was scripted instead"),
    "a view of what a layer writes into": (
        lambda: Net(lambda m, x: (y := m.conv(x), k := y.flatten(2), m.act(y).mean((2, 3)) + k.mean(2))[2], act=nn.ReLU(True)),
        "layer `act` writes into its input, and `flatten`, .* read afterwards: do it out of place, with inplace=False",
    ),
}
CALLS = {
    "max_pool2d": (lambda m, x: F.max_pool2d(F.relu(x), 2), "`max_pool2d`.*AvgPool2d"),
    "softmax": (lambda m, x: F.softmax(F.relu(x), 1), "`softmax`.*leave it out"),
    "log_softmax": (lambda m, x: F.relu(x).log_softmax(1), "`log_softmax`.*leave it out"),
    "gelu": (lambda m, x: F.gelu(F.relu(x)), "`gelu` in `forward` has no spiking counterpart"),
    "inside a layer": (lambda m, x: m.inner(F.relu(x)), "`sigmoid` in `inner`"),
    "product": (lambda m, x: F.relu(x) * x, "multiplies two activations"),
    "square": (lambda m, x: x * x, "multiplies two activations"),
    "in-place product": (lambda m, x: F.relu(x).mul_(x), "multiplies two activations"),
    "product by keyword": (lambda m, x: torch.mul(F.relu(x), other=x), "multiplies two activations"),
    "power": (lambda m, x: F.relu(x) ** 2, "`pow`"),
    "reciprocal": (lambda m, x: 1 / F.relu(x), "divides by an activation"),
    "floor": (lambda m, x: F.relu(x) // 2, "`floordiv`"),
    "rounded quotient": (lambda m, x: torch.div(F.relu(x), 2, rounding_mode="floor"), "rounds"),
    "scaled by the batch": (lambda m, x: F.relu(x) / x.shape[0], "shape of its input"),
    "absolute": (lambda m, x: abs(F.relu(x)), "`abs`"),
    "matrix product": (lambda m, x: F.relu(x) @ x, "`matmul`"),
    "maximum": (lambda m, x: torch.maximum(F.relu(x), x), "`maximum`"),
    "batch concatenation": (lambda m, x: torch.cat([F.relu(x), x]), "`cat`.*images of a batch"),
    "batch concatenation in words": (lambda m, x: torch.cat([F.relu(x), x], dim=0), "`cat`.*images of a batch"),
    "flatten all": (lambda m, x: torch.flatten(F.relu(x)), "`flatten`.*images of a batch"),
    "flatten from 0": (lambda m, x: F.relu(x).flatten(start_dim=0), "`flatten`.*images of a batch"),
    "mean of all": (lambda m, x: F.relu(x).mean(), "`mean`.*images of a batch"),
    "mean of the batch": (lambda m, x: F.relu(x).mean((0, 2)), "`mean`.*images of a batch"),
    "sum of none": (lambda m, x: F.relu(x).sum(dim=()), "`sum`.*images of a batch"),
    "squeeze of any": (lambda m, x: F.relu(x).squeeze(), "`squeeze`.*images of a batch"),
    "fixed batch": (lambda m, x: F.relu(x).view(3, -1), "`reshape`.*number of images to 3"),
    "fixed batch in a tuple": (lambda m, x: torch.reshape(F.relu(x), (3, -1)), "`reshape`.*number of images to 3"),
    "first image": (lambda m, x: F.relu(x)[0], "`getitem`.*picks images"),
    "half the batch": (lambda m, x: F.relu(x)[:2], "`getitem`.*picks images"),
    "some of the batch": (lambda m, x: F.relu(x)[:2, :1], "`getitem`.*picks images"),
    "hardtanh": (lambda m, x: F.hardtanh(F.relu(x), 0, 1), r"`hardtanh`.*: write it as a layer, nn.Hardtanh\(0, c\)"),
    "clamp": (lambda m, x: F.relu(x).clamp(0, 1), r"`clamp`.*: write it as a layer, nn.ReLU, nn.Hardtanh\(0, c\)"),
    "chunk": (lambda m, x: F.relu(x).chunk(2, 1)[0], r"`chunk`.*: take slices, as in x\[:, :4\]"),
    "transpose": (lambda m, x: F.relu(x).transpose(0, 1), "`transpose`"),
    "permute": (lambda m, x: F.relu(x).permute(1, 0, 2, 3), r"`permute`.*images.*: write it as x.transpose\(1, 2\) or x.permute"),
    "permute in a tuple": (lambda m, x: torch.permute(F.relu(x), dims=(3, 0, 1, 2)), "`permute`.*images of a batch"),
    "permute counted from the end": (lambda m, x: F.relu(x).permute(-4, 1, 3, 2), "`permute`.*counts from the end"),
    "transpose counted from the end": (lambda m, x: F.relu(x).transpose(-1, -2), "`transpose`.*counts from the end"),
    "transpose by keyword": (lambda m, x: torch.transpose(F.relu(x), dim0=2, dim1=0), "`transpose`.*images of a batch"),
    "a transposed view written into": (lambda m, x: (k := (y := m.conv(x)).transpose(1, 2), F.relu_(y) + k)[1], "out of place"),
    "T": (lambda m, x: F.relu(x).T, r"`\.T` in `forward`"),
    "parameter": (lambda m, x: F.relu(x + m.scale), "parameter `scale` directly"),
    "parameter by method": (lambda m, x: F.relu(x).mul(m.scale), "parameter `scale` directly"),
    "dropout that stays on": (lambda m, x: F.dropout(F.relu(x)), "`dropout`.*training=self.training"),
    "two outputs": (lambda m, x: (F.relu(x), x), "more than one tensor"),
    "a tuple of one": (lambda m, x: (F.relu(x),), "gives back a tuple of one tensor: it must give back the tensor itself"),
    "a dictionary of one": (lambda m, x: {"logits": F.relu(x)}, "gives back a dict of one tensor"),
    "a view written into": (lambda m, x: F.relu_((y := m.conv(x)).flatten(1)).sum(1) + y.sum((1, 2, 3)), "out of place"),
    "a part of what is written": (
        lambda m, x: (y := m.conv(x), k := y[:, :3], F.relu(y, inplace=True)[:, :3] + k)[2],
        "`relu` in `forward` writes into its input, and `getitem`",
    ),
    "a part of a second name": (
        lambda m, x: (y := m.conv(x), k := m.same(y).flatten(2), grow(y, x), k)[3],
        "`add` in `forward` writes into its input, and `flatten`",
    ),
    "parts written into": (lambda m, x: F.relu(halves(m.conv(x), x)), r"`x\[...\] = y` in `forward` writes.*: put.*torch.cat\("),
    "parts of a layer's": (lambda m, x: m.writer(F.relu(x)), r"`x\[...\] = y` in `writer` writes"),
    "a result put elsewhere": (lambda m, x: (y := m.conv(x), torch.add(F.relu(x), 1, out=y), y)[2], "`add`.*: leave out= away"),
}


@pytest.mark.filterwarnings("ignore:.*torch.(nn.utils.weight_norm|jit.script).* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_layers_without_a_spiking_counterpart_are_refused_by_name(kind):
    make, text = REFUSED[kind]
    with pytest.raises(ConversionError, match=text):
        trace(make())
    assert not checkup(make())


@pytest.mark.parametrize("kind", CALLS)
def test_calls_that_are_not_affine_image_by_image_are_refused_by_name(kind):
    run, text = CALLS[kind]
    inner, writer = Net(lambda m, x: torch.sigmoid(x)), Net(lambda m, x: halves(x, x))
    with pytest.raises(ConversionError, match=text):
        trace(Net(run, scale=nn.Parameter(torch.ones(1)), inner=inner, writer=writer, same=nn.Identity()))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: torch.cat([F.relu(x), x], dim=-4),
        lambda m, x: F.relu(x).mean(-4),
        lambda m, x: torch.flatten(F.relu(x), -4),
        lambda m, x: F.relu(x).view(-1, 8),
        lambda m, x: F.relu(x).view(x.shape[1], -1),
    ],
    ids=["cat", "mean", "flatten", "view", "view by channels"],
)
def test_mixing_images_by_way_of_negative_dimensions_is_caught_when_it_runs(run):
    with pytest.raises(InputError, match=r"layer `(cat|mean|flatten|reshape)` mixes the images"):
        convert(Net(run), "max", IMAGES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_named(bad):
    net = Net(lambda m, x: F.relu(m.conv(x)))
    net.conv.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(ConversionError, match=r"`conv\.weight` holds NaN or infinite"):
        trace(net)


def test_what_is_no_network_is_refused():
    with pytest.raises(InputError, match="a function was given where a network"):
        trace(lambda x: x)
    net = Net(lambda m, x: F.relu(x))
    net.scaled = net.conv.weight * 2  # a tensor with a history cannot be copied
    with pytest.raises(ConversionError, match="Net cannot be copied"):
        trace(net)


def test_the_callers_network_is_never_changed_and_converts_once_its_hooks_are_taken_away():
    seen = []
    net = nn.Sequential(Normalize([0.5] * 4, [0.25] * 4), *seeded(LAYERS["several"]), nn.Dropout(), nn.ReLU(inplace=True)).train()
    hook = net[1].register_forward_hook(lambda *call: seen.append(call))
    modules, state = list(net.modules()), copy.deepcopy(net.state_dict())
    with pytest.raises(ConversionError, match="layer `1` has a forward hook"):
        convert(net, "percentile", IMAGES)
    assert [problem.layer for problem in checkup(net, IMAGES).problems] == ["1"]
    assert not seen
    hook.remove()
    snn = convert(net, "percentile", IMAGES)
    snn.simulate(IMAGES, 4)
    assert modules == list(net.modules())
    assert all(module.training for module in modules)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([[1.0]], "images are a list"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.uint8), r"images\.float\(\) / 255"),
        (torch.zeros(0, 4, 8, 8), "at least one image"),
        (torch.zeros(8), "at least one image"),
        (torch.stack([torch.zeros(4), torch.full((4,), torch.nan)]), "image 1 of the batch holds NaN"),
    ],
)
def test_images_that_no_network_takes_are_refused_with_the_remedy(images, text):
    with pytest.raises(InputError, match=text):
        check_images(images)


def test_a_layer_that_cannot_take_its_input_is_named_with_the_shape_and_nothing_else():
    with pytest.raises(InputError) as caught:
        LayerRunner(trace(Net(lambda m, x: F.relu(m.conv(x))))).run(torch.zeros(1, 3, 8, 8))
    assert str(caught.value).startswith("layer `conv` cannot take input of shape (1, 3, 8, 8): ")
    assert "\n" not in str(caught.value)
