# A newcomer needs two commands: make demo, make test. Both set .venv up first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-full check bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[onnxruntime,keras,transformers,dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/featherweight demo --out demo --force

test: setup
	$(BIN)/python -m pytest -m "not slow and not network"

test-full: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow and not network" -x --quiet tests/test_formats.py tests/test_recipe.py tests/test_outcome.py

bench: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/int8.py

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache .mypy_cache
