"""What workers of vLLM can be told about a recipe's model, beside requests.

vLLM adds this class to its workers (`worker_extension_cls`), so that `collective_rpc` finds its methods on
every rank, whatever starts the workers.
"""

from __future__ import annotations

from typing import Any


class SteeringWorker:
    """Part of each worker of an engine that `engine.py` starts."""

    def proxytune_steer(self, fields: dict[str, Any] | None, alone: int | None) -> None:
        """Set how rows are steered that do not say it; see `SteeredModel.steer_by_default`."""
        worker: Any = self
        worker.get_model().steer_by_default(fields, alone)
