# Needs Python, git and make. `make help` lists the targets.

PYTHON ?= python3
WORKERS ?= 2
THREADS ?= 2
CKPT ?=
DATA ?= configs/data/mvtec_ad.yaml
BASE ?= {}
SEEDS ?= 0
SETTINGS ?= benchmarks/time_to_accuracy.yaml
CATEGORIES ?=
METHODS ?=
ROOT ?=
IMAGE_SIZE ?= 256,256
CURVE ?=
SETS ?= datasets/sets.yaml
ACCURACY ?= runs/accuracy
NAMES ?=
JOBS ?= 2
RESULTS ?= runs/reproduce
PIP ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST = -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup venv test quick test-all test-latest test-oldest lint format docs demo bench-train bench-settings bench-scorers bench-coresets bench-step bench-latency bench-gpu bench-accuracy bench-ways reproduce results clean

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

bench-train: $(STAMP) ## Train in several ways (SETTINGS=...) and draw pixel AUROC against seconds, in runs/ (DATA=... a data module, BASE=... arguments, SEEDS="0 1 2")
	$(BIN)/python benchmarks/train.py --data $(DATA) --seeds $(SEEDS) --base "$(BASE)" --plot \
	    --settings $(SETTINGS) --output runs/$(basename $(notdir $(SETTINGS)))_$(basename $(notdir $(DATA)))

bench-settings: $(STAMP) ## Rank settings by drawn defects and by the test images, in runs/ (the same variables)
	$(BIN)/python benchmarks/train.py --data $(DATA) --seeds $(SEEDS) --base "$(BASE)" --holdout 0.15 \
	    --settings benchmarks/settings.yaml --output runs/settings_$(notdir $(DATA:.yaml=))

bench-scorers: $(STAMP) ## Compare scorers and other searches: time, recall, bytes; in runs/
	$(BIN)/python benchmarks/scorers.py --output runs/scorers

bench-coresets: $(STAMP) ## Build small memory banks from two million embeddings: time, memory, quality, in runs/
	$(BIN)/python benchmarks/coresets.py --output runs/coresets

bench-step: $(STAMP) ## Profile a training step: steps/s, arithmetic, memory (DATA=..., BASE=...)
	$(BIN)/python benchmarks/step.py --data $(DATA) --set "$(BASE)"

bench-latency: $(STAMP) ## Time of scoring by stride, runtime and precision, beside other models, in runs/ (THREADS=2; CKPT=... a checkpoint, with DATA=... to measure AUROC)
	$(BIN)/python benchmarks/latency.py --threads $(THREADS) --output runs/latency --profile \
	    $(if $(CKPT),--checkpoint $(CKPT) --data $(DATA))

# Each command goes on where the one before it failed: what can be known of a GPU in one call is wanted.
bench-gpu: $(STAMP) ## All that docs/experiments/gpu.md wants to know of a GPU: tests, training, steps, scorers, latency; in runs/gpu (DATA=...)
	-$(BIN)/python -m pytest tests/gpu
	-$(BIN)/python benchmarks/train.py --data $(DATA) --accelerator gpu --curve --set "{}" --seeds $(SEEDS) --output runs/gpu/train
	-$(BIN)/python benchmarks/step.py --data $(DATA) --accelerator gpu
	-$(BIN)/python benchmarks/scorers.py --device cuda --rows 10000 1000000 --output runs/gpu/scorers
	-$(BIN)/python benchmarks/latency.py --routes "torch eager, GPU" "torch.compile, GPU" --output runs/gpu/latency

reproduce: $(STAMP) ## Tables 1 to 4 and figures, in runs/reproduce; goes on where it was stopped (CATEGORIES=bottle,tile SEEDS=0,1,2 ROOT=... METHODS="a;b" DATA=... IMAGE_SIZE=... CURVE=1)
	$(BIN)/python benchmarks/reproduce.py --data $(DATA) --seeds "$(SEEDS)" --image_size $(IMAGE_SIZE) --output $(RESULTS) \
	    $(if $(CURVE),--curve) $(if $(CATEGORIES),--categories "$(CATEGORIES)") $(if $(METHODS),--methods "$(METHODS)") $(if $(ROOT),--root "$(ROOT)")

bench-accuracy: $(STAMP) ## Compare methods on many data sets, JOBS=2 at a time, in runs/accuracy; goes on where it was stopped (SETS=<file of sets> SEEDS=0,1,2 NAMES=a,b METHODS="a;b" ACCURACY=...)
	$(BIN)/python benchmarks/accuracy.py --sets $(SETS) --seeds "$(SEEDS)" --jobs $(JOBS) \
	    --output $(ACCURACY) \
	    $(if $(NAMES),--names "$(NAMES)") $(if $(METHODS),--methods "$(METHODS)")

bench-ways: $(STAMP) ## Train once on each data set and score in many ways: scorers, scales, banks, strides; in runs/ways (the same variables)
	$(BIN)/python benchmarks/accuracy.py --sets $(SETS) --seeds "$(SEEDS)" --jobs $(JOBS) \
	    --methods_file benchmarks/ways.yaml --output runs/ways \
	    $(if $(NAMES),--names "$(NAMES)") $(if $(METHODS),--methods "$(METHODS)")

results: $(STAMP) ## Render docs/results.md from the rows in benchmarks/measured (`make reproduce RESULTS=benchmarks/measured` adds some)
	$(BIN)/python benchmarks/report.py benchmarks/measured --docs docs

docs: $(STAMP) ## Build the documentation as a site, in site/; a broken link fails
	$(BIN)/mkdocs build --strict

clean: ## Remove the environment and what builds, checks and the demo have written
	rm -rf $(VENV) build dist demo site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
