"""A recipe with its inputs: files, digests and keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from workbench.bricks.brick import Brick, checkpoint_digest, vocabulary_digest
from workbench.bricks.standins import Download, download_of
from workbench.bricks.tied import untied
from workbench.files import bytes_digest, json_digest
from workbench.identity import WatchedFiles, check_unchanged
from workbench.models.generation import generation_settings
from workbench.models.layout import Model
from workbench.project import CACHE
from workbench.recipe.recipe import Recipe, dump_steps
from workbench.resolve.adapter_form import changes_result
from workbench.resolve.keys import chain
from workbench.steps import Memo
from workbench.steps.fields import parse_size
from workbench.vocabulary.align import AlignedVocabulary
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import digests_known, stamp
from workbench.weights.foreign import is_stand_in


@dataclass(frozen=True)
class MemoryAt:
    """A memory directory at a version, and the digest of what it does there."""

    path: Path
    version: int
    digest: str


@dataclass(frozen=True)
class Resolved:
    """A recipe whose inputs are there and fit.

    Attributes:
        recipe: As written.
        checkpoint: The base as it lies on disk.
        bricks: Name -> files, or another resolved recipe.
        base_revision: Its commit, if it comes from the hub.
        warnings: What the user should know, and the run records.
        unties: What makes the output's head a tensor of its own though the base ties it, brick by brick.
        vocabulary: What the recipe's `tokenizer` block means; `base` and checkpoint bricks then have its rows.
        deferred: Checks that need tensors of which only headers are here; `run` makes them.
        memory: A saved memory that acts on the result, of a configuration that was opened and not made by a step.
        tokenizers: Directory with the tokenizer after each step, where steps change it; empty: as the base's or the `tokenizer` block's.
        memo: What compositions of the same base and bricks keep for each other, in a search.
        watched: The small input files whose digests are part of the keys.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    bricks: dict[str, Brick | Resolved]
    base_revision: str | None = None
    warnings: list[str] = field(default_factory=list)
    unties: list[str] = field(default_factory=list)
    vocabulary: AlignedVocabulary | None = None
    deferred: list[str] = field(default_factory=list)
    memory: MemoryAt | None = None
    tokenizers: tuple[Path, ...] = ()
    memo: Memo | None = field(default=None, compare=False, repr=False)
    watched: WatchedFiles = field(default_factory=WatchedFiles, compare=False, repr=False)

    @cached_property
    def downloads(self) -> list[Download]:
        """What `run` fetches from the hub first: base and bricks of which only headers are here, each repository once."""
        found = [download_of(self.base_path)]
        for brick in self.bricks.values():
            found += brick.downloads if isinstance(brick, Resolved) else [download_of(brick.path)]
        return list(dict.fromkeys(filter(None, found)))

    @property
    def headers_only(self) -> bool:
        """Whether it can be planned but not run: tensors of some input are not here."""
        return is_stand_in(self.base_path) or any(b.headers_only for b in self.bricks.values())

    @property
    def tokenizer_path(self) -> Path:
        """Directory with the tokenizer and generation_config.json of the configuration."""
        return self.tokenizer_at(len(self.recipe.steps))

    def tokenizer_at(self, steps: int) -> Path:
        """The tokenizer's directory after the first steps."""
        if steps and self.tokenizers:
            return self.tokenizers[steps - 1]
        return self.vocabulary.path if self.vocabulary else self.base_path

    @cached_property
    def plain(self) -> Model:
        """The base in its own vocabulary, with a head of its own where a brick unties it."""
        return untied(self.checkpoint) if self.unties else Model(self.checkpoint, self.checkpoint.config)

    @cached_property
    def base(self) -> Model:
        """The base's lazy weights and configuration: what deltas refer to."""
        return self.vocabulary.base if self.vocabulary else self.plain

    @property
    def base_path(self) -> Path:
        """The base's directory."""
        return self.checkpoint.path

    @property
    def cache(self) -> Path:
        """The project's cache."""
        return self.recipe.project / CACHE

    @cached_property
    def base_digest(self) -> str:
        """Digest of the base's weights and configuration. Reads what no one has read before."""
        return checkpoint_digest(self.checkpoint, self.cache)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Brick name -> digest of its content, or the other recipe's key. Reads what no one has read before."""
        return {n: _content(b, self.cache) for n, b in self.bricks.items()}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Brick name -> the key that bricks are sorted by. It costs a sample; bricks with equal samples are told apart by their content."""
        return told_apart(
            {
                n: json_digest([sorted(b.fingerprints.items()), dump_steps(b.recipe), *b._rows(b.fingerprints)])
                if isinstance(b, Resolved)
                else b.fingerprint(self.cache)
                for n, b in self.bricks.items()
            },
            lambda name: _content(self.bricks[name], self.cache),
        )

    @property
    def known(self) -> bool:
        """Whether every key and digest is at hand without reading the inputs' tensors."""
        return digests_known(self.checkpoint.entries, self.cache) and all(
            b.known if isinstance(b, Resolved) else b.known(self.cache) for b in self.bricks.values()
        )

    @cached_property
    def stamp(self) -> str:
        """What stands for `run_key` until the inputs have been read: files by path, size and time of modification."""
        bricks = {n: b.stamp if isinstance(b, Resolved) else b.stamp(self.cache) for n, b in self.bricks.items()}
        output, gates = self.recipe.fields.output.model_dump(mode="json"), [self.gates] if self.gates else []
        return chain(self, [stamp(self.checkpoint.entries), output, *self._rows(bricks), *gates], bricks)[-1]

    def _rows(self, bricks: Mapping[str, str]) -> list[Any]:
        """What the base's rows depend on with a `tokenizer` block: all vocabularies, and bricks that rows are taken from."""
        return (
            [self.vocabulary.digest, [[m.name, bricks[m.name]] for m in self.vocabulary.members[1:]]] if self.vocabulary else []
        )

    @cached_property
    def keys(self) -> list[str]:
        """Key of the state after each step: all that its numbers depend on."""
        return chain(self, self._start, self.digests)[1:]

    @property
    def _start(self) -> list[Any]:
        """What the base's numbers depend on."""
        return ["base", self.base_digest, *self._rows(self.digests), *(["untied"] if self.unties else [])]

    def input_digest(self, name: str) -> str:
        """Digest of an input file of a step, which is watched from then on."""
        return bytes_digest(self.watched.read(self.recipe.project / name))

    def vocabulary_at(self, steps: int) -> str | None:
        """Digest of the vocabulary after the first steps; its file is watched from then on."""
        return vocabulary_digest(self.tokenizer_at(steps), self.watched)

    def check_inputs(self) -> None:
        """Raise InputChangedError if an input is no longer the one that the keys were made from: to be called before results are kept."""
        self.watched.check()
        files = {entry.file: entry.identity for entry in self.checkpoint.entries.values()}
        for brick in self.bricks.values():
            if isinstance(brick, Resolved):
                brick.check_inputs()
            else:
                files |= {
                    e.file: e.identity for e in (brick.adapter if brick.kind == "adapter" else brick.checkpoint).entries.values()
                }
        for file, identity in files.items():
            check_unchanged(file, identity, file)

    def state(self, steps: int) -> str:
        """Key of the weights after the first steps, whichever bricks and steps the recipe has beside: how an edit brick knows the
        weights that it was solved on. Reads the bricks of those steps."""
        before = replace(self, recipe=replace(self.recipe, steps=self.recipe.steps[:steps]))
        names = {n for s in before.recipe.steps for n in self.recipe.used_bricks(s)}
        names |= set(self.bricks) if self.vocabulary else set()
        bricks = {name: _content(self.bricks[name], self.cache) for name in names}
        start = ["base", self.base_digest, *self._rows(bricks), *(["untied"] if self.unties else [])]
        return chain(before, start, bricks, listed=True)[-1]

    @cached_property
    def key(self) -> str:
        """Key of the configuration: the last step's, and the dtype of the output."""
        last = chain(self, self._start, self.digests)[-1]
        output = self.recipe.fields.output
        if changes_result(output):
            return json_digest([last, output.dtype, output.rank])
        plain = [last, output.dtype if output.form != "adapter" else None]
        return json_digest([*plain, self.memory.digest] if self.memory else plain)

    @cached_property
    def generation(self) -> dict[str, Any]:
        """Settings of the generation_config.json that is written with the output, where they decide texts; mostly empty."""
        return generation_settings(self.tokenizer_path, self.base.config)

    @property
    def gates(self) -> dict[str, float]:
        """Step id, or "BRICK/STEP" of a recipe among the bricks -> share of its facts that has to be said for a run to succeed."""
        steps = zip(self.recipe.steps, self.recipe.step_ids, strict=True)
        found = {name: step.efficacy_gate for step, name in steps if step.efficacy_gate is not None}
        inner = {name: brick for name in self.parents if isinstance(brick := self.bricks[name], Resolved)}
        return {**found, **{f"{name}/{step}": share for name, brick in inner.items() for step, share in brick.gates.items()}}

    @property
    def run_key(self) -> str:
        """Key of the run directory: the configuration's, the layout of its files, generation settings that decide texts, and what has
        to hold for the run to succeed."""
        output, gates = self.recipe.fields.output, [self.gates] if self.gates else []
        if output.form == "adapter":
            return json_digest([self.key, output.model_dump(exclude={"shard_size"}), *gates])
        generation = [self.generation] if self.generation else []
        return json_digest([self.key, parse_size(output.shard_size), *generation, *gates])

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the configuration's floats; None keeps the base's, which an adapter's `dtype` leaves alone."""
        name = self.recipe.fields.output.dtype if self.recipe.fields.output.form != "adapter" else None
        return getattr(torch, name) if name else None

    @property
    def parents(self) -> list[str]:
        """Bricks that merge and grow steps use, in the recipe's order."""
        used = {n for s in self.recipe.steps for n in self.recipe.used_bricks(s)}
        return [name for name in self.recipe.fields.bricks if name in used]


def told_apart(keys: Mapping[str, str], content: Callable[[str], str]) -> dict[str, str]:
    """Sort keys with the digest of the content appended where several bricks have the same key."""
    counts = Counter(keys.values())
    return {name: key if counts[key] == 1 else f"{key}-{content(name)}" for name, key in keys.items()}


def _content(brick: Brick | Resolved, cache: Path) -> str:
    """Digest of a brick's content, or the other recipe's key."""
    return brick.key if isinstance(brick, Resolved) else brick.digest(cache)
