"""Settings that hold for every test: few, repeatable Hypothesis examples, no time limit, one browser. And a shared network."""

import pytest
import torch
from hypothesis import settings

from micelab.convert import convert
from micelab.models import resnet20

settings.register_profile("micelab", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("micelab")


@pytest.fixture(scope="module")
def narrow_snn():
    """A converted ResNet-20 of width 4 for images [N, 3, 16, 16]."""
    torch.manual_seed(0)
    ann = resnet20(width=4, activation="quant_clip", theta=1.3)
    with torch.no_grad():
        ann.train()(torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    return convert(ann.eval(), "qcfs")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keeps the browser tests on one worker, so that there is one JupyterLab and one Chromium.

    The mark `xdist_group` says the same, but pytest-xdist 3.8 overlooks it under pytest 9.2 (pytest-dev/pytest-xdist#1386).
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class OneBrowser(LoadGroupScheduling):
        def _split_scope(self, nodeid):
            return "browser" if "test_browser.py::" in nodeid else super()._split_scope(nodeid)

    return OneBrowser(config, log)
