"""The gate for what task files can run, and a record of the files that their code reads while a local task is built."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

from workbench.evaluate.measured import SEED
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import bytes_digest
from workbench.ground.project import find_project
from workbench.ground.trust import code_files, distrusted, refused, run_module, unchecked
from workbench.scores.task_code import Code, Reads, is_own

LOCALDATA = resources.files("workbench.evaluate").joinpath("localdata.py").read_text("utf-8")
"""Code of the reader of local data that the workbench writes beside task files."""
_LM_EVAL = ("lm_eval.tasks.", "lm_eval.api.metrics.")  # functions of lm-eval that an exported task names
_PLAIN = ("builtins", "datetime", "decimal", "jinja2")
_LARGEST = 1_000_000


@cache
def sandbox() -> type[Any]:
    """Return the class of the sandbox; jinja is imported only where templates are rendered."""
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import SandboxedEnvironment

    class Sandbox(SandboxedEnvironment):
        """jinja's sandbox with two more limits: methods of plain values alone (images can write files), and no huge products."""

        intercepted_binops = frozenset(("*", "**"))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            """Return whether a template may read an attribute."""
            return type(obj).__module__.partition(".")[0] in _PLAIN and super().is_safe_attribute(obj, attr, value)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Return a product or a power, unless it is huge."""
            sizes = [
                value.bit_length() if isinstance(value, int) else len(value) if hasattr(value, "__len__") else 0
                for value in (left, right)
            ]
            counts = [value for value in (left, right) if isinstance(value, int)]
            if operator == "**" or len(counts) == 2:
                size = sizes[0] * abs(right) if operator == "**" and isinstance(right, int) else sum(sizes)
            else:
                size = max(sizes) * counts[0] if counts else 0
            if size > _LARGEST:
                raise SecurityError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    return Sandbox


def sandbox_templates() -> None:
    """Make lm-eval render all templates of this process in the sandbox, with its own filters and settings."""
    from lm_eval import utils

    if isinstance(utils.env, sandbox()):
        return
    names = ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "undefined", "loader")
    env = sandbox()(**{name: getattr(utils.env, name) for name in names})
    env.filters |= utils.env.filters
    utils.env = env


@contextmanager
def functions_checked() -> Iterator[None]:
    """Let lm-eval resolve the `!function` fields of task files only to code that may run, within the block.

    The code that a task file names is checked where lm-eval turns the name into a function, so that includes, groups and overridden
    tasks are checked, too. lm-eval's own task files are trusted as the installed package is.
    """
    from lm_eval.tasks import _factory, _yaml_loader

    resolve, load = _yaml_loader._import_func_in_yml, _factory.load_yaml

    def resolved(name: str, folder: Path) -> Any:
        return resolve(name, folder) if _is_bundled(folder) else _function(name, folder, resolve)

    def loaded(path: Any, **options: Any) -> Any:
        config = load(path, **options)
        if not _is_bundled(Path(path)):
            _check_settings(Path(path), config)
        return config

    _yaml_loader._import_func_in_yml, _factory.load_yaml = resolved, loaded
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml, _factory.load_yaml = resolve, load


def project_of(file: Path) -> Path:
    """Return the project that a task file or its code belongs to."""
    project = find_project(file)
    evals = next((folder for folder in file.resolve().parents if folder.name == "evals"), None)
    return evals.parent if project == file.resolve().parent and evals else project


def _function(name: str, folder: Path, resolve: Callable[[str, Path], Any]) -> Any:
    """Return the function that a task file of a project names."""
    module, _, attribute = name.rpartition(".")
    file = (folder / f"{module.replace('.', '/')}.py").resolve()
    if not file.exists() or not module:
        if not name.startswith(_LM_EVAL) and not unchecked():
            raise refused(f"{folder}: the function {name} does not run", folder, "its module is no file of the project")
        return resolve(name, folder)
    content = file.read_bytes()
    project = project_of(folder / "task.yaml")
    if content not in _shipped() and not unchecked():
        if distrusted(project):
            raise refused(f"{file}, which a task names, does not run", project)
        if file not in {own.resolve() for own in code_files(project).values()}:
            raise refused(f"{file}, which a task names, does not run", project, "it is outside the project's methods/ and evals/")
    known = sys.modules.get(str(file.with_suffix("")))
    if known is None or getattr(known, "__content__", None) != content:
        known = run_module(str(file.with_suffix("")), file, content)
        known.__content__ = content  # type: ignore[attr-defined]
    try:
        return getattr(known, attribute)
    except AttributeError:
        raise WorkbenchError(f"{file}: has no function '{attribute}', which a task names", "Correct the task file.") from None


def _check_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse settings of a project's task file that run code without naming a file of the project."""
    from lm_eval.api.registry import metric_registry

    if unchecked():
        return
    for field in ("custom_dataset", "class"):  # they are called with the task file's own arguments
        if callable(config.get(field)) and str(config[field].__module__).startswith("lm_eval."):
            raise refused(f"{path}: `{field}` does not run", path.parent, "it calls lm-eval with arguments of the task file")
    if not config.get("process_results", True):
        raise refused(f"{path}: `process_results` is not removed", path.parent, "lm-eval then loads a task's metrics by name")
    for entry in () if "process_results" in config else config.get("metric_list") or ():  # it computes them: lm-eval loads none
        metric = entry.get("metric") if isinstance(entry, Mapping) else None
        if isinstance(metric, str) and (entry.get("hf_evaluate") or metric not in metric_registry):
            raise refused(f"{path}: the metric {metric} does not run", path.parent, "it is a script that `evaluate` loads")
    if config.get("dataset_path") == "pandas":
        raise refused(f"{path}: the data are not read", path.parent, "`pandas` reads pickle files, which run code")


def _is_bundled(path: Path) -> bool:
    """Return whether a file belongs to the installed lm_eval."""
    import lm_eval

    return path.resolve().is_relative_to(Path(str(lm_eval.__file__)).resolve().parent)


@cache
def _shipped() -> frozenset[bytes]:
    """Return the code that the workbench itself writes beside task files."""
    scores = resources.files("workbench.evaluate.facts").joinpath("factscores.py").read_bytes()
    return frozenset((LOCALDATA.encode(), scores))


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
        named = {Path(name) for event, name in events if name and (event == "open" or event in _LISTING)}
        reads.append(
            Reads(
                frozenset(p for p in user_files if p.is_file()),
                frozenset(p for p in user_files if not p.exists()),
                frozenset(p for p in listed if is_own(p)),
                frozenset(event for event, _ in events if event not in ("open", *_LISTING)),
                frozenset(path for path in named if path.resolve() != path and is_own(path.resolve())),
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
    from workbench.evaluate.gold import gold_answer, gold_response, metrics_of

    with contextlib.suppress(Exception):  # reported by `suite check`, or when the task is scored
        task.set_fewshot_seed(seed=SEED)
        task.build_all_requests(samples=[0], rank=0, world_size=1)
        gold = gold_answer(task, task.instances[0].doc)
        for instance in task.instances:
            instance.resps = [gold_response(task, instance, gold)] * max(1, instance.repeats or 1)
        task.apply_filters()
        list(metrics_of(task, task.instances))
