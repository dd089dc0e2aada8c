# `make help` lists the targets. Everything happens in .venv, which the first target that needs it creates.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# For `make sweep`; each takes a comma-separated list.
model ?= mini
method ?= none,random,sparsevlm
budget ?= 192,128,64
task ?= minivqa

# For `make retrain`: where to, and for how long.
out ?= outputs/mini
minutes ?= 90

# Where runs, tables and figures go.
results ?= results
# Anything more for the command behind a target: make reproduce args=limit=64 results=outputs/results
args ?=

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export OMP_WAIT_POLICY := PASSIVE
export MPLBACKEND := Agg

.PHONY: help setup reproduce test test-all lint flops latency tables figures notebooks sweep retrain clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## create .venv and install what is missing

$(VENV)/.installed: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "no Python"); \
		echo "Python 3.11 or newer is needed, but $(PYTHON) is $$found: make setup PYTHON=python3.12"; exit 1; } >&2
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; } >&2
	@echo "Installing into $(VENV): a few minutes, and some gigabytes"
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(RUN) -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@

reproduce: setup ## run SparseVLM and baselines on the embedded model, then make tables and figures
	@$(RUN) -m eval.run experiment=reproduce results_dir=$(results) $(args)
	@$(MAKE) --no-print-directory tables figures args=

test: setup ## the fast tests
	@$(RUN) -m pytest -q -m "not slow and not gpu" $(args)

test-all: setup ## all tests; those for a GPU are skipped where there is none
	@$(RUN) -m pytest -q $(args)

lint: setup ## check style
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

flops: setup ## count the multiply-adds of a prefill; no weights needed
	@$(RUN) -m sparsevlm.cost.flops $(args)

latency: setup ## time prefill and decode on this machine, of what was run
	@$(RUN) scripts/profile.py --results $(results) $(args)

tables: setup ## make the tables of the runs
	@$(RUN) scripts/make_tables.py --results $(results) $(args)

figures: setup ## draw the figures of the runs
	@for script in scripts/plot_*.py; do $(RUN) $$script --results $(results) $(args); done

notebooks: setup ## run the notebooks and see that they pass
	@$(VENV)/bin/jupyter-execute notebooks/*.ipynb

sweep: setup ## every combination: make sweep model=mini method=none,sparsevlm budget=192,64 task=minivqa
	@$(RUN) -m eval.run -m model=$(model) method=$(method) budget=$(budget) task=$(task) \
		results_dir=$(results) $(args)

retrain: setup ## train the embedded model from nothing: make retrain out=outputs/mini minutes=90
	@$(RUN) -m sparsevlm.mini.train --out $(out) --minutes $(minutes) --resume $(args)

clean: ## remove the environment and caches; results stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
