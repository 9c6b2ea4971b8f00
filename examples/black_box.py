"""Steer a base that is behind an API: its weights are never seen, only some of its log-probabilities.

    pip install '.[serve]'
    python examples/black_box.py

The black box is this package's own server, with a recipe whose strength is 0, which is its base alone. Any
other OpenAI-compatible server that shows log-probabilities goes in its place; docs/guides/api.md lists them.
"""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from urllib.request import urlopen

from proxytune import ApiSettings, ModelSpec, ProxyTuned, Recipe, SamplingParams

RECIPE = "package:proxytune/smol"  # or a recipe of your own, whose base is to be behind the API
PROMPT = "Good morrow,"


@contextlib.contextmanager
def black_box(recipe: Recipe) -> Iterator[str]:
    """Serve the recipe's base and yield the address of its API."""
    unsteered = replace(recipe, experts=tuple(replace(e, alpha=0.0) for e in recipe.experts))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        unsteered.write(directory)
        command = [
            sys.executable,
            "-m",
            "proxytune",
            "serve",
            directory,
            "--port",
            str(port),
            "--name",
            "base",
        ]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            while server.poll() is None:
                with contextlib.suppress(OSError):
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait()


recipe = Recipe.read(RECIPE)
sampling = SamplingParams(max_new_tokens=24)
with black_box(recipe) as url:
    behind_api = replace(recipe, base=ModelSpec(model=url, api=ApiSettings(model="base")))
    steered = ProxyTuned.load(behind_api).generate(PROMPT, sampling)
in_process = ProxyTuned.load(recipe).generate(PROMPT, sampling)

print(f"--- the base behind an API\n{PROMPT}{steered.text}")
print(f"--- the base in this process\n{PROMPT}{in_process.text}")
certified = sum(bool(step.is_certified) for step in steered.steps)
print(
    f"\n{certified} of {len(steered.steps)} tokens are proved to be what all logits would have given"
)
if steered.usage is not None:
    print(f"{steered.usage.num_calls} calls")
