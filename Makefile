# Every target sets up what it needs in .venv; once that is done, this takes no time.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
export DETECTRON2 TORCH VENV

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev quickstart test test-all test-gpu lint bench

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo "PYTHON=python3.11        the Python to create .venv with"
	@echo "DETECTRON2=<source>      pypi, github, a clone's directory, a wheel or a git URL"
	@echo "TORCH=\"torch==... ...\"   another build of PyTorch, as arguments for pip"
	@echo "VENV=<folder>            another folder for the environment than .venv"

setup:  ## create or update .venv
	@$(PYTHON) tools/setup_env.py

setup-dev:  # the same, with what test and lint need
	@$(PYTHON) tools/setup_env.py dev

quickstart: setup  ## install everything, then train on a small synthetic data set
	$(PY) tools/quickstart.py

# Two processes: each takes 1 to 2 GB, and the tests of two processes need cores of their own.
test: setup-dev  ## run all but the slow tests (a few minutes)
	$(PY) -m pytest -q -n 2 -m "not slow"

test-all: setup-dev  ## run all tests, including slow ones
	$(PY) -m pytest -q -n 2

test-gpu: setup-dev  ## run the tests that train on a GPU
	TEST_ON_GPU=1 $(PY) -m pytest -q tests/engine/test_gpu.py

lint: setup-dev  ## check style, format and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

BENCHMARKS = ema step memory loader scale growth

bench: setup  ## measure speed and memory against the least that the work needs (about an hour)
	for benchmark in $(BENCHMARKS); do $(PY) -W ignore -m benchmarks.$$benchmark || exit; done
