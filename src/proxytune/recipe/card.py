"""The model card of a recipe: a README.md with the metadata that the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from proxytune.checkpoints.references import HUB_ID, is_gguf, is_there
from proxytune.errors import install_elsewhere
from proxytune.policy import Policy
from proxytune.recipe.spec import ExpertSpec, ModelSpec

CARD = """\
# A steered model

A recipe for [proxy-tuning](https://arxiv.org/abs/2401.08565): it names models and holds none of their \
weights.

    {formula}

| part | model | adapter | prompt |
| --- | --- | --- | --- |
{rows}

Strength of steering (alpha): {strengths}.{policy}

```bash
{install}
proxytune generate . "Once upon a time"
proxytune chat .
```
"""

FORMULA = "steered logits = base + alpha * (expert - anti_expert)"
WEIGHTED_FORMULA = (
    "steered logits = base + alpha * ((w_base - 1) * base + w_expert * expert - w_anti_expert * anti_expert "
    "+ bias)"
)

TRANSFORMERS = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
```
"""


def model_card(
    models: Mapping[str, ModelSpec], experts: Sequence[ExpertSpec], policy: Policy, directory: Path
) -> str:
    """Return a recipe's README.md. What a reference leads to from `directory` is no id of the Hub."""
    titles = {"base": "base"}
    for expert in experts:
        titles[f"{expert.name}.expert"] = f"{expert.name}, expert"
        titles[f"{expert.name}.anti_expert"] = f"{expert.name}, anti-expert"
    rows = []
    for part, spec in models.items():
        model = "the base itself" if spec.same_as else f"`{spec.model}`"
        if spec.cut_of and spec.keep:
            model = f"the base's first {spec.keep[0]} and last {spec.keep[1]} layers"
        adapter = f"`{spec.adapter}`" if spec.adapter else ""
        prompt = spec.prompt if spec.prompt in ("plain", "chat") else "a template of its own"
        rows.append(f"| {titles[part]} | {model} | {adapter} | {prompt} |")
    is_weighted = any(expert.has_weights or expert.bias for expert in experts)
    content = CARD.format(
        formula=WEIGHTED_FORMULA if is_weighted else FORMULA,
        rows="\n".join(rows),
        install=install_elsewhere(),
        strengths=", ".join(map(_strength, experts)),
        policy="" if policy.is_plain else f" Policy: {policy.describe()}.",
    )
    references = [r for spec in models.values() for r in (spec.model, spec.adapter) if r]
    hub_ids = [r for r in dict.fromkeys(references) if _is_hub_id(r, directory)]
    lines = ["---", "library_name: proxytune", "pipeline_tag: text-generation"]
    lines += ["tags:", "- proxytune", "- proxy-tuning"]
    if hub_ids:
        lines += ["base_model:", *(f"- {hub_id}" for hub_id in hub_ids)]
    metadata = "\n".join([*lines, "---", ""])
    return f"{metadata}\n{content}" + TRANSFORMERS * _runs_in_transformers(models)


def _strength(expert: ExpertSpec) -> str:
    parts = [f"weights: {expert.weights.describe()}"] if expert.has_weights else []
    parts += [f"output bias: `{expert.bias}`"] if expert.bias else []
    more = f" ({'; '.join(parts)})" if parts else ""
    return f"{expert.name} {expert.alpha:g}{more}"


def _is_hub_id(reference: str, directory: Path) -> bool:
    is_id = bool(HUB_ID.fullmatch(reference)) and not is_gguf(reference)
    return is_id and not is_there(directory / reference)


def _runs_in_transformers(models: Mapping[str, ModelSpec]) -> bool:
    """Whether the transformers integration takes them: one stream of tokens, models in process."""
    prompt = models["base"].prompt
    return all(
        spec.same_as or (spec.prompt == prompt and not spec.api and not spec.llama_cpp)
        for spec in models.values()
    )
