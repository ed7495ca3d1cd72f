"""Stack: reorder, repeat or leave out layers of a model, or take layers, embeddings and head from several models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from workbench.ground.errors import InvalidRecipeError
from workbench.grow.expansion.layers import head_name, in_order, reordered
from workbench.grow.expansion.parts import text_config, with_text
from workbench.grow.expansion.records import MergedPart
from workbench.grow.expansion.slices import Part, PartField, Slice
from workbench.grow.expansion.stacking import Factors, Layer, Stacking
from workbench.models.architecture import is_embedding, is_head, untied_config
from workbench.models.layout import Model
from workbench.steps import GrowMethod, Grown, Growth, KeyContext, Learns, Preserves, Problem, register
from workbench.steps.fields import Whole

_PARTS = ("embeddings", "norm", "head")


@register
class Stack(GrowMethod):
    """Stack slices of layers of one or several models, as in SOLAR's depth up-scaling (Kim et al. 2023) and mergekit's `passthrough`.

    The result computes another function and needs further training. The first occurrence of a layer of the configuration so far
    keeps its bricks; repeated layers, layers of bricks and merged layers count as new.
    """

    paper = "Kim et al. 2023, SOLAR 10.7B: Depth Up-Scaling, arXiv 2312.15166"
    formula = "layers [a, b), [c, d), ... of the models in sequence; tensors times `scale`"
    preserves: ClassVar[Preserves] = "no"

    grow: Literal["stack"]
    slices: tuple[Slice, ...] | None = Field(None, min_length=1)
    """The slices, from the first layer up: [{layers: [0, 24]}, {brick: NAME, layers: [8, 32]}]."""
    order: tuple[Whole, ...] | None = Field(None, min_length=1)
    """Instead of `slices`: the layers one by one, such as [0, 1, 2, 1, 2, 3]."""
    embeddings: PartField | None = None
    """Source of the embeddings: a brick's name, or {brick:, scale:, merge:, base:} as in a slice. If omitted, the configuration
    so far. A head that is tied to the embeddings follows them."""
    norm: PartField | None = None
    """Source of the final norm, as for `embeddings`."""
    head: PartField | None = None
    """Source of the head, as for `embeddings`. A head that the configuration so far ties to its embeddings becomes a separate tensor,
    unless `embeddings` has the same source."""
    tokenizer: str | None = None
    """Brick whose tokenizer and generation settings the result has. If omitted, those of the configuration so far."""

    @model_validator(mode="after")
    def _check_fields(self) -> Stack:
        if (self.slices is None) == (self.order is None):
            raise ValueError(
                "expected one of `slices: [{layers: [0, 24]}, ...]` and `order: [0, 1, 1]`, found "
                + ("none" if self.slices is None else "both")
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out sources that are not set, so that keys of steps without them stay the same."""
        fields: dict[str, object] = handler(self)
        return {key: value for key, value in fields.items() if value is not None or key not in (*_PARTS, "tokenizer")}

    def _parts(self) -> Iterator[tuple[tuple[str | int, ...], Part]]:
        """Yield the slices and the parts outside the layers, with their paths."""
        yield from ((("slices", i), part) for i, part in enumerate(self.slices or ()))
        yield from (((name,), part) for name in _PARTS if (part := getattr(self, name)) is not None)

    def names(self) -> list[str]:
        """Return the bricks that the result has parts of, in order."""
        named = [name for _, part in self._parts() for name in part.names()]
        return list(dict.fromkeys([*named, *([self.tokenizer] if self.tokenizer else [])]))

    def whole_models(self) -> list[str]:
        """Return the same bricks: a stack reads all of them in their own shapes."""
        return self.names()

    def tokenizer_brick(self) -> str | None:
        """Return the brick that `tokenizer` names."""
        return self.tokenizer

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield the errors in the brick names and in the merges of slices."""
        for path, part in self._parts():
            yield from (Problem((*path, *p.path), p.message, p.hint) for p in part.check_names(known))
        if self.tokenizer is not None and self.tokenizer not in known:
            yield Problem(("tokenizer",), f"no brick '{self.tokenizer}' under `bricks`. Known: {', '.join(known) or 'none'}.")

    def key_parts(self, context: KeyContext) -> list[Any]:
        """Return the bricks' digests, and the versions and the seed of the merges of slices."""
        merges = [part.merge for _, part in self._parts() if part.merge is not None]
        parts = [*super().key_parts(context), *([[type(method).code_key() for method in merges]] if merges else [])]
        return [*parts, *([context.seed] if any(method.laws.random for method in merges) else [])]

    def learning(self) -> Learns:
        """Return when all additions have a gradient: after one step if a factor is 0, as in LLaMA Pro.

        The tensors with factor 0 get a gradient first, and pass one on to the others from then on.
        """
        zero = any(factor == 0 for _, part in self._parts() for factor in part.scale.values())
        return "after_one_step" if zero else self.learns

    def expand(self, model: Model) -> Growth:
        """Plan the new order of layers.

        Raises:
            WorkbenchError: If a layer is out of range, a source does not fit, or a glob of `scale` matches no tensor of its slice.
        """
        stacking = Stacking(model, self._whole_sources)
        layers = self._layers(stacking)
        own = [layer.number if layer.model is None else None for layer in layers]
        first = {old: new for new, old in reversed(list(enumerate(own))) if old is not None}
        tensors = self._tensors(stacking, layers, first)
        config, depth, order = stacking.config(layers)
        record: dict[str, object] = {} if None in own else {"order": own}
        record |= {
            "new_layers": [new for new, old in enumerate(own) if old is None or first[old] != new],
            "gone_layers": sorted(set(range(model.layout.depth)) - set(first)),
        }
        record |= {"blocks": [block.to_dict() for block in stacking.blocks]}
        record |= {name: _source_of(part) for name in _PARTS if (part := getattr(self, name)) is not None}
        record |= {"tokenizer": self.tokenizer} if self.tokenizer else {}
        config = self._with_vocabulary(reordered(config, depth, order, "stack"), model, tensors, stacking)
        return Growth(tensors, config, record, models=stacking.models)

    def _layers(self, stacking: Stacking) -> list[Layer]:
        """Return the source of each new layer."""
        if self.slices is not None:
            return [layer for number, part in enumerate(self.slices) for layer in stacking.layers(number, part)]
        depth = stacking.current.layout.depth
        if bad := [i for i in self.order or () if not 0 <= i < depth]:
            raise InvalidRecipeError(f"grow stack: layer {bad[0]} does not exist; the model has layers 0..{depth - 1}")
        return [Layer(None, i, (None, i), {}, 0) for i in self.order or ()]

    def _tensors(self, stacking: Stacking, layers: list[Layer], first: dict[int, int]) -> dict[str, Grown]:
        """Return the tensors of the result, in file order.

        Args:
            stacking: The sources.
            layers: The source of each new layer.
            first: Layer of the current model -> the first new layer that it becomes.
        """
        current, prefix = stacking.current, stacking.current.layout.prefix
        factors = [Factors(layer.scale, f"layer {layer.number}") for layer in layers]

        def made(name: str, new: int) -> Grown:
            layer = layers[new]
            factor = factors[new].factor(name.removeprefix(f"{prefix}{layer.number}."))
            added = layer.model is not None or first[layer.number] != new
            return Grown(name, model=layer.model, new=added, scale=factor)

        def names(new: int) -> list[str]:
            layer = layers[new]
            of = current if layer.model is None else stacking.models[layer.model]
            return of.layout.in_layer(layer.number)

        tensors = in_order(current.layout, [layer.number for layer in layers], made, names)
        for new, factor in enumerate(factors):
            factor.check([name.removeprefix(f"{prefix}{layers[new].number}.") for name in names(new)])
        untied = head_name(current) is not None and self.head is not None and not self._follows(stacking)
        outside = {
            **stacking.outside("embeddings", self.embeddings),
            **stacking.outside("norm", self.norm),
            **(stacking.outside("head", self.head) if untied or head_name(current) is None else {}),
        }
        return {**{name: outside.get(name, grown) for name, grown in tensors.items()}, **outside}

    def _follows(self, stacking: Stacking) -> bool:
        """Return True if the head has the source of the embeddings, and this source ties it to them."""
        names = self.head.names() if self.head else []
        return self.head == self.embeddings and all(head_name(stacking.source(name)) is not None for name in names)

    def _with_vocabulary(
        self, config: dict[str, object], model: Model, tensors: dict[str, Grown], stacking: Stacking
    ) -> dict[str, object]:
        """Return config.json with the number of rows of the embeddings, and untied if the head became a separate tensor."""
        own = model.weights.specs

        def rows(name: str) -> int:
            grown = tensors[name]
            of = model if grown.model is None else stacking.models[grown.model]
            return of.weights.specs[grown.source].rows

        heads = [name for name in tensors if is_head(name)]
        tables = [name for name in tensors if is_embedding(name) and model.layout.group(name) == "embeddings"]
        if heads and head_name(model) is not None:
            config = untied_config(config)
        # Some models have more rows in one of the two, such as Moshi, whose embeddings have one for the start of a text.
        more = own[tables[0]].rows - own[heads[0]].rows if tables and heads and heads[0] in own else 0
        if tables and heads and rows(tables[0]) - rows(heads[0]) != more:
            raise InvalidRecipeError(
                f"grow stack: the embeddings have {rows(tables[0]):,} rows and the head has {rows(heads[0]):,}",
                "Take `embeddings`, `head` and `tokenizer` from the same brick.",
            )
        if not tables or rows(tables[0]) == own[tables[0]].rows or "vocab_size" not in text_config(config):
            return config
        return {
            **with_text(config, {"vocab_size": rows(tables[0])}),
            **({"vocab_size": rows(tables[0])} if "vocab_size" in config else {}),
        }


def _source_of(part: Part) -> str | dict[str, object]:
    """Return the source of a part outside the layers, as plain data for records."""
    if part.merge is None:
        return part.brick or "the configuration so far"
    return MergedPart(merge=part.merge.name, bricks=part.merge.names() or [], base=part.base).to_dict()
