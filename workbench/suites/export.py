"""Export lm-eval tasks with their documents as local files that need no hub; the requests are compared one by one."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from workbench.evaluate.gate import LOCALDATA, project_of
from workbench.evaluate.measured import SEED, quiet
from workbench.evaluate.tasks import load_task, manager_of
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import write_bytes
from workbench.ground.identity import installed
from workbench.ground.trust import is_trusted, trusting
from workbench.scores.plan import item_ids

# Settings that describe the source of documents. They are replaced, because the documents are stored as the task's code returns them.
_SOURCE_SETTINGS = {
    "task",
    "task_alias",
    "tag",
    "custom_dataset",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "training_split",
    "validation_split",
    "test_split",
    "fewshot_split",
    "process_docs",
    "fewshot_config",
    "num_fewshot",
    "metadata",
}
_FEWSHOT_SETTINGS = (
    "sampler",
    "fewshot_indices",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "gen_prefix",
    "fewshot_delimiter",
    "target_delimiter",
)


@dataclass(frozen=True)
class Exported:
    """Files that an export has written.

    Attributes:
        files: Their paths.
        documents: Number of documents.
        requests: Number of requests.
        shots: Number of documents in the pool of few-shot examples.
        clusters: Whether all documents have a field `cluster`.
    """

    files: tuple[Path, ...]
    documents: int
    requests: int
    shots: int
    clusters: bool


class _FunctionTag(str):
    """Dotted name of a function."""


class _TaskDumper(yaml.SafeDumper):
    """YAML dumper for lm-eval tasks, with `!function` for functions."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_TaskDumper.add_representer(_FunctionTag, lambda dumper, data: dumper.represent_scalar("!function", str(data)))


def export_task(name: str, to: Path, *, include_path: Path | None = None, num_fewshot: int | None = None) -> Exported:
    """Write a task's documents, and a definition that builds the same requests from them.

    Args:
        name: Name of the task.
        to: Folder of task files: NAME.yaml, data/NAME.jsonl, data/NAME-fewshot.jsonl if prompts have examples, and localdata.py.
        include_path: Folder with task definitions besides lm-eval's own. Default: `evals/tasks`.
        num_fewshot: Number of examples before each prompt. Default: the task's own number.

    Raises:
        WorkbenchError: If the task is unknown, its data cannot be loaded or is not JSON, it uses functions that only its own
            folder has, a file already exists with other content, or the requests differ.
    """
    stem = name.replace("/", "_")
    with quiet():
        try:
            original = _load(name, include_path)
        except WorkbenchError as error:
            if not isinstance(error.__cause__, OSError):  # datasets raises it if the hub or a file cannot be reached
                raise
            first = (error.hint or "Check that the data can be reached").partition(", or copy the task")[0].rstrip(".")
            hint = f"{first}, or export the task on a machine that can load its data, and copy {to} here."
            raise WorkbenchError(error.message, hint) from error
        shots = int(original.config.num_fewshot or 0) if num_fewshot is None else num_fewshot
        original.set_config(key="num_fewshot", value=shots)
        docs = [dict(doc) for doc in original.eval_docs]
        docs_with_ids = _with_ids(docs, name)
        pool = [dict(doc) for doc in original.fewshot_docs() or ()] if shots else []
        same_split = original.fewshot_cfg.split is not None and original.fewshot_cfg.split == original.config.test_split
        own_pool = pool if pool and not same_split else []
        config = _config(original, name, stem, shots, "test" if shots and same_split else "fewshot" if own_pool else None)
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            _write(folder, stem, config, docs_with_ids, own_pool, to / "localdata.py", name)
            with trusting(is_trusted(project_of(to / "localdata.py"))):  # the folder holds a copy of its localdata.py
                local = load_task(manager_of(folder, bundled=False), name, [name])
            local.set_config(key="num_fewshot", value=shots)
            count = _compare(original, local, name)
            files = _move(folder, to)
    return Exported(tuple(files), len(docs), count, len(own_pool), all("cluster" in doc for doc in docs))


def _load(name: str, include_path: Path | None) -> Any:
    """Return the task from the given folder, else from lm-eval's own tasks."""
    if include_path is not None and not include_path.is_dir():
        raise WorkbenchError(
            f"--include-path {include_path}: the folder does not exist", "Give the folder that contains the task's YAML file."
        )
    folder = include_path or Path("evals") / "tasks"
    if folder.is_dir():
        manager = manager_of(folder, bundled=False)
        if name in manager.all_tasks:
            return load_task(manager, name, manager.all_tasks)
    manager = manager_of(folder, bundled=True)
    return load_task(manager, name, [])


def _with_ids(docs: Sequence[Mapping[str, object]], name: str) -> list[dict[str, object]]:
    """Return the documents with unique IDs: their own, or hashes of their content."""
    ids = [doc.get("id") for doc in docs]
    if None not in ids and max(Counter(map(str, ids)).values()) == 1:
        return [dict(doc) for doc in docs]
    contents = [{k: v for k, v in doc.items() if k != "id"} for doc in docs]
    hashes = item_ids(contents, name, bundled=True)
    return [{"id": identity, **content} for identity, content in zip(hashes, contents, strict=True)]


def _config(task: Any, name: str, stem: str, shots: int, fewshot_split: str | None) -> dict[str, object]:
    """Return the local definition: the task's settings with local documents."""
    config = task.config
    if config.use_prompt is not None:
        raise WorkbenchError(
            f"task '{name}': use_prompt cannot be stored in local files", "Only tasks without it can be exported."
        )
    data = {"test": f"data/{stem}.jsonl", **({"fewshot": f"data/{stem}-fewshot.jsonl"} if fewshot_split == "fewshot" else {})}
    definition: dict[str, object] = {
        "task": name,
        "custom_dataset": _FunctionTag("localdata.jsonl"),
        "dataset_kwargs": {"data_files": data},
        "test_split": "test",
    }
    # A task without a pool must not request examples: lm-eval would take them from the test documents.
    definition |= {"fewshot_split": fewshot_split} if fewshot_split else {}
    definition["num_fewshot"] = shots
    defaults = {f.name: f.default for f in fields(config)}
    for key in defaults:
        value = getattr(config, key)
        if (
            key not in _SOURCE_SETTINGS
            and value is not None
            and (value != defaults[key] or key in ("output_type", "target_delimiter"))
        ):
            definition[key] = _storable(value, name, key)
    examples = {
        key: _storable(value, name, f"fewshot_config.{key}")
        for key in _FEWSHOT_SETTINGS
        if fewshot_split
        and (value := getattr(task.fewshot_cfg, key, None)) is not None
        and value != getattr(config, key, "default" if key == "sampler" else None)
    }
    if examples:
        definition["fewshot_config"] = examples
    version = (config.metadata or {}).get("version")
    return {**definition, "metadata": {"version": version if isinstance(version, (int, float, str)) else 0}}


def _storable(value: Any, task: str, key: str) -> Any:
    """Return a setting as YAML can store it."""
    if isinstance(value, Mapping):
        return {k: _storable(v, task, key) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(v, task, key) for v in value]
    if not callable(value):
        return value
    module, function = str(getattr(value, "__module__", "")), str(getattr(value, "__qualname__", ""))
    if not (function.isidentifier() and all(part.isidentifier() for part in module.split(".")) and _installed(module)):
        raise WorkbenchError(
            f"task '{task}': {key} is the function {Path(module).name}.{function}, which no installed package has",
            "Move it into an installed package, or copy the task's folder with its code: only importable functions can be exported.",
        )
    return _FunctionTag(f"{module}.{function}")


def _installed(module: str) -> bool:
    """Return whether a module is importable from anywhere, not only from the working directory or beside a task's file."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    if spec is None or spec.origin is None:
        return False
    working_directory = Path.cwd().resolve()
    roots = [Path(p).resolve() for p in sys.path if p and Path(p).resolve() != working_directory]
    return any(
        Path(spec.origin).resolve() == (root / (module.replace(".", "/") + end)).resolve()
        for root in roots
        for end in (".py", "/__init__.py")
    )


def _write(
    folder: Path,
    stem: str,
    config: Mapping[str, object],
    docs: Iterable[Mapping[str, object]],
    pool: Sequence[Mapping[str, object]],
    localdata: Path,
    name: str,
) -> None:
    """Write definition, documents, examples and code of an exported task."""
    (folder / "data").mkdir()
    _write_lines(folder / "data" / f"{stem}.jsonl", docs, name)
    if pool:
        _write_lines(folder / "data" / f"{stem}-fewshot.jsonl", pool, name)
    head = f"# Written by `workbench scores export {name}` from lm-eval {installed('lm_eval')['lm_eval']}'s task of that name.\n"
    text = yaml.dump(dict(config), Dumper=_TaskDumper, sort_keys=False, allow_unicode=True, width=140)
    (folder / f"{stem}.yaml").write_text(head + text, "utf-8")
    if localdata.is_file():
        shutil.copyfile(localdata, folder / "localdata.py")
    else:
        (folder / "localdata.py").write_text(LOCALDATA, "utf-8")


def _write_lines(path: Path, docs: Iterable[Mapping[str, object]], name: str) -> None:
    """Write JSON lines. Line separators within texts are escaped, because readers may split lines at them."""
    try:
        lines = [json.dumps(doc) for doc in docs]
    except TypeError as error:
        raise WorkbenchError(
            f"task '{name}': its documents contain values that are not JSON ({error})", "Only text tasks can be exported."
        ) from None
    path.write_text("".join(line + "\n" for line in lines), "utf-8")


def _compare(original: Any, local: Any, name: str) -> int:
    """Compare the requests of both tasks and return their number."""
    pairs = (
        ("metrics", sorted(original.aggregation()), sorted(local.aggregation())),
        ("filters", [f.name for f in original._filters], [f.name for f in local._filters]),
    )
    built = []
    for task in (original, local):
        task.set_fewshot_seed(seed=SEED)
        task.build_all_requests()
        built.append([(i.doc_id, i.idx, i.request_type, i.args, i.repeats, task.doc_to_target(i.doc)) for i in task.instances])
    difference: tuple[str, Any, Any] | None = next(((what, a, b) for what, a, b in pairs if a != b), None)
    difference = difference or next((("a request", a, b) for a, b in zip(*built, strict=False) if a != b), None)
    if difference is None and len(built[0]) != len(built[1]):
        difference = ("the number of requests", len(built[0]), len(built[1]))
    if difference:
        what, expected, actual = difference
        raise WorkbenchError(
            f"task '{name}': {what} of the local files differs: {str(actual)[:200]}, expected {str(expected)[:200]}",
            "Nothing was written. The task's code depends on more than its documents; use the task's own folder instead.",
        )
    return len(built[0])


def _move(folder: Path, to: Path) -> list[Path]:
    """Write the files to their folder. Equal ones, of an interrupted export, and localdata.py may be there already; others are refused."""
    sources = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    contents = {to / source.relative_to(folder): source.read_bytes() for source in sources}
    if (to / "localdata.py").exists():
        del contents[to / "localdata.py"]
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise WorkbenchError(
                f"{path} already exists, with other content",
                "Remove the file, or export to another folder with -o: existing files are not overwritten.",
            )
    for path, content in contents.items():
        write_bytes(path, content)
    return list(contents)
