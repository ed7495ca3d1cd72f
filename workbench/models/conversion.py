"""One checkpoint under the tensor names of another of the same architecture, through transformers' own conversion.

The hub and transformers name, prefix and fuse weights in several ways: `h.0.…` and `transformer.h.0.…`,
`experts.3.w1.weight` one by one and `experts.gate_up_proj` [experts, rows, cols] in one tensor. transformers maps every one of
them to its live model. Here two such maps are composed: a tensor of the base is read from the rows of the brick's tensors that
stand for the same rows of the live model. Nothing is converted in memory; rows are read from where they lie.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.models.skeleton import groups_of, skeleton
from workbench.weights.specs import Source, TensorSpec, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A row's number: the tensor's place in the list of names above the low bits, the row in them.
_ROW_BITS = 40
_ROW_MASK = (1 << _ROW_BITS) - 1


@dataclass(frozen=True)
class RowRun:
    """Consecutive rows of a tensor on disk that are consecutive rows of a live tensor.

    Attributes:
        live: First row in the live tensor.
        name: Tensor on disk.
        row: First row there.
        count: Number of rows.
    """

    live: int
    name: str
    row: int
    count: int


def live_names(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Tensor on disk -> the live model's tensors that it becomes, or is a part of; none where the model has no place for it."""
    found: dict[str, list[str]] = {name: [] for name in specs}
    for live, runs in live_runs(config, specs).items():
        for name in dict.fromkeys(run.name for run in runs):
            found[name].append(live)
    return {name: [] if live == [f"?{name}"] else live for name, live in found.items()}


class Aligned:
    """A checkpoint under another's tensor names; implements `Weights`.

    Attributes:
        specs: The tensors that it can give, with their shapes there and its own dtypes.
        missing: Tensors asked for that it lacks, wholly or in part.
        unused: Its own tensors that nothing asks for, wholly or in part.
    """

    def __init__(self, weights: Weights, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> None:
        self._weights = weights
        theirs, mine = live_runs(config, specs), live_runs(config, weights.specs)
        self._parts: dict[str, list[tuple[int, RowRun]]] = {name: [] for name in specs}
        self.specs: dict[str, TensorSpec] = {}
        left = {name: spec.rows for name, spec in weights.specs.items()}
        self._whole = _one_to_one(theirs, mine)
        for live, runs in theirs.items():
            for want in runs:
                self._parts[want.name].extend(_overlap(want, mine.get(live, [])))
        for name, spec in specs.items():
            self._parts[name].sort(key=lambda part: part[0])
            sources = [weights.specs[run.name] for _, run in self._parts[name]]
            if name in self._whole and sources and len(sources[0].shape) == len(spec.shape):
                self.specs[name] = sources[0]  # a tensor under another name, in its own shape, which may not fit
                left[self._whole[name]] = 0
            elif sum(run.count for _, run in self._parts[name]) == spec.rows and {s.cols for s in sources} == {spec.cols}:
                self.specs[name] = TensorSpec(spec.shape, sources[0].dtype)
                for _, run in self._parts[name]:
                    left[run.name] -= run.count
        self.missing = [name for name in specs if name not in self.specs]
        self.unused = [name for name, rows in left.items() if rows > 0]

    def origin(self, name: str) -> str | None:
        """Every tensor stands for itself."""
        return name

    def sources(self, name: str) -> list[str]:
        """The stored tensors that a tensor is read from."""
        return [run.name for _, run in self._parts[name]]

    def open(self, name: str, device: torch.device) -> Source:
        """A reader of one tensor, over those that hold its rows."""
        if name in self._whole:
            return self._weights.open(self._whole[name], device)
        return _RunRows(self._parts[name], partial(self._weights.open, device=device))


class _RunRows:
    """Rows from several tensors. One is open at a time: a fused tensor may stand for hundreds, each with a buffer of its own."""

    def __init__(self, parts: list[tuple[int, RowRun]], opener: Callable[[str], Source]) -> None:
        self._parts = parts
        self._opener = opener
        self._current: tuple[str, Source] | None = None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        after = bisect_right(self._parts, start, key=lambda part: part[0])
        for first, run in self._parts[max(0, after - 1) :]:
            low, high = max(start, first), min(stop, first + run.count)
            if low >= high:
                break
            if self._current is None or self._current[0] != run.name:
                self._current = (run.name, self._opener(run.name))
            self._current[1].read(run.row + low - first, run.row + high - first, out[low - start : high - start])


def _one_to_one(theirs: Mapping[str, list[RowRun]], mine: Mapping[str, list[RowRun]]) -> dict[str, str]:
    """Tensors of the one that stand for the same live tensor as a tensor of the other, both alone and for nothing else."""
    counts = [Counter(run.name for runs in side.values() for run in runs) for side in (theirs, mine)]
    pairs = [
        (runs[0].name, mine[live][0].name) for live, runs in theirs.items() if len(runs) == 1 and len(mine.get(live, [])) == 1
    ]
    return {one: two for one, two in pairs if counts[0][one] == 1 and counts[1][two] == 1}


def _overlap(want: RowRun, have: list[RowRun]) -> Iterator[tuple[int, RowRun]]:
    """What `have` holds of the live rows of `want`: (first row in the wanted tensor, where it lies)."""
    for run in have:
        low, high = max(want.live, run.live), min(want.live + want.count, run.live + run.count)
        if low < high:
            yield want.row + low - want.live, RowRun(low, run.name, run.row + low - run.live, high - low)


def live_runs(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, list[RowRun]]:
    """Live tensor -> the rows on disk that it is made of. A tensor without a place in the model stands under "?name"."""
    model = skeleton(json.dumps(config, sort_keys=True))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    names = list(specs)
    place = {name: i for i, name in enumerate(names)}
    runs: dict[str, list[RowRun]] = {}
    for key, transform, members in groups_of(model, names):
        if transform is None:
            if len(members) > 1:
                raise WorkbenchError(
                    f"{' and '.join(name for name, _ in members[:2])} stand for the same weight, {key}", "Save the model again."
                )
            ((name, _),) = members
            runs[key] = [RowRun(0, name, 0, specs[name].rows)]
            continue
        given = [_numbered(place[name], specs[name]) for name, _ in members]
        for (name, pattern), numbers in zip(members, given, strict=True):
            transform.add_tensor(key, name, pattern, numbers)
        made = _converted(transform, key, model, members[0][0])
        _check_moved(given, list(made.values()), key, members[0][0])
        for live, rows in made.items():
            _check_rows(rows, shapes.get(live), live, members[0][0])
            runs[live] = list(_compress(rows.reshape(-1), names))
    return runs


def _converted(transform: Any, key: str, model: PreTrainedModel, example: str) -> dict[str, Tensor]:
    """What transformers makes of the row numbers of one group of tensors."""
    from transformers.core_model_loading import SkipParameters

    try:
        made = transform.convert(key, model=model, config=model.config)
    except (SkipParameters, RuntimeError, ValueError, IndexError, KeyError) as error:
        raise WorkbenchError(
            f"{example}: transformers cannot make {key} of it and its kind ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})",
            "Tensors of that kind are missing or differ in shape: fetch the checkpoint again.",
        ) from None
    return {live: value[0] if isinstance(value, list) else value for live, value in made.items()}


def _check_moved(given: list[Tensor], made: list[Tensor], key: str, example: str) -> None:
    """Every row that went in came out once, unchanged: conversions that compute something cannot be read row by row."""
    before, after = (torch.cat([t.reshape(-1) for t in side]) for side in (given, made))
    if after.dtype != before.dtype or not torch.equal(before.sort().values, after.sort().values):
        raise WorkbenchError(
            f"{example}: transformers computes {key} from it, not only moves it, which is not supported across layouts",
            "Save the brick in the base's layout.",
        )


def _check_rows(rows: Tensor, shape: tuple[int, ...] | None, live: str, example: str) -> None:
    if shape is None or rows.shape == shape or (len(shape) > 1 and rows.shape[:-1] == shape[:-1]):
        return
    if rows.dim() == len(shape) and rows.shape[-1] == 1:
        raise WorkbenchError(
            f"{example} and its kind make {live} [{', '.join(map(str, rows.shape[:-1]))}, …], the model has {list(shape)}",
            "Tensors of that kind are missing or differ in shape: fetch the checkpoint again.",
        )
    raise WorkbenchError(
        f"{example}: transformers makes {live} of it by moving columns, which is not supported across layouts",
        "Save the brick in the base's layout.",
    )


def _numbered(place: int, spec: TensorSpec) -> Tensor:
    """A stand-in with one column that holds, for every row, which row of which tensor it is."""
    shape = (*spec.shape[:-1], 1) if len(spec.shape) > 1 else spec.shape
    return (torch.arange(spec.rows, dtype=torch.int64) + (place << _ROW_BITS)).reshape(shape)


def _compress(numbers: Tensor, names: list[str]) -> Iterator[RowRun]:
    """Runs of consecutive row numbers."""
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
        first = int(numbers[start])
        yield RowRun(start, names[first >> _ROW_BITS], first & _ROW_MASK, stop - start)
