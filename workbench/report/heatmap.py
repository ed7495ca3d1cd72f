"""Heat maps of a brick by layer and kind of module, one map per measure, as a self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from workbench.ground.files import write_bytes
from workbench.ground.numbers import MISSING, signed
from workbench.ground.tables import Table
from workbench.merge.measuring.delta_sums import DeltaMeasures, Measures
from workbench.report.chart import joined, svg
from workbench.report.files import with_tables
from workbench.report.page import filled
from workbench.report.tints import BFLOAT16, SCALES, Stop, TintScale, measured, null_reason

HEIGHT, GAP, TOP = 24, 2, 22
# With more columns than this, cells are narrow and only the hover text shows their numbers.
WIDE_COLUMNS = 24
NARROWEST = 360
MapPlace = tuple[int | None, str]
"""Layer and kind of a module; the layer is None outside the layers."""


@dataclass(frozen=True)
class Map:
    """One heat map with its texts.

    Attributes:
        stops: Values of the legend with their tints.
        neutral: Meaning of gray cells; empty if the map has none.
        marked: Cells below the middle have a bar, because their number has no room.
    """

    title: str
    caption: str
    stops: Sequence[Stop]
    neutral: str
    marked: bool
    drawing: Markup
    width: int
    ends: str = ""


@dataclass(frozen=True)
class HeatMeasure:
    """A measure that a map shows, and its fixed scale.

    Attributes:
        title: Heading.
        caption: Sentence below the heading.
        text: Format of a value.
        scale: Tints of values.
        neutral: Meaning of gray cells.
    """

    title: str
    caption: str
    text: Callable[[float], str]
    scale: TintScale
    neutral: str


@dataclass(frozen=True)
class HeatValues:
    """The values of a map by layer and kind.

    Attributes:
        values: The values; a missing one means that nothing was changed there.
        kinds: Kinds of module, the rows.
        layers: Layers, the columns.
        notes: Additional hover text.
        null: Reason of each value that says nothing, as hover text; its cell is gray.
    """

    values: Mapping[MapPlace, float]
    kinds: Sequence[str]
    layers: Sequence[int]
    notes: Mapping[MapPlace, str] = field(default_factory=dict)
    null: Mapping[MapPlace, str] = field(default_factory=dict)

    @property
    def wide(self) -> bool:
        """True if cells have room for their numbers."""
        return len(self.layers) <= WIDE_COLUMNS


def render_heat_maps(name: str, base: str, measures: Measures, out: Path) -> Path:
    """Write a self-contained page that makes no request, and return its path."""
    others = list(measures.total.meetings)
    columns, rows = totals(name, measures)
    return write_maps(
        out,
        title=f"{name} compared with {', '.join(others)}" if others else name,
        eyebrow=f"brick on {Path(base).name if Path(base).is_absolute() else base}",
        lead=_lead(measures),
        columns=columns,
        rows=rows,
        groups=_maps(measures, others),
    )


def write_maps(
    out: Path, *, title: str, eyebrow: str, lead: str, columns: list[str], rows: list[list[str]], groups: list[list[Map]]
) -> Path:
    """Write a self-contained page with a table and heat maps below it, and return its path."""
    context = {"title": title, "eyebrow": eyebrow, "lead": lead, "columns": columns, "rows": rows, "groups": groups}
    out.parent.mkdir(parents=True, exist_ok=True)
    page = filled("heatmap.html.j2", context, ("report.js", "downloads.js"), ("report.css", "heat.css"))
    write_bytes(out, with_tables(page, [Table("totals", columns, rows)]).encode())
    return out


def _lead(measures: Measures) -> str:
    layers = [layer for layer in measures.layers if layer is not None]
    return (
        f"{len(measures.tensors)} tensors in {len(layers)} layers differ from the base. "
        "Norm: Frobenius norm ‖Δ‖ of the difference. Relative: this norm divided by the norm of the same tensors of the base."
    )


def totals(name: str, measures: Measures) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table with one row per brick: measures of its whole delta, and of its similarity to the first brick."""
    total = measures.total.measured()
    others = total.others
    columns = ["brick", "norm", "relative", "zeros"]
    rows = [[name, *_sizes(total)]]
    if others:
        columns += ["cosine", "opposite signs", "output overlap", "input overlap", "chance overlap"]
        rows[0] += [""] * 5
        for other, m in others.items():
            similarity = [_percent(value) for value in (m.conflict, m.overlap_out, m.overlap_in, m.chance)]
            rows.append([other, *_sizes(m), MISSING if m.cosine is None else signed(m.cosine, 3), *similarity])
    return columns, rows


def _sizes(sums: DeltaMeasures) -> list[str]:
    return [f"{sums.norm:.4g}", _percent(sums.relative), _percent(sums.zeros)]


def _maps(measures: Measures, others: Sequence[str]) -> list[list[Map]]:
    """Return the brick's own maps, then the maps of its similarity to each other brick."""
    return [
        [_map(measures, "relative", _own())],
        *([_map(measures, key, m, other) for key, m in _similarity(other)] for other in others),
    ]


def _own() -> HeatMeasure:
    """Return the measure of the brick's own map."""
    return HeatMeasure(
        "Relative norm",
        "‖Δ‖ divided by the norm of the same weights of the base, in percent. The scale is logarithmic.",
        _number,
        SCALES["relative"],
        f"below {100 * BFLOAT16:g}: no more than rounding the weights to bfloat16 changes",
    )


def _similarity(other: str) -> list[tuple[str, HeatMeasure]]:
    """Return the measures of the brick's similarity to another brick, with their keys."""
    chance = "within what 95 % of unrelated deltas of the same size have"
    return [
        (
            "cosine",
            HeatMeasure(
                f"Cosine with {other}",
                "⟨Δ, Δ′⟩ / ‖Δ‖‖Δ′‖: 1 is the same direction, 0 unrelated, −1 opposite.",
                _signed,
                SCALES["cosine"],
                chance,
            ),
        ),
        (
            "conflict",
            HeatMeasure(
                f"Sign conflict with {other}",
                "Share of the elements changed by both bricks that have opposite signs, in percent; unrelated bricks have 50.",
                _number,
                SCALES["conflict"],
                chance,
            ),
        ),
        (
            "overlap",
            HeatMeasure(
                f"Overlap of subspaces with {other}",
                "Mean squared cosine of the principal angles between the leading singular subspaces of outputs and inputs, in percent.",
                _number,
                SCALES["overlap"],
                f"{chance}, or less",
            ),
        ),
    ]


def _map(measures: Measures, key: str, metric: HeatMeasure, other: str | None = None) -> Map:
    """Return the heat map of one measure; `other` is the brick that it compares with."""
    values = {place: v for place, sums in measures.cells.items() if (v := measured(sums, key, other)) is not None}
    null = {place: reason for place in values if (reason := null_reason(measures.cells[place], key, values[place], other))}
    kinds = [kind for kind in measures.kinds if any(k == kind and layer is not None for layer, k in values)]
    layers = [layer for layer in measures.layers if layer is not None]
    ends = ", ".join(f"{end} {metric.text(values[None, end])}" for end in measures.ends if (None, end) in values)
    return drawn(metric, HeatValues(values, kinds, layers, null=null), ends)


def drawn(metric: HeatMeasure, about: HeatValues, ends: str = "") -> Map:
    """Draw a heat map with one row per kind and one column per layer.

    Args:
        metric: Texts, format and scale of the values.
        about: The values.
        ends: Text below the map, with the values outside the layers.
    """
    cells = _Cells(metric, about.wide)
    width = cells.width
    left = 7 * max((len(kind) for kind in about.kinds), default=1) + 12
    parts = []
    for j, layer in enumerate(about.layers):
        if cells.wide or layer % 5 == 0:
            parts.append(svg("text", str(layer), class_="l", x=left + j * width + width / 2, y=TOP - 8))
    for i, kind in enumerate(about.kinds):
        y = TOP + i * HEIGHT
        parts.append(svg("text", kind, class_="k", x=left - 8, y=y + HEIGHT / 2 + 3))
        for j, layer in enumerate(about.layers):
            place = (layer, kind)
            where = f"layer {layer}, {kind}"
            value, note, reason = about.values.get(place), about.notes.get(place, ""), about.null.get(place)
            parts.append(cells.draw(value, where, (left + j * width, y), note, reason))
    across, down = left + len(about.layers) * width, TOP + len(about.kinds) * HEIGHT
    drawing = svg("svg", joined(*parts), class_="heat", width=across, height=down, role="img", aria_label=metric.title)
    stops = metric.scale.legend(metric.text)
    both = any(stop.kind != stops[0].kind for stop in stops)
    neutral = metric.neutral if about.null else ""
    return Map(metric.title, metric.caption, stops, neutral, both and not about.wide, drawing, max(across, NARROWEST), ends)


@dataclass(frozen=True)
class _Cells:
    """The cells of a heat map.

    Attributes:
        metric: Format and scale of a value.
        wide: Whether a cell has room for its number.
    """

    metric: HeatMeasure
    wide: bool

    @property
    def width(self) -> int:
        """Distance from one cell to the next, in pixels."""
        return 46 if self.wide else 18

    def draw(self, value: float | None, where: str, at: tuple[float, float], note: str, reason: str | None) -> Markup:
        """Draw one cell with its hover text, and its number if cells are wide; `reason` makes the cell gray."""
        metric, across = self.metric, self.width - GAP
        x, y = at
        box: dict[str, Any] = {"x": x, "y": y, "width": across, "height": HEIGHT - GAP, "rx": 2}
        if value is None:
            return svg("g", joined(svg("title", f"{where}: not changed"), svg("rect", class_="none", **box)))
        tip = f"{where}: {metric.text(value)}{note}" + (f"; gray: {reason}" if reason else "")
        kind = metric.scale.kind(value)
        look = {"class_": "null"} if reason else {"class_": kind, "style": f"--a: {metric.scale.tint(value):.3f}"}
        parts = [svg("title", tip), svg("rect", **look, **box)]
        if self.wide:
            parts.append(svg("text", metric.text(value), class_="v", x=x + across / 2, y=y + HEIGHT / 2 + 3))
        elif not reason and value < metric.scale.middle:
            parts.append(svg("line", class_="below", x1=x + 4, x2=x + across - 4, y1=y + HEIGHT / 2 - 1, y2=y + HEIGHT / 2 - 1))
        return svg("g", joined(*parts))


def _number(value: float) -> str:
    percent = 100 * value
    return f"{percent:.0f}" if percent >= 99.5 else f"{percent:.2g}"


def _signed(value: float) -> str:
    return signed(value, 2)


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.3g} %"
