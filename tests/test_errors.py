"""Hints: the name that was meant, and the command that brings what is missing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from proxytune.errors import (
    closest,
    did_you_mean,
    install_command,
    install_elsewhere,
    missing_extra,
    pip_install,
)


class Installed:
    """The package as pip recorded it."""

    def __init__(self, origin):
        self.origin = origin

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.origin and json.dumps(self.origin)


@pytest.fixture
def own_pip(monkeypatch):
    """Make the first pip on the PATH the one of this environment."""
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr(shutil, "which", lambda name: f"/venv/bin/{name}")


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (
            {"url": "file:///home/me/tree", "dir_info": {"editable": True}},
            "pip install -e '/home/me/tree[tune]'",
        ),
        ({"url": "file:///a%20b/tree", "dir_info": {}}, "pip install '/a b/tree[tune]'"),
        ({"url": "file:///x/p-1.whl", "archive_info": {}}, "pip install '/x/p-1.whl[tune]'"),
        (
            {"url": "https://host/p-1.whl", "archive_info": {}},
            "pip install 'proxytune[tune] @ https://host/p-1.whl'",
        ),
        (
            {"url": "https://host/p.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "pip install 'proxytune[tune] @ git+https://host/p.git@0'",
        ),
        # The path alone would be a directory without a pyproject.toml where the repository is bare.
        (
            {"url": "file:///srv/p.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "pip install 'proxytune[tune] @ git+file:///srv/p.git@0'",
        ),
        (None, "pip install 'proxytune[tune]'"),
        (["no", "object"], "pip install 'proxytune[tune]'"),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came(monkeypatch, own_pip, origin, command):
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(origin))
    assert install_command("tune") == command
    assert str(missing_extra("it needs x", "tune")) == f"it needs x.\nhint: {command}"
    said = str(missing_extra("it needs x", "tune", "or leave it out"))
    assert said == f"it needs x.\nhint: {command}, or leave it out"


def test_a_misspelt_word_is_answered_with_the_closest_known_one():
    known = ("temperature", "top_k", "top_p")
    assert did_you_mean("temprature", known) == ".\nhint: did you mean 'temperature'?"
    assert did_you_mean("zzz", known) == ""
    assert did_you_mean("zzz", known, otherwise="leave it out") == ".\nhint: leave it out"
    assert closest("top", known, num=3) == ["top_p", "top_k"]


@pytest.mark.parametrize("found", ["/usr/bin/pip", None])
def test_a_hint_names_the_python_whose_pip_is_not_first_on_the_path(monkeypatch, found):
    monkeypatch.setattr(sys, "executable", "/my venv/bin/python")
    monkeypatch.setattr(shutil, "which", lambda name: found)
    assert pip_install("x==1") == "'/my venv/bin/python' -m pip install x==1"


def test_a_hint_names_uv_where_the_environment_has_no_pip(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert pip_install("x==1") == "uv pip install --python /venv/bin/python x==1"


CHECKOUT = "pip install .    # in a checkout of proxytune"


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (
            {"url": "file:///home/me/tree", "dir_info": {}},
            CHECKOUT,
        ),
        ({"url": "file:///x/p-1.whl"}, CHECKOUT),
        (
            {"url": "file:///srv/p.git", "vcs_info": {"vcs": "git"}},
            CHECKOUT,
        ),
        ({"url": "https://host/p-1.whl"}, "pip install 'proxytune @ https://host/p-1.whl'"),
        (
            {"url": "https://host/p.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "pip install 'proxytune @ git+https://host/p.git'",
        ),
        (None, "pip install proxytune"),
    ],
)
def test_a_line_for_elsewhere_has_no_local_path(monkeypatch, origin, command):
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(origin))
    assert install_elsewhere() == command


def test_a_checkout_that_is_not_installed_is_named_in_the_hint(monkeypatch, own_pip):
    def refuse(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", refuse)
    root = Path(__file__).parents[1]
    assert install_command("tune") == f"pip install -e '{root}[tune]'"
