"""A vLLM engine that answers lines of JSON on stdin: `python -m tests.support.vllm_engine RECIPE OPTIONS`."""

from __future__ import annotations

import json
import sys
from typing import Any


def answer(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    prompts = [request.pop("prompt") for request in requests]
    params = [SamplingParams(temperature=0, **request) for request in requests]
    try:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    except Exception as error:
        return [{"error": str(error), "kind": type(error).__name__} for _ in requests]
    answers = []
    for output in outputs:
        completion = output.outputs[0]
        shown = [
            {str(token): entry.logprob for token, entry in place.items()}
            for place in completion.logprobs or []
        ]
        answers.append(
            {
                "token_ids": list(completion.token_ids),
                "logprobs": shown,
                "finish_reason": completion.finish_reason,
            }
        )
    return answers


def main() -> None:
    from vllm import LLM

    llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
    for line in sys.stdin:
        print("ANSWER", json.dumps(answer(llm, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
