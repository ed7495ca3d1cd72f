"""Sums over the tensors that bricks change, which can be added up, and the measures that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from workbench.ground.results import JsonObject, Number

NORMAL = 1.96
"""Standard errors from the middle to the ends of a 95 % interval."""


class DeltaMeasures(JsonObject):
    """Measures of a delta over one or more tensors."""

    norm: Number
    """Norm of the delta."""
    relative: Number | None
    """Norm of the delta over the norm of the base's tensors; null if the base's tensors are zero."""
    zeros: Number | None
    """Share of elements of the delta that are exactly zero, from 0 to 1."""
    elements: int
    """Number of elements."""


class OtherBrick(DeltaMeasures):
    """Measures of another brick's delta, and of its relation to the shown brick's."""

    cosine: Number | None
    """Cosine of the two deltas."""
    conflict: Number | None
    """Share of elements with opposite signs among those that both bricks change."""
    overlap_out: Number | None
    """Overlap of the output subspaces, from 0 to 1."""
    overlap_in: Number | None
    """Overlap of the input subspaces, from 0 to 1."""
    overlap: Number | None
    """Mean of both overlaps."""
    chance: Number | None
    """Overlap that unrelated subspaces of the same sizes have on average."""


class Sums(DeltaMeasures):
    """Measures of the shown brick's delta, compared with other bricks."""

    others: dict[str, OtherBrick]
    """Other brick -> its measures; empty if no other brick is named."""


class LayerMeasures(Sums):
    """Measures of one layer."""

    layer: int | None
    """The layer, from 0; null for the tensors outside the layers."""


class CellMeasures(LayerMeasures):
    """Measures of one kind of module in one layer."""

    kind: str
    """Name of the module within its layer, or the tensor's name outside the layers."""


class TensorMeasures(Sums):
    """Measures of one tensor."""

    name: str
    """Name of the tensor."""


class BrickMeasures(JsonObject):
    """Measures of a brick's delta on its base."""

    total: Sums
    """Measures over all tensors."""
    layers: list[LayerMeasures]
    """Measures by layer."""
    cells: list[CellMeasures]
    """Measures by layer and kind of module."""
    tensors: list[TensorMeasures]
    """Measures by tensor."""


@dataclass
class Delta:
    """Sums over the tensors that a brick changes, which can be added up."""

    square: float = 0.0
    """‖Δ‖² of the delta."""
    base: float = 0.0
    """‖θ₀‖² of the same tensors of the base."""
    zeros: int = 0
    """Number of zeros in the delta."""
    numel: int = 0
    """Number of elements."""

    @property
    def relative(self) -> float | None:
        """Norm of the delta over that of the base's tensors; None if these are zero."""
        return _ratio(math.sqrt(self.square), math.sqrt(self.base))

    def measured(self) -> DeltaMeasures:
        """Return the measures that follow from the sums."""
        norm, zeros = math.sqrt(self.square), _ratio(self.zeros, self.numel)
        return DeltaMeasures(norm=norm, relative=self.relative, zeros=zeros, elements=self.numel)


@dataclass
class Meeting(Delta):
    """The delta of another brick, compared with the measured brick's."""

    dot: float = 0.0
    """Inner product of the two deltas."""
    opposite: int = 0
    """Number of elements where both deltas are nonzero with opposite signs."""
    both: int = 0
    """Number of elements where both deltas are nonzero."""
    outputs: list[float] = field(default_factory=list)
    """Overlap of the output subspaces, per tensor."""
    inputs: list[float] = field(default_factory=list)
    """Overlap of the input subspaces, per tensor."""
    chance: list[float] = field(default_factory=list)
    """Expected overlap of unrelated subspaces, per tensor and side."""
    overlap_variance: float = 0.0
    """Sum of the variances of the overlaps of unrelated subspaces, over tensors and sides."""
    dot_variance: float = 0.0
    """Variance of the inner product with an unrelated delta of the same norm."""

    @property
    def conflict(self) -> float | None:
        """Share of elements with opposite signs among those that both bricks change; None if there are none."""
        return _ratio(self.opposite, self.both)

    def by_chance(self, square: float) -> dict[str, tuple[float, float]]:
        """Return the ranges of cosine, conflict and overlap that have 95 % of unrelated deltas: those in random directions.

        In n elements, the inner product of a delta with one of random direction has the variance ‖Δ‖²‖Δ′‖² / n, and a sign differs with
        probability 1/2. The squared cosines of random subspaces of r and r′ of d dimensions have the sum r·r′/d with the variance
        2·r·r′·(d − r)·(d − r′) / (d²·(d − 1)·(d + 2)).

        Args:
            square: ‖Δ‖² of the measured brick.
        """
        bands = {}
        if norms := math.sqrt(square * self.square):
            half = NORMAL * math.sqrt(self.dot_variance) / norms
            bands["cosine"] = (-half, half)
        if self.both:
            half = NORMAL * 0.5 / math.sqrt(self.both)
            bands["conflict"] = (0.5 - half, 0.5 + half)
        if self.chance:
            mean, half = sum(self.chance) / len(self.chance), NORMAL * math.sqrt(self.overlap_variance) / len(self.chance)
            bands["overlap"] = (max(0.0, mean - half), mean + half)
        return bands


@dataclass
class DeltaSums(Delta):
    """The measures of a brick over one or more tensors, with comparisons to other bricks."""

    tensors: int = 0
    """Number of tensors."""
    meetings: dict[str, Meeting] = field(default_factory=dict)
    """Name of another brick -> comparison with it."""

    def add(self, other: DeltaSums) -> None:
        """Add the sums of another part."""
        for name in ("square", "base", "zeros", "numel", "tensors"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for brick, other_meeting in other.meetings.items():
            meeting = self.meetings.setdefault(brick, Meeting())
            for part in fields(Meeting):
                setattr(meeting, part.name, getattr(meeting, part.name) + getattr(other_meeting, part.name))

    def cosine(self, brick: str) -> float | None:
        """Return the cosine of the delta with another brick's; None if one of them is zero."""
        meeting = self.meetings[brick]
        return _ratio(meeting.dot, math.sqrt(self.square * meeting.square))

    def measured(self) -> Sums:
        """Return the measures that follow from the sums, of the brick and of each other one."""
        others = {
            brick: OtherBrick(
                **dict(Delta.measured(m)),
                cosine=self.cosine(brick),
                conflict=m.conflict,
                overlap_out=_mean(m.outputs),
                overlap_in=_mean(m.inputs),
                overlap=_mean([*m.outputs, *m.inputs]),
                chance=_mean(m.chance),
            )
            for brick, m in self.meetings.items()
        }
        return Sums(**dict(Delta.measured(self)), others=others)


@dataclass(frozen=True)
class Measures:
    """The measures of a brick on its base.

    Attributes:
        tensors: Changed tensor -> sums.
        layers: Layer -> sums; the key None stands for tensors outside the layers.
        cells: (layer, kind of module) -> sums; the kind is the part of the name after the layer's number.
        kinds: Kinds inside the layers, in file order.
        ends: Names of tensors outside the layers, in file order.
        total: Sums over all tensors.
    """

    tensors: dict[str, DeltaSums]
    layers: dict[int | None, DeltaSums]
    cells: dict[tuple[int | None, str], DeltaSums]
    kinds: list[str]
    ends: list[str]
    total: DeltaSums

    def measured(self) -> BrickMeasures:
        """Return the measures that follow from the sums, as `brick show --json` prints them."""
        return BrickMeasures(
            total=self.total.measured(),
            layers=[LayerMeasures(**dict(sums.measured()), layer=layer) for layer, sums in self.layers.items()],
            cells=[CellMeasures(**dict(sums.measured()), layer=layer, kind=kind) for (layer, kind), sums in self.cells.items()],
            tensors=[TensorMeasures(**dict(sums.measured()), name=name) for name, sums in self.tensors.items()],
        )


def _ratio(part: float, total: float) -> float | None:
    return part / total if total else None


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
