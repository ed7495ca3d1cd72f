"""The units whose selectivity is compared: neurons of a layer, features of a dictionary, and chance directions, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from workbench.activations.labelled import ItemRow
from workbench.activations.sites import Site, Tokens, stream
from workbench.ground.lazy import torch
from workbench.models.hooks import shaped
from workbench.neurons.sparse_coder import Dictionary, Place, seeing
from workbench.neurons.subject import NeuronSubject

if TYPE_CHECKING:
    from torch import Tensor

Family: TypeAlias = Literal["neurons", "features", "random", "random_encoder", "singular"]


@dataclass
class Units:
    """A family during the pass.

    Attributes:
        activations: Takes neurons and activations at the place [tokens, ...]; returns the units' [tokens, units].
        scores: Mean |activation| by text [texts, units].
        firing: Number of tokens with a positive activation [functions, units].
    """

    activations: Callable[[Tensor, Tensor], Tensor]
    scores: Tensor
    firing: Tensor


Batch: TypeAlias = "Callable[[Tensor, dict[Place, Tensor], Tokens], None]"
"""Takes neurons [batch, time, units], places [batch, time, hidden] and the batch."""


def _stream(subject: NeuronSubject, site: Site, rows: Sequence[ItemRow], places: tuple[Place, ...], take: Batch) -> None:
    """Pass neurons and places of one layer to a function, batch by batch."""
    seen: dict[Place, Tensor] = {}
    last: list[tuple[Tensor, Tokens]] = []

    def consume(_site: int, neurons: Tensor, batch: Tokens) -> None:
        last[:] = [(neurons, batch)]

    def after(done: int) -> None:  # some places come after the neurons
        neurons, batch = last[0]
        take(neurons, {place: shaped(x, *batch.counted.shape).float() for place, x in seen.items()}, batch)
        subject.tell(done, len(rows), "features")

    with seeing(subject.model, subject.config, site, places, seen.__setitem__):
        stream(subject.model, [site], rows, consume, after=after)


def directions_at(
    subject: NeuronSubject, site: Site, rows: Sequence[ItemRow], dictionary: Dictionary
) -> tuple[Dictionary, Tensor, Tensor]:
    """Return the dictionary with its input's scale, and mean and singular directions [hidden, hidden] of the place that it reads."""
    width = dictionary.encoder.shape[1]
    total, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    count, norms = 0, 0.0

    def take(_neurons: Tensor, places: dict[Place, Tensor], batch: Tokens) -> None:
        nonlocal count, norms
        x = places[dictionary.reads][batch.counted].cpu().double()
        total.add_(x.sum(0))
        squares.add_(x.T @ x)
        count, norms = count + len(x), norms + float(x.norm(dim=1).sum())

    _stream(subject, site, rows, (dictionary.reads,), take)
    mean = total / count
    directions = torch.linalg.eigh(squares / count - torch.outer(mean, mean)).eigenvectors.T.flip(0)
    return dictionary.scaled(norms / count), mean.float(), directions.float()


def families_of(
    dictionary: Dictionary, site: Site, mean: Tensor, directions: Tensor, sizes: tuple[int, int], seed: int
) -> dict[Family, Units]:
    """Return the families, before the pass."""
    draw = torch.Generator().manual_seed(seed)
    count, width = dictionary.encoder.shape

    def unit() -> Tensor:
        drawn: Tensor = torch.randn(count, width, generator=draw)
        directions: Tensor = drawn / drawn.norm(dim=1, keepdim=True)
        return directions

    def along(rows: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda _neurons, x: ((x - mean.to(x.device)) @ rows.to(x.device).T).relu()

    chance = replace(dictionary, encoder=unit() * dictionary.encoder.norm(dim=1, keepdim=True))
    made: dict[Family, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
        "neurons": (site.units, lambda neurons, _x: neurons),
        "features": (count, lambda _neurons, x: dictionary.features(x.cpu())),
        "random": (count, along(unit())),
        "random_encoder": (count, lambda _neurons, x: chance.features(x.cpu())),
        "singular": (2 * width, along(torch.cat([directions, -directions]))),
    }
    texts, functions = sizes
    return {
        name: Units(activations, torch.zeros(texts, units), torch.zeros(functions, units))
        for name, (units, activations) in made.items()
    }


def fill(
    subject: NeuronSubject,
    site: Site,
    rows: Sequence[ItemRow],
    dictionary: Dictionary,
    families: dict[Family, Units],
    functions: Tensor,
) -> tuple[Tensor, float]:
    """Fill the families; return the tokens that counted [functions] and the share of variance that the dictionary explains."""
    width = dictionary.decoder.shape[1]
    tokens, total = torch.zeros(int(functions.max()) + 1), torch.zeros(width, dtype=torch.float64)
    squares = missed = 0.0

    def take(neurons: Tensor, places: dict[Place, Tensor], batch: Tokens) -> None:
        nonlocal squares, missed
        counted = batch.counted
        lengths, owner = counted.sum(1).cpu(), functions[batch.rows]
        tokens.index_add_(0, owner, lengths.float())
        of = torch.arange(len(lengths)).repeat_interleave(lengths)  # row of each token
        x, flat = places[dictionary.reads][counted], neurons[counted].float()
        for units in families.values():
            a = units.activations(flat, x).cpu()
            units.scores[batch.rows] = torch.zeros(len(lengths), a.shape[1]).index_add_(0, of, a.abs()) / lengths[:, None]
            units.firing.index_add_(0, owner[of], (a > 0).float())
        y = places[dictionary.writes][counted].cpu()
        missed += float((y - dictionary.reconstruct(x.cpu())).double().square().sum())
        squares += float(y.double().square().sum())
        total.add_(y.double().sum(0))

    _stream(subject, site, rows, (dictionary.reads, dictionary.writes), take)
    variance = squares - float(total.square().sum()) / float(tokens.sum())
    return tokens, 1 - missed / variance if variance > 0 else float("nan")
