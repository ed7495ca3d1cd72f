"""Plans of stacks: the tensors of a model whose layers, embeddings, norm and head come from several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from workbench.ground.errors import InvalidRecipeError
from workbench.grow.expansion.layers import View, concatenated, group_of, layers_of, merged_views, with_head
from workbench.grow.expansion.parts import text_config
from workbench.grow.expansion.records import MergedLayers, TakenLayers
from workbench.grow.expansion.slices import Part, Slice
from workbench.models.architecture import is_embedding, is_head_module
from workbench.models.layout import Model
from workbench.steps import Grown, Sources

# Fields of config.json that every source must share with the current model. Shapes of tensors do not show the number of heads.
_SIZES = (
    "hidden_size",
    "n_embd",
    "d_model",
    "num_attention_heads",
    "n_head",
    "num_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
)


@dataclass(frozen=True)
class Layer:
    """A layer of the result.

    Attributes:
        model: Name of the model in `Growth.models` that it is a layer of; None for the current model.
        number: Its number in that model.
        described_by: Brick whose config.json describes the layer, and its number there; None for the current model.
        scale: Factors by glob; see `Part.scale`.
        part: Index of its slice.
    """

    model: str | None
    number: int
    described_by: tuple[str | None, int]
    scale: Mapping[str, float]
    part: int


@dataclass
class Stacking:
    """The sources of a stack, checked against the current model.

    Attributes:
        current: The model before the step.
        sources: The bricks' models.
        models: Name -> model that tensors of the result come from: bricks, and merges of slices.
        blocks: Origin of each slice's layers.
        depth: Number of layers of the slices so far.
    """

    current: Model
    sources: Sources
    models: dict[str, Model] = field(default_factory=dict)
    blocks: list[MergedLayers | TakenLayers] = field(default_factory=list)
    depth: int = 0

    def source(self, name: str | None) -> Model:
        """Return a brick's model, or the current model for None.

        Raises:
            WorkbenchError: If the brick's architecture or sizes differ from the current model's.
        """
        if name is None:
            return self.current
        model = self.sources.models[name]
        if name not in self.models:
            _check_sizes(name, model, self.current)
            self.models[name] = model
        return model

    def layers(self, number: int, part: Slice) -> list[Layer]:
        """Return the layers of one slice.

        Raises:
            WorkbenchError: If a range does not fit its model, or the models' layers have other tensors or shapes.
        """
        where = f"grow stack: slice {number}"
        anchor = part.base if part.merge else part.brick
        first, stop = self._range(part, anchor, where)
        place = _span(self.depth, self.depth + stop - first)
        self.depth += stop - first
        if part.merge is None:
            source = part.brick or "the configuration so far"
            self.blocks.append(TakenLayers(layers=place, source=source, origin=_span(first, stop)))
            self._check_layers(where, part.brick, range(first, stop))
            return [Layer(part.brick, i, (part.brick, i), part.scale, number) for i in range(first, stop)]
        names = part.merge.names() or []
        ranges = {name: self._range(part, name, where) for name in names}
        if unequal := [name for name, (a, b) in ranges.items() if b - a != stop - first]:
            a, b = ranges[unequal[0]]
            raise InvalidRecipeError(
                f"{where}: the ranges of one merge must have the same length: {_named(anchor)} has {stop - first} layers, "
                f"{_named(unequal[0])} {b - a}",
                "Give the brick its own range with `ranges: {NAME: [FIRST, END]}`.",
            )
        for name, span in {**ranges, **({anchor: (first, stop)} if anchor else {})}.items():
            self._check_layers(where, name, range(*span))
        base = layers_of(self.source(anchor), first, stop)
        views = {name: layers_of(self.source(name), *span) for name, span in ranges.items()}
        self._check_kinds(where, anchor, first, ranges)
        key = f"slice {number}"
        self.models[key] = merged_views(part.merge, base, views, self.sources, ranges, where)
        sources = {name: _span(*span) for name, span in ranges.items()}
        self.blocks.append(
            MergedLayers(layers=place, merge=part.merge.name, bricks=sources, base=anchor, origin=_span(first, stop))
        )
        return [Layer(key, i, (anchor, first + i), part.scale, number) for i in range(stop - first)]

    def _range(self, part: Slice, name: str | None, where: str) -> tuple[int, int]:
        """Return the range of a source in a slice. Raises WorkbenchError if its model has fewer layers."""
        depth = self.source(name).layout.depth
        first, stop = part.ranges.get(name or "") or part.layers or (0, depth)
        if stop > depth:
            raise InvalidRecipeError(f"{where}: layer {stop - 1} does not exist; {_named(name)} has layers 0..{depth - 1}")
        return first, stop

    def _check_layers(self, where: str, name: str | None, layers: range) -> None:
        """Check that layers of a source have the tensors and shapes of some layer of the current model."""
        if name is None:
            return
        model, known = self.source(name), self._shapes
        for layer in layers:
            shapes = _shapes(model, layer)
            if shapes in known:
                continue
            like = known[min(layer, len(known) - 1)]
            different = sorted(n for n in shapes.keys() | like.keys() if shapes.get(n) != like.get(n))
            one, other = (list(s[different[0]]) if different[0] in s else "missing" for s in (shapes, like))
            raise InvalidRecipeError(
                f"{where}: layer {layer} of {_named(name)} does not fit: {different[0]} is {one}, the current model has {other}",
                "All models of a stack need layers of the same shapes.",
            )

    @cached_property
    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of every layer of the current model, by the name within the layer."""
        return [_shapes(self.current, layer) for layer in range(self.current.layout.depth)]

    def _check_kinds(self, where: str, anchor: str | None, first: int, ranges: Mapping[str, tuple[int, int]]) -> None:
        """Check that config.json describes the layers of one merge in the same way, such as with the same sliding window."""
        own = self.source(anchor)
        for name, (start, stop) in ranges.items():
            for i in range(stop - start):
                one, other = _described(own, first + i), _described(self.source(name), start + i)
                if one != other:
                    key = next(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))
                    raise InvalidRecipeError(
                        f"{where}: layer {first + i} of {_named(anchor)} and layer {start + i} of {_named(name)} differ in {key} "
                        f"({one.get(key)}, {other.get(key)}), so they cannot be merged",
                        "Merge layers of the same kind.",
                    )

    def outside(self, group: str, part: Part | None) -> dict[str, Grown]:
        """Return the tensors of one part outside the layers: "embeddings", "norm" or "head".

        Args:
            group: The part; see `Layout.group`.
            part: Where it comes from; None for the current model. A tied head becomes a separate tensor.

        Raises:
            WorkbenchError: If a model lacks a tensor of the part, or has it in another shape.
        """
        own = group_of(with_head(self.current, self.current) if group == "head" else self.current, group)
        names = list(own.weights.specs)
        if part is None:
            return {name: Grown(name) for name in names}
        where = f"grow stack: {group}"
        key: str | None = part.brick
        if part.merge is not None:
            views = {name: self._view(name, group, own, where) for name in part.merge.names() or []}
            base, key = self._view(part.base, group, own, where), f"merge of the {group}"
            self._check_same(where, part.base, base, views)
            self.models[key] = merged_views(part.merge, base, views, self.sources, dict.fromkeys(views, group), where)
        elif part.brick is not None or not set(names) <= set(self.current.weights.specs):
            key = f"{group} of {part.brick or 'the configuration so far'}"
            self.models[key] = self._view(part.brick, group, own, where)
        factors = Factors(part.scale, f"the {group}")
        made = {name: Grown(name, model=key, new=key is not None, scale=factors.factor(name)) for name in names}
        factors.check(names)
        return made

    def _view(self, name: str | None, group: str, own: View, where: str) -> View:
        """Return the view of one part of a source. Raises WorkbenchError if it does not fit the current model's part `own`."""
        model = self.source(name)
        view = group_of(with_head(model, self.current) if group == "head" else model, group)
        if missing := [n for n in own.weights.specs if n not in view.weights.specs]:
            raise InvalidRecipeError(
                f"{where}: {_named(name)} has no {missing[0]}",
                "Name a brick with this tensor, or remove the field to keep the current model's.",
            )
        for n in own.weights.specs:
            one, other = view.weights.specs[n].shape, own.weights.specs[n].shape
            rows = int(is_embedding(n) or is_head_module(n.rpartition(".")[0]))  # vocabularies may differ, widths may not
            if one[rows:] != other[rows:]:
                raise InvalidRecipeError(
                    f"{where}: {n} is {list(one)} in {_named(name)} and {list(other)} in the configuration so far",
                    "All models of a stack need the same width.",
                )
        return view

    def _check_same(self, where: str, anchor: str | None, base: View, views: Mapping[str, View]) -> None:
        """Check that the models of one merge have the same shapes outside the layers."""
        for name, view in views.items():
            for tensor, spec in base.weights.specs.items():
                if (other := view.weights.specs[tensor]).shape != spec.shape:
                    raise InvalidRecipeError(
                        f"{where}: {tensor} is {list(other.shape)} in {_named(name)} and {list(spec.shape)} in {_named(anchor)}",
                        "Add a `tokenizer` block to the recipe, which aligns rows by token, or take this part from one brick.",
                    )

    def config(self, layers: Sequence[Layer]) -> tuple[dict[str, object], int, list[int]]:
        """Return a config.json with the layers of all sources in a row, their number, and the number in it of each new layer."""
        names = list(dict.fromkeys([None, *(layer.described_by[0] for layer in layers)]))
        if names == [None]:
            return self.current.config, self.current.layout.depth, [layer.described_by[1] for layer in layers]
        depths = {name: self.source(name).layout.depth for name in names}
        starts, start = dict[str | None, int](), 0
        for name, depth in depths.items():
            starts[name], start = start, start + depth
        joined = concatenated([(self.source(name).config, depth) for name, depth in depths.items()], "stack")
        return joined, start, [starts[layer.described_by[0]] + layer.described_by[1] for layer in layers]


@dataclass
class Factors:
    """Factors by glob for one part; it finds globs that match nothing."""

    scale: Mapping[str, float]
    where: str
    used: set[str] = field(default_factory=set)

    def factor(self, name: str) -> float:
        """Return the factor of a tensor, given by its name within its layer."""
        matching = next((glob for glob in self.scale if fnmatchcase(name, glob)), None)
        if matching is None:
            return 1.0
        self.used.add(matching)
        return self.scale[matching]

    def check(self, names: Sequence[str]) -> None:
        """Raise WorkbenchError if a glob has matched no tensor."""
        if unused := [glob for glob in self.scale if glob not in self.used]:
            raise InvalidRecipeError(
                f"grow stack: the glob {unused[0]!r} of `scale` matches no tensor of {self.where}",
                f"Names: {', '.join(names[:6])}.",
            )


def _named(name: str | None) -> str:
    return "the configuration so far" if name is None else f"brick '{name}'"


def _span(first: int, stop: int) -> str:
    return str(first) if stop - first == 1 else f"{first}-{stop - 1}"


def _shapes(model: Model, layer: int) -> dict[str, tuple[int, ...]]:
    """Return name within the layer -> shape."""
    start = len(f"{model.layout.prefix}{layer}.")
    return {name[start:]: model.weights.specs[name].shape for name in model.layout.in_layer(layer)}


def _described(model: Model, layer: int) -> dict[str, object]:
    """Return the entries of config.json's lists over layers for one layer."""
    config, depth = text_config(model.config), model.layout.depth
    lists = {k: v for k, v in config.items() if isinstance(v, list) and len(v) == depth}
    return {key: value[layer] for key, value in lists.items() if "layer" in key or key.endswith("_types")}


def _check_sizes(name: str, model: Model, current: Model) -> None:
    """Raise WorkbenchError if a source's architecture, sizes or tensor names differ from the current model's."""
    kinds = [m.config.get("model_type") for m in (model, current)]
    if kinds[0] != kinds[1]:
        raise InvalidRecipeError(
            f"grow stack: brick '{name}' is a {kinds[0]} model, the configuration so far a {kinds[1]} model",
            "All models of a stack need the same architecture.",
        )
    one, other = (text_config(m.config) for m in (model, current))
    for key in _SIZES:
        if key in one and key in other and one[key] != other[key]:
            raise InvalidRecipeError(
                f"grow stack: brick '{name}' has {key} {one[key]}, the configuration so far {other[key]}",
                "All models of a stack need the same width, heads and neurons.",
            )
    if model.layout.prefix != current.layout.prefix:
        raise InvalidRecipeError(
            f"grow stack: brick '{name}' names its layers {model.layout.prefix}0..., the configuration so far "
            f"{current.layout.prefix}0...",
            "Load and save the brick with transformers, so that both have the same names.",
        )
