"""The speed of steering: real models for real acceptance rates, larger random models for cost alone.

    python benchmarks/speed.py             under ten minutes on two cores
    python benchmarks/speed.py --full      the paper's lengths, batch 32, all experts; an hour
    python benchmarks/speed.py --recipe DIR --device cuda      another recipe, for instance on a GPU

Writes `docs/performance/speed.json`, `tables.md` and `speed.png` (with `--recipe`, into `benchmarks/build/`).

The real family is SmolLM2-135M-Instruct with the smol experts. The random family is a Llama of 1.1B
parameters with a pair of 135M: the cost of its forwards is real, but its acceptance rate means nothing, so it
gives no speculative figures. A cost model shows which acceptance rate would be needed. What is timed and
compared is decided in `proxytune.evaluate.speed`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

# Python puts this script's folder first.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.checkout import commit  # noqa: E402
from benchmarks.miniature.plan import BUILD_DIR, ROOT  # noqa: E402
from benchmarks.miniature.run import tell  # noqa: E402
from proxytune.decode.batch import Batch  # noqa: E402
from proxytune.decode.ensemble import Ensemble, Job, Member, Pair  # noqa: E402
from proxytune.decode.speculative import best_plan  # noqa: E402
from proxytune.evaluate.speed import (  # noqa: E402
    PlainModels,
    Shape,
    load_plain_models,
    measure,
    published_procedure,
)
from proxytune.files import write_whole  # noqa: E402
from proxytune.machine import description  # noqa: E402
from proxytune.model import ProxyTuned  # noqa: E402
from proxytune.recipe.recipe import Recipe  # noqa: E402
from proxytune.request import SamplingParams  # noqa: E402

SMOL = "package:proxytune/smol"
QUICK = {
    # Expert, shape, temperature, rounds. The paper's (8, 512) is cut to 96 new tokens.
    "settings": [
        ("tinyshakespeare", Shape(64, 48), 0.0, 3),
        ("medical", Shape(64, 48), 0.0, 3),
        ("legal", Shape(64, 48), 0.0, 3),
        ("python", Shape(64, 48), 0.0, 3),
        ("medical", Shape(64, 48), 0.8, 3),
        ("medical", Shape(8, 96), 0.0, 2),
        ("medical", Shape(512, 8), 0.0, 2),
        ("medical", Shape(8, 8), 0.0, 5),
        ("medical", Shape(64, 24, 8), 0.0, 2),
    ],
    "random": [(8, 8, 1)],
}
PAPER = [
    # The paper's three shapes; 32 rows of 512 new tokens are in FULL.
    ("medical", Shape(8, 512), 0.0, 2),
    ("medical", Shape(8, 512, 8), 0.0, 1),
    ("medical", Shape(8, 128, 32), 0.0, 1),
    ("medical", Shape(512, 8), 0.0, 3),
    ("medical", Shape(512, 8, 8), 0.0, 2),
    ("medical", Shape(512, 8, 32), 0.0, 1),
    ("medical", Shape(8, 8), 0.0, 5),
    ("medical", Shape(8, 8, 8), 0.0, 3),
    ("medical", Shape(8, 8, 32), 0.0, 2),
]
FULL = {
    "settings": [
        *(
            (expert, Shape(64, 64), temperature, 5)
            for expert in ("tinyshakespeare", "medical", "legal", "python", "recipes", "instruct")
            for temperature in (0.0, 0.8)
        ),
        *(
            ("medical", Shape(*lengths, size), 0.0, 3)
            for lengths in ((8, 512), (512, 8), (8, 8))
            for size in (1, 8, 32)
        ),
    ],
    "random": [(8, 32, 1), (8, 8, 8)],
}


# Real models ----------------------------------------------------------------------------------------


def heldout(recipe: Recipe, expert: str) -> str | None:
    """Return held-out text of an expert's domain, if the recipe has any."""
    path = Path(recipe.directory) / "heldout" / f"{expert}.txt"
    return path.read_text("utf-8") if path.exists() else None


def measure_real(
    recipe: Recipe, model: ProxyTuned, settings: Sequence[tuple[str, Shape, float, int]]
) -> list[dict[str, Any]]:
    """Measure every setting of a family."""
    plain: dict[str, PlainModels] = {}
    rows = []
    for expert, shape, temperature, rounds in settings:
        plain_models = plain.setdefault(expert, load_plain_models(recipe, expert))
        text = heldout(recipe, expert)
        one = measure(
            model,
            shape,
            expert=expert,
            plain_models=plain_models,
            temperature=temperature,
            rounds=rounds,
            **({"text": text} if text else {}),
            say=lambda line, expert=expert: tell(f"    {expert}, {line}"),
        )
        rows.append({"rounds": rounds, **one.to_dict()})
        plain = {expert: plain_models}
    return rows


MEMORY = """
import json, re, sys, torch
import proxytune, transformers, peft
from proxytune import ProxyTuned, SamplingParams

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def libraries():
    found, is_library = 0, False
    for line in open("/proc/self/smaps"):
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            is_library = re.search(r"[.]so([.0-9]*)$", line.rstrip()) is not None
        elif is_library and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found

before, code = peak(), libraries()
model = ProxyTuned.load(sys.argv[1], experts=[sys.argv[2]])
sampling = SamplingParams(max_new_tokens=64, ignore_eos=True)
trace = model.generate(sys.argv[3], sampling, experts=sys.argv[2], speculative=sys.argv[4] == "1")
after, code = peak(), libraries() - code
backends = {id(m.backend): m.backend for m in model.ensemble.members}.values()
weights = {id(w): w for b in backends for w in (*b.model.parameters(), *b.model.buffers())}.values()
caches = 0
for member in model.ensemble.members:
    config = member.backend.model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots = trace.num_prompt_tokens + len(trace.steps)
    item = member.backend.model.dtype.itemsize
    caches += 2 * item * slots * config.num_hidden_layers * config.num_key_value_heads * size
print(json.dumps({"imports_bytes": before, "peak_bytes": after, "libraries_bytes": code,
                  "weights_bytes": sum(w.nbytes for w in weights), "caches_bytes": caches}))
"""
"""Runs in a separate process, on Linux: getrusage would count the parent's memory."""


def measure_memory(recipe: str, expert: str) -> dict[str, Any]:
    """Return a process's peak memory, loading included, and its parts.

    `imports` is the peak before models are loaded; `libraries` are pages of their code loaded after that.
    """
    found = {}
    for name, flag in (("plain", "0"), ("speculative", "1")):
        command = [sys.executable, "-c", MEMORY, recipe, expert, "Once upon a time", flag]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    return found


# Random models --------------------------------------------------------------------------------------


def random_models(seed: int = 0) -> PlainModels:
    """Return a Llama of 1.1B parameters and a pair of 135M with random float32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(**options: int) -> Any:
        config = LlamaConfig(vocab_size=32_000, max_position_embeddings=2048, **options)
        return LlamaForCausalLM(config).eval()

    torch.manual_seed(seed)
    small = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    base = build(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    return PlainModels(base, build(**small), build(**small))


def measure_random(shapes: Sequence[tuple[int, int, int]], rounds: int = 2) -> dict[str, Any]:
    """Time plain steering and the published procedure on random models, and forwards by width."""
    from proxytune.backends.toy import ToyTokenizer
    from proxytune.backends.transformers.backend import TransformersBackend
    from proxytune.text.vocab import Vocabulary, align

    models = random_models()
    rows = []
    times: dict[tuple[int, int, int], list[float]] = {}
    for shape in shapes:  # Before this project's layers replace the plain ones.
        prompts = torch.randint(32_000, (shape[2], shape[0]))
        times[shape] = [
            _seconds(lambda p=prompts, n=shape[1]: published_procedure(models, p, n))
            for _ in range(rounds + 1)
        ][1:]
    for model in models:
        model.requires_grad_(False)
    vocabulary = Vocabulary("random", {str(i): i for i in range(32_000)}, 32_000)
    identity = align(vocabulary, vocabulary)
    members = [
        Member(name, TransformersBackend(model, name=name, owns_model=True), identity)
        for name, model in zip(("base", "expert", "anti-expert"), models, strict=True)
    ]
    tokens = [str(i) for i in range(32_000)]
    ensemble = Ensemble(
        tuple(members), (Pair("expert", 1, 2),), vocabulary, (), ToyTokenizer(tokens)
    )
    for shape in shapes:
        num_prompt, num_new, size = shape
        sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True)

        def generate(alpha: float, shape: Any = shape, sampling: Any = sampling) -> None:
            torch.manual_seed(0)
            jobs = [
                Job(sampling, (ids,) * 3, (alpha,))
                for ids in torch.randint(32_000, (shape[2], shape[0])).tolist()
            ]
            batch = Batch(ensemble, jobs)
            while not batch.is_done:
                batch.step()

        base, plain = [], []
        for _ in range(rounds + 1):
            base.append(_seconds(lambda g=generate: g(0.0)))
            plain.append(_seconds(lambda g=generate: g(1.0)))
        rows.append(
            {
                "shape": {"num_prompt": num_prompt, "num_new": num_new, "batch_size": size},
                "base_s": statistics.median(base[1:]),
                "plain_s": statistics.median(plain[1:]),
                "published_s": statistics.median(times[shape]),
            }
        )
    widths = {m.name: forward_seconds(m.backend, [None]) for m in members}
    return {"shapes": rows, "forward_s": widths}


def _seconds(what: Any) -> float:
    started = time.perf_counter()
    what()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


# What forwards cost, and where drafting pays --------------------------------------------------------


def forward_seconds(
    backend: Any, adapters: Sequence[str | None], widths: Sequence[int] = (1, 2, 3, 5, 9)
) -> dict[int, float]:
    """Return the median seconds of a forward by tokens read, with a row per adapter and 64 cached tokens."""
    state = backend.prefill([[5] * 64] * len(adapters), adapters=adapters).state
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(7):
        for width in widths:
            token_ids = torch.full((len(adapters), width), 7)
            seconds[width].append(_seconds(lambda t=token_ids: backend.extend(state, t)))
            backend.rewind(state, [width] * len(adapters))
    return {width: statistics.median(values[1:]) for width, values in seconds.items()}


def break_even(base: Mapping[int, float], pair: Mapping[int, float]) -> dict[str, Any]:
    """Return the speed with the expert's drafts by acceptance rate, and where it exceeds the base alone.

    Args:
        base: Seconds of the base's forward, by tokens read.
        pair: Seconds of the forward of expert and anti-expert together, by tokens read.
    """

    def at(seconds: Mapping[int, float], width: int) -> float:
        known = sorted(seconds)
        above = next(w for w in known if w >= width)
        below = max(w for w in known if w <= width)
        share = 0.0 if above == below else (width - below) / (above - below)
        return seconds[below] + share * (seconds[above] - seconds[below])

    def block(source: Any, length: int, whole: float) -> float:
        if source == "expert":
            return at(base, length + 1) + at(pair, 1) * (length + whole)
        return at(base, length + 1) + at(pair, length + 1)

    speeds = {}
    for percent in range(0, 100, 5):
        plan = best_plan({"expert": [percent / 100]}, block, 8)
        assert plan is not None
        speeds[percent / 100] = base[1] / plan.seconds_per_token
    return {
        "pair_of_base": pair[1] / base[1],
        "plain": base[1] / (base[1] + pair[1]),
        "speed_by_rate": speeds,
        "rate_to_pass_base": next((rate for rate, speed in speeds.items() if speed >= 1), None),
    }


# What is written ------------------------------------------------------------------------------------


def _spread(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def _top(results: Mapping[str, Any], title: str, source: str) -> list[str]:
    about = results["machine"]
    return [
        f"# {title}",
        "",
        f"<!-- Written by benchmarks/speed.py from {source}. What it means: docs/performance.md. -->",
        "",
        f"`{results['command']}` on {about['accelerator'] or about['processor']}, "
        f"{about['num_cores']} cores, {about['num_threads']} threads; torch {about['torch']}, "
        f"transformers {about['transformers']}, float32; commit {results['commit']}.",
        "Speeds are ratios of medians over rounds, with the lowest and highest round in brackets. "
        "*Base* is the base alone in this engine, *library's base* transformers' own `generate` of it, "
        "*published* the procedure of the paper, and *floor* what running the three models one after another "
        "can reach at best. *Accepted* is the share of draft tokens that were right, *tokens a block* how "
        "many tokens one step gave, and *parted* how many texts with drafts differed from the plain ones.",
        "",
        "## SmolLM2-135M-Instruct with the smol experts",
        "",
    ]


def _real_tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    heads = ["plain / base", "plain / floor", "speculative / base", "speculative / plain",
             "plain / published", "speculative / published", "speculative / library's base"]  # fmt: skip
    lines.append("| expert | tokens in, out | batch | temperature | " + " | ".join(heads) +
                 " | accepted | tokens a block | parted |")  # fmt: skip
    lines.append("| --- | --- | ---: | ---: |" + " ---: |" * (len(heads) + 3))
    for row in rows:
        shape = row["shape"]
        rate = row["acceptance_rate"]
        lines.append(
            f"| {row['expert']} | {shape['num_prompt']}, {shape['num_new']} | {shape['batch_size']} | "
            f"{row['temperature']:g} | "
            + " | ".join(_spread(row["ratios"].get(head)) for head in heads)
            + f" | {'-' if rate is None else f'{rate:.0%}'} | {row['tokens_per_step']:.2f} | "
            f"{row['num_parted']} |"
        )
    lines += [
        "",
        "Time to the first token against the models' prompts alone, one after another:",
        "",
    ]
    lines += ["| expert | tokens in | batch | first token, ms | prompts, ms | ratio |",
              "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in rows:
        first, prompts = row["first_token_s"]["median"], row["prefill_s"]["median"]
        lines.append(
            f"| {row['expert']} | {row['shape']['num_prompt']} | {row['shape']['batch_size']} | "
            f"{1e3 * first:.0f} | {1e3 * prompts:.0f} | {first / prompts:.2f} |"
        )
    return lines


def tables(results: Mapping[str, Any]) -> str:
    """Return the page of tables."""
    lines = _top(results, "Speed, measured", "speed.json")
    lines += _real_tables(results["real"])
    lines += ["", "## Memory, MB", "",
              "Peak memory of the process beyond that of its imports, loading included. *Code* is library",
              "code that was mapped after the imports; the last column leaves it out.", "",
              "| decoding | imports | peak beyond | code | weights | caches | rest / (weights + caches) |",
              "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, part in results["memory"].items():
        beyond = part["peak_bytes"] - part["imports_bytes"]
        held = part["weights_bytes"] + part["caches_bytes"]
        lines.append(
            f"| {name} | {part['imports_bytes'] / 1e6:.0f} | {beyond / 1e6:.0f} | "
            f"{part['libraries_bytes'] / 1e6:.0f} | {part['weights_bytes'] / 1e6:.0f} | "
            f"{part['caches_bytes'] / 1e6:.1f} | {(beyond - part['libraries_bytes']) / held:.2f} |"
        )
    lines += ["", "## Forwards, milliseconds by tokens read", "", "| models | " +
              " | ".join(str(w) for w in next(iter(results["forward_s"].values()))) + " |",
              "| --- |" + " ---: |" * len(next(iter(results["forward_s"].values())))]  # fmt: skip
    for name, widths in results["forward_s"].items():
        lines.append(f"| {name} | " + " | ".join(f"{1e3 * s:.1f}" for s in widths.values()) + " |")
    lines += ["", "## Where drafting by the expert passes the base alone", "",
              "| models | pair / base | plain | at 50 % | at 70 % | at 90 % | passes at |",
              "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, line in results["break_even"].items():
        speeds = {float(rate): speed for rate, speed in line["speed_by_rate"].items()}
        passes = line["rate_to_pass_base"]
        lines.append(
            f"| {name} | {line['pair_of_base']:.2f} | {line['plain']:.2f} | "
            + " | ".join(f"{speeds[rate]:.2f}" for rate in (0.5, 0.7, 0.9))
            + f" | {'never' if passes is None else f'{passes:.0%}'} |"
        )
    if results["random"]:
        lines += ["", "## Random Llamas, 1.1B and two of 135M: cost only", "",
                  "| tokens in, out | batch | plain / base | plain / published |",
                  "| --- | ---: | ---: | ---: |"]  # fmt: skip
        for row in results["random"]:
            shape = row["shape"]
            lines.append(
                f"| {shape['num_prompt']}, {shape['num_new']} | {shape['batch_size']} | "
                f"{row['base_s'] / row['plain_s']:.2f} | {row['published_s'] / row['plain_s']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw speeds against the base alone, setting by setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["real"]
    kinds = {
        "published": "published / base",
        "plain": "plain / base",
        "speculative": "speculative / base",
    }
    figure, axes = pyplot.subplots(figsize=(9, 0.62 * len(rows) + 1.4))
    marks = {
        "published": ("s", "0.55"),
        "plain": ("o", "tab:blue"),
        "speculative": ("D", "tab:green"),
    }
    for place, row in enumerate(rows):
        base = row["seconds"]["base"]["median"]
        for kind, head in kinds.items():
            spread = row["ratios"].get(head)
            value = spread["median"] if spread else base / row["seconds"][kind]["median"]
            mark, colour = marks[kind]
            label = kind if not place else None
            axes.plot(value, -place, mark, color=colour, label=label, markersize=7)
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set_yticks(
        [-place for place in range(len(rows))],
        [
            f"{row['expert']}  {row['shape']['num_prompt']} in, {row['shape']['num_new']} out"
            + (f", batch {row['shape']['batch_size']}" if row["shape"]["batch_size"] > 1 else "")
            + (f", T {row['temperature']:g}" if row["temperature"] else "")
            for row in rows
        ],
    )
    axes.set_xlabel("speed, the base alone in this engine = 1")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def measure_paper(recipe: Recipe, only: Sequence[str]) -> int:
    """Measure the paper's shapes, or some of them again, and write their page."""
    folder = ROOT / "docs" / "performance"
    named = {}
    for setting in PAPER:
        shape = setting[1]
        named[f"{shape.num_prompt}:{shape.num_new}:{shape.batch_size}"] = setting
    unknown = set(only) - set(named)
    if unknown:
        sys.exit(
            f"no shape of the paper's plan: {', '.join(unknown)}; there are {', '.join(named)}"
        )
    settings = [named[name] for name in only or named]
    rows = measure_real(recipe, ProxyTuned.load(recipe), settings)
    found = {"shapes": [row["shape"] for row in rows], "commit": commit(), "machine": description()}
    old: dict[str, Any] = {"real": [], "runs": []}
    if only:
        old = json.loads((folder / "paper.json").read_text("utf-8"))
    kept = [row for row in old["real"] if row["shape"] not in found["shapes"]]
    order = [asdict(one[1]) for one in PAPER]
    results = {
        "command": "python benchmarks/speed.py --paper",
        "machine": description(),
        "commit": ", ".join(dict.fromkeys([*(run["commit"] for run in old["runs"]), commit()])),
        "runs": [*old["runs"], found],
        "real": sorted([*kept, *rows], key=lambda row: order.index(row["shape"])),
    }
    write_whole(folder / "paper.json", json.dumps(results, indent=1) + "\n")
    results = json.loads((folder / "paper.json").read_text("utf-8"))
    lines = _top(results, "The paper's shapes, measured", "paper.json")
    write_whole(folder / "paper.md", "\n".join([*lines, *_real_tables(results["real"])]) + "\n")
    tell(f"written to {folder}")
    return 0


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="everything, an hour on two cores")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the paper's shapes on the smol family, and nothing else",
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="IN:OUT:BATCH", help="of --paper, these again"
    )
    parser.add_argument("--recipe", default=SMOL, help="another recipe than the smol family")
    parser.add_argument("--device", help="run every model there")
    parser.add_argument("--cuda-graphs", action="store_true", help="launch kernels all at once")
    arguments = parser.parse_args()
    plan = FULL if arguments.full else QUICK
    is_smol = arguments.recipe == SMOL
    recipe = Recipe.read(arguments.recipe).with_settings(
        device=arguments.device, cuda_graphs=arguments.cuda_graphs or None
    )
    options = "".join(
        f" --{key.replace('_', '-')}" + ("" if value is True else f" {value}")
        for key, value in vars(arguments).items()
        if value and value != SMOL
    )
    if arguments.only and not arguments.paper:
        parser.error("--only names shapes of --paper, which is not given")
    if arguments.paper:
        return measure_paper(recipe, arguments.only)
    settings: Any = plan["settings"]
    if not is_smol:
        name = recipe.default_expert or recipe.experts[0].name
        settings = list(dict.fromkeys((name, shape, t, n) for _, shape, t, n in settings))
    model = ProxyTuned.load(recipe)
    real = measure_real(recipe, model, settings)
    write_whole(BUILD_DIR / "speed" / "real.json", json.dumps(real, indent=1) + "\n")
    pair = next(p for p in model.ensemble.pairs if p.name == settings[0][0])
    members = [model.ensemble.members[i] for i in (0, pair.expert, pair.anti_expert)]
    forwards = {"base": forward_seconds(members[0].backend, [members[0].adapter])}
    if members[1].backend is members[2].backend:
        adapters = [members[1].adapter, members[2].adapter]
        forwards["pair"] = forward_seconds(members[1].backend, adapters)
    else:
        one, other = (forward_seconds(m.backend, [m.adapter]) for m in members[1:])
        forwards["pair"] = {width: one[width] + other[width] for width in one}
    del model
    memory = measure_memory(arguments.recipe, settings[0][0]) if not arguments.device else {}
    line = {"smol" if is_smol else arguments.recipe: break_even(forwards["base"], forwards["pair"])}
    random: dict[str, Any] = {"shapes": [], "forward_s": {}}
    if is_smol:
        tell("    random models")
        random = measure_random(plan["random"])  # type: ignore[arg-type]
        widths = random["forward_s"]
        both = {w: widths["expert"][w] + widths["anti-expert"][w] for w in widths["expert"]}
        line["random, 1.1B with 135M"] = break_even(widths["base"], both)
        forwards |= {"random base, 1.1B": widths["base"], "random pair, 135M": both}
    results = {
        "command": "python benchmarks/speed.py" + options,
        "commit": commit(),
        "machine": description(),
        "load_average": os.getloadavg(),
        "real": real,
        "memory": memory,
        "forward_s": forwards,
        "break_even": line,
        "random": random["shapes"],
    }
    folder = ROOT / "docs" / "performance" if is_smol else BUILD_DIR / "speed"
    write_whole(folder / "speed.json", json.dumps(results, indent=1) + "\n")
    # Through JSON, so that a page made from the file later is the same.
    results = json.loads((folder / "speed.json").read_text("utf-8"))
    write_whole(folder / "tables.md", tables(results))
    plot(results, folder / "speed.png")
    tell(f"written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
