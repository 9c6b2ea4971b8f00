"""Rows to train on: what is read and refused, how it is split, and which tokens are trained."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from proxytune.data.rows import Rows, answers_of, read_rows, split_rows
from proxytune.errors import (
    InputFileError,
    InvalidRequest,
    MissingExtra,
    PromptFormatError,
)
from proxytune.text.prompts import render
from proxytune.tune.encode import (
    IGNORED,
    Encoded,
    Example,
    PreferenceExample,
    encode,
)
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id

SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
MORE = {"role": "user", "content": "More"}
SURE = {"role": "assistant", "content": "Sure."}

TEXTS = [{"text": "the end"}, {"text": "another\nday"}]
PAIRS = [{"prompt": "Q: 1+1\nA:", "completion": " 2"}, {"prompt": "", "completion": "in"}]
CHATS = [{"messages": [HI, HELLO]}, {"messages": [SYSTEM, HI, HELLO, MORE, SURE]}]
PREFERENCES = [{"prompt": "Hi", "chosen": " the", "rejected": " a"}]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encoded(
    rows: list[dict[str, Any]], tokenizer: Any = TOKENIZER, *, form: str = "chat", **options: Any
) -> Encoded:
    options = {"max_length": 500, **options}
    return encode(read_rows(rows), tokenizer, prompt_format=form, name="small/model", **options)


def trained(example: Any, tokenizer: Any = TOKENIZER) -> list[str]:
    """Return the trained stretches of an example as text, each label checked against its token."""
    stretches: list[list[int]] = []
    is_open = False
    for token_id, label in zip(example.token_ids, example.labels, strict=True):
        if label == IGNORED:
            is_open = False
            continue
        assert label == token_id
        if not is_open:
            stretches.append([])
            is_open = True
        stretches[-1].append(token_id)
    return [tokenizer.decode(stretch) for stretch in stretches]


def with_bos() -> Any:
    """A tokenizer that begins and ends each text with special tokens."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=special
    )
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


# Reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [TEXTS, PAIRS, CHATS, PREFERENCES])
def test_rows_are_the_same_from_every_kind_of_file(rows, tmp_path):
    import datasets

    lines = "\n\n".join(json.dumps(row) for row in rows)
    files = {
        "rows.jsonl": lines.encode(),
        "rows.ndjson": b"\xef\xbb\xbf" + lines.encode(),
        "lines.json": lines.encode(),
        "unclear.dat": lines.encode(),
        "list.json": json.dumps(rows, indent=1).encode(),
        "data.json": json.dumps({"data": rows, "version": 1}).encode(),
        "list": json.dumps(rows).encode(),
        "rows.jsonl.gz": gzip.compress(lines.encode()),
        "packed": gzip.compress(json.dumps(rows).encode()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    dataset = datasets.Dataset.from_list([{**row, "id": i} for i, row in enumerate(rows)])
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "splits")
    dataset.to_parquet(tmp_path / "rows.parquet")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    given = read_rows(rows)
    for source in [*(tmp_path / name for name in files), tmp_path / "saved", tmp_path / "splits",
                   tmp_path / "rows.parquet", arrow, dataset, iter(rows)]:  # fmt: skip
        found = read_rows(source)
        assert (found.kind, found.rows) == (given.kind, given.rows), source
        assert found.digest == given.digest
    assert read_rows(str(tmp_path / "rows.jsonl")).source == "rows.jsonl"
    assert given.source == "the given rows" and len(given) == len(rows)


def test_a_digest_changes_with_a_word_and_with_the_order():
    digests = {read_rows(rows).digest for rows in (TEXTS, TEXTS[::-1], [{"text": "the  end"}])}
    assert len(digests) == 3


def test_csv_keeps_numbers_and_words_for_nothing_as_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfid,prompt,completion\r\n1,"a, ""b""\nc",12\r\n2,,NA\r\n')
    rows = read_rows(path)
    assert rows.rows == [
        {"prompt": 'a, "b"\nc', "completion": "12"},
        {"prompt": "", "completion": "NA"},
    ]
    assert rows.lines == [2, 4]  # the first has a line break in it
    path.write_text("text\n" + "long " * 50_000 + "\n")
    assert len(read_rows(path).rows[0]["text"]) == 250_000
    path.write_text("text\none,two\n")
    with pytest.raises(InputFileError, match=r"line 2 of rows\.csv: it has more cells"):
        read_rows(path)


def test_a_text_file_is_one_row_even_where_it_looks_like_json(tmp_path):
    (tmp_path / "book.txt").write_bytes("[1]\r\n\n{é\n".encode())
    rows = read_rows(tmp_path / "book.txt")
    assert (rows.kind, rows.rows, rows.lines) == ("text", [{"text": "[1]\r\n\n{é\n"}], [1])
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress((tmp_path / "book.txt").read_bytes()))
    (tmp_path / "README").write_text("Once upon\n")
    assert read_rows(tmp_path / "book.txt.gz").digest == rows.digest
    assert read_rows(tmp_path / "README").rows == [{"text": "Once upon\n"}]


def test_lines_are_counted_with_blank_ones_and_only_line_feeds_end_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"text": "a\u2028b"}\r\n  \n{"text": "c"}', encoding="utf-8", newline="")
    rows = read_rows(path)
    assert rows.lines == [2, 4] and rows.rows[0] == {"text": "a\u2028b"}


def test_columns_that_are_null_are_not_there(tmp_path):
    row = {"text": None, "prompt": "a", "completion": "b", "chosen": None}
    assert read_rows([row]).rows == [{"prompt": "a", "completion": "b"}]


def test_answers_that_repeat_the_prompt_lose_it():
    row = {"prompt": [SYSTEM, HI], "chosen": [SYSTEM, HI, HELLO], "rejected": [SURE]}
    assert read_rows([row]).rows == [
        {"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [SURE]}
    ]
    row = {"prompt": [HI], "completion": [HI, HELLO, MORE, SURE, MORE]}
    assert read_rows([row]).rows == [{"prompt": [HI], "completion": [HELLO, MORE, SURE]}]


def test_a_prompt_that_is_only_in_the_answers_is_what_they_share():
    row = {"chosen": [HI, HELLO, MORE, SURE], "rejected": [HI, HELLO, MORE, HELLO]}
    expected = {"prompt": [HI, HELLO, MORE], "chosen": [SURE], "rejected": [HELLO]}
    assert read_rows([row]).rows == [expected]
    # One conversation goes on where the other ends: they part at the last answer that both have.
    row = {"chosen": [HI, HELLO, MORE, SURE], "rejected": [HI, HELLO]}
    expected = {"prompt": [HI], "chosen": [HELLO, MORE, SURE], "rejected": [HELLO]}
    assert read_rows([row]).rows == [expected]


def test_messages_keep_role_and_content_only():
    row = {"messages": [HI | {"name": "x"}, HELLO | {"tool_calls": None}], "id": 3}
    assert read_rows([row]).rows == [{"messages": [HI, HELLO]}]


BAD_ROWS = [
    ({"question": "a", "answer": "b"}, r"its keys \('question', 'answer'\) fit none"),
    ({"prompt": "a"}, "fit none of the known formats"),
    ({"text": "a", "prompt": "b", "completion": "c"}, "the formats text and completion"),
    ({"text": ""}, '"text" is empty'),
    ({"text": None}, '"text" is null, and must be text'),
    ({"text": 3}, '"text" is a number'),
    ({"text": "\ud800"}, "surrogate"),
    ({"prompt": "a", "completion": " \n"}, '"completion" is empty'),
    ({"prompt": "a", "completion": ["b"]}, '"prompt" is text and "completion" is a list'),
    ({"prompt": [HI], "completion": "b"}, '"prompt" is a list and "completion" is text'),
    ({"prompt": 1, "completion": 2}, '"prompt" is a number'),
    ({"prompt": [HI], "completion": [MORE]}, '"completion" has no message of the assistant'),
    ({"prompt": [HI], "completion": [MORE, SURE]}, "does not continue the prompt"),
    ({"prompt": None, "completion": [HELLO]}, '"prompt" is null'),
    ({"prompt": [], "completion": [SURE]}, '"prompt" is an empty list'),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, '"rejected" is empty'),
    ({"chosen": "b", "rejected": "c"}, '"prompt" is missing'),
    ({"chosen": [HI, HELLO], "rejected": [MORE, HELLO]}, "do not begin with the same messages"),
    ({"chosen": [HI, HELLO, MORE], "rejected": [HI, HELLO]}, "are equal"),
    ({"messages": "Hi"}, '"messages" is text'),
    ({"messages": []}, '"messages" is an empty list'),
    ({"messages": [HI]}, "no message of the assistant"),
    ({"messages": [HELLO, HI]}, "no message of the assistant that answers another"),
    ({"messages": [{"from": "human", "value": "x"}]}, r"has the keys 'from', 'value'"),
    ({"messages": [{"role": "human", "content": "x"}]}, "has the role 'human', which is not one of system"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "has the role"),
    ({"messages": [HI, {"role": "assistant", "content": None}]}, "message 2 .* null, and must be"),
    ({"messages": [HI, {"role": "assistant", "content": [{"type": "text"}]}]}, "is a list, and must"),
    ({"messages": [HI, {"role": "assistant", "content": ""}]}, "is empty and of the assistant"),
    ({"messages": [HI, HELLO | {"tool_calls": [{"id": 1}]}]}, "tool calls"),
    ([1], "a list, and must be an object"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "why"), BAD_ROWS, ids=[str(why) for _, why in BAD_ROWS])
def test_a_row_that_cannot_be_used_is_refused_with_its_line(row, why, tmp_path):
    good: dict[str, Any] = {"text": "fine"}
    path = write(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(InputFileError, match=rf"(?s)^line 2 of rows\.jsonl: .*{why}.*\nhint: "):
        read_rows(path)
    with pytest.raises(InputFileError, match=rf"(?s)^row 1 of the given rows: .*{why}"):
        read_rows([row])


def test_rows_of_different_formats_are_refused():
    with pytest.raises(InputFileError, match=r"row 3 .* is completion, and that of row 1 is text"):
        read_rows([*TEXTS, PAIRS[0]])
    conversation = {"prompt": [HI], "completion": [HELLO]}
    with pytest.raises(InputFileError, match=r"is completion \(lists of messages\), and that of"):
        read_rows([PAIRS[0], conversation])


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", b"", r"a\.jsonl has no rows"),
        ("a.txt", b" \n", r"a\.txt has no rows"),
        ("a.json", b"[]", r"a\.json has no rows"),
        ("a.json", b"", r"a\.json has no rows"),
        ("a.csv", b"text\n", r"a\.csv has no rows"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', r"^line 3 of a\.jsonl: not valid JSON"),
        ("a.json", b'{"text": "a"}\n{"text": \n', r"^line 2 of a\.json: not valid JSON"),
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', r"^line 2 of a\.json: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"^line 1 of a\.jsonl: not valid JSON"),
        ("a.jsonl", b"just text", r"name a file of plain text \.txt"),
        ("a.json", b'[{"text": "a"}, 3]', r"^row 2 of a\.json: it is a number, and must be an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"^line 2 of a\.jsonl: not UTF-8"),
        ("a.txt", "text".encode("utf-16"), r"^line 1 of a\.txt: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-12], "damaged gzip file"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "damaged gzip file"),
        ("a.parquet", b"PAR1 not", "cannot be read as Parquet"),
        ("a.arrow", b"nothing", "cannot be read as Parquet or Arrow"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_with_the_place(name, content, why, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputFileError, match=why) as raised:
        read_rows(tmp_path / name)
    assert "\nhint: " in str(raised.value)


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    missing = [
        "rows.jsonl",
        "here/rows.jsonl",
        "rows/train",
        "./a/b",
        "/a/b",
        "a/b/c",
        "",
        "x" * 999,
    ]
    for source in [*missing, Path("owner/name")]:
        with pytest.raises(InputFileError, match="does not exist"):
            read_rows(source)


def test_a_name_on_the_hub_is_loaded_with_its_configuration_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        if names[0] == "owner/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/none' doesn't exist")
        return datasets.Dataset.from_list(TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("owner/name-1.0:main", split="test")
    assert (rows.rows, rows.source) == (TEXTS, "owner/name-1.0:main")
    read_rows("owner/name")
    assert asked == [
        (("owner/name-1.0", "main"), {"split": "test"}),
        (("owner/name", None), {"split": "train"}),
    ]
    with pytest.raises(InputFileError, match=r"(?s)no file .*Hub .*doesn't exist"):
        read_rows("owner/none")


def test_without_the_library_the_install_line_is_given(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("owner/name", tmp_path):
        with pytest.raises(MissingExtra, match=r"pip install .*\[tune\]'"):
            read_rows(source)
    assert len(read_rows(write(tmp_path / "rows.jsonl", TEXTS))) == 2


def test_a_directory_needs_a_data_set_with_the_split(tmp_path):
    import datasets

    with pytest.raises(InputFileError, match="not one that `save_to_disk` of datasets wrote"):
        read_rows(tmp_path)
    parts = {
        "train": datasets.Dataset.from_list(TEXTS),
        "dev": datasets.Dataset.from_list(TEXTS[:1]),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    assert len(read_rows(tmp_path / "data", split="dev")) == 1
    with pytest.raises(InputFileError, match="has no split 'test'; it has 'train', 'dev'"):
        read_rows(tmp_path / "data", split="test")
    with pytest.raises(InputFileError, match=r"hint: if it is a data set with several splits"):
        read_rows(datasets.DatasetDict(parts))
    (tmp_path / "data" / "train" / "data-00000-of-00001.arrow").write_bytes(b"torn")
    with pytest.raises(InputFileError, match="data cannot be read: "):
        read_rows(tmp_path / "data")


# Splitting -----------------------------------------------------------------------------------------


def numbered(num_rows: int) -> Rows:
    return read_rows([{"text": str(i)} for i in range(num_rows)])


def test_a_split_keeps_each_row_once_in_order_with_its_line():
    train, valid = split_rows(numbered(40), 0.2, seed=1)
    assert valid is not None and len(valid) == 8
    assert sorted(train.lines + valid.lines) == list(range(1, 41))
    for part in (train, valid):
        assert part.lines == sorted(part.lines)
        assert [row["text"] for row in part.rows] == [str(line - 1) for line in part.lines]


def test_a_split_depends_on_the_seed_and_the_number_of_rows_only():
    def chosen(rows, seed):
        return split_rows(rows, 0.2, seed)[1].lines

    other = read_rows([{"prompt": "a", "completion": str(i)} for i in range(40)])
    assert chosen(numbered(40), 1) == chosen(other, 1) != chosen(numbered(40), 2)


def test_each_side_of_a_split_has_a_row():
    for share in (0.001, 0.999):
        train, valid = split_rows(numbered(2), share, seed=0)
        assert valid is not None and len(train) == len(valid) == 1


def test_no_share_sets_nothing_aside():
    rows = numbered(1)
    assert split_rows(rows, 0, seed=0) == (rows, None)


@pytest.mark.parametrize("share", [1, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(InvalidRequest, match=r"valid_share is .* below 1"):
        split_rows(numbered(3), share, seed=0)


def test_a_single_text_is_cut_at_the_last_blank_line_before_its_share():
    # 100 characters; a share of 0.2 begins at 80, and the blank line before it ends at 70.
    text = "a" * 48 + "\n" + "b" * 19 + "\n\n" + "c" * 5 + "\n" + "d" * 24
    train, valid = split_rows(read_rows([{"text": text}]), 0.2, seed=0)
    assert valid is not None
    assert (train.rows, valid.rows) == ([{"text": text[:70]}], [{"text": text[70:]}])


def test_a_blank_line_that_would_take_too_much_is_passed_over_for_a_line_end():
    text = "Title\n\n" + "a" * 60 + "\n" + "b" * 32
    _, valid = split_rows(read_rows([{"text": text}]), 0.1, seed=0)
    assert valid is not None and valid.rows == [{"text": "b" * 32}]


@pytest.mark.parametrize("rows", [[{"text": "one line"}], [{"text": "\n\na"}], PAIRS[:1]])
def test_one_row_that_cannot_be_cut_is_refused(rows):
    with pytest.raises(
        InputFileError, match=r"has only one row.*\nhint: --valid-share 0 .*--valid-data"
    ):
        split_rows(read_rows(rows), 0.5, seed=0)


# Encoding: text ------------------------------------------------------------------------------------


def test_texts_become_one_stream_whose_every_token_but_the_first_is_predicted_once():
    rows = [{"text": "the tin"}, {"text": "an eel"}, {"text": "x"}]
    stream = [i for row in rows for i in [*TOKENIZER.encode(row["text"]), EOS]]
    for max_length in range(2, len(stream) + 2):
        result = encoded(rows, max_length=max_length)
        predicted = []
        for number, example in enumerate(result.examples):
            assert isinstance(example, Example) and example.labels[0] == IGNORED
            assert 2 <= len(example.token_ids) <= max_length
            assert number == len(result.examples) - 1 or len(example.token_ids) == max_length
            predicted += example.labels[1:]
        assert predicted == stream[1:]
        assert result.num_trained == len(stream) - 1
        assert result.num_tokens == len(stream) - 1 + len(result.examples)
        assert (result.num_rows, result.num_truncated, result.num_dropped) == (3, 0, 0)


def test_a_text_begins_and_ends_with_special_tokens_once():
    tokenizer = with_bos()
    (example,) = encoded([{"text": "Hi"}, {"text": "in"}], tokenizer).examples
    text = tokenizer.decode(example.token_ids)
    assert text == "<|im_start|>Hi<|endoftext|><|im_start|>in<|endoftext|>"


def test_without_an_end_token_texts_and_completions_do_not_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    (example,) = encoded([{"text": "ab"}], tokenizer).examples
    assert example.token_ids == tokenizer.encode("ab")
    (example,) = encoded(PAIRS[:1], tokenizer, form="plain").examples
    assert trained(example) == [" 2"]


def test_texts_that_are_not_packed_are_cut_one_by_one():
    result = encoded([{"text": "abcdef"}, {"text": "ab"}], packed=False, max_length=4)
    assert [e.token_ids for e in result.examples] == [
        TOKENIZER.encode("abcd"),
        [*TOKENIZER.encode("ab"), EOS],
    ]
    assert (result.num_truncated, result.num_tokens, result.num_trained) == (1, 7, 5)


# Encoding: completions -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "chat", "User: {{ prompt }}\nAssistant:"])
def test_a_completion_follows_the_very_prompt_that_generation_feeds(form):
    (example,) = encoded(PAIRS[:1], form=form).examples
    prompt_ids = render(
        PAIRS[0]["prompt"], prompt_format=form, tokenizer=TOKENIZER, name="small/model"
    )
    assert example.token_ids == [*prompt_ids, *TOKENIZER.encode(" 2"), EOS]
    assert example.labels == [IGNORED] * len(prompt_ids) + example.token_ids[len(prompt_ids) :]


def test_no_token_reaches_over_the_end_of_the_prompt():
    assert len(TOKENIZER.encode("the")) == 1
    (example,) = encoded([{"prompt": "t", "completion": "he"}], form="plain").examples
    assert TOKENIZER.convert_ids_to_tokens(example.token_ids) == ["t", "h", "e", "<|endoftext|>"]


@pytest.mark.parametrize("form", ["plain", "{{ prompt }}"])
def test_an_empty_prompt_is_the_token_that_begins_a_text_or_else_the_one_that_ends_it(form):
    row = [{"prompt": "", "completion": "in"}]
    (example,) = encoded(row, form=form).examples
    assert example.token_ids == [EOS, *TOKENIZER.encode("in"), EOS]
    assert trained(example) == ["in<|endoftext|>"]
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    (example,) = encoded(row, tokenizer, form=form).examples
    assert example.token_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputFileError, match="row 1 of the given rows: the prompt has no tokens"):
        encoded(row, tokenizer, form=form)


def test_completions_are_cut_at_the_end_and_dropped_where_the_prompt_fills_the_length():
    rows = [{"prompt": "xyz", "completion": c} for c in ("a", "bc")]
    rows.append({"prompt": "uvwxy", "completion": "d"})
    result = encoded(rows, form="plain", max_length=5)
    assert [trained(e) for e in result.examples] == [["a<|endoftext|>"], ["bc"]]
    assert (result.num_rows, result.num_truncated, result.num_dropped) == (3, 1, 1)
    assert (result.num_tokens, result.num_trained) == (10, 4)
    with pytest.raises(
        InputFileError, match=r"no row of the given rows .*\nhint: raise --max-length"
    ):
        encoded(rows, form="plain", max_length=3)
    with pytest.raises(InvalidRequest, match="max_length is 1"):
        encoded(rows, form="plain", max_length=1)


def test_a_completion_without_tokens_is_refused_with_its_line():
    tokenizer = tiny_tokenizer()
    # As tokenizers do that clean their text.
    from tokenizers.normalizers import Replace

    tokenizer.backend_tokenizer.normalizer = Replace("\u200b", "")
    why = "row 2 of the given rows: small/model has no tokens for its answer"
    with pytest.raises(InputFileError, match=why):
        encoded([PAIRS[0], {"prompt": "a", "completion": "\u200b"}], tokenizer, form="plain")


# Answers -------------------------------------------------------------------------------------------


def test_the_answer_of_a_text_row_is_its_completion_or_its_chosen_text():
    completion, preference = read_rows(PAIRS[:1]), read_rows(PREFERENCES)
    assert answers_of(completion.rows[0]) == [("Q: 1+1\nA:", " 2")]
    assert answers_of(preference.rows[0]) == [("Hi", " the")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, HI, HELLO, MORE, SURE, MORE]},
        {"prompt": [SYSTEM, HI], "completion": [HELLO, MORE, SURE]},
        {"prompt": [SYSTEM, HI], "chosen": [HELLO, MORE, SURE], "rejected": [SURE]},
    ],
    ids=["messages", "completion", "preference"],
)
def test_each_reply_of_the_assistant_is_an_answer_to_all_messages_before_it(row):
    """Scores used to take only the last reply, without those before it, or all joined into one text."""
    (checked,) = read_rows([row]).rows
    assert answers_of(checked) == [([SYSTEM, HI], "Hello."), ([SYSTEM, HI, HELLO, MORE], "Sure.")]


def test_an_earlier_reply_in_the_prompt_is_no_answer():
    (checked,) = read_rows([{"prompt": [HI, HELLO, MORE], "completion": [SURE]}]).rows
    assert answers_of(checked) == [([HI, HELLO, MORE], "Sure.")]


def test_answers_are_what_training_takes_its_loss_on():
    messages = [HELLO, SYSTEM, HI, HELLO, MORE, SURE]
    (checked,) = read_rows([{"messages": messages}]).rows
    (example,) = encoded([{"messages": messages}]).examples
    turns = [(prompt, answer + "<|im_end|>\n") for prompt, answer in answers_of(checked)]
    assert_generation_sees_it(example, turns, "chat", TOKENIZER)


# Encoding: conversations ---------------------------------------------------------------------------


def assert_generation_sees_it(
    example: Any, turns: list[tuple[list[Any], str]], form: str, tokenizer: Any
) -> None:
    """Each trained stretch comes after exactly the tokens that `generate` feeds for the turn."""
    starts = [
        i
        for i, label in enumerate(example.labels)
        if label != IGNORED and (i == 0 or example.labels[i - 1] == IGNORED)
    ]
    assert len(starts) == len(turns)
    for start, (prompt, _) in zip(starts, turns, strict=True):
        assert example.token_ids[:start] == render(
            prompt, prompt_format=form, tokenizer=tokenizer, name="small/model"
        )
    assert trained(example, tokenizer) == [text for _, text in turns]


@pytest.mark.parametrize("form", ["chat", CHAT_TEMPLATE])
def test_every_turn_of_the_assistant_is_trained_after_what_generation_would_see(form):
    messages = [SYSTEM, HI, HELLO, MORE, SURE, MORE]
    (example,) = encoded([{"messages": messages}], form=form).examples
    turns = [(messages[:2], "Hello.<|im_end|>\n"), (messages[:4], "Sure.<|im_end|>\n")]
    assert_generation_sees_it(example, turns, form, TOKENIZER)
    assert TOKENIZER.decode(example.token_ids).endswith("Sure.<|im_end|>\n")  # nothing after it


def test_only_the_completion_of_a_conversation_is_trained():
    row = {"prompt": [HI, HELLO, MORE], "completion": [SURE, MORE, HELLO]}
    (example,) = encoded([row]).examples
    assert trained(example) == ["Sure.<|im_end|>\n", "Hello.<|im_end|>\n"]
    assert TOKENIZER.decode(example.token_ids).count("Hello.") == 2


def test_a_greeting_before_any_message_is_read_and_not_trained():
    (example,) = encoded([{"messages": [HELLO, HI, SURE]}]).examples
    assert trained(example) == ["Sure.<|im_end|>\n"]
    assert "Hello." in TOKENIZER.decode(example.token_ids)


def test_in_the_plain_format_each_turn_ends_the_text_and_has_an_example_of_its_own():
    messages = [HI, HELLO, MORE, SURE]
    result = encoded([{"messages": messages}], form="plain")
    first, second = result.examples
    assert_generation_sees_it(first, [(messages[:1], "Hello.<|endoftext|>")], "plain", TOKENIZER)
    assert_generation_sees_it(second, [(messages[:3], " Sure.<|endoftext|>")], "plain", TOKENIZER)
    assert result.num_rows == 1


THINKING = (  # As reasoning models do: thoughts are shown in the last turn, and stripped from earlier ones.
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('#')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_turns_whose_history_is_written_differently_later_have_examples_of_their_own():
    thought = {"role": "assistant", "content": "hm#Hello."}
    messages = [HI, thought, MORE, SURE]
    first, second = encoded([{"messages": messages}], form=THINKING).examples
    assert_generation_sees_it(first, [(messages[:1], "hm#Hello.<|im_end|>\n")], THINKING, TOKENIZER)
    assert_generation_sees_it(second, [(messages[:3], "Sure.<|im_end|>\n")], THINKING, TOKENIZER)
    assert "hm#" not in TOKENIZER.decode(second.token_ids)


@pytest.mark.parametrize(
    ("form", "turn"),
    [
        # Shows prompts only.
        ("[INST] {{ prompt }} [/INST]", "Hello.<|endoftext|>"),
        # Begins the assistant's next turn, whether asked to or not.
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
         " Hello.<|endoftext|>"),
        # Writes nothing visible after a turn.
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant:{% endif %}", " Hello.<|endoftext|>"),
        # Has no generation prompt and needs none, as Llama 2's.
        ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
         "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
         " Hello. <|endoftext|>"),
        # Opens the turn with something that its history does not have.
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
         "{% if add_generation_prompt %}<assistant><think>{% endif %}", "Hello.<|endoftext|>"),
    ],
    ids=["prompt only", "always open", "no visible end", "no generation prompt", "thinking"],
)  # fmt: skip
def test_a_turn_ends_as_its_template_ends_it_or_with_the_end_token(form, turn):
    messages = [HI, HELLO]
    (example,) = encoded([{"messages": messages}], form=form).examples
    assert_generation_sees_it(example, [(messages[:1], turn)], form, TOKENIZER)


def test_conversations_are_cut_and_dropped_by_what_is_left_to_train():
    rows = [{"messages": [HI, HELLO]}, {"messages": [{"role": "user", "content": "x" * 80}, SURE]}]
    whole = encoded(rows).examples[0]
    num_prompt = whole.labels.count(IGNORED)
    result = encoded(rows, max_length=num_prompt + 2)
    assert [trained(e) for e in result.examples] == [["He"]]
    assert (result.num_truncated, result.num_dropped) == (1, 1)


def test_a_missing_chat_template_is_told_as_generation_tells_it_and_a_failing_one_with_its_row():
    with pytest.raises(PromptFormatError, match=r"^small/model has no chat template"):
        encoded(CHATS, tiny_tokenizer(chat_template=None))
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}hi"
    )
    with pytest.raises(PromptFormatError, match=r"(?s)^row 2 of the given rows: .*no system"):
        encoded(CHATS, tiny_tokenizer(chat_template=refusing))
    with pytest.raises(PromptFormatError, match="'chatml', which is not"):
        encoded(CHATS, form="chatml")


# Encoding: preferences -----------------------------------------------------------------------------


def test_a_preference_is_a_prompt_and_two_answers_that_end():
    result = encoded(PREFERENCES, form="plain")
    assert result.examples == [
        PreferenceExample(
            TOKENIZER.encode("Hi"), [*TOKENIZER.encode(" the"), EOS], [*TOKENIZER.encode(" a"), EOS]
        )
    ]
    assert (result.num_tokens, result.num_trained) == (8, 4)


def test_answers_are_cut_to_the_room_that_the_prompt_leaves():
    rows = [
        {"prompt": "wxyz", "chosen": "bcd", "rejected": "q"},
        {"prompt": "uvwxyz", "chosen": "b", "rejected": "c"},
    ]
    result = encoded(rows, form="plain", max_length=6)
    (example,) = result.examples
    assert isinstance(example, PreferenceExample)
    assert (TOKENIZER.decode(example.chosen_ids), example.rejected_ids[-1]) == ("bc", EOS)
    assert (result.num_truncated, result.num_dropped) == (1, 1)
    with pytest.raises(InputFileError, match="raise --max-length"):
        encoded(rows[1:], form="plain", max_length=6)


def test_conversations_are_preferred_with_the_end_of_the_turn():
    row = {"prompt": [HI], "chosen": [HELLO, MORE, SURE], "rejected": [SURE]}
    (example,) = encoded([row]).examples
    assert isinstance(example, PreferenceExample)
    assert TOKENIZER.decode(example.prompt_ids).endswith("<|im_start|>assistant\n")
    assert TOKENIZER.decode(example.chosen_ids) == (
        "Hello.<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\nSure.<|im_end|>\n"
    )
    assert TOKENIZER.decode(example.rejected_ids) == "Sure.<|im_end|>\n"
    with pytest.raises(PromptFormatError, match=r"row 1 of .*several messages"):
        encoded([row], form="plain")


# Real data -----------------------------------------------------------------------------------------


@needs_shared
def test_math_problems_are_read_and_encoded(tmp_path):
    lines = (SHARED / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()[:300]
    with pytest.raises(InputFileError, match="'question', 'answer'"):
        read_rows(SHARED / "gsm8k" / "train.jsonl")
    rows = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in map(json.loads, lines)
    ]
    result = encoded(rows, form="plain", max_length=4000)
    assert (result.num_truncated, result.num_dropped, len(result.examples)) == (0, 0, 300)
    for row, example in zip(rows, result.examples, strict=True):
        assert trained(example) == [row["completion"] + "<|endoftext|>"]
        assert TOKENIZER.decode(example.token_ids) == (
            row["prompt"] + row["completion"] + "<|endoftext|>"
        )


@needs_shared
@pytest.mark.parametrize("corpus", ["english_digitalgov", "python_stdlib", "medical_medquad"])
def test_corpora_are_read_as_text_and_nothing_of_them_is_lost(corpus):
    rows = read_rows(SHARED / "corpora" / corpus / "valid.jsonl.gz")
    assert rows.kind == "text"
    result = encode(rows, TOKENIZER, prompt_format="plain", max_length=512, name="small/model")
    stream = [i for e in result.examples if isinstance(e, Example) for i in e.token_ids[1:]]
    stream.insert(0, result.examples[0].token_ids[0])  # type: ignore[union-attr]
    assert TOKENIZER.decode(stream) == "".join(r["text"] + "<|endoftext|>" for r in rows.rows)


@needs_shared
def test_instructions_are_encoded_as_conversations():
    with gzip.open(SHARED / "instruction" / "alpaca_5000.json.gz", "rt", encoding="utf-8") as file:
        source = json.load(file)[:200]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in source
        if row["output"].strip()
    ]
    result = encoded(rows, max_length=10_000)
    for row, example in zip(rows, result.examples, strict=True):
        assert trained(example) == [row["messages"][1]["content"] + "<|im_end|>\n"]


@needs_shared
def test_a_book_is_cut_between_its_paragraphs():
    rows = read_rows(SHARED / "corpora" / "tinyshakespeare" / "train.txt")
    train, valid = split_rows(rows, 0.05, seed=0)
    assert valid is not None
    text, end = train.rows[0]["text"], valid.rows[0]["text"]
    assert text + end == rows.rows[0]["text"] and text.endswith("\n\n")
    assert 0.05 <= len(end) / len(text + end) < 0.051
