"""Layouts of models: the layer stack and the weights that write to the residual stream, by tensor names, and the live model of transformers.

transformers 5 has a list of renamings and operations for each architecture (stacked experts, joined projections). `live_layout` applies it to
shapes only, without loading weights, and finds the place of every tensor on disk in the live model. It supports stacking, concatenation,
splitting and transposition; tensors that other operations make are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.architecture import (
    ATTENTION_OUT,
    FFN_WRITERS,
    MIXER_WRITERS,
    MLP_OUT,
    SHARED_OUT,
    is_before_layers,
    is_head_module,
    model_depth,
)
from workbench.models.skeleton import groups_of, skeleton
from workbench.weights.specs import TensorSpec, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a live tensor that is a box of one tensor on disk.

    Attributes:
        disk: The tensor on disk.
        start: First index of the box in the live tensor, for each dimension.
        size: Size of the box in the live tensor.
        axes: For each dimension of the live tensor, the matching dimension on disk; None for a stacked dimension.
        disk_start: First index of the box in the tensor on disk.
    """

    disk: str
    start: Shape
    size: Shape
    axes: tuple[int | None, ...]
    disk_start: Shape


@dataclass(frozen=True)
class _Symbol:
    """A tensor without values: its shape, and the pieces that it consists of."""

    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class LiveLayout:
    """The layout of a live model.

    Attributes:
        pieces: Live tensor -> the pieces of tensors on disk that it consists of.
        shapes: Shape of every live tensor.
        transposed: Modules that store experts as [in, out].
    """

    pieces: dict[str, tuple[Piece, ...]]
    shapes: dict[str, Shape]
    transposed: frozenset[str]


def live_layout(specs: Mapping[str, TensorSpec], config: Mapping[str, object]) -> LiveLayout | None:
    """Return the layout of the live model that transformers builds; None for an architecture that it does not know."""
    return _layout(json.dumps(dict(config), sort_keys=True), tuple((name, spec.shape) for name, spec in specs.items()))


@lru_cache(maxsize=4)
def _layout(config: str, tensors: tuple[tuple[str, Shape], ...]) -> LiveLayout | None:
    """Trace transformers' conversion of the tensors' names and shapes; None if the architecture is unknown."""
    try:
        model = skeleton(config)
    except WorkbenchError:
        return None
    on_disk = dict(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for live, converter, members in groups_of(model, list(on_disk)):
        if converter is None:
            pieces[live] = _disk_symbol(members[0][0], on_disk[members[0][0]]).pieces
            continue
        sources: dict[str, list[_Symbol]] = {}
        for name, pattern in members:
            sources.setdefault(pattern, []).append(_disk_symbol(name, on_disk[name]))
        for target, symbol in _converted(converter, live, sources, shapes).items():
            if symbol.shape == shapes.get(target):
                pieces[target] = symbol.pieces
    transposed = frozenset(name for name, module in model.named_modules() if getattr(module, "is_transposed", False))
    return LiveLayout(pieces, shapes, transposed)


def _disk_symbol(name: str, shape: Shape) -> _Symbol:
    """Return a tensor on disk as a symbol of one piece."""
    zero = (0,) * len(shape)
    return _Symbol(shape, (Piece(name, zero, shape, tuple(range(len(shape))), zero),))


def _converted(converter: Any, live: str, sources: dict[str, list[_Symbol]], shapes: Mapping[str, Shape]) -> dict[str, _Symbol]:
    """Return the live tensors that a converter makes from its sources; {} if an operation is not supported."""
    from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Split, Transpose

    first, targets = converter.target_patterns[0], list(converter.target_patterns)
    names = [live.replace(first, target) for target in targets]
    ordered = [sources[p] for p in converter.source_patterns if p in sources]
    for operation in converter.operations:
        if type(operation) is MergeModulelist and operation.dim == 0:
            ordered = [[_stacked(group)] for group in ordered]
        elif type(operation) is Concatenate and operation.num_shards_attribute is None:
            ordered = [[_concatenated([symbol for group in ordered for symbol in group], operation.dim)]]
        elif type(operation) is Transpose and operation.check_dims and ordered[0][0].shape == shapes.get(live):
            continue  # files of the same names hold either order, which transformers tells from the shape
        elif type(operation) is Transpose:
            ordered = [[_swapped(symbol, operation.dim0, operation.dim1) for symbol in group] for group in ordered]
        elif type(operation) in (Chunk, Split) and len(ordered) == 1 and getattr(operation, "num_shards_attribute", None) is None:
            combined = ordered[0][0]
            part = combined.shape[operation.dim] // len(targets)
            sizes = [shapes[name][operation.dim] if type(operation) is Split else part for name in names]
            ordered = [[part] for part in _parts(combined, operation.dim, sizes)]
        else:
            return {}
    results = [symbol for group in ordered for symbol in group]
    return dict(zip(names, results, strict=True)) if len(results) == len(names) else {}


def _stacked(symbols: list[_Symbol]) -> _Symbol:
    """Stack tensors along a new first dimension."""
    pieces = [
        replace(p, start=(i, *p.start), size=(1, *p.size), axes=(None, *p.axes))
        for i, symbol in enumerate(symbols)
        for p in symbol.pieces
    ]
    return _Symbol((len(symbols), *symbols[0].shape), tuple(pieces))


def _concatenated(symbols: list[_Symbol], dim: int) -> _Symbol:
    """Concatenate tensors along a dimension."""
    pieces: list[Piece] = []
    offset = 0
    for symbol in symbols:
        pieces += [replace(p, start=_with_item(p.start, dim, p.start[dim] + offset)) for p in symbol.pieces]
        offset += symbol.shape[dim]
    return _Symbol(_with_item(symbols[0].shape, dim, offset), tuple(pieces))


def _parts(symbol: _Symbol, dim: int, sizes: list[int]) -> list[_Symbol]:
    """Split a tensor along a dimension."""
    parts = []
    offset = 0
    for size in sizes:
        pieces = []
        for p in symbol.pieces:
            low, high = max(p.start[dim], offset), min(p.start[dim] + p.size[dim], offset + size)
            if low < high:
                axis, begin = p.axes[dim], p.disk_start
                if axis is not None:
                    begin = _with_item(begin, axis, begin[axis] + low - p.start[dim])
                start, extent = _with_item(p.start, dim, low - offset), _with_item(p.size, dim, high - low)
                pieces.append(replace(p, start=start, size=extent, disk_start=begin))
        parts.append(_Symbol(_with_item(symbol.shape, dim, size), tuple(pieces)))
        offset += size
    return parts


def _swapped(symbol: _Symbol, first: int, second: int) -> _Symbol:
    """Transpose two dimensions of a tensor."""
    order = list(range(len(symbol.shape)))
    order[first], order[second] = order[second], order[first]
    pieces = [
        replace(
            p, start=tuple(p.start[i] for i in order), size=tuple(p.size[i] for i in order), axes=tuple(p.axes[i] for i in order)
        )
        for p in symbol.pieces
    ]
    return _Symbol(tuple(symbol.shape[i] for i in order), tuple(pieces))


def _with_item(values: Shape, index: int, value: int) -> Shape:
    """Return a shape with another value at one index."""
    return (*values[:index], value, *values[index % len(values) + 1 :])


# Parts of a multimodal model before its text decoder, whose layers are numbered too.
_TOWER = re.compile(
    r"(^|\.)(vision|visual|vit|image|audio|speech|sound|multi_modal|mm|connector|aligner|merger)[^.]*\.|projector"
)


def is_tower(name: str) -> bool:
    """Return whether a tensor, by its name, belongs to an encoder of another modality or to a projector behind one."""
    return bool(_TOWER.search(name))


@dataclass(frozen=True)
class Layout:
    """The layer stack of a decoder-only model.

    Attributes:
        prefix: Text before a layer's number, including the dot: "model.layers.".
        depth: Number of layers.
        names: All tensor names.
    """

    prefix: str
    depth: int
    names: tuple[str, ...]

    @classmethod
    def from_config(cls, names: Iterable[str], config: Mapping[str, object]) -> Layout:
        """Find the layer stack: the shortest prefix with the numbers 0 to depth - 1, except in towers of other modalities.

        Tensors with higher numbers belong to no layer. They predict additional tokens, and transformers does not load them.

        Raises:
            WorkbenchError: If there is no such prefix or more than one, as in convolutional or encoder-decoder models.
        """
        names = tuple(names)
        depth = model_depth(config)
        numbers: dict[str, set[int]] = {}
        for name in names:
            for match in re.finditer(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", name):
                numbers.setdefault(name[: match.start()], set()).add(int(match.group()))
        # Numbers behind a number are experts of a layer.
        text = {prefix: n for prefix, n in numbers.items() if not _TOWER.search(prefix) and not re.search(r"(^|\.)\d+\.", prefix)}
        stacks = [prefix for prefix, layers in text.items() if layers == set(range(depth))]
        stacks = stacks or [prefix for prefix, layers in text.items() if layers > set(range(depth))]
        if not depth or not stacks:
            numbered = ", ".join(f"{p}0..{max(n)}" for p, n in sorted(numbers.items())[:3]) or "none"
            expected = f"a stack of {depth} layers" if depth else "a number of layers in config.json"
            raise WorkbenchError(
                f"expected {expected}; numbered tensor names: {numbered}",
                "Layer schedules, edits and growth need a decoder-only model.",
            )
        prefix = min(stacks, key=len)
        if others := [stack for stack in stacks if stack != prefix and stack.count(".") == prefix.count(".")]:
            raise WorkbenchError(
                f"expected one stack of {depth} layers, found {len(others) + 1}: {', '.join(sorted([prefix, *others])[:4])}",
                "Layer schedules, edits and growth need a decoder-only model whose layers are one list.",
            )
        return cls(prefix, depth, names)

    def layer(self, name: str) -> int | None:
        """Return the layer that a tensor belongs to; None for embeddings, final norm and head."""
        number = self.number(name)
        return number if number is not None and number < self.depth else None

    def number(self, name: str) -> int | None:
        """Return the layer of a tensor; layers that predict additional tokens stand behind the last one."""
        number = name[len(self.prefix) :].partition(".")[0]
        return int(number) if name.startswith(self.prefix) and number.isdigit() else None

    def position(self, name: str) -> float:
        """Return a tensor's relative depth: 0 for embeddings and towers, 0 to 1 for layers, 1 for final norm and head."""
        layer = self.layer(name)
        if layer is None:
            return 0.0 if is_before_layers(name) or _TOWER.search(name) else 1.0
        return layer / (self.depth - 1) if self.depth > 1 else 0.0

    def group(self, name: str) -> str:
        """Return the part of the model that a tensor belongs to: "embeddings", "layers", "norm" (final norm), "head" or "tower"."""
        if self.number(name) is not None:
            return "layers"
        if _TOWER.search(name):
            return "tower"
        if is_before_layers(name):
            return "embeddings"
        return "head" if is_head_module(name.rpartition(".")[0]) else "norm"

    def in_layer(self, layer: int) -> list[str]:
        """Return the tensors of one layer, in file order."""
        return [name for name in self.names if self.layer(name) == layer]

    def mlp_out(self, layer: int) -> str:
        """Return the weight of the layer's feed-forward down-projection."""
        return self._single_weight(layer, MLP_OUT, "feed-forward down-projection")

    def edited(self) -> dict[int, str]:
        """Return layer -> the weight that edits change: a feed-forward down-projection, or in a mixture that of a shared expert."""
        has_states = any(re.search(r"\.(linear_attn|mamba)\.", name) for name in self.names)
        found = {
            layer: self._weights_matching(layer, MLP_OUT) or ([] if has_states else self._weights_matching(layer, SHARED_OUT))
            for layer in range(self.depth)
        }
        return {layer: names[0] for layer, names in found.items() if names}

    def attention_out(self, layer: int) -> str:
        """Return the weight of the layer's attention output projection."""
        return self._single_weight(layer, ATTENTION_OUT, "attention output projection")

    def residual_writers(self, layer: int) -> list[str]:
        """Return all tensors, including biases, through which a layer adds to the residual stream.

        Raises:
            WorkbenchError: If no known tensor is the output of a part of the layer.
        """
        inside = {name: name.removeprefix(f"{self.prefix}{layer}.") for name in self.in_layer(layer)}
        writers = [name for name, inner in inside.items() if MIXER_WRITERS.search(inner) or self.is_ffn_out(name)]
        # A part is a module with matrices inside; norms have no modules inside.
        parts = {n.partition(".")[0] for n in inside.values() if n.endswith(".weight") and n.count(".") > 1}
        if unknown := sorted(parts - {inside[name].partition(".")[0] for name in writers}):
            raise WorkbenchError(
                f"layer {layer}: no known tensor is the output of {unknown[0]} to the residual stream",
                "Report this architecture: workbench/models/layout.py lacks its names.",
            )
        return writers

    def is_ffn_out(self, name: str) -> bool:
        """Return whether a tensor of a layer is the output of a feed-forward part or of experts."""
        return bool(FFN_WRITERS.search(name.removeprefix(f"{self.prefix}{self.number(name)}.")))

    def _single_weight(self, layer: int, pattern: re.Pattern[str], description: str) -> str:
        """Return the only weight of a layer whose module matches a pattern."""
        weights = self._weights_matching(layer, pattern)
        if len(weights) != 1:
            experts = next(
                (
                    f"; the layer is a mixture of experts ({n})"
                    for n in self.in_layer(layer)
                    if re.search(r"\.(experts|block_sparse_moe)\.", n)
                ),
                "",
            )
            raise WorkbenchError(
                f"layer {layer}: expected one {description}, found {len(weights)} ({', '.join(weights) or 'none'})"
                + ("" if weights else experts),
                "This operation does not support the architecture (mixture of experts, state space or hybrid).",
            )
        return weights[0]

    def _weights_matching(self, layer: int, pattern: re.Pattern[str]) -> list[str]:
        """Return the weights of a layer whose modules match a pattern."""
        start = len(f"{self.prefix}{layer}.")
        return [n for n in self.in_layer(layer) if n.endswith(".weight") and pattern.search(n[start:].removesuffix(".weight"))]


@dataclass(frozen=True)
class Model:
    """Weights with their config.json: the input and the output of every step."""

    weights: Weights
    config: dict[str, Any]

    @cached_property
    def layout(self) -> Layout:
        """The layer stack; see `Layout.from_config`."""
        return Layout.from_config(self.weights.specs, self.config)

    def logits_bytes(self, tokens: int) -> int:
        """Return the bytes of the logits of a number of tokens in float32, taking the tallest matrix for the embeddings."""
        return 4 * tokens * max((spec.shape[0] for spec in self.weights.specs.values() if len(spec.shape) == 2), default=0)

    def layer_of(self, name: str) -> int | None:
        """Return the layer of a tensor; None for a tensor outside the layers, and for all tensors of a model without a single stack."""
        try:
            return self.layout.layer(name)
        except WorkbenchError:
            return None


def stack_prefix(model: PreTrainedModel, depth: int) -> str:
    """Return the name of the live model's list of decoder layers: the list with `depth` modules that is nearest to the root.

    Lists in the text decoder come first, because an encoder of images or audio can have as many layers.
    """
    stacks: list[str] = [name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if not stacks:
        raise WorkbenchError(
            f"{type(model).__name__}: no list of {depth} decoder layers",
            "Use a method without calibration texts for this architecture.",
        )
    inside = in_decoder(model)
    return min(stacks, key=lambda name: (not inside(name), len(name.split("."))))


def in_decoder(model: torch.nn.Module) -> Callable[[str], bool]:
    """Return a function that tells whether a module's name lies in the text decoder of a live model, as transformers names it."""
    try:
        decoder = getattr(model, "get_decoder", lambda: None)()
    except (AttributeError, NotImplementedError, ValueError):  # some models have none
        decoder = None
    prefix = next((name for name, module in model.named_modules() if module is decoder), None)
    return lambda name: prefix is not None and name.startswith(f"{prefix}." if prefix else "")
