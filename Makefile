# Each target is a thin line over `python -m edgelab` or pytest. Only Python >= 3.10 is needed:
# the first target that needs it makes .venv and installs the project there.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --no-input

.PHONY: run lab test bench guest lessons clean help

run: .venv/base.stamp ## the article's path end to end on the embedded model
	$(PY) -m edgelab run

lab: .venv/lab.stamp ## open the lessons in JupyterLab
	$(PY) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_start.ipynb

test: .venv/test.stamp ## everything: style, types, guests, package, lessons
	@$(PY) tests/chromium.py
	$(PY) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: .venv/base.stamp ## paired timings: tables, JSON and a plot in bench/, compared with the last ones
	$(PY) -m edgelab bench --json bench/latest.json --keep --plot bench/latest.png

guest: .venv/base.stamp ## build the Rust guests
	$(PY) -m edgelab guest build

lessons: .venv/test.stamp ## run the notebooks and compare their checked cells
	$(PY) -m pytest tests/test_lessons.py

clean: ## remove everything that these targets made
	rm -rf .venv guest/target guest/*/target guest/build tests/guests/target bench dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find edgelab tests notebooks -name __pycache__ -prune -exec rm -rf {} +

help: ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "edgelab needs Python 3.10 or newer; choose one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "This Python can't make a virtual environment. On Debian or Ubuntu: apt-get install python3-venv"; \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null || exit 1; \
	  echo "Installing python3-venv (you are root) ..."; \
	  apt-get update -q && apt-get install -y -q python3-venv && $(PYTHON) -m venv .venv; }

.venv/base.stamp: pyproject.toml | .venv/bin/python
	$(PIP) --editable .
	@touch $@

.venv/%.stamp: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[$*]'
	@touch $@ .venv/base.stamp
