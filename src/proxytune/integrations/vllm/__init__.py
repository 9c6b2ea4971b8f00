"""A recipe inside vLLM: continuous batching, paged KV cache, tensor parallelism, a strength per request.

    LLM("my-recipe", dtype="float32")
    vllm serve my-recipe

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes.
`config.py` makes vLLM's config from a recipe and refuses what vLLM cannot honour. `weights.py` reads the
models' weights and merges adapters. `request.py` reads what a request asks for, and `processor.py` keeps it
with its row. `model.py` is the ensemble as one model of vLLM, `draft.py` an expert as a draft model, and
`server.py` the command that starts vLLM's server. `engine.py` is vLLM for the commands that answer files and
score texts; `worker.py` and `parent.py` are its part of vLLM's processes.

They are registered through vLLM's documented interfaces for plugins: `ModelRegistry.register_model`,
`register_model_loader`, and the entry point `vllm.logits_processors`.
"""

from __future__ import annotations


def register() -> None:
    """Register recipes with vLLM. It may be called more than once."""
    from proxytune.integrations.vllm.config import register_config
    from proxytune.integrations.vllm.parent import watch_parent
    from proxytune.integrations.vllm.weights import register_loader

    watch_parent()
    register_config()
    register_loader()
