"""Caches with room against transformers' own, which concatenate."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from proxytune.backends.transformers.kv_cache import MIN_ROOM, RoomyCache

LAYERS = 2


def append(caches: list[DynamicCache], num_rows: int, num_new: int, seed: int) -> None:
    """Give all caches the same new keys and values and check that they hold the same."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        new = torch.randn(2, num_rows, 3, num_new, 4, generator=generator)
        answers = [cache.update(new[0], new[1], layer) for cache in caches]
        for answer in answers[1:]:
            for tensor, expected in zip(answer, answers[0], strict=True):
                assert torch.equal(tensor, expected)


def pair() -> list[DynamicCache]:
    return [DynamicCache(), RoomyCache()]


def keys(cache: DynamicCache) -> Tensor:
    return cache.layers[0].keys


def test_tokens_added_one_by_one_are_those_of_a_cache_that_concatenates():
    caches = pair()
    append(caches, 2, 5, seed=0)
    for seed in range(1, 3 * MIN_ROOM):
        append(caches, 2, 1, seed)
    assert [cache.get_seq_length() for cache in caches] == [5 + 3 * MIN_ROOM - 1] * 2
    assert caches[1].get_mask_sizes(4, 0) == caches[0].get_mask_sizes(4, 0)


def test_a_new_token_is_written_without_moving_the_others():
    cache = RoomyCache()
    append([cache], 2, 5, seed=0)
    place = keys(cache).data_ptr()
    for seed in range(MIN_ROOM):
        append([cache], 2, 1, seed)
    assert keys(cache).data_ptr() == place
    append([cache], 2, 1, seed=99)
    assert keys(cache).data_ptr() != place


def test_room_is_at_most_an_eighth_of_a_long_cache():
    cache = RoomyCache()
    append([cache], 1, 4000, seed=0)
    held = keys(cache).untyped_storage().nbytes()
    assert held <= 4000 * 1.125 * 3 * 4 * 4


@pytest.mark.parametrize("count", [0, 2, 7])
def test_taking_tokens_back_moves_nothing_and_leaves_no_trace(count):
    caches = pair()
    append(caches, 2, 7, seed=0)
    place = keys(caches[1]).data_ptr()
    for cache in caches:
        cache.crop(-count)
    append(caches, 2, 3, seed=1)
    assert keys(caches[1]).data_ptr() == place


def test_cropping_a_cache_with_empty_layers_is_allowed():
    cache = RoomyCache()
    key = torch.randn(1, 1, 4, 2)
    cache.update(key, key, 1)  # layer 0 uses another layer's keys
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([0]))
    assert cache.layers[1].get_seq_length() == 3


@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 1, 0], [0, 1, 2]])
def test_selected_rows_go_on_as_in_a_cache_that_concatenates(rows):
    caches = pair()
    append(caches, 3, 6, seed=0)
    for cache in caches:
        cache.crop(-2)
        cache.reorder_cache(torch.tensor(rows))
    append(caches, len(rows), 2, seed=1)
    for cache in caches:
        cache.batch_repeat_interleave(2)
    append(caches, 2 * len(rows), 2, seed=2)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([0]))
    append(caches, 1, 2, seed=3)


def test_rows_selected_after_everything_was_taken_back_start_anew():
    cache = RoomyCache()
    append([cache], 3, 4, seed=0)
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([0, 2]))
    append([cache], 2, 3, seed=1)
    assert keys(cache).shape == (2, 3, 3, 4)


def test_a_selection_can_drop_the_first_slots():
    cache = RoomyCache()
    append([cache], 3, 6, seed=0)
    expected = keys(cache)[[2, 0], :, 4:].clone()
    cache.select(torch.tensor([2, 0]), first_slot=4)
    assert torch.equal(keys(cache), expected)


def test_kept_slots_of_each_row_come_in_the_order_asked_for():
    cache = RoomyCache()
    append([cache], 2, 200, seed=0)
    before = keys(cache).clone()
    cache.keep_slots(torch.tensor([[3, 5], [0, 6]]))
    assert torch.equal(keys(cache)[0], before[0][:, [3, 5]])
    assert torch.equal(keys(cache)[1], before[1][:, [0, 6]])
    assert keys(cache).untyped_storage().nbytes() < before.untyped_storage().nbytes(), (
        "most of the memory is given back"
    )
    append([cache], 2, 1, seed=1)
    assert torch.equal(keys(cache)[0][:, :2], before[0][:, [3, 5]])


def test_a_cache_filled_in_inference_mode_can_be_used_outside_of_it():
    caches = pair()
    with torch.inference_mode():
        append(caches, 2, 5, seed=0)
    append(caches, 2, 1, seed=1)


def test_gradients_pass_through_several_updates():
    cache = RoomyCache()
    new = torch.ones(1, 1, 1, 2, requires_grad=True)
    total = sum((cache.update(k * new, new, 0)[0] ** 2).sum() for k in (1, 2))
    total.backward()
    assert new.grad is not None
    # d/dx of x^2 (first step), then of x^2 + (2x)^2, at x = 1
    assert new.grad.flatten().tolist() == [12.0, 12.0]


def test_a_copy_and_its_original_do_not_share_keys():
    cache = RoomyCache()
    append([cache], 1, 3, seed=0)
    twin = copy.deepcopy(cache)
    append([cache], 1, 1, seed=1)
    append([twin], 1, 1, seed=2)
    assert not torch.equal(keys(cache)[:, :, 3], keys(twin)[:, :, 3])
    assert torch.equal(keys(cache)[:, :, :3], keys(twin)[:, :, :3])


def test_reset_forgets_everything():
    cache = RoomyCache()
    append([cache], 2, 3, seed=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    append([cache], 1, 2, seed=1)
    assert cache.get_seq_length() == 2
