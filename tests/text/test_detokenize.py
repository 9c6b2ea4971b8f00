"""Token ids to text: never half a character, never text that a later token would take back."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from proxytune.text.detokenize import TextStream
from tests.support.tiny import tiny_tokenizer

FFFD = "\N{REPLACEMENT CHARACTER}"
FAMILY = "\U0001f468\N{ZERO WIDTH JOINER}\U0001f469\N{ZERO WIDTH JOINER}\U0001f467"

# How byte-level BPE writes the 256 bytes as characters (Radford et al. 2019): printable ones as they are.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_CHARS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(OTHERS)}


def _wrap(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens(["<s>", "</s>", "<|unnamed special|>"])
    tokenizer.add_tokens(["<tool>", "\N{SNOWMAN}"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _byte_level() -> Any:
    # Beside single bytes: tokens that begin and end within characters, as real vocabularies have.
    pieces = [bytes([b]) for b in range(256)]
    pieces += [b"the", b" the", b"ab", b" \xf0\x9f", b"\xf0\x9f\x91", b"\xbf\xf0\x9f", b"\x80\xc3"]
    pieces += [FFFD.encode(), b"\xe2\x80", b"\n\n", "é".encode(), b"x" + FFFD.encode() * 2]
    vocab = {"".join(BYTE_CHARS[b] for b in piece): i for i, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "b"), ("Ã", "©")]
    vocab |= {token: len(vocab) + n for n, token in enumerate(t for t in ("th",) if t not in vocab)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


SENTENCEPIECE_WORDS = ["▁", "▁a", "a", "b", "▁the", "▁▁", ".", "é", "\n", "▁The", "ab"]


def _sentencepiece(decoder: Any) -> Any:
    tokens = [f"<0x{b:02X}>" for b in range(256)] + SENTENCEPIECE_WORDS
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoder
    return _wrap(tokenizer)


BYTE_LEVEL = _byte_level()
LLAMA = _sentencepiece(
    decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
)
METASPACE = _sentencepiece(decoders.Metaspace())


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return str(
        tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def _ids(tokenizer: Any, *tokens: str) -> list[int]:
    token_ids = tokenizer.convert_tokens_to_ids(list(tokens))
    assert None not in token_ids, tokens
    return token_ids


def _byte_ids(data: bytes) -> list[int]:
    """Byte tokens of `LLAMA` (and of `BYTE_LEVEL`, which has them in the same order)."""
    return list(data)


SPACE = _ids(LLAMA, "▁")[0]


def _pushes(stream: TextStream, token_ids: list[int]) -> list[str]:
    """What each push gives, and last what `finish` gives; stops pushing as a decoding loop does."""
    pieces = []
    for token_id in token_ids:
        pieces.append(stream.push(token_id))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


def _streamed(tokenizer: Any, token_ids: list[int], **options: Any) -> str:
    stream = TextStream(tokenizer, **options)
    text = "".join(_pushes(stream, token_ids))
    assert stream.text == text
    return text


def _settled_length(text: str) -> int:
    """How much of a text no later token can change: all but the U+FFFD at its end."""
    return len(text.rstrip(FFFD))


def _reference(
    tokenizer: Any, token_ids: list[int], stop: list[str], min_tokens: int
) -> tuple[str, bool]:
    """The whole text at once, cut at the stop string that ends first, and whether it was cut."""
    text = _decode(tokenizer, token_ids)
    if len(token_ids) <= min_tokens:
        return text, False
    too_early = _settled_length(_decode(tokenizer, token_ids[:min_tokens]))
    matches = [
        (start + len(s), start)
        for s in stop
        for start in range(len(text))
        if text.startswith(s, start) and start + len(s) > too_early
    ]
    return (text[: min(matches)[1]], True) if matches else (text, False)


def _any_ids(tokenizer: Any) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(tokenizer) - 1), max_size=60)


# Bytes that matter: leads and continuations of every length, so that most sequences are nearly valid.
NEARLY_UTF8 = st.lists(
    st.sampled_from(
        [
            *_byte_ids(b"a\x80\x82\x98\x9f\xa9\xac\xbd\xbf\xc3\xe2\xef\xf0\xff"),
            *range(256, len(BYTE_LEVEL)),
        ]
    ),
    max_size=60,
)
STOPS = st.lists(st.text(alphabet=f"abthe é\n{FFFD}", min_size=1, max_size=5), max_size=3)


def test_tokens_of_whole_words_come_out_one_by_one():
    ids = _ids(BYTE_LEVEL, "the", "Ġthe", "ab")
    assert _pushes(TextStream(BYTE_LEVEL), ids) == ["the", " the", "ab", ""]


def test_a_character_made_of_several_tokens_comes_out_when_its_last_byte_is_there():
    ids = _byte_ids("a😀é".encode())
    expected = ["a", "", "", "", "😀", "", "é", ""]
    assert _pushes(TextStream(BYTE_LEVEL), ids) == expected
    assert _pushes(TextStream(LLAMA), ids) == expected


def test_a_token_that_ends_in_half_a_character_gives_what_precedes_it():
    ids = [*_ids(BYTE_LEVEL, "ĠðŁ"), *_byte_ids(b"\x98\x80")]
    assert _pushes(TextStream(BYTE_LEVEL), ids) == [" ", "", "😀", ""]


def test_an_emoji_of_joined_emojis_keeps_its_joiners():
    ids = BYTE_LEVEL.encode(f"x{FAMILY}y", add_special_tokens=False)
    assert _streamed(BYTE_LEVEL, ids) == f"x{FAMILY}y"
    assert _streamed(LLAMA, _byte_ids(FAMILY.encode())) == FAMILY


def test_half_a_character_at_the_end_becomes_what_the_tokenizer_makes_of_it():
    stream = TextStream(BYTE_LEVEL)
    assert stream.push(0x61) == "a"
    assert stream.push(0xF0) == ""
    assert stream.finish() == FFFD
    assert stream.finish() == ""
    assert stream.text == "a" + FFFD


def test_a_real_replacement_character_is_text():
    ids = _ids(BYTE_LEVEL, "ab", "ï¿½", "ab")
    assert _pushes(TextStream(BYTE_LEVEL), ids) == ["ab", "", f"{FFFD}ab", ""]


def test_special_tokens_are_left_out_and_other_added_tokens_are_text():
    ids = _ids(BYTE_LEVEL, "ab", "<s>", "<|unnamed special|>", "<tool>", "\N{SNOWMAN}", "</s>")
    assert _pushes(TextStream(BYTE_LEVEL), ids) == ["ab", "", "", "<tool>", "\N{SNOWMAN}", "", ""]


def test_a_special_token_within_a_character_does_not_break_it():
    ids = [0xF0, 0x9F, *_ids(BYTE_LEVEL, "<s>"), 0x98, 0x80]
    assert _streamed(BYTE_LEVEL, ids) == "😀"


def test_a_thousand_special_tokens_do_not_make_the_next_word_lose_its_space():
    ids = [*_ids(LLAMA, "▁a"), *_ids(LLAMA, "<s>") * 1000, *_ids(LLAMA, "▁the")]
    assert _streamed(LLAMA, ids) == "a the"
    assert _streamed(LLAMA, ids[1:], prompt_ids=ids[:1]) == " the"
    assert _streamed(LLAMA, ids[-1:], prompt_ids=ids[:-1]) == " the"


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE])
def test_the_first_word_after_a_prompt_keeps_its_space(tokenizer):
    ids = _ids(tokenizer, "▁the", "▁a")
    assert _pushes(TextStream(tokenizer), ids) == ["the", " a", ""]
    prompt = _ids(tokenizer, "<s>", "▁The")
    assert _pushes(TextStream(tokenizer, prompt_ids=prompt), ids) == [" the", " a", ""]


def test_ids_that_no_token_has_are_no_text_and_change_none():
    no_token = [9999] * 30
    assert _streamed(LLAMA, [SPACE, *no_token, *_ids(LLAMA, "▁the")]) == " the"
    assert _streamed(LLAMA, [*_ids(LLAMA, "ab"), *no_token, *_ids(LLAMA, "▁the")]) == "ab the"
    half = [0x61] * 10 + [0xF0]
    assert _streamed(BYTE_LEVEL, [*no_token, 0x9F, 0x98, 0x80], prompt_ids=half) == "😀"


def test_a_prompt_of_special_tokens_alone_is_like_none():
    prompt = _ids(LLAMA, "<s>") * 20
    assert _streamed(LLAMA, _ids(LLAMA, "▁the"), prompt_ids=prompt) == "the"


def test_a_character_that_began_in_the_prompt_belongs_to_the_new_text():
    prompt = [0x61, 0xF0]
    ids = [0x9F, 0x98, 0x80, 0x62]
    assert _pushes(TextStream(BYTE_LEVEL, prompt_ids=prompt), ids) == ["", "", "😀", "b", ""]


def test_real_replacement_characters_in_byte_tokens_are_not_taken_for_broken_ones():
    ids = _byte_ids(FFFD.encode() * 5) + _ids(LLAMA, "b")
    assert _streamed(LLAMA, ids) == FFFD * 5 + "b"


def test_a_replacement_character_of_the_prompt_is_not_repeated():
    prompt = _ids(BYTE_LEVEL, "ab", "ï¿½")
    assert _pushes(TextStream(BYTE_LEVEL, prompt_ids=prompt), [0x61]) == ["a", ""]


@pytest.mark.parametrize("num_invalid", range(0, 150, 7))
def test_a_character_after_any_number_of_invalid_bytes_is_whole(num_invalid):
    for n in range(num_invalid, num_invalid + 7):
        ids = [0x80] * n + _byte_ids("😀".encode())
        assert _streamed(BYTE_LEVEL, ids) == FFFD * n + "😀"


def test_characters_that_byte_fallback_takes_back_stay():
    """The decoder shows é, then three U+FFFD for é and half a character in one run of byte tokens."""
    ids = [*_byte_ids("é".encode()), 0xC3, *_ids(LLAMA, "b")]
    assert _decode(LLAMA, ids) == FFFD * 3 + "b"
    assert _pushes(TextStream(LLAMA), ids) == ["", "é", "", f"{FFFD}b", ""]


def test_a_stop_string_ends_the_text_before_itself():
    stream = TextStream(BYTE_LEVEL, stop=["b the"])
    assert _pushes(stream, _ids(BYTE_LEVEL, "the", "ab", "Ġthe", "ab")) == ["the", "a", "", ""]
    assert stream.stopped
    assert stream.push(0x61) == ""
    assert stream.text == "thea"


def test_text_that_could_begin_a_stop_string_waits_until_it_cannot():
    stream = TextStream(BYTE_LEVEL, stop=["aab!"])
    assert _pushes(stream, _byte_ids(b"aaab?")) == ["", "", "a", "", "aab?", ""]
    assert not stream.stopped


def test_held_back_text_is_given_at_the_end():
    stream = TextStream(BYTE_LEVEL, stop=["abc"])
    assert _pushes(stream, _byte_ids(b"ab")) == ["", "", "ab"]
    assert not stream.stopped


def test_of_two_stop_strings_the_one_that_completes_first_counts():
    """Also in one token, so that the cut does not depend on where tokens end."""
    assert _streamed(BYTE_LEVEL, _byte_ids(b"xthe"), stop=["the", "h"]) == "xt"
    assert _streamed(BYTE_LEVEL, [0x78, *_ids(BYTE_LEVEL, "the")], stop=["the", "h"]) == "xt"


def test_of_stop_strings_that_complete_together_the_longest_counts():
    assert _streamed(BYTE_LEVEL, _byte_ids(b"xthe"), stop=["e", "the", "he"]) == "x"


@pytest.mark.parametrize(
    ("stops", "ended_by"), [(["the", "h"], "h"), (["e", "the", "he"], "the"), (["z"], None)]
)
def test_the_stop_string_that_ended_the_text_is_known(stops, ended_by):
    stream = TextStream(BYTE_LEVEL, stop=stops)
    for token_id in _byte_ids(b"xthe"):
        assert stream.stopped_by is None or stream.stopped
        stream.push(token_id)
    assert stream.stopped_by == ended_by and stream.stopped == (ended_by is not None)


def test_a_stop_string_may_end_in_the_half_character_that_finish_gives():
    stream = TextStream(BYTE_LEVEL, stop=[FFFD])
    assert _pushes(stream, [0x61, 0xF0]) == ["a", "", ""]
    assert stream.stopped


def test_a_stop_string_within_the_first_min_tokens_stays_in_the_text():
    stream = TextStream(BYTE_LEVEL, stop=["b", "xyz"], min_tokens=3)
    assert _pushes(stream, _byte_ids(b"abbab!")) == ["a", "b", "b", "a", "", ""]
    assert stream.stopped and stream.text == "abba"


def test_a_stop_string_that_did_not_count_does_not_count_later():
    """Neither when it is looked at again because a longer stop string may have begun before it."""
    stream = TextStream(BYTE_LEVEL, stop=["abcde", "bc"], min_tokens=3)
    assert _pushes(stream, _byte_ids(b"abcd!")) == ["", "", "", "", "abcd!", ""]


def test_a_stop_string_counts_if_it_ends_after_the_first_min_tokens():
    assert _streamed(BYTE_LEVEL, _byte_ids(b"xabcd"), stop=["abc"], min_tokens=3) == "x"


def test_an_empty_stop_string_or_a_bare_one_is_refused():
    for stop in ([""], ["a", ""], "abc"):
        with pytest.raises(ValueError, match="must be a sequence of strings"):
            TextStream(BYTE_LEVEL, stop=stop)


@given(st.text(max_size=60))
def test_any_text_through_a_byte_level_tokenizer_comes_back(text):
    for tokenizer in (BYTE_LEVEL, tiny_tokenizer()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert _streamed(tokenizer, ids) == _decode(tokenizer, ids)


@given(NEARLY_UTF8 | _any_ids(BYTE_LEVEL), NEARLY_UTF8)
def test_any_byte_level_tokens_give_what_decoding_all_at_once_gives(ids, prompt):
    stream = TextStream(BYTE_LEVEL)
    for n, token_id in enumerate(ids, 1):
        stream.push(token_id)
        so_far = _decode(BYTE_LEVEL, ids[:n])
        assert stream.text == so_far[: _settled_length(so_far)]
    assert stream.text + stream.finish() == _decode(BYTE_LEVEL, ids)
    before, both = _decode(BYTE_LEVEL, prompt), _decode(BYTE_LEVEL, prompt + ids)
    num_common = next(
        (n for n, (a, b) in enumerate(zip(before, both, strict=False)) if a != b),
        min(len(before), len(both)),
    )
    assert _streamed(BYTE_LEVEL, ids, prompt_ids=prompt) == both[num_common:]


@given(st.lists(NEARLY_UTF8, max_size=8), st.integers(1, 60))
def test_long_invalid_text_is_what_decoding_all_at_once_gives(runs, num_repeats):
    ids = [i for run in runs for i in run * (num_repeats if len(run) <= 5 else 1)]
    assert _streamed(BYTE_LEVEL, ids) == _decode(BYTE_LEVEL, ids)


@given(
    NEARLY_UTF8 | st.lists(st.sampled_from(_byte_ids(b"abthe \n")), max_size=60),
    STOPS,
    st.integers(0, 12),
)
def test_any_stop_strings_cut_where_a_search_in_the_whole_text_cuts(ids, stop, min_tokens):
    stream = TextStream(BYTE_LEVEL, stop=stop, min_tokens=min_tokens)
    text = "".join(_pushes(stream, ids))
    assert (text, stream.stopped) == _reference(BYTE_LEVEL, ids, stop, min_tokens)


SENTENCEPIECE_PIECES = st.lists(
    st.one_of(
        st.sampled_from([[i] for i in range(256, len(LLAMA))]),
        # Characters that come as byte tokens, and invalid bytes set off by words on both sides.
        st.characters(exclude_categories=("Cs",)).map(lambda c: _byte_ids(c.encode())),
        st.binary(min_size=1, max_size=3)
        .filter(lambda b: FFFD in b.decode(errors="replace"))
        .map(lambda b: [*_ids(LLAMA, "a"), *_byte_ids(b), *_ids(LLAMA, "b")])
        .filter(lambda ids: _decode(LLAMA, ids).count(FFFD) == len(ids) - 2),
    ),
    max_size=50,
).map(lambda pieces: [i for piece in pieces for i in piece])


def _has_broken_run(ids: list[int]) -> bool:
    """Whether byte fallback takes a complete character back: a run invalid from a later byte on."""
    special = {i for i, token in LLAMA.added_tokens_decoder.items() if token.special}
    shown = [i for i in ids if i not in special]
    run: list[int] = []
    for i in [*shown, -1]:
        if 0 <= i < 256:
            run.append(i)
            continue
        text = bytes(run).decode(errors="replace")
        if FFFD in text and not set(text) <= {FFFD}:
            return True
        run = []
    return False


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE])
@given(ids=SENTENCEPIECE_PIECES, prompt=SENTENCEPIECE_PIECES)
def test_any_sentencepiece_tokens_give_what_decoding_all_at_once_gives(tokenizer, ids, prompt):
    assume(not _has_broken_run(prompt + ids) and not _has_broken_run(ids))
    assert _streamed(tokenizer, ids) == _decode(tokenizer, ids)
    prompt = [*prompt, *_ids(tokenizer, "b")]
    both = _decode(tokenizer, prompt + ids)
    expected = both.removeprefix(_decode(tokenizer, prompt))
    assert _streamed(tokenizer, ids, prompt_ids=prompt) == expected


@given(st.lists(st.sampled_from([0x61, 0x80, 0xC3, 0xA9, 0xF0, 0x9F, SPACE]), max_size=200))
def test_invalid_runs_of_byte_tokens_give_no_characters_but_those_of_the_bytes(ids):
    data = b"".join(b" " if i == SPACE else bytes([i]) for i in ids)
    characters = iter(data.decode(errors="ignore"))
    text = _streamed(LLAMA, ids)
    assert all(c in characters for c in text if c != FFFD)  # in this order
    assert len(text) <= len(ids)


class CountingTokenizer:
    """Passes on to a tokenizer and records how many ids each call of `decode` got."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.num_ids: list[int] = []

    def decode(self, token_ids: list[int], **options: Any) -> str:
        self.num_ids.append(len(token_ids))
        return str(self.tokenizer.decode(token_ids, **options))


@pytest.mark.parametrize(
    ("cycle", "most"),
    [
        # A window of 16 to 19 tokens, one try to shorten it, and two ids to see what a token is.
        (b"the ab", 19 + 8 + 2),
        ("é😀".encode(), 19 + 8 + 2),
        # Invalid text makes the window grow to 64.
        (b"\xf0\x9f\x92a", 64 + 8 + 2),
        (b"\x80", 64 + 8 + 2),
        (b"\xf0\x9f", 64 + 8 + 2),
        (b"\xbf\xf0\x9f\xf0", 64 + 8 + 2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA], ids=["byte-level", "byte fallback"])
def test_what_a_push_costs_does_not_grow_with_the_text(tokenizer, cycle, most):
    counting: Any = CountingTokenizer(tokenizer)
    stream = TextStream(counting, prompt_ids=[0x61] * 1000, stop=["never there"])
    ids = _byte_ids(cycle) * (2000 // len(cycle))
    for token_id in [*ids, *_ids(tokenizer, "<s>") * 200]:
        counting.num_ids.clear()
        stream.push(token_id)
        assert sum(counting.num_ids) <= most
    if tokenizer is BYTE_LEVEL or FFFD not in _decode(tokenizer, ids):
        assert stream.text + stream.finish() == _decode(tokenizer, ids)
