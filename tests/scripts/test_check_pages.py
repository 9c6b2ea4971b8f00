"""`scripts/check_pages.py` finds errors in the pages' script without a browser."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_pages.py"
HTML = '<div id="here"></div>'
FIRST = "const $ = (id) => document.getElementById(id);\nconst known = (x) => x !== undefined;\n"


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    pytest.importorskip(
        "tree_sitter_javascript", reason="the checks of `make check` are not installed"
    )
    spec = importlib.util.spec_from_file_location("check_pages", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faults(checker: ModuleType, second: str) -> list[str]:
    found: list[str] = checker.page_faults({"a.js": FIRST, "b.js": second}, HTML)
    return found


def test_the_pages_have_no_faults(checker: ModuleType):
    assert checker.main() == 0


def test_a_file_that_does_not_parse_is_named_with_its_line(checker: ModuleType):
    (fault,) = faults(checker, "const a = 1;\nconst b = known(;\n")
    assert fault.startswith("b.js:2: ")


@pytest.mark.parametrize(
    "code", ["f(1;", "if (1) {", "const = 2;", "class A {", "a ?? ;", "`${known(`"]
)
def test_broken_code_is_a_fault(checker: ModuleType, code: str):
    assert faults(checker, code)


def test_names_of_earlier_files_the_browser_and_declarations_are_known(checker: ModuleType):
    code = """
      const { a, b: [c, ...d], e = known } = JSON.parse("{}");
      class F extends Map { #g = 1; get(h) { return [this.#g, h]; } }
      function* i(j, { k = a } = {}) { yield* [j, k, arguments.length]; }
      async function* l() { for await (const m of i(1)) yield m?.n ?? c; }
      label: for (let o = 0, p = 1; o < p; o++) { try { break label; } catch (q) { $("here").title = q; } }
      let r; r ||= { a, d, e, key: F, [`${a}`]: l, /* s */ }; r = (t) => (u) => t + u + /v/.source;
    """
    assert faults(checker, code) == ["b.js:4: arguments is declared nowhere"]


def test_a_name_that_is_declared_nowhere_is_a_fault_also_as_a_short_property(checker: ModuleType):
    assert faults(checker, "knwon(1);") == ["b.js:1: knwon is declared nowhere"]
    assert faults(checker, "known({ missing });") == ["b.js:1: missing is declared nowhere"]


def test_a_name_that_another_file_of_the_page_declares_is_a_fault(checker: ModuleType):
    assert faults(checker, "class known {}") == ["b.js:1: known is declared already, in a.js:2"]


def test_a_name_declared_again_inside_a_function_is_no_fault(checker: ModuleType):
    assert faults(checker, "const f = () => { const known = 1; return known; };") == []


def test_an_element_that_the_page_does_not_have_is_a_fault(checker: ModuleType):
    assert faults(checker, '$("here").hidden = true;') == []
    assert faults(checker, '$("there").hidden = true;') == [
        "b.js:1: the page has no element 'there'"
    ]


def test_what_would_end_the_element_of_the_page_is_a_fault(checker: ModuleType):
    (fault,) = checker.end_faults("a.js", 'const a = 1;\nconst b = "</Script>";')
    assert fault.startswith("a.js:2: ")
