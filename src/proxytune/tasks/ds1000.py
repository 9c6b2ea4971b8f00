"""DS-1000: data-science code to complete, right if its hidden tests pass.

200 of the 1,000 problems are drawn as in the published runs. The authors ask people not to put the data
online unzipped and not to train on it; it is read from a local file or from the Hub. The tests need the
libraries that they are about (NumPy, pandas, SciPy, scikit-learn, Matplotlib, PyTorch, TensorFlow).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from typing_extensions import override

from proxytune.errors import InputFileError
from proxytune.request import SamplingParams
from proxytune.tasks.humaneval import CodeTask, clean_code
from proxytune.tasks.rows import Row, data_rows, field
from proxytune.tasks.sandbox import Limits
from proxytune.tasks.task import Item, Metrics, Rule, Scores, asked

NUM_DRAWN = 200
SEED = 42
KINDS = ("Origin", "Surface", "Semantic", "Difficult-Rewrite")
"""How a problem was changed from its original."""


class Ds1000(CodeTask):
    """DS-1000, completion mode."""

    name = "ds1000"
    title = "DS-1000"
    source = "Lai et al. 2023, arXiv:2211.11501"
    num_items = NUM_DRAWN
    banned_first = ("</",)  # The beginning of "</code>", which would end the code before it starts.
    # The tests import large libraries, and some draw into files; the published runs allow two minutes.
    limits = Limits(timeout_s=120.0, memory_bytes=2**35, may_write=True)
    sampling = SamplingParams(
        max_new_tokens=512,
        temperature=0.8,
        top_p=0.95,
        stop=("\n</code>", "\n# SOLUTION END", "\nEND SOLUTION"),
    )

    @override
    def items(self, data_dir: Path | None) -> list[Item]:
        names = ("ds1000/ds1000.jsonl", "ds1000/test.jsonl")
        rows = data_rows(data_dir, names, "xlangai/DS-1000", None, "test")
        items = []
        for place, row in enumerate(rows, 1):
            about = row.get("metadata")
            about = json.loads(about) if isinstance(about, str) else about
            if not isinstance(about, dict) or not {"library", "library_problem_id"} <= about.keys():
                raise InputFileError(
                    f"row {place} has no metadata with library and library_problem_id"
                )
            prompt = field(row, place, "prompt")
            fields = {
                "lib": about["library"],
                "problem_id": int(about["library_problem_id"]),
                "perturbation_type": about.get("perturbation_type"),
                "prompt": prompt,
                "solution": row.get("reference_code", ""),
                "code_context": field(row, place, "code_context"),
            }
            text = prompt if prompt.endswith("\n") else prompt + "\n"
            items.append(Item(f"{fields['lib']}/{fields['problem_id']}", asked(text, text), fields))
        if len(items) <= NUM_DRAWN:
            return items
        # The draw of pandas' DataFrame.sample with this random_state.
        picks = np.random.RandomState(SEED).choice(len(items), size=NUM_DRAWN, replace=False)
        return [items[place] for place in picks.tolist()]

    @override
    def row(self, item: Item, output: str) -> Row:
        keys = ("lib", "problem_id", "perturbation_type", "prompt")
        return {**{key: item.fields[key] for key in keys}, "output": clean_code(output)}

    @override
    def key(self, row: Row, place: int) -> str:
        return f"{field(row, place, 'lib')}/{field(row, place, 'problem_id', kind=int)}"

    @override
    def program(self, item: Item, row: Row) -> str:
        context = str(item.fields["code_context"])
        code = f"{context}\ncode = {row['output']!r}\ntest_execution(code)\n"
        return code + ("test_string(code)\n" if "test_string(" in context else "")

    @override
    def spread(self, rows: Sequence[Row]) -> list[Row]:
        """Return one row per sample; a published row holds a problem's samples in lists."""
        spread: list[Row] = []
        for place, row in enumerate(rows, 1):
            if not isinstance(row.get("output"), list):
                spread.append(row)
                continue
            decided = row.get("passed", [None] * len(row["output"]))
            if not isinstance(decided, list) or len(decided) != len(row["output"]):
                raise InputFileError(f"row {place}: passed must be a list as long as output")
            spread += [
                {**row, "output": output, "passed": passed}
                for output, passed in zip(row["output"], decided, strict=True)
            ]
        return spread

    @override
    def metrics(self, rows: Sequence[Row], scores: Scores, rule: Rule) -> Metrics:
        found = dict(super().metrics(rows, scores, rule))
        k = self.num_drawn(rows)
        samples = self.samples_by_item(rows)
        first = {self.key(row, place): row for place, row in reversed(list(enumerate(rows, 1)))}
        for lib in dict.fromkeys(str(row["lib"]) for row in rows):
            of_lib = {key: score for key, score in scores.items() if first[key]["lib"] == lib}
            found[f"by_lib/{lib.lower()}_pass@{k}"] = self.mean(of_lib)
        for kind in KINDS:
            # The published numbers of this name are the mean share of right samples, which is pass@1.
            of_kind = {
                key: self.pass_at(samples[key], 1 if rule == "paper" else k)
                for key in scores
                if first[key].get("perturbation_type") == kind
            }
            if of_kind:
                found[f"by_perturbation_type/{kind.lower()}"] = self.mean(of_kind)
        return found
