"""The shape of the project: which file may import which, what importing costs, what the repository holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "proxytune"

# A package or module imports only from those above it, and a module of a package also from those before it
# in its row. docs/architecture.md has a row for each package, in the same order.
PACKAGES: dict[str, tuple[str, ...]] = {
    "errors": (),
    "files": (),
    "machine": (),
    "settings": (),
    "policy": (),
    "request": (),
    "grants": (),
    "trace": (),
    "logits": ("certificate", "sample", "steer", "rules", "views"),
    "text": (
        "meter",
        "library",
        "template",
        "prompts",
        "turns",
        "one_stream",
        "detokenize",
        "vocab",
    ),
    "checkpoints": (
        "faults",
        "untrusted",
        "headers",
        "config_limits",
        "tokenizer_limits",
        "context",
        "gguf_parts",
        "pre_tokenizers",
        "conversion",
        "hub",
        "causal",
        "placement",
        "references",
        "cut",
        "bridge_file",
        "output_bias",
        "changes",
        "rows",
        "checkpoint",
        "cut_checkpoint",
        "adapter",
        "merge",
    ),
    "recipe": ("checks", "address", "spec", "card", "directory", "recipe", "fields", "files"),
    "export": ("layout", "tokenizer", "write", "adapter", "model", "recipe"),
    "backends": (
        "base",
        "checks",
        "exact",
        "llama_cpp",
        "retokenised",
        "toy",
        "api.answers",
        "api.keys",
        "api.connections",
        "api.client",
        "api.tokens",
        "api.positions",
        "api.server",
        "api.stretches",
        "api.backend",
        "transformers.attention",
        "transformers.rotary",
        "transformers.temperature",
        "transformers.kv_cache",
        "transformers.lengthwise",
        "transformers.linear",
        "transformers.lora",
        "transformers.cut",
        "transformers.cuda_graphs",
        "transformers.state",
        "transformers.rows",
        "transformers.quantized",
        "transformers.weights",
        "transformers.output",
        "transformers.backend",
    ),
    "decode": (
        "ensemble",
        "speculative",
        "lanes",
        "reading",
        "outlook",
        "drafting",
        "partial",
        "record",
        "batch",
        "collect",
    ),
    "loading": ("formats", "members", "samples", "output", "doctor", "load"),
    "measure": (
        "metrics",
        "score",
        "prompt",
        "branch",
        "given",
        "likelihood",
        "rank",
        "sweep",
        "curve",
    ),
    "model": (),
    "testing": (),
    "tasks": (
        "guarded",
        "rows",
        "sandbox",
        "statistics",
        "task",
        "alpaca_eval",
        "gsm8k",
        "humaneval",
        "ds1000",
        "realtimeqa",
        "toxigen",
        "triviaqa",
        "truthfulqa",
        "registry",
    ),
    "data": ("lines", "resumable", "batch", "rows", "passages"),
    "cut": ("settings", "bridge", "texts", "heal", "card", "run"),
    "pages": ("policy",),
    "explain": (
        "equations",
        "moves",
        "summary",
        "report",
        "runs",
        "page",
        "welch",
        "analysis",
        "pictures",
        "notebook",
    ),
    "tune": (
        "encode",
        "reward_worker",
        "rewards",
        "settings",
        "lora_places",
        "formats",
        "heads",
        "loss",
        "offsets",
        "frozen",
        "shown",
        "calibrated",
        "fit",
        "features",
        "fitted",
        "verdict",
        "reward_scores",
        "card",
        "trainer",
        "reward_trainer",
        "pair",
        "training",
        "stages",
        "run",
        "distil",
        "baked",
        "bake",
    ),
    "integrations": (
        "auto",
        "lm_eval",
        "ensemble_cache",
        "frozen",
        "generation",
        "transformers",
        "vllm.parent",
        "vllm.request",
        "vllm.config",
        "vllm.draft",
        "vllm.processor",
        "vllm.server",
        "vllm.weights",
        "vllm.model",
        "vllm.worker",
        "vllm.engine",
    ),
    "evaluate": (
        "harness",
        "judges",
        "plan",
        "predictors",
        "compare",
        "decide",
        "run",
        "speed",
        "tables",
    ),
    "server": (
        "body",
        "turns",
        "engine",
        "metrics",
        "habits",
        "refusals",
        "schema",
        "echo",
        "answer",
        "reasoning",
        "steering",
        "settings",
        "rendering",
        "service",
        "guards",
        "doors",
        "stored",
        "responses",
        "messages",
        "tokens",
        "app",
        "run",
        "vllm",
    ),
    "commands": (
        "flags",
        "streams",
        "layout",
        "console",
        "progress",
        "app",
        "options",
        "engines",
        "bench",
        "chat",
        "demo",
        "doctor",
        "evaluate",
        "make_proxy",
        "export_gguf",
        "generate",
        "grade",
        "new",
        "serve",
        "shown",
        "explain",
        "analyze",
        "sweep",
        "rank",
        "score",
        "tune",
        "fit",
        "bake",
    ),
    "cli": (),
}
ORDER = tuple(
    name
    for package, names in PACKAGES.items()
    for name in ((f"{package}.{inner}" for inner in names) if names else (package,))
)
# The front doors: `proxytune/__init__.py` gathers the public names, `__main__.py` runs the command line.
FRONT_DOORS = {"__init__", "__main__"}
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}
HEAVY = {
    "transformers",
    "peft",
    "accelerate",
    "gguf",
    "tokenizers",
    "huggingface_hub",
    "typer",
    "rich",
    "trl",
    "datasets",
    "matplotlib",
    "fastapi",
    "pydantic",
    "uvicorn",
    "prometheus_client",
}


def modules() -> dict[str, Path]:
    """Return the package's modules by dotted name, the packages' own `__init__` files left out.

    What stands in the smol family's recipe is data: it is run by transformers, as that of any recipe.
    """
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        is_data = path.is_relative_to(PACKAGE / "smol")
        if name not in FRONT_DOORS and path.name != "__init__.py" and not is_data:
            found[name] = path
    return found


def imported_modules(path: Path) -> set[str]:
    """Return what a file imports from the package, in functions and for type checkers too.

    `"proxytune"` itself stands for a name taken from the front door.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            origin = node.module or ""
            names = [origin]
            if origin.split(".")[0] == "proxytune":
                whole = [f"{origin}.{alias.name}" for alias in node.names]
                names = [n if n.removeprefix("proxytune.") in ORDER else origin for n in whole]
        found |= {n.removeprefix("proxytune.") for n in names if n.split(".")[0] == "proxytune"}
    return found


def repository_files() -> list[Path]:
    """Return the files git tracks or would add."""
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_every_module_has_its_place_in_the_order():
    assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_those_above_it(name):
    above = ORDER[: ORDER.index(name)]
    below = imported_modules(modules()[name]) - set(above)
    assert not below, f"{name} imports {', '.join(sorted(below))}"


def test_the_architecture_page_has_a_row_per_package_in_that_order():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    # The first code span of a table row.
    rows = re.findall(r"^\| `([\w/]+?)(?:/|\.py)` ", page, flags=re.MULTILINE)
    assert [name for name in rows if name in PACKAGES] == list(PACKAGES)


def test_no_file_is_a_drawer():
    files = {part for path in PACKAGE.rglob("*") for part in (path.stem, path.name)}
    assert not files & DRAWERS


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_every_module_says_what_it_knows(path):
    source = path.read_text(encoding="utf-8")
    # The `__init__` of a folder that gathers nothing may be empty.
    assert not source.strip() or ast.get_docstring(ast.parse(source))


def test_importing_the_package_is_quiet_and_loads_nothing_heavy():
    code = "import sys; before = set(sys.modules); import proxytune; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    (line,) = run.stdout.splitlines()
    loaded = {name.split(".")[0] for name in line.split()}
    assert not loaded & HEAVY


def test_importing_the_package_sets_up_no_logging_and_changes_no_environment():
    code = (
        "import logging, os; before = dict(os.environ), list(logging.root.handlers); import proxytune; "
        "assert before == (dict(os.environ), list(logging.root.handlers))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_of_the_repository_is_over_16_mb():
    large = [str(path) for path in repository_files() if path.stat().st_size > 16 * 1024 * 1024]
    assert not large


def test_the_repository_names_no_package_registry():
    """Where packages come from is the installer's configuration, not the project's."""
    # Put together here, so that this file does not name them either.
    hosts = ["pypi" + ".org", "python" + "hosted", "registry." + "npmjs"]
    named = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # weights and other binary files
            continue
        named += [f"{path}: {host}" for host in hosts if host in text]
    assert not named


def test_every_public_name_is_there_and_only_those_are_promised():
    import proxytune

    for name in proxytune.__all__:
        assert getattr(proxytune, name).__doc__
        assert name in dir(proxytune)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = proxytune.nonsense
