"""The model card of a tuned recipe, and the picture of its losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from proxytune.files import save_figure
from proxytune.recipe.recipe import Recipe
from proxytune.tune.settings import TuneResult, TuneSettings
from proxytune.tune.verdict import interval_words

_METHODS = {
    "sft": "supervised fine-tuning",
    "dpo": "Direct Preference Optimization (arXiv:2305.18290)",
    "grpo": "Group Relative Policy Optimization (arXiv:2402.03300): trained by a reward for its own answers",
    "cpt": "Consistent Proxy Tuning (arXiv:2407.01155): trained through the frozen base and anti-expert",
}
_CALIBRATED = {
    "sft": "The anti-expert is calibrated: trained from the same start on the base's distribution at the "
    "same positions",
    "dpo": "The anti-expert is calibrated: trained on the base's distribution over the chosen answers. The "
    "expert starts from it",
}
_COUNTS = ("rows", "rows_read", "num_tokens", "num_trained", "num_truncated", "num_dropped")


def model_card(recipe: Recipe, settings: TuneSettings, result: TuneResult) -> str:
    """Return the recipe's model card with data, settings and measurements."""
    lines = [*_verdict(result), *_measured(result), *_training(settings, result)]
    return "\n".join([recipe.model_card().rstrip(), "", *lines]).rstrip() + "\n"


def last_word(settings: TuneSettings, result: TuneResult) -> list[str]:
    """Return the end of a run for a terminal: measurements, verdict, what to try next."""
    counts, verdict = result.data["train"], result.verdict
    lines = [
        f"wrote {settings.directory}: expert {result.expert!r}, alpha {result.alpha:g}{_tried(result)}",
        f"trained on {counts['rows_read']:,} of {counts['rows']:,} rows{_tokens(result)} in "
        f"{result.num_steps:,} steps, by method {result.method}",
    ]
    if verdict is None:
        return [*lines, "nothing was measured, so nothing shows whether steering helps"]
    which = "of validation" if verdict["rows"] == "valid" else "that nothing was chosen on"
    if result.rewards is not None:
        report = result.rewards[verdict["rows"]]
        lines.append(
            f"mean reward of greedy answers to {verdict['num_rows']:,} prompts {which}, with 95 % intervals:"
        )
        lines += [_shown_reward(row) for row in report["rows"] if _is_shown(row, verdict, result)]
        return [*lines, *_answers(verdict)]
    report = result.valid if verdict["rows"] == "valid" else result.test
    assert report is not None
    lines.append(
        f"perplexity on {verdict['num_rows']:,} rows {which} ({report['num_tokens']:,} tokens), with 95 % "
        "intervals:"
    )
    lines += [_shown_score(row) for row in report["rows"] if _is_shown(row, verdict, result)]
    return [*lines, *_answers(verdict)]


def _tokens(result: TuneResult) -> str:
    """Return how many tokens of the rows were trained on, to follow the rows."""
    return "" if result.method == "grpo" else f" ({result.data['train']['num_trained']:,} tokens)"


def _is_shown(row: Mapping[str, Any], verdict: Mapping[str, Any], result: TuneResult) -> bool:
    return row["alpha"] in (verdict["alpha"], 1.0) or _side(row) in _alone(result)


def _answers(verdict: Mapping[str, Any]) -> list[str]:
    """Return a verdict's answers side by side, its reason and its hints."""
    lines = []
    for sample in verdict["samples"]:
        lines += ["", f"  prompt: {_line(sample['prompt'])}"]
        for side in ("base", "steered", "given"):
            text = _line(sample[side]) or "(nothing: the answer ends at once)"
            lines.append(f"    {side + ':':<9} {text}")
    lines += ["", f"steering {verdict['word']}: {verdict['reason']}"]
    return [*lines, *(f"try next: {hint}" for hint in verdict["hints"])]


def _shown_reward(row: Mapping[str, Any]) -> str:
    text = f"  {_model(row):<22} {row['reward']:.3f}{interval_words(row['interval'], '.3f')}"
    if row["name"] != "base":
        text += f"  {row['change']:+.3f}{interval_words(row['change_interval'], '+.3f')}"
    return f"{text}, {row['length']:.1f} tokens"


def _side(row: Mapping[str, Any]) -> str:
    return str(row["name"]).rpartition(".")[2]


def _alone(result: TuneResult) -> tuple[str, ...]:
    """Return the models that are shown by themselves."""
    # That a calibrated pair has similar perplexities is the sign that calibration worked.
    return ("base", "expert", "anti_expert") if result.is_calibrated else ("base", "expert")


def _shown_score(row: Mapping[str, Any]) -> str:
    side = _side(row)
    text = f"  {_model(row):<22} {row['perplexity']:.2f}{interval_words(row['interval'], '.2f')}"
    if side == "base":
        return text
    return f"{text}  {row['change']:+.1%}{interval_words(row['change_interval'], '+.1%')}"


def _model(row: Mapping[str, Any]) -> str:
    names = {"expert": "expert alone", "anti_expert": "anti-expert alone"}
    name = names.get(_side(row), _side(row))
    return name + ("" if row["alpha"] is None else f" at alpha {row['alpha']:g}")


def _tried(result: TuneResult) -> str:
    """Return how the strength was chosen, to follow it."""
    if result.fit is not None and result.fit["kept"] != "none":
        return f", with fitted {result.fit['kept']}"
    if not result.tried:
        return ""
    low, high = min(result.tried), max(result.tried)
    text = f", of {low:g} to {high:g} tried"
    if result.alpha == 0:
        return (
            f": of {low:g} to {high:g} tried, none helps on the validation rows, so the recipe is the base "
            f"alone (the best was {result.best_alpha:g})"
        )
    return text + ("" if result.edge is None else f", the {result.edge} of them")


def _line(text: str, most: int = 160) -> str:
    """Return a text on one line, cut."""
    whole = " ".join(text.split())
    return whole if len(whole) <= most else whole[: most - 3] + "..."


def _verdict(result: TuneResult) -> list[str]:
    verdict = result.verdict
    if verdict is None:
        return []
    lines = [f"## Steering {verdict['word']}", "", f"{_sentence(verdict['reason'])}", ""]
    lines += [f"Strength: alpha {result.alpha:g}{_tried(result)}.", ""]
    if result.fit is not None:
        lines += [_sentence(result.fit["words"]), ""]
    if verdict["samples"]:
        lines += ["| prompt | base | steered | given |", "| --- | --- | --- | --- |"]
        sides = ("prompt", "base", "steered", "given")
        for sample in verdict["samples"]:
            cells = [_shown(_line(sample[side], 400)) for side in sides]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"Answers are greedy, the steered ones at alpha {verdict['alpha']:g}.", ""]
    lines += [f"- {_sentence(hint)}" for hint in verdict["hints"]]
    return [*lines, ""] if verdict["hints"] else lines


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _measured(result: TuneResult) -> list[str]:
    if result.rewards is not None:
        return _measured_rewards(result.rewards, result)
    lines: list[str] = []
    parts = (("validation", "valid", result.valid), ("test", "test", result.test))
    for title, key, report in parts:
        if report is None:
            continue
        lines += [
            f"## Measured on {title} rows",
            "",
            f"{report['num_tokens']:,} tokens of `{result.data[key]['source']}`. Lower perplexity is better; "
            "95 % bootstrap intervals over blocks of 128 tokens are in brackets.",
            "",
            "| model | alpha | nats per token | perplexity | against base |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        lines += [_score_line(row) for row in report["rows"]]
        lines.append("")
    if result.valid is not None and result.test is None:
        lines += [
            "The strength and the checkpoint were chosen on these rows, so the results may look better than "
            "on new text. Measure on rows used for neither choice with `--test-data`.",
            "",
        ]
    return lines


def _measured_rewards(rewards: Mapping[str, Any], result: TuneResult) -> list[str]:
    lines: list[str] = []
    for title, key in (("validation", "valid"), ("test", "test")):
        if key not in rewards:
            continue
        report = rewards[key]
        lines += [
            f"## Rewarded on {title} rows",
            "",
            f"Greedy answers to {report['num_answers']:,} prompts of `{result.data[key]['source']}`; 95 % "
            "bootstrap intervals over prompts are in brackets.",
            "",
            "| model | alpha | mean reward | against base | mean tokens |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for row in report["rows"]:
            alpha = "" if row["alpha"] is None else f"{row['alpha']:g}"
            change = ""
            if row["name"] != "base":
                change = f"{row['change']:+.3f}{interval_words(row['change_interval'], '+.3f')}"
            lines.append(
                f"| {row['name']} | {alpha} | {row['reward']:.3f}{interval_words(row['interval'], '.3f')} | "
                f"{change} | {row['length']:.1f} |"
            )
        lines.append("")
    return lines


def _score_line(row: Mapping[str, Any]) -> str:
    alpha = "" if row["alpha"] is None else f"{row['alpha']:g}"
    change = ""
    if row["name"] != "base":
        change = f"{row['change']:+.1%}{interval_words(row['change_interval'], '+.1%')}"
    return (
        f"| {row['name']} | {alpha} | {row['nats']:.4f} | "
        f"{row['perplexity']:.2f}{interval_words(row['interval'], '.2f')} | {change} |"
    )


def _training(settings: TuneSettings, result: TuneResult) -> list[str]:
    lines = ["## Training", "", f"{_METHODS[result.method]}.", ""]
    if result.is_calibrated:
        lines += [f"{_CALIBRATED[result.method]}.", ""]
    if settings.then_cpt:
        lines += [f"Then {_METHODS['cpt']}.", ""]
    lines += [
        "| data | rows | rows read | tokens read | trained on | cut | left out | sha256 |",
        "| --- | " + "---: | " * 6 + "--- |",
    ]
    for name, part in result.data.items():
        counts = [f"{part[key]:,}" if key in part else "" for key in _COUNTS]
        lines.append(
            f"| {name}: `{part['source']}` ({part['kind']}) | {' | '.join(counts)} | "
            f"`{part['digest'][:16]}` |"
        )
    lines += ["", "| setting | value |", "| --- | --- |"]
    shown: dict[str, Any] = {"method": result.method, "calibrate": result.is_calibrated}
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        own = setting.default if setting.default is not MISSING else None
        if value != own and setting.name not in ("output", "data", "method", "calibrate"):
            shown[setting.name] = value
    shown["learning_rate"] = result.learning_rate
    shown["template"], shown["base_template"] = result.template, result.base_template
    for name in ("batch_size", "seed", *(() if settings.full else ("lora_rank",))):
        shown[name] = getattr(settings, name)
    lines += [f"| {key} | {_shown(value)} |" for key, value in shown.items()]
    frozen = ""
    if result.offsets_s >= 1:
        frozen = f"; {result.offsets_s:,.0f} s before it for the frozen models"
    memory = result.peak_memory_bytes / 2**30
    lines += [
        "",
        f"- {result.num_steps:,} optimizer steps, {result.num_parameters:,} trainable parameters",
        f"- {result.train_s:,.0f} s of training, evaluations included{frozen}",
        f"- peak memory: {memory:.2f} GiB",
    ]
    if result.valid_loss is not None and result.first_valid_loss is not None:
        lines.append(
            f"- validation loss {result.first_valid_loss:.4f} before training, {result.valid_loss:.4f} at "
            "its lowest, which is the checkpoint that was kept"
        )
    rewards = result.rewards or {}
    if rewards.get("first_valid") is not None:
        lines.append(
            f"- validation reward {rewards['first_valid']:.3f} before training, {rewards['best_valid']:.3f} "
            "at its highest, which is the checkpoint that was kept"
        )
    versions = ", ".join(f"{k} {v}" for k, v in result.environment.items() if k != "num_threads")
    lines += [f"- {versions}", "", "`training/` has the log of losses and its picture."]
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def loss_plot(
    losses: Sequence[Mapping[str, Any]], path: Path, first_valid_loss: float | None
) -> None:
    """Draw training and validation loss over the steps as a PNG, the untuned model's loss as a line.

    Where rewards were logged, reward, KL divergence and length of the answers are drawn instead.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def points(key: str) -> tuple[list[float], list[float]]:
        rows = [row for row in losses if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]

    if any("reward" in row for row in losses):
        _save(_drawn_rewards(pyplot, points), path)
        return
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.plot(*points("loss"), color="#9aa5b1", linewidth=1, label="training")
    axes.plot(*points("valid_loss"), color="#1f6feb", marker="o", markersize=3, label="validation")
    if first_valid_loss is not None:
        axes.axhline(
            first_valid_loss,
            color="#c2410c",
            linewidth=1,
            linestyle=":",
            label="validation, untuned",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per trained token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def _drawn_rewards(pyplot: Any, points: Callable[[str], tuple[list[float], list[float]]]) -> Any:
    """Return a figure with three plots of what `points` gives for a key of the log."""
    figure, plots = pyplot.subplots(3, 1, figsize=(7, 7), dpi=120, sharex=True)
    for axes, label, sampled, greedy in (
        (plots[0], "mean reward", "reward", "valid_reward"),
        (plots[1], "KL divergence, nats per token", "kl", None),
        (plots[2], "mean answer, tokens", "length", "valid_length"),
    ):
        axes.plot(*points(sampled), color="#9aa5b1", linewidth=1, label="training, sampled")
        if greedy is not None:
            own = {"color": "#1f6feb", "marker": "o", "markersize": 3}
            axes.plot(*points(greedy), label="validation, greedy", **own)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    plots[0].legend(frameon=False)
    plots[-1].set_xlabel("optimizer step")
    return figure


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    try:
        save_figure(figure, path)
    finally:
        pyplot.close(figure)
