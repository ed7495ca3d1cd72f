"""Build a local task and record the files that its code reads."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from workbench.evaluate.measured import SEED
from workbench.files import bytes_digest
from workbench.scores.task_code import Code, Reads, is_own

_UNRECORDED = (
    "socket.connect",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "ctypes.dlopen",
    "sqlite3.connect",
)
_LISTING = ("os.listdir", "os.scandir")


class _Watch:
    """Files that the task's code reads in one build, without those that lm-eval and other libraries read on their own.

    Attributes:
        code: Files of the task's code, and modules that it imports by computed names.
        events: (event, name) of files opened, folders listed, and actions whose reads cannot be recorded.
        at_import: Module -> events recorded during its import.
    """

    def __init__(self, thread: int, code: Code) -> None:
        self.thread = thread
        self.code = {str(path) for path in code.files}
        self.events: set[tuple[str, str]] = set()
        self.at_import: dict[str, set[tuple[str, str]]] = {}


_watch: _Watch | None = None
_hooked = False
# State of this process, because modules are imported once: module file -> events recorded during its import, and files of a task's
# code -> modules that they import by computed names.
_imports: dict[str, set[tuple[str, str]]] = {}
_computed: dict[frozenset[Path], set[str]] = {}
_known: dict[Path, str] = {}  # state of this process: module file -> digest of the loaded source


@contextlib.contextmanager
def watched(code: Code) -> Iterator[list[Reads]]:
    """Record reads within the block; at its end the list holds one `Reads`, including reads during import of the code."""
    global _watch, _hooked
    _forget_changed(code)
    if not _hooked:
        sys.addaudithook(_hook)  # audit hooks cannot be removed; this one does nothing outside `watched`
        _hooked = True
    watch, reads = _Watch(threading.get_ident(), code), list[Reads]()
    outer, _watch = _watch, watch
    try:
        yield reads
    finally:
        _watch = outer
        for module, recorded in watch.at_import.items():
            _imports.setdefault(module, set()).update(recorded)
        computed = _computed.setdefault(code.files, set())
        computed |= {file for file in watch.code if Path(file) not in code.files}
        files = {*map(str, code.files), *computed}
        events = watch.events.union({("open", file) for file in computed}, *(_imports.get(file, ()) for file in files))
        user_files = {path for path in (_source(Path(name)) for event, name in events if event == "open") if is_own(path)}
        listed = {_source(Path(name)) for event, name in events if event in _LISTING}
        reads.append(
            Reads(
                frozenset(p for p in user_files if p.is_file()),
                frozenset(p for p in user_files if not p.exists()),
                frozenset(p for p in listed if is_own(p)),
                frozenset(event for event, _ in events if event not in ("open", *_LISTING)),
            )
        )


def _hook(event: str, args: tuple[Any, ...]) -> None:
    """Record an audit event if the task's code caused it."""
    watch = _watch
    if watch is None or threading.get_ident() != watch.thread:
        return
    if event not in ("open", *_LISTING, *_UNRECORDED):
        return
    frames = list(_frames())
    if not any(file in watch.code for file, _ in frames):
        return
    if event == "open":
        path, mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else any(c in str(mode) for c in "wax+")
        if writes or not isinstance(path, (str, bytes, os.PathLike)):
            return
        name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100  a hook must not open, list or resolve anything
        if name.endswith((".py", ".pyc")):
            watch.code.add(str(_source(Path(name))))
    elif event in _LISTING and isinstance(args[0], int):
        event, name = f"{event} of a descriptor", ""
    elif event in _LISTING:
        name = os.getcwd() if args[0] is None else os.path.abspath(os.fsdecode(args[0]))  # noqa: PTH100, PTH109
    else:
        name = ""
    watch.events.add((event, name))
    for file, function in frames:
        if function == "<module>" and file in watch.code:
            watch.at_import.setdefault(file, set()).add((event, name))


def _frames() -> Iterator[tuple[str, str]]:
    """Yield (file, function) of the call stack, innermost first."""
    frame: FrameType | None = sys._getframe(2)  # 0 is this generator, 1 the hook
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back


def _source(path: Path) -> Path:
    """Return the source file of a compiled one, with links resolved."""
    if path.suffix == ".pyc":
        with contextlib.suppress(ValueError):
            path = Path(importlib.util.source_from_cache(str(path)))
    return path.resolve()


def _forget_changed(code: Code) -> None:
    """Remove modules from `sys.modules` if a file of the task's code differs from what this process has loaded.

    Compiled files are deleted: Python accepts one if size and time (in whole seconds) of the source are equal, whatever its
    content.
    """
    digests = {path: bytes_digest(path.read_bytes()) for path in code.files if path.is_file()}
    for path in filter(is_own, digests):
        with contextlib.suppress(OSError):
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
    if any(_known.get(path, digest) != digest for path, digest in digests.items()):
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name != "__main__" and isinstance(file, str) and Path(file).resolve() in digests:
                del sys.modules[name]
                _imports.pop(file, None)
    _known.update(digests)


def yielded(task: Any) -> list[Any]:
    """Return the prompt, target and choices of each document of a task, and of its pool of examples."""
    shots = task.fewshot_docs() if task.config.num_fewshot else ()
    return [
        [_document_content(task, doc, None) for doc in task.eval_docs],
        [_document_content(task, doc, task.fewshot_cfg) for doc in shots or ()],
    ]


def _document_content(task: Any, doc: Any, shot: Any) -> list[Any]:
    """Return the content of one document.

    If a template fails, its error takes the place of the text; building the requests reports it.
    """
    text, target, choices = (shot.doc_to_text, shot.doc_to_target, shot.doc_to_choice) if shot else (None, None, None)
    content: list[Any] = [doc]
    has_choices = task.config.doc_to_choice is not None or choices is not None
    functions = [
        (task.doc_to_text, text),
        (task.doc_to_target, target),
        *([(task.doc_to_choice, choices)] if has_choices else []),
    ]
    for function, argument in functions:
        try:
            content.append(function(doc, argument) if argument is not None else function(doc))
        except Exception as error:  # noqa: BLE001  code of a task may raise anything
            content.append(f"{type(error).__name__}: {error}")
    return content


def score_first(task: Any) -> None:
    """Score the gold answer of the first document, so that reads of filters and metrics are recorded."""
    from workbench.evaluate.gold import _gold, _response, metrics_of

    with contextlib.suppress(Exception):  # reported by `suite check`, or when the task is scored
        task.set_fewshot_seed(seed=SEED)
        task.build_all_requests(samples=[0], rank=0, world_size=1)
        gold = _gold(task, task.instances[0].doc)
        for instance in task.instances:
            instance.resps = [_response(task, instance, gold)] * max(1, instance.repeats or 1)
        task.apply_filters()
        list(metrics_of(task, task.instances))
