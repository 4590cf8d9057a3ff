# Needs Python 3.11.4 or newer, and nothing else: the first command makes an environment in $(VENV) and installs into it.
# Another interpreter: make setup PYTHON=/path/to/python3.   Arguments for a command: make train ARGS="-o train.epochs=3"
# The tests run in two processes, which take over tests from each other. In one, as --pdb needs it: make test ARGS="-n 0"

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
ARGS ?=
STAMP := $(VENV)/.set-up-for-disttrain

.PHONY: help setup train test test-long test-wheel check format bench

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## make the environment (the other commands do it when it is missing or out of date)

train: $(STAMP)  ## train on handwritten digits with two workers, in a minute
	$(VENV)/bin/disttrain train digits -n 2 $(ARGS)

test: $(STAMP)  ## run the tests
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-long: $(STAMP)  ## run the tests that take minutes
	$(VENV)/bin/python -m pytest -m long $(ARGS)

test-wheel: $(STAMP)  ## build the wheel, install it in a clean environment and test it there
	$(VENV)/bin/python -m pytest -m wheel $(ARGS)

check: $(STAMP)  ## lint, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)  ## format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(STAMP)  ## run the comparisons in turn and write docs/benchmarks.md (two hours; ARGS=--quick: 40 minutes; ARGS=--list names them)
	$(VENV)/bin/python benchmarks/run.py $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if [ ! -x $(VENV)/bin/python ]; then \
	  for python in $(or $(PYTHON),python3.13 python3.12 python3.14 python3.11 python3); do \
	    if "$$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11, 4))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "disttrain needs Python 3.11.4 or newer, with venv, and found none$(if $(PYTHON), at $(PYTHON))." >&2; \
	    echo "Install it (Debian and Ubuntu: apt install python3-venv), or name it: make setup PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$("$$found" --version); PyTorch is large, this takes minutes"; \
	  "$$found" -m venv $(VENV); \
	fi
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
