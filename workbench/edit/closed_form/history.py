"""The history of a stream of batches at one layer: the facts behind each written key, and the metric that preserves their outputs.

With the text's term M = G⁻¹, ridge μ and the keys H that earlier batches have written, a batch with keys K and wanted changes R takes

    ΔW = R Kᵀ (M + H Hᵀ/μ + K Kᵀ/μ)⁻¹/μ,

which is the minimum of ‖ΔW K − R‖² + ‖ΔW H‖² + μ tr(ΔW M ΔWᵀ): outputs of H stay. An update writes a new value for a fact whose key h is
in H. Its old value must not be preserved: otherwise ‖ΔW h‖² holds ΔW h near 0 where the update wants R, and about half of the change
is written. Before the batch, h and the differences of its single keys therefore leave the sum: H Hᵀ − h hᵀ. The sum without them is still
at least M, so this downdate is exact and as well conditioned as the sum itself (`KeyMetric.without_all`). If outputs of H must stay exactly
(μ = 0), H spans directions that are closed, and h cannot be subtracted; the metric is then built again from the other keys. After the batch,
the key of the new value joins H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.edit.closed_form.lookup import Group
from workbench.edit.closed_form.solver import CHUNK, KeyMetric
from workbench.edit.closed_form.values import Values
from workbench.edit.places.parts import Position
from workbench.facts.facts import Fact
from workbench.ground.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class History:
    """The facts and keys of earlier batches at one layer.

    Attributes:
        start: Metric before the first batch.
        position: Token at which facts are looked up.
        ridge: μ of the keys.
        spread_ridge: μ of the differences of single keys from their mean.
        preserves: Whether keys of earlier batches are preserved.
        metric: Metric with the keys that are preserved now.
        facts: Name of a key -> prompt -> fact, for the facts that share its value.
        values: Name of a key -> its value, if it is preserved.
    """

    start: KeyMetric
    position: Position
    ridge: float
    spread_ridge: float
    preserves: bool
    metric: KeyMetric = field(init=False)
    facts: dict[str, dict[str, Fact]] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metric = self.start

    def groups(self, batch: Sequence[Fact]) -> list[Group]:
        """Group a batch's facts that share a value; of two values of one prompt the later one counts.

        Facts about one subject share a value if they are looked up at the subject. Those that are written already belong to the
        group, because the new value replaces theirs.
        """
        groups: dict[str, dict[str, Fact]] = {}
        for fact in batch:
            name = self._name(fact)
            groups.setdefault(name, dict(self.facts.get(name, {})))[fact.text] = fact
        return [tuple(group.values()) for group in groups.values()]

    def new(self, group: Group) -> list[Fact]:
        """Return the facts of a group that are not written yet, or with another target."""
        written = self.facts.get(self._name(group[0]), {})
        return [fact for fact in group if fact.text not in written or written[fact.text].target != fact.target]

    def release(self, groups: Sequence[Group]) -> KeyMetric:
        """Take the keys that a batch replaces out of the metric, and return it."""
        names = [name for group in groups if (name := self._name(group[0])) in self.values]
        if not names:
            return self.metric
        replaced = Values([file for name in names for file in self.values.pop(name).files])
        if self.ridge and self.spread_ridge:
            metric = self.metric.without_all(key_differences(replaced), self.spread_ridge)
            self.metric = metric.without_all(columns(replaced.rows("key")), self.ridge)
        else:
            self.metric = self._added(self.start, Values([file for value in self.values.values() for file in value.files]))
        return self.metric

    def preserve(self, groups: Sequence[Group], solutions: Values) -> None:
        """Add the keys of facts that other edits have written before the first batch, and preserve their outputs."""
        for number, group in enumerate(groups):
            self.facts[self._name(group[0])] = {fact.text: fact for fact in group}
            self.values[self._name(group[0])] = solutions.subset([number])
        self.metric = self._added(self.metric, solutions)

    def add(self, groups: Sequence[Group], solutions: Values) -> None:
        """Add the keys of a batch that is written."""
        if self.preserves:
            self.preserve(groups, solutions)
            return
        for group in groups:
            self.facts[self._name(group[0])] = {fact.text: fact for fact in group}

    def _added(self, metric: KeyMetric, solutions: Values) -> KeyMetric:
        """Return a metric with the keys of some values, and the differences of single keys from them."""
        if not len(solutions):
            return metric
        with_spread = metric.after_all(key_differences(solutions), self.spread_ridge)
        return with_spread.after_all(columns(solutions.rows("key")), self.ridge)

    def _name(self, fact: Fact) -> str:
        """Return the name of the key of a fact."""
        return fact.subject if self.position == "subject_last" and fact.subject else f"\0{fact.text}"


def columns(rows: Tensor) -> Iterator[Tensor]:
    """Yield rows [n, d] as columns [d, ·], `CHUNK` at a time."""
    return (part.T for part in torch.split(rows, CHUNK))


def key_differences(solutions: Values) -> Iterator[Tensor]:
    """Yield the differences of single keys from their means, as columns [d, ·] of a few values at a time, without zero rows."""
    for start in range(0, len(solutions), CHUNK):
        rows = torch.cat([value.spread for value in solutions.subset(range(start, min(len(solutions), start + CHUNK)))])
        if len(rows := rows[rows.any(1)]):
            yield rows.T
