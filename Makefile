# One command each; `make` alone lists them. Needs Python 3.11 or newer, make and git.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FOLDERS := space samplers predictors search experiments

# Folders of the repository must not become top-level imports by the accident of where Python starts.
export PYTHONSAFEPATH := 1
# Evaluators and tests run many small networks: more than one thread each only makes them wait.
THREADS ?= 1
# Files of tests that run side by side.
JOBS ?= 2

.PHONY: help install demo test quick check docs format types wheel ui results clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with everything, and fetch the optional model
	@$(BIN)/python -m fewstep.experiments.models.galaxy fetch --optional

# Installed again only when what is asked for changes. The tested versions come from constraints.txt:
# an open range for torch brings gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	    for python in "$${PYTHON:-}" python3.11 python3.12 python3.13 python3.14 python3 python; do \
	        [ -n "$$python" ] && "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	        echo "making $(VENV) with $$("$$python" --version)"; \
	        "$$python" -m venv $(VENV) || { rm -rf $(VENV); \
	            echo "error: $$python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2; exit 1; }; \
	        break; \
	    done; \
	    [ -x $(BIN)/python ] || { \
	        echo "error: fewstep needs Python 3.11 or newer, and none was found; name one: make install PYTHON=/path/to/python" >&2; exit 1; }; \
	fi
	@echo "installing fewstep and what it needs into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[search,diffusers,dev]'
	@touch $(STAMP)

demo: install  ## search schedules for the digits model: runs/demo (about 5 minutes)
	@$(BIN)/fewstep search experiments/studies/digits.toml --out runs/demo --overwrite

test: install check  ## check, then every test
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/pytest -n $(JOBS) --dist loadfile

quick: install  ## the tests that take seconds
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/pytest -m 'not slow'

check: $(STAMP) types docs  ## lint, format, types and documents, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(STAMP)  ## build the documents: build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(STAMP)  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types:  ## build the view of the packages that mypy and editors read: build/types
	@rm -rf build/types && mkdir -p build/types/fewstep
	@for folder in $(FOLDERS); do ln -s ../../../$$folder build/types/fewstep/$$folder; done

wheel: $(STAMP)  ## build dist/fewstep-*.whl
	@rm -rf build/lib build/bdist.* dist
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist .

ui: $(STAMP)  ## open MLflow on the runs of the demo
	@mkdir -p runs
	@echo 'open http://127.0.0.1:5000/#/experiments?workflowType=machine_learning'
	@$(BIN)/mlflow ui --workers 1 --backend-store-uri sqlite:///runs/mlflow.db --artifacts-destination runs/mlartifacts

results: $(STAMP)  ## make the tables of results again (TABLE=a: one of them): experiments/results/tables.md
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -P -m fewstep.experiments.benchmarks.tables $(TABLE)

clean:  ## remove what builds and tools leave (keeps .venv, runs and assets)
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find $(FOLDERS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
