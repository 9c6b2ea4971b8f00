"""What DSPy does: its language model alone, and Predict with an adapter for plain text."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("DSPY_CACHEDIR", tempfile.mkdtemp())

import dspy
from things import ADDRESS, EXPERT, MODEL, run


def _model(name=MODEL, **options):
    return dspy.LM(
        f"openai/{name}",
        api_base=f"{ADDRESS}/v1",
        api_key="none",
        cache=False,
        num_retries=0,
        max_tokens=16,
        temperature=0.0,
        **options,
    )


class _Plain(dspy.Adapter):
    """Takes the whole answer as the only output field: small models do not keep to markers."""

    def format(self, signature, demos, inputs):
        asked = "\n".join(f"{name}: {value}" for name, value in inputs.items())
        return [{"role": "user", "content": asked}]

    def parse(self, signature, completion):
        return dict.fromkeys(signature.output_fields, completion)


def language_model():
    model = _model()
    by_prompt = model("Who are you?")
    by_messages = model(messages=[{"role": "user", "content": "Who are you?"}])
    assert by_prompt == by_messages and by_prompt[0]


def several_answers():
    assert len(_model(n=2)("Who are you?", temperature=1.0)) == 2


def predict():
    with dspy.context(lm=_model(), adapter=_Plain()):
        found = dspy.Predict("question -> answer")(question="Who are you?")
    assert isinstance(found.answer, str)


def steering():
    base, steered = (
        _model(EXPERT, extra_body={"proxytune": {"alpha": alpha}})("Good morrow!")
        for alpha in (0, 1.5)
    )
    assert base != steered


if __name__ == "__main__":
    run(globals())
