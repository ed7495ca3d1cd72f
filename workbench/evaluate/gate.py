"""The gate for what task files can run: templates in jinja's sandbox, and functions only of code that the user trusts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment

from workbench.errors import WorkbenchError
from workbench.project import find_project
from workbench.trust import code_files, distrusted, refused, run_module, unchecked

LOCALDATA = resources.files("workbench.evaluate").joinpath("localdata.py").read_text("utf-8")
"""Code of the reader of local data that the workbench writes beside task files."""
_LM_EVAL = ("lm_eval.tasks.", "lm_eval.api.metrics.")  # functions of lm-eval that an exported task names
_PLAIN = ("builtins", "datetime", "decimal", "jinja2")
_LARGEST = 1_000_000


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


def sandbox_templates() -> None:
    """Make lm-eval render all templates of this process in the sandbox, with its own filters and settings."""
    from lm_eval import utils

    if isinstance(utils.env, Sandbox):
        return
    names = ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "undefined", "loader")
    env = Sandbox(**{name: getattr(utils.env, name) for name in names})
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
    """Return the function that a task file of a project names.

    Args:
        name: `module.function`, with the module beside the task file or importable.
        folder: Folder of the task file.
        resolve: lm-eval's own function, for importable modules.
    """
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
    for entry in config.get("metric_list") or ():
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
