"""Heat maps of a trace: layers by places in the prompt, one map for block outputs and one for feed-forward outputs."""

from __future__ import annotations

from pathlib import Path

from workbench.edit.places.tracing import PLACES, Place, What
from workbench.library.trace import OUTPUTS, WORDS, TraceTable
from workbench.report.heatmap import NARROWEST, HeatMeasure, Map, drawing_of, write_maps

LEAD = (
    "Each prompt is run with another fact's subject in place of its own, and one layer's states are restored to those of the clean run. "
    "Shown: how much of the lost probability of the model's own answer comes back. A trace tells where states carry a fact, not at which "
    "layer an edit works best: that is what a sweep of edits finds, and this page decides nothing."
)


def render_trace(table: TraceTable, out: Path) -> Path:
    """Write the page and return its path. The file is replaced whole, needs no other file and makes no request."""
    found = table.traces["block"]
    row = [Path(table.file).name, str(found.facts), f"{found.clean:.3f}", f"{found.corrupted:.3f}"]
    return write_maps(
        out, title=f"Where {table.model} looks facts up", eyebrow="causal trace", lead=LEAD,
        columns=["facts", "traced", "probability of the answer", "with another subject"], rows=[row],
        groups=[[_map(table, what)] for what in OUTPUTS])  # fmt: skip


def _map(table: TraceTable, what: What) -> Map:
    places: list[tuple[int, Place]] = [(layer, place) for layer in table.layers for place in PLACES]
    values: dict[tuple[int | None, str], float] = {
        (layer, WORDS[place]): table.traces[what].recovered[layer][place] for layer, place in places
    }
    notes: dict[tuple[int | None, str], str] = {
        (layer, WORDS[place]): f" %{_interval(table.interval(what, layer, place))}" for layer, place in places
    }
    top = max(1.0, *(abs(value) for value in values.values()))
    both = any(value < 0 for value in values.values())
    metric = HeatMeasure(OUTPUTS[what].capitalize(), "", lambda _: None, _percent, "up")
    drawing, width = drawing_of(values, list(WORDS.values()), table.layers, metric, top, notes)
    caption = (
        f"Share of the answer's probability that comes back when one layer's {OUTPUTS[what]} are restored there, in percent."
    )
    return Map(
        metric.title, caption, _percent(-top if both else 0.0), _percent(top), "both up" if both else "up", drawing,
        max(width, NARROWEST), "")  # fmt: skip


def _percent(value: float) -> str:
    return f"{100 * value:.0f}".replace("-", "−")


def _interval(found: tuple[float, float] | None) -> str:
    return f" [{_percent(found[0])}, {_percent(found[1])}]" if found else ""
