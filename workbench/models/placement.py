"""The place of every tensor on disk in the live transformers model, for architectures that transformers renames or fuses.

transformers 5 has a list of renamings and operations for each architecture (stacked experts, joined projections). This module applies it
to shapes only, without loading weights. It supports stacking, concatenation, splitting and transposition; tensors that other operations
make are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from workbench.errors import WorkbenchError
from workbench.models.skeleton import groups_of, skeleton
from workbench.weights.specs import TensorSpec

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


def live_layout(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> LiveLayout | None:
    """Return the layout of the live model that transformers builds; None for an architecture that it does not know.

    Args:
        specs: The base's tensors.
        config: The base's config.json.
    """
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
        elif type(operation) is Transpose:
            ordered = [[_swapped(symbol, operation.dim0, operation.dim1) for symbol in group] for group in ordered]
        elif type(operation) in (Chunk, Split) and len(ordered) == 1 and getattr(operation, "num_shards_attribute", None) is None:
            combined = ordered[0][0]
            if type(operation) is Split:
                sizes = [shapes[name][operation.dim] for name in names]
            else:
                sizes = [combined.shape[operation.dim] // len(targets)] * len(targets)
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
