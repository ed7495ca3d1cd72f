"""The section of knowledge neurons on the page of a model's neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.report.chart import Chart, Curve, Scales, chart
from workbench.report.numbers import MISSING, fixed, plural, signed
from workbench.report.sections import Section

_PLACES = {"last": "last token of the prompt", "subject": "tokens of the subject"}


def facts_section(document: Mapping[str, Any]) -> Section:
    """Return the section of facts, their neurons and the proof."""
    facts, unit = document["facts"], document["unit"]
    lead = [
        f"{document['neurons']:,} {unit} carry {plural(len(facts), 'fact')}: their integrated gradients are the largest ones in "
        f"{100 * document['settings']['share']:g} % of a fact's wordings.",
        *(_proof(kind, change) for kind, change in document["changes"].items()),
        _sums(document),
        _against_trace(document),
    ]
    columns = ["fact", "answer", "probability", unit, "× 0", "random × 0", "others × 0", "× 2", "random × 2", "sum error"]
    rows = [
        [
            fact["prompt"],
            fact["answer"].strip(),
            fixed(fact["probability"], 3),
            _places(fact["neurons"]),
            *(_percent(fact["changes"].get("suppressed"), side) for side in ("own", "random", "others")),
            *(_percent(fact["changes"].get("amplified"), side) for side in ("own", "random")),
            f"{100 * fact['error']:.1f} %",
        ]
        for fact in facts
    ]
    return Section("knowledge", "Facts", lead, columns, rows, _NOTES, _charts(document), (), (), _settings(document))


_NOTES = {
    "answer": "the answer whose probability is attributed",
    "probability": "mean over the fact's wordings",
    "× 0": "relative change of the answer's probability with the fact's neurons set to zero",
    "random × 0": "the same with equally many random neurons of the same layers, mean over draws",
    "others × 0": "change of the answers of the other facts",
    "× 2": "relative change of the answer's probability with the activations of the fact's neurons doubled",
    "sum error": "how far the attributions are from adding up to the change of probability",
}


def _proof(kind: str, change: Mapping[str, Any]) -> str:
    """Return what suppressing or amplifying the neurons does, beside random neurons."""
    word = "Suppressing" if kind == "suppressed" else "Amplifying"
    ends = "" if change["low"] is None else f" [{_points(change['low'])}, {_points(change['high'])}]"
    others = "" if change["others"] is None else f"; it changes the answers of other facts by {_points(change['others'])} %"
    return (
        f"{word} a fact's neurons changes the probability of its answer by {_points(change['own'])} % on average, random neurons change it by "
        f"{_points(change['random'])} %: a difference of {_points(change['difference'])}{ends} points over {plural(change['facts'], 'fact')}. "
        f"For {change['beyond']} of them, the change exceeds that of every random draw{others}."
    )


def _sums(document: Mapping[str, Any]) -> str:
    count, complete = len(document["facts"]), document["complete"]
    if complete == count:
        return "The attributions of every fact add up to the change of probability within 2 %."
    worst = max(fact["error"] for fact in document["facts"])
    text = (
        f"The attributions of {count - complete} of {plural(count, 'fact')} do not add up to the change of probability (largest error "
        f"{100 * worst:.0f} %)"
    )
    if document["undone"]:
        return (
            f"{text}: a norm behind the feed-forward output undoes the scaling down to almost zero, where the probability jumps, and integrated "
            "gradients miss that jump. The attributions are no shares of the probability here, and only suppressing and amplifying is evidence."
        )
    return f"{text}; more steps than {document['settings']['steps']} bring the sums closer."


def _against_trace(document: Mapping[str, Any]) -> str:
    if document["note"]:
        return f"There is no causal trace beside it ({document['note']})."
    values = {place: value for place, value in document["agreement"].items() if value is not None}
    shown = ", ".join(f"{signed(value, 2)} at the {_PLACES[place]}" for place, value in values.items())
    if not shown:
        return "A causal trace of the same facts has no order of layers to compare with."
    return (
        f"Rank correlation over layers with what a causal trace recovers: {shown}. Neither view says at which layer an edit works best "
        "(Hase et al. 2023)."
    )


def _charts(document: Mapping[str, Any]) -> list[Chart]:
    """Draw the attributions by layer, and beside them what a trace recovers by restoring feed-forward outputs."""
    layers = {int(layer): views for layer, views in document["layers"].items()}
    views: list[tuple[str, str, list[tuple[float, float]]]] = [
        ("Attribution", "share by layer", [(layer, row["attribution"]) for layer, row in layers.items()])
    ]
    for place, words in _PLACES.items():
        points: list[tuple[float, float]] = [
            (layer, row["trace"][place]) for layer, row in layers.items() if row["trace"] is not None
        ]
        if points:
            views.append(("Trace", words, points))
    return [_chart(title, note, points, list(layers)) for title, note, points in views]


def _chart(title: str, note: str, points: Sequence[tuple[float, float]], layers: Sequence[int]) -> Chart:
    top = max(0.01, *(y for _, y in points))
    low = min(0.0, *(y for _, y in points))
    marks = [layer for layer in layers if layer % 5 == 0] if len(layers) > 12 else layers
    scales = Scales((layers[0], layers[-1]), (low, top), (low, top) if low else (0, top), marks, _whole, "{:.0f}".format)
    return chart(title, [Curve(title.lower(), points, "main")], scales, note=note)


def _whole(value: float) -> str:
    return f"{fixed(100 * value, 0)} %"


def _places(neurons: Sequence[Mapping[str, Any]]) -> str:
    """Return the number of neurons with the places of the first three, as layer.neuron."""
    if not neurons:
        return "0"
    named = ", ".join(f"{neuron['layer']}.{neuron['neuron']}" for neuron in neurons[:3])
    return f"{len(neurons)}: {named}{', …' if len(neurons) > 3 else ''}"


def _percent(change: Mapping[str, Any] | None, side: str) -> str:
    if change is None or change[side] is None:
        return MISSING
    return f"{signed(100 * change[side], 0)} %"


def _points(value: float) -> str:
    return signed(100 * value, 1)


def _settings(document: Mapping[str, Any]) -> list[str]:
    s = document["settings"]
    answers = {"own": "the model's own next token", "target": "the fact's target", "target_true": "the fact's true target"}
    tokens = "the last token" if s["at"] == "last" else "all tokens"
    return [
        f"Facts: {document['data']['file']}. Attributed: the probability of {answers[s['answer']]}, by the activations at {tokens} of the "
        f"prompt; {plural(s['steps'], 'step')}. A wording keeps the neurons above {100 * s['threshold']:g} % of its largest attribution. "
        f"{plural(s['draws'], 'random draw')}, seed {s['seed']}. Numbers such as 3.120 are layer 3, neuron 120."
    ]
