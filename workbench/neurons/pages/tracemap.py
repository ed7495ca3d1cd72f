"""Heat maps of a causal trace by layer and position in the prompt, for block outputs and for feed-forward outputs."""

from __future__ import annotations

from pathlib import Path

from workbench.edit.places.knowledge import PLACES, Place, What
from workbench.ground.numbers import fixed
from workbench.neurons.trace import OUTPUTS, WORDS, TraceTable
from workbench.report.heatmap import HeatMeasure, HeatValues, Map, MapPlace, drawn, write_maps
from workbench.report.tints import SCALES, inside

LEAD = (
    "Each prompt is run with the subject of another fact, and the states of one layer are restored to those of the clean run. The maps show "
    "how much of the lost probability of the model's own answer this recovers. A trace shows which states carry a fact. It does not show at "
    "which layer an edit works best; use a sweep of edits to find that layer."
)


def render_trace(table: TraceTable, out: Path) -> Path:
    """Write a self-contained page that makes no request, and return its path."""
    row = [Path(table.file).name, str(table.facts), f"{table.clean:.3f}", f"{table.corrupted:.3f}"]
    return write_maps(
        out,
        title=f"Causal trace of {table.model}",
        eyebrow="causal trace",
        lead=LEAD,
        columns=["facts", "traced", "probability of the answer", "with another subject"],
        rows=[row],
        groups=[[_map(table, what)] for what in OUTPUTS],
    )


def _map(table: TraceTable, what: What) -> Map:
    """Return the heat map of the recovered share for one kind of output."""
    places: list[tuple[int, Place]] = [(layer, place) for layer in table.layers for place in PLACES]
    shares = {at: table.share(what, *at) for at in places}
    values: dict[MapPlace, float] = {(layer, WORDS[place]): shares[layer, place].recovered for layer, place in places}
    intervals = {at: share.interval for at, share in shares.items()}
    notes: dict[MapPlace, str] = {(layer, WORDS[place]): f" %{_interval(intervals[layer, place])}" for layer, place in places}
    null: dict[MapPlace, str] = {
        (layer, WORDS[place]): "its interval includes 0" for layer, place in places if inside(0.0, intervals[layer, place])
    }
    caption = f"Share of the answer's lost probability that is recovered when one layer's {OUTPUTS[what]} are restored at this position, in percent."
    metric = HeatMeasure(
        OUTPUTS[what].capitalize(), caption, _percent, SCALES["recovered"], "its 95 % interval over facts includes 0"
    )
    return drawn(metric, HeatValues(values, list(WORDS.values()), list(table.layers), notes, null))


def _percent(value: float) -> str:
    return fixed(100 * value, 0)


def _interval(ends: tuple[float, float] | None) -> str:
    return f" [{_percent(ends[0])}, {_percent(ends[1])}]" if ends else ""
