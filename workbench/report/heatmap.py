"""Heat maps of a brick by layer and kind of module, one map per measure, as a self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from workbench.files import write_bytes
from workbench.library.measure import Measures
from workbench.report.numbers import MISSING, signed
from workbench.report.page import asset
from workbench.report.svg import joined, svg

HEIGHT, GAP, TOP = 24, 2, 22
# With more columns than this, cells are narrow and only the hover text shows their numbers.
WIDE_COLUMNS = 24
NARROWEST = 360
PALEST, DARKEST = 0.04, 0.7


@dataclass(frozen=True)
class Map:
    """One heat map with its texts."""

    title: str
    caption: str
    low: str
    high: str
    scale: str
    drawing: Markup
    width: int
    ends: str


@dataclass(frozen=True)
class HeatMeasure:
    """A measure that a map shows, and its tints."""

    title: str
    caption: str
    value: Callable[[dict[str, Any]], float | None]
    text: Callable[[float], str]
    tint: str
    """Style class of values above the middle."""
    least: float = 0.0
    """Minimum distance from the middle for the darkest tint; a value that is farther away raises it."""
    middle: float = 0.0
    below: str = "down"
    """Style class of values below the middle."""


def render_heat_maps(name: str, base: str, measures: Measures, out: Path) -> Path:
    """Write a self-contained page that makes no request, and return its path."""
    others = list(measures.total.meetings)
    columns, rows = _totals(name, measures)
    return write_maps(
        out,
        title=f"{name} compared with {', '.join(others)}" if others else name,
        eyebrow=f"brick on {Path(base).name if Path(base).is_absolute() else base}",
        lead=_lead(measures),
        columns=columns,
        rows=rows,
        groups=[[_map(measures, metric) for metric in group] for group in _metrics(others)],
    )


def write_maps(
    out: Path, *, title: str, eyebrow: str, lead: str, columns: list[str], rows: list[list[str]], groups: list[list[Map]]
) -> Path:
    """Write a self-contained page with a table and heat maps below it, and return its path."""
    env = Environment(loader=PackageLoader("workbench.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    style = Markup(asset("report.css"))  # noqa: S704 - a file of this package
    text = env.get_template("heatmap.html.j2").render(
        title=title, eyebrow=eyebrow, lead=lead, columns=columns, rows=rows, groups=groups, style=style
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, text.encode())
    return out


def _lead(measures: Measures) -> str:
    layers = [layer for layer in measures.layers if layer is not None]
    return (
        f"{len(measures.tensors)} tensors in {len(layers)} layers differ from the base. "
        "Norm: Frobenius norm ‖Δ‖ of the difference. Relative: this norm divided by the norm of the same tensors of the base."
    )


def _totals(name: str, measures: Measures) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table above the maps."""
    total = measures.total.document()
    others = total["others"]
    columns = ["brick", "norm", "relative", "zeros"]
    rows = [[name, *_sizes(total)]]
    if others:
        columns += ["cosine", "opposite signs", "output overlap", "input overlap", "chance overlap"]
        rows[0] += [""] * 5
        for other, m in others.items():
            similarity = [_percent(m[key]) for key in ("conflict", "overlap_out", "overlap_in", "chance")]
            rows.append([other, *_sizes(m), MISSING if m["cosine"] is None else signed(m["cosine"], 3), *similarity])
    return columns, rows


def _sizes(sums: dict[str, Any]) -> list[str]:
    return [f"{sums['norm']:.4g}", _percent(sums["relative"]), _percent(sums["zeros"])]


def _metrics(others: list[str]) -> list[list[HeatMeasure]]:
    """Return the brick's own maps, then the maps of its similarity to each other brick."""
    caption = "‖Δ‖ divided by the norm of the same weights of the base, in percent."
    norm = HeatMeasure("Relative norm", caption, lambda d: d["relative"], _number, "up")
    return [[norm], *map(_similarity_maps, others)]


def _similarity_maps(other: str) -> list[HeatMeasure]:
    """Return the maps of the brick's similarity to another brick."""

    def of(key: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda d: d["others"].get(other, {}).get(key)

    return [
        HeatMeasure(
            f"Cosine with {other}",
            "⟨Δ, Δ′⟩ / ‖Δ‖‖Δ′‖: 1 is the same direction, 0 unrelated, −1 opposite.",
            of("cosine"),
            _signed,
            "up",
            0.05,
        ),
        HeatMeasure(
            f"Sign conflict with {other}",
            "Share of the elements changed by both bricks that have opposite signs, in percent; unrelated bricks have 50.",
            of("conflict"),
            _number,
            "down",
            0.05,
            0.5,
            "up",
        ),
        HeatMeasure(
            f"Overlap of subspaces with {other}",
            "Mean squared cosine of the principal angles between the leading singular subspaces of outputs and inputs, in percent.",
            of("overlap"),
            _number,
            "up",
            0.05,
        ),
    ]


def _map(measures: Measures, metric: HeatMeasure) -> Map:
    """Return the heat map of one measure."""
    documents = {place: sums.document() for place, sums in measures.cells.items()}
    values = {place: v for place, d in documents.items() if (v := metric.value(d)) is not None}
    top = max([metric.least, *(abs(v - metric.middle) for v in values.values())]) or 1.0
    kinds = [kind for kind in measures.kinds if any(k == kind and layer is not None for layer, k in values)]
    layers = [layer for layer in measures.layers if layer is not None]
    ends = ", ".join(f"{end} {metric.text(values[None, end])}" for end in measures.ends if (None, end) in values)
    both = metric.middle > 0 or any(v < 0 for v in values.values())
    low = metric.text(metric.middle - top if both else 0.0)
    drawing, width = drawing_of(values, kinds, layers, metric, top)
    scale = f"both {metric.tint}" if both else metric.tint
    return Map(metric.title, metric.caption, low, metric.text(metric.middle + top), scale, drawing, max(width, NARROWEST), ends)


def drawing_of(
    values: Mapping[tuple[int | None, str], float],
    kinds: Sequence[str],
    layers: Sequence[int],
    metric: HeatMeasure,
    top: float,
    notes: Mapping[tuple[int | None, str], str] | None = None,
) -> tuple[Markup, int]:
    """Draw a heat map with one row per kind and one column per layer.

    Args:
        values: Value by (layer, kind); a missing value means that nothing was changed there.
        kinds: Kinds of module, the rows.
        layers: Layers, the columns.
        metric: Format and tint of a value.
        top: Distance from the metric's middle that has the darkest tint.
        notes: Additional hover text by (layer, kind).

    Returns:
        The drawing and its width in pixels.
    """
    cells = _Cells(metric, top, len(layers) <= WIDE_COLUMNS)
    width = cells.width
    left = 7 * max((len(kind) for kind in kinds), default=1) + 12
    parts = []
    for j, layer in enumerate(layers):
        if cells.wide or layer % 5 == 0:
            parts.append(svg("text", str(layer), class_="l", x=left + j * width + width / 2, y=TOP - 8))
    for i, kind in enumerate(kinds):
        y = TOP + i * HEIGHT
        parts.append(svg("text", kind, class_="k", x=left - 8, y=y + HEIGHT / 2 + 3))
        for j, layer in enumerate(layers):
            x = left + j * width
            note = (notes or {}).get((layer, kind), "")
            parts.append(cells.draw(values.get((layer, kind)), f"layer {layer}, {kind}", x, y, note))
    across = left + len(layers) * width
    down = TOP + len(kinds) * HEIGHT
    return svg("svg", joined(*parts), class_="heat", width=across, height=down, role="img", aria_label=metric.title), across


@dataclass(frozen=True)
class _Cells:
    """The cells of a heat map.

    Attributes:
        metric: Format and tint of a value.
        top: Distance from the metric's middle that has the darkest tint.
        wide: Whether a cell has room for its number.
    """

    metric: HeatMeasure
    top: float
    wide: bool

    @property
    def width(self) -> int:
        """Distance from one cell to the next, in pixels."""
        return 46 if self.wide else 18

    def draw(self, value: float | None, where: str, x: float, y: float, note: str) -> Markup:
        """Draw one cell with its hover text, and its number if cells are wide."""
        metric, across = self.metric, self.width - GAP
        box: dict[str, Any] = {"x": x, "y": y, "width": across, "height": HEIGHT - GAP, "rx": 2}
        if value is None:
            return svg("g", joined(svg("title", f"{where}: not changed"), svg("rect", class_="none", **box)))
        tint = PALEST + (DARKEST - PALEST) * min(1.0, abs(value - metric.middle) / self.top)
        parts = [
            svg("title", f"{where}: {metric.text(value)}{note}"),
            svg("rect", class_=metric.tint if value >= metric.middle else metric.below, style=f"--a: {tint:.3f}", **box),
        ]
        if self.wide:
            parts.append(svg("text", metric.text(value), class_="v", x=x + across / 2, y=y + HEIGHT / 2 + 3))
        return svg("g", joined(*parts))


def _number(value: float) -> str:
    percent = 100 * value
    return f"{percent:.0f}" if percent >= 99.5 or percent == 0 else f"{percent:.2g}"


def _signed(value: float) -> str:
    return signed(value, 2)


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.3g} %"
