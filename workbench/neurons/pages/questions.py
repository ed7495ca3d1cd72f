"""Sections of the page of a model's neurons (sentences, a table, charts, matrices): sparsity, experts and facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workbench.ground.numbers import MISSING, fixed, plural, signed
from workbench.ground.tables import Table
from workbench.neurons.fact_neurons import DRAWS, SHARE, THRESHOLD, LocatedNeuron, ProbabilityChange
from workbench.neurons.features import FeaturesResult
from workbench.neurons.locate import KnowledgeResult, MeanChange
from workbench.neurons.masking import MaskCurve, SparsityResult
from workbench.neurons.partition import PartitionResult, SelectorCurve
from workbench.neurons.profiles import ProfilesResult
from workbench.neurons.sparsity import Distribution
from workbench.report.chart import Chart, Curve, Level, Scales, chart
from workbench.report.tints import TintedTable

_HIGHEST = 2.0
"""Rise of the loss in nats at the top of charts; larger ones lie on the edge."""


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
        links: First cell of a row of the table -> page about it.
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
    links: Mapping[str, str] = field(default_factory=dict)

    def saved(self) -> list[Table]:
        """Return its table and matrices, which the page's buttons save."""
        own = [Table(self.id, self.columns, self.rows)] if self.rows else []
        return [*own, *(Table(f"{self.id}-{t.title}", [t.corner, *t.columns], t.cells) for t in self.tables)]


def with_ends(text: str, low: float | None, high: float | None) -> str:
    """Return a number with its interval, if both ends are known."""
    return text if low is None or high is None else f"{text} [{fixed(low, 2, minus='-')}, {fixed(high, 2, minus='-')}]"


def layer_marks(layers: Sequence[int]) -> Sequence[int]:
    """Return the layers that an axis names."""
    return [layer for layer in layers if layer % 5 == 0] if len(layers) > 12 else layers


def range_text(values: Mapping[str, int]) -> str:
    """Return the numbers of some layers as a text: "12", or "1 to 2"."""
    low, high = min(values.values()), max(values.values())
    return str(low) if low == high else f"{low} to {high}"


def chosen_section(result: ProfilesResult) -> Section:
    """Return the section of neurons that were asked for; their page has the texts."""
    rows = [
        [
            f"{one.layer}.{one.neuron}",
            " ".join(dict.fromkeys(f"{example.function}·{example.task}" for example in one.examples[:3])),
            " ".join(repr(token) for token in list(one.favors)[:4]),
            f"{one.changed} of {one.predictions}",
            " ".join(f"{other.layer}.{other.neuron}" for other in one.neighbors[:3]),
        ]
        for one in result.neurons
    ]
    return Section(
        "chosen",
        "Single " + result.unit,
        [f"Looked at on {plural(result.data.items, 'text')} of {result.data.file}."],
        ["neuron", "excited most by", "favors", "predictions changed", "active with"],
        rows,
        {"predictions changed": "predictions on its texts that are others without it"},
        links={row[0]: f"chosen.html#n-{row[0].replace('.', '-')}" for row in rows},
    )


_FAMILIES = {
    "neurons": "neurons of the layer",
    "features": "features of the dictionary",
    "random": "random directions",
    "random_encoder": "the dictionary with a random encoder",
    "singular": "singular directions",
}


def features_section(result: FeaturesResult) -> Section:
    """Return the section of a dictionary: its features beside the layer's neurons and chance directions, under one test."""
    dictionary, judged = result.dictionary, {one.family: one for one in result.summary}
    features = judged["features"]
    claim = {"more": "are more selective than", "less": "are less selective than", "undecided": "are not shown to differ from"}
    explained = MISSING if dictionary.explained is None else f"{100 * dictionary.explained:.0f} %"
    rows = []
    for family in result.families:
        one, scores = judged.get(family.family), family.functions
        rows.append(
            [
                _FAMILIES[family.family],
                f"{family.units:,}",
                f"{100 * family.density:.2g} %",
                f"{sum(score.found for score in scores):,}",
                f"{sum(score.found_equal for score in scores):.1f}",
                f"{sum(score.crossed_equal for score in scores) / len(scores):.3f}",
                with_ends(signed(one.difference, 3), one.low, one.high).replace("-", "−") if one else MISSING,
                one.verdict if one else MISSING,
            ]
        )
    return Section(
        "features",
        "Features beside neurons",
        [
            f"At equal count, the dictionary's features {claim[features.verdict]} the {result.families[0].units:,} neurons of layer "
            f"{dictionary.layer}: {with_ends(signed(features.difference, 3), features.low, features.high).replace('-', '−')} in FuncScore.",
            f"The dictionary {dictionary.folder} ({dictionary.activation}, {dictionary.reads} to {dictionary.writes}) explains {explained} of the "
            "variance on these texts.",
        ],
        ["units", "number", "active", "found", "found of 1,000", "score", "minus neurons", "more selective"],
        rows,
        {
            "active": "share of the tokens at which a unit is active, mean over units",
            "found": "units that the test finds for any function",
            "found of 1,000": f"the same with {result.count:,} units of each family, for 1,000 of them, mean over draws",
            "score": "FuncScore on one half of the tasks of the best hundredth of units on the other half, mean over functions",
            "minus neurons": "difference with its 95 % interval over functions",
        },
        details=[
            f"Texts: {result.data.file}, {plural(result.data.items, 'text')}. {result.count:,} units of each family are compared."
        ],
    )


def sparsity_section(result: SparsityResult) -> Section:
    """Return the section of distributions and masking."""
    curves, cett = result.curves, result.cett
    tolerance = curves[0].tolerance
    small = " and ".join(f"{100 * d.mean_small:.0f} % by {d.indicator}" for d in result.distributions)
    free = " and ".join(f"{curve.free:g} % by {curve.indicator}" for curve in curves if curve.function is None)
    lead = [
        f"Of the neurons of a token, {small} lie below a fifth of the largest one. The paper finds 80 % for models of 7 and 8 billion parameters.",
        f"Masking the least active neurons of every token and layer raises the loss by no more than {tolerance:g} nats up to {free}. "
        "The paper finds 70 % by activation and 80 % by output magnitude.",
    ]
    if cett.mean_sparsity is not None:
        lead.append(
            f"At a truncation error of {cett.target:g} in every layer (CETT), {100 * cett.mean_sparsity:.0f} % of the neurons of a token are not needed."
        )
    rows = [
        [
            curve.function or "all",
            curve.indicator,
            *(with_ends(fixed(p.rise, 2, minus="-"), p.low, p.high) if p.percent else "0" for p in curve.points),
            f"{curve.free:g} %",
        ]
        for curve in sorted(curves, key=lambda c: (c.function is not None, c.function))
    ]
    return Section(
        "sparsity",
        "Sparsity",
        lead,
        ["function", "masked by", *(f"{point.percent:g} %" for point in curves[0].points), "free up to"],
        rows,
        {"free up to": f"largest share whose loss rises by no more than {tolerance:g} nats"},
        [*(_distribution(d) for d in result.distributions), *_masking(curves, tolerance)],
        (("main", "activation"), ("other", "output magnitude"), ("third", "single layers"), ("level", "tolerance")),
        (),
        [
            f"Texts: {result.data.file}, {plural(result.data.items, 'held-out text')}. Table: rise of the loss in nats per token "
            "with its 95 % interval over tasks. Output magnitude: |activation| times the norm of the neuron's output column."
        ],
    )


_INDICATORS = {"activation": "main", "magnitude": "other"}


def _distribution(found: Distribution) -> Chart:
    """Draw the shares of neurons below a value by layer, at every fifth point of the grid, and their mean."""
    mean = [sum(column) / len(column) for column in zip(*found.cdf, strict=True)]
    named = [*((f"layer {n}", row, "third") for n, row in zip(found.layers, found.cdf, strict=True))]
    named.append(("mean of the layers", mean, _INDICATORS[found.indicator]))
    curves = [Curve(name, list(zip(found.grid[::5], row[::5], strict=True)), kind) for name, row, kind in named]
    scales = Scales((0, 1), (0, 1), (0, 0.5, 1), (0, 0.2, 0.5, 1), "{:.2f}".format)
    return chart(f"share of neurons below, by {found.indicator}", curves, scales, note="normalized")


def _masking(curves: Sequence[MaskCurve], tolerance: float) -> list[Chart]:
    percents = [point.percent for point in curves[0].points]
    scales = Scales((0, max(percents)), (0, _HIGHEST), (0, 1, 2), percents[::2], "{:.2f}".format, "{:g} %".format)
    charts = []
    for name in sorted({curve.function for curve in curves}, key=lambda n: (n is not None, n)):
        own = [curve for curve in curves if curve.function == name]
        lines = [Curve(c.indicator, [(p.percent, p.rise) for p in c.points], _INDICATORS[c.indicator]) for c in own]
        level = Level("tolerance", tolerance, "")
        charts.append(chart(name or "all functions", lines, scales, [level], f"free up to {own[0].free:g} %"))
    return charts


def partition_section(result: PartitionResult) -> Section:
    """Return the section of experts: what a token loses with some of them, by selector."""
    curves, method = result.curves, result.settings.method
    lead = [
        f"The neurons of every layer are divided into {result.experts} experts of {range_text(result.sizes)} neurons, "
        f"{_METHODS.get(method, f'by {method}')}; {range_text(result.shared)} of the experts serve every token.",
        f"All experts together differ from the dense layers by at most {result.difference:.1g} of a layer's largest output.",
    ]
    ideal = next((c for c in curves if c.selector == "oracle"), None)
    if ideal and (others := [c for c in curves if c is not ideal]):
        best = min(others, key=lambda c: c.points[-1].rise)
        lead.append(
            f"With {ideal.points[-1].used:g} % of the neurons, the loss rises by {best.points[-1].rise:.2f} nats per token with the best "
            f"selector ({best.selector}), and by {ideal.points[-1].rise:.2f} with the oracle, which sees the activations of all neurons."
        )
    rows = [
        [
            c.selector,
            *(with_ends(f"{100 * p.captured:.0f} %, {fixed(p.rise, 2)}", p.low, p.high).replace("-", "−") for p in c.points),
        ]
        for c in curves
    ]
    return Section(
        "partition",
        "Experts",
        lead,
        ["selector", *(f"{point.used:g} % used: mass, rise" for point in curves[0].points)],
        rows,
        {},
        _selector_charts(curves),
        (("other", "oracle"), ("main", "ridge"), ("second", "centroid")),
        (),
        [
            f"Texts: {result.data.file}, {plural(result.data.items, 'held-out text')}. Table: share of the mass (|activation| times "
            "the norm of the output column) that the selected experts have, and the rise of the loss in nats per token with its 95 % interval over "
            f"tasks. The dense model's loss is {result.loss:.3f}."
        ],
    )


_METHODS = {
    "random": "at random",
    "kmeans": "by balanced clusters of their gate's rows",
    "coactivation": "by balanced clusters of the tokens on which they are active",
    "cmoe": "as CMoE does (arXiv 2502.04416)",
}
_SELECTORS = {"oracle": "other", "ridge": "main", "centroid": "second"}


def _selector_charts(curves: Sequence[SelectorCurve]) -> list[Chart]:
    """Draw the loss and the mass of each selector against the share of the neurons; with one share there is nothing to draw."""
    shares = sorted({point.used for curve in curves for point in curve.points})
    if len(shares) < 2:
        return []
    losses = [Curve(c.selector, _to_all([(p.used, p.rise) for p in c.points], 0.0), _SELECTORS[c.selector]) for c in curves]
    masses = [Curve(c.selector, _to_all([(p.used, p.captured) for p in c.points], 1.0), _SELECTORS[c.selector]) for c in curves]
    marks = [*shares, 100]
    return [
        chart(
            title,
            lines,
            Scales((shares[0], 100), (0, top), (0, top / 2, top), marks, "{:.2f}".format, "{:g} %".format),
            note=note,
        )
        for title, lines, top, note in (
            ("rise of the loss, nats", losses, _HIGHEST, "neurons used"),
            ("share of the mass", masses, 1.0, "neurons used"),
        )
    ]


def _to_all(points: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """Return points by ascending share of the neurons, and the value with all neurons."""
    return [*((x, y) for x, y in reversed(points) if x < 100), (100.0, end)]


def facts_section(result: KnowledgeResult) -> Section:
    """Return the section of facts, their neurons and the proof."""
    facts, unit, settings = result.facts, result.unit, result.settings
    rows = [
        [
            fact.prompt,
            fact.answer.strip(),
            fixed(fact.probability, 3),
            _places(fact.neurons),
            *_changes(fact.changes.get("suppressed")),
            *_changes(fact.changes.get("amplified"))[:2],
            f"{100 * fact.error:.1f} %",
        ]
        for fact in facts
    ]
    answers = {"own": "the model's own next token", "target": "the fact's target", "target_true": "the fact's true target"}
    return Section(
        "knowledge",
        "Facts",
        [
            f"{result.neurons:,} {unit} carry {plural(len(facts), 'fact')}: their integrated gradients are the largest ones in "
            f"{100 * SHARE:g} % of a fact's wordings.",
            *(_proof(kind, change) for kind, change in result.changes.items()),
            _sums(result),
        ],
        ["fact", "answer", "probability", unit, "× 0", "random × 0", "others × 0", "× 2", "random × 2", "sum error"],
        rows,
        _FACT_NOTES,
        _fact_charts(result),
        (),
        (),
        [
            f"Facts: {result.data.file}. Attributed: the probability of {answers[settings.answer]}, by the activations at the last token of the "
            f"prompt; {plural(settings.steps, 'step')}. A wording keeps the neurons above {100 * THRESHOLD:g} % of its largest attribution. "
            f"{plural(DRAWS, 'random draw')}. Numbers such as 3.120 are layer 3, neuron 120."
        ],
    )


_FACT_NOTES = {
    "answer": "the answer whose probability is attributed",
    "probability": "mean over the fact's wordings",
    "× 0": "relative change of the answer's probability with the fact's neurons set to zero",
    "random × 0": "the same with equally many random neurons of the same layers, mean over draws",
    "others × 0": "change of the answers of the other facts",
    "× 2": "relative change of the answer's probability with the activations of the fact's neurons doubled",
    "sum error": "how far the attributions are from adding up to the change of probability",
}


def _changes(change: ProbabilityChange | None) -> list[str]:
    """Return the changes of the answer with the fact's neurons, with random ones, and of other facts' answers."""
    values = [None] * 3 if change is None else [change.own, change.random, change.others]
    return [MISSING if value is None else f"{signed(100 * value, 0)} %" for value in values]


def _places(neurons: Sequence[LocatedNeuron]) -> str:
    """Return the number of neurons with the places of the first three, as layer.neuron."""
    if not neurons:
        return "0"
    named = ", ".join(f"{neuron.layer}.{neuron.neuron}" for neuron in neurons[:3])
    return f"{len(neurons)}: {named}{', …' if len(neurons) > 3 else ''}"


def _points(value: float) -> str:
    return signed(100 * value, 1)


def _proof(kind: str, change: MeanChange) -> str:
    """Return what suppressing or amplifying the neurons does, beside random neurons."""
    word = "Suppressing" if kind == "suppressed" else "Amplifying"
    ends = "" if change.low is None or change.high is None else f" [{_points(change.low)}, {_points(change.high)}]"
    others = "" if change.others is None else f"; it changes the answers of other facts by {_points(change.others)} %"
    return (
        f"{word} a fact's neurons changes the probability of its answer by {_points(change.own)} % on average, random neurons change it by "
        f"{_points(change.random)} %: a difference of {_points(change.difference)}{ends} points over {plural(change.facts, 'fact')}. "
        f"For {change.beyond} of them, the change exceeds that of every random draw{others}."
    )


def _sums(result: KnowledgeResult) -> str:
    """Return for how many facts the attributions add up; the page's warnings say why they may not."""
    count = len(result.facts)
    return f"The attributions of {result.complete} of {plural(count, 'fact')} add up to the change of probability within 2 %."


def _fact_charts(result: KnowledgeResult) -> list[Chart]:
    """Draw the attributions by layer."""
    points = [(float(layer), share) for layer, share in result.layers.items()]
    top = max(0.01, *(share for _, share in points))
    layers = [int(layer) for layer in result.layers]
    scales = Scales(
        (layers[0], layers[-1]), (0, top), (0, top), layer_marks(layers), lambda v: f"{fixed(100 * v, 0)} %", "{:.0f}".format
    )
    return [chart("Attribution", [Curve("attribution", points, "main")], scales, note="share by layer")]
