"""What nbval compares, and which notebooks need data that may be absent."""

import pytest

from micelab import MicelabError, load_data

NEEDS = {"06_resnet20_cifar.ipynb": "cifar10"}
# pictures and widgets differ from run to run; the numbers printed beside them are compared
NOT_COMPARED = ("application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json", "image/png", "text/html", "stderr")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED


def pytest_collection_modifyitems(items):
    reasons = {}
    for item in items:
        name = NEEDS.get(item.path.name)
        if name is not None and name not in reasons:
            try:
                load_data(name)
                reasons[name] = None
            except MicelabError as error:
                reasons[name] = str(error)
        if name is not None and reasons[name]:
            item.add_marker(pytest.mark.skip(reason=reasons[name]))
