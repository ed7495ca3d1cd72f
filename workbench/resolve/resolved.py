"""A resolved recipe: its inputs, digests and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from workbench.bricks.brick import Brick, BrickSource, check_files
from workbench.bricks.card import read_licence
from workbench.bricks.header_folders import Download, download_of
from workbench.bricks.locate import base_adapter, base_digest
from workbench.ground.files import bytes_digest, json_digest
from workbench.ground.identity import WatchedFiles
from workbench.ground.lazy import torch
from workbench.ground.project import cache_of
from workbench.models.identity import generation_settings, shipped_files, tokens_digest
from workbench.models.layout import Model
from workbench.models.sentences import module_files
from workbench.recipe.recipe import Recipe, dump_steps
from workbench.resolve.keys import chain, distinct_keys, products
from workbench.resolve.output import MemoryAt, RouterAt, changes_result
from workbench.steps import Memo
from workbench.steps.fields import parse_size
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import digests_known, meaning_of, stamp
from workbench.weights.header import has_headers_only

if TYPE_CHECKING:
    from workbench.activations.sets import NeuronSet
    from workbench.adapters.bind import BoundAdapter
    from workbench.adapters.read import Adapter
    from workbench.vocabulary.aligned import AlignedVocabulary


@dataclass(frozen=True)
class Resolved:
    """A recipe whose inputs exist and fit. `resolve.resolve` builds it; it does not change afterwards.

    Attributes:
        recipe: The recipe, with its steps bound to their tokenizers.
        checkpoint: The base on disk.
        plain: The base with its own vocabulary, and with a separate head if a brick unties it.
        on_disk: Name -> brick, for bricks that are directories.
        nested: Name -> resolved recipe, for bricks that are recipes.
        base_revision: Commit of a base from the hub.
        warnings: Warnings for the user, which the run records.
        unties: For each brick that needs it, why the output's head is a separate tensor although the base ties it to the
            embeddings.
        vocabulary: The vocabulary of the recipe's `tokenizer` block, to which `base` and checkpoint bricks are then aligned.
        deferred: Checks that `run` makes, because they need tensors of which only headers are local.
        memory: A saved memory that acts on the result, for a configuration that was loaded from disk.
        router: A saved router that acts on the result, for a configuration that was loaded from disk.
        tokenizers: Directory of the tokenizer after each step; empty if no step changes the tokenizer.
        memo: Values shared by compositions of the same base and bricks in a search.
        watched: Small input files whose digests are part of the keys. It records each file when the file is first read.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    plain: Model = field(compare=False, repr=False)
    on_disk: Mapping[str, Brick]
    nested: Mapping[str, Resolved]
    base_revision: str | None = None
    warnings: tuple[str, ...] = ()
    unties: tuple[str, ...] = ()
    vocabulary: AlignedVocabulary | None = None
    deferred: tuple[str, ...] = ()
    memory: MemoryAt | None = None
    router: RouterAt | None = None
    tokenizers: tuple[Path, ...] = ()
    memo: Memo | None = field(default=None, compare=False, repr=False)
    watched: WatchedFiles = field(default_factory=WatchedFiles, compare=False, repr=False)

    @cached_property
    def bricks(self) -> Mapping[str, BrickSource]:
        """Name -> brick, in the recipe's order."""
        return brick_sources(self.recipe, self.on_disk, self.nested)

    @property
    def beside(self) -> str | None:
        """What acts on the live model beside the weights: "memory" or "router"; None if the weights are all."""
        if self.recipe.memory or self.memory:
            return "memory"
        return "router" if self.recipe.router or self.router else None

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter, for bricks that are adapters."""
        return {name: brick.adapter for name, brick in self.on_disk.items() if brick.kind == "adapter"}

    def bound(self, name: str) -> BoundAdapter:
        """Return the updates of an adapter, on the base's own rows, and on those that the adapter adds to them."""
        from workbench.adapters.bind import bind

        own = self.vocabulary.adapted(name) if self.vocabulary else None
        return own.bound if own else bind(self.adapters[name], self.plain.weights.specs, self.plain)

    @property
    def _sources(self) -> list[BrickSource]:
        """The adapter on the base, if it has one, and the bricks."""
        return [*([self.base_adapter] if self.base_adapter else []), *self.bricks.values()]

    @cached_property
    def downloads(self) -> tuple[Download, ...]:
        """Downloads that `run` makes first: base and bricks of which only headers are local, each repository once."""
        every = (download_of(self.base_path), *(d for brick in self._sources for d in brick.downloads))
        return tuple(dict.fromkeys(d for d in every if d))

    @property
    def headers_only(self) -> bool:
        """True if tensors of an input are not local, so that the recipe can be planned but not run."""
        return has_headers_only(self.base_path) or any(b.headers_only for b in self._sources)

    @property
    def tokenizer_path(self) -> Path:
        """Directory of the configuration's tokenizer and generation_config.json."""
        return self.tokenizer_at(len(self.recipe.steps))

    @property
    def shipped(self) -> dict[str, Path]:
        """Name -> file that a checkpoint of the result gets as it is: tokenizer, template, settings, processor, sentence modules."""
        encoders = next((s.tokenizer_brick() for s in reversed(self.recipe.steps) if getattr(s, "composes", False)), None)
        processor = self.on_disk[encoders].path if encoders is not None and encoders in self.on_disk else self.base_path
        return shipped_files(self.tokenizer_path, processor) | module_files(self.base_path)

    def tokenizer_at(self, steps: int) -> Path:
        """Return the directory of the tokenizer after the first `steps` steps."""
        if steps and self.tokenizers:
            return self.tokenizers[steps - 1]
        return self.vocabulary.path if self.vocabulary else self.base_path

    @property
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
        return cache_of(self.recipe.project)

    @cached_property
    def base_digest(self) -> str:
        """Digest of the base's weights and configuration. Reads only tensors whose digest is not cached."""
        return base_digest(self.checkpoint, self.cache)

    @property
    def base_adapter(self) -> Brick | None:
        """The adapter on the base, for `base: {adapter:, on:}`; `base_path` then has the weights without it."""
        return base_adapter(self.checkpoint)

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """Brick name -> digest of its content, or the key of a recipe. Reads only tensors whose digest is not cached."""
        return MappingProxyType({name: brick.digest(self.cache) for name, brick in self.bricks.items()})

    @cached_property
    def fingerprints(self) -> Mapping[str, str]:
        """Brick name -> sort key from a sample of its content, or from the whole content for bricks with equal samples."""
        samples = {name: brick.fingerprint(self.cache) for name, brick in self.bricks.items()}
        return MappingProxyType(distinct_keys(samples, lambda name: self.bricks[name].digest(self.cache)))

    @property
    def fingerprint(self) -> str:
        """Sort key of the result, as a brick of another recipe, from samples of the bricks."""
        return json_digest([sorted(self.fingerprints.items()), dump_steps(self.recipe), *self._row_sources(self.fingerprints)])

    @property
    def known(self) -> bool:
        """True if every key and digest is cached, so that no tensor must be read for them."""
        return digests_known(self.checkpoint.entries, self.cache) and all(b.known(self.cache) for b in self._sources)

    @cached_property
    def stamp(self) -> str:
        """Substitute for `run_key` until the tensors have been read: identities of their files, and the content of all small files."""
        bricks = {name: brick.stamp(self.cache) for name, brick in self.bricks.items()}
        output, gates = self.recipe.fields.output.model_dump(mode="json"), [self.gates] if self.gates else []
        adapter = [self.base_adapter.stamp(self.cache)] if self.base_adapter else []
        checkpoint = self.checkpoint
        base = [stamp(checkpoint.entries), meaning_of(checkpoint.config), *adapter, output, *self._row_sources(bricks), *gates]
        return chain(self, [*base, *self._beside_weights], bricks)[-1]

    def _row_sources(self, bricks: Mapping[str, str]) -> list[Any]:
        """Return what determines the base's rows with a `tokenizer` block: vocabularies, and the bricks that rows come from."""
        if self.vocabulary is None:
            return []
        names = [m.name for m in self.vocabulary.members[1:]] + ([self.recipe.donor] if self.recipe.donor else [])
        return [self.vocabulary.digest, [[name, bricks[name]] for name in names]]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Key of the weights after each step, made from everything that determines them."""
        return tuple(chain(self, self._base_parts(self.digests), self.digests)[1:])

    @property
    def base_key(self) -> str:
        """Key of the base's weights, with the rows that a `tokenizer` block gives it."""
        return json_digest(self._base_parts(self.digests))

    def _base_parts(self, bricks: Mapping[str, str]) -> list[Any]:
        """Return everything that determines the base's weights."""
        return ["base", self.base_digest, *self._row_sources(bricks), *(["untied"] if self.unties else []), *products(self, [])]

    def input_digest(self, name: str) -> str:
        """Return the digest of a step's input file, and watch the file for changes."""
        return bytes_digest(self.watched.read(self.recipe.project / name))

    def neurons(self, folder: str) -> NeuronSet:
        """Return the set of neurons in a folder of the project, and watch its files for changes."""
        from workbench.activations.sets import RECORD, TENSORS, read_set

        place = self.recipe.project / folder
        neurons = read_set(place, folder)
        for name in (RECORD, TENSORS):
            self.watched.read(place / name)
        return neurons

    def tokens_at(self, steps: int) -> str | None:
        """Return the digest of what turns text into tokens after the first `steps` steps, and watch its files for changes."""
        return tokens_digest(self.tokenizer_at(steps), self.watched)

    def tokenizer_of(self, name: str) -> Path:
        """Return the directory of the tokenizer of a brick's whole model: an adapter has that of the base."""
        if self.bricks[name].kind == "adapter":
            return self.tokenizer_at(0)
        return self.nested[name].tokenizer_path if name in self.nested else self.on_disk[name].path

    def check_inputs(self) -> None:
        """Raise InputChangedError if an input has changed since its key was made. Call this before results are stored."""
        self.watched.check()
        check_files(self.checkpoint.entries)
        for brick in self._sources:
            brick.check_inputs()

    def state(self, steps: int) -> str:
        """Return a key of the weights after the first `steps` steps, which reads the bricks of these steps alone: edits record it."""
        before = replace(self, recipe=replace(self.recipe, steps=self.recipe.steps[:steps]))
        names = {n for s in before.recipe.steps for n in self.recipe.used_bricks(s)}
        names |= set(self.bricks) if self.vocabulary else set()
        bricks = {name: self.bricks[name].digest(self.cache) for name in names}
        return chain(before, self._base_parts(bricks), bricks, listed=True)[-1]

    @cached_property
    def key(self) -> str:
        """Key of the configuration, made from the key of the last step and the form and dtype of the output."""
        last = chain(self, self._base_parts(self.digests), self.digests)[-1]
        output = self.recipe.fields.output
        if changes_result(output):
            return json_digest([last, output.dtype, output.rank])
        plain = [last, output.dtype if output.form != "adapter" else None]
        beside = [part.digest for part in (self.memory, self.router) if part]
        return json_digest([*plain, *beside, *filter(None, [output.format, meaning_of(output.config or {})])])

    @cached_property
    def generation(self) -> Mapping[str, object]:
        """Settings of the output's generation_config.json that change generated text; usually empty."""
        return generation_settings(self.tokenizer_path, self.base.config)

    @property
    def gates(self) -> dict[str, float]:
        """Smallest share of facts that the model must say: step id, or "BRICK/STEP" for a recipe used as a brick -> share."""
        steps = zip(self.recipe.steps, self.recipe.step_ids, strict=True)
        gates = {name: step.efficacy_gate for step, name in steps if step.efficacy_gate is not None}
        inner = {name: self.nested[name] for name in self.parents if name in self.nested}
        return {**gates, **{f"{name}/{step}": share for name, brick in inner.items() for step, share in brick.gates.items()}}

    @property
    def run_key(self) -> str:
        """Key of the run directory, from the configuration's key, file layout, what its record or files hold besides, and efficacy gates."""
        output, gates = self.recipe.fields.output, [self.gates] if self.gates else []
        unread = {"shard_size"} if output.accept_error is not None else {"shard_size", "accept_error"}
        layout = output.model_dump(exclude=unread) if output.form == "adapter" else parse_size(output.shard_size)
        return json_digest([self.key, layout, *self._beside_weights, *gates, *([output.config] if output.config else [])])

    @property
    def _beside_weights(self) -> list[dict[str, object]]:
        """Return digests of the files that a checkpoint gets as they are, which are watched; of an adapter, the settings that its record states."""
        if self.recipe.fields.output.form == "adapter":
            return [{"generation": dict(self.generation)}] if self.generation else []
        return [{name: bytes_digest(self.watched.read(file)) for name, file in self.shipped.items()}]

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the configuration's floating-point tensors; None keeps the base's, also for adapters with a `dtype`."""
        return getattr(torch, self.dtype_name) if self.dtype_name else None

    @property
    def dtype_name(self) -> str | None:
        """Name of `dtype`, such as "bfloat16"."""
        return self.recipe.fields.output.dtype if self.recipe.fields.output.form != "adapter" else None

    @property
    def parents(self) -> list[str]:
        """Names of the bricks that steps use, in the recipe's order."""
        return self.recipe.parents

    @property
    def licences(self) -> dict[str, str]:
        """License of the base and of every brick that the result is made from; "unknown" if none is stated."""
        adapter = {"base adapter": self.base_adapter.licence()} if self.base_adapter else {}
        names = [*self.parents, *([self.recipe.donor] if self.recipe.donor else [])]
        stated = {"base": read_licence(self.base_path), **adapter, **{name: self.bricks[name].licence() for name in names}}
        return {name: (licence or "unknown").lower() for name, licence in stated.items()}

    @property
    def data_licences(self) -> list[tuple[str, str, str]]:
        """Rows of (brick, data set, license) for all data in the bricks' cards; "unknown" if no license is stated."""
        own = self.base_adapter.data_licences() if self.base_adapter else []
        return [*own, *(row for name in self.parents for row in self.bricks[name].data_licences())]


@dataclass(frozen=True)
class RecipeBrick:
    """A recipe used as a brick of another recipe. Implements `bricks.brick.BrickSource`.

    Attributes:
        name: Name of the brick in the outer recipe.
        resolved: The recipe.
    """

    name: str
    resolved: Resolved

    @property
    def kind(self) -> str:  # noqa: D102  described by `BrickSource`
        return "recipe"

    @property
    def public_name(self) -> str:
        """The recipe's name, for model cards."""
        return f"recipe {self.resolved.recipe.name}"

    @property
    def revision(self) -> str | None:  # noqa: D102
        return None

    @property
    def headers_only(self) -> bool:  # noqa: D102
        return self.resolved.headers_only

    @property
    def downloads(self) -> tuple[Download, ...]:  # noqa: D102
        return self.resolved.downloads

    @property
    def deferred(self) -> tuple[str, ...]:  # noqa: D102
        return self.resolved.deferred

    @property
    def stored_bytes(self) -> int:
        """Size on disk of the bricks that the recipe's steps use, in bytes."""
        return sum(self.resolved.bricks[name].stored_bytes for name in self.resolved.parents)

    @property
    def input_bytes(self) -> int:
        """Size of the recipe's base and of all its bricks, in bytes."""
        base = sum(spec.nbytes for spec in self.resolved.base.weights.specs.values())
        return base + sum(brick.input_bytes for brick in self.resolved.bricks.values())

    def digest(self, cache: Path) -> str:  # noqa: D102
        return self.resolved.key

    def fingerprint(self, cache: Path) -> str:  # noqa: D102
        return self.resolved.fingerprint

    def known(self, cache: Path) -> bool:  # noqa: D102
        return self.resolved.known

    def stamp(self, cache: Path) -> str:  # noqa: D102
        return self.resolved.stamp

    def check_inputs(self) -> None:  # noqa: D102
        self.resolved.check_inputs()

    def unties(self, base: Model) -> str | None:
        """Describe how the recipe's result unties the head from the embeddings; return None if they stay one tensor."""
        return "has a head of its own" if self.resolved.unties else None

    def licence(self) -> str | None:
        """Return the licenses of the recipe's inputs, each once."""
        return ", ".join(sorted(set(self.resolved.licences.values())))

    def data_licences(self) -> list[tuple[str, str, str]]:
        """Return the rows of the recipe's bricks, with the brick as "BRICK/INNER BRICK"."""
        return [(f"{self.name}/{inner}", data, licence) for inner, data, licence in self.resolved.data_licences]


def brick_sources(recipe: Recipe, on_disk: Mapping[str, Brick], nested: Mapping[str, Resolved]) -> Mapping[str, BrickSource]:
    """Return name -> brick in the recipe's order, with nested recipes as bricks."""
    sources: dict[str, BrickSource] = {**on_disk, **{name: RecipeBrick(name, inner) for name, inner in nested.items()}}
    return MappingProxyType({name: sources[name] for name in recipe.fields.bricks if name in sources})
