"""The model card of a cut."""

from __future__ import annotations

import json
import shlex

from proxytune.cut.settings import BRIDGE_FILE, CutResult, CutSettings

_CARD = """\
# The first {first} and last {last} layers of {base}

A small model for [proxy-tuning](https://arxiv.org/abs/2401.08565), made by `proxytune make-proxy`: layers of
`{base}` with a linear bridge in place of the {num_left} between them. It is {what}.
Untuned it predicts much worse than `{base}`. What steers is the difference between it before and after
tuning.

| model | layers | parameters | perplexity | ms per token |
| --- | ---: | ---: | ---: | ---: |
{rows}

Perplexities are of {num_test_tokens:,} held-out tokens of {source}. Times are medians of single decoded
tokens, both models alternating, on {device} with {num_threads} threads.

- The bridge was computed on {num_tokens:,} tokens in {bridge_s:g} s; it leaves {error:.0%} of the weighted
  square of what the layers left out add.
{heal}- Whole run: {total_s:g} s
- {versions}

```bash
{command}
{use}
```
"""


def model_card(settings: CutSettings, result: CutResult) -> str:
    """Return the README.md of a cut."""
    (own_layers, layers), (own_size, size) = result.num_layers, result.num_parameters
    scores, times = result.perplexity, result.token_ms
    rows = [f"| base | {layers} | {size:,} | {scores['base']:.2f} | {times['base']:.1f} |"]
    shares = f"{own_layers} ({own_layers / layers:.0%}) | {own_size:,} ({own_size / size:.0%})"
    time = f"{times['cut']:.1f} ({times['cut'] / times['base']:.0%})"
    rows.append(f"| cut | {shares} | {scores['cut']:.2f} | {time} |")
    healing = ""
    if "healed" in scores:
        rows.append(f"| cut, healed | {shares} | {scores['healed']:.2f} | {time} |")
        healing = (
            f"- Its bridge was then trained on {result.heal_tokens:,} tokens to predict as the base does, in "
            f"{result.heal_s:g} s\n"
        )
        if not scores["healed"] < scores["cut"]:
            healing += "- That made it no better, so the bridge written is the one computed\n"
    versions = ", ".join(
        f"{key} {value}"
        for key, value in result.environment.items()
        if key not in ("device", "num_threads")
    )
    return _CARD.format(
        first=result.keep[0],
        last=result.keep[1],
        base=result.base,
        num_left=layers - own_layers + 1,
        what="the bridge alone; the layers are taken from the base in memory"
        if settings.bridge_only
        else "an ordinary model of the same architecture",
        rows="\n".join(rows),
        num_test_tokens=result.num_test_tokens,
        source=result.source,
        device=result.environment["device"],
        num_threads=result.environment["num_threads"],
        num_tokens=result.num_tokens,
        bridge_s=result.bridge_s,
        error=result.error,
        heal=healing,
        total_s=result.total_s,
        versions=versions,
        command=command(settings, result),
        use=_use(settings, result),
    )


def command(settings: CutSettings, result: CutResult) -> str:
    """Return the command that makes the same cut again."""
    words = ["proxytune", "make-proxy", result.base, "--keep", settings.keep]
    defaults = CutSettings(output="")
    for name in ("data", "tokens", "heal", "seed", "device", "dtype"):
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            words += [f"--{name}", str(value)]
    words += ["--bridge-only"] if settings.bridge_only else []
    return shlex.join([*words, "--output", settings.output])


def _use(settings: CutSettings, result: CutResult) -> str:
    if settings.bridge_only:
        spec = {
            "cut_of": "base",
            "keep": list(result.keep),
            "bridge": f"{settings.output}/{BRIDGE_FILE}",
        }
        return f'# in a recipe: "anti_expert": {json.dumps(spec)}'
    return (
        shlex.join(["proxytune", "tune", "--anti-expert", settings.output, "--base", result.base])
        + " --data rows.jsonl --output my-recipe"
    )
