"""Fields of a recipe, and its JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from workbench.errors import WorkbenchError, nearest
from workbench.recipe.fields import EvalEntry, SearchFields, SweepValues
from workbench.recipe.methods import methods
from workbench.steps import Step, verbs
from workbench.steps.fields import NAME, BrickRef, Strict, Whole, field_docs, parse_size
from workbench.vocabulary.fields import TokenizerFields
from workbench.yamldoc import Written

DType = Literal["float32", "float16", "bfloat16"]


class Output(Strict):
    """The files that `run` writes."""

    form: Literal["checkpoint", "adapter", "configuration"] = "checkpoint"
    """`checkpoint`: a Hugging Face checkpoint directory. `adapter`: a PEFT adapter of the base. `configuration`: a directory with
    a model and its memory, or its routed bricks; the default, and the only choice, for a recipe that ends in a memory or a router."""
    rank: Whole | Literal["exact"] | None = None
    """Rank of an adapter. `exact` (the default) joins the bricks' factors without loss. A number truncates every update to that
    rank."""
    accept_error: float | None = Field(None, gt=0, le=1)
    """Largest relative error ‖Δ − adapter‖ / ‖Δ‖ over all tensors of an adapter with a number as `rank`; a larger one is refused.
    If omitted, 0.5."""
    dtype: DType | None = None
    """Dtype of the written tensors. If omitted, each tensor has the base's dtype, and the factors of an adapter are float32."""
    shard_size: str = "4GB"
    """Maximum size of each safetensors file of a checkpoint. An adapter is always one file."""

    def of_adapter(self) -> dict[str, Any]:
        """Return the fields that an adapter's run depends on, for its key."""
        return self.model_dump(exclude={"shard_size"} if self.accept_error is not None else {"shard_size", "accept_error"})

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

    def __str__(self) -> str:
        """Return the base as one text, as mergekit writes it."""
        return f"{self.on}+{self.adapter}"


def _base_form(value: Any) -> str:
    return "adapted" if isinstance(value, (Mapping, AdaptedBase)) else "model"


class RecipeFields(Strict):
    """All fields of a recipe except `steps`, which `recipe_model()` adds from the registered methods."""

    version: Literal[1]
    """Version of the recipe format; always 1."""
    name: str | None = Field(None, pattern=NAME)
    """Name of the configuration, used for run directories and tables. If omitted, the file's name without its suffix."""
    description: str | None = None
    """A short description, which is copied to the README.md of the result."""
    base: Annotated[
        Annotated[str, Field(min_length=1), Tag("model")] | Annotated[AdaptedBase, Tag("adapted")], Discriminator(_base_form)
    ]
    """The base model: a directory or GGUF file, relative to the project, or a hub id with an optional @revision; or {adapter:, on:}, a model
    with an adapter on it. The deltas of all bricks are taken against it."""
    bricks: dict[Annotated[str, Field(pattern=NAME)], BrickRef] = {}
    """Name -> location of each brick that steps can use: an adapter, a fine-tuned checkpoint, or another recipe."""
    tokenizer: TokenizerFields | None = None
    """The vocabulary of the result, for bricks whose tokenizer differs from the base's. Embedding and head rows are aligned by
    token."""
    output: Output = Output()
    """The files that `run` writes."""
    eval: tuple[EvalEntry, ...] = ()
    """Evaluations that `workbench eval` runs: names of suites in `evals/suites`, lists of tasks, files of facts, or the word
    `edits` for the facts of every edit in the recipe."""
    search: SearchFields | None = None
    """Fields that `workbench search` varies, and its objective. Other commands ignore it."""
    sweep: dict[str, SweepValues] | None = Field(None, min_length=1)
    """Fields to vary: STEP.FIELD -> list of values, with the id or index of a step, such as "mix.lambda", "mix.merge" or "seed". Every
    combination of the values is a configuration of its own, which `eval`, `compare` and `report` treat like a recipe."""
    seed: int = Field(0, ge=0, strict=True)
    """Seed for all random numbers in steps and in a search."""

    @property
    def base_name(self) -> str:
        """The base as one text, for messages and records."""
        return str(self.base)


def _check_verb(value: Any, classes: tuple[type[Step], ...]) -> Any:
    """Check a step's verb and method before pydantic sees a union, for errors that a user understands."""
    if not isinstance(value, Mapping):
        return value
    written = [v for v in verbs() if v in value]
    if len(written) != 1:
        actual = " and ".join(written) if written else "neither" + (f" (fields: {', '.join(map(str, value))})" if value else "")
        raise PydanticCustomError(
            "value_error", "expected exactly one of {verbs}; found {found}", {"verbs": ", ".join(verbs()), "found": actual}
        )
    if value[written[0]] not in [cls.name for cls in classes if cls.verb == written[0]]:
        names = {cls.name: None for cls in [*methods().values(), *classes] if cls.verb == written[0]}
        text = f"unknown {written[0]} method '{value[written[0]]}'. {nearest(str(value[written[0]]), names)} `workbench methods` lists all."
        raise PydanticCustomError("value_error", "{text}", {"text": text})
    return value


def _tag(value: Any) -> str | None:
    if isinstance(value, Step):
        return value.tag
    return next((f"{verb}:{value[verb]}" for verb in verbs() if verb in value), None) if isinstance(value, Mapping) else None


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
