# `make help` lists the targets. Everything happens in .venv, which the first target that needs it creates.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# For `make sweep`; each takes a comma-separated list. For LLaVA-1.5 and Video-LLaVA, unless methods, budgets or tasks
# are given, the sweep is the paper's table with its settings (configs/experiment/paper_*.yaml).
model ?= mini
method ?= none,random,sparsevlm
budget ?= 192,128,64
task ?= minivqa
# Questions per run; empty = all.
limit ?=
# To start it with: launcher=joblib (side by side on this machine) or slurm (pip install hydra-*-launcher first).
launcher ?=

# For `make retrain`: where to, and for how long.
out ?= outputs/mini
minutes ?= 90

# For `make fuzz`: how many cases, and the seed of the first of them. args=--resume goes on where the last run stopped.
cases ?= 200
seed ?= 0

# Where runs, tables and figures go.
results ?= results
# Anything more for the command behind a target: make reproduce args=limit=64 results=outputs/results
args ?=

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export OMP_WAIT_POLICY := PASSIVE
export MPLBACKEND := Agg

.PHONY: help setup reproduce test test-all fuzz fuzz-runs throughput lint docs flops latency tables figures report paper notebooks fetch sweep \
	retrain browser clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## create .venv and install what is missing

$(VENV)/.installed: requirements.txt constraints.txt pyproject.toml eval/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "no Python"); \
		echo "Python 3.11 or newer is needed, but $(PYTHON) is $$found: make setup PYTHON=python3.12"; exit 1; } >&2
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; } >&2
	@echo "Installing into $(VENV): a few minutes, and some gigabytes"
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(RUN) -m pip install --disable-pip-version-check --quiet --no-deps -e . -e eval
	@touch $@

reproduce: setup ## run SparseVLM and baselines on the embedded model, then make tables and figures
	@$(RUN) -m eval.run experiment=reproduce results_dir=$(results) $(args)
	@$(MAKE) --no-print-directory tables figures args=

# One worker per core, one thread each; `args=-n0` runs the tests in this process.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -q -rx -n auto --dist worksteal

test: setup browser ## the fast tests
	@$(PYTEST) -m "not slow and not gpu" $(args)

test-all: setup browser ## all tests; those for a GPU are skipped where there is none
	@$(PYTEST) $(args)

# For the test that opens the report. Where it cannot be installed, that test says that it did not check.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
		command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && echo "Installing Chromium, for a test" && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
		echo "no Chromium, and none could be installed: the report's test in a browser will not check" >&2

fuzz: setup ## random models, methods, prompts and ways of running against a masked model: make fuzz cases=10000
	@$(RUN) -m tests.fuzz --cases $(cases) --seed $(seed) $(args)

fuzz-runs: setup ## random command lines, damaged files and a full disk through eval.run: make fuzz-runs cases=300
	@$(RUN) -m tests.fuzz.runs --cases $(cases) --seed $(seed)
	@$(RUN) -m tests.fuzz.damage --cases $(cases) --seed $(seed)

throughput: setup ## questions a second through the whole harness, with a model that costs next to nothing
	@OMP_NUM_THREADS=1 $(RUN) -m tests.throughput $(args)

lint: setup ## check style and types
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	@$(RUN) -m mypy

# Some by name: of a package with __all__, pdoc takes what that names. It cannot look up the types of options that a method
# inherits from another module, and shows them as they are written.
API = sparsevlm $(addprefix sparsevlm.,core cost mini models runtime) \
	$(subst /,.,$(basename $(wildcard sparsevlm/[!_]*.py sparsevlm/mini/[!_]*.py sparsevlm/models/[!_]*.py)))

docs: setup ## make the API reference of the docstrings: docs/api/index.html
	@$(RUN) -W "ignore:Error parsing type annotation" -m pdoc --docformat google --output-directory docs/api $(API)
	@echo "docs/api/index.html"

flops: setup ## count the multiply-adds of every method on LLaVA-1.5-7B, 13B and Video-LLaVA; no weights needed
	@$(RUN) -m eval.measure.flops --results $(results) $(args)
	@$(RUN) scripts/make_tables.py --results $(results) --only flops

# Overhead on one thread: a wide and a narrow random Llama with the authors' keep lists, and the embedded model.
BENCH = $(RUN) -m eval.measure.latency --threads 1 --warmup 1 --decode-tokens 4 --results $(results)

latency: setup ## time pruning against the unpruned model and the floor on this machine, and draw it
	@$(BENCH) --shape llama-1024x16 --prompt 35+576+25 --repeats 10 \
		"sparsevlm::layers=(2,6,12):keep=(300,200,110)" \
		"sparsevlm::layers=(2,6,12):keep=(66,30,17)" $(args)
	@$(BENCH) --shape llama-512x18x8 --prompt 35+576+54 --repeats 10 \
		"sparsevlm::layers=(2,6,15):keep=(300,200,110)" \
		"sparsevlm::layers=(2,6,15):keep=(66,30,17)" \
		"sparsevlm::layers=(2,6,15):keep=(300,200,110):early_drop=False" \
		"sparsevlm::layers=(2,6,15):keep=(66,30,17):early_drop=False" $(args)
	@$(BENCH) --shape mini --prompt 4+576+8 --repeats 20 --methods sparsevlm,fastv,random --budgets 192,128,64 $(args)
	@$(RUN) scripts/make_tables.py --results $(results) --only latency
	@$(RUN) scripts/make_figures.py --results $(results) --only latency

tables: setup ## make the tables of the runs
	@$(RUN) scripts/make_tables.py --results $(results) $(args)

figures: setup ## draw the figures of the runs
	@$(RUN) scripts/make_figures.py --results $(results) $(args)

report: paper
paper: setup ## all tables, all figures and results/report.html, of the runs or else of results/reference
	@$(RUN) scripts/make_paper.py --results $(results) $(args)

notebooks: setup ## run the notebooks and see that they pass
	@$(VENV)/bin/jupyter-execute notebooks/*.ipynb

sweep_grid := model=$(model) method=$(method) budget=$(budget) task=$(task)
sweep_paper := $(if $(filter llava_1_5_%,$(model)),paper_image)$(if $(filter video_llava_%,$(model)),paper_video)
ifneq ($(findstring command line,$(origin method) $(origin budget) $(origin task)),)
sweep_paper :=
endif

sweep_what = $(if $(sweep_paper),$(if $(launcher),-m) experiment=$(sweep_paper) model=$(model),-m $(sweep_grid)) \
	$(if $(limit),limit=$(limit))

fetch: setup ## say what a sweep needs from the model hub, and fetch it: make fetch model=llava_1_5_7b args=--dry-run
	@$(RUN) -m eval.fetch $(sweep_what) $(args)

sweep: setup ## runs of many methods over shared pictures: make sweep model=mini method=none,fastv budget=64 task=minivqa limit=96
	@$(RUN) -m eval.run $(sweep_what) $(if $(launcher),hydra/launcher=$(launcher)) results_dir=$(results) $(args)

retrain: setup ## train the embedded model from nothing: make retrain out=outputs/mini minutes=90
	@$(RUN) -m sparsevlm.mini.training --out $(out) --minutes $(minutes) --resume $(args)

clean: ## remove the environment and caches; results stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis docs/api
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
