# make help lists the targets. Everything is installed into .venv; the model and data go to the cache (SLM_CACHE).
.DEFAULT_GOAL := help
.PHONY: help install transformers4 system-packages assets run test lint check-types bench clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= $(shell grep '^torch==' constraints.txt)
INSTALL := install --quiet --disable-pip-version-check --no-compile

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {printf "  make %-16s %s\n", $$1, $$2}'

install: $(VENV)/installed ## Make the environment in .venv (PYTHON=python3.12 chooses another Python, 3.10 to 3.13)

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	  || { echo "error: $(PYTHON) is not Python 3.10 to 3.13; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip $(INSTALL) $(TORCH)
	$(BIN)/python -m pip $(INSTALL) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # pip uses one core; what does not compile are templates
	touch $@

transformers4: $(VENV)/transformers4/installed ## Make the folder with transformers 4 that the tests load checkpoints with

$(VENV)/transformers4/installed: constraints-transformers4.txt $(VENV)/installed
	@started=$$(date +%s) && rm -rf $(@D) \
	  && $(BIN)/python -m pip $(INSTALL) --no-deps --target $(@D) --requirement $< \
	  && touch $@ && echo "transformers 4 for the tests was installed in $$(($$(date +%s) - started)) s"

assets: install ## Fetch the bundled model and data (about 180 MB, once)
	$(BIN)/slm-fetch

run: assets ## The main job on the bundled model: calibrate, merge, LoRA, evaluate (minutes on two cores)
	$(BIN)/slm experiment=two_cores

system-packages: ## Install Slurm and Chromium for the tests that need them (Debian, as root)
	.ci/system-packages

test: install transformers4 lint check-types ## Lint, type-check and run all tests, two files at a time
	markers=$$(.ci/left-out-tests) && OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "$$markers"

lint: install ## Style, and that imports go one way
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

check-types: install ## Types
	$(BIN)/mypy

bench: assets ## Each search beside the published loop, on the bundled model (an hour on two cores)
	$(BIN)/slm-bench methods

clean: ## Remove the environment and build leftovers; results in outputs/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
