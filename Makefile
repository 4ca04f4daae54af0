# make tour: the main job, shown with real processes.   make test: the tests.   Both build what they need into .venv.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.built
SOURCES = pyproject.toml setup.py $(wildcard $(addprefix src/portway/_native/*.,pyx pxd pxi h))

.PHONY: build tour test lint types docs bench fuzz clean check

build: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "portway needs Python 3.11 or later; name one: make build PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "the venv module is missing (Debian: python3-venv)"; exit 1; }

$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" "cython>=3.0.11"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/python -c 'import portway._accel as a; assert a.name == "c", "the native modules were not built"'
	@touch $(STAMP)

tour: build
	$(BIN)/portway tour

test: build
	$(BIN)/python -m pytest

lint: build
	$(BIN)/ruff check .

types: build
	$(BIN)/mypy

check: lint types test

docs: build
	$(BIN)/python -m pip install --quiet --editable ".[docs]" --no-build-isolation
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src -name '*.so' -delete; find src/portway/_native -name '*.c' -delete
