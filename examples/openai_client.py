"""Serve a recipe, and ask it with the official OpenAI client.

    pip install '.[serve]' openai
    python examples/openai_client.py

With a server that runs already (`proxytune serve my-recipe`), put its address where `serving` is called.
"""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.request import urlopen

from openai import OpenAI

RECIPE = "package:proxytune/smol"  # or a recipe of your own
PROMPT = "Good morrow,"


@contextlib.contextmanager
def serving(recipe: str) -> Iterator[str]:
    """Run `proxytune serve` and yield the address of its API."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "proxytune",
        "serve",
        recipe,
        "--port",
        str(port),
        "--name",
        "steered",
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


with serving(RECIPE) as url:
    client = OpenAI(base_url=url, api_key="none")
    print("models:", ", ".join(model.id for model in client.models.list()))

    for alpha in (0, 1.5):
        answer = client.completions.create(
            model="steered",
            prompt=PROMPT,
            max_tokens=24,
            temperature=0.7,
            seed=1,
            extra_body={"proxytune": {"alpha": alpha}},
        )
        print(f"--- alpha {alpha}\n{PROMPT}{answer.choices[0].text}")

    print("--- a chat, streamed")
    stream = client.chat.completions.create(
        model="steered",
        messages=[{"role": "user", "content": "What is a sonnet?"}],
        max_tokens=24,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
