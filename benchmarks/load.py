"""The HTTP server under load: throughput by clients, waiting times, mixes of experts, and a stress test.

    python benchmarks/load.py             about half an hour on two cores
    python benchmarks/load.py --smoke     a few minutes; shows only that it runs
    python benchmarks/load.py --part vanishing     measures one part again

`proxytune serve` runs in separate processes, once plain and once with --speculative; clients are threads of
this process that read streams. Everything compared alternates in every round, and medians of ratios within
rounds are reported. Then sixteen clients send two thousand requests of all kinds and abandon a third of them.
The other answers are compared with what the library generates for each request alone.

Writes `docs/performance/load.json` and `load.png` (a smoke run into `benchmarks/build/load/`).
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import queue
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Python puts the folder that it runs here.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.checkout import commit  # noqa: E402
from benchmarks.miniature.plan import BUILD_DIR, ROOT  # noqa: E402
from benchmarks.miniature.run import tell  # noqa: E402
from proxytune.files import write_whole  # noqa: E402
from proxytune.machine import description  # noqa: E402
from proxytune.model import ProxyTuned  # noqa: E402
from proxytune.recipe.recipe import Recipe  # noqa: E402
from proxytune.request import Request, SamplingParams  # noqa: E402

PUBLISHED = ROOT / "docs" / "performance"
SMOL = "package:proxytune/smol"
CLIENTS = (1, 2, 4, 8, 16)
MIXES = ("one expert", "an expert each", "half at alpha 0")
MIXED_CLIENTS = 8
NUM_PROMPT_CHARS = 160
GOAL = 2.5
"""Throughput that eight clients should have, as a multiple of one client's."""
ASKED_EVERY_S = 0.02
MAX_GROWTH = 32 * 2**20
"""Bytes by which the server's memory may grow from the stress test's first quarter to its end."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    num_each: int
    """Number of requests per client and round."""
    clients: tuple[int, ...]
    num_new: int
    num_hammered: int
    pool_size: int
    num_vanished: int


FULL = Plan(5, 2, CLIENTS, 48, 2000, 80, 20)
SMOKE = Plan(1, 1, (1, 8), 16, 64, 6, 3)


# The server -----------------------------------------------------------------------------------------


@dataclass
class Server:
    """A running `proxytune serve`."""

    process: subprocess.Popen[str]
    port: int
    name: str

    def memory(self) -> int:
        """Return the bytes of memory that it uses."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found is not None
        return int(found[1]) * 1024

    def metrics(self) -> dict[str, float]:
        """Return its metrics."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        found = self.metrics()
        return found["proxytune_running"] == found["proxytune_waiting"] == 0


@contextmanager
def serving(recipe: str, *options: str) -> Iterator[Server]:
    """Run a server on a free port, and stop it as Ctrl-C would."""
    start = "import sys; from proxytune.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "serve", recipe, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"^(\S+) is served at http://127\.0\.0\.1:(\d+)/", line):
            break
    else:
        raise SystemExit(f"the server did not start:\n{''.join(said)}")
    # Keep the server's log from filling the pipe.
    threading.Thread(target=process.stderr.read, daemon=True).start()
    server = Server(process, int(found[2]), found[1])
    try:
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError):
                server.metrics()
                break
            if time.monotonic() > deadline:
                raise SystemExit("the server does not answer")
            time.sleep(0.1)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


# Clients --------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What one streamed request received, and when."""

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int = 0
    sent: float = 0.0
    pieces: list[float] = field(default_factory=list)


def stream(server: Server, body: Mapping[str, Any]) -> Told:
    """Send a request and read its stream to the end."""
    told = Told(sent=time.perf_counter())
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps({"model": server.name, **body, **options})
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.read().decode()}")
    is_whole = False
    for line in answer:
        is_whole = is_whole or line.startswith(b"data: [DONE]")
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise RuntimeError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            told.text += choice["text"]
            told.finish_reason = choice["finish_reason"] or told.finish_reason
            told.pieces.append(time.perf_counter())
        if chunk.get("usage"):
            told.num_tokens = chunk["usage"]["completion_tokens"]
    connection.close()
    if not is_whole:
        raise RuntimeError("the stream was cut off")
    return told


def together(server: Server, bodies: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Let each client send its requests one after another; return throughput and waiting times."""
    found: list[Told] = []
    errors: list[Exception] = []

    def work(own: Sequence[Mapping[str, Any]]) -> None:
        try:
            for body in own:
                found.append(stream(server, body))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in bodies]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    gaps = [b - a for told in found for a, b in itertools.pairwise(told.pieces)]
    return {
        "seconds": seconds,
        "num_tokens": sum(told.num_tokens for told in found),
        "tokens_per_s": sum(told.num_tokens for told in found) / seconds,
        "first_token_s": [told.pieces[0] - told.sent for told in found],
        "gap_s": gaps,
    }


class Texts:
    """Prompts from held-out texts of the experts' domains.

    Args:
        recipe: The recipe whose experts' domains are used.
        rng: Draws the texts.
    """

    def __init__(self, recipe: Recipe, rng: random.Random) -> None:
        self._rng = rng
        self.experts = [expert.name for expert in recipe.experts]
        folder = Path(recipe.directory) / "heldout"
        self._texts = {
            name: (folder / f"{name}.txt").read_text("utf-8")
            for name in self.experts
            if (folder / f"{name}.txt").exists()
        }

    def prompt(self, expert: str) -> str:
        """Return some text of an expert's domain, cut at a space."""
        text = self._texts.get(expert) or next(iter(self._texts.values()))
        start = text.index(" ", self._rng.randrange(len(text) - 2 * NUM_PROMPT_CHARS)) + 1
        return text[start : start + NUM_PROMPT_CHARS].rsplit(" ", 1)[0]


def bodies_of(texts: Texts, mix: str, num_clients: int, plan: Plan) -> list[list[Any]]:
    """Return what each client sends."""
    found = []
    for client in range(num_clients):
        expert = texts.experts[client % len(texts.experts) if mix == "an expert each" else 0]
        steering: dict[str, Any] = {"expert": expert}
        if mix == "half at alpha 0" and client % 2:
            steering["alpha"] = 0
        body = {"temperature": 0, "ignore_eos": True, "proxytune": steering}
        body["max_tokens"] = plan.num_new
        found.append([body | {"prompt": texts.prompt(expert)} for _ in range(plan.num_each)])
    return found


# Throughput -----------------------------------------------------------------------------------------


def measure(servers: Mapping[str, Server], texts: Texts, plan: Plan) -> list[dict[str, Any]]:
    """Measure every setting in every round; return them with the figures of each round."""
    settings = [(kind, "one expert", num) for num in plan.clients for kind in servers]
    settings += [(kind, mix, MIXED_CLIENTS) for mix in MIXES[1:] for kind in servers]
    rows: dict[Any, list[dict[str, Any]]] = {setting: [] for setting in settings}
    for server in servers.values():
        together(
            server, bodies_of(texts, MIXES[1], MIXED_CLIENTS, plan)
        )  # Warm up: the first requests are slower.
    for number in range(plan.rounds):
        prompts: dict[Any, Any] = {}
        # In reverse order in every second round.
        for setting in settings if number % 2 == 0 else settings[::-1]:
            kind, mix, num_clients = setting
            if (mix, num_clients) not in prompts:
                prompts[mix, num_clients] = bodies_of(texts, mix, num_clients, plan)
            one = together(servers[kind], prompts[mix, num_clients])
            rows[setting].append(one)
            tell(
                f"    round {number + 1}: {kind}, {mix}, {num_clients} clients: "
                f"{one['tokens_per_s']:.1f} tokens/s"
            )
    found = []
    for (kind, mix, num_clients), rounds in rows.items():
        alone = [one["tokens_per_s"] for one in rows[kind, "one expert", 1]]
        plain = [one["tokens_per_s"] for one in rows["plain", mix, num_clients]]
        speeds = [one["tokens_per_s"] for one in rounds]
        found.append(
            {
                "server": kind,
                "mix": mix,
                "num_clients": num_clients,
                "tokens_per_s": spread(speeds),
                "of_one_client": spread([a / b for a, b in zip(speeds, alone, strict=True)]),
                "of_plain": spread([a / b for a, b in zip(speeds, plain, strict=True)]),
                "first_token_s": percentiles([s for one in rounds for s in one["first_token_s"]]),
                "gap_s": percentiles([s for one in rounds for s in one["gap_s"]]),
                "num_tokens": sum(one["num_tokens"] for one in rounds),
            }
        )
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the 50th and 95th percentile."""
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
    }


# Clients that go away -------------------------------------------------------------------------------


def send_and_go(server: Server, body: Mapping[str, Any], *, after_s: float) -> None:
    """Send a request and close the connection after a while, read or not."""
    data = json.dumps({"model": server.name, **body}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        connection.sendall(head.encode() + data)
        time.sleep(after_s)


def measure_vanishing(server: Server, texts: Texts, plan: Plan) -> dict[str, Any]:
    """Return how many steps pass, seen from outside, until a vanished client's row is free.

    The cost of asking (a request for the metrics every `ASKED_EVERY_S`) is included. Asking without a pause
    would take so much of two cores that the current step would take three times as long.
    """
    body = bodies_of(texts, MIXES[0], 1, plan)[0][0] | {"max_tokens": 400}
    step_s = together(server, [[body | {"max_tokens": 64}]])["gap_s"]
    waits = []
    for number in range(plan.num_vanished):
        is_streamed = {"stream": number % 2 == 0}
        send_and_go(server, body | is_streamed, after_s=0.5 + 0.01 * number)
        started = time.perf_counter()
        while server.metrics()["proxytune_running"]:
            time.sleep(ASKED_EVERY_S)
        waits.append(time.perf_counter() - started)
    step = statistics.median(step_s)
    return {
        "step_s": step,
        "freed_s": percentiles(waits),
        "in_steps": percentiles([wait / step for wait in waits]) | {"max": max(waits) / step},
    }


@dataclass(frozen=True)
class Wanted:
    """A request, and what the library generates for it alone."""

    body: dict[str, Any]
    text: str


def drawn(texts: Texts, model: ProxyTuned, rng: random.Random) -> Wanted:
    """Return a request of any kind whose answer can be reproduced."""
    names = rng.sample(texts.experts, 2)
    experts: Any = rng.choice((names[0], names[0], {names[0]: 0.6, names[1]: -0.3}))
    alpha = None if isinstance(experts, dict) else rng.choice((None, 0.0, 0.5, 1.2))
    num_new = rng.randint(1, 20)
    fields: dict[str, Any] = {"temperature": 0.0}
    if rng.random() < 0.6:
        fields = {"temperature": rng.choice((0.5, 1.0)), "seed": rng.randrange(2**40)}
        fields |= rng.choice(({}, {"top_p": 0.9}, {"top_k": 20}))
    prompt = texts.prompt(names[0])
    sampling = SamplingParams(max_new_tokens=num_new, **fields)
    text = model.generate(Request(prompt, sampling, alpha, experts)).text
    steering = {"experts": experts} if isinstance(experts, dict) else {"expert": experts}
    if alpha is not None:
        steering["alpha"] = alpha
    return Wanted({"prompt": prompt, "max_tokens": num_new, "proxytune": steering} | fields, text)


def hammer(server: Server, pool: Sequence[Wanted], num_requests: int) -> dict[str, Any]:
    """Send requests from sixteen clients, which abandon a third of them; watch the server's memory."""
    rng = random.Random(1)
    todo: queue.SimpleQueue[tuple[Wanted, bool, float | None]] = queue.SimpleQueue()
    for _ in range(num_requests):
        after_s = rng.uniform(0, 1.0) if rng.random() < 1 / 3 else None
        todo.put((rng.choice(pool), rng.random() < 0.5, after_s))
    done: Counter[str] = Counter()
    parted: list[tuple[str, str]] = []
    failed: list[str] = []
    curve: list[tuple[int, int]] = []
    lock = threading.Lock()

    def one(wanted: Wanted, is_streamed: bool, after_s: float | None) -> str:
        if after_s is not None:
            send_and_go(server, wanted.body | {"stream": is_streamed}, after_s=after_s)
            return "gone"
        if is_streamed:
            text = stream(server, wanted.body).text
        else:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
            data = json.dumps({"model": server.name, **wanted.body})
            kind = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", data, kind)
            answer = connection.getresponse()
            content = answer.read().decode()
            connection.close()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {content}")
            text = json.loads(content)["choices"][0]["text"]
        if text == wanted.text:
            return "identical"
        parted.append((wanted.text, text))
        return "parted"

    def work() -> None:
        while True:
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                kind = one(*item)
            except Exception as error:
                failed.append(str(error))
                kind = "failed"
            with lock:
                done[kind] += 1
                number = sum(done.values())
                if number % max(1, num_requests // 100) == 0:
                    curve.append((number, server.memory()))
                if number % (num_requests // 10) == 0:
                    tell(f"    {number} requests: {dict(done)}")

    started = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    deadline = time.monotonic() + 30
    while not server.is_idle() and time.monotonic() < deadline:
        time.sleep(0.05)
    quarter = next(memory for number, memory in curve if number >= num_requests // 4)
    others = {wanted.text for wanted in pool if len(wanted.text) > 8}
    return {
        "num_requests": num_requests,
        "seconds": seconds,
        "done": dict(done),
        "failed": failed[:10],
        # Rounding differs with the number of rows, so texts may differ after two nearly tied tokens.
        "parted": parted[:10],
        "num_mixed_up": sum(
            any(text.startswith(other) for other in others - {own}) for own, text in parted
        ),
        "is_idle_after": server.is_idle(),
        "memory_curve": curve,
        "growth_bytes": curve[-1][1] - quarter,
    }


# What is written ------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """Return the measurements as text."""

    def shown(value: Mapping[str, float]) -> str:
        return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"

    def times(value: Mapping[str, float]) -> str:
        return f"{1e3 * value['p50']:.0f} / {1e3 * value['p95']:.0f}"

    heads = ("server", "mix", "clients", "tokens/s", "of one client", "of plain",
             "first token, ms, p50 / p95", "between tokens, ms, p50 / p95")  # fmt: skip
    rows = [heads] + [
        (
            row["server"], row["mix"], str(row["num_clients"]), shown(row["tokens_per_s"]),
            shown(row["of_one_client"]), shown(row["of_plain"]), times(row["first_token_s"]),
            times(row["gap_s"]),
        )
        for row in results["parts"]["load"]["found"]
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    freed, hammered = (
        results["parts"]["vanishing"]["found"]["in_steps"],
        results["parts"]["hammer"]["found"],
    )
    lines += [
        "",
        f"freed after a client went: {freed['p50']:.2f} steps in the median, {freed['max']:.2f} at most",
        f"hammer: {hammered['num_requests']} requests in {hammered['seconds']:.0f} s, {hammered['done']}, "
        f"{hammered['num_mixed_up']} mixed up; memory grew by {hammered['growth_bytes'] / 2**20:.1f} MiB "
        "after the first quarter",
    ]
    return "\n".join(lines)


def page_table(results: Mapping[str, Any]) -> str:
    """Return the throughput of the plain server as the table of docs/performance.md."""
    lines = [
        "| clients | tokens/s | of one client | first token, ms, median / 95 % "
        "| between tokens, ms, median / 95 % | with drafts, of without |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]

    def ratio(value: Mapping[str, float]) -> str:
        return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"

    rows = {
        (row["server"], row["mix"], row["num_clients"]): row
        for row in results["parts"]["load"]["found"]
    }
    for (server, mix, clients), row in rows.items():
        if server != "plain":
            continue
        waits = (
            " / ".join(f"{1e3 * row[key][part]:.0f}" for part in ("p50", "p95"))
            for key in ("first_token_s", "gap_s")
        )
        cells = (
            str(clients) if mix == MIXES[0] else f"{clients}, {mix}",
            f"{row['tokens_per_s']['median']:.1f}",
            ratio(row["of_one_client"]),
            *waits,
            ratio(rows["speculative", mix, clients]["of_plain"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw throughput and waiting times by clients, and the server's memory in the stress test."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speeds, waits, memory) = pyplot.subplots(1, 3, figsize=(13, 3.8))
    for kind, colour, mark in (("plain", "tab:blue", "o-"), ("speculative", "tab:orange", "s--")):
        rows = [
            row
            for row in results["parts"]["load"]["found"]
            if row["server"] == kind and row["mix"] == "one expert"
        ]
        clients = [row["num_clients"] for row in rows]
        values = [row["tokens_per_s"] for row in rows]
        errors = [
            [value["median"] - value["low"] for value in values],
            [value["high"] - value["median"] for value in values],
        ]
        speeds.errorbar(
            clients, [value["median"] for value in values], errors, fmt=mark, color=colour,
            label=kind, capsize=3,
        )  # fmt: skip
        for name, style in (("p50", "-"), ("p95", ":")):
            waits.plot(
                clients, [1e3 * row["gap_s"][name] for row in rows], style, marker=mark[0],
                color=colour, label=f"{kind}, {name}",
            )  # fmt: skip
    speeds.set(xlabel="clients", ylabel="tokens per second", ylim=(0, None))
    waits.set(xlabel="clients", ylabel="between tokens, ms", ylim=(0, None))
    for axes in (speeds, waits):
        axes.set_xticks(sorted({row["num_clients"] for row in results["parts"]["load"]["found"]}))
        axes.legend(frameon=False)
    numbers, held = zip(*results["parts"]["hammer"]["found"]["memory_curve"], strict=True)
    memory.plot(numbers, [value / 2**20 for value in held], color="tab:green")
    memory.set(xlabel="requests of the hammer", ylabel="the server's memory, MiB", ylim=(0, None))
    for axes in (speeds, waits, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run the command; returns its exit code, 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a little of everything")
    parser.add_argument(
        "--part", choices=("load", "vanishing", "hammer"), help="measure this again, keep the rest"
    )
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    parser.add_argument("--recipe", default=SMOL, help="another recipe than the smol family")
    arguments = parser.parse_args()
    if arguments.table:
        print(page_table(json.loads((PUBLISHED / "load.json").read_text())))
        return 0
    if not sys.platform.startswith("linux"):
        raise SystemExit("the server's memory is read from /proc, which only Linux has")
    plan = SMOKE if arguments.smoke else FULL
    is_published = not arguments.smoke and arguments.recipe == SMOL
    folder = PUBLISHED if is_published else BUILD_DIR / "load"
    parts = {}
    if arguments.part is not None:
        parts = json.loads((folder / "load.json").read_text())["parts"]
    recipe = Recipe.read(arguments.recipe)
    texts = Texts(recipe, random.Random(0))
    tell("    what the library generates")
    model = ProxyTuned.load(recipe)
    rng = random.Random(0)
    pool = [drawn(texts, model, rng) for _ in range(plan.pool_size)]
    del model
    options = ("--max-rows", "16")
    with (
        serving(arguments.recipe, *options) as plain,
        serving(arguments.recipe, *options, "--speculative") as speculative,
    ):
        for part, measured in (
            ("load", lambda: measure({"plain": plain, "speculative": speculative}, texts, plan)),
            ("vanishing", lambda: measure_vanishing(plain, texts, plan)),
            ("hammer", lambda: hammer(plain, pool, plan.num_hammered)),
        ):
            if arguments.part in (None, part):
                origin = {
                    "commit": commit(),
                    "machine": description(),
                    "load_average": os.getloadavg(),
                }
                parts[part] = origin | {"found": measured()}
    results = {
        "command": "python benchmarks/load.py"
        + (" --smoke" if arguments.smoke else "")
        + (f" --recipe {arguments.recipe}" if arguments.recipe != SMOL else ""),
        "serve_options": " ".join(options),
        "num_new": plan.num_new,
        "rounds": plan.rounds,
        "parts": parts,
    }
    write_whole(folder / "load.json", json.dumps(results, indent=1) + "\n")
    plot(results, folder / "load.png")
    print(table(results))
    tell(f"written to {folder}")
    load, vanishing, hammered = (parts[part]["found"] for part in ("load", "vanishing", "hammer"))
    eight = next(
        row["of_one_client"]["median"]
        for row in load
        if (row["server"], row["mix"], row["num_clients"]) == ("plain", "one expert", 8)
    )
    misses = [
        (hammered["done"].get("failed", 0) > 0, f"requests failed: {hammered['failed']}"),
        (hammered["num_mixed_up"] > 0, "texts were mixed up"),
        (not hammered["is_idle_after"], "texts still run when nobody waits for any"),
    ]
    if not arguments.smoke:  # A smoke run ends before caches are full and speeds settle.
        misses += [
            (eight < GOAL, f"eight clients have {eight:.2f} times the throughput of one"),
            (hammered["growth_bytes"] > MAX_GROWTH, "the server's memory grew"),
            (vanishing["in_steps"]["p95"] >= 2, "places of clients that went were kept too long"),
        ]
    for is_missed, what in misses:
        if is_missed:
            tell(f"missed: {what}")
    return int(any(is_missed for is_missed, _ in misses))


if __name__ == "__main__":
    sys.exit(main())
