"""The architecture as a list: who may import whom, and who may import what."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from worlds.places import PARTS, PROJECT

from workbench.cli.index import COMMANDS, Commands
from workbench.console.failures import extras
from workbench.ground.parts import Part, imported, parts

PACKAGE = PROJECT / "workbench"
# A folder of the core imports only from lines above its own.
GROUPS = [
    "ground",
    "weights facts",
    "models console",
    "adapters steps scores activations",
    "vocabulary train bricks merge edit route compare",
    "grow recipe",
    "resolve",
    "run",
    "evaluate",
    "report",
    "api",
    "cli",
    "__init__ __main__",
]
LEVELS = {name: level for level, line in enumerate(GROUPS) for name in line.split()}
FLOORS = 13  # the longest chain of folders that import one another
PRINTING = ("cli/", "console/", *(f"{part}/commands" for part in PARTS))
# Third-party package -> the only places that may import it. What is not listed may be imported anywhere.
ONLY_IN = {
    "lm_eval": ("evaluate/",),
    "typer": PRINTING,
    "rich": PRINTING,
    "jinja2": ("report/", "evaluate/"),
    "gguf": ("upkeep/fetch.py", "adapters/linear.py", "bricks/gguf_files.py", "weights/packed.py"),
    "mergekit": ("merge/mergekit/table.py",),
    "ray": ("evaluate/cluster.py",),
    "mlflow": ("trackers/",),
    "wandb": ("trackers/",),
    "optuna": ("search/study.py", "search/samplers.py"),
    "pickle": (),
    "joblib": (),
    "dill": (),
    "cloudpickle": (),
    "requests": (),
    "urllib": ("recipe/points.py",),  # spells names: the net is behind `http`
    "httpx": ("ground/http.py", "serve/proxy.py"),
    "starlette": ("serve/", "view/"),
    "uvicorn": ("serve/", "view/"),
}
# Files whose imports need an extra; only commands that need the extra import them.
NEED_EXTRAS = {
    "evaluate/answers.py",
    "evaluate/hflm.py",
    "evaluate/localdata.py",
    "evaluate/models.py",
    "search/samplers.py",
    "search/study.py",
    "serve/app.py",
    "serve/failing.py",
    "serve/proxy.py",
    "serve/server.py",
    "view/app.py",
    "view/guard.py",
    "view/server.py",
}
WEIGHTS_MAY_IMPORT = {"torch", "safetensors", "numpy", "xxhash", "gguf"}

SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON = sorted(p for folder in ("workbench", "tests", "evals/skills", "benchmarks") for p in (PROJECT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def imports(path: Path, at_start: bool = False) -> tuple[tuple[int, str], ...]:
    """Return (line, dotted module) of every import, or of those that run when the module itself is imported.

    Args:
        path: The module.
        at_start: Skip imports inside functions and for type checkers.
    """
    found = []
    for node in nodes_at_start(parsed(path)) if at_start else ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            for alias in node.names:
                inner = PROJECT / module.replace(".", "/") / alias.name
                is_module = module.split(".")[0] == "workbench" and (inner.with_suffix(".py").is_file() or inner.is_dir())
                found.append((node.lineno, f"{module}.{alias.name}" if is_module else module))
    return tuple(found)


def nodes_at_start(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below a node, without functions and code for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes_at_start(node)


def folder(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


@cache
def arrows() -> tuple[tuple[str, int, str], ...]:
    """Return (file, line, folder) of every import of another folder of the package."""
    found = []
    for path in SOURCES:
        for line, module in imports(path):
            root, _, rest = module.partition(".")
            there = rest.split(".")[0] if rest else "__init__"
            if root == "workbench" and there != folder(relative(path)):
                found.append((relative(path), line, there))
    return tuple(found)


def test_a_folder_imports_only_from_groups_before_it() -> None:
    known = {folder(relative(path)) for path in SOURCES} - {*PARTS}
    assert known == LEVELS.keys(), f"neither in GROUPS nor in PARTS, or gone: {sorted(known ^ LEVELS.keys())}"
    offenders = [
        f"{name}:{line} imports workbench.{there}, which is not in a group before {folder(name)}"
        for name, line, there in arrows()
        if folder(name) in LEVELS and there in LEVELS and LEVELS[there] >= LEVELS[folder(name)]
    ]
    assert not offenders, "\n".join(offenders)


def test_the_core_imports_no_part() -> None:
    offenders = [
        f"{name}:{line} imports the part {there}"
        for name, line, there in arrows()
        if there in PARTS and folder(name) not in PARTS
    ]
    assert not offenders, "\n".join(offenders)


def test_a_part_imports_the_core_below_the_commands_and_the_parts_that_it_names() -> None:
    assert parts().keys() <= {*PARTS}
    used: dict[str, set[str]] = {part: set() for part in PARTS}
    offenders = []
    for name, line, there in arrows():
        if (here := folder(name)) not in PARTS:
            continue
        if there in PARTS:
            used[here].add(there)
        elif there == "cli" or there == "__main__":
            offenders.append(f"{name}:{line} imports workbench.{there}")
        if name.endswith("/part.py") and there != "ground":
            offenders.append(f"{name}:{line} imports more than names")
    assert not offenders, "\n".join(offenders)
    for name, part in parts().items():
        assert used[name] == set(part.needs), f"`needs` of workbench/{name}/part.py is not what the part imports"


def test_tests_import_a_part_where_it_is_needed() -> None:
    """Tests load without a part: those in its folder are left out, those marked `part` are skipped, and no other file imports it at its top."""
    tests, offenders = PROJECT / "tests", []
    for path in tests.rglob("*.py"):
        here = path.relative_to(tests).parts[0]
        allowed = {here, *parts()[here].needs} if here in parts() else set()
        for line, module in imports(path, at_start=True):
            there = module.removeprefix("workbench.").split(".")[0]
            if module.startswith("workbench.") and there in {*PARTS} - allowed:
                offenders.append(
                    f"{path.relative_to(PROJECT)}:{line} imports the part {there}: import it in tests marked part({there!r})"
                )
    assert not offenders, "\n".join(offenders)


def test_floors() -> None:
    below: dict[str, set[str]] = {}
    for name, _, there in arrows():
        below.setdefault(folder(name), set()).add(there)
    floor: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():  # raises where folders form a circle
        floor[name] = 1 + max((floor[one] for one in below.get(name, ())), default=0)
    assert max(floor.values()) == FLOORS, f"write the number of floors, {max(floor.values())}, which only falls: {floor}"


def test_every_place_that_a_part_names_is_there() -> None:
    given = {name: place for part in parts().values() for name, place in part.commands.items()}
    owners = {name: part for part, one in parts().items() for name in one.commands}
    known = {name: owner for name, owner in COMMANDS.items() if "." in owner or owner in parts()}
    assert {name: owner for name, owner in known.items() if "." not in owner} == owners, "the index names other parts"
    places = [*given.values()]
    for part in parts().values():
        places += [place if isinstance(place, str) else place[0] for place in part.documents.values()]
        places += [*part.kinds.values(), *(f"{module}.{name}" for module, name in _hooks(part))]
    for place in places:
        assert imported(place)
    groups = {"": [*Commands()], **{name: [*Commands(f"{name} ", command.commands)] for name, command in _groups().items()}}
    listed = [f"{group} {name}".strip() for group, names in groups.items() for name in names]
    assert not known.keys() - set(listed)
    for group, names in groups.items():
        ordered = [name.rpartition(" ")[2] for name in known if name.rpartition(" ")[0] == group]
        assert [name for name in names if name in ordered] == ordered, f"workbench {group}"


def _hooks(part: Part) -> Iterator[tuple[str, str]]:
    """Yield (module, function) of what a part's hooks promise."""
    if part.watch:
        yield from ((part.watch, name) for name in ("check", "page"))
    if part.searches:
        yield from ((part.searches, name) for name in ("searched", "write_pages"))


def _groups() -> dict[str, Any]:
    return {name: found for name in Commands() if hasattr(found := Commands()[name], "commands")}


def test_no_circles() -> None:
    """Modules form no circle, inside a folder either; what a type checker alone imports counts."""
    modules = {
        f"workbench.{relative(p).removesuffix('.py').removesuffix('/__init__').replace('/', '.')}": set[str]() for p in SOURCES
    }
    for path, (name, targets) in zip(SOURCES, modules.items(), strict=True):
        targets |= {module for _, module in imports(path) if module in modules and module != name}
    ordered = TopologicalSorter(modules)
    try:
        ordered.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_third_parties() -> None:
    offenders = []
    for path in SOURCES:
        name = relative(path)
        for line, module in imports(path):
            root = module.split(".")[0]
            places = ONLY_IN.get(root)
            if places is not None and not name.startswith(places):
                offenders.append(f"{name}:{line} imports {root}, allowed in {places or 'no file'}")
            if name.startswith("weights/") and root not in {*sys.stdlib_module_names, *WEIGHTS_MAY_IMPORT, "workbench"}:
                offenders.append(f"{name}:{line} imports {module}")
            if name.startswith("scores/") and (root in ("torch", "transformers") or module == "workbench.ground.lazy"):
                offenders.append(f"{name}:{line} imports {root}: scores are read without it")
    assert not offenders, "\n".join(offenders)


@pytest.mark.part(*PARTS)
def test_benchmarks_import_names_that_exist() -> None:
    """Benchmarks run rarely: a name that has moved must not wait for the next run."""
    offenders = []
    for path in (PROJECT / "benchmarks").glob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "workbench":
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not (hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")):
                        offenders.append(f"{path.name}:{node.lineno}: {node.module} has no {alias.name}")
    assert not offenders, "\n".join(offenders)


def test_methods_do_not_import_each_other() -> None:
    """What two methods share stands in a file without a method."""
    with_method = {
        f"workbench.{p}.{f.stem}"
        for p in ("merge", "edit", "grow", "fuse", "route")
        for f in (PACKAGE / p).glob("*.py")
        if "@register" in f.read_text("utf-8")
    }
    assert len(with_method) >= 6
    for path in SOURCES:
        if path.parent.name in ("merge", "edit", "grow", "fuse", "route"):
            assert not [m for _, m in imports(path) if m in with_method], relative(path)


def test_nothing_executes_foreign_code() -> None:
    offenders = []
    for path in SOURCES:
        text = path.read_text("utf-8")
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            called, place = ast.unparse(node.func), f"{relative(path)}:{node.lineno}"
            if (relative(path), called) == ("scores/tasks.py", "yaml.load"):
                assert "_TaskLoader(yaml.SafeLoader)" in text
            elif called in ("torch.load", "yaml.load", "eval", "exec", "print"):
                offenders.append(f"{place} calls {called}")
            trusted = [k for k in node.keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) != "False"]
            offenders += [f"{place} trusts remote code" for _ in trusted]
    assert not offenders, "\n".join(offenders)


def test_no_test_imports_a_test_module() -> None:
    """Code that several tests need lies in tests/worlds or is a fixture in a conftest.py."""
    tests = PROJECT / "tests"
    modules = {path.stem for path in tests.rglob("test_*.py")} | {"conftest"}
    offenders = []
    for path in [*tests.rglob("*.py"), *(PROJECT / "benchmarks").glob("*.py")]:
        if not re.search(r"import\b.*\b(test_|conftest)|from\b.*\b(test_|conftest)", path.read_text("utf-8")):
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                imported = modules & {part for name in names for part in name.split(".")}
                offenders += [f"{path.relative_to(PROJECT)}:{node.lineno} imports {name}" for name in sorted(imported)]
    assert not offenders, "\n".join(offenders)


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    listed = [*project["dependencies"], *(line for extra in extras() for line in optional[extra])]
    declared = {re.split(r"[\[<>=~! ]", line)[0].lower().replace("_", "-") for line in listed}
    providers = {**packages_distributions(), "ray": ["ray"], "mlflow": ["mlflow-skinny"], "wandb": ["wandb"]}
    offenders = []
    for path in SOURCES:
        for line, module in imports(path):
            root = module.split(".")[0]
            names = {name.lower().replace("_", "-") for name in providers.get(root, [root])}
            if root not in {*sys.stdlib_module_names, "workbench"} and not names & declared:
                offenders.append(f"{relative(path)}:{line} imports {root}, which pyproject.toml does not declare")
    assert not offenders, "\n".join(offenders)


def test_the_core_needs_no_extra() -> None:
    """No module outside `evaluate`, `search`, `serve` and `view` imports a library of an extra, even through other modules of the package."""
    libraries = {module for modules in extras().values() for module in modules}
    names = {f"workbench.{relative(p).removesuffix('.py').removesuffix('/__init__').replace('/', '.')}": p for p in SOURCES}
    direct = {name: {module for _, module in imports(path, at_start=True)} for name, path in names.items()}
    needing = {name for name, modules in direct.items() if {m.split(".")[0] for m in modules} & libraries}
    assert {relative(names[name]) for name in needing} == {name for name in NEED_EXTRAS if (PACKAGE / folder(name)).is_dir()}
    offenders = []
    for start, path in names.items():
        if folder(relative(path)) in ("evaluate", "search", "serve", "view"):
            continue
        reached, todo = {start: start}, [start]
        for name in todo:
            # Importing a.b.c also imports a and a.b.
            parts = {".".join(m.split(".")[: i + 1]) for m in direct[name] for i in range(m.count(".") + 1)}
            new = sorted((parts & names.keys()) - reached.keys())
            reached |= dict.fromkeys(new, name)
            todo += new
        for name in needing & reached.keys():
            offenders.append(f"{start} imports {name}, which needs an extra, through {reached[name]}")
    assert not offenders, "\n".join(offenders)


def test_no_utils() -> None:
    assert not [p for p in PYTHON if p.stem in ("utils", "util", "helpers", "common", "misc")]
