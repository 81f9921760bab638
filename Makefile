# Every target sets up what it needs in .venv; once that is done, this takes no time.

PYTHON ?= python3
PY := .venv/bin/python
export DETECTRON2 TORCH

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint bench

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo "PYTHON=python3.11           the Python that .venv is made with"
	@echo "DETECTRON2=<source>         a clone's directory, a wheel or a git URL"
	@echo "TORCH=\"torch==... ...\"      another build of PyTorch, as arguments for pip"

setup:  ## create or update .venv
	@$(PYTHON) tools/setup_env.py

# Status 3 says that all but Detectron2 could be installed.
quickstart:  ## install everything, then a small demonstration
	@$(PYTHON) tools/setup_env.py --require-detectron2; status=$$?; \
	set -- tools/quickstart.py; \
	if [ $$status = 3 ]; then \
		set -- examples/torchvision_reference.py; \
		echo "[quickstart] no Detectron2: running the reference on torchvision, $$1, instead"; \
	elif [ $$status != 0 ]; then exit $$status; fi; \
	echo "$(PY) $$1"; $(PY) "$$1"

test: setup  ## run all tests; those that need Detectron2 are left out without it
	$(PY) -m pytest -q

lint: setup  ## check style, format and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

BENCHMARKS = ema step memory loader scale growth

bench: setup  ## measure speed and memory against the least that the work needs (about an hour)
	for benchmark in $(BENCHMARKS); do $(PY) -W ignore -m benchmarks.$$benchmark || exit; done
