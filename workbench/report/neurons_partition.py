"""The section of a partition on the page of a model's neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.report.chart import Chart, Curve, Scales, chart
from workbench.report.numbers import plural
from workbench.report.sections import Section

_KINDS = {"oracle": "other", "ridge": "main", "centroid": "second"}
_HIGHEST = 2.0
"""Rise of the loss in nats at the top of the chart; larger ones lie on the edge."""
_METHODS = {
    "random": "at random",
    "kmeans": "by balanced clusters of their gate's rows",
    "coactivation": "by balanced clusters of the tokens on which they are active",
    "cmoe": "as CMoE does (arXiv 2502.04416)",
}


def partition_section(document: Mapping[str, Any]) -> Section:
    """Return the section of experts: what a token loses with some of them, by selector."""
    curves, experts, method = document["curves"], document["experts"], document["settings"]["method"]
    shared = sorted(set(document["shared"].values()))
    fixed = f"{shared[0]}" if len(shared) == 1 else f"{shared[0]} to {shared[-1]}"
    sizes = sorted(set(document["sizes"].values()))
    size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    lead = [
        f"The neurons of every layer are divided into {experts} experts of {size} neurons, {_METHODS.get(method, f'by {method}')}; "
        f"{fixed} of the experts serve every token.",
        f"All experts together differ from the dense layers by at most {document['difference']:.1g} of a layer's largest output.",
    ]
    oracle = next((c for c in curves if c["selector"] == "oracle"), None)
    others = [c for c in curves if c["selector"] != "oracle"]
    if oracle and others:
        last = len(oracle["points"]) - 1
        best = min(others, key=lambda c: float(c["points"][last]["rise"]))
        point, ideal = best["points"][last], oracle["points"][last]
        lead.append(
            f"With {point['used']:g} % of the neurons, the loss rises by {point['rise']:.2f} nats per token with the best selector "
            f"({best['selector']}), and by {ideal['rise']:.2f} with the oracle, which sees the activations of all neurons."
        )
    used = [point["used"] for point in curves[0]["points"]]
    rows = [[c["selector"], *(_cell(point) for point in c["points"])] for c in curves]
    return Section(
        "partition",
        "Experts",
        lead,
        ["selector", *(f"{share:g} % used: mass, rise" for share in used)],
        rows,
        {},
        _charts(curves),
        (("other", "oracle"), ("main", "ridge"), ("second", "centroid"), ("third", "others")),
        (),
        [
            f"Texts: {document['data']['file']}, {plural(document['data']['items'], 'held-out text')}. Table: share of the mass (|activation| times "
            "the norm of the output column) that the selected experts have, and the rise of the loss in nats per token with its 95 % interval over "
            f"tasks. The dense model's loss is {document['loss']:.3f}."
        ],
    )


def _cell(point: Mapping[str, Any]) -> str:
    low, high = point["low"], point["high"]
    ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return f"{100 * point['captured']:.0f} %, {point['rise']:.2f}{ends}".replace("-", "−")


def _charts(curves: Sequence[Mapping[str, Any]]) -> list[Chart]:
    shares = sorted({point["used"] for curve in curves for point in curve["points"]})
    if len(shares) < 2:
        return []
    losses = Scales((shares[0], 100), (0, _HIGHEST), (0, 1, 2), [*shares, 100], "{:.2f}".format, "{:g} %".format)
    masses = Scales((shares[0], 100), (0, 1), (0, 0.5, 1), [*shares, 100], "{:.2f}".format, "{:g} %".format)
    charts = []
    for title, key, end, scales in (
        ("rise of the loss, nats", "rise", 0.0, losses),
        ("share of the mass", "captured", 1.0, masses),
    ):
        lines = [
            Curve(
                c["selector"],
                [(p["used"], p[key]) for p in reversed(c["points"]) if p["used"] < 100] + [(100.0, end)],
                _KINDS.get(c["selector"], "third"),
            )
            for c in curves
        ]
        charts.append(chart(title, lines, scales, note="neurons used"))
    return charts
