"""Fields of a stack's slices: where the layers, the embeddings, the norm and the head of the result come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from workbench.ground.errors import nearest
from workbench.steps import MergeMethod, Problem, Step
from workbench.steps.fields import Real, Strict, Whole
from workbench.steps.step import REGISTERED

Range = tuple[Whole, Whole]


def _check_range(value: Range) -> Range:
    if not 0 <= value[0] < value[1]:
        raise ValueError(f"expected 0 <= first < end, found {list(value)}")
    return value


def _schema_with_method(schema: JsonDict) -> None:
    """Allow the fields of the merge method beside those of the slice."""
    schema.pop("additionalProperties", None)


class Part(Strict):
    """Where a part of the model comes from: a brick, the configuration so far, or a merge of bricks. A name alone is a brick."""

    model_config = ConfigDict(json_schema_extra=_schema_with_method)

    brick: str | None = None
    """Brick whose own tensors are taken: a checkpoint, the base with an adapter, or a recipe's result. If omitted, the
    configuration so far."""
    scale: dict[str, Real] = {}
    """Factors for tensors, by glob over the tensor's name within a layer: {"self_attn.o_proj.*": 0.5}. The first glob that matches
    a tensor applies."""
    merge: Annotated[
        SerializeAsAny[MergeMethod] | None,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}], "description": "Merge method"}),
    ] = None
    """Merge method, such as `ties`, with its fields beside it (`bricks:`, `density:`, ...): the part is a merge of these bricks.
    Schedules run over the layers of the slice, and layer numbers of `where` count from its first layer."""
    base: str | None = None
    """With `merge`: brick that the other bricks' deltas are taken from. If omitted, the configuration so far."""

    @model_validator(mode="before")
    @classmethod
    def _with_method(cls, data: Any, info: ValidationInfo) -> Any:
        """Read a name as a brick, and the fields of a merge method as the method."""
        if isinstance(data, str):
            return {"brick": data}
        if not isinstance(data, Mapping) or data.get("merge") is None or isinstance(data["merge"], MergeMethod):
            return data
        written = data["merge"]
        if isinstance(written, Mapping):  # as the step is written to a run's record
            own, fields = {k: v for k, v in data.items() if k != "merge"}, dict(written)
        else:
            names = [name for name in cls.model_fields if name not in ("merge", "brick")]
            own = {k: v for k, v in data.items() if k in names}
            fields = {k: v for k, v in data.items() if k not in names}
        method = _method(fields.get("merge"), info.context)
        _check_fields_of(method, fields, list(cls.model_fields))
        return {**own, "merge": method.model_validate(fields, context=info.context)}

    @model_validator(mode="after")
    def _check_fields(self) -> Part:
        if self.merge is None:
            if self.base is not None:
                raise ValueError("`base` belongs to `merge: METHOD`; `brick: NAME` takes the layers of one brick")
            return self
        if not self.merge.names():
            raise ValueError("list the bricks to merge: `bricks: {NAME: 1.0}`")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out fields that are not set, so that keys of steps without them stay the same."""
        fields: dict[str, object] = handler(self)
        return {key: value for key, value in fields.items() if value is not None and (value != {} or key == "scale")}

    def names(self) -> list[str]:
        """Return the bricks of the part, in order, each once."""
        named = [self.brick, self.base, *((self.merge.names() or []) if self.merge else [])]
        return list(dict.fromkeys(name for name in named if name is not None))

    def check_names(self, known: Sequence[str]) -> Iterator[Problem]:
        """Yield the errors in the part's brick names and in its merge."""
        for field, name in (("brick", self.brick), ("base", self.base)):
            if name is not None and name not in known:
                yield Problem((field,), f"no brick '{name}' under `bricks`. {nearest(name, known)}")
        if (method := self.merge) is None:
            return
        yield from method.check_names(method.names() or [], known)
        if method.laws.needs != "tensor" or method.inputs():
            yield Problem(
                ("merge",),
                f"{method.name} measures on texts or on live models, which a slice cannot",
                "Use a method that needs only tensors, such as linear, slerp, task_arithmetic, ties or dare.",
            )
        if method.in_core_space():
            yield Problem(
                ("space",), "`space: core` merges factors of adapters; a slice merges whole tensors", "Set `space: full`."
            )
        if method.neuron_set():
            yield Problem(
                ("where", "neurons"), "a slice cannot be limited to neurons", "Use a merge step with `where: {neurons:}`."
            )


class Slice(Part):
    """Consecutive layers of the result, from the configuration so far, from a brick, or from a merge of bricks."""

    layers: Annotated[Range, AfterValidator(_check_range)] | None = None
    """First layer, and the layer after the last one: [8, 32] is layers 8 to 31. If omitted, all layers."""
    ranges: dict[str, Range] = {}
    """With `merge`: brick -> its own range of layers, where it is not `layers`; all ranges have the same length."""

    @field_validator("ranges")
    @classmethod
    def _check_ranges(cls, value: dict[str, Range]) -> dict[str, Range]:
        return {name: _check_range(span) for name, span in value.items()}

    @model_validator(mode="after")
    def _check_slice(self) -> Slice:
        if not self.ranges:
            return self
        if self.merge is None:
            raise ValueError("`ranges` belongs to `merge: METHOD`; `layers` is the range of one brick")
        if unknown := [name for name in self.ranges if name not in self.names()]:
            raise ValueError(
                f"`ranges` names '{unknown[0]}', which the slice does not merge. {nearest(unknown[0], self.names())}"
            )
        spans = [*self.ranges.values(), *([self.layers] if self.layers else [])]
        lengths = {span[1] - span[0] for span in spans}
        if len(lengths) > 1:
            counts = ", ".join(f"{list(span)} has {span[1] - span[0]} layers" for span in spans)
            raise ValueError(f"the ranges of one merge must have the same length: {counts}")
        return self


class _OrName:
    """Says in the JSON schema that a brick's name may stand for a part."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the part's own schema, which reads names."""
        return handler(source)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, object]:
        """Return a JSON schema that accepts the fields or a name."""
        return {"anyOf": [handler(schema), {"type": "string"}]}


PartField = Annotated[Part, _OrName()]
"""A part, or the name of a brick."""


def _check_fields_of(method: type[MergeMethod], fields: Mapping[str, object], own: Sequence[str]) -> None:
    """Raise ValidationError for fields that neither the method nor the slice has, with the names of both."""
    known = [field.alias or name for name, field in method.model_fields.items() if name != "id"]
    details = [
        InitErrorDetails(
            type=PydanticCustomError("extra_forbidden", "unknown", {"known": sorted({*known, *own} - {"brick"})}),
            loc=(name,),
            input=value,
        )
        for name, value in fields.items()
        if name not in (*known, *method.model_fields)
    ]
    if details:
        raise ValidationError.from_exception_data(method.__name__, details)


def _method(name: Any, context: Mapping[str, type[Step]] | None) -> type[MergeMethod]:
    """Return a merge method by its name: one that the recipe names (`recipe.recipe` passes them as the context), or a built-in one."""
    tag = f"merge:{name}"
    found = (context or {}).get(tag, REGISTERED.get(tag))
    if found is None or not issubclass(found, MergeMethod):
        names = [cls.name for cls in REGISTERED.values() if issubclass(cls, MergeMethod)]
        raise ValueError(f"unknown merge method {name!r}. {nearest(str(name), names)} `workbench methods` lists all.")
    return found
