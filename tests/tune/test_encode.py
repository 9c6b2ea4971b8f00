"""Examples: which tokens are read, which are trained, and what they come after."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from proxytune.data.rows import answers_of, read_rows
from proxytune.errors import InputFileError, InvalidRequest, PromptFormatError
from proxytune.text.prompts import render
from proxytune.tune.encode import IGNORED, Encoded, Example, PreferenceExample, encode
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
def test_an_empty_prompt_becomes_the_token_that_begins_or_else_ends_a_text(form):
    row = [{"prompt": "", "completion": "in"}]
    (example,) = encoded(row, form=form).examples
    assert example.token_ids == [EOS, *TOKENIZER.encode("in"), EOS]
    assert trained(example) == ["in<|endoftext|>"]
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    (example,) = encoded(row, tokenizer, form=form).examples
    assert example.token_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


@pytest.mark.parametrize("form", ["plain", "{{ prompt }}"])
def test_an_empty_prompt_without_a_token_to_stand_for_it_is_refused(form):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputFileError, match="row 1 of the given rows: the prompt has no tokens"):
        encoded([{"prompt": "", "completion": "in"}], tokenizer, form=form)


LENGTHS = [
    {"prompt": "xyz", "completion": "a"},
    {"prompt": "xyz", "completion": "bc"},
    {"prompt": "uvwxy", "completion": "d"},
]
"""Of the rows, with the token that ends them, of 5, 6 and 7 tokens; the last has a prompt of 5."""


def test_a_completion_is_cut_or_dropped_to_fit_the_length():
    result = encoded(LENGTHS, form="plain", max_length=5)
    assert [trained(e) for e in result.examples] == [["a<|endoftext|>"], ["bc"]]
    assert (result.num_rows, result.num_truncated, result.num_dropped) == (3, 1, 1)
    assert (result.num_tokens, result.num_trained) == (10, 4)


def test_a_length_that_no_row_fits_is_refused():
    with pytest.raises(
        InputFileError, match=r"no row of the given rows .*\nhint: raise --max-length"
    ):
        encoded(LENGTHS, form="plain", max_length=3)
    with pytest.raises(InvalidRequest, match="max_length is 1"):
        encoded(LENGTHS, form="plain", max_length=1)


def test_a_completion_without_tokens_is_refused_with_its_line():
    tokenizer = tiny_tokenizer()
    # As tokenizers do that clean their text.
    from tokenizers.normalizers import Replace

    tokenizer.backend_tokenizer.normalizer = Replace("\u200b", "")
    why = "row 2 of the given rows: small/model has no tokens for its answer"
    with pytest.raises(InputFileError, match=why):
        encoded([PAIRS[0], {"prompt": "a", "completion": "\u200b"}], tokenizer, form="plain")


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
        # Shows prompts only; a space stands between its last word and the answer.
        ("[INST] {{ prompt }} [/INST]", " Hello.<|endoftext|>"),
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


def test_a_missing_chat_template_is_refused_in_the_words_of_generation():
    with pytest.raises(PromptFormatError, match=r"^small/model has no chat template"):
        encoded(CHATS, tiny_tokenizer(chat_template=None))
    with pytest.raises(PromptFormatError, match="'chatml', which is not"):
        encoded(CHATS, form="chatml")


def test_a_row_that_its_chat_template_refuses_is_named():
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}hi"
    )
    with pytest.raises(PromptFormatError, match=r"(?s)^row 2 of the given rows: .*no system"):
        encoded(CHATS, tiny_tokenizer(chat_template=refusing))


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


def test_answers_are_what_training_takes_its_loss_on():
    messages = [HELLO, SYSTEM, HI, HELLO, MORE, SURE]
    (checked,) = read_rows([{"messages": messages}]).rows
    (example,) = encoded([{"messages": messages}]).examples
    turns = [(prompt, answer + "<|im_end|>\n") for prompt, answer in answers_of(checked)]
    assert_generation_sees_it(example, turns, "chat", TOKENIZER)


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
