"""What the command `llm` does with models that its extra-openai-models.yaml names."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from things import ADDRESS, EXPERT, MODEL, TEXT, run

_folder = Path(tempfile.mkdtemp())
(_folder / "extra-openai-models.yaml").write_text(
    f"""
- model_id: steered
  model_name: {MODEL}
  api_base: {ADDRESS}/v1
- model_id: expert
  model_name: "{EXPERT}"
  api_base: {ADDRESS}/v1
- model_id: steered-text
  model_name: {MODEL}
  api_base: {ADDRESS}/v1
  completion: true
"""
)


def _llm(*words):
    done = subprocess.run(
        [sys.executable, "-m", "llm", *words],
        env={**os.environ, "LLM_USER_PATH": str(_folder), "OPENAI_API_KEY": "none"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_FEW = ("-o", "max_tokens", "6", "-o", "temperature", "0")


def streamed_and_whole_prompt():
    streamed = _llm("-m", "steered", *_FEW, "Who are you?")
    assert streamed and streamed == _llm("-m", "steered", "--no-stream", *_FEW, "Who are you?")


def system_prompt_and_second_turn():
    _llm("-m", "steered", *_FEW, "-s", "Be brief.", "Who are you?")
    _llm("-c", *_FEW, "Go on.")


def expert_and_completion():
    assert _llm("-m", "expert", *_FEW, "Who are you?")
    assert _llm("-m", "steered-text", "-o", "max_tokens", "6", TEXT)


if __name__ == "__main__":
    run(globals())
