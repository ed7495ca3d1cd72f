"""Fields of a recipe, its JSON schema, and the overrides of `--set`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from workbench.ground import yamldoc
from workbench.ground.errors import InvalidRecipeError, UsageError, WorkbenchError, nearest
from workbench.ground.yamldoc import Written
from workbench.recipe.fields import EvalEntry, SearchFields, SweepValues
from workbench.recipe.methods import MethodFinder, methods
from workbench.steps import VERBS, MergeMethod, Step
from workbench.steps.fields import NAME, BrickEntry, BrickRef, Strict, Whole, field_docs, parse_size
from workbench.vocabulary.fields import TokenizerFields

DType = Literal["float32", "float16", "bfloat16"]


class Output(Strict):
    """The files that `run` writes."""

    form: Literal["checkpoint", "adapter", "configuration"] = "checkpoint"
    """`checkpoint`: a Hugging Face checkpoint. `adapter`: a PEFT adapter of the base. `configuration`: a model with its memory or routed bricks, for a recipe that ends in a memory or a router."""
    rank: Whole | Literal["exact"] | None = None
    """Rank of an adapter. `exact` (the default) joins the bricks' factors without loss; a number truncates."""
    accept_error: float | None = Field(None, gt=0, le=1)
    """Largest relative error ‖Δ − adapter‖ / ‖Δ‖ of an adapter with a number as `rank`; default: 0.5."""
    dtype: DType | None = None
    """Dtype of the written tensors; default: the base's, and float32 for an adapter."""
    format: Literal["mxfp4", "fp8"] | None = Field(None, exclude_if=lambda value: value is None)
    """Format of the base, in which the weights that it packs are packed again."""
    shard_size: str = "4GB"
    """Maximum size of each file of a checkpoint."""
    config: dict[str, Any] | None = Field(None, min_length=1, exclude_if=lambda value: value is None)
    """Fields of config.json with values of their own: `{rope_theta: 1000000}`, `{rope_scaling: {rope_type: yarn, factor: 4.0,
    original_max_position_embeddings: 32768}}`. Transformers checks them, and tensors keep their shapes."""

    @field_validator("rank", mode="before")
    @classmethod
    def _check_rank(cls, value: Any) -> Any:
        if value in (None, "exact") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"expected exact or a whole number from 1, found {value!r}")

    @model_validator(mode="after")
    def _check_fields(self) -> Output:
        if self.rank is not None and self.form != "adapter":
            raise ValueError("`rank` belongs to `form: adapter`")
        if self.accept_error is not None and not isinstance(self.rank, int):
            raise ValueError("`accept_error` belongs to an adapter with a number as `rank`")
        if self.format is not None and (self.form != "checkpoint" or self.dtype is not None):
            other = "`dtype`" if self.dtype is not None else f"`form: {self.form}`"
            raise ValueError(f"`format` packs a checkpoint as its base, so it has no {other}: remove one of the two")
        if self.config is not None and self.form == "adapter":
            raise ValueError("an adapter has no config.json, so `config` belongs to another `form`")
        json.dumps(self.config, allow_nan=False)
        return self

    @field_validator("shard_size")
    @classmethod
    def _check_size(cls, value: str) -> str:
        try:
            parse_size(value)
        except WorkbenchError as error:
            raise ValueError(error.message) from None
        return value


class AdaptedBase(Strict):
    """A base that is a model with an adapter on it."""

    adapter: str = Field(min_length=1)
    """A directory or hub id of a PEFT adapter."""
    on: str = Field(min_length=1)
    """The model that the adapter belongs to: a directory or a hub id."""
    dequantize: Literal[True] | None = None
    """As in a base without an adapter."""

    def __str__(self) -> str:
        """Return the base as one text, as mergekit writes it."""
        return f"{self.on}+{self.adapter}"


class DequantizedBase(Strict):
    """A base whose weights of about 4 bits the steps change in floating point."""

    id: str = Field(min_length=1)
    """The base model: a directory or a hub id."""
    dequantize: Literal[True]
    """Says that the result is based on the rounded weights, and not on the model that they were made from."""


class RecipeFields(Strict):
    """All fields of a recipe except `steps`, which `recipe_model()` adds from the registered methods."""

    version: Literal[1]
    """Version of the recipe format; always 1."""
    name: str | None = Field(None, pattern=NAME)
    """Name of the configuration; default: the file's name."""
    description: str | None = None
    """A short description, which is copied to the README.md of the result."""
    base: Annotated[
        Annotated[str, Field(min_length=1), Tag("model")]
        | Annotated[AdaptedBase, Tag("adapted")]
        | Annotated[DequantizedBase, Tag("dequantized")],
        Discriminator(
            lambda value: (
                "model"
                if isinstance(value, str) or not isinstance(value, (Mapping, Strict))
                else "dequantized"
                if isinstance(value, DequantizedBase) or (isinstance(value, Mapping) and "id" in value)
                else "adapted"
            )
        ),
    ]
    """The base model: a directory or GGUF file, relative to the project, or a hub id with an optional @revision; {id:, dequantize: true} for weights of about 4 bits; or {adapter:, on:}, a model with an adapter on it."""
    bricks: dict[Annotated[str, Field(pattern=NAME)], BrickRef] = {}
    """Name -> location of each brick that steps can use: an adapter, a fine-tuned checkpoint, or another recipe."""
    tokenizer: TokenizerFields | None = None
    """The vocabulary of the result, for bricks whose tokenizer differs from the base's."""
    output: Output = Output()
    """The files that `run` writes."""
    eval: tuple[EvalEntry, ...] = ()
    """Evaluations that `workbench eval` runs: names of suites in `evals/suites`, lists of tasks, files of facts, or the word
    `edits` for the facts of every edit in the recipe."""
    search: SearchFields | None = None
    """Fields that `workbench search` varies, and its objective. Other commands ignore it."""
    sweep: dict[str, SweepValues] | None = Field(None, min_length=1)
    """Fields to vary: STEP.FIELD -> list of values, such as "mix.lambda", "mix.merge" or "seed". Every combination is a configuration of its own."""
    seed: int = Field(0, ge=0, strict=True)
    """Seed for all random numbers in steps and in a search."""

    @property
    def base_name(self) -> str:
        """The base as one text, for messages and records."""
        return self.base.id if isinstance(self.base, DequantizedBase) else str(self.base)


def _check_verb(value: Any, classes: tuple[type[Step], ...]) -> Any:
    """Check a step's verb and method before pydantic sees a union, for errors that a user understands."""
    if not isinstance(value, Mapping):
        return value
    written = [v for v in VERBS if v in value]
    if len(written) != 1:
        actual = " and ".join(written) if written else "neither" + (f" (fields: {', '.join(map(str, value))})" if value else "")
        raise PydanticCustomError(
            "value_error", "expected exactly one of {verbs}; found {found}", {"verbs": ", ".join(VERBS), "found": actual}
        )
    if value[written[0]] not in [cls.name for cls in classes if cls.verb == written[0]]:
        names = {cls.name: None for cls in [*methods().values(), *classes] if cls.verb == written[0]}
        text = f"unknown {written[0]} method '{value[written[0]]}'. {nearest(str(value[written[0]]), names)} `workbench methods` lists all."
        raise PydanticCustomError("value_error", "{text}", {"text": text})
    return value


def _tag(value: Any) -> str | None:
    if isinstance(value, Step):
        return value.tag
    return next((f"{verb}:{value[verb]}" for verb in VERBS if verb in value), None) if isinstance(value, Mapping) else None


@cache
def recipe_model(classes: tuple[type[Step], ...] | None = None) -> type[RecipeFields]:
    """Return the pydantic model of recipes, whose `steps` are a union discriminated by verb and method.

    Args:
        classes: Methods that steps may have; None stands for all built-in ones.
    """
    classes = tuple(methods().values()) if classes is None else classes
    check = BeforeValidator(lambda value: _check_verb(value, classes))
    if len(classes) > 1:
        tagged = [Annotated[cls, Tag(cls.tag)] for cls in classes]
        step: Any = Annotated[Union[tuple(tagged)], Discriminator(_tag), check]  # noqa: UP007
    else:
        step = Annotated[classes[0] if classes else Step, check]
    steps: Any = (tuple[step, ...], Field((), description="Steps, each on the result of the one before."))
    doc = "A recipe: base, bricks and the steps that make a configuration."
    return create_model("Recipe", __base__=RecipeFields, __module__=__name__, __doc__=doc, steps=steps)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors."""
    schema = recipe_model().model_json_schema(by_alias=True)
    kinds = {kind.__name__: kind for kind in _subclasses(Written)}
    for name, part in {**schema.get("$defs", {}), RecipeFields.__name__: schema}.items():
        docs = field_docs(kinds[name]) if name in kinds else {}
        for key, text in docs.items():
            property_schema = part["properties"].get(kinds[name].model_fields[key].alias or key)
            if property_schema is not None and text:
                property_schema["description"] = text
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _subclasses(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _subclasses(inner)


_SCHEDULE = frozenset({"knots", "first"})
"""Keys of a mapping that is a number by layer, and not the fields of a brick."""


def override(document: yamldoc.Document, settings: Sequence[str], project: Path) -> tuple[str, ...]:
    """Apply overrides of `--set`, such as "mix.density=0.3", "0.lambda=1", "output.dtype=float32" or "seed=1".

    Methods are set first, so that their fields can be set in any order. A field that the recipe's `sweep` varies is no longer varied.

    Returns:
        One sentence for each method that dropped fields.

    Raises:
        WorkbenchError: If an override is malformed or names an unknown step or field.
    """
    ids = _steps(document)
    paths = {setting: _located(document, setting, ids, lenient=True) for setting in settings}
    methods = [setting for setting, path in paths.items() if _in_step(path) and len(path) == 3 and path[2] in VERBS]
    notes = [note for setting in methods if (note := _set_method(document, setting, ids, project))]
    ids = {**_steps(document), **ids}  # a step without an id is named after its method, the old one or the new one
    for setting in settings:
        if setting not in methods:
            _set_value(document, setting, _located(document, setting, ids))
        _stop_varying(document, setting.partition("=")[0], ids)
    return tuple(notes)


def _set_method(document: yamldoc.Document, setting: str, ids: Mapping[str, int], project: Path) -> str:
    """Apply an override that sets a step's method, and return the note about what it drops; "" for nothing."""
    path = _located(document, setting, ids)
    index, verb, method = int(path[1]), str(path[2]), yamldoc.scalar(setting.partition("=")[2]).data
    step, sweep = document.data["steps"][index], document.data.get("sweep")
    if verb not in step or not isinstance(method, str):
        _set_value(document, setting, path)
        return ""
    dropped = choose_method(step, verb, method, project)
    if (kind := known_method(verb, method, project)) and isinstance(sweep, dict):
        for name in [str(name) for name in sweep]:
            head, _, rest = name.partition(".")
            field = rest.partition(".")[0]
            if ids.get(head, head) in (index, str(index)) and field not in (*VERBS, *fields_of(kind)):
                del sweep[name]
                dropped.append(f"sweep.{name}")
        if not sweep:
            del document.data["sweep"]
    return f"--set {setting} drops {', '.join(dropped)}: {method} has no such field" if dropped else ""


def choose_method(step: dict[str, object], verb: str, method: str, project: Path) -> list[str]:
    """Set the method of a step in plain data, and return the fields that it drops because the method does not have them.

    An unknown method drops nothing. A field that the old method lacks too is an error of the recipe, and stays.
    """
    old, kind = known_method(verb, str(step[verb]), project), known_method(verb, method, project)
    step[verb] = method
    if kind is None or kind is old:
        return []
    dropped = [
        field for field in step if field not in (*VERBS, "id", *fields_of(kind)) and (old is None or field in fields_of(old))
    ]
    for field in dropped:
        del step[field]
    bricks = step.get("bricks")
    if not isinstance(bricks, dict) or not issubclass(kind, MergeMethod):
        return dropped
    if not weighs(kind):
        step["bricks"] = list(bricks)
        return [*dropped, "weights of bricks"] if any(weight not in (None, 1) for weight in bricks.values()) else dropped
    known = fields_of(kind.entry_type())
    for name, entry in bricks.items():
        if isinstance(entry, dict) and not _SCHEDULE & set(entry):
            foreign = [field for field in entry if field not in known]
            bricks[name] = {field: value for field, value in entry.items() if field in known}
            dropped += [f"bricks.{name}.{field}" for field in foreign]
    return dropped


def fields_of(kind: type[Any] | None) -> set[str]:
    """Return the names of a method's fields as a recipe writes them."""
    return {field.alias or name for name, field in kind.model_fields.items()} if kind is not None else set()


def weighs(kind: type[Any]) -> bool:
    """Return True if a merge method takes a weight for each brick."""
    if not issubclass(kind, MergeMethod) or "bricks" not in kind.model_fields:
        return False
    return issubclass(kind.entry_type(), BrickEntry) and "dict" in str(kind.model_fields["bricks"].annotation)


def known_method(verb: str, method: str, project: Path) -> type[Any] | None:
    """Return a method's class; None if it cannot be used, which validation then reports with its place."""
    try:
        return MethodFinder(project).find(verb, method)
    except WorkbenchError:
        return None


def _located(document: yamldoc.Document, setting: str, ids: Mapping[str, int], lenient: bool = False) -> tuple[str | int, ...]:
    """Return the path of keys that an override names; with `lenient`, an unknown name is no error."""
    key, equals, text = setting.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UsageError(f"--set {setting}: expected FIELD=VALUE or STEP.FIELD=VALUE", "Example: --set mix.density=0.3")
    listed, fields = document.data.get("steps"), [*RecipeFields.model_fields, "steps"]
    places = [i for i, step in enumerate(listed) if isinstance(step, Mapping)] if isinstance(listed, list) else []
    if parts[0] in ids or (parts[0].isdecimal() and int(parts[0]) < len(places)):
        if len(parts) == 1:
            message = f"--set {setting}: '{key}' is a step, expected one of its fields"
            raise InvalidRecipeError(message, f"Write --set {key}.FIELD={text}.")
        return ("steps", ids[parts[0]] if parts[0] in ids else places[int(parts[0])], *parts[1:])
    if parts[0] not in fields and not lenient:
        raise UsageError(f"--set {setting}: no step or field '{parts[0]}'. {nearest(parts[0], [*ids, *fields])}")
    return tuple(parts)


def _set_value(document: yamldoc.Document, setting: str, path: tuple[str | int, ...]) -> None:
    """Set the value of an override; mappings that are missing on the way are created."""
    target, parts = (document.data["steps"][path[1]], path[2:]) if _in_step(path) else (document.data, path)
    for part in parts[:-1]:
        inner = target.setdefault(part, {})
        if part == "bricks" and isinstance(inner, list) and all(isinstance(name, str) for name in inner):
            inner = target[part] = dict.fromkeys(inner, 1.0)  # a list of names means weights of 1
        target = inner
        if not isinstance(target, dict):
            raise UsageError(f"--set {setting}: '{part}' has no fields")
    value = yamldoc.scalar(setting.partition("=")[2])
    target[parts[-1]] = value.data
    document.replace_texts(path, value)


def _in_step(path: Sequence[str | int]) -> bool:
    return len(path) > 2 and path[0] == "steps" and isinstance(path[1], int)


def _stop_varying(document: yamldoc.Document, key: str, ids: Mapping[str, int]) -> None:
    """Remove a field that `--set` gives from the fields that the recipe's `sweep` varies."""
    sweep = document.data.get("sweep")
    if not isinstance(sweep, dict):
        return

    def by_number(name: str) -> str:
        head, dot, rest = name.partition(".")
        return str(ids.get(head, head)) + dot + rest

    fixed = [name for name in sweep if by_number(str(name)) == by_number(key)]
    for name in fixed:
        del sweep[name]
    if fixed and not sweep:
        del document.data["sweep"]


def _steps(document: yamldoc.Document) -> dict[str, int]:
    """Return name -> index of the steps of an unvalidated document: the id of each, or its verb and method."""
    listed = document.data.get("steps")
    return {
        str(step.get("id") or "-".join(f"{verb}-{step[verb]}" for verb in VERBS if verb in step)): i
        for i, step in enumerate(listed if isinstance(listed, list) else ())
        if isinstance(step, Mapping)
    }
