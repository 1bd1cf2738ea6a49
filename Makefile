# Needs Python, git and make. `make help` lists the targets.

PYTHON ?= python3
WORKERS ?= 2
THREADS ?= 2
CKPT ?=
DATA ?=
BASE ?= {}
SEEDS ?= 0
ROOT ?=
CATEGORIES ?=
IMAGE_SIZE ?=
SETS ?= datasets/sets.yaml
NAMES ?=
METHODS ?=
METHODS_FILE ?=
CURVE ?=
JOBS ?= 2
ACCURACY ?= runs/accuracy
RESULTS ?= runs/reproduce
PIP ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BOTTLE := configs/data/mvtec_ad.yaml
PYTEST = -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup venv test quick test-all test-latest test-oldest lint format docs demo bench-accuracy reproduce results bench-latency bench-step bench-scorers bench-gpu clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with the package and the tested versions of what it needs (PYTHON=... picks the interpreter)

venv: setup ## The same as setup

# A thread for each process: two processes of two threads on two cores take several times as long.
test quick test-all test-latest test-oldest: export OMP_NUM_THREADS ?= 1

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt $(wildcard startup/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]' -c constraints.txt
	touch $@

test: lint ## Lint, check types and run the tests (WORKERS=... sets the processes)
	$(BIN)/python $(PYTEST)

quick: lint ## Lint, check types and run the unit tests alone
	$(BIN)/python $(PYTEST) tests/unit

test-all: lint ## The same with the slow tests: killed trainings, several devices, whole benchmarks
	$(BIN)/python $(PYTEST) -m "slow or not slow"

test-latest: ## Run the tests with the newest releases of everything, in .venv-latest (PYTHON=..., PIP="--pre" for previews)
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --upgrade --upgrade-strategy eager $(PIP) -e '.[dev]'
	.venv-latest/bin/python $(PYTEST)

test-oldest: ## Run the tests with the oldest supported releases, in .venv-oldest (PYTHON=python3.10)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -e '.[dev]' -c constraints-oldest.txt
	.venv-oldest/bin/python $(PYTEST)

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Rewrite the files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP) ## Run the demo
	$(BIN)/python examples/demo.py

# What `bench-accuracy` and `reproduce` share.
RUNS = --seeds "$(SEEDS)" --jobs $(JOBS) $(if $(CURVE),--curve) $(if $(METHODS),--methods "$(METHODS)")
MODULE = --data $(or $(DATA),$(BOTTLE)) $(if $(ROOT),--root "$(ROOT)") $(if $(CATEGORIES),--category "$(CATEGORIES)") \
    $(if $(IMAGE_SIZE),--image_size $(IMAGE_SIZE))

bench-accuracy: $(STAMP) ## Compare methods on many data sets, in runs/accuracy; goes on where it was stopped (SETS=<file of sets> NAMES=a,b or DATA=<data module> ROOT=... CATEGORIES=a,b IMAGE_SIZE=...; SEEDS=0,1,2 METHODS="a;b" METHODS_FILE=benchmarks/ways.yaml JOBS=2 CURVE=1 ACCURACY=<folder>)
	$(BIN)/python benchmarks/accuracy.py $(RUNS) --output $(ACCURACY) $(if $(METHODS_FILE),--methods_file $(METHODS_FILE)) \
	    $(if $(DATA),$(MODULE),--sets $(SETS)) $(if $(NAMES),--names "$(NAMES)")

reproduce: $(STAMP) ## The paper's tables, by all of benchmarks/methods.yaml, in runs/reproduce (the same variables; RESULTS=<folder>)
	$(BIN)/python benchmarks/accuracy.py $(RUNS) --output $(RESULTS) --methods_file $(or $(METHODS_FILE),benchmarks/methods.yaml) $(MODULE)

results: $(STAMP) ## Render docs/results.md from the rows in benchmarks/measured (`make reproduce RESULTS=benchmarks/measured` adds some)
	$(BIN)/python benchmarks/report.py benchmarks/measured --docs docs

bench-latency: $(STAMP) ## Time of scoring by stride, runtime and precision, beside other models, in runs/ (THREADS=2; CKPT=... a checkpoint, with DATA=... to measure AUROC)
	$(BIN)/python benchmarks/latency.py --threads $(THREADS) --output runs/latency \
	    $(if $(CKPT),--checkpoint $(CKPT) --data $(or $(DATA),$(BOTTLE)))

bench-step: $(STAMP) ## Profile a training step: steps/s, arithmetic, memory (DATA=..., BASE=... arguments)
	$(BIN)/python benchmarks/step.py --data $(or $(DATA),$(BOTTLE)) --set "$(BASE)"

bench-scorers: $(STAMP) ## Compare scorers and other searches: time, recall, bytes; in runs/
	$(BIN)/python benchmarks/scorers.py --output runs/scorers

# Each command goes on where the one before it failed: what can be known of a GPU in one call is wanted.
bench-gpu: $(STAMP) ## All that docs/experiments/gpu.md wants to know of a GPU: tests, training, steps, scorers, latency; in runs/gpu (DATA=...)
	-$(BIN)/python -m pytest tests/gpu
	-$(BIN)/python benchmarks/accuracy.py $(MODULE) --accelerator gpu --curve --methods Pedenet --seeds "$(SEEDS)" --jobs 1 --output runs/gpu/accuracy
	-$(BIN)/python benchmarks/step.py --data $(or $(DATA),$(BOTTLE)) --accelerator gpu
	-$(BIN)/python benchmarks/scorers.py --device cuda --rows 10000 1000000 --output runs/gpu/scorers
	-$(BIN)/python benchmarks/latency.py --routes "torch eager, GPU" "torch.compile, GPU" --output runs/gpu/latency

docs: $(STAMP) ## Build the documentation as a site, in site/; a broken link fails
	$(BIN)/mkdocs build --strict

clean: ## Remove the environment and what builds, checks and the demo have written
	rm -rf $(VENV) build dist demo site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
