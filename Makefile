# Everyday commands. `make` alone lists them, and .ci/run calls the same ones.
#
#     make test ARGS="-k steer"        arguments for the command behind a target
#     make setup PYTHON=python3.12     another interpreter

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INPUTS := pyproject.toml constraints.txt scripts/set_up.sh
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-transformers-5.19 check format bench miniature zoo clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z][^ ]*:.*## / {printf "  make %-24s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: .venv/.installed ## Install everything into .venv (the other commands do it when needed)

demo: setup ## Steer a real model with real experts and print base and steered side by side
	$(BIN)/proxytune demo $(ARGS)

test: setup ## Run the tests
	$(BIN)/python -m pytest $(ARGS)

test-transformers-5.19: .venv-tf519/.installed ## Run the quick tests with the oldest transformers that is supported
	.venv-tf519/bin/python -m pytest -m "not slow and not network and not gpu" $(ARGS)

check: setup ## Check format, lint, types and docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_docs.py

format: setup ## Format the code, mend what the linter can, write docs/reference
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python scripts/check_docs.py --write

bench: setup ## Measure speed: base alone, plain, speculative, and the published procedure
	$(BIN)/python benchmarks/speed.py $(ARGS)

miniature: setup ## The paper's question on small models: expert, steered base, directly tuned base
	$(BIN)/python benchmarks/miniature $(ARGS)

zoo: setup ## Train the smol family again (hours on two cores; see zoo/README.md)
	$(BIN)/python zoo/remake.py $(ARGS)

clean: ## Remove caches and build outputs (.venv and zoo/build stay)
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests scripts benchmarks zoo -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: $(INPUTS)
	scripts/set_up.sh .venv

.venv-tf519/.installed: $(INPUTS)
	scripts/set_up.sh .venv-tf519 transformers==5.19.0
