"""Rows: what is read and refused, how they are split, and which answers they have."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from proxytune.data.rows import Rows, answers_of, read_rows, split_rows
from proxytune.errors import InputFileError, InvalidRequest, MissingExtra

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")


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
    ({"messages": [HI, {"role": "assistant", "content": ""}]}, "is an empty message of the assistant"),
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


# Real data -----------------------------------------------------------------------------------------


@needs_shared
def test_a_book_is_cut_between_its_paragraphs():
    rows = read_rows(SHARED / "corpora" / "tinyshakespeare" / "train.txt")
    train, valid = split_rows(rows, 0.05, seed=0)
    assert valid is not None
    text, end = train.rows[0]["text"], valid.rows[0]["text"]
    assert text + end == rows.rows[0]["text"] and text.endswith("\n\n")
    assert 0.05 <= len(end) / len(text + end) < 0.051
