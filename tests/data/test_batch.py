"""Batch files: what a line may hold, and what a run leaves when it is interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.data.batch import BatchProgress, BatchReport, run_batch
from proxytune.data.lines import SAMPLING_OPTIONS, BatchOptions, InputFile, line_seed, parse_line
from proxytune.data.resumable import ResumableOutput, number_list
from proxytune.errors import InputFileError, InvalidRequest, OutputFileError, UserError
from proxytune.model import ProxyTuned
from proxytune.request import ChatOptions, SamplingParams, Steering
from proxytune.testing import toy_recipe
from tests.support.toys import toy_load

RECIPE = toy_recipe({"first": 1.0, "second": 0.5})
SAMPLING = SamplingParams(max_new_tokens=12, temperature=0.9, seed=7)


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    """Write JSON lines; a string stands for itself."""
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    path.write_text(text, encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def prompts(count: int) -> list[dict[str, Any]]:
    """Return lines of different lengths, with an id."""
    return [{"id": i, "prompt": "abcdefgh"[: 1 + i % 8]} for i in range(count)]


def run(
    input_file: Path, output_file: Path, *, sampling: SamplingParams = SAMPLING, **options: Any
) -> BatchReport:
    on_progress = options.pop("on_progress", None)
    steering = Steering(options.pop("alpha", None), options.pop("experts", None))
    return run_batch(
        input_file,
        output_file,
        recipe=options.pop("recipe", RECIPE),
        load=options.pop("load", lambda names: toy_load(RECIPE, experts=names)),
        options=BatchOptions(sampling, steering, **{"batch_size": 4, **options}),
        on_progress=on_progress,
    )


def one(line: Any, tmp_path: Path, **options: Any) -> dict[str, Any]:
    """Run a single line and return its output line."""
    output = tmp_path / "one.jsonl"
    output.unlink(missing_ok=True)
    run(write_lines(tmp_path / "one-in.jsonl", [line]), output, **options)
    return read_lines(output)[0]


def test_a_line_comes_back_with_all_its_fields_and_an_answer(tmp_path: Path):
    line = {"id": "x-1", "prompt": "abc", "gold": {"answer": [1, "é"]}}
    answer = one(line, tmp_path)
    output = answer.pop("output")
    assert answer == line
    assert output["num_new_tokens"] == len(output["token_ids"]) == 12
    assert output["finish_reason"] == "length"
    assert "latency_s" not in output


def test_answers_are_those_of_the_library_in_the_order_of_the_input(tmp_path: Path):
    lines = prompts(11)
    greedy = SamplingParams(max_new_tokens=9)
    run(write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", sampling=greedy)
    model = toy_load(RECIPE)
    for line, answer in zip(lines, read_lines(tmp_path / "out.jsonl"), strict=True):
        assert answer["id"] == line["id"]
        assert answer["output"]["text"] == model.generate(line["prompt"], greedy).text


def test_a_line_says_how_its_conversation_is_rendered():
    line = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}],
        "options": {"continue_final_message": True, "chat_template_kwargs": {"thinking": False}},
    }
    options = BatchOptions(SAMPLING)
    request = parse_line(json.dumps(line).encode(), 1, recipe=RECIPE, options=options).request
    assert request.chat == ChatOptions(None, True, {"thinking": False})
    refused: list[tuple[dict[str, Any], str]] = [
        ({"continue_final_message": 1}, "continue_final_message is 1"),
        ({"chat_template_kwargs": []}, "must be an object"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "only one of them"),
    ]
    for own, words in refused:
        with pytest.raises(UserError, match=words):
            raw = json.dumps(line | {"options": own}).encode()
            parse_line(raw, 1, recipe=RECIPE, options=options)
    with pytest.raises(UserError, match="the prompt is not a conversation"):
        raw = json.dumps({"prompt": "hi", "options": {"continue_final_message": True}}).encode()
        parse_line(raw, 1, recipe=RECIPE, options=options)


def test_a_prompt_may_be_text_messages_or_token_ids(tmp_path: Path):
    texts = [
        one(line, tmp_path)["output"]["text"]
        for line in (
            {"prompt": "ab"},
            {"prompt": [0, 1]},
            {"prompt": [{"role": "user", "content": "ab"}]},
            {"messages": [{"role": "user", "content": "ab"}]},
        )
    ]
    assert len(set(texts)) == 1


def test_options_of_a_line_hold_for_it_alone(tmp_path: Path):
    lines = [
        {"prompt": "ab"},
        {"prompt": "ab", "options": {"max_new_tokens": 3, "alpha": 0, "temperature": 0}},
        {"prompt": "ab", "options": {"expert": "second"}},
        {"prompt": "ab", "options": {"expert": {"first": 0.25, "second": 2}, "logprobs": 2}},
    ]
    run(write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    plain, short, second, both = (line["output"] for line in read_lines(tmp_path / "out.jsonl"))
    assert plain["num_new_tokens"] == 12 and plain["expert"] == ["first", "second"]
    assert short["num_new_tokens"] == 3 and "seed" not in short
    base = toy_load(RECIPE).generate("ab", SamplingParams(max_new_tokens=3), alpha=0)
    assert short["text"] == base.text
    assert second["expert"] == "second" and second["alpha"] == 0.5
    assert both["alpha"] == {"first": 0.25, "second": 2}
    assert len(both["logprobs"]) == 12 and len(both["logprobs"][0]["top"]) == 2
    assert "logprobs" not in plain


def test_a_null_is_absence_everywhere_in_a_line(tmp_path: Path):
    """Nulls of `messages`, `options` and of single options were refused, or hid what the run had set."""
    options = dict.fromkeys(("alpha", "expert", *SAMPLING_OPTIONS))
    lines = [
        {"prompt": "ab"},
        {"prompt": "ab", "messages": None, "options": None},
        {"prompt": "ab", "options": options},
        {"messages": [{"role": "user", "content": "ab", "tool_calls": None}], "prompt": None},
    ]
    seeded = [line | {"options": {**(line.get("options") or {}), "seed": 3}} for line in lines]
    run(write_lines(tmp_path / "in.jsonl", seeded), tmp_path / "out.jsonl")
    plain, *others = (line["output"] for line in read_lines(tmp_path / "out.jsonl"))
    assert others == [plain] * 3
    given = one(lines[2], tmp_path, sampling=replace(SAMPLING, stop=("b",), max_new_tokens=5))
    assert given["options"] == options and given["output"]["num_new_tokens"] <= 5


def test_a_top_k_larger_than_any_vocabulary_keeps_all_tokens(tmp_path: Path):
    whole, cut = (
        one({"prompt": "ab", "options": {"top_k": top_k}}, tmp_path)["output"]["text"]
        for top_k in (0, 2**70)
    )
    assert whole == cut


def test_a_lines_alpha_and_experts_replace_the_runs(tmp_path: Path):
    own = {"first": 0.5, "second": 0.5}
    answer = one({"prompt": "ab", "options": {"alpha": 2}}, tmp_path, experts=own)
    assert answer["output"]["alpha"] == {"first": 2, "second": 2}
    answer = one({"prompt": "ab", "options": {"expert": {"first": 0.1}}}, tmp_path, alpha=3.0)
    assert answer["output"]["alpha"] == 0.1


def test_only_experts_that_a_line_uses_are_loaded(tmp_path: Path):
    loaded = []

    def load(names: tuple[str, ...]) -> ProxyTuned:
        loaded.append(names)
        return toy_load(RECIPE, experts=names)

    lines = [{"prompt": "ab", "options": {"expert": "second"}}]
    run(write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", load=load)
    assert loaded == [("second",)]


def test_a_sampled_line_has_a_seed_from_the_runs_seed_and_its_number(tmp_path: Path):
    first = {"prompt": "ab"}
    run(write_lines(tmp_path / "in.jsonl", [first, first]), tmp_path / "out.jsonl")
    one_, two = (line["output"] for line in read_lines(tmp_path / "out.jsonl"))
    assert (one_["seed"], two["seed"]) == (line_seed(7, 1), line_seed(7, 2))
    assert one_["text"] != two["text"]
    alone = toy_load(RECIPE).generate("ab", replace(SAMPLING, seed=line_seed(7, 2)))
    assert two["text"] == alone.text
    own = one({"prompt": "ab", "options": {"seed": 5}}, tmp_path)["output"]
    assert own["seed"] == 5
    assert line_seed(None, 3) == line_seed(0, 3) < 2**63


def test_blank_lines_a_byte_order_mark_and_carriage_returns_do_no_harm(tmp_path: Path):
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "ab"}\r\n\r\n  \n{"prompt": "cd"}')
    assert run(tmp_path / "in.jsonl", tmp_path / "out.jsonl").num_lines == 2
    assert len(read_lines(tmp_path / "out.jsonl")) == 2


BAD_LINES = {
    "not JSON": ('{"prompt": "ab"', "not valid JSON"),
    "no object": ('["ab"]', "a JSON array"),
    "null": ("null", "a JSON null"),
    "no prompt": ('{"text": "ab"}', "neither"),
    "two prompts": ('{"prompt": "ab", "messages": []}', "both"),
    "empty prompt": ('{"prompt": ""}', "empty"),
    "empty messages": ('{"messages": []}', "empty"),
    "prompt is a number": ('{"prompt": 5}', "must be text"),
    "message without role": ('{"messages": [{"content": "ab"}]}', "role"),
    "messages are text": ('{"messages": "ab"}', "list"),
    "mixed list": ('{"prompt": [1, "a"]}', "message 0"),
    "token id too large": ('{"prompt": [99]}', "token id 99"),
    "token id beyond 64 bits": ('{"prompt": [99999999999999999999]}', "token id"),
    "output is taken": ('{"prompt": "ab", "output": 1}', '"output"'),
    "unknown option": (
        '{"prompt": "ab", "options": {"temprature": 1}}',
        "did you mean 'temperature'",
    ),
    "options no object": ('{"prompt": "ab", "options": [1]}', "options"),
    "option out of range": ('{"prompt": "ab", "options": {"top_p": 2}}', "top_p"),
    "contradiction": ('{"prompt": "ab", "options": {"temperature": 0, "top_k": 5}}', "top_k"),
    "alpha is text": ('{"prompt": "ab", "options": {"alpha": "1"}}', "alpha"),
    "alpha twice": ('{"prompt": "ab", "options": {"alpha": 1, "expert": {"first": 2}}}', "twice"),
    "unknown expert": ('{"prompt": "ab", "options": {"expert": "third"}}', "first, second"),
    "expert is a number": ('{"prompt": "ab", "options": {"expert": 3}}', "expert"),
    "alpha beyond floats": (
        f'{{"prompt": "ab", "options": {{"alpha": 1{"0" * 400}}}}}',
        "finite number",
    ),
    "temperature float32 rounds to 0": (
        '{"prompt": "ab", "options": {"temperature": 1e-320}}',
        "temperature",
    ),
    "penalty float32 has not": (
        '{"prompt": "ab", "options": {"presence_penalty": 1e300}}',
        "presence_penalty",
    ),
    "NaN": ('{"prompt": "ab", "score": NaN}', "cannot be kept"),
    "too large a number": ('{"prompt": "ab", "score": 1e999}', "cannot be kept"),
    "half a character": (r'{"prompt": "ab\ud800"}', "surrogate"),
    "too long for a model": (json.dumps({"prompt": "a" * 300}), "300 tokens"),
    "a letter no token has": ('{"prompt": "É"}', "no token"),
}


@pytest.mark.parametrize(("line", "words"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_before_anything_is_generated(tmp_path: Path, line: str, words: str):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "ab"}, line])
    with pytest.raises(InputFileError) as caught:
        run(source, tmp_path / "out.jsonl")
    assert f"line 2 of {source}" in str(caught.value)
    assert words in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists() or not read_lines(tmp_path / "out.jsonl")


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "ab"}\n{"prompt": "\xff"}\n')
    with pytest.raises(InputFileError, match=r"line 2 of .*: not UTF-8"):
        run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_bad_lines_are_left_out_when_asked_and_the_rest_goes_on(tmp_path: Path):
    bad = [line for line, _ in BAD_LINES.values()]
    good = prompts(6)
    report = run(
        write_lines(tmp_path / "in.jsonl", [*good[:3], *bad, *good[3:]]),
        tmp_path / "out.jsonl",
        skip_bad_lines=True,
    )
    assert report.bad_lines == tuple(range(4, 4 + len(bad)))
    assert report.reasons[0].startswith("line 4 of ")
    assert [line["id"] for line in read_lines(tmp_path / "out.jsonl")] == list(range(6))


def test_a_file_without_a_usable_line_is_refused(tmp_path: Path):
    for content in ("", "\n\n", "nonsense\n"):
        (tmp_path / "in.jsonl").write_text(content)
        with pytest.raises(InputFileError, match="no usable line"):
            run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", skip_bad_lines=True)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            "prompt",
                            "messages",
                            "options",
                            "alpha",
                            "expert",
                            "stop",
                            "seed",
                            "top_k",
                        ]
                    )
                    | st.text(max_size=5),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_line_is_either_a_request_or_a_users_error(raw: bytes):
    try:
        line = parse_line(raw, 1, recipe=RECIPE, options=BatchOptions(SAMPLING))
    except UserError:
        return
    assert line.fields == json.loads(raw)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Return an input of 22 lines, one of them bad, and the output of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    lines: list[Any] = prompts(22)
    lines[5] = "bad"
    source = write_lines(directory / "in.jsonl", lines)
    run(source, directory / "out.jsonl", skip_bad_lines=True)
    return source, (directory / "out.jsonl").read_bytes()


def begin(source: Path, output: Path, *, num_tokens: int) -> None:
    """Run until a number of tokens is generated, as if Ctrl-C were pressed then."""

    def stop(progress: BatchProgress) -> None:
        if progress.num_new_tokens >= num_tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, output, skip_bad_lines=True, on_progress=stop)


@pytest.mark.parametrize("num_tokens", [0, 1, 47, 48, 100, 200])
def test_an_interrupted_run_goes_on_to_the_file_of_a_whole_one(
    tmp_path: Path, whole: tuple[Path, bytes], num_tokens: int
):
    source, expected = whole
    output = tmp_path / "out.jsonl"
    begin(source, output, num_tokens=num_tokens)
    assert expected.startswith(output.read_bytes())
    report = run(source, output, skip_bad_lines=True)
    assert output.read_bytes() == expected
    # The last token of a block is counted before the block is written.
    assert report.num_resumed == max(num_tokens - 1, 0) // (4 * 12) * 4
    assert report.bad_lines == (6,)


def test_a_file_torn_at_any_byte_is_continued_to_the_same_bytes(
    tmp_path: Path, whole: tuple[Path, bytes]
):
    source, expected = whole
    output = tmp_path / "out.jsonl"
    begin(source, output, num_tokens=1)
    progress = (tmp_path / "out.jsonl.progress.json").read_bytes()
    ends = [i + 1 for i, byte in enumerate(expected) if byte == ord("\n")]
    cuts = [0, 1, *(end + by for end in ends[::3] for by in (-1, 0, 1))]
    for cut in cuts:
        output.write_bytes(expected[:cut])
        (tmp_path / "out.jsonl.progress.json").write_bytes(progress)
        run(source, output, skip_bad_lines=True)
        assert output.read_bytes() == expected, f"cut at byte {cut}"


def test_a_run_may_be_continued_with_another_batch_size(tmp_path: Path, whole: tuple[Path, bytes]):
    source, expected = whole
    begin(source, tmp_path / "out.jsonl", num_tokens=100)
    run(source, tmp_path / "out.jsonl", skip_bad_lines=True, batch_size=3)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_a_finished_file_is_left_alone_and_no_model_is_loaded(
    tmp_path: Path, whole: tuple[Path, bytes]
):
    source, expected = whole
    run(source, tmp_path / "out.jsonl", skip_bad_lines=True)

    def load(names: tuple[str, ...]) -> ProxyTuned:
        raise AssertionError("loaded")

    report = run(source, tmp_path / "out.jsonl", skip_bad_lines=True, load=load)
    assert report.was_complete and report.num_lines == 21 and report.bad_lines == (6,)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampling": replace(SAMPLING, temperature=0.5)}, "temperature was 0.9 and is now 0.5"),
        ({"sampling": replace(SAMPLING, seed=8)}, "seed was 7 and is now 8"),
        ({"alpha": 0.5}, "alpha was null and is now 0.5"),
        ({"experts": ("first",)}, 'expert was null and is now ["first"]'),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"exact": True}, "exact"),
        ({"recipe": toy_recipe({"first": 1.0, "second": 0.6})}, "the recipe has changed"),
    ],
)
def test_other_settings_are_refused_and_the_file_stays(
    tmp_path: Path, whole: tuple[Path, bytes], change: dict[str, Any], words: str
):
    source, _ = whole
    output = tmp_path / "out.jsonl"
    begin(source, output, num_tokens=100)
    before = output.read_bytes()
    with pytest.raises(OutputFileError) as caught:
        run(source, output, skip_bad_lines=True, **change)
    assert words in str(caught.value)
    assert output.read_bytes() == before


def test_an_input_that_has_changed_is_refused(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", prompts(12))
    begin(source, tmp_path / "out.jsonl", num_tokens=100)
    write_lines(source, [*prompts(11), {"id": 11, "prompt": "zz"}])
    with pytest.raises(OutputFileError, match="content of the input file has changed"):
        run(source, tmp_path / "out.jsonl")


def test_a_file_of_someone_else_is_never_written_to(tmp_path: Path, whole: tuple[Path, bytes]):
    source, _ = whole
    output = tmp_path / "out.jsonl"
    output.write_text("my notes\n")
    with pytest.raises(OutputFileError, match="missing or damaged"):
        run(source, output, skip_bad_lines=True)
    (tmp_path / "out.jsonl.progress.json").write_text("[]")
    with pytest.raises(OutputFileError, match="missing or damaged"):
        run(source, output, skip_bad_lines=True)
    assert output.read_text() == "my notes\n"


def test_an_output_that_something_else_wrote_to_is_refused(
    tmp_path: Path, whole: tuple[Path, bytes]
):
    source, expected = whole
    output = tmp_path / "out.jsonl"
    begin(source, output, num_tokens=100)
    output.write_bytes(expected.replace(b'"id": 3', b'"id": 9'))
    with pytest.raises(OutputFileError, match=r"line 4 of .* does not answer line 4"):
        run(source, output, skip_bad_lines=True)
    output.write_bytes(expected)
    run(source, output, skip_bad_lines=True)
    output.write_bytes(expected + b"more\n")
    with pytest.raises(OutputFileError, match="was finished with"):
        run(source, output, skip_bad_lines=True)


def test_the_input_is_never_the_output(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", prompts(2))
    (tmp_path / "link.jsonl").symlink_to(source)
    for output in (source, tmp_path / "link.jsonl"):
        with pytest.raises(OutputFileError, match="both the input and the output"):
            run(source, output)
    assert read_lines(source) == prompts(2)


def test_an_output_that_cannot_be_written_is_refused_before_models_load(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", prompts(2))

    def load(names: tuple[str, ...]) -> ProxyTuned:
        raise AssertionError("loaded")

    (tmp_path / "directory").mkdir()
    for output in (
        tmp_path / "missing" / "out.jsonl",
        tmp_path / "directory",
        Path("/dev/null"),
        source / "out.jsonl",
    ):
        with pytest.raises(OutputFileError):
            run(source, output, load=load)


def test_an_input_that_cannot_be_read_is_refused(tmp_path: Path):
    for source in (tmp_path / "missing.jsonl", tmp_path, Path("/dev/null")):
        with pytest.raises(InputFileError):
            run(source, tmp_path / "out.jsonl")


@pytest.mark.skipif(sys.platform == "win32", reason="no lock on this system")
def test_two_runs_never_write_one_file(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", prompts(2))

    def load(names: tuple[str, ...]) -> ProxyTuned:
        with pytest.raises(OutputFileError, match="another process"):
            run(source, tmp_path / "out.jsonl")
        return toy_load(RECIPE, experts=names)

    assert run(source, tmp_path / "out.jsonl", load=load).num_lines == 2


def test_a_full_disk_ends_with_a_message_and_the_run_continues_later(
    tmp_path: Path, whole: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
):
    source, expected = whole
    calls = []

    def fail_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(OutputFileError, match="No space left"):
        run(source, tmp_path / "out.jsonl", skip_bad_lines=True)
    run(source, tmp_path / "out.jsonl", skip_bad_lines=True)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def _run_with_little_room(source: Path, output: Path, num_bytes: int) -> None:
    """Run in a process of its own whose files may not grow beyond a given number of bytes."""
    import resource

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    with pytest.raises(OutputFileError, match=r"out.jsonl cannot be written: .*\nhint: "):
        run(source, output, skip_bad_lines=True)
    os._exit(7)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and limits on the size of a file")
@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_disk_that_fills_up_within_a_line_ends_with_a_message_and_the_run_continues_later(
    tmp_path: Path, whole: tuple[Path, bytes], share: float
):
    """Closing the file tries to write the rest again; its traceback used to hide the message."""
    source, expected = whole
    output = tmp_path / "out.jsonl"
    num_bytes = int(share * len(expected))
    process = multiprocessing.get_context("fork").Process(
        target=_run_with_little_room, args=(source, output, num_bytes), daemon=True
    )
    process.start()
    process.join(60)
    assert process.exitcode == 7
    assert output.read_bytes() == expected[:num_bytes]
    assert run(source, output, skip_bad_lines=True).num_resumed > 0 or share == 0.2
    assert output.read_bytes() == expected


def test_a_file_that_fails_only_when_it_is_closed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Some network file systems report a full disk no earlier."""
    output = ResumableOutput(tmp_path / "out.jsonl", {})
    file = output._file

    class Late:
        def close(self) -> None:
            file.close()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "_file", Late())
    with (
        pytest.raises(OutputFileError, match=r"out.jsonl cannot be written: No space left"),
        output,
    ):
        pass
    with pytest.raises(KeyError), output:
        raise KeyError("the block's own error comes first")


# An input that changes -----------------------------------------------------------------------------


def changing(change: Callable[[], object], *, num_tokens: int) -> Callable[[BatchProgress], None]:
    """Return what changes the input once, after a given number of tokens."""
    changes = [change]

    def on_progress(progress: BatchProgress) -> None:
        if progress.num_new_tokens >= num_tokens and changes:
            changes.pop()()

    return on_progress


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


@pytest.mark.parametrize("num_tokens", [0, 30, 60, 119, 120])
@pytest.mark.parametrize("end", ["\n", ""])
def test_lines_added_during_a_run_are_noticed_and_left_to_the_next(
    tmp_path: Path, num_tokens: int, end: str
):
    """They used to be generated or not, by chance, and the file then counted as finished without them."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = prompts(14)
    write_lines(source, lines[:10])
    source.write_text(source.read_text().removesuffix("\n") + end)
    more = ("" if end else "\n") + "".join(json.dumps(line) + "\n" for line in lines[10:])
    grow = changing(lambda: add(source, more), num_tokens=num_tokens)
    report = run(source, output, on_progress=grow)
    assert [line["id"] for line in read_lines(output)] == list(range(10))
    assert report.num_lines == 10
    assert report.input_change == (
        f"{source} has grown; the same command answers the lines that were added"
    )
    # The last two are no whole block, so they are generated again with those beside them.
    report = run(source, output)
    assert (report.num_lines, report.num_resumed, report.input_change) == (14, 8, "")
    run(source, tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert run(source, output).was_complete


def test_an_interrupted_run_goes_on_with_lines_that_were_added_after_it(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", prompts(12))
    begin(source, tmp_path / "out.jsonl", num_tokens=100)
    write_lines(source, prompts(15))
    assert run(source, tmp_path / "out.jsonl").num_resumed == 8
    run(source, tmp_path / "whole.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_input_with_more_lines_is_not_continued_with_other_settings(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", prompts(3))
    run(source, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    write_lines(source, prompts(5))
    with pytest.raises(OutputFileError, match=r"alpha was null and is now 0\.5"):
        run(source, tmp_path / "out.jsonl", alpha=0.5)
    add(tmp_path / "out.jsonl", "more\n")
    with pytest.raises(OutputFileError, match="was finished with"):
        run(source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == before + b"more\n"


LONG = [{"id": i, "prompt": "ab", "rest": "-" * 9000} for i in range(12)]
"""Lines that do not fit into one buffer, so that a change of a later one can be read."""


@pytest.mark.parametrize("num_tokens", [0, 60])
@pytest.mark.parametrize("others", [[*LONG[:11], {**LONG[11], "prompt": "zz"}], LONG[:11], []])
def test_a_line_that_changes_before_its_turn_is_refused(
    tmp_path: Path, num_tokens: int, others: list[Any]
):
    source, output = write_lines(tmp_path / "in.jsonl", LONG), tmp_path / "out.jsonl"
    run(source, tmp_path / "whole.jsonl")
    change = changing(lambda: write_lines(source, others), num_tokens=num_tokens)
    with pytest.raises(InputFileError, match="has changed while it was being read"):
        run(source, output, on_progress=change)
    assert (tmp_path / "whole.jsonl").read_bytes().startswith(output.read_bytes())
    write_lines(source, LONG)
    run(source, output)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("way", ["in place", "replaced", "removed"])
def test_an_input_that_changes_after_its_lines_turn_keeps_its_answers_with_a_note(
    tmp_path: Path, way: str
):
    source, output = write_lines(tmp_path / "in.jsonl", prompts(5)), tmp_path / "out.jsonl"
    run(source, tmp_path / "whole.jsonl")
    other = write_lines(tmp_path / "other.jsonl", [{"prompt": "zz"}, *prompts(6)[1:]])

    def change() -> None:
        if way == "in place":
            source.write_bytes(other.read_bytes())
        elif way == "replaced":
            other.replace(source)
        else:
            source.unlink()

    report = run(source, output, on_progress=changing(change, num_tokens=60))
    assert report.input_change == (
        f"{source} has changed; the answers are those to what it held before"
    )
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_editor_that_replaces_the_input_by_one_with_more_lines_adds_them(tmp_path: Path):
    source, output = write_lines(tmp_path / "in.jsonl", prompts(5)), tmp_path / "out.jsonl"
    other = write_lines(tmp_path / "other.jsonl", prompts(7))
    grow = changing(lambda: other.replace(source), num_tokens=10)
    assert "has grown" in run(source, output, on_progress=grow).input_change
    assert run(source, output).num_lines == 7


def test_a_disk_that_cannot_be_read_any_more_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write_lines(tmp_path / "in.jsonl", prompts(2))

    def fail(self: object, *_: object) -> int:
        raise OSError(5, "Input/output error")

    with InputFile(source, RECIPE, BatchOptions(SAMPLING)) as file:
        monkeypatch.setattr(file, "_file", type("File", (), {"seek": fail, "close": fail})())
        with pytest.raises(InputFileError, match="cannot be read: Input/output error"):
            file.check_lines()
        monkeypatch.undo()


def test_progress_counts_lines_and_tokens(tmp_path: Path):
    seen: list[BatchProgress] = []
    source = write_lines(tmp_path / "in.jsonl", prompts(6))
    report = run(source, tmp_path / "out.jsonl", on_progress=seen.append)
    assert seen[0] == (0, 6, 0)
    assert seen[-1] == (6, 6, 72)
    assert report.num_new_tokens == 72
    assert seen == sorted(seen)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(InvalidRequest, match="batch_size"):
        BatchOptions(SAMPLING, batch_size=0)


def test_long_lists_of_line_numbers_are_cut():
    assert number_list([3, 5]) == "3, 5"
    assert number_list(range(1, 6), most=2) == "1, 2 and 3 more"


def _run_slowly(source: Path, output: Path) -> None:
    """Run in a process of its own, with enough time between two tokens to be killed there."""
    torch.set_num_threads(1)

    def load(names: tuple[str, ...]) -> ProxyTuned:
        time.sleep(0.05)
        return toy_load(RECIPE, experts=names)

    run(source, output, skip_bad_lines=True, load=load, on_progress=lambda _: time.sleep(5e-4))
    os._exit(0)  # The parent's exit handlers are not this process's.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to start processes quickly")
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path, seed: int):
    """`kill -9` while models load, while blocks are generated, and while they are written."""
    source = write_lines(tmp_path / "in.jsonl", [*prompts(80), "bad"])
    run(source, tmp_path / "whole.jsonl", skip_bad_lines=True)
    expected = (tmp_path / "whole.jsonl").read_bytes()
    output = tmp_path / "out.jsonl"
    chance = random.Random(seed)
    num_killed = 0
    for _ in range(40):
        process = multiprocessing.get_context("fork").Process(
            target=_run_slowly, args=(source, output), daemon=True
        )
        process.start()
        process.join(chance.random() * 0.5 if num_killed < 8 else 60)
        if process.exitcode is None:
            process.kill()
            process.join()
            num_killed += 1
            assert not output.exists() or expected.startswith(output.read_bytes())
            continue
        assert process.exitcode == 0
        break
    assert num_killed > 0
    assert output.read_bytes() == expected
