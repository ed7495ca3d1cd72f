"""Pages of single neurons: one for each function, with the items that its set changes, and one for neurons that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from workbench.activations.labelled import folder_name
from workbench.ground.files import write_bytes
from workbench.neurons.functions import FunctionsResult
from workbench.neurons.pages.questions import layer_marks
from workbench.neurons.profiles import Example, NeuronProfile, ProfilesResult
from workbench.report.chart import Chart, Curve, Scales, chart, svg
from workbench.report.page import filled

SCRIPTS, STYLES = ("report.js",), ("report.css", "curves.css", "heat.css", "neurons.css")
WIDTH, HEIGHT = 246, 54


@dataclass(frozen=True)
class Card:
    """A neuron on a page.

    Attributes:
        profile: What it does.
        title: Its name, layer and index.
        claim: Functions and effects, and whether it is found.
        histogram: Drawing of its activations.
        examples: For each text its label and (text, style class, tint) of its tokens.
    """

    profile: NeuronProfile
    title: str
    claim: str
    histogram: Markup
    examples: Sequence[tuple[str, Sequence[tuple[str, str, float]]]]


def page_name(function: str) -> str:
    """Return the file name of a function's page; an underscore keeps it apart from the two pages with other contents."""
    name = folder_name(function)
    return f"{name}_.html" if name in ("index", "chosen") else f"{name}.html"


def write_function_pages(functions: FunctionsResult, profiles: ProfilesResult, sentences: dict[str, str], out: Path) -> None:
    """Write the page of each function, in the directory of the results.

    Args:
        functions: The verdicts.
        profiles: The neurons, of the same analysis.
        sentences: Function -> its verdict as a sentence.
        out: The directory.
    """
    for row in functions.functions:
        own = [profile for profile in profiles.neurons if row.function in profile.functions]
        own.sort(key=lambda profile: -profile.functions[row.function])
        _write(
            out / page_name(row.function),
            [card(profile) for profile in own],
            title=f"{row.function} in {functions.model}",
            lead=sentences[row.function][:1].upper() + sentences[row.function][1:],
            charts=[_by_layer(row.found_layers, functions.neurons)] if row.found else [],
            flipped=profiles.flipped.get(row.function, []),
            unit=functions.unit,
        )


def write_chosen_page(result: ProfilesResult, out: Path) -> None:
    """Write the page of neurons that were asked for, in the directory of the results."""
    names = ", ".join(f"{one.layer}.{one.neuron}" for one in result.neurons)
    _write(
        out / "chosen.html",
        [card(profile) for profile in result.neurons],
        title=f"{result.unit.capitalize()} {names} of {result.model}",
        lead=f"Looked at on {result.data.items} texts of {result.data.file}.",
        charts=[],
        flipped=[],
        unit=result.unit,
    )


def _write(path: Path, cards: Sequence[Card], **context: object) -> None:
    known = {(one.profile.layer, one.profile.neuron) for one in cards}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(
        path, filled("neuron_cards.html.j2", {"cards": cards, "known": known, **context}, SCRIPTS, STYLES, __package__).encode()
    )


def card(profile: NeuronProfile) -> Card:
    """Return the card of a neuron."""
    effects = ", ".join(f"{effect:.1f} for {name}" for name, effect in profile.functions.items())
    claim = f"{'found' if profile.found else 'not found'}; effect {effects}" if effects else ""
    top = max((abs(v) for example in profile.examples for v in example.values), default=0.0) or 1.0
    return Card(
        profile,
        f"{profile.layer}.{profile.neuron}",
        claim,
        _histogram(profile),
        [(f"{example.function} · {example.task}", _tinted(example, top)) for example in profile.examples],
    )


def _tinted(example: Example, top: float) -> list[tuple[str, str, float]]:
    """Return the tokens of a text with a style class for the sign of their activations and a tint for the size."""
    kinds = ["up" if value >= 0 else "down" for value in example.values]
    kinds[example.top] += " top"
    tokens = [token.replace("\n", "↵") for token in example.tokens]
    return [(token, kind, abs(value) / top) for token, kind, value in zip(tokens, kinds, example.values, strict=True)]


def _histogram(profile: NeuronProfile) -> Markup:
    """Draw the numbers of tokens by activation; heights are fourth roots, so that single tokens are seen beside thousands."""
    roots = [count**0.25 for count in profile.histogram]
    step, tallest = WIDTH / len(roots), max(roots) or 1.0
    bars = [
        svg(
            "rect",
            svg("title", f"{count:,} tokens"),
            x=f"{i * step:.1f}",
            y=f"{HEIGHT * (1 - root / tallest):.1f}",
            width=f"{step - 1:.1f}",
            height=f"{HEIGHT * root / tallest:.1f}",
        )
        for i, (root, count) in enumerate(zip(roots, profile.histogram, strict=True))
    ]
    return svg("svg", Markup("").join(bars), class_="bars", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label="histogram")


def _by_layer(found: dict[str, int], layers: dict[str, int]) -> Chart:
    """Draw the number of found neurons by layer."""
    names = [int(layer) for layer in layers]
    points = [(float(layer), float(found.get(str(layer), 0))) for layer in names]
    top = max(y for _, y in points)
    scales = Scales((names[0], names[-1]), (0, top), (0, top), layer_marks(names), "{:.0f}".format, "{:.0f}".format)
    return chart("Found by layer", [Curve("neurons", points, "main")], scales)
