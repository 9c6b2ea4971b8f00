"""How much an expert with another tokenizer helps, compared with one that has the base's.

    python benchmarks/vocabulary.py           about half an hour; writes docs/performance/vocabulary.json
    python benchmarks/vocabulary.py --table   prints its table

The smol family's anti-expert is moved to another tokenizer of `NUM_TOKENS` tokens: a new token's embedding
starts as the mean of the embeddings of the base's tokens that spell it, and training goes on from there. Then
each anti-expert gets an expert by the same fine-tuning (SFT) on the same text, for the same number of epochs.
The strength is picked on validation text, and the change of the base's perplexity measured on unseen test
text. The anti-experts also differ in how well they predict: that is reported in nats per byte of validation
text.

Finished steps are kept in `benchmarks/build/vocabulary`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# Python puts this script's folder first, from which siblings can be imported but not their package.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.miniature.plan import ANTI_EXPERT, BASE  # noqa: E402
from benchmarks.miniature.train import RATES  # noqa: E402
from benchmarks.smol_texts import ROOT, corpus, passages, write  # noqa: E402
from proxytune.checkpoints.checkpoint import find_checkpoint  # noqa: E402
from proxytune.files import building  # noqa: E402
from proxytune.measure.score import score_passages  # noqa: E402
from proxytune.model import ProxyTuned  # noqa: E402
from proxytune.recipe.recipe import Recipe  # noqa: E402
from proxytune.recipe.spec import ExpertSpec, ModelSpec  # noqa: E402
from proxytune.request import SamplingParams  # noqa: E402
from proxytune.tune import TuneSettings, tune  # noqa: E402

OUTPUT = ROOT / "docs" / "performance" / "vocabulary.json"
BUILD = ROOT / "benchmarks" / "build" / "vocabulary"
NUM_TOKENS = 16384
TRAINED_TOKENS = 1_200_000
GENERAL = ("english_fiction", "english_digitalgov", "medical_medquad", "python_stdlib")
"""The anti-expert's training corpora, used for its further training too."""
DOMAINS = ("tinyshakespeare", "medical_medquad")
EXPERT_CHARS = 250_000
EPOCHS = 2.0
ALPHAS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
NUM_WINDOWS = {"valid": 16, "test": 48}


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Another tokenizer ----------------------------------------------------------------------------------


def other_tokenizer() -> Any:
    """Return a byte-level BPE trained on the general corpora, as transformers' tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((corpus(name, "train") for name in GENERAL), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def moved_anti_expert(place: Path) -> None:
    """Write the anti-expert with the other tokenizer to `place`."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    torch.manual_seed(0)
    source = find_checkpoint(ANTI_EXPERT, root=ROOT)
    old = AutoModelForCausalLM.from_pretrained(source.weights_path(), dtype=torch.float32)
    tokenizer = other_tokenizer()
    config = old.config.to_dict() | {"vocab_size": len(tokenizer)}
    eos = tokenizer.eos_token_id
    config |= {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    model = LlamaForCausalLM(type(old.config)(**config))
    state = old.state_dict()
    table = state["model.embed_tokens.weight"]
    moved = torch.zeros(len(tokenizer), table.shape[1])
    for token, token_id in tokenizer.get_vocab().items():
        text = tokenizer.convert_tokens_to_string([token])
        ids = source.tokenizer.encode(text, add_special_tokens=False)
        moved[token_id] = table[ids].mean(0) if ids else table.mean(0)
    state |= {"model.embed_tokens.weight": moved, "lm_head.weight": moved}
    model.load_state_dict(state)
    streams = [
        np.array(tokenizer.encode(corpus(name, "train"), add_special_tokens=False))
        for name in GENERAL
    ]
    sizes = np.array([len(stream) for stream in streams], float)
    rng = np.random.default_rng(0)
    rows, length = 8, 512
    num_steps = TRAINED_TOKENS // (rows * length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.time()
    for step in range(num_steps):
        scale = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimizer.param_groups[0]["lr"] = 2e-3 * max(scale, 0.02)
        picked = rng.choice(len(streams), size=rows, p=sizes / sizes.sum())
        starts = [int(rng.integers(0, len(streams[i]) - length - 1)) for i in picked]
        batch = torch.from_numpy(
            np.stack([streams[i][s : s + length + 1] for i, s in zip(picked, starts, strict=True)])
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49:
            speed = (step + 1) * rows * length / (time.time() - started)
            tell(f"  step {step + 1} of {num_steps}, loss {loss:.3f}, {speed:.0f} tokens/s")
    with building(place) as part:
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)


@torch.no_grad()
def nats_per_byte(reference: str) -> dict[str, float]:
    """Return how well a small model predicts validation text, by domain, in windows of 512 of its tokens."""
    from transformers import AutoModelForCausalLM

    source = find_checkpoint(reference, root=ROOT)
    model = AutoModelForCausalLM.from_pretrained(source.weights_path(), dtype=torch.float32).eval()
    found = {}
    for name in (*GENERAL, *DOMAINS):
        text = corpus(name, "valid")[:60_000]
        ids = source.tokenizer.encode(text, add_special_tokens=False)
        total = size = 0.0
        for start in range(0, len(ids) - 513, 512):
            window = torch.tensor(ids[start : start + 513])
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
            total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            size += len(source.tokenizer.decode(window[1:]).encode())
        found[name] = round(total / size, 4)
    return found


# Experts --------------------------------------------------------------------------------------------


def train_expert(anti_expert: str, domain: str, place: Path) -> None:
    """Tune an expert by itself on the first part of a domain's training text."""
    data = {}
    for split, size in (("train", EXPERT_CHARS), ("valid", 30_000)):
        data[split] = BUILD / f"{domain}.{split}.jsonl"
        lines = corpus(domain, split)[:size].split("\n\n")
        # Pieces of a few paragraphs, so that rows fit into the context with either tokenizer.
        pieces = ["\n\n".join(lines[i : i + 8]) for i in range(0, len(lines), 8)]
        rows = [json.dumps({"text": piece}) for piece in pieces if piece.strip()]
        data[split].write_text("\n".join(rows) + "\n")
    tune(
        TuneSettings(
            output=str(place),
            name=domain,
            data=str(data["train"]),
            valid_data=str(data["valid"]),
            anti_expert=anti_expert,
            method="sft",
            test_share=0.0,
            learning_rate=RATES["text"]["smol"],
            lora_dropout=0.1,
            epochs=EPOCHS,
            batch_size=4,
            max_length=512,
            eval_every=40,
            patience=3,
            measure_tokens=0,
            dtype="bfloat16",
        )
    )


def steered(anti_expert: str, domain: str, expert: Path) -> ProxyTuned:
    """Return the base steered by an expert."""
    own = Recipe.read(expert).experts[0].expert
    adapter = str((expert / (own.adapter or "")).resolve())
    spec = ExpertSpec(
        name=domain,
        expert=ModelSpec(adapter=adapter),
        anti_expert=ModelSpec(model=anti_expert),
    )
    recipe = Recipe(base=ModelSpec(model=BASE), experts=(spec,), vocabulary="map", directory=ROOT)
    return ProxyTuned.load(recipe)


def measure(model: ProxyTuned, domain: str) -> dict[str, Any]:
    """Pick a strength on validation text, and measure it on test text."""

    def scored(split: str, alphas: tuple[float, ...]) -> Any:
        return score_passages(
            model.ensemble,
            passages(model, domain, split, NUM_WINDOWS[split]),
            strengths=[(alpha, (alpha,)) for alpha in alphas],
        )

    valid = scored("valid", ALPHAS)
    best = min(ALPHAS, key=lambda alpha: valid.row("steered", alpha).nats)
    test = scored("test", (best,))
    row = test.row("steered", best)
    return {
        "alpha": best,
        "base_perplexity": round(test.row("base").perplexity, 3),
        "change": round(row.change, 4),
        "interval": [round(row.change_interval.low, 4), round(row.change_interval.high, 4)]
        if row.change_interval
        else None,
        "mapped": [
            {"share": m.share, "base": round(m.base, 4), "small": round(m.small, 4)}
            for m in test.mapped
        ],
    }


def seconds_per_token(models: dict[str, ProxyTuned]) -> dict[str, list[float]]:
    """Return the seconds that 96 greedy tokens take, by kind, alternating over five rounds."""
    sampling = SamplingParams(max_new_tokens=96, ignore_eos=True)
    found: dict[str, list[float]] = {kind: [] for kind in models}
    for number in range(6):
        kinds = list(models)
        random.Random(number).shuffle(kinds)
        for kind in kinds:
            trace = models[kind].generate("The old house stood on the hill, and", sampling)
            if number:  # The first round warms up.
                found[kind].append(trace.latency_s / len(trace.steps))
    return found


def run() -> dict[str, Any]:
    """Train what is missing, and measure."""
    BUILD.mkdir(parents=True, exist_ok=True)
    other = BUILD / "anti-expert"
    if not other.exists():
        tell("the anti-expert moves to another tokenizer")
        moved_anti_expert(other)
    anti_experts = {"same": ANTI_EXPERT, "mapped": str(other)}
    content: dict[str, Any] = {
        "num_tokens": NUM_TOKENS,
        "trained_tokens": TRAINED_TOKENS,
        "expert_chars": EXPERT_CHARS,
        "epochs": EPOCHS,
        "nats_per_byte": {kind: nats_per_byte(model) for kind, model in anti_experts.items()},
        "domains": {},
    }
    models: dict[str, ProxyTuned] = {}
    for domain in DOMAINS:
        content["domains"][domain] = {}
        for kind, anti_expert in anti_experts.items():
            expert = BUILD / f"{domain}-{kind}"
            if not (expert / "config.json").exists():
                tell(f"{domain}, {kind}: training")
                train_expert(anti_expert, domain, expert)
            models[kind] = steered(anti_expert, domain, expert)
            found = measure(models[kind], domain)
            tell(f"{domain}, {kind}: {json.dumps(found)}")
            content["domains"][domain][kind] = found
    seconds = seconds_per_token(models)
    ratios = [b / a for a, b in zip(seconds["same"], seconds["mapped"], strict=True)]
    content["time_per_token"] = {
        "mapped_against_same": [
            round(value, 3) for value in (min(ratios), statistics.median(ratios), max(ratios))
        ]
    }
    return content


def table(content: dict[str, Any]) -> str:
    """Return the measurement as a Markdown table."""
    lines = [
        "| domain | tokenizer | alpha | perplexity against the base (95 %) | base's mass on its tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    names = {"same": "the base's", "mapped": "its own"}
    for domain, kinds in content["domains"].items():
        for kind, row in kinds.items():
            low, high = row["interval"]
            mass = f"{row['mapped'][0]['base']:.0%}" if row["mapped"] else "100%"
            lines.append(
                f"| {domain} | {names[kind]} | {row['alpha']:g} | {row['change']:+.1%} "
                f"({low:+.1%} to {high:+.1%}) | {mass} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    if parser.parse_args().table:
        print(table(json.loads(OUTPUT.read_text())))
        return
    write(OUTPUT, "python benchmarks/vocabulary.py", run())


if __name__ == "__main__":
    main()
