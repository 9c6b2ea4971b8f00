"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Sequence

from proxytune.errors import InvalidRequest, closest
from proxytune.tasks.alpaca_eval import AlpacaEval
from proxytune.tasks.ds1000 import Ds1000
from proxytune.tasks.gsm8k import Gsm8k
from proxytune.tasks.humaneval import HumanEval
from proxytune.tasks.realtimeqa import RealTimeQa
from proxytune.tasks.task import Task
from proxytune.tasks.toxigen import ToxiGen
from proxytune.tasks.triviaqa import TriviaQa
from proxytune.tasks.truthfulqa import TruthfulQaChoice, TruthfulQaOpen

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Gsm8k(),
        TruthfulQaChoice(),
        TruthfulQaOpen(),
        ToxiGen(),
        AlpacaEval(),
        HumanEval(),
        Ds1000(),
        TriviaQa(),
        RealTimeQa(),
    )
}


def find_task(name: str, *, also: Sequence[str] = ()) -> Task:
    """Return a benchmark by its name; `also` are more names that may have been meant.

    Raises:
        InvalidRequest: There is no benchmark of this name; lists similar names.
    """
    if name in TASKS:
        return TASKS[name]
    close = closest(name.lower(), [*TASKS, *also], num=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? All" if close else "all"
    raise InvalidRequest(
        f"there is no benchmark called {name!r}.\nhint: {hint} of them: {', '.join(TASKS)}"
    )
