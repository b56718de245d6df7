# Lacuna: `make demo` installs everything and runs the pipeline on the embedded demo world; `make test` installs everything
# and passes the tests. Needs Python 3.11 or 3.12 with venv, make and g++.

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
UV_VERSION := 0.13.9
ROOT ?= var/store
BIN := .venv/bin
READY := .venv/.ready
AWS := var/tools/aws/bin/aws
AWSCLI_VERSION := 1.45.11

export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
export HF_HUB_OFFLINE := 1
export WANDB_MODE := disabled
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: help setup demo test lint bench soak clean lock format aws

help: ## What can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY) ## Install everything into .venv

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, {sys.version.split()[0]} found; say make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv || { echo 'python3-venv is missing: apt-get install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: $(READY) ## The whole pipeline on the embedded demo world, then a summary
	$(BIN)/lacuna run --recipe demo --root $(ROOT)

test: $(READY) $(if $(shell command -v aws 2>/dev/null),,$(AWS)) ## All tests but the slow campaigns
	$(BIN)/python -m pytest -m 'not soak' --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15

aws: $(AWS) ## The AWS command line into var/tools/aws, for the test that consumes with nothing else

$(AWS):
	@{ $(PYTHON) -m venv var/tools/aws && var/tools/aws/bin/python -m pip install --quiet --disable-pip-version-check \
		awscli==$(AWSCLI_VERSION); } || { rm -rf var/tools/aws; echo 'awscli cannot be had: its test is skipped' >&2; }

lint: $(READY) ## ruff, pyright, import-linter, codespell
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell

soak: $(READY) ## Slow campaigns: random kills of the whole pipeline, and the like
	$(BIN)/python -m pytest -m soak -x

bench: $(READY) ## Speed against peers, in one run; prints tables
	for script in $$(grep -l '__main__' benchmarks/*.py); do $(BIN)/python $$script || exit 1; done

format: $(READY) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(READY) ## Pin the newest versions that pyproject.toml allows
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --generate-hashes --no-header \
		--no-annotate --quiet --upgrade --output-file requirements.lock

clean: ## Remove what the demo, the tests and the set-up made
	rm -rf var .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
