"""Fused next-token distributions of training rows, in the tokens of the model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.fuse.teaching.distributions import NONE, Pass, Reading, Shards
from workbench.ground.lazy import np
from workbench.ground.results import JsonObject, Number, Result

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Whole = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Source:
    """One of the models whose distributions are fused.

    Attributes:
        name: Its brick, or "base".
        work: Its pass over the texts.
        syncs: For each text, the indices of tokens of the trained model and of this model that end together.
        tokens: Token of this model -> token of the trained model.
        shards: Its distributions.
    """

    name: str
    work: Pass
    syncs: Sequence[tuple[Whole, Whole]]
    tokens: Whole
    shards: Shards


@dataclass
class Tally:
    """Counts of what was fused.

    Attributes:
        learned: Learned tokens of all texts.
        taught: Learned tokens with a fused distribution.
        rest: Sum of the probabilities outside of the kept tokens, over these tokens.
        aligned: For each model, the learned tokens that it has a distribution for.
        share: For each model, the sum of its shares in the fused distributions.
        nats: For each model, the sum of its −log p of the text over spans that all models have.
        compared: Tokens of the trained model in these spans.
    """

    learned: int = 0
    taught: int = 0
    rest: float = 0.0
    aligned: list[int] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    compared: int = 0

    def record(self, names: Sequence[str]) -> FusedRecord:
        """Return the counts as shares for the record of the training."""
        per = max(1, self.learned), max(1, self.taught), max(1, self.compared)
        models = {
            name: FusedModel(
                aligned=round(self.aligned[m] / per[0], 4),
                share=round(self.share[m] / per[1], 4),
                loss=round(self.nats[m] / per[2], 4),
            )
            for m, name in enumerate(names)
        }
        return FusedRecord(
            learned=self.learned, taught=round(self.taught / per[0], 4), rest=round(self.rest / per[1], 4), models=models
        )


class FusedModel(JsonObject):
    """What one model gave to the fused distributions."""

    aligned: Number
    """Share of the learned tokens that it has a distribution for."""
    share: Number
    """Its mean share in the fused distributions."""
    loss: Number
    """Nats per token of the trained model, on the text that all models share."""


class FusedRecord(Result):
    """What was fused, as in the record of the training and on the brick's card."""

    learned: int
    """Learned tokens of all texts."""
    taught: Number
    """Share of them with a fused distribution."""
    rest: Number
    """Mean probability outside of the kept tokens."""
    models: dict[str, FusedModel]
    """Brick, or "base" -> what it gave."""


@dataclass(frozen=True, eq=False)
class Fusion:
    """How the distributions of several models become one.

    Attributes:
        sources: The models.
        shares: Returns the share of each model from its losses, both [span, model].
        by: "sequence" or "span": the text over which losses are compared.
        k: Number of tokens of a fused distribution.
        tally: Receives the counts of all texts.
    """

    sources: Sequence[Source]
    shares: Callable[[Floats], Floats]
    by: str
    k: int
    tally: Tally

    def row(self, number: int, reading: Reading, learned: range) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the fused distributions of one text.

        Args:
            number: Number of the text.
            reading: The text in the trained model's tokens.
            learned: Indices of the tokens after which a token is learned. The last one may be the end of the text.

        Returns:
            Token ids and probabilities, [learned token, k], by falling probability. A token without a fused distribution has
            only zeros; so have the columns after the last known token of a distribution.
        """
        arrays = [source.shards.row(number) for source in self.sources]
        pairs = [self._common(source, number) for source in self.sources]
        common, shares = self._spans(number, arrays, pairs)
        at, ids, values, given = [], [], [], np.zeros((len(reading.ids), len(pairs)))
        for m, (source, (i, j)) in enumerate(zip(self.sources, pairs, strict=True)):
            share = shares[np.clip(np.searchsorted(common, i, side="right") - 1, 0, len(shares) - 1), m]
            inside = (i >= learned.start) & (i < learned.stop)
            self.tally.aligned[m] += int(inside.sum())
            used = inside & (share > 0)
            i, row, share = i[used], j[used] - source.work.places(number).start, share[used]
            given[i, m] = share
            at.append(np.repeat(i, source.work.k))
            # A model may have more logits than its tokenizer has tokens.
            known = np.minimum(arrays[m]["ids"][row].astype(np.int64), len(source.tokens))
            ids.append(np.append(source.tokens, NONE)[known].ravel())
            values.append((arrays[m]["probabilities"][row].astype(np.float64) * share[:, None]).ravel())
        rows = slice(learned.start, learned.stop)
        found, probabilities = _largest(np.concatenate(at), np.concatenate(ids), np.concatenate(values), given.sum(1), self.k)
        self._count(given[rows], probabilities[rows])
        return found[rows].astype(np.int32), probabilities[rows].astype(np.float32)

    def _common(self, source: Source, number: int) -> tuple[Whole, Whole]:
        """Return the places where both models' tokens end and the model has a distribution."""
        i, j = source.syncs[number]
        kept = source.work.places(number)
        inside = (j >= kept.start) & (j < kept.stop)
        return i[inside], j[inside]

    def _spans(
        self, number: int, arrays: Sequence[Mapping[str, NDArray[Any]]], pairs: Sequence[tuple[Whole, Whole]]
    ) -> tuple[Whole, Floats]:
        """Return the beginnings of the spans, as indices of the trained model's tokens, and each model's share, [span, model].

        Spans lie between places that all models share, so that all losses are those of the same characters. Without two such places
        all losses count as equal.
        """
        common = pairs[0][0]
        for i, _ in pairs[1:]:
            common = np.intersect1d(common, i, assume_unique=True)
        if len(common) < 2:
            return np.zeros(1, dtype=np.int64), self.shares(np.zeros((1, len(pairs))))
        if self.by == "sequence":
            common = common[[0, -1]]
        lengths = np.diff(common)
        losses = np.empty((len(lengths), len(pairs)))
        for m, (source, (i, j)) in enumerate(zip(self.sources, pairs, strict=True)):
            sums = np.concatenate(([0.0], np.cumsum(arrays[m]["nll"].astype(np.float64))))
            ends = sums[j[np.searchsorted(i, common)] - source.work.places(number).start]
            losses[:, m] = np.diff(ends) / lengths
            self.tally.nats[m] += float(ends[-1] - ends[0])
        self.tally.compared += int(lengths.sum())
        return common[:-1], self.shares(losses)

    def _count(self, given: Floats, probabilities: Floats) -> None:
        """Add the learned tokens of one text to the tally.

        Args:
            given: Share of each model that has a distribution, [learned token, model].
            probabilities: The fused distributions, [learned token, k].
        """
        taught = probabilities[:, 0] > 0
        self.tally.learned += len(taught)
        self.tally.taught += int(taught.sum())
        self.tally.rest += float(np.maximum(0.0, 1.0 - probabilities[taught].sum(1)).sum())
        shares = given[taught] / given[taught].sum(1, keepdims=True)
        self.tally.share = [before + float(more) for before, more in zip(self.tally.share, shares.sum(0), strict=True)]


def _largest(at: Whole, ids: Whole, values: Floats, total: Floats, k: int) -> tuple[Whole, Floats]:
    """Sum the values of equal tokens at each place, divide by the place's total, and return the k largest, [place, k]."""
    known = (ids != NONE) & (values > 0)
    at, ids, values = at[known], ids[known], values[known]
    span = int(ids.max(initial=0)) + 1
    keys, inverse = np.unique(at * span + ids, return_inverse=True)
    sums = np.bincount(inverse, values, minlength=len(keys))
    places, tokens = keys // span, keys % span
    order = np.lexsort((tokens, -sums, places))
    places, tokens, sums = places[order], tokens[order], sums[order]
    rank = np.arange(len(places)) - np.searchsorted(places, places)
    keep = rank < k
    found, probabilities = np.zeros((len(total), k), dtype=np.int64), np.zeros((len(total), k))
    found[places[keep], rank[keep]] = tokens[keep]
    probabilities[places[keep], rank[keep]] = sums[keep] / total[places[keep]]
    return found, probabilities


def new_tally(models: int) -> Tally:
    """Return an empty tally for some models."""
    return Tally(aligned=[0] * models, share=[0.0] * models, nats=[0.0] * models)
