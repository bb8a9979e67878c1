"""Takes the pictures of panels in README.md: `python notebooks/pictures.py`, a few minutes, wants Chromium and CIFAR-10.

Each notebook is run in JupyterLab in a real browser, as the browser tests do it; what is saved is the panel as a reader sees it.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from lab import CHROMIUM, QUIET, Page, jupyter  # noqa: E402

PICTURES = {
    "02_quantization_error": ("panel-staircase", 2),
    "05_mice": ("panel-remedies", 2),
    "06_resnet20_cifar": ("panel-methods", 3),
}
PANEL = ".jp-OutputArea-output:has(.js-plotly-plot)"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, jupyter(Path(folder)) as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        for notebook, (name, figures) in PICTURES.items():
            page = Page(browser, address, f"notebooks/{notebook}.ipynb", height=1400)
            page.run_all()
            page.figures_drawn(figures)
            page.page.locator(PANEL).first.scroll_into_view_if_needed()
            page.page.mouse.move(5, 5)  # else the bar of a figure's buttons may be in the picture
            page.page.wait_for_timeout(2_000)
            picture = Image.open(io.BytesIO(page.page.locator(PANEL).first.screenshot()))
            picture.convert("RGB").quantize(96).save(ROOT / "docs" / f"{name}.png", optimize=True)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
