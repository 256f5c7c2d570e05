# Every target does everything from a clean clone: a virtual environment in .venv, the
# installation, the run.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-lowest test-tpu lint docs notebooks package clean

demo: .venv/installed
	$(BIN)/python -m benchmarks.demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# All tests, with the compiler that users have: `make test` turns most optimizations off.
test-all: lint
	XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0 \
	  $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow"

# What a step moves on a TPU, as its compiler says; no TPU is needed.
test-tpu: .venv/installed-tpu
	$(BIN)/python -m pytest tests/test_compiled_cost.py -m "slow or not slow"

# The tests with the lowest versions of jax and optax that pyproject.toml declares.
LOWEST = $(shell sed -n 's/^dependencies = //p' pyproject.toml | tr -d '[]," ' | \
	sed 's/>=/==/g; s/optax/ optax/')
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable ".[test]" $(LOWEST)
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site; it says where.
docs: .venv/installed-docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs out/docs
	@echo "The site: file://$(CURDIR)/out/docs/index.html"

# Runs every notebook in its short form; what is committed stays as it is.
notebooks: .venv/installed-notebooks
	NOTEBOOKS_FAST=1 $(BIN)/python -m pytest --nbmake notebooks

# All that must hold before a version is released.
.PHONY: release-check
release-check: docs package
	$(BIN)/python tools/check_release.py

# Wheel and sdist in dist/, checked.
package: .venv/installed-package
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tools/check_package.py

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

# A target's extra in pyproject.toml has the target's name.
.venv/installed-%: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv .venv-lowest out build dist
