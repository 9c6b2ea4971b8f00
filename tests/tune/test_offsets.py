"""Frozen hidden states on disk: the right rows, the same bytes after a crash, and nothing stale."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from proxytune.errors import OutputFileError, VocabularyMismatch
from proxytune.text.vocab import Vocabulary, align
from proxytune.tune import offsets as offsets_module
from proxytune.tune.encode import IGNORED, Example
from proxytune.tune.heads import FrozenHeads, align_base_head, head_of, run_body
from proxytune.tune.loss import cross_entropy
from proxytune.tune.offsets import Offsets, offsets_key
from tests.support.tiny import tiny_config

VOCAB = 40
SAME = Vocabulary("small", {chr(65 + i): i for i in range(VOCAB)}, VOCAB)
Usage = namedtuple("Usage", "total used free")


def model(seed: int, hidden_size: int, *, width: int = VOCAB, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(width=width, hidden_size=hidden_size)
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


BASE, SMALL = model(0, 24), model(1, 16)


def examples(num: int = 9) -> list[Example]:
    """Return ragged examples; about a third of the labels are masked, one example has none at all."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for index in range(num):
        length = int(torch.randint(1, 20, (), generator=generator))
        ids = torch.randint(VOCAB, (length,), generator=generator)
        masked = torch.rand(length, generator=generator) < (1.0 if index == 4 else 0.3)
        made.append(Example(ids.tolist(), ids.masked_fill(masked, IGNORED).tolist()))
    return made


EXAMPLES = examples()


def build(directory: Path, rows=EXAMPLES, *, key: str = "k", **changes) -> Offsets:
    settings = {
        "base": BASE,
        "anti_expert": SMALL,
        "alignment": align(SAME, SAME),
        "base_name": "large",
        **changes,
    }
    return Offsets.build(directory, rows, key=key, **settings)


def expected_rows(example: Example) -> torch.Tensor:
    """Return the hidden states that predict a trained token, each model run on this example alone."""
    ids = torch.tensor([example.token_ids])
    with torch.no_grad():
        both = torch.cat([run_body(BASE, ids)[0], run_body(SMALL, ids)[0]], 1)
    # The states at t predict the token at t + 1.
    return both[:-1][torch.tensor(example.labels[1:], dtype=torch.long) != IGNORED]


def stored(directory: Path) -> tuple[bytes, bytes]:
    return (directory / "hidden.bin").read_bytes(), (directory / "starts.npy").read_bytes()


class Killed(BaseException):
    """Not an `Exception`, like what ends a process."""


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(offsets_module, "BATCH_TOKENS", 20)
    monkeypatch.setattr(offsets_module, "FLUSH_S", 0.0)


def test_rows_are_the_states_before_trained_tokens_in_the_order_asked_for(tmp_path, small_batches):
    offsets = build(tmp_path)
    expected = [expected_rows(example) for example in EXAMPLES]
    assert offsets.num_positions == sum(map(len, expected))
    assert offsets.nbytes == 4 * (24 + 16) * offsets.num_positions
    assert (tmp_path / "hidden.bin").stat().st_size == offsets.nbytes
    assert len(expected[4]) == 0
    for indices in ([0], [4], [7, 4, 0, 8, 7], range(9)):
        # Batched and padded products round differently from those of one row.
        torch.testing.assert_close(
            offsets.rows(indices), torch.cat([expected[i] for i in indices]), rtol=1e-4, atol=1e-5
        )


def test_a_loss_from_stored_states_is_that_of_whole_logits(tmp_path):
    offsets = build(tmp_path)
    heads = FrozenHeads.of(head_of(BASE), head_of(SMALL), anti_expert_factor=0.5, base_factor=1.0)
    expert = model(3, 16)
    total, plain = 0.0, 0.0
    for index in (5, 0):
        ids, labels = torch.tensor([EXAMPLES[index].token_ids]), EXAMPLES[index].labels
        with torch.no_grad():
            steered = BASE(ids).logits + 0.5 * (expert(ids).logits - SMALL(ids).logits)
            plain += F.cross_entropy(
                steered[0, :-1], torch.tensor(labels[1:]), ignore_index=IGNORED, reduction="sum"
            )
            hidden = run_body(expert, ids)[0, :-1]
            trained = torch.tensor(labels[1:]) != IGNORED
            total += cross_entropy(
                hidden[trained],
                head_of(expert),
                torch.tensor(labels[1:])[trained],
                frozen=offsets.frozen([index], heads, "cpu"),
                expert_factor=0.5,
            )
    torch.testing.assert_close(total, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_killed_run_ends_with_the_bytes_of_a_whole_one(tmp_path, small_batches, killed_after):
    build(tmp_path / "whole")

    calls: list[int] = []

    def kill(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > killed_after:
            raise Killed

    with pytest.raises(Killed):
        build(tmp_path / "broken", on_progress=kill)
    assert 0 < calls[-1] < len(EXAMPLES)
    assert Offsets.open(tmp_path / "broken", "k") is None

    seen = []
    build(tmp_path / "broken", on_progress=lambda *done: seen.append(done))
    assert seen[0] == (calls[-1], len(EXAMPLES))  # nothing flushed is computed again
    assert seen[-1] == (len(EXAMPLES), len(EXAMPLES))
    assert stored(tmp_path / "broken") == stored(tmp_path / "whole")
    assert Offsets.open(tmp_path / "broken", "k") is not None


def test_rows_written_after_the_last_flush_are_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(offsets_module, "BATCH_TOKENS", 40)
    build(tmp_path / "whole")

    def kill(done: int, total: int) -> None:
        if done:
            raise Killed

    with pytest.raises(Killed):
        build(tmp_path / "broken", on_progress=kill)
    seen = []
    build(tmp_path / "broken", on_progress=lambda done, total: seen.append(done))
    assert seen[0] == 0
    assert stored(tmp_path / "broken") == stored(tmp_path / "whole")


def test_finished_offsets_run_no_model_again(tmp_path):
    build(tmp_path)
    seen = []
    build(tmp_path, on_progress=lambda *done: seen.append(done))
    assert seen == [(9, 9)]


def test_another_key_starts_anew(tmp_path, small_batches):
    build(tmp_path)
    seen = []
    other = EXAMPLES[::-1]
    offsets = build(tmp_path, other, key="other", on_progress=lambda d, _: seen.append(d))
    assert seen[0] == 0
    torch.testing.assert_close(offsets.rows([1]), expected_rows(other[1]), rtol=1e-4, atol=1e-5)
    assert Offsets.open(tmp_path, "k") is None
    assert stored(tmp_path)[0] == stored_afresh(tmp_path / "fresh", other)


def stored_afresh(directory: Path, rows: list[Example]) -> bytes:
    build(directory, rows, key="other")
    return stored(directory)[0]


@pytest.mark.parametrize("damage", ["nothing there", "cut", "no starts", "torn header", "format"])
def test_damaged_files_are_not_opened_and_are_made_again(tmp_path, damage):
    whole = build(tmp_path).rows(range(9))
    header = tmp_path / "offsets.json"
    if damage == "nothing there":
        shutil.rmtree(tmp_path)
    elif damage == "cut":
        (tmp_path / "hidden.bin").write_bytes(stored(tmp_path)[0][:-4])
    elif damage == "no starts":
        (tmp_path / "starts.npy").unlink()
    elif damage == "torn header":
        header.write_text(header.read_text()[:20])
    else:
        header.write_text(json.dumps({**json.loads(header.read_text()), "format": 0}))
    assert Offsets.open(tmp_path, "k") is None
    assert torch.equal(build(tmp_path).rows(range(9)), whole)
    assert torch.equal(Offsets.open(tmp_path, "k").rows(range(9)), whole)


def test_a_base_in_half_precision_is_kept_in_bfloat16(tmp_path):
    base = model(0, 24, dtype=torch.bfloat16)
    offsets = build(tmp_path, base=base)
    rows = offsets.rows([2])
    assert rows.dtype == torch.bfloat16
    assert offsets.nbytes == 2 * (24 + 16) * offsets.num_positions
    ids = torch.tensor([EXAMPLES[2].token_ids])
    trained = torch.tensor(EXAMPLES[2].labels[1:]) != IGNORED
    with torch.no_grad():
        expected = run_body(base, ids)[0, :-1][trained]
    # Two steps of bfloat16, for products of another shape.
    torch.testing.assert_close(rows[:, :24], expected, rtol=0.02, atol=0.02)


def test_a_base_with_other_ids_reads_the_same_tokens(tmp_path):
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4)).tolist()
    # Row order[i] of the permuted base is the token i: the same model under other ids.
    vocabulary = Vocabulary("base", {t: order[i] for t, i in SAME.token_to_id.items()}, VOCAB)
    permuted = model(0, 24)
    with torch.no_grad():
        for name in ("model.embed_tokens", "lm_head"):
            weight = permuted.get_submodule(name).weight
            weight[order] = weight.clone()
    alignment = align(vocabulary, SAME)
    plain, other = build(tmp_path / "a"), build(tmp_path / "b", base=permuted, alignment=alignment)
    torch.testing.assert_close(plain.rows(range(9)), other.rows(range(9)))
    aligned = align_base_head(head_of(permuted), alignment, SAME)
    assert torch.equal(aligned.weight, head_of(BASE).weight)


def test_a_token_the_base_does_not_have_is_refused(tmp_path):
    tokens = {token: (i * 3) % VOCAB for token, i in SAME.token_to_id.items() if i}
    small = Vocabulary("small", {t: i for t, i in SAME.token_to_id.items() if i}, VOCAB)
    alignment = align(Vocabulary("base", tokens, VOCAB), small)
    with pytest.raises(VocabularyMismatch, match=r"(?s)token id 0.*large.*hint: "):
        build(tmp_path, [Example([5, 0, 6], [5, 0, 6])], alignment=alignment)


@pytest.mark.parametrize("is_last", [True, False])
def test_a_token_added_to_the_small_model_alone_has_no_place_in_the_ensemble(tmp_path, is_last):
    """The steered text never has it, so the loss gives it no probability, and no example may have it."""
    added = VOCAB - 1 if is_last else 2
    small = replace(SAME, added_ids=frozenset({added}))
    base = {token: i for token, i in SAME.token_to_id.items() if i != added}
    alignment = align(Vocabulary("base", base, VOCAB), small)
    assert alignment.kind == "added"
    aligned = align_base_head(head_of(BASE), alignment, small)
    kept = torch.arange(VOCAB) != added
    assert torch.equal(aligned.weight[kept], head_of(BASE).weight[kept])
    assert aligned.bias[added] == -torch.inf and not aligned.bias[kept].any()
    with pytest.raises(VocabularyMismatch, match=rf"token id {added}.*large"):
        build(tmp_path, [Example([5, added, 6], [5, added, 6])], alignment=alignment)
    assert build(tmp_path, [Example([5, 6], [5, 6])], alignment=alignment).num_positions == 1


def test_a_disk_too_small_is_refused_with_both_numbers_before_any_model_runs(tmp_path, monkeypatch):
    needed = build(tmp_path / "probe").nbytes
    seen = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed - 1))
    with pytest.raises(OutputFileError) as caught:
        build(tmp_path / "full", on_progress=lambda *done: seen.append(done))
    assert f"{needed / 1e9:.3g} GB" in str(caught.value)
    assert f"{(needed - 1) / 1e9:.3g} GB are free" in str(caught.value)
    assert "hint: " in str(caught.value)
    assert seen == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed))
    build(tmp_path / "full")


def test_a_continued_run_needs_room_only_for_what_is_left(tmp_path, small_batches, monkeypatch):
    needed = build(tmp_path / "probe").nbytes

    def kill(done: int, total: int) -> None:
        if done > 4:
            raise Killed

    with pytest.raises(Killed):
        build(tmp_path / "run", on_progress=kill)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed // 2))
    build(tmp_path / "run")


def test_a_disk_that_fills_up_is_a_message_and_the_run_goes_on_later(tmp_path, monkeypatch):
    def full(self, directory):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(offsets_module._Header, "write", full)
        with pytest.raises(OutputFileError, match=r"(?s)hidden\.bin.*No space left.*hint: "):
            build(tmp_path)
    assert Offsets.open(tmp_path, "k") is None
    assert build(tmp_path).num_positions


def test_another_process_can_read_what_this_one_built(tmp_path):
    offsets = build(tmp_path)
    copied = pickle.dumps(offsets)
    assert torch.equal(pickle.loads(copied).rows([0, 1]), offsets.rows([0, 1]))
    assert len(copied) < offsets.nbytes  # the rows stay on the disk


def test_no_examples_are_complete_at_once(tmp_path):
    assert build(tmp_path, []).num_positions == 0
    assert Offsets.open(tmp_path, "k").rows([]).shape == (0, 40)


def test_the_key_changes_with_all_that_offsets_depend_on():
    key = offsets_key(EXAMPLES, "base", "small", "float32")
    assert key == offsets_key(examples(), "base", "small", "float32")
    masked = replace(EXAMPLES[0], labels=[IGNORED] * len(EXAMPLES[0].labels))
    # The same ids in another division into examples must not look alike.
    joined = Example(
        EXAMPLES[0].token_ids + EXAMPLES[1].token_ids, EXAMPLES[0].labels + EXAMPLES[1].labels
    )
    others = [
        offsets_key([masked, *EXAMPLES[1:]], "base", "small", "float32"),
        offsets_key([joined, *EXAMPLES[2:]], "base", "small", "float32"),
        offsets_key(EXAMPLES[::-1], "base", "small", "float32"),
        offsets_key(EXAMPLES, "other", "small", "float32"),
        offsets_key(EXAMPLES, "base", "other", "float32"),
        offsets_key(EXAMPLES, "base", "small", "bfloat16"),
    ]
    assert len({key, *others}) == 7
