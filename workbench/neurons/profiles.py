"""What single neurons do: the tokens that excite them, what the model predicts without them, and the neurons that are active with them.

The tokens that a neuron favors are measured at the tokens that excite it most, as logits with the neuron minus logits without it. This has the
effects through later layers in it, and asks nothing of the architecture; a product of output vector and head would leave them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from workbench.activations.labelled import Item, ItemRow, Labelled
from workbench.activations.sites import Tokens, scaling, stream
from workbench.ground.errors import UsageError
from workbench.ground.lazy import no_grad, torch
from workbench.ground.results import JsonObject, Number
from workbench.models.texts import side_by_side
from workbench.neurons.ablation import FlippedItem
from workbench.neurons.subject import Analysis, NeuronSubject, analyzed, some_of_each_task

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES, BEFORE, AFTER = 6, 14, 5
"""Texts that a profile shows, and the tokens of each around the one that excites the neuron most."""
WORDS = 8
"""Tokens that a neuron favors or disfavors, neurons that are active with it, and predictions that change without it, as shown."""
BINS = 41
"""Bins of a histogram."""
Place: TypeAlias = tuple[int, int]
"""Index of the site, and of its unit."""


class Example(JsonObject):
    """A text that excites a neuron, around the token where it does most."""

    function: str
    """Function of the text."""
    task: str
    """Task of the text."""
    tokens: list[str]
    """Tokens around the one with the largest activation."""
    values: list[Number]
    """Activation at each of them."""
    top: int
    """Index of the token with the largest activation."""


class Neighbor(JsonObject):
    """A neuron that is active at the same tokens."""

    layer: int
    """Its layer."""
    neuron: int
    """Its index in the layer."""
    correlation: Number
    """Correlation of the activations over tokens."""


class ChangedToken(JsonObject):
    """A prediction that is another one without the neuron."""

    after: str
    """Text before the predicted token."""
    with_it: str
    """Token that the model predicts."""
    without: str
    """Token that it predicts without the neuron."""


class NeuronProfile(JsonObject):
    """What one neuron does."""

    layer: int
    """The layer."""
    neuron: int
    """Index of the neuron in the layer."""
    functions: dict[str, Number]
    """Functions for which it was chosen -> its effect in standard deviations over tasks."""
    found: bool
    """Whether the test finds it for one of these functions."""
    low: Number
    """Left end of the histogram."""
    high: Number
    """Right end."""
    histogram: list[int]
    """Tokens in each bin of equal width, by the neuron's activation."""
    examples: list[Example]
    """Texts with the largest absolute activations."""
    favors: dict[str, Number]
    """Tokens whose logits it raises most at the top tokens of these texts -> by how much, relative to the mean token."""
    disfavors: dict[str, Number]
    """Tokens whose logits it lowers most."""
    predictions: int
    """Tokens of these texts that the model predicts."""
    changed: int
    """Predictions that are others without the neuron."""
    changes: list[ChangedToken]
    """Some of them."""
    neighbors: list[Neighbor]
    """Neurons with the largest correlations."""


class ProfilesResult(Analysis):
    """Profiles of neurons, and what the functions' sets change."""

    kind: str = "profiles"
    """Kind of analysis."""
    unit: str
    """neurons or experts."""
    neurons: list[NeuronProfile]
    """The neurons."""
    flipped: dict[str, list[FlippedItem]]
    """Function -> held-out items whose loss rises most without its set."""


@dataclass(frozen=True)
class Chosen:
    """A neuron to look at.

    Attributes:
        place: The neuron.
        functions: Functions for which it was chosen -> its effect.
        found: Whether the test finds it for one of them.
    """

    place: Place
    functions: Mapping[str, float]
    found: bool


def named_places(subject: NeuronSubject, names: Sequence[str]) -> list[Chosen]:
    """Return the neurons with names such as 12.345, layer and index.

    Raises:
        WorkbenchError: If a name is no such pair, or the model has no such neuron.
    """
    of_layer = {site.layer: number for number, site in enumerate(subject.sites)}
    chosen = []
    for name in names:
        layer, _, unit = name.partition(".")
        if not (layer.isdecimal() and unit.isdecimal()):
            raise UsageError(f"--neuron {name}: expected LAYER.NEURON", "Write a layer and an index, such as --neuron 12.345.")
        site = of_layer.get(int(layer))
        if site is None or int(unit) >= subject.sites[site].units:
            has = f"layers {', '.join(map(str, of_layer))}" if site is None else f"{subject.sites[site].units} in layer {layer}"
            raise UsageError(f"--neuron {name}: {subject.name} has no such neuron; it has {has}", None)
        chosen.append(Chosen((site, int(unit)), {}, False))
    return chosen


def profile_neurons(
    subject: NeuronSubject, texts: Labelled, chosen: Sequence[Chosen], flipped: Mapping[str, list[FlippedItem]] | None = None
) -> ProfilesResult:
    """Look at neurons on some texts of every task.

    Args:
        subject: The model.
        texts: The labelled texts.
        chosen: The neurons.
        flipped: Function -> items that its set changes.
    """
    items = some_of_each_task(texts.items)
    rows = subject.rows(items)
    places = [one.place for one in chosen]
    values, owners = _activations(subject, rows, places)
    neighbors = _neighbors(subject, rows, places, values, owners)
    profiles = []
    for number, (one, of_one) in enumerate(zip(chosen, neighbors, strict=True)):
        profiles.append(_profile(subject, items, rows, one, values[:, number], owners, of_one))
        subject.tell(number + 1, len(chosen), "neurons")
    return ProfilesResult(
        model=subject.name,
        digest=subject.digest,
        data=analyzed(texts, len(items), int(owners.count.sum())),
        unit=subject.sites[0].kind,
        neurons=profiles,
        flipped=dict(flipped or {}),
    )


@dataclass(frozen=True)
class _Owners:
    """Rows and positions of the tokens of all rows, one after the other.

    Attributes:
        row: Row of each token [tokens].
        start: First token of each row [rows].
        count: Whether the token counts [tokens]; the first of a row does not.
    """

    row: Tensor
    start: Tensor
    count: Tensor

    def of(self, counted: Tensor, batch: Tokens) -> Tensor:
        """Return the number among all tokens of each token of a batch that counts, from `counted` [batch, time] on the CPU."""
        return (self.start[batch.rows][:, None] + torch.arange(counted.shape[1]))[counted]


def _activations(subject: NeuronSubject, rows: Sequence[ItemRow], places: Sequence[Place]) -> tuple[Tensor, _Owners]:
    """Return the activations of some neurons at all tokens [tokens, places], 0 where a token does not count."""
    lengths = torch.tensor([len(row.tokens) for row in rows])
    values = torch.zeros(int(lengths.sum()), len(places))
    row = torch.arange(len(rows)).repeat_interleave(lengths)
    owners = _Owners(row, lengths.cumsum(0) - lengths, torch.zeros(len(values), dtype=torch.bool))
    wanted: dict[int, list[int]] = {}
    for column, (site, _) in enumerate(places):
        wanted.setdefault(site, []).append(column)

    def consume(site: int, activations: Tensor, batch: Tokens) -> None:
        counted = batch.counted.cpu()
        at = owners.of(counted, batch)
        owners.count[at] = True
        if columns := wanted.get(site):
            units = torch.tensor([places[column][1] for column in columns], device=activations.device)
            values[at[:, None], torch.tensor(columns)] = activations[..., units].float().cpu()[counted]

    stream(subject.model, subject.sites, rows, consume, "whole")
    return values, owners


def _neighbors(
    subject: NeuronSubject, rows: Sequence[ItemRow], places: Sequence[Place], values: Tensor, owners: _Owners
) -> list[list[Neighbor]]:
    """Return for each neuron those of the whole model whose activations correlate most with its own, over tokens.

    A second pass, because the neurons of later layers are unknown while an earlier layer passes. Memory holds neurons times units of sums.
    """
    sums: dict[int, list[Tensor]] = {}

    def consume(site: int, activations: Tensor, batch: Tokens) -> None:
        counted = batch.counted.cpu()
        own = values[owners.of(counted, batch)].to(activations.device)
        other = activations[batch.counted].float()
        parts = [own.T @ other, other.sum(0), other.square().sum(0), own.sum(0), own.square().sum(0), own.new_tensor(len(own))]
        parts = [part.double().cpu() for part in parts]
        sums[site] = [a + b for a, b in zip(sums[site], parts, strict=True)] if site in sums else parts

    stream(subject.model, subject.sites, rows, consume, "whole")
    found: list[list[Neighbor]] = [[] for _ in places]
    for site, (cross, other, other2, own, own2, tokens) in sums.items():
        covariance = cross - own[:, None] * other / tokens
        scale = ((own2 - own.square() / tokens)[:, None] * (other2 - other.square() / tokens)).clamp_min(0).sqrt()
        correlation = torch.where(scale > 0, covariance / scale, 0.0)
        for number, (of, unit) in enumerate(places):
            if of == site:
                correlation[number, unit] = 0
            best = correlation[number].abs().topk(min(WORDS, correlation.shape[1])).indices.tolist()
            layer = subject.sites[site].layer
            found[number] += [Neighbor(layer=layer, neuron=i, correlation=float(correlation[number, i])) for i in best]
    return [sorted(own, key=lambda n: -abs(n.correlation))[:WORDS] for own in found]


def _profile(
    subject: NeuronSubject,
    items: Sequence[Item],
    rows: Sequence[ItemRow],
    chosen: Chosen,
    values: Tensor,
    owners: _Owners,
    neighbors: list[Neighbor],
) -> NeuronProfile:
    """Return the profile of one neuron from its activations at all tokens [tokens]."""
    size = values.abs().masked_fill(~owners.count, -1)
    largest = torch.full((len(rows),), -1.0).scatter_reduce_(0, owners.row, size, "amax")
    exciting = largest.topk(min(EXAMPLES, len(rows))).indices.tolist()
    tops = []
    for row in exciting:
        first = int(owners.start[row])
        tops.append(int(size[first : first + len(rows[row].tokens)].argmax()))
    counted = values[owners.count]
    low, high = float(counted.min()), float(counted.max())
    site, unit = chosen.place
    return NeuronProfile(
        layer=subject.sites[site].layer,
        neuron=unit,
        functions=dict(chosen.functions),
        found=chosen.found,
        low=low,
        high=high,
        histogram=torch.histc(counted, BINS, low, high).long().tolist(),
        examples=[
            _example(subject, items[row], rows[row], values[int(owners.start[row]) :], top)
            for row, top in zip(exciting, tops, strict=True)
        ],
        neighbors=neighbors,
        **_without(subject, chosen.place, [rows[row] for row in exciting], tops),
    )


def _example(subject: NeuronSubject, item: Item, row: ItemRow, values: Tensor, top: int) -> Example:
    """Return a text around its top token, from the activations at its tokens."""
    first, last = max(0, top - BEFORE), min(len(row.tokens), top + AFTER + 1)
    return Example(
        function=item.function,
        task=item.task,
        tokens=[subject.tokenizer.decode([token]) for token in row.tokens[first:last]],
        values=values[first:last].tolist(),
        top=top - first,
    )


@no_grad
def _without(subject: NeuronSubject, place: Place, rows: Sequence[ItemRow], tops: Sequence[int]) -> dict[str, object]:
    """Return what the model predicts otherwise without a neuron, on the texts that excite it most."""
    site, unit = place
    model, decode = subject.model, subject.tokenizer.decode
    batch = side_by_side([row.tokens for row in rows], next(model.parameters()).device)
    given = {"input_ids": batch.tokens, "attention_mask": batch.mask, "use_cache": False}
    before = model(**given).logits
    with scaling(model, subject.sites, {subject.sites[site].layer: torch.tensor([unit])}):
        after = model(**given).logits
    each = torch.arange(len(rows))
    moved = (before - after)[each, torch.tensor(tops)].float().mean(0)
    moved -= moved.mean()
    few = min(WORDS, len(moved))
    up, down = moved.topk(few), moved.topk(few, largest=False)
    old, new = before.argmax(-1), after.argmax(-1)
    other = (old != new) & batch.mask.bool()
    changes = [
        ChangedToken(
            after=decode(rows[row].tokens[max(0, at + 1 - BEFORE) : at + 1]),
            with_it=decode([int(old[row, at])]),
            without=decode([int(new[row, at])]),
        )
        for row, at in other.nonzero().tolist()[:WORDS]
    ]
    return {
        "favors": {decode([i]): v for i, v in zip(up.indices.tolist(), up.values.tolist(), strict=True) if v > 0},
        "disfavors": {decode([i]): v for i, v in zip(down.indices.tolist(), down.values.tolist(), strict=True) if v < 0},
        "predictions": int(batch.mask.sum()),
        "changed": int(other.sum()),
        "changes": changes,
    }
