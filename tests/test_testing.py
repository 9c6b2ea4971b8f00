"""`proxytune.testing`: the toy model that users test their own programs with."""

from __future__ import annotations

import proxytune.testing
from proxytune.request import SamplingParams
from proxytune.testing import TOKENS, toy_model, toy_table

SAMPLING = SamplingParams(max_new_tokens=12)


def test_the_same_call_gives_the_same_model():
    first, again = toy_model(seed=3), toy_model(seed=3)
    assert first.generate("a", SAMPLING).text == again.generate("a", SAMPLING).text


def test_alpha_zero_is_the_base_alone_and_experts_differ():
    model = toy_model(experts={"one": 1.0, "two": 1.0}, eos_logit=-100.0)
    base = {model.generate("a", SAMPLING, alpha=0, experts=e).text for e in ("one", "two")}
    steered = {model.generate("a", SAMPLING, experts=e).text for e in ("one", "two")}
    assert len(base) == 1 and len(steered) == 2 and base.isdisjoint(steered)


def test_the_first_token_follows_from_the_formula():
    """The three tables of `toy_model(seed=0)`: the base's has seed 0, the anti-expert's 1."""
    expert = toy_table(sum(b"first"))
    row = TOKENS.index("a")
    steered = toy_table(0)[row] + 0.7 * (expert[row] - toy_table(1)[row])
    trace = toy_model().generate("a", SamplingParams(max_new_tokens=1), alpha=0.7)
    assert trace.token_ids[0] == int(steered.argmax())


def test_its_docstring_is_a_program_that_runs():
    lines = proxytune.testing.__doc__.split("\n\n")[1]
    code = "\n".join(line.removeprefix("    ") for line in lines.splitlines())
    rest = proxytune.testing.__doc__.split("\n\n")[2]
    code += "\n" + "\n".join(line.removeprefix("    ") for line in rest.splitlines())
    exec(code, {})
