"""What every backend refuses: prompts, token ids, rows and adapters that a model cannot take.

Each function raises an error that names the model (`name`), or returns.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from proxytune.errors import InvalidRequest, PromptTooLong, UnsupportedModel


def check_prompts(name: str, prompts: Sequence[Sequence[int]]) -> None:
    """Raise `InvalidRequest` if there is no prompt, or an empty one."""
    if not prompts or not all(map(len, prompts)):
        raise InvalidRequest(f"{name} was given an empty prompt, so there is nothing to continue")


def check_length(name: str, num_tokens: int, max_context: int | None, *, also: str = "") -> None:
    """Raise `PromptTooLong` if `num_tokens` exceed the context; `also` is another way out, for the hint."""
    if max_context is not None and num_tokens > max_context:
        raise PromptTooLong(
            f"{name} can hold {max_context} tokens, and was asked to hold {num_tokens}.\n"
            f"hint: shorten the prompt{',' if also else ' or'} ask for fewer new tokens{also}"
        )


def check_token_ids(name: str, lowest: int, highest: int, num_ids: int) -> None:
    """Raise `InvalidRequest` if token ids from `lowest` to `highest` are not all below `num_ids`."""
    if lowest < 0 or highest >= num_ids:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequest(
            f"{name} has no token {wrong}; its token ids go from 0 to {num_ids - 1}"
        )


def check_shape(name: str, shape: Sequence[int], num_rows: int) -> None:
    """Raise `InvalidRequest` if appended token ids are not `[num_rows, num_tokens]`, at least one a row."""
    if len(shape) != 2 or shape[0] != num_rows or not shape[1]:
        raise InvalidRequest(
            f"{name} was given token ids of shape {list(shape)}, and needs [{num_rows}, num_tokens] with at "
            "least one token"
        )


def check_rewind(
    name: str, num_tokens: Sequence[int], lengths: Sequence[int], *, can_rewind: bool
) -> None:
    """Raise the errors of `Backend.rewind` for rows of these lengths."""
    if not can_rewind:
        raise UnsupportedModel(
            f"{name} has layers without a KV cache entry per token, so tokens cannot be taken back"
        )
    if len(num_tokens) != len(lengths) or any(
        not 0 <= n <= length for n, length in zip(num_tokens, lengths, strict=True)
    ):
        raise InvalidRequest(
            f"{name} cannot rewind rows of {list(lengths)} tokens by {list(num_tokens)}"
        )


def adapters_of(
    name: str, adapters: Sequence[str | None] | None, num_rows: int, known: Collection[str]
) -> list[str | None]:
    """Return the adapter of each row, None for the plain weights.

    Raises:
        InvalidRequest: There is not one adapter per row, or one that the model does not have.
    """
    if adapters is None:
        return [None] * num_rows
    if len(adapters) != num_rows:
        raise InvalidRequest(f"{name} was given {len(adapters)} adapters for {num_rows} rows")
    for adapter in adapters:
        if adapter is not None and adapter not in known:
            there = ", ".join(known) or "none"
            raise InvalidRequest(f"{name} has no adapter {adapter!r}; it has: {there}")
    return list(adapters)
