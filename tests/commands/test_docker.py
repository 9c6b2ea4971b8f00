"""The container files, as far as they can be checked without an engine; `make test-package` lints them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from proxytune.cli import app

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile with their arguments."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(w[0], w[1]) for w in (line.split(maxsplit=1) for line in joined.splitlines()) if w]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return content


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_without_root_and_says_whether_it_is_well(path):
    given = instructions(path)
    names = [name for name, _ in given]
    users = [value for name, value in given if name == "USER"]
    assert users and users[-1] not in ("root", "0")
    assert "HEALTHCHECK" in names and names.index("ENTRYPOINT") > names.index("USER")
    assert all(":latest" not in value and ":" in value for name, value in given if name == "FROM")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_secret_is_baked_into_an_image(path):
    for name, value in instructions(path):
        assert name not in ("ENV", "ARG") or not re.search(r"KEY|TOKEN|SECRET|PASSWORD", value)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_is_there_and_let_through(path):
    """`.dockerignore` leaves everything out but what it names."""
    let_through = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines()
    }
    for name, value in instructions(path):
        if name != "COPY" or value.startswith("--from"):
            continue
        for source in value.split()[:-1]:
            assert (ROOT / source).exists() and source in let_through


def test_the_server_in_the_image_is_given_options_that_it_has():
    commands: Any = typer.main.get_command(app)
    known = {option for p in commands.commands["serve"].params for option in p.opts}
    (entry,) = [v for n, v in instructions(DOCKER / "Dockerfile") if n == "ENTRYPOINT"]
    words = shlex.split(entry.strip("[]").replace(",", " "))
    assert words[:2] == ["proxytune", "serve"]
    assert {word for word in words if word.startswith("--")} <= known


def test_compose_takes_the_key_from_the_environment_and_opens_no_port_to_others(compose):
    for service in compose["services"].values():
        keys = [v for k, v in service["environment"].items() if k.endswith("_API_KEY")]
        assert len(keys) == 1 and keys[0].startswith("${PROXYTUNE_API_KEY:?")
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert "models:/models" in service["volumes"]
    assert set(compose["volumes"]) == {"models"}


def test_the_citation_names_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in pyproject
    assert {"cff-version", "message", "title", "authors", "references"} <= set(citation)


def test_every_file_of_others_in_the_package_has_its_notice():
    """The texts of the smol family by the names of their files, its experts by their own."""
    notices = (ROOT / "THIRD_PARTY.md").read_text()
    smol = ROOT / "src" / "proxytune" / "smol"
    assert {path.stem for path in (smol / "heldout").iterdir()} <= {
        path.name for path in (smol / "adapters").iterdir()
    }
    for adapter in (smol / "adapters").iterdir():
        assert f"`{adapter.name}`" in notices
