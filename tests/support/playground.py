"""A small server that speaks to the playground as `proxytune serve` does, and what tests do with the page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from proxytune.pages.policy import assemble
from tests.support.loopback import LoopbackServer, QuietHandler

PAGE = assemble("playground")

# How far steering moved the tokens of an answer, one after the other: every colour comes up.
MOVES = tuple(sign * math.log(f) for f in (1, 1.5, 4, 20) for sign in (1, -1))


def parts_of(tag: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, flags=re.DOTALL)


def policy() -> str:
    """Return the Content-Security-Policy that allows the page's own style and script, and nothing else."""
    allowed = {}
    for tag in ("style", "script"):
        (text,) = parts_of(tag)
        digest = hashlib.sha256(text.encode()).digest()
        allowed[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; style-src {allowed['style']}; script-src {allowed['script']}"
    )


def view(logprob: float, rank: int, *top: tuple[int, str, float]) -> dict[str, Any]:
    listed = [{"token_id": i, "token": text, "logprob": logprob} for i, text, logprob in top]
    return {"logprob": logprob, "rank": rank, "entropy": 1.5, "top": listed}


def token(
    index: int, text: str, *, shown: str | None = None, move: float = 0.0, experts: Sequence[str]
) -> dict[str, Any]:
    """Return what the server tells of one token, which steering made `exp(move)` times as likely."""
    token_id = 100 + zlib.crc32(text.encode()) % 40_000
    own, other = (token_id, text, -0.7), (7, " other", -0.9)
    steered = view(-0.7, 1, own, other)
    is_first = move <= 0.5
    at_base = -0.7 - move
    base = view(
        at_base,
        1 if is_first else 2,
        *sorted([(token_id, text, at_base), other], key=lambda t: -t[2]),
    )
    views = {"base": base, "steered": steered}
    for name in experts:
        views[f"{name}.expert"] = view(-0.4, 1, (token_id, text, -0.4), (8, " third", -2.0))
        views[f"{name}.anti_expert"] = view(-6.0, 57, (7, " other", -0.3), (8, " third", -2.0))
    return {
        "index": index,
        "token_id": token_id,
        "token": text,
        "text": text if shown is None else shown,
        "logprob": -0.7,
        "kl": 0.25,
        "views": views,
    }


@dataclass
class Script:
    """What the server answers: texts of tokens, or pairs of a token's text and what it adds to the answer."""

    base: Sequence[str | tuple[str, str]] = (" one", " two", " three.")
    steered: Sequence[str | tuple[str, str]] = (" one", " zwei", " drei", " vier.")
    pause_s: float = 0.0
    per_chunk: int = 1
    finish_reason: str = "length"
    fault: str | None = None


@dataclass
class Fake:
    """A server for the page: what it answers can be set, what it was asked is kept."""

    script: Script = field(default_factory=Script)
    key: str | None = None
    has_chat: bool = True
    has_turns: bool = True
    experts: tuple[str, ...] = ("shakespeare", "legal")
    default_experts: tuple[str, ...] = ()
    hides_base: bool = False  # as behind an API that shows no distribution
    thoughts: int = 0  # how many tokens of a chat's answer are reasoning
    asked: list[dict[str, Any]] = field(default_factory=list)
    num_left: int = 0
    refusals: list[tuple[int, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sides(self) -> dict[str, dict[str, Any]]:
        """Return the latest question for each side."""
        return {"base" if is_base(body) else "steered": body for body in self.asked}


def is_base(body: dict[str, Any]) -> bool:
    steering = body["proxytune"]
    strengths = steering["experts"].values() if "experts" in steering else [steering["alpha"]]
    return not any(strengths)


class FakeHandler(QuietHandler):
    """One connection of the page."""

    @property
    def fake(self) -> Fake:
        owner: Fake = self.server.owner
        return owner

    def refuse(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
        self.send(status, json.dumps({"error": error}).encode(), **headers)

    def has_key(self) -> bool:
        if self.fake.key in (None, self.headers.get("Authorization", "").removeprefix("Bearer ")):
            return True
        self.refuse(401, "Give the key as 'Authorization: Bearer KEY'.")
        return False

    def do_GET(self) -> None:
        if self.path == "/":
            self.send(
                200,
                PAGE.encode(),
                Content_Type="text/html; charset=utf-8",
                Content_Security_Policy=policy(),
            )
        elif self.path == "/v1/proxytune" and self.has_key():
            alphas = (1.0, 0.7, 0.5)
            about = {
                "name": "smol",
                "base": "SmolLM2-135M-Instruct",
                "has_chat": self.fake.has_chat,
                "has_turns": self.fake.has_turns,
                "default_experts": self.fake.default_experts or self.fake.experts[:1],
                "experts": [
                    {"name": name, "alpha": alphas[i % 3]}
                    for i, name in enumerate(self.fake.experts)
                ],
                "limits": {"max_tokens": 2048, "max_context": 2048, "max_explain_top": 20},
                "version": "0.1.0",
            }
            self.send(200, json.dumps(about).encode(), Content_Type="application/json")
        elif self.path != "/v1/proxytune":
            self.refuse(404, "There is no such page.")

    def do_POST(self) -> None:
        body = json.loads(self.read_body())
        if not self.has_key():
            return
        fake = self.fake
        with fake.lock:
            fake.asked.append(body)
            refusal = fake.refusals.pop(0) if fake.refusals else None
        if refusal:
            status, error, headers = refusal
            self.refuse(status, **error, **headers)
            return
        try:
            self.stream(body, fake.script)
        except OSError:
            with fake.lock:
                fake.num_left += 1

    def stream(self, body: dict[str, Any], script: Script) -> None:
        steering = body["proxytune"]
        experts = list(steering.get("experts") or [steering["expert"]])
        base = is_base(body)
        pieces = [
            (piece, piece) if isinstance(piece, str) else piece
            for piece in (script.base if base else script.steered)
        ]
        tokens = [
            token(i, text, shown=shown, move=0 if base else MOVES[i % len(MOVES)], experts=experts)
            for i, (text, shown) in enumerate(pieces)
        ]
        if script.fault == "nothing":
            self.end_with_reset()
            return
        if self.fake.hides_base:
            hidden = {"logprob": None, "rank": None, "entropy": None, "top": []}
            for each in tokens:
                each["kl"], each["views"]["base"], each["views"]["steered"] = None, hidden, hidden
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chunks = range(0, len(tokens), script.per_chunk)
        for start in chunks:
            some = tokens[start : start + script.per_chunk]
            text = "".join(t["text"] for t in some)
            reason = script.finish_reason if start == chunks[-1] else None
            if script.fault and start >= len(tokens) // 2:
                if script.fault == "error":
                    self.event({"error": {"message": "The model failed.", "type": "server_error"}})
                    self.send_chunk(b"")
                else:
                    self.end_with_reset()
                return
            choice: dict[str, Any] = {
                "index": 0,
                "finish_reason": reason,
                "proxytune": {"tokens": some},
            }
            is_thought = "messages" in body and start < self.fake.thoughts
            delta = {"reasoning_content" if is_thought else "content": text}
            choice |= {"delta": delta} if "messages" in body else {"text": text}
            self.event(
                {"id": "x", "object": "chunk", "created": 0, "model": "smol", "choices": [choice]}
            )
            time.sleep(script.pause_s)
        self.send_chunk(b"data: [DONE]\n\n")
        self.send_chunk(b"")

    def event(self, value: dict[str, Any]) -> None:
        self.send_chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def end_with_reset(self) -> None:
        self.wfile.flush()
        time.sleep(0.2)  # What was sent arrives first.
        self.close_connection = True
        self.server.end_with_reset(self.connection)


@contextmanager
def serve_fake() -> Iterator[Fake]:
    """Yield a server that runs."""
    owner = Fake()
    server = LoopbackServer(FakeHandler, owner)
    owner.url = f"http://127.0.0.1:{server.port}/"
    server.start()
    try:
        yield owner
    finally:
        server.stop()


def ready(page: Any, fake: Fake) -> None:
    page.goto(fake.url)
    page.wait_for_selector("#run:enabled")


def run(page: Any, prompt: str = "Count:") -> None:
    page.fill("#prompt", prompt)
    page.click("#run")
    settle(page)


def settle(page: Any) -> None:
    """Wait until both answers are there and drawn."""
    page.wait_for_selector("#run", state="visible")
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )


def answers(page: Any) -> list[str]:
    """Return the answers on the page, base and steered, the latest of each."""
    texts = [
        page.locator(f"#pane-{side} .flow:not([hidden]) .tokens").last.evaluate(
            "e => e.textContent"
        )
        for side in ("base", "steered")
    ]
    return [str(text) for text in texts]
