"""Rows as passages to predict and as prompts to answer."""

from __future__ import annotations

import pytest

from proxytune.data.passages import passages_of, rows_of
from proxytune.data.rows import read_rows
from proxytune.errors import InvalidRequest
from proxytune.testing import toy_model


def test_rows_of_every_kind_become_what_is_to_be_predicted():
    model = toy_model()
    texts = passages_of(model, read_rows([{"text": "abcdef"}, {"text": "a"}]), window=4)
    assert [len(p.token_ids) for p in texts] == [3, 2]  # the second text has nothing to predict
    rows = read_rows([{"prompt": "ab", "completion": "cd"}])
    (answer,) = passages_of(model, rows, window=4)
    assert answer.prompts[0] == tuple(model.tokenizer.encode("ab", add_special_tokens=False))
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (row,) = rows_of(model, read_rows([{"messages": [*talk, {"role": "user", "content": "x"}]}]))
    assert row.reference == "cd"
    turns = passages_of(
        model,
        read_rows([{"prompt": talk[:1], "completion": [talk[1], talk[0], talk[1]]}]),
        window=4,
    )
    # Both replies, an end after each; after `Assistant:` comes a space, as in training.
    assert [len(p.token_ids) for p in turns] == [3, 4]
    assert len(turns[1].prompts[0]) > len(turns[0].prompts[0])
    (liked,) = rows_of(model, read_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    assert liked.reference == "b"


def test_texts_alone_have_no_answers_to_compare_with():
    with pytest.raises(InvalidRequest, match="plain texts"):
        rows_of(toy_model(), read_rows([{"text": "abc"}]))
