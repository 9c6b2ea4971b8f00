"""Hints: the name that was meant, and the command that brings what is missing."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from proxytune.errors import closest, did_you_mean, install_command, missing_extra


class Installed:
    """The package as pip recorded it."""

    def __init__(self, origin):
        self.origin = origin

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.origin and json.dumps(self.origin)


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
        (None, "pip install 'proxytune[tune]'"),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came(monkeypatch, origin, command):
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


def test_a_checkout_that_is_not_installed_is_named_in_the_hint(monkeypatch):
    def refuse(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", refuse)
    root = Path(__file__).parents[1]
    assert install_command("tune") == f"pip install -e '{root}[tune]'"
