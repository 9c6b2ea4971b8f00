"""How many calls a base behind an API costs, and what its answers prove.

    make bench-api        about ten minutes, in the environment of `make test-vllm`

vLLM serves SmolLM2-135M-Instruct in float32 on this machine; 50 prompts from held-out text of two domains are
continued greedily, each steered by its domain's expert. Three procedures are compared: one call per token;
stretches of the base's own continuation; the expert's drafts, which the server scores. Their texts are
compared with those of the same models in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.decode.speculative import Drafting
from proxytune.machine import summary
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ApiSettings, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.trace import Usage

ROOT = Path(__file__).parents[1]
DOMAINS = {"tinyshakespeare": "tinyshakespeare", "legal": "legal"}
PROMPT_TOKENS = 24
PORT = 8765

PROCEDURES: tuple[tuple[str, int, int | None, Drafting | bool], ...] = (
    ("one call a token", 100, 1, False),
    ("stretches", 5, None, False),
    ("stretches", 20, None, False),
    ("stretches", 100, None, False),
    ("expert's drafts of 4", 100, 1, Drafting(4, "expert", is_adaptive=False)),
    ("whoever was right more often", 100, None, True),
)
"""Name, logprobs shown, tokens looked ahead (None adapts), and the source of drafts."""


@contextmanager
def vllm(recipe: Recipe) -> Iterator[str]:
    """Serve the recipe's base and yield the API's address."""
    files = find_checkpoint(recipe.base.model or "", root=recipe.directory)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(files.weights_path()), "--served-model-name", "smollm2"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--max-logprobs", "-1", "--host", "127.0.0.1", "--port", str(PORT)]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    url = f"http://127.0.0.1:{PORT}/v1"
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/models", timeout=2).close()
                break
            if server.poll() is not None:
                raise SystemExit("vLLM did not start; run the command by hand to see why")
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def prompts(model: ProxyTuned, number: int, length: int) -> list[Request]:
    """Return prompts cut from held-out text at even intervals, half of them from each domain."""
    sampling = SamplingParams(max_new_tokens=length, logprobs=2)
    found = []
    for name in DOMAINS:
        folder = resources.files("proxytune") / "smol" / "heldout"
        text = (folder / f"{DOMAINS[name]}.txt").read_text(encoding="utf-8")
        ids = list(model.tokenizer.encode(text))
        each = number // len(DOMAINS)
        step = (len(ids) - PROMPT_TOKENS) // each
        for place in range(each):
            cut = ids[place * step : place * step + PROMPT_TOKENS]
            found.append(Request(cut, sampling, None, name))
    return found


def main() -> int:
    """Measure, write JSON and print a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance" / "api.json")
    options = parser.parse_args()
    recipe = Recipe.read("package:proxytune/smol")
    recipe = replace(recipe, experts=tuple(e for e in recipe.experts if e.name in DOMAINS))
    local = ProxyTuned.load(recipe)
    requests = prompts(local, options.prompts, options.tokens)
    started = time.perf_counter()
    wanted = local.generate_batch(requests, batch_size=1)
    in_process_s = time.perf_counter() - started
    rows: list[dict[str, Any]] = []
    with vllm(recipe) as url:
        for name, top_logprobs, lookahead, speculative in PROCEDURES:
            print(f"{name}, {top_logprobs} logprobs", file=sys.stderr)
            settings = ApiSettings(top_logprobs=top_logprobs, lookahead=lookahead)
            model = ProxyTuned.load(replace(recipe, base=ModelSpec(model=url, api=settings)))
            backend: Any = model.ensemble.members[0].backend
            _ = backend.traits  # Calls that find out once what the server can do are not counted.
            started = time.perf_counter()
            traces = model.generate_batch(requests, batch_size=1, speculative=speculative)
            seconds = time.perf_counter() - started
            backend.close()
            usage = sum((trace.usage or Usage() for trace in traces), Usage())
            num_tokens = sum(trace.num_new_tokens for trace in traces)
            rows.append(
                {
                    "procedure": name,
                    "top_logprobs": top_logprobs,
                    "num_tokens": num_tokens,
                    "calls_per_token": usage.num_calls / num_tokens,
                    "base_tokens_per_token": usage.num_completion_tokens / num_tokens,
                    "certified": sum(trace.num_certified or 0 for trace in traces) / num_tokens,
                    "seconds_per_token": seconds / num_tokens,
                    "texts_as_in_process": sum(
                        one.token_ids == other.token_ids
                        for one, other in zip(traces, wanted, strict=True)
                    ),
                }
            )
    git = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    report = {
        "command": "python benchmarks/api_calls.py",
        "commit": git.stdout.strip(),
        "machine": summary(),
        "prompts": len(requests),
        "new_tokens": options.tokens,
        "in_process_seconds_per_token": in_process_s / sum(t.num_new_tokens for t in wanted),
        "rows": rows,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        "| procedure | logprobs | calls a token | base tokens a token | certified | seconds a token | "
        "texts as in process |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['procedure']} | {row['top_logprobs']} | {row['calls_per_token']:.2f} | "
            f"{row['base_tokens_per_token']:.2f} | {100 * row['certified']:.1f} % | "
            f"{row['seconds_per_token']:.3f} | {row['texts_as_in_process']} of {len(requests)} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
