# Everything needs Python 3.11 or newer and nothing else: the targets make their own virtual environment.
.POSIX:

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test lint slow docs format clean

help:
	@echo "make demo    the main job on 5,000 handwritten digits: train, ghostify, distil, compare, export"
	@echo "make test    formatting, lint, types, tests and doctests"
	@echo "make lint    formatting, lint and types alone"
	@echo "make slow    the tests that take minutes"
	@echo "make docs    the documentation as pages, in site/"
	@echo "make format  format the code"
	@echo "make clean   remove the virtual environment and what was made"

demo: $(VENV)/demo.stamp
	$(BIN)/ghostify demo --out demo-run

# One process a core, each with one thread: threads of several would wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp is as old as the last installation; it is made anew when the packages asked for have changed.
$(VENV)/demo.stamp: $(VENV)/made.stamp pyproject.toml constraints.txt
	$(PIP) --editable ".[demo]"
	@touch $@

# Everything that the demo needs is among what the tests need.
$(VENV)/dev.stamp: $(VENV)/made.stamp pyproject.toml constraints.txt
	$(PIP) --editable ".[dev]"
	@touch $@ $(VENV)/demo.stamp

$(VENV)/docs.stamp: $(VENV)/made.stamp pyproject.toml constraints.txt
	$(PIP) --editable ".[docs]"
	@touch $@

$(VENV)/made.stamp:
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) site demo-run cifar10-run .pytest_cache .mypy_cache .ruff_cache .hypothesis
