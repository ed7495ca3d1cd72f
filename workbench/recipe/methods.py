"""Methods that steps can name: built-in ones, those of installed distributions, and those of a trusted project's `methods/` folder.

Built-in methods are files in the folders `merge`, `edit`, `grow`, `fuse` and `route`, and `methods.py` in their subfolders. A recipe names a
method and never code. Plug-ins are loaded only if a recipe names a method that is not built in, or if its project is trusted and has method files.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from workbench import steps
from workbench.ground.errors import InvalidRecipeError, WorkbenchError, nearest
from workbench.ground.files import bytes_digest, file_digest, json_digest
from workbench.ground.parts import missing
from workbench.ground.trust import Plugin, is_trusted, refused, run_module
from workbench.ground.yamldoc import KeyPath
from workbench.steps import Step
from workbench.steps.step import OUTSIDE, REGISTERED, VERBS


@cache
def methods() -> dict[str, type[Step]]:
    """Return all methods as "verb:name" -> class. Within a verb, methods of other tools such as `mergekit/...` come last.

    Imports every method file in the folders named after the verbs.
    """
    _import_kinds()
    for verb in VERBS:
        if not _is_here(verb):
            continue
        package = importlib.import_module(f"workbench.{verb}")
        for module in pkgutil.iter_modules(package.__path__, f"workbench.{verb}."):
            importlib.import_module(module.name)
            if module.ispkg and importlib.util.find_spec(f"{module.name}.methods"):
                importlib.import_module(f"{module.name}.methods")
    order = {verb: i for i, verb in enumerate(VERBS)}
    return dict(sorted(REGISTERED.items(), key=lambda item: (order[item[1].verb], "/" in item[0], item[0])))


def built_in(verb: str, name: str) -> type[Step] | None:
    """Return a built-in method, or None if there is none.

    Imports only the method's file if it is named after the method, because importing all of them takes longer than checking a
    recipe.

    Args:
        verb: The kind of step, such as "merge".
        name: Name of the method in recipes.

    Raises:
        InvalidRecipeError: If the methods of this kind are a part that is missing.
    """
    _import_kinds()
    module = f"workbench.{verb}.{name}"
    if verb in VERBS and not _is_here(verb):
        missing_part = missing(verb, f"a step with `{verb}`")
        raise InvalidRecipeError(missing_part.message, missing_part.hint)
    if verb in VERBS and name.isidentifier() and importlib.util.find_spec(module):
        importlib.import_module(module)
    tag = f"{verb}:{name}"
    return REGISTERED.get(tag) or methods().get(tag)


def _is_here(verb: str) -> bool:
    """Return False if the methods of a verb are a part that is missing. What Python's cache leaves of a folder has no origin."""
    found = importlib.util.find_spec(f"workbench.{verb}")
    return found is not None and found.origin is not None


def _import_kinds() -> None:
    """Import the files of `workbench/steps` that declare kinds of step with verbs of their own."""
    for module in pkgutil.iter_modules(steps.__path__):
        if module.name not in steps.MODULES:
            importlib.import_module(f"workbench.steps.{module.name}")


GROUP = "workbench.methods"
"""Entry point group of distributions; each entry names a module."""
FOLDER = "methods"
"""Folder of a project with method files, each a module of its own."""
_MODULE = "_workbench_project_method"
K = TypeVar("K", bound=Step)


@dataclass
class Plugins:
    """Methods outside this package that a project can use.

    Attributes:
        methods: Tag -> class.
        refused: Tag -> why it cannot be used: two plug-ins define it, or it is a built-in method's.
        broken: Errors of plug-ins that could not be loaded.
    """

    methods: dict[str, type[Step]] = field(default_factory=dict)
    refused: dict[str, WorkbenchError] = field(default_factory=dict)
    broken: list[WorkbenchError] = field(default_factory=list)

    def add(self, classes: Iterable[type[Step]]) -> None:
        """Add methods; refuse the names of built-in methods and of methods that are added already."""
        for cls in classes:
            existing = methods().get(cls.tag) or self.methods.get(cls.tag)
            if existing is None or existing is cls:  # several entry points may name one module
                self.methods[cls.tag] = cls
                continue
            reason = "built-in methods cannot be replaced" if existing.plugin is None else "a name can have one method"
            self.refused[cls.tag] = InvalidRecipeError(
                f"{cls.verb} method '{cls.name}' is defined in {_place(cls)} and in {_place(existing)}: {reason}",
                "Rename or remove one of them.",
            )

    @property
    def usable(self) -> list[type[Step]]:
        """Methods that steps can name."""
        return [cls for tag, cls in self.methods.items() if tag not in self.refused]

    @property
    def problems(self) -> list[WorkbenchError]:
        """Everything that keeps a plug-in from being used."""
        return [*self.broken, *self.refused.values()]


class MethodFinder:
    """Lookup of the methods that a project can use; plug-ins are loaded once, when they are first needed.

    Args:
        project: Folder of the recipe's project.
    """

    def __init__(self, project: Path) -> None:
        self.project = project

    @cached_property
    def files(self) -> list[Path]:
        """The project's method files, whether they may be loaded or not."""
        return method_files(self.project)

    @cached_property
    def trusted(self) -> bool:
        """True if the project has method files that may be loaded."""
        return bool(self.files) and is_trusted(self.project)

    @cached_property
    def own(self) -> Plugins:
        """Plug-ins of the project alone."""
        return self._with_files(Plugins())

    @cached_property
    def plugins(self) -> Plugins:
        """Plug-ins of installed distributions and of the project."""
        return self._with_files(installed_plugins())

    def find(self, verb: str, name: str) -> type[Step] | None:
        """Return a method by its name; None if there is none.

        Args:
            verb: The kind of step: "merge", "edit", "grow", "fuse" or "route".
            name: The method.

        Raises:
            WorkbenchError: If two plug-ins define the method, if one would replace a built-in method, or if there is no such
                method and a plug-in is broken or not trusted.
        """
        tag = f"{verb}:{name}"
        if cls := built_in(verb, name):
            if self.trusted and tag in self.own.refused:
                raise self.own.refused[tag]
            return cls
        if tag in self.plugins.refused:
            raise self.plugins.refused[tag]
        if tag in self.plugins.methods:
            return self.plugins.methods[tag]
        unknown = f"unknown {verb} method '{name}'"
        if self.files and not self.trusted:
            raise untrusted(unknown, self.project)
        for broken in self.plugins.broken[:1]:
            message = f"{unknown}, and a plug-in could not be loaded: {broken.message}"
            raise InvalidRecipeError(message, broken.hint) from broken
        return None

    def used(self, steps: Any) -> Iterator[tuple[KeyPath, type[Step] | WorkbenchError]]:
        """Find the methods that unvalidated steps name, and those of merges within a step.

        Yields:
            The path of the method's name, and the method or why it cannot be used. Steps without a known method are left out.
        """
        for i, step in enumerate(steps if isinstance(steps, list) else ()):
            verb = next((verb for verb in VERBS if verb in step), None) if isinstance(step, Mapping) else None
            if verb is None:
                continue
            for path, name in [((i, verb), step[verb]), *_merges_within(step, (i,))]:
                if not isinstance(name, str):
                    continue
                try:
                    cls = self.find(str(path[-1]), name)
                except WorkbenchError as error:
                    yield path, error
                    continue
                if cls is not None:
                    yield path, cls

    def _with_files(self, plugins: Plugins) -> Plugins:
        """Add the methods of the project's files if the project is trusted."""
        for file in self.files if self.trusted else ():
            try:
                plugins.add(_of_file(file, self.project))
            except WorkbenchError as error:
                plugins.broken.append(error)
        return plugins


def _merges_within(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the path and the name of every merge method below a step, such as in the slices of a stack."""
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        if isinstance(inner, Mapping) and "merge" in inner:
            yield (*path, key, "merge"), inner["merge"]
        yield from _merges_within(inner, (*path, key))


def method(kind: type[K], name: str, project: Path | None = None, saved: Path | None = None) -> type[K]:
    """Return the class of a method: built in, of an installed distribution, or of a trusted project.

    Args:
        kind: The kind of step that it has to be: `MergeMethod`, `EditMethod`, ...
        name: Its name in recipes.
        project: Folder of the project; None for built-in methods alone.
        saved: The file of an earlier run that names it; None if a recipe does.

    Raises:
        WorkbenchError: If there is no such method, or if it is a plug-in that cannot be used.
    """
    finder = MethodFinder(project) if project else None
    found = finder.find(kind.verb, name) if finder else built_in(kind.verb, name)
    if found is None or not issubclass(found, kind):
        plugins = finder.plugins.usable if finder else []
        names = {cls.name for cls in [*methods().values(), *plugins] if issubclass(cls, kind)}
        gone = f"{saved}: its method no longer exists: " if saved else ""
        raise InvalidRecipeError(
            f"{gone}unknown {kind.verb} method '{name}'. {nearest(name, names)}", "`workbench methods` lists all."
        )
    return found


def untrusted(problem: str, project: Path) -> WorkbenchError:
    """Return the error for method files that are not loaded because their project is not trusted."""
    names = ", ".join(file.name for file in method_files(project))
    return refused(f"{problem}; the project's {FOLDER}/ ({names}) is not loaded", project)


def method_files(project: Path) -> list[Path]:
    """Return the method files of a project: every .py file of its `methods/` folder whose name does not start with `_`."""
    return sorted(file for file in (project / FOLDER).glob("*.py") if not file.name.startswith("_"))


def installed_plugins() -> Plugins:
    """Load the methods of installed distributions: every module that an entry point of the group `workbench.methods` names."""
    plugins = Plugins()
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        try:
            plugins.add(_of_distribution(entry))
        except WorkbenchError as error:
            plugins.broken.append(error)
    return plugins


def _of_distribution(entry: EntryPoint) -> list[type[Step]]:
    """Load the module of an entry point, and return its methods."""
    name, version = (entry.dist.name, entry.dist.version) if entry.dist else (entry.name, "")
    source = f"{name} {version}".strip()
    methods()  # first, so that a module which imports built-in methods registers none of them itself
    try:
        with _no_new_kinds():
            module = importlib.import_module(entry.module)
    except (Exception, SystemExit) as error:
        raise WorkbenchError(
            f"distribution {source}: its methods in {entry.module} cannot be loaded: {_brief(error)}",
            f"Update it or remove it: pip uninstall {name}",
        ) from error
    classes = [cls for (where, _), cls in OUTSIDE.items() if f"{where}.".startswith(f"{module.__name__}.")]
    if not classes:
        raise WorkbenchError(
            f"distribution {source}: the module {entry.module} has no method", "A method is a class with the decorator @register."
        )
    for cls in classes:
        if "plugin" not in vars(cls):
            file = sys.modules[cls.__module__].__file__
            content = file_digest(Path(file)) if file and Path(file).is_file() else None  # None inside a zip file
            cls.plugin = Plugin(source=source, digest=json_digest([name, version, content]))
    return classes


def _of_file(file: Path, project: Path) -> list[type[Step]]:
    """Load a method file, unless its content is loaded already, and return its methods."""
    label = f"{FOLDER}/{file.name}"
    if not file.resolve().is_relative_to(project.resolve()):
        raise InvalidRecipeError(f"{label}: links to {file.resolve()}, outside the project", f"Copy the file into {FOLDER}/.")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidRecipeError(f"{label}: cannot be read: {error.strerror}", "Check the file's permissions.") from error
    digest = bytes_digest(content)
    name = f"{_MODULE}_{json_digest([str(file.resolve()), digest])}"
    if name not in sys.modules:
        methods()
        try:
            with _no_new_kinds():
                run_module(name, file, content)
        except (Exception, SystemExit) as error:
            sys.modules.pop(name, None)  # the file ran, but declared a kind of step
            for key in [key for key in OUTSIDE if key[0] == name]:
                del OUTSIDE[key]
            raise InvalidRecipeError(
                f"{label}: cannot be loaded: {_brief(error)}", "WORKBENCH_DEBUG=1 shows the traceback."
            ) from error
    classes = [cls for (where, _), cls in OUTSIDE.items() if where == name]
    if not classes:
        del sys.modules[name]
        raise InvalidRecipeError(f"{label}: has no method", "A method is a class with the decorator @register.")
    for cls in classes:
        cls.plugin = Plugin(source=label, digest=digest)
    return classes


@contextmanager
def _no_new_kinds() -> Iterator[None]:
    """Refuse code that declares a kind of step of its own, which recipes have no verb for."""
    before = set(VERBS)
    try:
        yield
        if added := set(VERBS) - before:
            raise TypeError(f"a method cannot declare a new kind of step ('{added.pop()}')")
    finally:
        VERBS[:] = [verb for verb in VERBS if verb in before]


def _place(cls: type[Step]) -> str:
    """Return where a method is defined, for people."""
    if cls.plugin is None:
        return cls.__module__.replace(".", "/") + ".py"
    return cls.plugin.source if cls.plugin.source.startswith(f"{FOLDER}/") else f"distribution {cls.plugin.source}"


def _brief(error: BaseException) -> str:
    """Return an error's type and first line, with the line of a syntax error."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}" if error.lineno else str(error.msg)
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
