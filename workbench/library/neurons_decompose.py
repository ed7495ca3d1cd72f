"""`analyze decompose`: sparsity and coupling of a decomposition into bricks, on one scale for bricks of a recipe and sets of neurons.

Customized bricks are those of a recipe: each is left out once, and subsets of them are composed. Emergent bricks are the functions' sets
of neurons: their numbers are those that `analyze ablate` and `analyze sparsity` have written about the same model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.emergent.decompose import Output, ScoreCurve
from workbench.emergent.labelled import Item, Labelled
from workbench.emergent.losses import ItemLosses, Scored, losses
from workbench.emergent.sites import switching_off
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events
from workbench.files import read_json, write_json
from workbench.lazy import torch
from workbench.library.neurons_ablate import RECORD as ABLATION
from workbench.library.neurons_bricks import BrickCosines, BrickSubsets, brick_cosines
from workbench.library.neurons_sparsity import RECORD as SPARSITY
from workbench.library.neurons_sparsity import some_of_each_task
from workbench.library.neurons_subject import NeuronSubject, open_neurons
from workbench.models.texts import Text
from workbench.resolve.resolved import Resolved
from workbench.run.opened import NamedModel

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "decomposition.json"
INDICATOR = "activation"
"""Indicator by which the neurons of an emergent curve are kept."""


@dataclass(frozen=True)
class DecomposeOptions:
    """Options of the metrics; part of the record.

    Attributes:
        kept: Share of the score to keep, which defines the sparsity.
        items: Held-out texts of each task.
        tokens: Tokens on which bricks are compared in function space.
        output: Outputs that are compared there.
        scored: Tokens whose loss counts; None takes responses if all texts have one, else whole texts.
    """

    kept: float = 0.9
    items: int = 10
    tokens: int = 512
    output: Output = "update"
    scored: Scored | None = None


@dataclass(frozen=True)
class Decomposition:
    """The metrics of one decomposition.

    Attributes:
        origin: Bricks of a recipe, or sets of neurons.
        unit: Word for its smallest parts, whose share is counted: bricks, neurons or experts.
        parts: Number of these parts.
        items: Number of texts whose loss was measured.
        scored: Tokens whose loss counts.
        table: Damage matrix with coupling, as plain data; None if it is unknown.
        curves: Function, or None for all functions -> quality against the share kept, as plain data; None if it is undefined.
        notes: Sentences about what is missing.
    """

    origin: Literal["customized", "emergent"]
    unit: str
    parts: int
    items: int
    scored: Scored
    table: Mapping[str, Any] | None
    curves: Mapping[str | None, Mapping[str, Any] | None]
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return the metrics as plain data."""
        table = self.table or {}
        functions = list(table.get("functions") or [name for name in self.curves if name is not None])
        couplings = dict(zip(functions, table.get("couplings") or [None] * len(functions), strict=True))
        return {
            "origin": self.origin,
            "unit": self.unit,
            "parts": self.parts,
            "items": self.items,
            "scored": self.scored,
            "coupling": table.get("coupling"),
            "interval": table.get("interval", [None, None]),
            "dominant_rows": table.get("dominant_rows"),
            "changes": table.get("changes"),
            "functions": [{"function": f, "coupling": couplings[f], "curve": self.curves.get(f)} for f in functions],
            "curve": self.curves.get(None),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class DecompositionAnalysis:
    """The metrics of a configuration.

    Attributes:
        model: Name of the configuration.
        digest: Digest of its weights and configuration.
        file: File of labelled texts, as the user named it; None without one.
        data: The texts.
        decompositions: The decompositions.
        cosines: Cosines of the recipe's bricks; None for fewer than two.
        options: The options.
        warnings: Sentences about what the texts cannot show.
    """

    model: str
    digest: str
    file: str | None
    data: Labelled | None
    decompositions: tuple[Decomposition, ...]
    cosines: BrickCosines | None
    options: DecomposeOptions
    warnings: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return the analysis as plain data."""
        data = None
        if self.data is not None:
            data = {"file": self.file, "digest": self.data.digest, "items": len(self.data.items), "warnings": list(self.warnings)}
        return {
            "version": 1,
            "kind": "decomposition",
            "model": self.model,
            "digest": self.digest,
            "data": data,
            "settings": asdict(self.options),
            "decompositions": [one.document() for one in self.decompositions],
            "cosines": self.cosines.document() if self.cosines else None,
        }

    def write(self, out: Path) -> None:
        """Write decomposition.json."""
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RECORD, self.document(), indent=1)


def analyze_decomposition(
    model: NamedModel,
    data: tuple[Labelled, str] | None,
    folder: Path,
    options: DecomposeOptions | None = None,
    *,
    device: torch.device,
    events: Events = no_events,
) -> DecompositionAnalysis:
    """Measure sparsity, coupling and cosines of a recipe's bricks and of its result's sets of neurons.

    Args:
        model: The model.
        data: Labelled texts and the name of their file. Texts of a recipe's brick have its name, or one of its card's functions, as function.
        folder: Directory with the other analyses of the same model.
        options: The options.
        device: Device of the models, which are loaded one after the other.
        events: Receives progress.

    Raises:
        WorkbenchError: If there is nothing to decompose, or texts fit no two bricks.
    """
    options = options or DecomposeOptions()
    name, resolved = model.name, model.resolved
    bricks = len(resolved.parents) > 1
    stored = {file: read_json(folder / file, digest=str) for file in (ABLATION, SPARSITY)}
    if not bricks and not any(stored.values()):
        raise WorkbenchError(
            f"{name} has {len(resolved.parents) or 'no'} brick{'s' * (len(resolved.parents) != 1)}, and {folder} has no analysis of its neurons",
            "Name a recipe with at least two bricks, or run `workbench analyze all` on the model first.",
        )
    warnings: list[str] = []
    items: list[Item] = []
    subsets = None
    if bricks and data is not None:
        items, warnings = _items_of_bricks(resolved, data[0], data[1], options.items)
        scored = options.scored or ("response" if all(item.response for item in items) else "whole")
        subsets = BrickSubsets(resolved.recipe, items, scored=scored, device=device, events=events)
    subject = open_neurons(model, device, events)
    digest = subject.digest
    emergent = _emergent(subject, stored, data[0] if data else None, options)
    del subject
    found = [] if subsets is None else [_customized(subsets, options.kept, scored)]
    cosines = None
    if bricks:
        texts = [
            Text(item.prompt, item.response, item.place) if item.response else Text("", item.prompt, item.place) for item in items
        ]
        cosines = brick_cosines(
            resolved.recipe, texts, tokens=options.tokens, output=options.output, device=device, events=events
        )
    decompositions = (*found, *([emergent] if emergent else []))
    labelled, file = data or (None, None)
    return DecompositionAnalysis(name, digest, file, labelled, decompositions, cosines, options, tuple(warnings))


def _items_of_bricks(resolved: Resolved, data: Labelled, shown: str, count: int) -> tuple[list[Item], list[str]]:
    """Return held-out texts with the brick that serves them in place of their function, and warnings about the others."""
    labels: dict[str, list[str]] = {}
    for name in resolved.parents:
        card = resolved.on_disk[name].card if name in resolved.on_disk else None
        for label in card.functions if card else ():
            labels.setdefault(label, []).append(name)
    brick_of = {label: names[0] for label, names in labels.items() if len(names) == 1}
    brick_of |= {name: name for name in resolved.parents}
    left = Counter(item.function for item in data.items if item.function not in brick_of)
    if len({brick_of[f] for f in data.functions if f in brick_of}) < 2:
        raise WorkbenchError(
            f"{shown}: the texts serve fewer than two bricks of {resolved.recipe.name}; their functions are {', '.join(data.functions)}",
            f"Give each text the name of the brick that serves it as its function: {', '.join(resolved.parents)}.",
        )
    warnings = [
        f"{rows} texts of '{function}' are left out: no single brick serves this function" for function, rows in left.items()
    ]
    items = [replace(item, function=brick_of[item.function]) for item in data.of("heldout") if item.function in brick_of]
    return some_of_each_task(items, count), warnings


def _customized(subsets: BrickSubsets, kept: float, scored: Scored) -> Decomposition:
    """Leave out every brick once, then keep the most important ones of each function."""
    table = subsets.table()
    try:
        subsets.compute(subsets.without(name) for name in subsets.bricks)
        orders = {name: _order(subsets, [name]) for name in subsets.named} | {None: _order(subsets, subsets.named)}
        subsets.compute(order[:count] for order in orders.values() for count in range(len(order) + 1))
    except WorkbenchError as error:
        note = f"no curve: the recipe does not work with some of its bricks ({error.message})"
        return Decomposition(
            "customized", "bricks", len(subsets.bricks), len(subsets.items), scored, table.document(), {}, (note,)
        )
    curves = {name: _curve_of(subsets, order, [name] if name else subsets.named, kept) for name, order in orders.items()}
    notes = [
        f"the recipe is no better than its base on texts of '{name}'" for name, curve in curves.items() if name and curve is None
    ]
    return Decomposition(
        "customized", "bricks", len(subsets.bricks), len(subsets.items), scored, table.document(), curves, tuple(notes)
    )


def _order(subsets: BrickSubsets, functions: Sequence[str]) -> tuple[str, ...]:
    """Return the bricks by what leaving each out costs some functions, the most important one first."""
    costs = {name: _loss(subsets.losses(subsets.without(name)), subsets.items, functions) for name in subsets.bricks}
    return tuple(sorted(subsets.bricks, key=lambda name: -costs[name]))


def _curve_of(subsets: BrickSubsets, order: Sequence[str], functions: Sequence[str], kept: float) -> dict[str, Any] | None:
    """Return quality against the share of bricks kept; the floor is the recipe without bricks."""
    scores = [-_loss(subsets.losses(order[:count]), subsets.items, functions) for count in range(len(order) + 1)]
    shares = [(count + 1) / len(order) for count in range(len(order))]
    curve = quality_curve(shares, scores[1:], scores[0], kept)
    return None if curve is None else {**curve, "order": list(order)}


def _loss(measured: ItemLosses, items: Sequence[Item], functions: Sequence[str]) -> float:
    """Return the loss per token in nats, as a mean over functions."""
    own = [torch.tensor([item.function == name for item in items]) for name in functions]
    rates: list[Tensor] = [measured.sums[mask].sum() / measured.tokens[mask].sum() for mask in own]
    return float(torch.stack(rates).mean())


def quality_curve(shares: Sequence[float], scores: Sequence[float], floor: float, kept: float) -> dict[str, Any] | None:
    """Return a curve with its sparsity and area as plain data; None if the full score does not exceed the floor."""
    if scores[-1] <= floor:
        return None
    curve = ScoreCurve(tuple(shares), tuple(scores), floor)
    return {**curve.document(kept), "quality": list(curve.quality)}


def _emergent(
    subject: NeuronSubject, stored: Mapping[str, Mapping[str, Any] | None], data: Labelled | None, options: DecomposeOptions
) -> Decomposition | None:
    """Return the metrics of the model's own sets of neurons from its stored analyses; None if it has none."""
    own = {file: document for file, document in stored.items() if document and document["digest"] == subject.digest}
    if not own:
        return None
    notes: list[str] = []
    table, masked = own.get(ABLATION), own.get(SPARSITY)
    if table is None:
        notes.append("no coupling: run `workbench analyze ablate`")
    curves: dict[str | None, Mapping[str, Any] | None] = {}
    scored: Scored = masked["settings"]["scored"] if masked else "whole"
    if masked is None:
        notes.append("no curve: run `workbench analyze sparsity`")
    elif data is None or data.digest != masked["data"]["digest"]:
        notes.append(f"no curve: it needs the texts of `analyze sparsity` (--data {masked['data']['file']})")
    else:
        curves = _neuron_curves(subject, data, masked, options.kept)
    units = sum(site.units for site in subject.sites)
    items = int((table or {}).get("items") or (masked or {"data": {"items": 0}})["data"]["items"])
    return Decomposition("emergent", subject.sites[0].kind, units, items, scored, table, curves, tuple(notes))


def _neuron_curves(
    subject: NeuronSubject, data: Labelled, masked: Mapping[str, Any], kept: float
) -> dict[str | None, Mapping[str, Any] | None]:
    """Return quality against the share of the neurons that each token and layer keeps; the floor is the model without neurons."""
    items = some_of_each_task(data.of("heldout"), masked["settings"]["items"])
    everything = {site.layer: torch.arange(site.units) for site in subject.sites}
    with switching_off(subject.model, subject.sites, everything):
        none = losses(subject.model, subject.rows(items), scored=masked["settings"]["scored"])
    curves: dict[str | None, Mapping[str, Any] | None] = {}
    for curve in masked["curves"]:
        if curve["indicator"] == INDICATOR:
            name = curve["function"]
            own = torch.tensor([name in (None, item.function) for item in items])
            floor = -float(none.sums[own].sum() / none.tokens[own].sum())
            points = sorted((1 - point["percent"] / 100, -point["loss"]) for point in curve["points"] if point["percent"] < 100)
            curves[name] = quality_curve([share for share, _ in points], [score for _, score in points], floor, kept)
    return curves
