# Everything a newcomer needs: `make lab`, `make test`, `make demo`. Wants python 3.11 or newer, and make.
# What is installed is said once, in pyproject.toml; a stamp in .venv remembers which of its extras are there.

PYTHON ?= python3
DATA ?= $(or $(MICELAB_DATA),data)
override DATA := $(abspath $(DATA))
export MICELAB_DATA := $(DATA)

BIN := .venv/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.PHONY: help lab test demo notebooks site gpu bench lint clean
.SECONDARY:
.DEFAULT_GOAL := help

help:  ## Show this list
	@echo "make TARGET [PYTHON=python3.12] [DATA=folder of the data sets]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

lab: .venv/with-course  ## Set up, then open the notebooks in JupyterLab (in a container, as root: LAB="--allow-root --ip=0.0.0.0")
	$(BIN)/python -m jupyter lab notebooks $(LAB)

test: lint  ## Set up, then check style and types, run all tests and re-run every notebook
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests micelab
ifneq ($(NOTEBOOKS),)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbval --nbval-current-env --nbval-sanitize-with notebooks/sanitize.cfg \
		--nbval-cell-timeout=300 notebooks
endif

demo: .venv/with-figures  ## Set up, then train, convert, simulate and explain a network on real digits
	$(BIN)/python -m micelab demo

notebooks: .venv/with-test  ## Set up, then re-run every notebook from a fresh kernel and store its outputs
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/refresh.py

site: .venv/with-site  ## Set up, then make the course into web pages: open build/site/index.html
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html --conf-dir docs --doctree-dir build/site-cache . build/site

gpu: .venv/with-bench  ## Set up, then check and time everything on an NVIDIA card (a try without one: DEVICE=cpu SMALL=1)
	$(BIN)/python benchmarks/gpu.py $(if $(DEVICE),--device $(DEVICE)) $(if $(SMALL),--small) $(if $(MINUTES),--minutes $(MINUTES))

RESULTS ?= build/bench

bench: .venv-bench/with-peers  ## Time the simulation beside spikingjelly, snnTorch and sinabs, in an environment of their own
	.venv-bench/bin/python benchmarks/simulation.py --out $(RESULTS)/benchmark-simulation.json --plot $(RESULTS)/speed.png $(BENCH)
	.venv-bench/bin/python benchmarks/simulation.py --memory --out $(RESULTS)/benchmark-memory.json

lint: .venv/with-test  ## Set up, then check style and types only
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:  ## Remove .venv, .venv-bench and caches; data, checkpoints and results stay
	rm -rf .venv .venv-bench build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find micelab tests notebooks benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

.venv/with-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[$*]"
	@touch $@

.venv-bench/with-peers: pyproject.toml | $(BIN)/python
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --disable-pip-version-check --editable ".[peers]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "micelab needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1):" \
			"install one and name it, as in: make $(or $(MAKECMDGOALS),lab) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
