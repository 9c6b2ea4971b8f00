"""Token→id maps: the same, padded, permuted, or refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune.errors import InvalidRequest, VocabularyMismatch
from proxytune.text.vocab import Vocabulary, align
from tests.support.tiny import NUM_TOKENS, SPECIAL_TOKENS, tiny_tokenizer

ABC = {"a": 0, "b": 1, "c": 2}


def test_the_same_map_and_width_are_the_same_and_nothing_is_copied():
    alignment = align(Vocabulary("base", ABC, 4), Vocabulary("small", dict(ABC), 4))
    logits, token_ids = torch.randn(2, 4), torch.tensor([0, 2])
    assert alignment.kind == "same"
    assert alignment.logits_to_base(logits) is logits
    assert alignment.ids_to_small(token_ids) is token_ids


def test_a_narrower_head_over_the_same_tokens_is_padded_with_zeros():
    alignment = align(Vocabulary("base", ABC, 6), Vocabulary("small", ABC, 4))
    assert alignment.kind == "padded"
    expected = [[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]]  # the small model's own padding row (9) is left out
    assert alignment.logits_to_base(torch.tensor([[1.0, 2.0, 3.0, 9.0]])).tolist() == expected
    assert alignment.ids_to_small(torch.tensor([2, 0])).tolist() == [2, 0]


def test_a_wider_head_over_the_same_tokens_is_cut():
    alignment = align(Vocabulary("base", ABC, 3), Vocabulary("small", ABC, 5))
    assert alignment.kind == "padded"
    logits = torch.tensor([[[1.0, 2.0, 3.0, 9.0, 9.0]]])
    assert alignment.logits_to_base(logits).tolist() == [[[1.0, 2.0, 3.0]]]


def test_the_same_tokens_under_other_ids_are_permuted():
    base = Vocabulary("base", ABC, 3)
    small = Vocabulary("small", {"a": 2, "b": 0, "c": 1}, 3)
    alignment = align(base, small)
    assert alignment.kind == "permuted"
    of_b_c_a = torch.tensor([[20.0, 30.0, 10.0]])
    assert alignment.logits_to_base(of_b_c_a).tolist() == [[10.0, 20.0, 30.0]]
    assert alignment.ids_to_small(torch.tensor([[0, 1], [2, 2]])).tolist() == [[2, 0], [1, 1]]


def test_permuted_heads_may_differ_in_width_and_have_holes():
    base = Vocabulary("base", {"a": 0, "b": 2}, 5)
    small = Vocabulary("small", {"a": 3, "b": 0}, 4)
    alignment = align(base, small)
    logits = torch.tensor([2.0, 9.0, 9.0, 1.0])
    assert alignment.logits_to_base(logits).tolist() == [1.0, 0.0, 2.0, 0.0, 0.0]
    assert logits.tolist() == [2.0, 9.0, 9.0, 1.0]
    assert alignment.ids_to_small(torch.tensor([0, 2])).tolist() == [3, 0]


@pytest.mark.parametrize("small_map", [ABC, {"a": 2, "b": 0, "c": 1}])
def test_expert_and_anti_expert_differ_by_nothing_at_ids_without_a_token(small_map):
    alignment = align(Vocabulary("base", ABC, 7), Vocabulary("small", small_map, 5))
    expert, anti_expert = torch.randn(2, 4, 5)
    offset = alignment.logits_to_base(expert) - alignment.logits_to_base(anti_expert)
    assert offset.shape == (4, 7)
    assert (offset[:, 3:] == 0).all() and (offset[:, :3] != 0).all()


def test_logits_keep_their_dtype():
    for small in (Vocabulary("small", ABC, 5), Vocabulary("small", {"a": 1, "b": 0, "c": 2}, 3)):
        alignment = align(Vocabulary("base", ABC, 4), small)
        logits = torch.zeros(1, small.width, dtype=torch.bfloat16)
        assert alignment.logits_to_base(logits).dtype == torch.bfloat16


def test_padding_ids_are_those_below_the_width_that_no_token_has():
    assert Vocabulary("base", {"a": 0, "b": 3}, 6).padding_ids.tolist() == [1, 2, 4, 5]
    assert Vocabulary("base", ABC, 3).padding_ids.tolist() == []


def test_the_vocabulary_of_a_tokenizer_has_its_added_tokens():
    tokenizer = tiny_tokenizer(extra_tokens=["<tool>"])
    vocabulary = Vocabulary.from_tokenizer(tokenizer, name="base", width=NUM_TOKENS + 4)
    assert vocabulary.token_to_id["<tool>"] == NUM_TOKENS
    assert vocabulary.padding_ids.tolist() == [NUM_TOKENS + n for n in (1, 2, 3)]


def test_a_token_beyond_the_head_is_left_out():
    tokenizer = tiny_tokenizer(extra_tokens=["[PAD]"])
    vocabulary = Vocabulary.from_tokenizer(tokenizer, name="base", width=NUM_TOKENS)
    plain = Vocabulary.from_tokenizer(tiny_tokenizer(), name="small", width=NUM_TOKENS)
    assert align(vocabulary, plain).kind == "same"


def test_an_id_that_does_not_fit_the_width_is_refused():
    for token_to_id in ({"a": 3}, {"a": -1}):
        with pytest.raises(ValueError, match="output head of 3 rows"):
            Vocabulary("base", token_to_id, 3)


def test_prompt_ids_without_a_token_are_refused_with_their_position():
    vocabulary = Vocabulary("base", {"a": 0, "b": 2}, 4)
    vocabulary.check_token_ids([0, 2, 2])
    for token_ids, why in (
        ([0, 4], "token id 4, at position 1 .* end at 3"),
        ([-1], "token id -1, at position 0 "),
        ([2, 0, 3], "token id 3, at position 2 .* no token of base has this id"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            vocabulary.check_token_ids(token_ids)


def test_tokens_that_only_one_model_has_are_counted_and_shown():
    base = Vocabulary("big/model", {"a": 0, "b": 1, "c": 2, "d": 3}, 4)
    small = Vocabulary("small/model", {"a": 0, "b": 2, "c": 1, "e": 3, "f": 4}, 5)
    with pytest.raises(VocabularyMismatch) as raised:
        align(base, small)
    message = str(raised.value)
    assert "small/model and big/model do not share one vocabulary" in message
    assert "4 tokens in big/model and 5 in small/model" in message
    assert "1 only in big/model, 2 only in small/model, 2 under other ids" in message
    assert [line.strip() for line in message.splitlines() if line.startswith("  ")] == [
        "'d' (id 3) only in big/model",
        "'e' (id 3) only in small/model",
        "'b' is id 1 in big/model and id 2 in small/model",
        "'f' (id 4) only in small/model",
        "'c' is id 2 in big/model and id 1 in small/model",
    ]
    assert "hint: " in message


def test_five_differences_are_shown_of_many():
    base = Vocabulary("base", {f"b{i}": i for i in range(1000)}, 1000)
    small = Vocabulary("small", {f"s{i}": i for i in range(1000)}, 1000)
    with pytest.raises(
        VocabularyMismatch, match="1,000 only in base, 1,000 only in small"
    ) as raised:
        align(base, small)
    assert sum(line.startswith("  ") for line in str(raised.value).splitlines()) == 5


def test_equal_sizes_do_not_make_vocabularies_alike():
    with pytest.raises(VocabularyMismatch):
        align(Vocabulary("base", ABC, 3), Vocabulary("small", {"a": 0, "b": 1, "x": 2}, 3))


def test_two_tokens_on_one_id_are_refused_where_the_other_model_tells_them_apart():
    shared, apart = {"a": 0, "A": 0, "b": 1}, {"a": 0, "A": 1, "b": 2}
    assert align(Vocabulary("base", shared, 3), Vocabulary("small", shared, 3)).kind == "same"
    for base, small in ((shared, apart), (apart, shared)):
        with pytest.raises(VocabularyMismatch, match="under other ids"):
            align(Vocabulary("base", base, 3), Vocabulary("small", small, 3))


@given(st.permutations(range(12)), st.integers(0, 3), st.integers(0, 3))
def test_any_permutation_carries_each_tokens_logit_to_its_own_id(order, base_extra, small_extra):
    base = Vocabulary("base", {f"t{i}": i for i in range(12)}, 12 + base_extra)
    small = Vocabulary("small", {f"t{i}": order[i] for i in range(12)}, 12 + small_extra)
    alignment = align(base, small)
    logits = torch.arange(1.0, small.width + 1)
    aligned = alignment.logits_to_base(logits)
    token_ids = torch.arange(12)
    assert aligned.shape == (base.width,)
    assert torch.equal(aligned[:12], logits[alignment.ids_to_small(token_ids)])
    assert torch.equal(alignment.ids_to_small(token_ids), torch.tensor(order))
    if alignment.kind != "same":
        assert (aligned[12:] == 0).all()


def test_a_shuffled_tokenizer_reads_the_same_text_through_the_alignment():
    tokenizer, shuffled = tiny_tokenizer(), tiny_tokenizer(shuffle_seed=1)
    base = Vocabulary.from_tokenizer(tokenizer, name="base", width=NUM_TOKENS)
    small = Vocabulary.from_tokenizer(shuffled, name="small", width=NUM_TOKENS)
    text = "the end of a thing, é"
    token_ids = torch.tensor(tokenizer.encode(text))
    assert align(base, small).ids_to_small(token_ids).tolist() == shuffled.encode(text)


# Added tokens -----------------------------------------------------------------------------------------------


def vocabulary(name, ordinary, added=(), *, width=None, bos=None, eos=None):
    """Return a vocabulary of ordinary tokens, then added ones."""
    token_to_id = {token: i for i, token in enumerate((*ordinary, *added))}
    added_ids = frozenset(token_to_id[token] for token in added)
    ends = (None if token is None else token_to_id[token] for token in (bos, eos))
    return Vocabulary(name, token_to_id, width or len(token_to_id), added_ids, *ends)


def test_a_pad_token_that_only_the_small_model_has_is_cut_off_its_head():
    alignment = align(vocabulary("base", "abcd"), vocabulary("small", "abcd", ["<pad>"]))
    assert (alignment.kind, alignment.dropped, dict(alignment.stand_ins)) == ("added", (4,), {})
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 99.0]])
    assert alignment.logits_to_base(logits).tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert alignment.ids_to_small(torch.tensor([3, 0])).tolist() == [3, 0]


def test_a_small_models_added_token_on_a_padding_id_of_the_base_is_dropped():
    base = vocabulary("base", "abcd", width=8)
    alignment = align(base, vocabulary("small", "abcd", ["<pad>"], width=6))
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0, 99.0, 9.0])
    assert alignment.logits_to_base(logits).tolist() == [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]


def test_control_tokens_before_all_others_shift_the_ids():
    base = Vocabulary("v3", {"<s>": 0, "[INST]": 1, "a": 2, "b": 3, "c": 4}, 5, frozenset({0, 1}))
    small = Vocabulary("v1", {"<s>": 0, "a": 1, "b": 2, "c": 3}, 4, frozenset({0}))
    alignment = align(base, small)
    assert alignment.logits_to_base(torch.tensor([5.0, 1.0, 2.0, 3.0])).tolist() == [
        5.0, -torch.inf, 1.0, 2.0, 3.0,
    ]  # fmt: skip
    back = align(small, base)
    assert back.dropped == (1,)
    logits = torch.tensor([5.0, 99.0, 1.0, 2.0, 3.0])
    assert back.logits_to_base(logits).tolist() == [5.0, 1.0, 2.0, 3.0]
    assert back.ids_to_small(torch.tensor([0, 1, 3])).tolist() == [0, 2, 4]


def test_different_special_tokens_over_the_same_ordinary_ones_are_aligned():
    base = vocabulary("base", "abcdef", ["<end>", "<think>"], width=10, eos="<end>")
    small = vocabulary("small", "abcdef", ["<eos>", "<pad>"], eos="<eos>")
    alignment = align(base, small)
    assert alignment.kind == "added"
    assert alignment.dropped == (6, 7)
    # The ends of a text stand for each other in what is read, and get no offset.
    assert dict(alignment.stand_ins) == {6: 6, 7: 6}
    aligned = alignment.logits_to_base(torch.arange(8.0))
    assert aligned.tolist() == [0.0, 1, 2, 3, 4, 5, -torch.inf, -torch.inf, 0, 0]


@pytest.mark.parametrize("line_break", ["\n", "Ċ", "<0x0A>"])
def test_a_small_model_reads_a_line_break_for_a_token_that_it_lacks(line_break):
    base = vocabulary("base", ["a", line_break, "b"], ["<s>", "<think>"], bos="<s>")
    small = vocabulary(
        "small", ["a", line_break, "b"], ["<bos>", "<eos>"], bos="<bos>", eos="<eos>"
    )
    alignment = align(base, small)
    token_ids = torch.tensor([[3, 0], [4, 2]])
    assert alignment.ids_to_small(token_ids).tolist() == [[3, 0], [1, 2]]


def test_padding_ids_still_have_no_counterpart_beside_added_tokens():
    base = vocabulary("base", "abcd", ["<tool>"], width=8)
    alignment = align(base, vocabulary("small", "abcd"))
    assert alignment.ids_to_small(torch.tensor([0, 4, 5])).tolist() == [0, 0, -1]
    found = alignment.logits_to_base(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    assert found == [1.0, 2.0, 3.0, 4.0, -torch.inf, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("base", "small"),
    [
        (vocabulary("base", "abcde", ["<s>"]), vocabulary("small", "abcd", ["<s>", "<pad>"])),
        (vocabulary("base", "abcd", ["<s>"]), vocabulary("small", "abcde", ["<s>"])),
        (vocabulary("base", "abcd"), vocabulary("small", "abcdef", ["<pad>"])),
    ],
    ids=["only in the base", "only in the small model", "beside an added one"],
)
def test_an_ordinary_token_that_only_one_has_is_refused(base, small):
    with pytest.raises(VocabularyMismatch, match=r"'[ef]' "):
        align(base, small)


def test_vocabularies_that_share_less_than_half_are_refused_though_all_was_added():
    with pytest.raises(VocabularyMismatch):
        align(vocabulary("base", "", "abcdefg"), vocabulary("small", "", "efghijk"))
    assert align(vocabulary("base", "", "abcd"), vocabulary("small", "", "cdab")).kind == "permuted"


def test_special_tokens_and_words_added_later_are_added_tokens_and_merges_are_not():
    tokenizer = tiny_tokenizer(extra_tokens=["covid19"])
    found = Vocabulary.from_tokenizer(tokenizer, name="base", width=NUM_TOKENS + 1)
    named = {token for token, i in found.token_to_id.items() if i in found.added_ids}
    assert named == {*SPECIAL_TOKENS, "covid19"}
    assert found.eos_id == found.token_to_id["<|endoftext|>"]
    assert found.bos_id is None
