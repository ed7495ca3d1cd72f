"""What a recipe's references resolve to: files, kinds, cards, digests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workbench import jsondoc
from workbench.adapters.read import WEIGHTS as ADAPTER_WEIGHTS
from workbench.adapters.read import Adapter
from workbench.bricks.card import BrickCard, read_licence
from workbench.errors import WorkbenchError
from workbench.files import json_digest
from workbench.identity import WatchedFiles
from workbench.models.architecture import is_head
from workbench.models.cleanup import tidy
from workbench.models.conversion import Aligned
from workbench.models.layout import Model
from workbench.models.tied import with_head_of
from workbench.weights.checkpoint import Checkpoint, read_config
from workbench.weights.digests import digests_known, fingerprint, stamp, tensor_digests, weights_digest
from workbench.weights.foreign import is_stand_in
from workbench.weights.specs import NAMES, TensorSpec, Weights

STARTER = "bricks/starter/base"


@dataclass(frozen=True)
class Brick:
    """A brick's files.

    Attributes:
        name: Its name in the recipe.
        kind: adapter or checkpoint. (A recipe as a brick is resolved by the engine.)
        path: Directory of the weights.
        card: Its brick.yaml, where there is one.
        revision: Commit of a hub repository.
    """

    name: str
    kind: str
    path: Path
    card: BrickCard | None = None
    revision: str | None = None

    @property
    def label(self) -> str:
        """How errors call it."""
        return f"brick '{self.name}'"

    @property
    def headers_only(self) -> bool:
        """Whether its tensors are not here: see `hub`."""
        return is_stand_in(self.path)

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter. Errors: as `Adapter`."""
        return Adapter(self.path, self.label)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint. Errors: as `Checkpoint` and `tidy`."""
        read_config(self.path, self.label)
        checkpoint = Checkpoint(self.path, self.label)
        tidy(checkpoint)
        return checkpoint

    def files(self) -> list[Path]:
        """The files that hold its weights."""
        if self.kind == "adapter":
            return [self.path / ADAPTER_WEIGHTS]
        return list(dict.fromkeys(entry.file for entry in self.checkpoint.entries.values()))

    def digest(self, cache: Path | None) -> str:
        """Digest of its content: tensors and what scales them."""
        if self.kind == "checkpoint":
            return checkpoint_digest(self.checkpoint, cache)
        return json_digest([tensor_digests(self.adapter.entries, cache), self.adapter.meaning])

    def known(self, cache: Path) -> bool:
        """Whether `digest` reads no large file."""
        return not self.headers_only if self.kind == "adapter" else digests_known(self.checkpoint.entries, cache)

    def stamp(self, cache: Path) -> str:
        """What stands for its content before it is read."""
        if self.kind == "adapter":
            return stamp(self.adapter.entries) if self.headers_only else self.digest(cache)
        return stamp(self.checkpoint.entries)

    def fingerprint(self, cache: Path) -> str:
        """A key that bricks are sorted by; a checkpoint is sampled for it, not read, so that other content may have the same key."""
        return self.digest(cache) if self.kind == "adapter" else fingerprint(self.checkpoint.entries)

    def licence(self) -> str | None:
        """Licence as its card or its README states it."""
        return self.card.licence if self.card and self.card.licence else read_licence(self.path)

    def data_licences(self) -> dict[str, str | None]:
        """Licences of the data that its card names: those that the card states by name, else the card's own for its training data."""
        if self.card is None:
            return {}
        named = [self.card.training[key] for key in ("data", "replay") if self.card.training.get(key)]
        files = [str(name["hub"]) if isinstance(name, dict) else str(name) for name in named]
        return {**dict.fromkeys(files, self.card.licence), **self.card.data_licences}


def checkpoint_digest(checkpoint: Checkpoint, cache: Path | None) -> str:
    """Digest of a checkpoint's weights and configuration; tensors that were read whole before are not read again."""
    digests = tensor_digests(checkpoint.entries, cache, checkpoint.streamed)
    return weights_digest(checkpoint.specs, digests, checkpoint.config)


def check_checkpoint(brick: Brick, base: Model, weights: Weights | None = None) -> None:
    """Fit of a checkpoint brick: the base's tensors, all of them, in the base's shapes. Errors name what differs.

    Args:
        brick: The brick.
        base: The base, with the output's vocabulary.
        weights: The brick's weights where they are not the checkpoint's: aligned to another vocabulary.
    """
    fitted(brick, base, weights)


def fitted(brick: Brick, base: Model, weights: Weights | None = None) -> Weights:
    """A checkpoint brick under the base's tensor names: as it lies, or mapped from another layout of the same architecture.

    Args and errors: as `check_checkpoint`.
    """
    stored, want = weights or with_head_of(brick.checkpoint, base.weights, brick.checkpoint.config), base.weights.specs
    found: Weights = stored
    missing, extra = [n for n in want if n not in stored.specs], [n for n in stored.specs if n not in want]
    reason = None
    if missing or extra:
        try:
            aligned = Aligned(stored, want, base.config)
            found, missing, extra = aligned, aligned.missing, aligned.unused
        except WorkbenchError as error:
            reason = error.message
    for name in want:
        if name in found.specs and found.specs[name].shape != want[name].shape:
            raise WorkbenchError(
                f"{brick.label}: {name} is {list(found.specs[name].shape)}, the base has {list(want[name].shape)}",
                "Bricks of one recipe share the base's shapes.",
            )
        for source in found.sources(name) if isinstance(found, Aligned) else [name]:
            _check_kind(brick, source, stored.specs.get(source, want[name]), want[name])
    if missing or extra:
        text = [f"lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"] if missing else []
        text += [f"has {', '.join(extra[:3])}{' …' if len(extra) > 3 else ''} that the base does not"] if extra else []
        raise WorkbenchError(
            f"{brick.label}: {' and '.join(text)} ({len(stored.specs)} tensors, the base has {len(want)})",
            _unfit(brick, base, extra, reason),
        )
    return found


def _check_kind(brick: Brick, name: str, spec: TensorSpec, want: TensorSpec) -> None:
    """Raise WorkbenchError if a tensor's kind of numbers differs from the base's."""
    if spec.kind != want.kind:
        raise WorkbenchError(
            f"{brick.label}: {name} holds {spec.kind} numbers ({NAMES[spec.dtype]}), the base has {want.kind} numbers "
            f"({NAMES[want.dtype]})",
            "The checkpoint may be quantised: use the floating-point model that it was made from."
            if want.is_float
            else "Use a fine-tune that keeps the base's kind of numbers.",
        )


def _unfit(brick: Brick, base: Model, extra: list[str], reason: str | None) -> str:
    """What to do about a checkpoint that has other tensors than the base."""
    mine, theirs = brick.checkpoint.config.get("model_type"), base.config.get("model_type")
    if mine != theirs:
        return (
            f"The brick is a {mine} model, the base a {theirs} model: name the model that the brick was fine-tuned from as base."
        )
    if extra and all(is_head(name) for name in extra):
        return (
            "The base ties its head to its embeddings and the brick does not: tie it (tie_word_embeddings in config.json) if the two "
            "are equal, or name a base whose head is its own."
        )
    hint = "A checkpoint brick is a fine-tune of the recipe's base: same architecture, the same tensors."
    return f"{hint} transformers' conversion of names does not help: {reason}" if reason else hint


def vocabulary_digest(path: Path, watched: WatchedFiles | None = None) -> str | None:
    """Digest of the vocabulary and its merges, from tokenizer.json; None where there is no such file. `watched` notes the file."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    content = jsondoc.parse(watched.read(file) if watched else file.read_bytes(), str(file))
    return json_digest(jsondoc.as_object(content, str(file)).get("model"))
