# The two commands of the README are `make quickstart` and `make test`; both build their own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: install quickstart test benchmark lint types check clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'metagen_jax needs Python 3.11 or newer; try: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

quickstart: install
	$(BIN)/metagen quickstart

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

benchmark: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[benchmark]"
	taskset -c 0 $(BIN)/python benchmarks/everything.py

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed-dev
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
