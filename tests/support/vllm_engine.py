"""A vLLM engine in a process of its own, its answers, and how they compare with the library's.

`Engine` starts `python -m tests.support.vllm_engine RECIPE OPTIONS`, which answers lines of JSON on stdin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TIE = 1e-3
ROUNDING = 1e-4
"""Most that the logprob of one token differs by in float32; 3e-5 was seen."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Runs all of vLLM in one process, which starts more quickly."""
SECOND_RUNNER = IN_PROCESS | {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
"""Runs vLLM's second model runner on a CPU, its Triton kernels in Triton's interpreter: in the process where
`interpret_triton` has run."""


class Engine:
    """A vLLM engine in a process of its own, so that one test's is gone when the next one starts.

    Args:
        model: The recipe's directory.
        environment: Variables beside those of this process.
        options: Of vLLM's `LLM`.
    """

    def __init__(
        self, model: Path, *, environment: dict[str, str] | None = None, **options: Any
    ) -> None:
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256} | options
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.vllm_engine", str(model), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return vLLM's answers to requests sent at once, or `error` and `kind`.

        Each answer has `token_ids`, `text`, `logprobs` by position and `finish_reason` of its first sample,
        the same of all in `samples`, `prompt_logprobs` and `num_cached_tokens`; and `vllm`, its version, and
        `is_second_runner`.

        Args:
            requests: Fields of `SamplingParams`, of which `structured_outputs` is an object, and `prompt`.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                answer: list[dict[str, Any]] = json.loads(line.removeprefix("ANSWER "))
                return answer
        raise RuntimeError("the engine ended; its output is above")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def compare(answers: list[dict[str, Any]], traces: list[Any], *, rounding: float = ROUNDING) -> int:
    """Return how many texts part at a tie; fail if one parts elsewhere, or a logprob differs by more."""
    ties = 0
    for answer, trace in zip(answers, traces, strict=True):
        assert "error" not in answer, answer
        for place, step in enumerate(trace.steps):
            shown = {int(k): v for k, v in answer["logprobs"][place].items()}
            chosen = answer["token_ids"][place]
            if chosen != step.token_id:
                # A tie on both paths: the library's two best tokens, and vLLM's.
                gap = step.top[0][1] - step.top[1][1]
                assert gap < TIE, (trace.text, place, gap)
                best = sorted(shown.values(), reverse=True)
                assert best[0] - best[1] < TIE, (trace.text, place, best)
                ties += 1
                break
            assert shown[chosen] == pytest.approx(step.logprob, abs=rounding), (trace.text, place)
        else:
            assert len(answer["token_ids"]) == trace.num_new_tokens, trace.text
    return ties


def interpret_triton() -> None:
    """Have vLLM use Triton on a CPU; with TRITON_INTERPRET=1, kernels run in Triton's interpreter.

    vLLM looks for the backend of triton-cpu, which is built from source. The interpreter needs no backend.
    It keeps some masks (of the kernels for grammars and n-grams) as integers, which its own loads refuse.
    """
    from triton.backends import backends
    from triton.runtime.interpreter import InterpreterBuilder

    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)  # type: ignore[assignment]
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def with_bits(mask: Any) -> Any:
        return SimpleNamespace(data=mask.data.astype(bool))

    InterpreterBuilder.create_masked_load = lambda self, pointers, mask, *rest: load(
        self, pointers, with_bits(mask), *rest
    )
    InterpreterBuilder.create_masked_store = lambda self, pointers, value, mask, *rest: store(
        self, pointers, value, with_bits(mask), *rest
    )


def _shown(places: Any) -> list[dict[str, float] | None]:
    """Return logprobs by position as JSON holds them."""
    return [
        None if place is None else {str(token): entry.logprob for token, entry in place.items()}
        for place in places or []
    ]


def answer(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams
    from vllm import __version__ as version
    from vllm.sampling_params import StructuredOutputsParams

    prompts = [request.pop("prompt") for request in requests]
    prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
    try:
        for request in requests:
            if "structured_outputs" in request:
                request["structured_outputs"] = StructuredOutputsParams(
                    **request["structured_outputs"]
                )
        params = [SamplingParams(**{"temperature": 0} | request) for request in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    except Exception as error:
        return [{"error": str(error), "kind": type(error).__name__} for _ in requests]
    engine = {
        "vllm": version,
        "is_second_runner": llm.llm_engine.vllm_config.use_v2_model_runner,
    }
    answers = []
    for output in outputs:
        samples = [
            {
                "token_ids": list(sample.token_ids),
                "text": sample.text,
                "logprobs": _shown(sample.logprobs),
                "finish_reason": sample.finish_reason,
            }
            for sample in output.outputs
        ]
        own = {
            "samples": samples,
            "prompt_logprobs": _shown(output.prompt_logprobs),
            "num_cached_tokens": output.num_cached_tokens,
        }
        answers.append(samples[0] | own | engine)
    return answers


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpret_triton()
    from vllm import LLM

    llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
    for line in sys.stdin:
        print("ANSWER", json.dumps(answer(llm, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
