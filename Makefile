# python3 (3.11 or newer, with venv) and make are all that is needed; everything else is installed into .venv
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0

.PHONY: help quickstart test test-slow test-slurm lint format bench fuzz docs-check clean

help:
	@echo "make quickstart [SEED=n]  train a small policy from nothing, see docs/quickstart.md"
	@echo "make test                 lint, types and tests"
	@echo "make test-slow            the tests that take longer than half a minute"
	@echo "make test-slurm           the batch files on a SLURM of this machine, see docs/slurm.md"
	@echo "make format               format the code"
	@echo "make bench [ROWS=\"a b\"]    how fast it is against others, see docs/performance.md"
	@echo "make fuzz [MINUTES=n]     ever new texts, data files and images, for ten minutes"
	@echo "make docs-check           run the commands of the documentation that this machine can run"

# one thread: matrices this small gain nothing from a second one, and lose much where cores are shared
quickstart: export OMP_NUM_THREADS ?= 1
quickstart: .venv/run
	$(BIN)/python train.py pipeline --config configs/quickstart/pipeline.yaml --seed $(SEED)

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

test-slurm: .venv/dev
	$(BIN)/python -m pytest tests/test_slurm.py -rs

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy modules datamodules callbacks commands benchmarks train.py

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev
	$(BIN)/python -m benchmarks.run $(if $(ROWS),--rows $(ROWS))

fuzz: .venv/dev
	$(BIN)/python -m tests.properties.fuzz --minutes $(or $(MINUTES),10)

docs-check: .venv/dev
	$(BIN)/python -m tests.docs_check

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
