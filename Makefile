# `make demo` and `make test` set up all they need on a machine that has Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test slow format clean

help:
	@echo "make demo    the main job on 5,000 handwritten digits: train, ghostify, distil, compare, export"
	@echo "make test    formatting, lint, types, tests and doctests"
	@echo "make slow    the tests that take minutes"
	@echo "make format  format the code"
	@echo "make clean   remove the virtual environment and what was made"

demo: $(VENV)/demo.stamp
	$(BIN)/ghostify demo --out demo-run

test: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[demo]"
	@touch $@

# Everything that the demo needs is among what the tests need.
$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[dev]"
	@touch $@ $(VENV)/demo.stamp

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) demo-run cifar10-run .pytest_cache .mypy_cache .ruff_cache .hypothesis
