"""Prompts explained: a text at each strength, texts from other tokens, and the base's own beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from proxytune.errors import InvalidRequest
from proxytune.explain.report import Report, Run
from proxytune.request import Experts, Prompt, Request, SamplingParams, Steering
from proxytune.trace import Trace, read_traces

if TYPE_CHECKING:  # It brings torch, which saved traces do not need.
    from proxytune.model import ProxyTuned

BATCH_SIZE = 8


class Question(NamedTuple):
    """One prompt, and what is to be explained about it."""

    prompt: Prompt
    continuation: str | None  # explained in place of a generated text
    sampling: SamplingParams
    alphas: tuple[float | None, ...]  # each makes a text; None is the recipe's
    experts: Experts | None


def saved_reports(path: Path) -> Iterator[Report]:
    """Yield saved traces as reports, consecutive traces of one prompt as one.

    Raises:
        InputFileError: The file cannot be read.
        InvalidRequest: It holds no traces.
    """
    runs: list[Run] = []
    for trace in read_traces(path):
        is_base = not any(trace.alphas.values()) and trace.num_given == 0
        is_forked = 0 < trace.num_given < trace.num_new_tokens
        name = _run_name(trace)
        if is_forked:
            name = f"what if at {trace.num_given - 1}, {name}"
        elif trace.num_given:
            name = f"given, {name}"
        run = Run(name, trace, is_base, is_forked)
        if runs and (runs[0].trace.prompt != trace.prompt or not trace.prompt):
            yield Report(tuple(sorted(runs, key=lambda run: run.is_base)))
            runs = []
        runs.append(run)
    if not runs:
        raise InvalidRequest(f"{path} holds no traces")
    yield Report(tuple(sorted(runs, key=lambda run: run.is_base)))


def _run_name(trace: Trace) -> str:
    values = set(trace.alphas.values())
    if not any(values):
        return "base"
    if len(values) == 1:
        return f"alpha {values.pop():g}"
    return ", ".join(f"{name} {alpha:g}" for name, alpha in trace.alphas.items())


def explained(
    model: ProxyTuned,
    questions: Sequence[Question],
    *,
    forks: Sequence[tuple[int, str]] = (),
    top: int = 5,
) -> Iterator[Report]:
    """Yield a report per question, generating several at once.

    Args:
        model: What generates and explains.
        questions: What is asked.
        forks: Positions, from 0, and the tokens that stand there instead: text, or `#` and a token id. Each
            makes one more continuation of every question's first text.
        top: Number of each model's most likely tokens to record.

    Raises:
        InvalidRequest: A fork is beyond the text.
    """
    for start in range(0, len(questions), BATCH_SIZE):
        block = questions[start : start + BATCH_SIZE]
        requests = [request for question in block for request in _requests(model, question, top)]
        made = iter(model.generate_batch(requests, batch_size=BATCH_SIZE))
        for question in block:
            runs = []
            for strength in _steered(model, question):
                if question.continuation is None:
                    trace = next(made)
                    runs.append(Run(_run_name(trace), trace))
                else:
                    trace = model.explain(
                        question.prompt,
                        question.continuation,
                        alpha=strength,
                        experts=question.experts,
                        top=top,
                    )
                    runs.append(Run(f"given, {_run_name(trace)}", trace))
            first = runs[0].trace
            runs += [_forked(model, question, first, *fork, top) for fork in forks]
            runs.append(Run("base", next(made), is_base=True))
            yield Report(tuple(runs))


def _steered(model: ProxyTuned, question: Question) -> list[float | None]:
    """Return the strengths other than 0, which is the base; 0 too if there is no other or a text is given."""
    steered = [
        alpha
        for alpha in question.alphas
        if question.continuation is not None
        or any(model.recipe.strengths(Steering(alpha, question.experts)).values())
    ]
    return steered or list(question.alphas[:1])


def _requests(model: ProxyTuned, question: Question, top: int) -> list[Request]:
    requests = []
    if question.continuation is None:
        requests = [
            Request(question.prompt, question.sampling, alpha, question.experts, True, top)
            for alpha in _steered(model, question)
        ]
    names = model.recipe.named(question.experts)
    base = Request(question.prompt, question.sampling, None, dict.fromkeys(names, 0.0), True, top)
    return [*requests, base]


def _forked(
    model: ProxyTuned, question: Question, trace: Trace, position: int, token: str, top: int
) -> Run:
    """Return the run that continues from another token."""
    from proxytune.text.prompts import continuation_ids

    if position >= trace.num_new_tokens:
        more = "" if question.continuation is not None else ", or raise max_new_tokens"
        raise InvalidRequest(
            f"position {position} is named, and the text has {trace.num_new_tokens} tokens, from 0 to "
            f"{trace.num_new_tokens - 1}.\nhint: name one of them{more}"
        )
    if re.fullmatch(r"#\d+", token):
        other = [int(token[1:])]
        model.ensemble.vocabulary.check_token_ids(other)
    else:
        other = continuation_ids(token, model.tokenizer)
    given = [*trace.token_ids[:position], *other]
    num_left = question.sampling.max_new_tokens - len(given)
    is_end = other[-1] in model.ensemble.eos_token_ids and not question.sampling.ignore_eos
    goes_on = num_left > 0 and not is_end
    further = replace(question.sampling, max_new_tokens=num_left) if goes_on else None
    forked = model.explain(question.prompt, given, further, experts=dict(trace.alphas), top=top)
    return Run(f"what if {position} = {token!r}", forked, is_forked=True)
