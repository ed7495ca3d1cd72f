"""A resolved recipe: its inputs, digests and keys."""

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
from workbench.emergent.sets import RECORD, TENSORS, NeuronSet, read_set
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
    """A memory directory at a version, with the digest of its content at that version."""

    path: Path
    version: int
    digest: str


@dataclass(frozen=True)
class Resolved:
    """A recipe whose inputs exist and fit.

    Attributes:
        recipe: The recipe, with its steps bound to their tokenizers.
        checkpoint: The base on disk.
        bricks: Name -> a brick's files, or another resolved recipe.
        base_revision: Commit of a base from the hub.
        warnings: Warnings for the user, which the run records.
        unties: For each brick that needs it, why the output's head is a separate tensor although the base ties it to the
            embeddings.
        vocabulary: The vocabulary of the recipe's `tokenizer` block, to which `base` and checkpoint bricks are then aligned.
        deferred: Checks that `run` makes, because they need tensors of which only headers are local.
        memory: A saved memory that acts on the result, for a configuration that was loaded from disk.
        tokenizers: Directory of the tokenizer after each step; empty if no step changes the tokenizer.
        memo: Values shared by compositions of the same base and bricks in a search.
        watched: Small input files whose digests are part of the keys.
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
        """Downloads that `run` makes first: base and bricks of which only headers are local, each repository once."""
        downloads = [download_of(self.base_path)]
        for brick in self.bricks.values():
            downloads += brick.downloads if isinstance(brick, Resolved) else [download_of(brick.path)]
        return list(dict.fromkeys(filter(None, downloads)))

    @property
    def headers_only(self) -> bool:
        """True if tensors of an input are not local, so that the recipe can be planned but not run."""
        return is_stand_in(self.base_path) or any(b.headers_only for b in self.bricks.values())

    @property
    def tokenizer_path(self) -> Path:
        """Directory of the configuration's tokenizer and generation_config.json."""
        return self.tokenizer_at(len(self.recipe.steps))

    def tokenizer_at(self, steps: int) -> Path:
        """Return the directory of the tokenizer after the first `steps` steps."""
        if steps and self.tokenizers:
            return self.tokenizers[steps - 1]
        return self.vocabulary.path if self.vocabulary else self.base_path

    @cached_property
    def plain(self) -> Model:
        """The base with its own vocabulary, and with a separate head if a brick unties it."""
        return untied(self.checkpoint) if self.unties else Model(self.checkpoint, self.checkpoint.config)

    @cached_property
    def base(self) -> Model:
        """Lazy weights and configuration of the base, against which deltas are taken."""
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
        """Digest of the base's weights and configuration. Reads only tensors whose digest is not cached."""
        return checkpoint_digest(self.checkpoint, self.cache)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Brick name -> digest of its content, or the key of a recipe. Reads only tensors whose digest is not cached."""
        return {n: _content(b, self.cache) for n, b in self.bricks.items()}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Brick name -> sort key from a sample of its content, or from the whole content for bricks with equal samples."""
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
        """True if every key and digest is cached, so that no tensor must be read for them."""
        return digests_known(self.checkpoint.entries, self.cache) and all(
            b.known if isinstance(b, Resolved) else b.known(self.cache) for b in self.bricks.values()
        )

    @cached_property
    def stamp(self) -> str:
        """Substitute for `run_key` until the inputs have been read, from the paths, sizes and modification times of files."""
        bricks = {n: b.stamp if isinstance(b, Resolved) else b.stamp(self.cache) for n, b in self.bricks.items()}
        output, gates = self.recipe.fields.output.model_dump(mode="json"), [self.gates] if self.gates else []
        return chain(self, [stamp(self.checkpoint.entries), output, *self._rows(bricks), *gates], bricks)[-1]

    def _rows(self, bricks: Mapping[str, str]) -> list[Any]:
        """Return what determines the base's rows with a `tokenizer` block: vocabularies, and the bricks that rows come from."""
        return (
            [self.vocabulary.digest, [[m.name, bricks[m.name]] for m in self.vocabulary.members[1:]]] if self.vocabulary else []
        )

    @cached_property
    def keys(self) -> list[str]:
        """Key of the weights after each step, made from everything that determines them."""
        return chain(self, self._start, self.digests)[1:]

    @property
    def _start(self) -> list[Any]:
        """Everything that determines the base's weights."""
        return ["base", self.base_digest, *self._rows(self.digests), *(["untied"] if self.unties else [])]

    def input_digest(self, name: str) -> str:
        """Return the digest of a step's input file, and watch the file for changes."""
        return bytes_digest(self.watched.read(self.recipe.project / name))

    def neurons(self, folder: str) -> NeuronSet:
        """Return a set of neurons that a step names, and watch its files for changes.

        Args:
            folder: Directory of the set, relative to the project.

        Raises:
            WorkbenchError: If a file is missing or damaged.
        """
        place = self.recipe.project / folder
        neurons = read_set(place, folder)
        for name in (RECORD, TENSORS):
            self.watched.read(place / name)
        return neurons

    def vocabulary_at(self, steps: int) -> str | None:
        """Return the digest of the vocabulary after the first `steps` steps, and watch its file for changes."""
        return vocabulary_digest(self.tokenizer_at(steps), self.watched)

    def check_inputs(self) -> None:
        """Check that no input has changed since its key was made. Call this before results are stored.

        Raises:
            InputChangedError: If an input has changed.
        """
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
        """Return a key of the weights after the first `steps` steps that does not depend on other bricks and steps of the recipe.

        An edit brick records it to identify the weights that it was solved on. Reads the bricks of these steps.
        """
        before = replace(self, recipe=replace(self.recipe, steps=self.recipe.steps[:steps]))
        names = {n for s in before.recipe.steps for n in self.recipe.used_bricks(s)}
        names |= set(self.bricks) if self.vocabulary else set()
        bricks = {name: _content(self.bricks[name], self.cache) for name in names}
        start = ["base", self.base_digest, *self._rows(bricks), *(["untied"] if self.unties else [])]
        return chain(before, start, bricks, listed=True)[-1]

    @cached_property
    def key(self) -> str:
        """Key of the configuration, made from the key of the last step and the form and dtype of the output."""
        last = chain(self, self._start, self.digests)[-1]
        output = self.recipe.fields.output
        if changes_result(output):
            return json_digest([last, output.dtype, output.rank])
        plain = [last, output.dtype if output.form != "adapter" else None]
        return json_digest([*plain, self.memory.digest] if self.memory else plain)

    @cached_property
    def generation(self) -> dict[str, Any]:
        """Settings of the output's generation_config.json that change generated text; usually empty."""
        return generation_settings(self.tokenizer_path, self.base.config)

    @property
    def gates(self) -> dict[str, float]:
        """Smallest share of facts that the model must say: step id, or "BRICK/STEP" for a recipe used as a brick -> share."""
        steps = zip(self.recipe.steps, self.recipe.step_ids, strict=True)
        gates = {name: step.efficacy_gate for step, name in steps if step.efficacy_gate is not None}
        inner = {name: brick for name in self.parents if isinstance(brick := self.bricks[name], Resolved)}
        return {**gates, **{f"{name}/{step}": share for name, brick in inner.items() for step, share in brick.gates.items()}}

    @property
    def run_key(self) -> str:
        """Key of the run directory, from the configuration's key, file layout, generation settings and efficacy gates."""
        output, gates = self.recipe.fields.output, [self.gates] if self.gates else []
        if output.form == "adapter":
            return json_digest([self.key, output.model_dump(exclude={"shard_size"}), *gates])
        generation = [self.generation] if self.generation else []
        return json_digest([self.key, parse_size(output.shard_size), *generation, *gates])

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the configuration's floating-point tensors; None keeps the base's, also for adapters with a `dtype`."""
        name = self.recipe.fields.output.dtype if self.recipe.fields.output.form != "adapter" else None
        return getattr(torch, name) if name else None

    @property
    def parents(self) -> list[str]:
        """Names of the bricks that steps use, in the recipe's order."""
        used = {n for s in self.recipe.steps for n in self.recipe.used_bricks(s)}
        return [name for name in self.recipe.fields.bricks if name in used]


def told_apart(keys: Mapping[str, str], content: Callable[[str], str]) -> dict[str, str]:
    """Make sort keys unique: append the digest of the content to keys that several bricks share.

    Args:
        keys: Brick name -> sort key.
        content: Returns the digest of a brick's content.
    """
    counts = Counter(keys.values())
    return {name: key if counts[key] == 1 else f"{key}-{content(name)}" for name, key in keys.items()}


def _content(brick: Brick | Resolved, cache: Path) -> str:
    """Return the digest of a brick's content, or the key of a recipe."""
    return brick.key if isinstance(brick, Resolved) else brick.digest(cache)
