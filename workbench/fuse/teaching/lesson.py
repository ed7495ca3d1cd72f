"""What a fuse step trains on: texts read by all models, their fused distributions, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.fuse.teaching.distributions import (
    NONE,
    VERSION,
    Pass,
    Reading,
    Shards,
    Vocabulary,
    measure,
    sync_points,
    token_map,
)
from workbench.fuse.teaching.targets import FusedRecord, Fusion, Source, new_tally
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest, read_json
from workbench.ground.lazy import np, torch
from workbench.models.identity import computed_on, tokens_digest
from workbench.models.texts import Text
from workbench.steps import FuseMethod
from workbench.train.rows import Objective, collate, learned_logits
from workbench.train.spec import TrainSpec
from workbench.train.texts import read_inputs, rows_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel


def fused_loss(logits: Tensor, targets: Tensor, ids: Tensor, probabilities: Tensor, weight: float) -> Tensor:
    """Return the mean loss of the learned tokens.

    A token with a fused distribution P has the loss (1 − w) · −log Q(text) + w · −Σ P log Q over the k tokens of P and the rest, which
    is all other tokens together. A token without one has the loss −log Q(text).

    Args:
        logits: Logits that predict the learned tokens, [learned token, vocabulary].
        targets: The learned tokens, [learned token].
        ids: Tokens of the fused distributions, [learned token, k].
        probabilities: Their probabilities, [learned token, k]; only zeros where there is no distribution.
        weight: The share w of the fused loss.
    """
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    taught = probabilities[:, 0] > 0
    if not bool(taught.any()):
        return losses.mean()
    chosen, known = logits[taught], probabilities[taught]
    # Empty columns repeat the first token with probability 0, so that they change neither sum.
    tokens = torch.where(known > 0, ids[taught], ids[taught][:, :1]).long()
    whole = chosen.logsumexp(-1)
    logs = chosen.gather(1, tokens) - whole[:, None]
    # The rest is summed without the k tokens: 1 − Σ would lose all digits where Q is nearly certain of them.
    rest = chosen.scatter(1, tokens, -torch.inf).logsumexp(-1) - whole
    fused = -(known * logs).sum(1) - (1 - known.sum(1)).clamp(min=0) * rest
    mixed = losses.masked_scatter(taught, (1 - weight) * losses[taught] + weight * fused)
    return mixed.mean()


def taught_loss(model: Any, batch: Mapping[str, Tensor], weight: float) -> Tensor:
    """Return the loss of a live model on a batch, plus the router loss if the model's configuration enables it.

    Args:
        model: A live causal language model.
        batch: A batch of `rows.collate` with `taught_ids` and `taught`, the fused distributions of its learned tokens.
        weight: Share of the fused loss.
    """
    logits, routers = learned_logits(model, batch)
    loss = fused_loss(logits, batch["targets"], batch["taught_ids"], batch["taught"], weight)
    return loss if routers is None else loss + routers


LEAST_ALIGNED = 0.05
"""Smallest share of the learned tokens that a teacher needs a distribution for."""
_RECORD = "record.json"


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model whose distributions are fused.

    Attributes:
        name: Its brick, or "base" for the model before the step.
        path: Directory of its tokenizer.
        digest: Digest of its weights.
        longest: Largest number of tokens that it reads; None if its configuration does not say.
        live: Loads it in float32.
    """

    name: str
    path: Path
    digest: str
    longest: int | None
    live: Callable[[], PreTrainedModel]


@dataclass(frozen=True, eq=False)
class Room:
    """Where a lesson is made.

    Attributes:
        project: Folder that the step's files are relative to.
        cache: The project's cache.
        tokenizer: Directory of the tokenizer of the model that is trained.
        rows: Number of tokens that the model has logits for.
        device: Device of the teachers.
        notice: Receives a line for the user.
        progress: Receives (done, total, text).
    """

    project: Path
    cache: Path
    tokenizer: Path
    rows: int
    device: torch.device
    notice: Callable[[str], None]
    progress: Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class _Corpus:
    """The training texts in the tokens of the model that is trained.

    Attributes:
        vocabulary: Its vocabulary.
        texts: The texts.
        rows: Their token ids with the end of the text, and their numbers of learned tokens.
        readings: Their tokens without the end of the text.
    """

    vocabulary: Vocabulary
    texts: list[Text]
    rows: list[tuple[list[int], int]]
    readings: list[Reading]

    def learned(self, number: int) -> range:
        """Return the indices of the tokens of a text after which a token is learned."""
        ids, count = self.rows[number]
        return range(len(ids) - count - 1, len(ids) - 1)


def lesson(step: FuseMethod, settings: TrainSpec, teachers: Sequence[Teacher], base: Teacher, room: Room) -> Objective:
    """Return the objective of a fuse step. Teachers read the texts now, unless the cache has their distributions.

    Everything that can be refused is refused before the first model is loaded.

    Args:
        step: The step.
        settings: Settings of the training.
        teachers: The teachers.
        base: The model before the step, which is fused too if the step says so.
        room: Where the lesson is made.

    Raises:
        WorkbenchError: If a teacher is the model itself, a tokenizer is missing or does not say where its tokens are, or the
            tokens of a teacher end with those of the trained model too rarely.
    """
    if same := [teacher.name for teacher in teachers if teacher.digest == base.digest]:
        raise WorkbenchError(
            f"teacher '{same[0]}' has the same weights as the model that is trained, so it has nothing to teach it",
            "Name another model, or remove it: `with_base: true` fuses the distributions of the model itself already.",
        )
    corpus = _read(settings, room)
    models = [*([base] if step.with_base else []), *teachers]
    sources = [_source(model, corpus, step.top_k, room) for model in models]
    for model, source in zip(models, sources, strict=True):
        room.notice(f"'{model.name}' reads {len(corpus.texts):,} texts")
        measure(source.work, source.shards, model.live, room.device, room.progress)
    k = min(step.top_k, corpus.vocabulary.size - 1)  # the rest is at least one token
    words = [step.tag, type(step).code_key(), step.by, k, tokens_digest(room.tokenizer), corpus.rows, room.rows]
    digest = json_digest([VERSION, *words, [[source.name, source.work.place.name] for source in sources]])
    fused, record = _fused(step, corpus, sources, k, room.cache / "lessons" / digest)
    room.notice(_summary(record, k))
    taught = _Taught({(count, *ids): n for n, (ids, count) in enumerate(corpus.rows)}, fused, k)
    loss = partial(taught_loss, weight=step.weight)
    return Objective(taught.collate, loss, json_digest([digest, step.weight]), {"fused": record.to_dict()})


def _read(settings: TrainSpec, room: Room) -> _Corpus:
    """Read the training texts."""
    vocabulary = Vocabulary(room.tokenizer, "the model that is trained")
    data = room.project / settings.data if isinstance(settings.data, str) else room.project
    inputs = read_inputs(settings, vocabulary.tokenizer, data, room.project, chat=False)
    texts = inputs.texts.trained
    return _Corpus(vocabulary, texts, inputs.skill, [vocabulary.read(text) for text in texts])


def _source(model: Teacher, corpus: _Corpus, k: int, room: Room) -> Source:
    """Align a model's tokens with those of the trained model."""
    pivot = corpus.vocabulary
    own = Vocabulary(model.path, f"teacher '{model.name}'")
    readings = [own.read(text) for text in corpus.texts]
    equal = own.tokens.ids == pivot.tokens.ids and own.spell is pivot.spell
    syncs = []
    for reading, other in zip(corpus.readings, readings, strict=True):
        if equal and np.array_equal(reading.ids, other.ids):
            every = np.arange(len(reading.ids))
            syncs.append((every, every))
        else:
            syncs.append(sync_points(reading, pivot.pieces, other, own.pieces))
    longest = model.longest or max(len(reading.ids) for reading in readings)
    key = [VERSION, model.digest, tokens_digest(model.path), rows_digest(corpus.texts), k, longest, computed_on(room.device)]
    work = Pass(readings, longest, k, room.cache / "teachers" / json_digest(key))
    learned = sum(len(corpus.learned(n)) for n in range(len(corpus.texts)))
    count = 0
    for n, (i, j) in enumerate(syncs):
        part = corpus.learned(n)
        count += int(((i >= part.start) & (i < part.stop) & (j < longest)).sum())
    if count < LEAST_ALIGNED * learned:
        raise WorkbenchError(
            f"teacher '{model.name}': its tokens end with those of the model that is trained at {count:,} of {learned:,} learned "
            f"tokens ({count / learned:.1%}); expected {LEAST_ALIGNED:.0%} or more",
            "Use texts of a language that both tokenizers write in whole characters, or another teacher.",
        )
    tokens = token_map(own, pivot)
    return Source(model.name, work, syncs, np.where(tokens < room.rows, tokens, NONE), work.shards())


def _fused(step: FuseMethod, corpus: _Corpus, sources: Sequence[Source], k: int, place: Path) -> tuple[Shards, FusedRecord]:
    """Return the fused distributions of all texts and their record, from the cache if it has them."""
    fused = Shards(place, [len(corpus.learned(n)) for n in range(len(corpus.texts))], 8 * k)
    known = read_json(place / _RECORD, models=dict)
    if known is not None and not fused.missing():
        return fused, FusedRecord.of(known, str(place / _RECORD))
    tally = new_tally(len(sources))
    fusion = Fusion(sources, step.shares, step.by, k, tally)

    def arrays(rows: range) -> Mapping[str, Tensor]:
        made = [fusion.row(n, corpus.readings[n], corpus.learned(n)) for n in rows]
        return {
            "ids": torch.from_numpy(np.concatenate([ids for ids, _ in made])),
            "probabilities": torch.from_numpy(np.concatenate([values for _, values in made])),
        }

    for number in range(len(fused.parts)):
        fused.write(number, arrays)
    record = tally.record([source.name for source in sources])
    record.write(place / _RECORD)
    return fused, record


def _summary(record: FusedRecord, k: int) -> str:
    """Return a line about what was fused."""
    models = ", ".join(f"'{name}' {found.aligned:.0%}" for name, found in record.models.items())
    return (
        f"{record.taught:.0%} of {record.learned:,} learned tokens have a fused distribution (aligned: {models}); "
        f"{record.rest:.1%} of its probability is outside of its {k} tokens"
    )


@dataclass(frozen=True, eq=False)
class _Taught:
    """Batches with the fused distributions of their rows.

    Attributes:
        numbers: (Number of learned tokens, token ids) of a row -> number of its text.
        fused: The fused distributions of the texts.
        k: Number of tokens of a distribution.
    """

    numbers: Mapping[tuple[int, ...], int]
    fused: Shards
    k: int

    def collate(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        """Return a batch of `rows.collate` with `taught_ids` and `taught`, [learned token, k]; replayed rows have only zeros."""
        ids, values = [], []
        for tokens, count in rows:
            number = self.numbers.get((count, *tokens))
            found = self.fused.row(number) if number is not None else {}
            ids.append(found.get("ids", np.zeros((count, self.k), dtype=np.int32)))
            values.append(found.get("probabilities", np.zeros((count, self.k), dtype=np.float32)))
        return {
            **collate(rows),
            "taught_ids": torch.from_numpy(np.concatenate(ids)),
            "taught": torch.from_numpy(np.concatenate(values)),
        }
