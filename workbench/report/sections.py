"""A section of a page: sentences, a table, small charts and matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workbench.report.chart import Chart
from workbench.report.tints import TintedTable
from workbench.tables import Table


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        id: Anchor.
        title: Heading.
        lead: Sentences below the heading.
        columns: Heads of its table.
        rows: Cells of its table.
        notes: Hover text of a column's head.
        charts: Small charts with the same scales.
        legend: (style class, text) of the charts' lines.
        tables: Matrices of tinted numbers.
        details: Sentences at the end.
    """

    id: str
    title: str
    lead: Sequence[str]
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    charts: Sequence[Chart] = ()
    legend: Sequence[tuple[str, str]] = ()
    tables: Sequence[TintedTable] = ()
    details: Sequence[str] = ()

    def saved(self) -> list[Table]:
        """Return its table and matrices, which the page's buttons save."""
        own = [Table(self.id, self.columns, self.rows)] if self.rows else []
        return [*own, *(Table(f"{self.id}-{t.title}", [t.corner, *t.columns], t.cells) for t in self.tables)]
