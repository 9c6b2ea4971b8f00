"""The documentation: complete, built without a warning, its links and code as good as they look."""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer.main

import proxytune
from proxytune.cli import app
from proxytune.errors import RecipeError
from proxytune.recipe.recipe import Recipe
from tests.support.browser import open_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "proxytune"

sys.path.insert(0, str(ROOT / "scripts"))
import check_docs  # noqa: E402
import recipe_schema  # noqa: E402

# The command line and the code ------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, Any]]:
    root = typer.main.get_command(app)
    yield "proxytune", root
    yield from getattr(root, "commands", {}).items()


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=lambda value: str(value)[:20])
def test_every_command_option_and_argument_has_help(name, command):
    assert command.help, name
    bare = [p.name for p in command.params if not (getattr(p, "help", None) or "").strip()]
    assert bare == [], f"without help in {name}"


def test_options_after_the_dashes_are_not_looked_up():
    """A command line may end with another program's options; these used to be reported as missing."""
    found = list(check_docs.option_faults(["eval", "--limits", "3", "--", "--max-model-len", "9"]))
    assert found == ["proxytune eval has no option --limits"]


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's public classes and functions, and the public methods of these classes."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in tree.body:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                is_function = isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
                if (
                    is_function
                    and not method.name.startswith("_")
                    and not is_told_elsewhere(method)
                ):
                    yield f"{node.name}.{method.name}", method


def is_told_elsewhere(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether its words stand elsewhere: at other signatures, a property's getter, or what it overrides."""
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(name.endswith(("overload", "override", ".setter")) for name in names)


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix()
)
def test_every_public_name_of_a_module_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module says not what it knows"
    bare = [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]
    assert bare == []


def test_every_name_of_the_package_has_a_docstring_and_is_in_the_reference():
    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)
    for name in proxytune.__all__:
        value = getattr(proxytune, name)
        assert value.__doc__, name
        places = (value.__module__, f"{value.__module__}.{value.__qualname__}")
        assert any(place in shown for place in places), f"{name} is not in the reference"


# What is made from the code ---------------------------------------------------------------------------------


def test_code_on_a_page_is_the_functions_code_without_docstrings(tmp_path):
    source = tmp_path / "source.py"
    source.write_text(
        'def twice(x):\n    """Double it."""\n    # Why.\n    return 2 * x\n\n\ny = 1\n'
    )
    assert (
        check_docs.function_code(source, ["twice"]) == "def twice(x):\n    # Why.\n    return 2 * x"
    )


def test_a_part_that_is_made_from_the_code_is_noticed_when_it_is_stale():
    page = (DOCS / "method.md").read_text(encoding="utf-8")
    assert check_docs.with_made_parts(page) == page
    stale = page.replace("steered = base_logits.float()", "steered = base_logits")
    assert stale != page
    assert check_docs.with_made_parts(stale) == page


def test_pictures_of_the_method_are_small():
    for picture in (DOCS / "method").iterdir():
        assert picture.stat().st_size < 200_000, picture


# The recipe's schema ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((DOCS / "reference" / "recipe.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def recipes_of_pages() -> Iterator[Any]:
    """Yield the recipes in all pages' JSON blocks, and the shipped one."""
    for page in check_docs.pages():
        _, blocks = check_docs.split(page.read_text(encoding="utf-8"))
        for block in blocks:
            if block.language == "json" and '"proxytune"' in block.text:
                value = json.loads(block.text)
                if value.get("model_type") == "proxytune":
                    yield pytest.param(value, id=f"{page.name}:{block.line}")
    shipped = SOURCE / "smol" / "config.json"
    yield pytest.param(json.loads(shipped.read_text(encoding="utf-8")), id="smol")


@pytest.mark.parametrize("recipe", list(recipes_of_pages()))
def test_every_recipe_of_the_docs_is_valid_by_the_schema_and_by_the_code(recipe, validator):
    assert [error.message for error in validator.iter_errors(recipe)] == []
    Recipe.from_dict(recipe)


PLAIN: dict[str, Any] = {
    "model_type": "proxytune",
    "base": {"model": "owner/base"},
    "experts": [
        {
            "name": "legal",
            "anti_expert": {"model": "owner/small"},
            "expert": {"adapter": "adapters/legal"},
        }
    ],
}
API = "http://localhost:8000/v1"
CUT = {"cut_of": "base", "keep": [3, 3], "bridge": "bridge.safetensors"}

CHANGES: list[tuple[bool, str, Any]] = [
    (True, "", None),
    (True, "$schema", "./recipe.schema.json"),
    (True, "architectures", ["ProxyTunedForCausalLM"]),
    (True, "transformers_version", "5.23.0"),
    (True, "combine", "union"),
    (True, "steering", {"policy": "nudge", "threshold": 0.3, "schedule": [[0, 1], [200, 0]]}),
    (True, "steering", None),
    (True, "default_expert", "legal"),
    (True, "base.dtype", "bfloat16"),
    (True, "base.dtype", None),
    (True, "base.quantization", {"load_in_4bit": True}),
    (True, "base", {"model": API}),
    (True, "base", {"model": API, "api": {"key_env": "API_KEY", "endpoint": "chat"}}),
    (True, "base", {"model": "base.gguf", "llama_cpp": {"threads": 4, "cache_dtype": "q8_0"}}),
    (True, "experts.0.alpha", 0),
    (True, "experts.0.alpha", -1.5),
    (True, "experts.0.weights", {"base": 0.9, "expert": 0}),
    (True, "experts.0.weights", None),
    (True, "experts.0.bias", "biases/legal.safetensors"),
    (True, "experts.0.expert", {"model": "owner/tuned", "prompt": "chat"}),
    (True, "experts.0.expert", {"same_as": "base"}),
    (True, "experts.0.expert", {"model": "owner/tuned", "prompt": "[INST] {{ text }} [/INST]"}),
    (True, "experts.0.anti_expert", CUT),
    (True, "experts.0.expert", CUT),
    (False, "base", CUT),
    (False, "experts.0.anti_expert", {"cut_of": "base"}),
    (False, "experts.0.anti_expert", {**CUT, "cut_of": "expert"}),
    (False, "experts.0.anti_expert", {**CUT, "keep": [3]}),
    (False, "experts.0.anti_expert", {**CUT, "keep": [3, 0]}),
    (False, "experts.0.anti_expert", {**CUT, "bridge": "bridge.bin"}),
    (False, "experts.0.anti_expert", {**CUT, "model": "owner/small"}),
    (False, "model_type", "llama"),
    (False, "basis", {"model": "owner/base"}),
    (False, "base", "owner/base"),
    (False, "base", {"dtype": "float32"}),
    (False, "base", {"same_as": "base"}),
    (False, "base.adapter", "adapters/base"),
    (False, "base.dtpye", "float32"),
    (False, "base.dtype", "float8"),
    (False, "base.api", {"model": "large"}),
    (False, "base.llama_cpp", {}),
    (False, "base.quantization", {}),
    (False, "base.prompt", "chatty"),
    (False, "base.trust_remote_code", "yes"),
    (False, "base", {"model": API, "api": {"key_env": "sk-abc"}}),
    (False, "base", {"model": API, "api": {"endpoint": "responses"}}),
    (False, "base", {"model": API, "api": {"timeout_s": 0}}),
    (False, "base", {"model": "base.gguf", "llama_cpp": {"threads": 0}}),
    (False, "base", {"model": "base.gguf", "llama_cpp": {"thread": 4}}),
    (False, "experts", []),
    (False, "experts", {"legal": {}}),
    (False, "experts.0.name", "le gal"),
    (False, "experts.0.alpha", "1"),
    (False, "experts.0.weights", {"base": 0}),
    (False, "experts.0.weights", {"anti_expert": 11}),
    (False, "experts.0.weights", {"anti-expert": 1}),
    (False, "experts.0.bias", "biases/legal.bin"),
    (False, "experts.0.expert", {}),
    (False, "experts.0.expert", {"model": API}),
    (False, "experts.0.expert", {"same_as": "expert"}),
    (False, "experts.0.expert", {"same_as": "base", "model": "owner/tuned"}),
    (False, "experts.0.anti_expert", {"adapter": "adapters/opposite"}),
    (False, "combine", "product"),
    (False, "default_expert", 1),
    (False, "steering", {"policy": "sometimes"}),
    (False, "steering", {"threshold": 0.3}),
    (False, "steering", {"policy": "kl_match", "max_alpha": 0}),
    (False, "steering", {"schedule": [[0, 1, 2]]}),
    (False, "steering", {"schedule": [[-1, 1]]}),
    (False, "steering", {"implausible": "leave"}),
    (False, "$schema", 3),
]


@pytest.mark.parametrize(
    ("is_valid", "place", "value"), CHANGES, ids=[f"{c[1]}={c[2]}"[:60] for c in CHANGES]
)
def test_schema_and_code_accept_and_refuse_the_same(is_valid, place, value, validator):
    recipe: Any = copy.deepcopy(PLAIN)
    if place:
        *path, key = place.split(".")
        target = recipe
        for part in path:
            target = target[int(part) if part.isdigit() else part]
        target[key] = value
    try:
        Recipe.from_dict(recipe)
    except RecipeError:
        assert not is_valid, "the code refuses it"
    else:
        assert is_valid, "the code accepts it"
    assert validator.is_valid(recipe) == is_valid, "the schema says otherwise"


def test_the_schema_describes_every_key():
    schema = recipe_schema.recipe_schema()
    for name in ("Recipe", *schema["$defs"]):
        part = schema if name == "Recipe" else schema["$defs"][name]
        for key, value in part["properties"].items():
            assert value is True or value["description"], f"{name}.{key}"


def test_a_recipe_keeps_the_address_of_its_schema(tmp_path):
    content = {"$schema": "./recipe.schema.json", **PLAIN}
    Recipe.from_dict(content).write(tmp_path / "recipe")
    written = json.loads((tmp_path / "recipe" / "config.json").read_text(encoding="utf-8"))
    assert written["$schema"] == "./recipe.schema.json"
    assert next(iter(written)) == "$schema"


def test_transformers_reads_a_recipe_that_names_a_schema(tmp_path):
    from transformers import AutoConfig

    Recipe.from_dict({"$schema": "./recipe.schema.json", **PLAIN}).write(tmp_path / "recipe")
    config: Any = AutoConfig.from_pretrained(tmp_path / "recipe")
    assert config.recipe().base.model == "owner/base"


# The site ---------------------------------------------------------------------------------------------------


def navigation() -> set[str]:
    """Return the pages that mkdocs.yml leads to."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return set(re.findall(r"^\s+- .*: (\S+\.md)$", text.partition("\nnav:\n")[2], re.MULTILINE))


def test_every_page_is_in_the_navigation_or_linked_from_a_page_there():
    import docs_site

    files = {path.relative_to(DOCS).as_posix(): path for path in DOCS.rglob("*.md")}
    files |= {place: ROOT / name for name, place in docs_site.PAGES.items()}
    shown = navigation()
    assert shown <= files.keys()
    linked = set()
    for place in shown:
        for match in docs_site.links(files[place].read_text(encoding="utf-8")):
            target = docs_site.target_of(match[2], files[place])
            if target is not None:
                linked.add(docs_site.site_path(target))
    assert files.keys() - shown - linked == set()


def test_links_out_of_a_page_are_found_outside_code_only():
    import docs_site

    text = "[a](b.md) `[c](d.md)` [e](https://f)\n```\n[g](h.md)\n```\n[i](#j) [k](../l.py#m)\n"
    assert [match[2] for match in docs_site.links(text)] == ["b.md", "../l.py#m"]


def test_a_word_with_a_hyphen_in_a_code_span_is_kept_on_one_line():
    import docs_site

    code = "<p><code>run --max-rows 8</code></p><pre><span></span><code>--max-rows</code></pre>"
    kept = code.replace("run --max-rows", 'run <span class="word">--max-rows</span>', 1)
    assert docs_site.on_page_content(code, None, None, None) == kept
    too_long = f"<code>--{'x' * docs_site.LONGEST_WORD}</code>"
    assert docs_site.on_page_content(too_long, None, None, None) == too_long


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` builds it; a warning fails the build."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; the extra is proxytune[docs]")
    place = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return place


class Links(HTMLParser):
    """What a page links to and loads, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        values = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := values.get(key))}
        link = values.get("href") or values.get("src")
        if not link:
            return
        self.targets.append(link)
        is_page = tag == "a" or values.get("rel") in ("canonical", "next", "prev")
        if not is_page:
            self.loaded.append(link)


@pytest.mark.slow
def test_every_link_of_the_site_leads_to_a_file_and_a_heading(site):
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 30
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # Its links start at the root of a server.
            continue
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme:
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            anchors = pages[place].ids if place in pages else set()
            if not place.exists() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert broken == []


@pytest.mark.slow
def test_no_list_of_the_site_was_taken_for_a_paragraph(site):
    """Markdown of the site wants an empty line before a list; that of forges does not."""
    swallowed = []
    for path in site.rglob("*.html"):
        if path.is_relative_to(site / "source"):
            continue
        for match in re.finditer(
            r"<p>((?:(?!</p>).)*?)\n\s*[-*] (.{30})", path.read_text("utf-8"), re.DOTALL
        ):
            swallowed.append(f"{path.relative_to(site)}: {match[2]}")
    assert swallowed == []


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        page = Links(path.read_text(encoding="utf-8"))
        assert [link for link in page.loaded if urlsplit(link).netloc] == [], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:", path.read_text(encoding="utf-8")), path


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_a_phone_and_a_desk_without_a_fault(site, width):
    with open_page(width=width) as page:
        for name in ("index", "method", "reference/recipe", "reference/python", "guides/serve"):
            page.goto((site / f"{name}.html").as_uri())
            page.wait_for_function("document.readyState === 'complete'")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            broken = (
                "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
            )
            assert page.evaluate(broken) == [], name
        assert page.faults == []


@pytest.mark.slow
def test_the_site_can_be_searched_without_a_server(site):
    with open_page() as page:
        page.goto((site / "index.html").as_uri())
        page.click(".md-search__input")
        page.locator(".md-search__input").press_sequentially("certified")
        page.wait_for_selector(".md-search-result__link", timeout=20_000)
        assert page.faults == []


# Code on pages ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demonstration_on_the_methods_page_prints_what_the_page_says(capsys):
    _, blocks = check_docs.split((DOCS / "method.md").read_text(encoding="utf-8"))
    (code,) = [b.text for b in blocks if b.language == "python" and "import ProxyTuned" in b.text]
    (shown,) = [b.text for b in blocks if b.language == "text" and b.text.startswith("base ")]
    exec(compile(code, "docs/method.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    number = r"\d\.\d\d"
    for line, said in zip(printed, shown.splitlines(), strict=False):
        assert re.sub(number, "", line) == re.sub(number, "", said)
        pairs = zip(re.findall(number, line), re.findall(number, said), strict=True)
        # Two places are printed, so a rounding difference is one hundredth.
        assert all(abs(float(a) - float(b)) < 0.011 for a, b in pairs), line
    assert len(shown.splitlines()) == 4
    assert printed[4].startswith("0 ")


# The threat model -------------------------------------------------------------------------------------------


def test_every_promise_of_the_threat_model_names_tests_that_exist():
    page = (DOCS / "guides" / "security.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    known = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    promises = [
        item
        for section in sections
        for item in re.findall(
            r"^- .*?(?=^- |^\S(?!ests)|^$|\Z)", section, re.MULTILINE | re.DOTALL
        )
    ]
    assert len(promises) > 40
    for promise in promises:
        tests = re.findall(r"<!-- tests: (.*?) -->", promise, re.DOTALL)
        assert tests, f"no test is named for: {promise[:80]}"
        named = {name.strip() for each in tests for name in each.split(",")}
        assert named <= known, f"{sorted(named - known)} of: {promise[:80]}"
