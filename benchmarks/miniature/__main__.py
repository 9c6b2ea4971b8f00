"""The paper's question on models that two processor cores can train.

    python benchmarks/miniature            everything, resumable; at most 90 minutes on two cores
    python benchmarks/miniature --quick    within five minutes; shows that it runs, measures nothing
    python benchmarks/miniature --search   learning rates, which are then entered in `plan.py` by hand

How much of what tuning a model directly would bring does steering it with a small tuned expert bring?

    gap closed = (base - steered) / (base - direct)

in nats per token for texts, in accuracy for questions. A finished stage leaves a JSON file in
`benchmarks/build/` and is not repeated; an interrupted training continues from its last checkpoint. Strengths
are chosen on validation rows; test rows are read once, after all trainings of a data set.

This file knows the command line alone.

Source: Liu et al. 2024, "Tuning Language Models by Proxy", arXiv:2401.08565, sections 3 to 5.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Python puts this script's folder first, where `data` and `train` would shadow libraries.
sys.path[0] = str(Path(__file__).parents[2])

from benchmarks.miniature.data import prepare  # noqa: E402
from benchmarks.miniature.plan import FULL, QUICK, RATES, SEARCH_STAGES, Plan  # noqa: E402
from benchmarks.miniature.report import meaning, write  # noqa: E402
from benchmarks.miniature.run import collect, read_search, run_all, run_stage, tell  # noqa: E402
from proxytune.errors import UserError  # noqa: E402
from proxytune.tune import Interrupted  # noqa: E402


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/miniature", description=__doc__.splitlines()[0]
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few steps, within five minutes")
    size.add_argument("--search", action="store_true", help="try several learning rates per kind")
    parser.add_argument("--stage", metavar="NAME", help="run this stage alone, in this process")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    known = (*plan.stages, *(SEARCH_STAGES if plan is FULL else ()))
    if arguments.stage and arguments.stage not in known:
        parser.error(f"--stage is {arguments.stage!r}, and must be one of {', '.join(known)}")
    try:
        if arguments.stage:
            run_stage(plan, arguments.stage)
            return 0
        return _run(plan, is_search=arguments.search)
    except Interrupted as error:
        tell(str(error).partition("\n")[0])
        return 130
    except KeyboardInterrupt:
        tell("stopped; the same command goes on from there")
        return 130
    except UserError as error:
        tell(str(error))
        return 2


def _run(plan: Plan, *, is_search: bool) -> int:
    prepared = prepare(plan)
    options = ["--quick"] if plan is QUICK else []
    code = run_all(plan, SEARCH_STAGES if is_search else plan.stages, prepared, options)
    if code:
        return code
    if is_search:
        search = read_search()
        assert search is not None
        for kind, losses in search["losses"].items():
            best = min(losses, key=lambda rate: losses[rate])
            tried = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in losses.items())
            print(f"{kind:8}{tried}; lowest at {best}, entered {RATES[kind]:g}")
        return 0
    results = collect(plan, prepared)
    page = write(results, plan.report or plan.build)
    print("\n".join(f"- {sentence}" for sentence in meaning(results)))
    tell(f"written to {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
