"""Settings that hold for every test: few, repeatable Hypothesis examples, no time limit on a busy machine, one browser."""

import pytest
from hypothesis import settings

settings.register_profile("micelab", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("micelab")


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
