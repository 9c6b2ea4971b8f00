"""Speed of this checkout against another one, such as the commit before a change, taking turns in one run.

    git worktree add ../before COMMIT
    python benchmarks/compare.py ../before --rounds 15 --output docs/performance/compare.json

Each checkout's source runs in a process of its own, which loads the smol family once. A round lets both
generate the same texts in every setting, in an order that changes from round to round. Only names that both
have are used: `ProxyTuned.load` and `generate_batch`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.checkout import commit  # noqa: E402
from proxytune.machine import summary  # noqa: E402

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "plain, batch 1": (1, False),
    "plain, batch 8": (8, False),
    "drafts, batch 1": (1, True),
    "drafts, batch 8": (8, True),
}
WORKER = """
import json, sys, time
from proxytune import ProxyTuned, Request, SamplingParams

model = ProxyTuned.load("package:proxytune/smol", experts=["legal"])
starts = [
    "The owner of a building shall", "No person may", "The Mayor is authorised to", "A tenant who",
    "Within 30 days of", "For the purposes of this section", "The Council may", "An applicant for",
]
for line in sys.stdin:
    rows, speculative, num_new = json.loads(line)
    sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
    requests = [Request(text, sampling) for text in starts[:rows]]
    started = time.perf_counter()
    traces = model.generate_batch(requests, batch_size=rows, speculative=speculative)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, [list(trace.token_ids) for trace in traces]]), flush=True)
"""


class Side:
    """A process that generates with one checkout's source."""

    def __init__(self, root: Path) -> None:
        env = os.environ | {"PYTHONPATH": str(root / "src"), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def generate(self, rows: int, speculative: bool, num_new: int) -> tuple[float, Any]:
        """Return the seconds that it took, and the token ids."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([rows, speculative, num_new]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a checkout's process ended; its error is above")
        seconds, token_ids = json.loads(line)
        return seconds, token_ids

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("other", type=Path, help="the root of the other checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="write a JSON file")
    arguments = parser.parse_args()
    sides = [Side(arguments.other), Side(ROOT)]
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in SETTINGS}
    is_equal = True
    for number in range(arguments.rounds + 1):
        order = (0, 1) if number % 2 else (1, 0)
        for name, (rows, speculative) in SETTINGS.items():
            found = {
                side: sides[side].generate(rows, speculative, arguments.new_tokens)
                for side in order
            }
            is_equal = is_equal and found[0][1] == found[1][1]
            if number:  # The first round warms up.
                for side in order:
                    seconds[name][side].append(found[side][0])
    for side in sides:
        side.close()
    git = ["git", "-C", str(arguments.other), "rev-parse", "--short=12", "HEAD"]
    other = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    content: dict[str, Any] = {
        "command": f"python benchmarks/compare.py OTHER --rounds {arguments.rounds} "
        f"--new-tokens {arguments.new_tokens}",
        "commits": [other or "unknown", commit()],
        "machine": summary(),
        "new_tokens": arguments.new_tokens,
        "texts_are_equal": is_equal,
        "settings": {},
    }
    for name, (before, after) in seconds.items():
        ratios = sorted(a / b for b, a in zip(before, after, strict=True))
        content["settings"][name] = {
            "seconds_before": statistics.median(before),
            "seconds_after": statistics.median(after),
            "ratio_of_medians": statistics.median(after) / statistics.median(before),
            "median_of_ratios": statistics.median(ratios),
            "quartiles_of_ratios": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        }
        row = content["settings"][name]
        low, high = row["quartiles_of_ratios"]
        print(
            f"{name:<16} {row['seconds_before']:6.2f} s before, {row['seconds_after']:6.2f} s after, "
            f"ratio of medians {row['ratio_of_medians']:.3f}, "
            f"median of ratios {row['median_of_ratios']:.3f} ({low:.3f} to {high:.3f})"
        )
    print("all texts are equal" if is_equal else "TEXTS DIFFER")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    raise SystemExit(not is_equal)


if __name__ == "__main__":
    main()
