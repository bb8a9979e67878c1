"""JupyterLab in a real browser: starts both, opens a notebook, and keeps what the page logs and asks for."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

try:
    from playwright.sync_api import TimeoutError as TooLate
except ImportError:  # the tests that need a browser are skipped then
    TooLate = None

CHROMIUM = os.environ.get("MICELAB_CHROMIUM", "/usr/bin/chromium")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
TOKEN = "micelab"
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
NUMBERS = ".jupyter-widgets.widget-htmlmath"
SEEN = """() => {  // what the reader sees of the panels: the numbers of the traces, their drawing, the numbers beside them
    const plots = [...document.querySelectorAll(".js-plotly-plot")];
    const plain = value => ArrayBuffer.isView(value) ? Array.from(value) : value;
    const values = trace => [trace.x, trace.y, trace.z].map(array => Array.from(array || [], plain));
    return {
        curves: JSON.stringify(plots.map(plot => plot._fullData.map(values))),
        drawing: plots.map(plot => [...plot.querySelectorAll(".cartesianlayer, .shapelayer")].map(e => e.innerHTML)).join(),
        numbers: [...document.querySelectorAll("NUMBERS")].map(element => element.textContent).join(),
    };
}""".replace("NUMBERS", NUMBERS)
FAILED = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]'
RAN = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(element => element.textContent)"
DONE = f"document.querySelector('.jp-OutputArea-output[data-mime-type$=error]') || {RAN}.every(mark => /\\[\\d+\\]/.test(mark))"
DRAWN = """many => {
    const plots = [...document.querySelectorAll(".js-plotly-plot")];
    return plots.length === many && plots.every(plot => plot._fullData?.length && plot.querySelector(".trace, .hm"));
}"""
ROOT = Path(__file__).parent.parent
SETTINGS = {
    "notebook-extension/tracker.jupyterlab-settings": '{"windowingMode": "none", "recordTiming": false}',
    "apputils-extension/notification.jupyterlab-settings": '{"fetchNews": "false", "checkForUpdates": false}',
}


@contextmanager
def jupyter(folder):
    """The address of a JupyterLab that serves a copy of the notebooks; that and its own files are kept in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, text in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "share", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    own |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    paths = {name: str(folder / place) for name, place in own.items()}
    data = os.environ.get("MICELAB_DATA", str(ROOT / "data"))
    environment = os.environ | paths | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MICELAB_DATA": data}
    shutil.copytree(ROOT / "notebooks", folder / "course" / "notebooks")  # JupyterLab saves what it ran
    shutil.copytree(ROOT / "data" / "results", folder / "course" / "data" / "results")
    command = f"-m jupyterlab --no-browser --ip=127.0.0.1 --port={port} --expose-app-in-browser --ServerApp.allow_root=True"
    command += f" --IdentityProvider.token={TOKEN} --ServerApp.root_dir={folder / 'course'}"
    with (folder / "log.txt").open("wb") as log:
        server = subprocess.Popen([sys.executable, *command.split()], env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=2).read()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            raise RuntimeError((folder / "log.txt").read_text())
        yield address
    finally:
        server.terminate()
        server.wait(30)


class Page:
    """One notebook open in a browser; `errors` of its console and `strays`, requests that left the machine."""

    def __init__(self, browser, address, notebook, width=1100, height=900):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.address, self.errors, self.strays = address, [], []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(f"{address}/lab/tree/{notebook}?token={TOKEN}&reset", wait_until="domcontentloaded")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
        self.page.wait_for_function(f"{KERNEL} === 'idle'", timeout=120_000)  # cells run before that are lost
        self._command("application:toggle-left-area")

    def _command(self, name):
        # without waiting for its promise: Playwright has no time limit there, and JupyterLab does not always keep it
        self.page.evaluate(f"void window.jupyterapp.commands.execute('{name}')")

    def _asked(self, request):
        if not re.match(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:", request.url):
            self.strays.append(request.url)

    def run_all(self, timeout=600_000):
        """Runs every cell; returns once all are done, and fails as soon as one does."""
        self._command("notebook:clear-all-cell-outputs")  # else the numbers of the stored run would count as done
        self.page.wait_for_function(f"!{RAN}.some(mark => /\\d/.test(mark))", timeout=60_000)
        self._command("notebook:run-all-cells")
        self.page.wait_for_function(DONE, timeout=timeout, polling=200)
        failed = self.page.locator(FAILED)
        assert failed.count() == 0, failed.first.text_content()

    def figures_drawn(self, many, timeout=120_000):
        """Waits until that many figures are on the page, each with its traces: none may stay empty."""
        try:
            self.page.wait_for_function(DRAWN, arg=many, timeout=timeout, polling=200)
        except TooLate:
            found = "[...document.querySelectorAll('.js-plotly-plot')].map(plot => (plot._fullData || []).length)"
            raise AssertionError(f"{many} figures were expected; traces of those there: {self.page.evaluate(found)}") from None

    def changes(self, act, *, what=("curves", "drawing", "numbers"), timeout=20_000):
        """Acts, then waits until all of `what` is another: the figures' numbers, their drawing, the numbers beside them."""
        self.page.evaluate(f"() => {{ window.seen = ({SEEN})(); }}")
        act()
        try:
            changed = f"what => {{ const now = ({SEEN})(); return what.every(key => now[key] !== window.seen[key]); }}"
            self.page.wait_for_function(changed, arg=list(what), timeout=timeout, polling=100)
        except TooLate:
            same = f"what => {{ const now = ({SEEN})(); return what.filter(key => now[key] === window.seen[key]); }}"
            raise AssertionError(f"still as before: {self.page.evaluate(same, list(what))}") from None

    def press(self, number, *keys):
        """Moves a slider by keyboard."""
        handle = self.page.locator(".noUi-handle").nth(number)
        for key in keys:
            handle.press(key)  # takes the focus for each key: JupyterLab may have moved it to a cell since the last

    def says(self, words, timeout=20_000):
        """Waits until these words stand beside the figures."""
        self.page.locator(NUMBERS).filter(has_text=words).first.wait_for(timeout=timeout)

    def numbers(self):
        """The words and numbers beside the panels' figures."""
        return " ".join(self.page.locator(NUMBERS).all_text_contents())

    def close(self):
        """Closes the page and ends its kernel, which JupyterLab would keep."""
        self.page.close()
        sessions = f"{self.address}/api/sessions"
        with urllib.request.urlopen(f"{sessions}?token={TOKEN}", timeout=60) as answer:
            running = json.load(answer)
        for session in running:
            end = urllib.request.Request(f"{sessions}/{session['id']}?token={TOKEN}", method="DELETE")
            urllib.request.urlopen(end, timeout=60).close()
