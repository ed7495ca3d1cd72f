"""`analyze decompose`: sparsity and coupling of a decomposition into bricks, on one scale for bricks of a recipe and sets of neurons.

Customized bricks are those of a recipe: each is left out once, and subsets of them are composed. Emergent bricks are the functions' sets
of neurons: their numbers are those that `analyze ablate` and `analyze sparsity` have written about the same model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from workbench.activations.labelled import Item, Labelled
from workbench.activations.losses import ItemLosses, Scored, losses
from workbench.activations.sites import switching_off
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events
from workbench.files import read_json
from workbench.lazy import torch
from workbench.models.texts import Text
from workbench.neurons.ablation import RECORD as ABLATION
from workbench.neurons.ablation import AblationResult
from workbench.neurons.bricks import BrickCosines, BrickSubsets, QualityCurve, brick_cosines, quality_curve
from workbench.neurons.damage import Damage
from workbench.neurons.masking import RECORD as SPARSITY
from workbench.neurons.masking import SparsityResult
from workbench.neurons.subject import AnalyzedTexts, ModelResult, NeuronSubject, analyzed, open_neurons, some_of_each_task
from workbench.resolve.resolved import Resolved
from workbench.results import Measured, Number, Part
from workbench.run.opened import NamedModel

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "decomposition.json"
Curves = dict[str | None, QualityCurve | None]
"""Function, or None for all functions -> quality against the share kept; None if it is undefined."""
Stored = TypeVar("Stored", AblationResult, SparsityResult)


class DecomposeSettings(Part):
    """Settings of the metrics."""

    kept: Number = 0.9
    """Share of the score to keep, which defines the sparsity."""
    items: int = 10
    """Held-out texts of each task."""
    scored: Scored | None = None
    """Tokens whose loss counts; null takes responses if all texts have one, else whole texts."""


class DecomposedFunction(Part):
    """Metrics of one function."""

    function: str
    """The function, or the brick that serves it."""
    coupling: Measured
    """Mean damage to other functions over the damage to its own; null if undefined."""
    curve: QualityCurve | None
    """Quality on its texts; null if it is undefined."""


class Decomposition(Part):
    """Metrics of one decomposition."""

    origin: Literal["customized", "emergent"]
    """Bricks of the recipe, or the model's own sets of neurons."""
    unit: str
    """Kind of part that the shares count: bricks, neurons or experts."""
    parts: int
    """Their number."""
    items: int
    """Number of texts whose loss was measured."""
    scored: Scored
    """Tokens whose loss counts for the curves: whole or response."""
    coupling: Measured
    """Median over functions of the mean damage to others over the damage to the own function; null if undefined or unknown."""
    interval: list[Measured]
    """Its 95 % interval over tasks."""
    dominant_rows: int | None
    """Number of bricks or sets whose own function loses most without them."""
    changes: list[list[Measured]] | None
    """(PPL without - PPL) / PPL: rows are left out, columns measured."""
    functions: list[DecomposedFunction]
    """Metrics by function."""
    curve: QualityCurve | None
    """Quality as a mean over functions; null if it is undefined."""
    notes: list[str]
    """What is missing, and why."""


class DecompositionResult(ModelResult):
    """Result of `analyze decompose`."""

    kind: str = "decomposition"
    """Kind of analysis."""
    data: AnalyzedTexts | None
    """The texts; null without --data."""
    settings: DecomposeSettings
    """Option -> its value."""
    decompositions: list[Decomposition]
    """The recipe's bricks and the model's own sets of neurons, as far as they are known."""
    cosines: BrickCosines | None
    """Redundancy and conflict of the recipe's bricks; null for fewer than two."""


def analyze_decomposition(
    model: NamedModel,
    texts: Labelled | None,
    folder: Path,
    settings: DecomposeSettings | None = None,
    *,
    device: torch.device,
    events: Events = no_events,
) -> DecompositionResult:
    """Measure sparsity, coupling and cosines of a recipe's bricks and of its result's sets of neurons.

    Args:
        model: The model.
        texts: Labelled texts. Texts of a recipe's brick have its name, or one of its card's functions, as function.
        folder: Directory with the other analyses of the same model.
        settings: The settings.
        device: Device of the models, which are loaded one after the other.
        events: Receives progress.

    Raises:
        WorkbenchError: If there is nothing to decompose, or texts fit no two bricks.
    """
    settings = settings or DecomposeSettings()
    name, resolved = model.name, model.resolved
    bricks = len(resolved.parents) > 1
    if not bricks and not any(read_json(folder / file, digest=str) for file in (ABLATION, SPARSITY)):
        raise WorkbenchError(
            f"{name} has {len(resolved.parents) or 'no'} brick{'s' * (len(resolved.parents) != 1)}, and {folder} has no analysis of its neurons",
            "Name a recipe with at least two bricks, or run `workbench analyze all` on the model first.",
        )
    warnings: list[str] = []
    items: list[Item] = []
    subsets = None
    if bricks and texts is not None:
        items, warnings = _items_of_bricks(resolved, texts, settings.items)
        scored = settings.scored or ("response" if all(item.response for item in items) else "whole")
        subsets = BrickSubsets(resolved.recipe, items, scored=scored, device=device, events=events)
    subject = open_neurons(model, device, events)
    digest = subject.digest
    emergent = _emergent(subject, folder, texts, settings.kept)
    del subject
    found = [] if subsets is None else [_customized(subsets, settings.kept, scored)]
    cosines = None
    if bricks:
        pairs = [
            Text(item.prompt, item.response, item.place) if item.response else Text("", item.prompt, item.place) for item in items
        ]
        cosines = brick_cosines(resolved.recipe, pairs, device=device, events=events)
    return DecompositionResult(
        model=name,
        digest=digest,
        data=analyzed(texts, len(texts.items)).model_copy(update={"warnings": warnings}) if texts else None,
        settings=settings,
        decompositions=[*found, *([emergent] if emergent else [])],
        cosines=cosines,
    )


def _items_of_bricks(resolved: Resolved, texts: Labelled, count: int) -> tuple[list[Item], list[str]]:
    """Return held-out texts with the brick that serves them in place of their function, and warnings about the others."""
    labels: dict[str, list[str]] = {}
    for name in resolved.parents:
        card = resolved.on_disk[name].card if name in resolved.on_disk else None
        for label in card.functions if card else ():
            labels.setdefault(label, []).append(name)
    brick_of = {label: names[0] for label, names in labels.items() if len(names) == 1}
    brick_of |= {name: name for name in resolved.parents}
    left = Counter(item.function for item in texts.items if item.function not in brick_of)
    if len({brick_of[f] for f in texts.functions if f in brick_of}) < 2:
        raise WorkbenchError(
            f"{texts.file}: the texts serve fewer than two bricks of {resolved.recipe.name}; their functions are {', '.join(texts.functions)}",
            f"Give each text the name of the brick that serves it as its function: {', '.join(resolved.parents)}.",
        )
    warnings = [
        f"{rows} texts of '{function}' are left out: no single brick serves this function" for function, rows in left.items()
    ]
    items = [replace(item, function=brick_of[item.function]) for item in texts.of("heldout") if item.function in brick_of]
    return some_of_each_task(items, count), warnings


def _customized(subsets: BrickSubsets, kept: float, scored: Scored) -> Decomposition:
    """Leave out every brick once, then keep the most important ones of each function."""
    table = subsets.table()
    curves: Curves = {}
    try:
        subsets.compute(subsets.without(name) for name in subsets.bricks)
        orders = {name: _order(subsets, [name]) for name in subsets.named} | {None: _order(subsets, subsets.named)}
        subsets.compute(order[:count] for order in orders.values() for count in range(len(order) + 1))
    except WorkbenchError as error:
        notes = [f"no curve: the recipe does not work with some of its bricks ({error.message})"]
    else:
        for name, order in orders.items():
            curves[name] = _curve_of(subsets, order, [name] if name else subsets.named, kept)
        notes = [
            f"the recipe is no better than its base on texts of '{name}'" for name, curve in curves.items() if name and not curve
        ]
    return _decomposition("customized", "bricks", len(subsets.bricks), len(subsets.items), scored, (table, curves), notes)


def _decomposition(
    origin: Literal["customized", "emergent"],
    unit: str,
    parts: int,
    items: int,
    scored: Scored,
    found: tuple[Damage | None, Curves],
    notes: list[str],
) -> Decomposition:
    """Return a decomposition with what was found: its damage matrix, if it is known, and its curves."""
    damage, curves = found
    functions = damage.functions if damage else [name for name in curves if name is not None]
    couplings = damage.couplings if damage else [None] * len(functions)
    return Decomposition(
        origin=origin,
        unit=unit,
        parts=parts,
        items=items,
        scored=scored,
        coupling=damage.coupling if damage else None,
        interval=damage.interval if damage else [None, None],
        dominant_rows=damage.dominant_rows if damage else None,
        changes=damage.changes if damage else None,
        functions=[
            DecomposedFunction(function=f, coupling=own, curve=curves.get(f)) for f, own in zip(functions, couplings, strict=True)
        ],
        curve=curves.get(None),
        notes=notes,
    )


def _order(subsets: BrickSubsets, functions: Sequence[str]) -> tuple[str, ...]:
    """Return the bricks by what leaving each out costs some functions, the most important one first."""
    costs = {name: _loss(subsets.losses(subsets.without(name)), subsets.items, functions) for name in subsets.bricks}
    return tuple(sorted(subsets.bricks, key=lambda name: -costs[name]))


def _curve_of(subsets: BrickSubsets, order: Sequence[str], functions: Sequence[str], kept: float) -> QualityCurve | None:
    """Return quality against the share of bricks kept; the floor is the recipe without bricks."""
    scores = [-_loss(subsets.losses(order[:count]), subsets.items, functions) for count in range(len(order) + 1)]
    shares = [(count + 1) / len(order) for count in range(len(order))]
    return quality_curve(shares, scores[1:], scores[0], kept, order)


def _loss(measured: ItemLosses, items: Sequence[Item], functions: Sequence[str]) -> float:
    """Return the loss per token in nats, as a mean over functions."""
    own = [torch.tensor([item.function == name for item in items]) for name in functions]
    rates: list[Tensor] = [measured.sums[mask].sum() / measured.tokens[mask].sum() for mask in own]
    return float(torch.stack(rates).mean())


def _emergent(subject: NeuronSubject, folder: Path, data: Labelled | None, kept: float) -> Decomposition | None:
    """Return the metrics of the model's own sets of neurons from its stored analyses; None if it has none."""
    table = _stored(AblationResult, folder / ABLATION, subject.digest)
    masked = _stored(SparsityResult, folder / SPARSITY, subject.digest)
    if table is None and masked is None:
        return None
    notes: list[str] = []
    if table is None:
        notes.append("no coupling: run `workbench analyze ablate`")
    curves: Curves = {}
    if masked is None:
        notes.append("no curve: run `workbench analyze sparsity`")
    elif data is None or data.digest != masked.data.digest:
        notes.append(f"no curve: it needs the texts of `analyze sparsity` (--data {masked.data.file})")
    else:
        curves = _neuron_curves(subject, data, masked, kept)
    scored: Scored = masked.settings.scored if masked else "whole"
    items = table.items if table else masked.data.items if masked else 0
    units = sum(site.units for site in subject.sites)
    return _decomposition("emergent", subject.sites[0].kind, units, items, scored, (table, curves), notes)


def _stored(kind: type[Stored], path: Path, digest: str) -> Stored | None:
    """Return a stored analysis of a model; None if there is none, or it is of another model."""
    data = read_json(path, digest=str)
    return None if data is None or data["digest"] != digest else kind.of(data, str(path), "Run the analysis again.")


def _neuron_curves(subject: NeuronSubject, data: Labelled, masked: SparsityResult, kept: float) -> Curves:
    """Return quality against the share of the neurons that each token and layer keeps; the floor is the model without neurons."""
    items = some_of_each_task(data.of("heldout"), masked.settings.items)
    everything = {site.layer: torch.arange(site.units) for site in subject.sites}
    with switching_off(subject.model, subject.sites, everything):
        none = losses(subject.model, subject.rows(items), scored=masked.settings.scored)
    curves: Curves = {}
    for curve in masked.curves:
        if curve.indicator == "activation":
            own = torch.tensor([curve.function in (None, item.function) for item in items])
            floor = -float(none.sums[own].sum() / none.tokens[own].sum())
            points = sorted((1 - point.percent / 100, -point.loss) for point in curve.points if point.percent < 100)
            curves[curve.function] = quality_curve([share for share, _ in points], [score for _, score in points], floor, kept)
    return curves
