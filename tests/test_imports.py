"""The architecture as a list: who may import whom, who may import what, and how long a file may be."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "workbench"
# A module may import those of its own line and of lines above it.
ORDER = [
    "errors yamltree yamldoc jsondoc versions",
    "weights",
    "conversion",
    "names layout live stored attention prompts batching",
    "adapters fields facts suiteparts",
    "vocabulary",
    "registry",
    "merge edit grow train",
    "evalfields searchfields recipe standins hub bricks ties integers",
    "adapted adapter_output",
    "origin decoding fit stepkeys resolve importing",
    "card runs livemodels",
    "memories",
    "solving trained growth compose growthcheck efficacy saved",
    "peaks planning",
    "engine",
    "extract measure rebase",
    "taskfiles tokendigest suites scorefiles taskcode scoredocs groups scores signflips statistics changes paired tables comparison evaluate compare",
    "samples exchange suitecheck factsuite",
    "suitechoice controls factcheck tracetable models scorecard scoring starter doctor",
    "search",
    "training report docs",
    "api",
    "cli",
]
LEVELS = {name: level for level, line in enumerate(ORDER) for name in line.split()}
# Third-party package -> the only places that may import it. What is not listed may be imported anywhere.
ONLY_IN = {
    "lm_eval": ("evaluate/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "jinja2": ("report/", "evaluate/"),
    "gguf": ("starter.py",),
    "mergekit": ("merge/bridge_api.py",),
    "ray": ("search/cluster.py",),
    "optuna": ("search/study.py", "search/samplers.py"),
    "pickle": (),
    "joblib": (),
    "dill": (),
    "cloudpickle": (),
    "requests": (),
}
WEIGHTS_MAY_IMPORT = {"torch", "safetensors", "numpy", "xxhash"}
MAX_FILE, MAX_FUNCTION = 400, 80

SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON = sorted(p for folder in ("workbench", "tests", "evals/skills", "benchmarks") for p in (PROJECT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions too, those for type checkers alone not."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
               for inner in node.body for n in ast.walk(inner)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            if node.module == "workbench":
                yield from ((node.lineno, f"workbench.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def part(path: Path) -> str:
    return relative(path).split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_order(path: Path) -> None:
    here = part(path)
    if here in ("__init__", "__main__"):
        return
    assert here in LEVELS, f"{relative(path)} has no place in the order: add it to ORDER"
    for line, module in imports(path):
        root, _, rest = module.partition(".")
        if root != "workbench" or not rest:
            continue
        there = rest.split(".")[0]
        assert LEVELS[there] <= LEVELS[here], f"{relative(path)}:{line} imports workbench.{there}, which stands after {here}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_third_parties(path: Path) -> None:
    name = relative(path)
    for line, module in imports(path):
        root = module.split(".")[0]
        places = ONLY_IN.get(root)
        assert places is None or name.startswith(places), f"{name}:{line} imports {root}, allowed in {places or 'no file'}"
        if name.startswith("weights/") and root not in sys.stdlib_module_names:
            allowed = (
                root in WEIGHTS_MAY_IMPORT
                or module in ("workbench", "workbench.errors", "workbench.jsondoc")
                or module.startswith("workbench.weights")
            )
            assert allowed, f"{name}:{line} imports {module}"


@pytest.mark.parametrize("path", sorted((PROJECT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_names_that_exist(path: Path) -> None:
    """Benchmarks run rarely: a name that has moved must not wait for the next run."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "workbench":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                found = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert found, f"{path.name}:{node.lineno}: {node.module} has no {alias.name}"


def test_methods_do_not_import_each_other() -> None:
    """What two methods share stands in a file without a method."""
    with_method = {
        f"workbench.{p}.{f.stem}"
        for p in ("merge", "edit", "grow")
        for f in (PACKAGE / p).glob("*.py")
        if "@register" in f.read_text("utf-8")
    }
    assert len(with_method) >= 6
    for path in SOURCES:
        if path.parent.name in ("merge", "edit", "grow"):
            assert not [m for _, m in imports(path) if m in with_method], relative(path)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_executes_foreign_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if (relative(path), called) == ("taskfiles.py", "yaml.load"):
                assert "_TaskLoader(yaml.SafeLoader)" in path.read_text("utf-8")
                continue
            assert called not in ("torch.load", "yaml.load", "eval", "exec", "print"), (
                f"{relative(path)}:{node.lineno} calls {called}"
            )
            for keyword in node.keywords:
                assert not (keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"), (
                    f"{relative(path)}:{node.lineno}"
                )


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.relative_to(PROJECT).as_posix())
def test_sizes(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= MAX_FILE, f"{path.name} has {len(text.splitlines())} lines, at most {MAX_FILE}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{path.name}: {node.name} has {length} lines, at most {MAX_FUNCTION}"


def test_no_utils() -> None:
    assert not [p for p in PYTHON if p.stem in ("utils", "util", "helpers", "common", "misc")]


def test_help_imports_no_torch() -> None:
    code = ("import sys; sys.argv = ['workbench', '--help']\nfrom workbench.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
            "print([m for m in ('torch', 'transformers', 'lm_eval', 'peft', 'scipy') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.splitlines()[-1] == "[]"
