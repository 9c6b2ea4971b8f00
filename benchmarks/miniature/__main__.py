"""The paper's question on models that two processor cores can train.

    python benchmarks/miniature            everything, resumable; at most 90 minutes on two cores
    python benchmarks/miniature --long     also more seeds; goes on from what is done
    python benchmarks/miniature --quick    within five minutes; shows that it runs, measures nothing
    python benchmarks/miniature --page     only the page, of the data sets that are finished

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
from benchmarks.miniature.plan import FULL, LONG, QUICK, Plan  # noqa: E402
from benchmarks.miniature.report import meaning, write  # noqa: E402
from benchmarks.miniature.run import collect, finished, run_all, run_stage, tell  # noqa: E402
from proxytune.errors import UserError  # noqa: E402
from proxytune.tune import Interrupted  # noqa: E402


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/miniature", description=__doc__.splitlines()[0]
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few steps, within five minutes")
    size.add_argument("--long", action="store_true", help="also more seeds")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--stage", metavar="NAME", help="run this stage alone, in this process")
    only.add_argument("--page", action="store_true", help="write the page of what is finished")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else LONG if arguments.long else FULL
    if arguments.stage and arguments.stage not in plan.stages:
        parser.error(f"--stage is {arguments.stage!r}, and must be one of {', '.join(plan.stages)}")
    try:
        if arguments.stage:
            run_stage(plan, arguments.stage)
            return 0
        return _run(plan, is_page=arguments.page)
    except Interrupted as error:
        tell(str(error).partition("\n")[0])
        return 130
    except KeyboardInterrupt:
        tell("stopped; the same command goes on from there")
        return 130
    except UserError as error:
        tell(str(error))
        return 2


def _run(plan: Plan, *, is_page: bool) -> int:
    prepared = prepare(plan)
    options = ["--quick"] if plan is QUICK else ["--long"] if plan.is_long else []
    code = 0 if is_page else run_all(plan, plan.stages, prepared, options)
    if not finished(plan):
        tell("no data set is finished, so there is no page to write")
        return code or 1
    results = collect(plan, prepared)
    # A page of a part of the data sets is no page to publish.
    is_whole = not results["about"]["left_out"]
    page = write(results, plan.report if is_whole and plan.report else plan.build)
    print("\n".join(f"- {sentence}" for sentence in meaning(results)))
    tell(f"written to {page}")
    return code


if __name__ == "__main__":
    sys.exit(main())
