"""`--exact` in vLLM: its batch-invariant kernels where it has them, and a refusal elsewhere."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

platforms = pytest.importorskip("vllm.platforms", reason="needs vLLM", exc_type=ImportError)

from proxytune.errors import UnsupportedModel  # noqa: E402
from proxytune.integrations.vllm.server import become_vllm_server  # noqa: E402


@pytest.fixture
def started(monkeypatch) -> list[dict[str, str]]:
    """Collect the environments of servers instead of becoming one."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, environment: found.append(environment))
    return found


def on(monkeypatch, *, is_gpu: bool) -> None:
    platform = SimpleNamespace(
        is_cuda_alike=lambda: is_gpu, is_xpu=lambda: False, device_type="cuda" if is_gpu else "cpu"
    )
    monkeypatch.setattr(platforms, "current_platform", platform)


def test_on_a_gpu_vllm_is_told_to_use_its_batch_invariant_kernels(monkeypatch, started):
    on(monkeypatch, is_gpu=True)
    become_vllm_server(["python"], [], is_exact=True)
    become_vllm_server(["python"], [])
    assert [each.get("VLLM_BATCH_INVARIANT") for each in started] == ["1", None]


def test_on_a_cpu_exactness_is_refused_by_name(monkeypatch, started):
    on(monkeypatch, is_gpu=False)
    with pytest.raises(UnsupportedModel, match=r"exact.*GPUs only, not for cpu"):
        become_vllm_server(["python"], [], is_exact=True)
    assert not started


def test_this_version_of_vllm_knows_the_variable():
    import vllm.envs as envs

    assert "VLLM_BATCH_INVARIANT" in envs.environment_variables
