"""The report on a reader's own network: every problem at once, each with its place and its remedy."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micelab
from micelab.exceptions import InputError
from micelab.graph.checkup import VERDICTS, checkup

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Usual(nn.Module):
    """What people bring: max pooling, GELU, layer norm, softmax, dropout, functional ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.pool = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.conv2, self.act, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.LayerNorm([8, 4, 4])
        self.drop, self.head, self.relu = nn.Dropout(), nn.Linear(128, 10), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.norm(self.act(self.conv2(x)))
        return F.softmax(self.head(self.drop(self.relu(x).flatten(1))), -1)


class Stubborn(nn.Module):
    """Control flow by values, and a problem behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.drop, self.act = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(), nn.Sigmoid()
        self.head = nn.Linear(144, 10)

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.head((self.act(x) if x.mean() > 0 else x).flatten(1))


def refused(report):
    return [problem.layer for problem in report.problems]


def test_every_problem_is_found_at_once_in_the_order_of_the_layers():
    report = checkup(Usual())
    assert refused(report) == ["pool", "act", "norm", "softmax"]
    assert [problem.kind for problem in report.problems] == ["nn.MaxPool2d", "nn.GELU", "nn.LayerNorm", "softmax"]
    assert "nn.AvgPool2d" in report.problems[0].remedy
    assert "nn.ReLU" in report.problems[1].remedy
    assert "nn.BatchNorm2d" in report.problems[2].remedy
    assert "leave it out" in report.problems[3].remedy
    assert not report


def test_what_converts_is_said_too():
    verdicts = {finding.layer: finding.verdict for finding in checkup(Usual()).findings}
    assert verdicts["relu"] == verdicts["relu_1"] == "spikes"
    assert verdicts["bn1"] == verdicts["drop"] == "folds away"
    assert verdicts["conv1"] == verdicts["flatten"] == verdicts["head"] == "stays"


def test_control_flow_is_said_and_the_layers_behind_it_are_judged_all_the_same():
    report = checkup(Stubborn())
    assert refused(report) == ["the network", "act"]
    assert "Stubborn.forward cannot be read as a fixed graph" in report.problems[0].why
    assert {f.layer: f.verdict for f in report.findings}["relu"] == "spikes"
    assert {f.layer: f.verdict for f in report.findings}["drop"] == "folds away"


@pytest.mark.parametrize("make", [micelab.small_cnn, lambda: micelab.small_cnn(activation="quant_clip"), micelab.resnet20])
def test_the_houses_own_networks_convert(make):
    report = checkup(make())
    assert report
    assert report.count("spikes") == (19 if make is micelab.resnet20 else 4)
    assert report.words().endswith("folded away.")
    assert report.count("refused") == len(report.problems) == 0


def test_a_module_called_twice_has_two_rows():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU())
    net.append(net[1])
    assert [finding.layer for finding in checkup(net).findings] == ["0", "1", "1_1"]


def test_the_report_agrees_with_convert():
    for net in (Usual(), Stubborn(), micelab.small_cnn(), nn.Sequential(nn.Linear(4, 2))):
        try:
            micelab.convert(net, "max", IMAGES)
            converts = True
        except micelab.MicelabError:
            converts = False
        assert bool(checkup(net)) == converts


def wrapped():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU())
    nn.utils.parametrizations.weight_norm(net[1])
    return net


def broken():
    net = micelab.small_cnn()
    net.head.weight.data[0, 0] = float("nan")
    return net


def unfoldable():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(3), nn.ReLU())  # of other channels: it could not run either
    return net.eval()


class Two(nn.Module):
    """Takes two inputs, gives two outputs."""

    def forward(self, x, y):
        return F.relu(x), y


class Free(nn.Module):
    """A parameter used on its own, dropout that never rests, a write into a part, a product."""

    def __init__(self):
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.ones(1)), nn.Conv2d(1, 2, 3)

    def forward(self, x):
        x = F.relu(self.conv(x)) * self.scale
        part = x.flatten(2)
        part.relu_()
        return F.dropout(x * x)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (wrapped, ["parametrized weight"]),
        (broken, ["holds NaN"]),
        (Two, ["takes 2 inputs", "more than one tensor"]),
        (Free, ["uses its parameter", "writes into its input", "multiplies two", "stays active"]),
        (lambda: nn.Sequential(nn.Linear(4, 2)), ["nothing to convert"]),
        (lambda: nn.Sequential(nn.LSTM(4, 2)), ["nn.LSTM"]),
        (unfoldable, ["cannot be made plain layers"]),
    ],
)
def test_rarer_problems_are_reported_too(make, wanted):
    report = checkup(make())
    said = " ".join(problem.why + problem.remedy for problem in report.problems)
    for text in wanted:
        assert text in said, report.words()
    assert all(problem.remedy for problem in report.problems)


def test_images_show_what_only_running_shows():
    assert checkup(micelab.small_cnn(), IMAGES)
    report = checkup(micelab.small_cnn(), torch.rand(2, 3, 8, 8))
    (problem,) = report.problems
    assert "images have 3 channels, and this network was made for 1" in problem.why
    assert problem.remedy == "give it images of 1"
    report = checkup(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), torch.rand(2, 3, 8, 8))
    assert "cannot take input of shape (2, 3, 8, 8)" in report.words()


def test_images_are_given_in_the_networks_own_precision():
    for made in (micelab.small_cnn().double(), micelab.small_cnn().bfloat16()):
        assert checkup(made, IMAGES), checkup(made, IMAGES).words()
    assert checkup(micelab.small_cnn(), IMAGES.double())
    assert checkup(nn.Sequential(nn.ReLU(), nn.Flatten()), IMAGES)


def test_a_wrapped_network_is_one_problem_and_what_it_holds_is_judged():
    report = checkup(nn.DataParallel(Usual()))
    assert refused(report) == ["the network", "module.pool", "module.act", "module.norm"]
    assert report.problems[0].remedy == "use its .module instead"


def test_hooks_and_what_else_is_refused_are_found_at_once():
    net, called = Stubborn(), []
    net.act.register_forward_hook(lambda *call: called.append(call))
    nn.utils.spectral_norm(net.conv)
    report = checkup(net, IMAGES)
    assert refused(report) == ["conv", "act", "the network", "act"]
    assert report.problems[0].remedy == "make it plain with torch.nn.utils.remove_spectral_norm"
    assert not called
    assert len(net.act._forward_hooks) == len(net.conv._forward_pre_hooks) == 1


def test_nothing_of_the_callers_is_changed():
    images = IMAGES - 0.5
    assert checkup(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 4, 3)), images)
    assert torch.equal(images, IMAGES - 0.5)
    net = Usual().train()
    before = copy.deepcopy(net.state_dict())
    checkup(net, IMAGES)
    assert net.training
    assert net.relu.inplace
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_report_is_plain_words_too():
    report = checkup(Usual())
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["converts"] is False
    assert len(plain["findings"]) == len(report.findings)
    assert report.words().splitlines()[0].startswith("Usual does not convert yet: 4 problems")
    assert report.words().count("Remedy: ") == 4
    assert {finding.verdict for finding in report.findings} == set(VERDICTS)


def test_what_is_no_network_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="a str was given where a network"):
        checkup("resnet20")
    with pytest.raises(InputError, match="images"):
        checkup(micelab.small_cnn(), "images")
