"""vLLM's logits processor for recipes: it checks requests, and follows which request each row belongs to.

It fits both of vLLM's interfaces. In that of the first model runner, `update_state` reports changes of the
batch. In that of the second only checking is left, since `model.py` follows the batch. It changes no
logits: the model steers each row as it computes its logits, so that penalties, grammars and logprobs see
steered logits.
"""

from __future__ import annotations

from typing import Any

from proxytune.integrations.vllm.request import Menu, Rows, RowSteering, check_request


def _interfaces() -> tuple[type, ...]:
    """Return vLLM's interfaces for logits processors, of the first and the second model runner."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    try:
        from vllm.v1.worker.gpu.sample.logits_processor.interface import (
            LogitsProcessor as SecondLogitsProcessor,
        )
    except ImportError:
        return (LogitsProcessor,)
    return (LogitsProcessor, SecondLogitsProcessor)


class RequestSteering(*_interfaces()):  # type: ignore[misc]
    """Checks requests, and passes each row's steering to the model. Without a recipe it does nothing.

    Args:
        vllm_config: vLLM's config.
        state: The device (first interface) or vLLM's requests (second); not needed.
        is_pin_memory: Part of the first interface; not needed.
    """

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool | None = None) -> None:
        config = vllm_config.model_config.hf_config
        self._rows: Rows | None = getattr(config, "rows", None)
        self._menu: Menu | None = getattr(config, "menu", None) if self._rows else None
        self._batch: dict[int, RowSteering | None] = {}
        self._num_rows = 0

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check a request in vLLM's front end.

        Raises:
            ValueError: It asks for what cannot be honoured.
        """
        check_request(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Whether greedy decoding can skip this."""
        return self._rows is None

    def update_state(self, batch_update: Any) -> None:
        """Follow changes of the batch before each forward (first interface)."""
        if self._rows is None or self._menu is None:
            return
        if batch_update is not None:
            self._num_rows = batch_update.batch_size
            for index in batch_update.removed:
                self._batch.pop(index, None)
            for index, params, *_ in batch_update.added:
                self._batch[index] = self._menu.asked(params.extra_args)
            for source, target, direction in batch_update.moved:
                moved, replaced = self._batch.pop(source, None), self._batch.pop(target, None)
                self._batch[target] = moved
                if direction.name == "SWAP":
                    self._batch[source] = replaced
        self._rows.expect([self._batch.get(index) for index in range(self._num_rows)])

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Report that the logits need no change (second interface)."""
        return False

    def apply(self, logits: Any, ctx: Any = None) -> Any:
        """Return the logits unchanged: the model has steered them."""
        return logits
