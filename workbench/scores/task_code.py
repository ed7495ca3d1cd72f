"""Code of local tasks: its files, the files that it reads, and a memo of built tasks that is valid while all these files are unchanged."""

from __future__ import annotations

import ast
import json
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import bytes_digest, read_memo, write_memo
from workbench.ground.identity import identity_of, installed
from workbench.scores.tasks import TaskSource

FORMAT = "task-3"
# Modules that read files only through Python's `open`, where the reads are recorded, and whose results depend on nothing else.
_RECORDED_MODULES = frozenset({
    "__future__", "abc", "array", "ast", "base64", "bisect", "collections", "contextlib", "copy", "csv", "dataclasses", "decimal",
    "difflib", "enum", "fractions", "functools", "gzip", "hashlib", "heapq", "html", "io", "itertools", "json", "math", "numbers",
    "operator", "pathlib", "pprint", "random", "re", "statistics", "string", "sys", "textwrap", "types", "typing", "unicodedata",
    "datasets", "numpy", "scipy", "yaml", "typing_extensions", "lm_eval",
})  # fmt: skip
# Names that give access to inputs that are not recorded: the environment, existence of files, the time, native readers.
_UNRECORDED_NAMES = frozenset({
    "environ", "getenv", "exists", "is_file", "is_dir", "stat", "lstat", "getmtime", "getsize", "now", "today", "utcnow", "cwd", "home", "argv", "stdin",
    "load_dataset", "load_from_disk", "from_parquet", "from_json", "from_csv", "from_text", "from_generator", "from_file",
    "memmap", "SystemRandom", "__import__", "eval", "exec", "import_module",
})  # fmt: skip


@cache
def _installed() -> tuple[Path, ...]:
    """Return the folders of installed code, which versions identify."""
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parent)]
    here = Path.cwd()
    for folder in {Path(place).resolve() for place in sys.path}:  # also where a .pth file or PYTHONPATH names installed packages
        around = folder.is_relative_to(here) or here.is_relative_to(folder)  # a project may not call its own code installed
        places += [str(folder)] if not around and any(folder.glob("*.dist-info")) else []
    return tuple(dict.fromkeys(Path(place).resolve() for place in places if place))


def is_own(path: Path) -> bool:
    """Return True if a file belongs to the user, not to an installed package or the system's pseudo file systems."""
    return not any(path.is_relative_to(folder) for folder in (*_installed(), Path("/proc"), Path("/sys"), Path("/dev")))


@dataclass(frozen=True)
class Code:
    """The Python files of a task.

    Attributes:
        files: Files of its `!function` fields, and the user's modules that they import, at any depth.
        named: Files named by string literals in that code.
        foreign: Imported packages that may read files without a record, and names that give access to unrecorded inputs.
    """

    files: frozenset[Path]
    named: frozenset[Path]
    foreign: frozenset[str]

    @property
    def is_traceable(self) -> bool:
        """True if all inputs of the code are recorded when it runs, so that its result can be reused while these files are unchanged."""
        return not self.foreign


def code_of(files: Iterable[Path], folder: Path) -> Code:
    """Follow the imports of a task's Python files, including those inside functions, without running them.

    Args:
        files: Files of its `!function` fields; other files are ignored.
        folder: Folder of the task file; string literals may name files relative to it.
    """
    visited: set[Path] = set()
    named: set[Path] = set()
    foreign: set[str] = set()
    queue = [path.resolve() for path in files if path.suffix == ".py"]
    while queue:
        path = queue.pop()
        if path in visited:
            continue
        visited.add(path)
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue  # lm-eval reports the error
        for node in ast.walk(tree):
            for module in _imported(node):
                inner = _module(module, path.parent)
                queue += inner
                foreign.update({module.rpartition(".")[2]} & _UNRECORDED_NAMES)
                if not inner and not module.startswith(".") and module.partition(".")[0] not in _RECORDED_MODULES:
                    foreign.add(module.partition(".")[0])
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if name in _UNRECORDED_NAMES:
                foreign.add(str(name))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named.update(_existing(node.value, (path.parent, folder, Path.cwd())))
    return Code(frozenset(visited), frozenset(named - visited), frozenset(foreign))


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        head = "." * node.level + (node.module or "")
        yield head or "."
        yield from (f"{head}.{alias.name}" if node.module else f"{head}{alias.name}" for alias in node.names)


def _module(name: str, folder: Path) -> list[Path]:
    """Return the files of an imported module and its packages if they belong to the user, else none."""
    level = len(name) - len(name.lstrip("."))
    places = [folder.joinpath(*[".."] * (level - 1))] if level else [folder, *(Path(p or ".") for p in sys.path)]
    parts = [part for part in name.lstrip(".").split(".") if part]
    for place in places:
        files = [] if parts else [f for f in (place / "__init__.py",) if f.is_file()]
        for depth in range(1, len(parts) + 1):
            stem = place.joinpath(*parts[:depth])
            files += [f for f in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")) if f.is_file()]
        files = [f.resolve() for f in files]
        if files:
            return [f for f in files if is_own(f)]
    return []


def _existing(text: str, folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the user's files that a string literal may name."""
    if len(text) >= 200:  # prose, no name
        return
    for folder in folders:
        try:
            path = (folder / text).resolve()
            if path.is_file() and is_own(path):
                yield path
        except (OSError, ValueError, RuntimeError):
            return


@dataclass(frozen=True)
class Reads:
    """Files and folders that a task read while it was built.

    Attributes:
        files: Files that it read.
        absent: Paths that it tried to read and that do not exist.
        folders: Folders that it listed.
        unseen: Reasons why the record may be incomplete: network, other processes, native libraries.
        links: Names of these files and folders that lead through symbolic links.
    """

    files: frozenset[Path] = frozenset()
    absent: frozenset[Path] = frozenset()
    folders: frozenset[Path] = frozenset()
    unseen: frozenset[str] = frozenset()
    links: frozenset[Path] = frozenset()

    def __or__(self, other: Reads) -> Reads:
        return Reads(
            self.files | other.files,
            self.absent | other.absent,
            self.folders | other.folders,
            self.unseen | other.unseen,
            self.links | other.links,
        )


def remember(path: Path, source: TaskSource, code: Code, reads: Reads, files: Iterable[Path]) -> None:
    """Write a built task and the identity of all its input files to a memo; delete the memo if the inputs are not all known.

    Args:
        path: File of the memo.
        source: The built task.
        code: Code of the task.
        reads: Files that the task read while it was built.
        files: YAML files of the task and the files that they name.
    """
    if not code.is_traceable or reads.unseen:
        path.unlink(missing_ok=True)
        return
    input_files = {*files, *code.files, *code.named, *reads.files}
    source_data = {**asdict(source), "lower": sorted(source.lower), "docs": list(source.docs)}
    document = {
        "format": FORMAT,
        "versions": _versions(),
        "cwd": str(Path.cwd()),
        "files": {str(f): _known(f) for f in sorted(input_files) if f.is_file()},
        "absent": sorted(map(str, reads.absent)),
        "folders": {str(f): _listing(f) for f in sorted(reads.folders)},
        "links": {str(f): str(f.resolve()) for f in sorted(reads.links)},
        "source": source_data,
    }
    try:
        json.dumps(document, allow_nan=False)
        write_memo(path, document)
    except (TypeError, ValueError):  # tasks whose documents are not plain JSON are built each time
        path.unlink(missing_ok=True)


def recall(path: Path, code: Code, files: Iterable[Path]) -> TaskSource | None:
    """Return the task of a memo if all its input files are unchanged; None if the task must be built."""
    memo = read_memo(path)
    if memo is None:
        return None
    try:
        input_files = {*map(str, files), *map(str, code.files), *map(str, code.named)}
        if memo["format"] != FORMAT or memo["versions"] != _versions() or memo["cwd"] != str(Path.cwd()):
            return None
        if not input_files <= memo["files"].keys() or not all(_same(Path(f), known) for f, known in memo["files"].items()):
            return None
        if any(Path(f).exists() for f in memo["absent"]) or any(_listing(Path(f)) != d for f, d in memo["folders"].items()):
            return None
        if any(str(Path(f).resolve()) != target for f, target in memo["links"].items()):
            return None
        source = memo["source"]
        return TaskSource(
            **{
                **source,
                "metrics": tuple(source["metrics"]),
                "filters": tuple(source["filters"]),
                "lower": frozenset(source["lower"]),
            }
        )
    except (WorkbenchError, KeyError, TypeError, AttributeError, ValueError):  # the memo is damaged: build the task again
        return None


def content(files: Iterable[Path]) -> list[str]:
    """Return the sorted, unique digests of some files' bytes; names and locations do not matter."""
    return sorted({_digest(path) for path in files if path.is_file()})


def _versions() -> dict[str, str]:
    return {"python": sys.version.partition(" ")[0], **installed("lm_eval", "datasets", "jinja2", "numpy", "brick-workbench")}


def _known(path: Path) -> list[Any]:
    """Return a file's identity, unless a change may leave it as it is, and the digest of its bytes."""
    identity = identity_of(path)
    return [*(identity.storable if identity.is_telling else ()), _digest(path)]


def _same(path: Path, known: list[Any]) -> bool:
    return path.is_file() and (identity_of(path).storable == known[:-1] or _digest(path) == known[-1])


def _digest(path: Path) -> str:
    return bytes_digest(path.read_bytes())


def _listing(path: Path) -> str:
    return bytes_digest("\n".join(sorted(p.name for p in path.iterdir())).encode()) if path.is_dir() else ""
