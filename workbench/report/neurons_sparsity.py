"""The section of sparsity on the page of a model's neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.report.chart import Chart, Curve, Level, Scales, chart
from workbench.report.numbers import plural
from workbench.report.sections import Section

_KINDS = {"activation": "main", "magnitude": "other"}
_HIGHEST = 2.0
"""Rise of the loss in nats at the top of the charts; larger ones lie on the edge."""


def sparsity_section(document: Mapping[str, Any]) -> Section:
    """Return the section of distributions and masking."""
    distributions, curves = document["distributions"], document["curves"]
    small = " and ".join(f"{100 * d['mean_small']:.0f} % by {d['indicator']}" for d in distributions)
    whole = {curve["indicator"]: curve for curve in curves if curve["function"] is None}
    free = " and ".join(f"{curve['free']:g} % by {indicator}" for indicator, curve in whole.items())
    cett, tolerance = document["cett"], document["settings"]["tolerance"]
    lead = [
        f"Of the neurons of a token, {small} lie below a fifth of the largest one. The paper finds 80 % for models of 7 and 8 billion parameters.",
        f"Masking the least active neurons of every token and layer raises the loss by no more than {tolerance:g} nats up to {free}. "
        "The paper finds 70 % by activation and 80 % by output magnitude.",
    ]
    if cett["mean_sparsity"] is not None:
        lead.append(
            f"At a truncation error of {cett['target']:g} in every layer (CETT), {100 * cett['mean_sparsity']:.0f} % of the neurons of a token are not needed."
        )
    percents = [point["percent"] for point in curves[0]["points"]]
    rows = [
        [curve["function"] or "all", curve["indicator"], *(_rise(point) for point in curve["points"]), f"{curve['free']:g} %"]
        for curve in sorted(curves, key=lambda c: (c["function"] is not None, c["function"]))
    ]
    return Section(
        "sparsity",
        "Sparsity",
        lead,
        ["function", "masked by", *(f"{percent:g} %" for percent in percents), "free up to"],
        rows,
        {"free up to": f"largest share whose loss rises by no more than {tolerance:g} nats"},
        [*_distributions(distributions), *_masking(curves, tolerance)],
        (("main", "activation"), ("other", "output magnitude"), ("third", "single layers"), ("level", "tolerance")),
        (),
        [
            f"Texts: {document['data']['file']}, {plural(document['data']['items'], 'held-out text')}. Table: rise of the loss in nats per token "
            "with its 95 % interval over tasks. Output magnitude: |activation| times the norm of the neuron's output column."
        ],
    )


def _rise(point: Mapping[str, Any]) -> str:
    if not point["percent"]:
        return "0"
    low, high = point["low"], point["high"]
    return f"{point['rise']:.2f}" if low is None or high is None else f"{point['rise']:.2f} [{low:.2f}, {high:.2f}]"


def _distributions(distributions: Sequence[Mapping[str, Any]]) -> list[Chart]:
    charts = []
    scales = Scales((0, 1), (0, 1), (0, 0.5, 1), (0, 0.2, 0.5, 1), "{:.2f}".format)
    for d in distributions:
        layers = [
            Curve(f"layer {layer}", _every(d["grid"], row), "third") for layer, row in zip(d["layers"], d["cdf"], strict=True)
        ]
        mean = [sum(column) / len(column) for column in zip(*d["cdf"], strict=True)]
        curves = [*layers, Curve("mean of the layers", _every(d["grid"], mean), _KINDS[d["indicator"]])]
        charts.append(chart(f"share of neurons below, by {d['indicator']}", curves, scales, note="normalized"))
    return charts


def _every(grid: Sequence[float], values: Sequence[float], step: int = 5) -> list[tuple[float, float]]:
    return list(zip(grid[::step], values[::step], strict=True))


def _masking(curves: Sequence[Mapping[str, Any]], tolerance: float) -> list[Chart]:
    names = list(dict.fromkeys(curve["function"] for curve in curves))
    percents = [point["percent"] for point in curves[0]["points"]]
    scales = Scales((0, max(percents)), (0, _HIGHEST), (0, 1, 2), percents[::2], "{:.2f}".format, "{:g} %".format)
    charts = []
    for name in sorted(names, key=lambda n: (n is not None, n)):
        lines = [
            Curve(c["indicator"], [(p["percent"], p["rise"]) for p in c["points"]], _KINDS[c["indicator"]])
            for c in curves
            if c["function"] == name
        ]
        free = next(c["free"] for c in curves if c["function"] == name)
        charts.append(
            chart(name or "all functions", lines, scales, [Level("tolerance", tolerance, "")], f"free up to {free:g} %")
        )
    return charts
