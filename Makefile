# python3 (3.11 or newer, with venv) and make are all that is needed; everything else is installed into .venv
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0

.PHONY: help quickstart test test-slow lint format clean

help:
	@echo "make quickstart [SEED=n]  train a small policy from nothing, see docs/quickstart.md"
	@echo "make test                 lint, types and tests"
	@echo "make test-slow            the tests that take longer than half a minute"
	@echo "make format               format the code"

# one thread: matrices this small gain nothing from a second one, and lose much where cores are shared
quickstart: export OMP_NUM_THREADS ?= 1
quickstart: .venv/run
	$(BIN)/python train.py pipeline --config configs/quickstart/pipeline.yaml --seed $(SEED)

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy modules datamodules callbacks commands benchmarks train.py

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs data

.venv/run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
