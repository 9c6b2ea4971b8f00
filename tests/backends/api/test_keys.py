"""Which key goes to which host: never one that only a recipe asks for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from proxytune.backends.api.keys import PROVIDERS, find_key, is_this_machine
from proxytune.errors import InputFileError, InvalidRequest, RecipeError
from proxytune.grants import KEY_VARIABLE
from proxytune.recipe.address import parse_address
from proxytune.recipe.spec import ModelSpec
from proxytune.server.settings import read_keys

SECRET = "sk-very-secret-0123456789"
HOST = "https://api.example.com/v1"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path) -> None:
    """Leave no key and no settings file of this machine's user in reach."""
    for name in (*PROVIDERS.values(), KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("A_KEY", "ANOTHER_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")


def bind(tmp_path: Path, content: object) -> Path:
    """Write the user's settings file."""
    path = tmp_path / "proxytune" / "settings.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def variable(url: str, **arguments: object) -> str | None:
    key = find_key(url, **arguments)  # type: ignore[arg-type]
    assert key is None or key.value == os.environ[key.variable].strip()
    return key and key.variable


# Who decides -------------------------------------------------------------------------------------------


def test_a_variable_that_only_a_recipe_names_is_refused():
    with pytest.raises(InvalidRequest) as refusal:
        find_key("http://127.0.0.1:8721/v1", asked="AWS_SECRET_ACCESS_KEY")
    text = str(refusal.value)
    assert "AWS_SECRET_ACCESS_KEY" in text and "127.0.0.1:8721" in text
    assert "--key-env AWS_SECRET_ACCESS_KEY" in text
    assert '{"keys": {"127.0.0.1:8721": "AWS_SECRET_ACCESS_KEY"}}' in text
    assert SECRET not in text


def test_what_the_refusal_says_to_type_helps(tmp_path):
    assert variable(HOST, asked="A_KEY", key_env="A_KEY") == "A_KEY"
    bind(tmp_path, {"keys": {"api.example.com": "A_KEY"}})
    assert variable(HOST, asked="A_KEY") == "A_KEY"


def test_the_callers_variable_wins_over_all_others(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv(KEY_VARIABLE, "other")
    bind(tmp_path, {"keys": {"api.openai.com": "ANOTHER_KEY"}})
    found = variable("https://api.openai.com/v1", asked="OPENAI_API_KEY", key_env="A_KEY")
    assert found == "A_KEY"


def test_the_settings_file_wins_over_a_providers_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    bind(tmp_path, {"keys": {"api.openai.com": "ANOTHER_KEY"}})
    assert variable("https://api.openai.com/v1", asked="OPENAI_API_KEY") == "ANOTHER_KEY"


def test_a_providers_variable_wins_over_the_general_one(monkeypatch):
    monkeypatch.setenv("GROQ_API_KEY", "one")
    monkeypatch.setenv(KEY_VARIABLE, "other")
    assert variable("https://api.groq.com/openai/v1") == "GROQ_API_KEY"
    monkeypatch.delenv("GROQ_API_KEY")
    assert variable("https://api.groq.com/openai/v1") == KEY_VARIABLE


def test_a_providers_variable_goes_to_its_own_host_alone(monkeypatch):
    for name in PROVIDERS.values():
        monkeypatch.setenv(name, "key")
    for host, name in PROVIDERS.items():
        assert variable(f"https://{host}/v1") == name
        assert variable(f"https://{host}.evil.example/v1") is None
    with pytest.raises(InvalidRequest, match="only you can choose"):
        find_key(HOST, asked="OPENAI_API_KEY")


def test_the_general_variable_goes_nowhere_once_a_server_took_its_clients_key_from_it(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "a-key-of-clients")
    assert variable(HOST) == KEY_VARIABLE
    assert read_keys(None) == ("a-key-of-clients",)
    assert variable(HOST) is None
    with pytest.raises(InvalidRequest, match="only you can choose"):
        find_key(HOST, asked=KEY_VARIABLE)
    assert variable(HOST, key_env="A_KEY") == "A_KEY"


def test_no_key_goes_where_none_is_bound_and_none_asked_for():
    assert variable(HOST) is None
    assert variable("http://localhost:8000/v1") is None


# What a key must be ------------------------------------------------------------------------------------


def test_a_variable_that_is_not_set_is_an_error_and_not_a_call_without_a_key(tmp_path):
    with pytest.raises(InvalidRequest, match="UNSET_KEY is not set"):
        find_key(HOST, key_env="UNSET_KEY")
    bind(tmp_path, {"keys": {"api.example.com": "UNSET_KEY"}})
    with pytest.raises(InvalidRequest, match=r"UNSET_KEY is not set, and .*settings\.json"):
        find_key(HOST)
    with pytest.raises(InvalidRequest, match="export OPENAI_API_KEY"):
        find_key("https://api.openai.com/v1", asked="OPENAI_API_KEY")


@pytest.mark.parametrize("name", ["sk-abc", "gsk_abc", "", "A KEY", "A=B", "lower_case"])
def test_what_may_be_a_key_itself_is_refused_and_not_shown(tmp_path, name):
    for place in ("caller", "file"):
        with pytest.raises((InvalidRequest, InputFileError)) as refusal:
            if place == "file":
                bind(tmp_path, {"keys": {"api.example.com": name}})
            find_key(HOST, key_env=name if place == "caller" else None)
        assert "is not the name of an environment variable" in str(refusal.value)
        assert not name or name not in str(refusal.value)


def test_a_key_does_not_show_in_its_description():
    assert SECRET not in repr(find_key(HOST, key_env="A_KEY"))


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example.com/v1",
        "http://192.168.0.7:8000/v1",
        "http://127.0.0.1.example.com/v1",
        "http://localhost.example.com/v1",
        "http://127.1/v1",
        "http://0x7f000001/v1",
        "http://0.0.0.0:8000/v1",
        "http://localhost./v1",
    ],
)
def test_no_key_goes_over_plain_http_to_another_machine(url):
    with pytest.raises(InvalidRequest, match="over plain HTTP") as refusal:
        find_key(url, key_env="A_KEY")
    assert SECRET not in str(refusal.value)
    assert variable(url) is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.8.7", "[::1]", "LocalHost"])
def test_a_key_may_go_over_plain_http_to_this_machine(host):
    assert is_this_machine(parse_address(f"http://{host}:8000/v1"))
    assert variable(f"http://{host}:8000/v1", key_env="A_KEY") == "A_KEY"


# Hosts that look like others ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com.evil.com/v1",
        "https://api.openai.com./v1",
        "https://api.openai.com:8443/v1",
        "https://xapi.openai.com/v1",
        "https://openai.com/v1",
        "https://\N{CYRILLIC SMALL LETTER A}pi.openai.com/v1",
        "https://xn--pi-6kc.openai.com/v1",
        "https://evil.com/https://api.openai.com/v1",
        "https://evil.com/api.openai.com",
        "https://@evil.com/api.openai.com",
    ],
)
def test_a_host_that_only_looks_like_a_providers_gets_no_key(monkeypatch, url):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert variable(url) is None
    with pytest.raises(InvalidRequest, match="only you can choose"):
        find_key(url, asked="OPENAI_API_KEY")


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com@evil.com/v1",
        "https://api.openai.com:x@evil.com/v1",
        "https://api.openai.com\\@evil.com/v1",
        "https://api.openai.com%2f@evil.com/v1",
        "https://evil.com#@api.openai.com/v1",
        "https://evil.com?@api.openai.com/v1",
        "https://evil.com;api.openai.com/v1",
        "https://api.openai.com%2eevil.com/v1",
        "https://api%2eopenai%2ecom/v1",
        "https://api.openai.com:443:1/v1",
        "https://api.openai.com:99999/v1",
        "https://api.openai.com:0/v1",
        "https://api.openai.com\n.evil.com/v1",
        "https://api openai com/v1",
        "https:///v1",
        "https:api.openai.com/v1",
        "ftp://api.openai.com/v1",
        "http://[::1%25eth0]/v1",
        "http://[",
        "https://" + "a" * 3000,
    ],
)
def test_an_address_that_two_parsers_could_read_differently_is_refused(monkeypatch, url):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with pytest.raises(InvalidRequest):
        find_key(url)
    if url.startswith(("http://", "https://")):
        with pytest.raises(RecipeError):
            ModelSpec(model=url)


@pytest.mark.parametrize(
    "url",
    [
        "HTTPS://API.OPENAI.COM/v1",
        "https://api.openai.com:443/v1",
        "https://api.openai.com",
        "https://api\N{IDEOGRAPHIC FULL STOP}openai.com/v1",
    ],
)
def test_other_ways_to_write_a_host_are_the_host(monkeypatch, url):
    """The last one is what the HTTP library makes of it too: it connects to api.openai.com."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert variable(url) == "OPENAI_API_KEY"
    assert parse_address(url).raw_host == b"api.openai.com"


# The settings file -------------------------------------------------------------------------------------


def test_a_port_in_the_settings_file_binds_that_port_alone(tmp_path):
    bind(tmp_path, {"keys": {"LOCALHOST:8000": "A_KEY", "localhost": "ANOTHER_KEY"}})
    assert variable("http://localhost:8000/v1") == "A_KEY"
    assert variable("http://localhost:8001/v1") == "ANOTHER_KEY"
    bind(tmp_path, {"keys": {"api.example.com:443": "A_KEY", "[::1]:80": "ANOTHER_KEY"}})
    assert variable("https://api.example.com/v1") == "A_KEY"
    assert variable("https://api.example.com:444/v1") is None
    assert variable("http://[::1]/v1") == "ANOTHER_KEY"
    assert variable("http://[::1]:81/v1") is None


def test_a_host_in_the_settings_file_is_not_its_subdomains(tmp_path):
    bind(tmp_path, {"keys": {"example.com": "A_KEY"}})
    assert variable("https://example.com/v1") == "A_KEY"
    assert variable(HOST) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"key": {}}, "unknown key"),
        ({"keys": {"api.example.com": "A_KEY"}, "more": 1}, "unknown key"),
        ([], "must be an object"),
        ({"keys": ["A_KEY"]}, "must be an object"),
        ({"keys": {"api.example.com": 5}}, "not the name of an environment variable"),
        ({"keys": {"https://api.example.com": "A_KEY"}}, "is not a host"),
        ({"keys": {"api.example.com/v1": "A_KEY"}}, "is not a host"),
        ({"keys": {"api.example.com/": "A_KEY"}}, "is not a host"),
        ({"keys": {"a@b": "A_KEY"}}, "is not a host"),
        ({"keys": {"": "A_KEY"}}, "is not a host"),
        ({"keys": {"*": "A_KEY"}}, "is not a host"),
        ({"keys": {"a.com": "A_KEY", "A.com": "A_KEY"}}, "bound twice"),
        ('{"keys": {"a.com": "A_KEY", "a.com": "B_KEY"}}', "given twice"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_settings_file_that_cannot_be_used_is_refused_by_name(tmp_path, content, problem):
    path = bind(tmp_path, content)
    with pytest.raises(InputFileError, match=problem) as refusal:
        find_key(HOST)
    assert str(path) in str(refusal.value)


def test_only_a_regular_file_that_nobody_else_can_write_is_read(tmp_path):
    path = bind(tmp_path, {"keys": {"api.example.com": "A_KEY"}})
    path.chmod(0o666)
    with pytest.raises(InputFileError, match="every user can change it"):
        find_key(HOST)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputFileError, match="not a regular file"):
        find_key(HOST)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(InputFileError, match="not a regular file"):
        find_key(HOST)
    path.unlink()
    path.write_text(" " * (2**20 + 1))
    with pytest.raises(InputFileError, match="larger than"):
        find_key(HOST)


def test_a_settings_file_of_another_user_is_not_read(tmp_path, monkeypatch):
    path = bind(tmp_path, {"keys": {"api.example.com": "A_KEY"}})
    owner = path.stat().st_uid
    if owner == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(InputFileError, match="belongs to another user"):
        find_key(HOST)


def test_the_settings_file_is_in_the_users_configuration(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / ".config" / "proxytune").mkdir(parents=True)
    bound = json.dumps({"keys": {"api.example.com": "A_KEY"}})
    (home / ".config" / "proxytune" / "settings.json").write_text(bound)
    monkeypatch.setenv("HOME", str(home))
    assert variable(HOST) is None  # XDG_CONFIG_HOME leads elsewhere
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert variable(HOST) == "A_KEY"


def test_no_settings_file_is_looked_for_in_the_working_directory(tmp_path, monkeypatch):
    """A recipe may be what the working directory holds."""
    (tmp_path / "proxytune").mkdir()
    bind(tmp_path, {"keys": {"api.example.com": "A_KEY"}})
    (tmp_path / "~" / ".config").mkdir(parents=True)
    (tmp_path / "~" / ".config" / "proxytune").symlink_to(tmp_path / "proxytune")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", ".")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert variable(HOST) is None
