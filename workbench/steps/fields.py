"""Types of recipe fields: references to bricks, sets of tensors, and values that vary with depth."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from workbench.ground.errors import WorkbenchError
from workbench.ground.results import absent
from workbench.ground.yamldoc import Written
from workbench.models.layout import Model

NAME = r"^[a-z0-9][a-z0-9._-]*$"


class Strict(Written):
    """Base class of everything that users write: unknown fields are errors, instances are immutable."""

    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True, validate_default=True)


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """Return the text of each field: the docstring below it in the source of the class or of a base class.

    The source is parsed only when a schema or a page is written. Pydantic's `use_attribute_docstrings` would parse it at every
    start, which takes half a second.
    """
    texts: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if issubclass(cls, BaseModel) and not cls.__module__.startswith("pydantic"):
            texts |= _own_docs(cls)
    return {name: texts.get(name) or field.description or "" for name, field in model.model_fields.items()}


@cache
def _own_docs(cls: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings below the fields in the source of a class, without those of its base classes."""
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, ValueError):
        return {}  # a class made by `create_model` has no source; its fields carry descriptions
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for line, text in pairwise(body.body):
        doc = text.value if isinstance(text, ast.Expr) else None
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(doc, ast.Constant):
            texts[line.target.id] = inspect.cleandoc(str(doc.value))
    return texts


Real = Annotated[float, Field(strict=True)]
"""A number. Strict, because pydantic otherwise also accepts yes and "1"."""
Whole = Annotated[int, Field(strict=True)]
"""An integer. Strict, because pydantic otherwise also accepts yes, 2.0 and "2"."""


class Where(Strict):
    """A set of tensors, selected by name and by layer."""

    include: tuple[str, ...] = ("*",)
    """Glob patterns of tensor names to select, such as "*.mlp.*"."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of tensor names to remove from the selection."""
    layers: str | None = None
    """Layers to select: a Python slice such as "4:20" or "-4:", or one index such as "7". Embeddings, final norm and head belong to no layer."""

    @field_validator("layers")
    @classmethod
    def _check_slice(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"-?\d+|-?\d*:-?\d*(:-?[1-9]\d*)?", value):
            raise ValueError(f"expected a slice of layers such as '4:20', '-4:' or '7', found {value!r}")
        return value

    def unmatched(self, model: Model) -> str | None:
        """Return the first glob or slice that selects nothing in a model; None if every part selects something."""
        names = list(model.weights.specs)
        for glob in self.include:
            if glob != "*" and not any(fnmatchcase(name, glob) for name in names):
                return f"include {glob!r}"
        if self.layers is not None and not self._layer_indices(model.layout.depth):
            return f"layers {self.layers!r}"
        return None if any(self.matches(name, model) for name in names) else "`where`"

    def matches(self, name: str, model: Model) -> bool:
        """Return True if a tensor belongs to the set."""
        if not any(fnmatchcase(name, glob) for glob in self.include) or any(fnmatchcase(name, g) for g in self.exclude):
            return False
        return self.layers is None or model.layout.layer(name) in self._layer_indices(model.layout.depth)

    def _layer_indices(self, depth: int) -> range:
        parts = [int(p) if p else None for p in (self.layers or ":").split(":")]
        if len(parts) == 1 and parts[0] is not None:
            return range(depth)[parts[0] : parts[0] + 1 or None]
        return range(depth)[slice(*parts)]


class MergeWhere(Where):
    """The tensors that a merge step changes, and the neurons within them."""

    neurons: str | None = absent()  # left out, so that keys of steps without it stay the same
    """Directory of a set of neurons (`neurons.json`). Of the feed-forward matrices, the step then changes only the rows and columns of these neurons; `include: ["*mlp*"]` limits the step to such tensors."""


class Ramp(Strict):
    """A value that changes linearly from the first layer to the last layer."""

    first: Real
    last: Real


class Knots(Strict):
    """Values at evenly spaced depths, with linear interpolation between them."""

    knots: tuple[Real, ...] = Field(min_length=2)


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "rules"
    if isinstance(value, Knots) or (isinstance(value, Mapping) and "knots" in value):
        return "knots"
    return "ramp" if isinstance(value, (Mapping, Ramp)) else "number"


class Rule(Strict):
    """A value for the tensors that `where` selects: a number, or a value that changes with depth."""

    where: Where
    value: Annotated[
        Annotated[Real, Tag("number")] | Annotated[Ramp, Tag("ramp")] | Annotated[Knots, Tag("knots")], Discriminator(_kind)
    ]


Schedule = Annotated[
    Annotated[Real, Tag("number")]
    | Annotated[Ramp, Tag("ramp")]
    | Annotated[Knots, Tag("knots")]
    | Annotated[tuple[Rule, ...], Tag("rules")],
    Discriminator(_kind),
]
"""A number, a value over depth (`{first:, last:}` or `{knots: [...]}`), or a list of `{where:, value:}`, whose last match
wins."""


def constants(schedule: Any) -> list[float]:
    """Return the numbers in a schedule."""
    if isinstance(schedule, Ramp):
        return [schedule.first, schedule.last]
    if isinstance(schedule, Knots):
        return list(schedule.knots)
    return [v for rule in schedule for v in constants(rule.value)] if isinstance(schedule, tuple) else [schedule]


def lowest(schedule: Any) -> float:
    """Return the smallest value of a schedule."""
    return float(min(constants(schedule), default=0.0))


def _check_share(schedule: Any) -> Any:
    if bad := [v for v in constants(schedule) if not 0 <= v <= 1]:
        raise ValueError(f"expected a share between 0 and 1, found {bad[0]:g}")
    return schedule


def _check_finite(schedule: Any) -> Any:
    if bad := [v for v in constants(schedule) if not abs(v) < 1e30]:
        raise ValueError(f"expected a number between -1e30 and 1e30, found {bad[0]:g}")
    return schedule


Space = Literal["full", "core"]
"""Representation that a merge method works on: whole deltas ("full"), or the small matrices of stacked LoRA factors ("core")."""
Number = Annotated[Schedule, AfterValidator(_check_finite)]
Share = Annotated[Schedule, AfterValidator(_check_share)]


def value_at(schedule: Any, name: str, model: Model, default: float) -> float:
    """Return the value of a schedule for one tensor.

    Linear schedules run over depth: embeddings take the first knot, the final norm and the head take the last knot.

    Args:
        schedule: A `Schedule`.
        name: The tensor's name.
        model: The model, whose layers define the depth.
        default: Value for tensors that no rule of a list matches. If several rules match, the last one wins.
    """
    if isinstance(schedule, tuple):
        matching = [rule.value for rule in schedule if rule.where.matches(name, model)]
        return value_at(matching[-1], name, model, default) if matching else default
    if isinstance(schedule, (int, float)):
        return float(schedule)
    knots = constants(schedule)
    place = model.layout.position(name) * (len(knots) - 1)
    left = min(int(place), len(knots) - 2)
    return knots[left] + (knots[left + 1] - knots[left]) * (place - left)


class BrickEntry(Strict):
    """Fields of one brick in a merge step."""

    # Threads of a merge make entries, and pydantic below 2.14 validates one with its base class while another thread builds the class.
    model_config = ConfigDict(defer_build=False)

    weight: Number = 1.0
    """Coefficient of the brick's delta."""


def _is_entry(value: Any) -> str:
    is_brick_fields = isinstance(value, Mapping) and not {"first", "last", "knots"} & set(value)
    return "entry" if is_brick_fields or isinstance(value, BrickEntry) else "weight"


class _ListOfNames:
    """Makes a list of brick names equivalent to weights of 1, in validation and in the JSON schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return a schema that converts a list of names to a mapping, then validates the mapping."""
        return core_schema.no_info_before_validator_function(_weights_of_one, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, object]:
        """Return a JSON schema that accepts the mapping or a list of names."""
        return {"anyOf": [handler(schema), {"type": "array", "items": {"type": "string"}, "uniqueItems": True}]}


def _weights_of_one(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    weights: dict[str, float] = {}
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"expected brick names, or a mapping of brick names to weights; found {repr(name)[:60]} in the list")
        if name in weights:
            raise ValueError(f"brick '{name}' is listed twice: give it one entry with the sum of the weights")
        weights[name] = 1.0
    return weights


E = TypeVar("E", bound=BrickEntry)
Bricks = Annotated[
    dict[str, Annotated[Annotated[Number, Tag("weight")] | Annotated[E, Tag("entry")], Discriminator(_is_entry)]], _ListOfNames()
]
"""Brick name -> its weight, or a mapping of the method's per-brick fields. A list of names gives every brick weight 1."""


class Window(Strict):
    """The checkpoints of a training run that are averaged, and their weights. Steps are those in the names of the folders."""

    last: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Number of checkpoints, the last ones; default: all of the window."""
    start: Annotated[int, Field(strict=True, ge=0)] | None = Field(None, alias="from")
    """First step of the window."""
    to: Annotated[int, Field(strict=True, ge=0)] | None = None
    """Last step of the window."""
    every: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Multiples of this number of steps alone."""
    decay: Literal["linear", "cosine", "sqrt", "1-sqrt"] = "linear"
    """The decay of a learning rate that the weights stand for; `linear` means equal weights."""
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Factor of an exponential moving average, instead of `decay`."""


NESTED = ("recipe", "checkpoints")
"""Kinds of bricks that are the result of a recipe: one that is named, or the average of a training run."""


class BrickRef(Window):
    """Location of a brick. A plain string is the same as `path`."""

    path: str | None = None
    """A directory, hub id or GGUF file, whose kind is detected."""
    adapter: str | None = None
    """A directory or hub id of a PEFT LoRA adapter."""
    checkpoint: str | None = None
    """A directory, hub id or GGUF file of a fine-tuned model with the base's architecture."""
    brick: str | None = None
    """A directory with a brick.yaml."""
    recipe: str | None = None
    """Another recipe, whose configuration is the brick. It has the same base, unless a step reads the brick as a whole model."""
    checkpoints: str | None = None
    """A trainer's directory with checkpoint-500 and so on, or a hub id whose revisions are steps: the brick is their average."""
    any_base: bool = False
    """Use the brick even if it was made on another base: contradictions become warnings."""
    part: Literal["language"] | None = None
    """Use one part of a multimodal checkpoint: `language` is its text decoder. `grow: components` adds the encoders to the result."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_fields(self) -> BrickRef:
        keys = list(self._places())
        if len(keys) != 1:
            raise ValueError(
                f"expected exactly one of adapter, checkpoint, brick, recipe, checkpoints; found {', '.join(keys) or 'none'}"
            )
        if (given := sorted(self.model_fields_set & _WINDOW)) and keys[0] != "checkpoints":
            raise ValueError(
                f"{given[0].replace('start', 'from')}: is for the checkpoints of a training run, found {keys[0]}; write checkpoints: DIRECTORY"
            )
        if self.decay != "linear" and self.ema is not None:
            raise ValueError("`decay` and `ema` both give the weights: set only one of them")
        if self.part and keys[0] in ("adapter", "recipe", "checkpoints"):
            raise ValueError(f"part: {self.part} is for a multimodal checkpoint, found {keys[0]}; write checkpoint: DIRECTORY")
        return self

    @model_serializer(mode="wrap")
    def _without_window(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out the window of a brick that is no training run, in records too."""
        data: dict[str, object] = write(self)
        apart = {"checkpoints", "from", *_WINDOW} if self.checkpoints is None else set()
        return {key: value for key, value in data.items() if key not in apart}

    @property
    def kind(self) -> str:
        """The field that is set: adapter, checkpoint, brick, recipe or checkpoints, or path if the kind is detected."""
        return next(iter(self._places()))

    @property
    def window(self) -> Window:
        """The checkpoints of a training run that are averaged."""
        return Window.model_validate(self.model_dump(by_alias=True, include=_WINDOW))

    @property
    def target(self) -> str:
        """The directory, hub id or recipe file."""
        return next(iter(self._places().values()))

    def data(self) -> dict[str, object]:
        """Return the reference in the form that a recipe file has."""
        return {**self._places(), **self.model_dump(by_alias=True, exclude_defaults=True)}

    def _places(self) -> dict[str, str]:
        apart = {"any_base", "part", *_WINDOW}
        return {key: str(value) for key, value in self if key not in apart and value is not None}


_WINDOW = set(Window.model_fields)


def parse_size(text: str | int) -> int:
    """Convert a size such as "2GB", "500MB", "1.5GiB" or a plain number to bytes."""
    units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in units:
        raise WorkbenchError(f"expected a size such as 2GB or 500MB, found {text!r}")
    return int(float(match[1]) * units[match[2]])
