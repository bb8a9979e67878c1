"""The set-up says everything once: extras, versions and names agree across the files that a newcomer touches."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import micelab

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def everything_in(extra):
    """Requirements of an extra, with the extras that it names opened."""
    found = set()
    for requirement in EXTRAS[extra]:
        inner = re.fullmatch(r"micelab\[(\w+)\]", requirement)
        found |= everything_in(inner[1]) if inner else {requirement}
    return found


def test_conda_installs_the_package_with_the_same_extras_as_make_test():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "micelab"
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    (wanted,) = pip
    extra = re.fullmatch(r"-e \.\[(\w+)\]", wanted)[1]
    assert f".venv/with-{extra}" in re.search(r"^lint:.*$", MAKEFILE, re.M)[0]
    assert re.search(r"^test: lint\b", MAKEFILE, re.M)


def test_conda_and_the_package_ask_for_the_same_python():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert f"python{PYPROJECT['project']['requires-python']}" in environment["dependencies"]
    assert "sys.version_info < (3, 11)" in MAKEFILE


def test_every_extra_that_make_installs_is_in_pyproject():
    named = set(re.findall(r"\.venv/with-(\w+)", MAKEFILE))
    assert named == {"course", "test", "figures", "bench", "site"}
    assert named <= EXTRAS.keys()


def test_the_tests_have_all_that_the_course_has():
    assert everything_in("figures") <= everything_in("panels") <= everything_in("course") <= everything_in("test")


def test_every_folder_of_the_package_is_installed():
    folders = {f"micelab.{file.parent.name}" for file in (ROOT / "micelab").glob("*/__init__.py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == {"micelab"} | folders


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == micelab.__version__
    assert citation["license"] == PYPROJECT["project"]["license"] == "Apache-2.0"
    assert f"## [{micelab.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_a_python_that_is_too_old_is_refused_in_one_clear_line(tmp_path):
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    (tmp_path / "pyproject.toml").touch()
    made = subprocess.run(["make", "lab", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode != 0
    assert "needs Python 3.11 or newer" in made.stderr
    assert "Python 3.8.1" in made.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("module", ["micelab", "micelab.cli", "micelab.train"])
def test_importing_brings_in_nothing_that_a_simulation_does_not_need(module):
    course = {"plotly", "ipywidgets", "jupyter", "jupyterlab", "IPython", "ipykernel", "matplotlib", "pytest"}
    heavy = course | {"sklearn", "torchvision"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
