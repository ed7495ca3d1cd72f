"""Import of mergekit files: translate one to a recipe with the same numbers, or list the fields that cannot be translated."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench import yamldoc
from workbench.bricks.locate import kinds_of
from workbench.errors import WorkbenchError, shell
from workbench.merge.mergekit.api import base_policy
from workbench.merge.mergekit.table import KNOWN
from workbench.models.layout import Model
from workbench.project import find_project
from workbench.recipe.mergekit.config import Config, Reference, read_config
from workbench.recipe.mergekit.methods import MethodInputs, step_of
from workbench.recipe.mergekit.mixtures import Make, is_mixture, read_mixture
from workbench.recipe.mergekit.stacks import is_stack, read_stack
from workbench.recipe.mergekit.text import comment, recipe_text
from workbench.recipe.mergekit.vocabulary import carry_vocabulary
from workbench.recipe.recipe import from_data
from workbench.weights.checkpoint import Checkpoint

_WRITABLE = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ImportedRecipe:
    """Result of an import.

    Attributes:
        text: Text of the recipe.
        extra: File -> text of other recipes that it uses as bricks.
        notes: Differences that the reader should know; the recipe has them as comments.
    """

    text: str
    extra: dict[Path, str]
    notes: list[str]


def import_recipe(file: Path, to: Path | None = None) -> ImportedRecipe:
    """Translate a mergekit file to a recipe, without writing it.

    Args:
        file: A YAML file for `mergekit-yaml` or `mergekit-moe`.
        to: The recipe file to write later. Its paths start at the project of this file; None stands for the project of the
            working directory.

    Raises:
        WorkbenchError: If fields cannot be translated; the message lists all of them with their lines.
    """
    document = yamldoc.load(file)
    stack: dict[str, Any] | None = None
    make: Make | None = None
    if is_stack(document.data):
        config, stack = read_stack(document)
    elif is_mixture(document.data):
        config, make = read_mixture(document)
    else:
        config = read_config(document)
    places = _Places(config, file, find_project(to or Path.cwd() / "recipe.yaml"), to)
    base, base_path = places.base()
    model = _model(base_path)
    _check_layers(config, model)
    inputs = None if stack or make else _inputs(config, places, base, model)
    dtype = _dtype(config)
    tokenizer = carry_vocabulary(config, {str(r): places.find(r.model) for r in _all_references(config)}, places.names, base)
    config.report.stop()
    step = step_of(inputs) if inputs else make(places.name) if make else stack or {}
    config.report.stop()
    used = {name: places.brick(name) for name in step.get("bricks", ())}
    data: dict[str, Any] = {"version": 1, "base": places.recipe_reference(base), **({"bricks": used} if used else {})}
    data |= {**tokenizer, "steps": [step], **({"output": {"dtype": dtype}} if dtype else {})}
    head = [f"# workbench run {shell(to or 'RECIPE.yaml')}", f"# Imported from {file.name}, mergekit's {config.method}."]
    text = recipe_text(data, [*head, *map(comment, config.report.notes)])
    for written in (text, *places.extra.values()):
        from_data(yamldoc.parse(written).data, places.project)
    return ImportedRecipe(text, places.extra, config.report.notes)


def write_imported(imported: ImportedRecipe, to: Path) -> None:
    """Write an imported recipe and the other recipes that it uses.

    Raises:
        WorkbenchError: If one of the files exists. Nothing is overwritten.
    """
    files = {to: imported.text, **imported.extra}
    for path in files:
        if path.exists():
            raise WorkbenchError(f"{path} already exists", "Choose another name. Existing files are not overwritten.")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


@dataclass
class _Places:
    """Locations of models. Paths of mergekit start at the working directory, paths of a recipe at its project."""

    config: Config
    file: Path
    project: Path
    to: Path | None
    names: dict[str, str] = field(default_factory=dict)
    """Reference -> brick name."""
    extra: dict[Path, str] = field(default_factory=dict)
    _references: dict[str, Reference] = field(default_factory=dict)

    def base(self) -> tuple[str, Path | None]:
        """Return the base as the file names it, and its directory if it is local."""
        base = self.config.base
        if base is not None and base.lora:
            self.config.report.refuse(
                ("base_model",),
                f"{base}: a recipe's base must be one checkpoint; bake the adapter into it with `workbench brick bake`",
            )
        if base is None:
            if not self.config.sources:
                raise self.config.report.document.error((), "names no model to start from", "Name a model, or a base_model.")
            base = self.config.sources[0].reference
            self.config.report.note((), f"no base_model: configuration and tokenizer come from the first input, {base.model}")
        return base.model, self.find(base.model)

    def find(self, name: str) -> Path | None:
        """Return a model's local directory: relative to the working directory as in mergekit, else next to the YAML file."""
        path = Path(name).expanduser()
        for start in (Path.cwd(), self.file.resolve().parent):
            if (start / path).is_dir():
                return Path(os.path.normpath(start / path))
        return None

    def recipe_reference(self, name: str) -> str:
        """Return a model's reference for the recipe: a path relative to the project, an absolute path, or a hub id."""
        directory = self.find(name)
        if directory is None:
            return name
        project = Path(os.path.normpath(self.project))
        return directory.relative_to(project).as_posix() if directory.is_relative_to(project) else str(directory)

    def name(self, reference: Reference) -> str:
        """Return the brick name of a model: the last part of its path, made unique in the recipe."""
        key = str(reference)
        if key not in self.names:
            last = Path((reference.lora or reference.model).partition("@")[0]).name.lower()
            default_name = re.sub(r"[^a-z0-9._-]+", "-", last).strip("._-") or "model"
            used, number, name = set(self.names.values()), 1, default_name
            while name in used:
                number += 1
                name = f"{default_name}-{number}"
            self.names[key] = name
            self._references[name] = reference
        return self.names[key]

    def brick(self, name: str) -> Any:
        """Return the brick's reference for the recipe."""
        reference = self._references[name]
        if not reference.lora:
            return self.recipe_reference(reference.model)
        base, _ = self.base()
        if reference.model == base:
            return {"adapter": self.recipe_reference(reference.lora)}
        return {"recipe": self._nested(name, reference)}

    def _nested(self, name: str, reference: Reference) -> str:
        """Add a recipe that sums a model's delta and the delta of an adapter on it; return the path of its file."""
        assert self.to is not None
        assert reference.lora is not None
        path = self.to.with_name(f"{self.to.stem}-{name}.yaml")
        base, _ = self.base()
        tuned = "model" if name != "model" else "tuned"
        data = {
            "version": 1,
            "base": self.recipe_reference(base),
            "bricks": {tuned: self.recipe_reference(reference.model), name: {"adapter": self.recipe_reference(reference.lora)}},
            "steps": [{"merge": "task_arithmetic", "bricks": {tuned: 1.0, name: 1.0}}],
        }
        self.extra[path] = recipe_text(
            data, [f"# workbench run {shell(path)}", f"# {reference.model} with its adapter, an input of {self.to.name}."]
        )
        place = Path(os.path.normpath(Path.cwd() / path))
        project = Path(os.path.normpath(self.project))
        return place.relative_to(project).as_posix() if place.is_relative_to(project) else str(place)


def _all_references(config: Config) -> Iterable[Reference]:
    """Return all models of a configuration, each once."""
    return dict.fromkeys([*([config.base] if config.base else []), *(s.reference for s in config.sources)])


def _inputs(config: Config, places: _Places, base: str, model: Model | None) -> MethodInputs:
    """Return the inputs that become bricks. Report inputs that the method cannot use."""
    policy = base_policy(config.method)
    report = config.report
    if policy == "required" and config.base is None:
        report.refuse(("merge_method",), f"{config.method} needs a base_model; mergekit rejects this too")
    if policy != "ignored" and config.base and config.base not in [s.reference for s in config.sources]:
        report.refuse(("base_model",), f"{config.base} is not among the sources; mergekit rejects this too")
    if policy == "ignored" and config.sources[-1].path == ("base_model",):
        report.note(("base_model",), f"mergekit adds it to the models that {config.method} merges, so it is one of the bricks")
    sources = [s for s in config.sources if policy == "ignored" or s.reference != config.base]
    least, most = KNOWN[config.method].laws.arity
    if not least <= len(sources) <= (most or len(sources)):
        expected = f"exactly {least}" if least == most else f"at least {least}"
        suffix = " beside the base" if policy != "ignored" else ""
        report.refuse(
            ("merge_method",),
            f"{config.method} takes {expected} model{'s' if (most or 2) > 1 else ''}{suffix}, found {len(sources)}",
        )
    for source in sources:
        reference = source.reference
        if reference.lora and reference.model != base and places.to is None:
            report.refuse(
                source.path,
                f"{reference} is an adapter on a model other than the base, which needs a second recipe: name the output file with -o",
            )
        directory = places.find(reference.model)
        if directory and "adapter" in kinds_of(directory):
            report.refuse(source.path, f"{reference.model} is an adapter; mergekit reads it as BASE+{reference.model}")
        if directory is None and (reference.model.startswith(("/", ".", "~")) or "/" not in reference.model):
            report.note(
                source.path,
                f"{reference.model} does not exist, neither in the working directory, where mergekit looks, nor next to the file",
            )
    report.stop()
    bricks = {places.name(source.reference): source for source in sources}
    return MethodInputs(config, bricks, places.name(Reference(base)), model)


def _model(path: Path | None) -> Model | None:
    """Return the base from its headers; None if it cannot be read."""
    if path is None:
        return None
    try:
        checkpoint = Checkpoint(path, "base")
        model = Model(checkpoint, checkpoint.config)
        _ = model.layout
    except WorkbenchError:
        return None
    return model


def _check_layers(config: Config, model: Model | None) -> None:
    """Report a slice that does not cover all layers of the base."""
    if config.layers is None:
        return
    if model is None:
        config.report.note((), f"one slice over layers 0 to {config.layers} is taken as the whole model")
    elif model.layout.depth != config.layers:
        config.report.refuse(
            ("slices",),
            f"layer_range ends at {config.layers}, but the base has {model.layout.depth} layers, and a merge step keeps all of them. "
            "`passthrough` with slices removes layers",
        )


def _dtype(config: Config) -> str | None:
    """Return the dtype of the output: `out_dtype`, else `dtype`, in which mergekit also computes."""
    report = config.report
    work, out = (config.data.get(name) for name in ("dtype", "out_dtype"))
    for name, value in (("dtype", work), ("out_dtype", out)):
        if value is not None and value not in (*_WRITABLE, "float64"):
            report.refuse((name,), f"found {value!r}; expected one of {', '.join(_WRITABLE)}")
    if (out or work) == "float64":
        report.refuse(("out_dtype" if out else "dtype",), "float64 outputs are not supported, expected " + ", ".join(_WRITABLE))
    if work in ("float16", "bfloat16") or work is None:
        report.note(
            ("dtype",) if work else (),
            f"mergekit computes in {work or 'the dtype of the inputs'}, the recipe in float32, rounded once at the end",
        )
    elif work == "float64":
        report.note(("dtype",), "mergekit computes in float64, the recipe in float32")
    return out or work
