"""What a recipe's references resolve to: files, kinds, cards, digests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from workbench import jsondoc, yamldoc
from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.adapters.read import WEIGHTS as ADAPTER_WEIGHTS
from workbench.adapters.read import Adapter
from workbench.conversion import Aligned
from workbench.errors import WorkbenchError, nearest, shell
from workbench.fields import NAME, BrickRef, Strict
from workbench.hub import CARD, FETCH, Hub
from workbench.layout import Model
from workbench.stored import is_head, tidy
from workbench.weights.checkpoint import INDEX, SINGLE, Checkpoint, read_config, refuse_foreign
from workbench.weights.digests import digests_known, fingerprint, json_digest, stamp, tensor_digests, weights_digest
from workbench.weights.foreign import is_stand_in
from workbench.weights.identity import WatchedFiles
from workbench.weights.saving import write_text
from workbench.weights.specs import NAMES, TensorSpec, Weights
from workbench.weights.tied import with_head_of
from workbench.yamltree import top_scalars

STARTER = "bricks/starter/base"


Measured = Annotated[float, Field(allow_inf_nan=True)]
"""A score; its interval may have no ends."""


class BaseRecord(Strict):
    """The base that a brick was made on."""

    id: str
    """Directory or hub id."""
    title: str | None = None
    """What it is, for people."""
    digest: str | None = None
    """Measured digest of its weights and configuration."""
    aliases: tuple[str, ...] = ()
    """Other hub ids, directories or digests of the same base."""


class Score(Strict):
    """A held-out score of the brick alone on its base."""

    task: str
    metric: str
    n: int
    value: Measured
    low: Measured
    high: Measured
    base_value: Measured | None = None
    """The base's score on the same items."""


class BrickCard(Strict):
    """brick.yaml: what a brick is, what it was made on and from, how well it does alone."""

    version: Literal[1]
    name: str = Field(pattern=NAME)
    kind: Literal["adapter", "checkpoint", "edit"]
    skill: str = ""
    """What it teaches, in a line."""
    base: BaseRecord
    files: str = "."
    """Directory of the weights, relative to the card."""
    digest: str | None = None
    """Digest of the weights."""
    prompt_format: str = ""
    """How its prompts look."""
    generator: str | None = None
    """What made its items."""
    licence: str | None = None
    """Licence of weights and items."""
    data_licences: dict[str, str] = {}
    """Data set that it was trained on -> its licence, where that is not the licence above."""
    training: dict[str, Any] = {}
    """How it was trained: settings and measured record."""
    extraction: dict[str, Any] = {}
    """How it was taken from a checkpoint: rank, relative error, weights saved whole or dropped."""
    scores: tuple[Score, ...] = ()


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


def locate(reference: str, project: Path, what: str, hub: Hub = FETCH) -> tuple[Path, str | None]:
    """The directory of a local path or hub id, and the hub's commit.

    An existing path wins; `./`, `../`, `~` and `/` force a local one. Hub files are fetched into the hub's own cache, or headers of
    them into the project's: see `hub`.
    """
    name, _, revision = reference.partition("@")
    local = Path(reference).expanduser()
    local = local if local.is_absolute() else project / local
    if local.is_file():
        raise WorkbenchError(f"{what}: {reference} is a file, expected a directory", "Name the directory that holds it.")
    if local.exists():
        return local.resolve(), None
    forced = reference.startswith(("./", "../", "~", "/"))
    if forced or name.count("/") != 1 or name.split("/")[0] in ("bricks", "recipes", "runs"):
        raise _missing(reference, local, what)
    return hub.directory(name, revision or None, what, project)


def _missing(reference: str, local: Path, what: str) -> WorkbenchError:
    if reference == STARTER:
        return WorkbenchError(f"{what}: the starter base is not there yet ({reference})", "workbench brick fetch starter")
    near = [p.name for p in local.parent.iterdir() if p.is_dir()] if local.parent.is_dir() else []
    return WorkbenchError(
        f"{what}: no such directory: {reference}", nearest(local.name, near) if near else "Paths start at the project folder."
    )


def resolve_base(reference: str, project: Path, hub: Hub = FETCH) -> tuple[Checkpoint, str | None]:
    """The recipe's base and its hub commit. Errors: missing, not a checkpoint, quantised."""
    path, revision = locate(reference, project, "base", hub)
    if kinds_of(path) == ["adapter"]:
        raise WorkbenchError(
            f"base: {reference} is a LoRA adapter", "Name the model that it was trained on as base, and it under `bricks`."
        )
    read_config(path, "base")
    checkpoint = Checkpoint(path, "base")
    tidy(checkpoint)
    return checkpoint, revision


def resolve_brick(name: str, ref: BrickRef, project: Path, hub: Hub = FETCH) -> Brick:
    """A brick's files; its kind is detected where the reference does not say it.

    Errors: missing, a directory that is neither, a kind that contradicts the reference.
    """
    what = f"brick '{name}'"
    path, revision = locate(ref.target, project, what, hub)
    card = read_card(path) if (path / CARD).is_file() else None
    if ref.kind == "brick" and card is None and not (path / "train.yaml").is_file():
        raise WorkbenchError(
            f"{what}: no {CARD} in {ref.target}", "Use `adapter:` or `checkpoint:` for a directory without a card."
        )
    files = path / card.files if card else path
    kinds = kinds_of(files)
    if not kinds:
        if (path / "train.yaml").is_file():
            raise WorkbenchError(
                f"{what}: {ref.target} is built on demand and not there yet", f"workbench brick train {shell(ref.target)}"
            )
        refuse_foreign(files, what)
        raise WorkbenchError(
            f"{what}: {ref.target} holds neither {ADAPTER_CONFIG} nor a checkpoint ({SINGLE}, {INDEX})",
            "Expected a PEFT adapter, a Hugging Face checkpoint, or a directory with a brick.yaml.",
        )
    wanted = ref.kind if ref.kind in ("adapter", "checkpoint") else None
    if wanted and wanted not in kinds:
        raise WorkbenchError(
            f"{what}: {ref.target} is {_article(kinds[0])}, the recipe says {ref.kind}", f"Write `{kinds[0]}: {ref.target}`."
        )
    if card and not wanted:
        wanted = "checkpoint" if card.kind == "checkpoint" else "adapter"
    if len(kinds) > 1 and not wanted:
        raise WorkbenchError(
            f"{what}: {ref.target} holds an adapter ({ADAPTER_CONFIG}) and a checkpoint (config.json and safetensors files)",
            f"Say which one: `{name}: {{adapter: {ref.target}}}` or `{name}: {{checkpoint: {ref.target}}}`.",
        )
    return Brick(name, wanted if wanted in kinds else kinds[0], files, card, revision)


def _article(kind: str) -> str:
    return f"an {kind}" if kind == "adapter" else f"a {kind}"


def kinds_of(path: Path) -> list[str]:
    """What a directory holds: adapter, checkpoint, both or neither. Trainers leave the base's config.json beside an adapter.

    A directory with pickles only counts as what it tries to be: its reader refuses it.
    """
    adapter = (path / ADAPTER_CONFIG).is_file()
    weights = not adapter or (path / SINGLE).is_file() or (path / INDEX).is_file()
    checkpoint = (path / "config.json").is_file() and weights
    return ["adapter"] * adapter + ["checkpoint"] * checkpoint


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


def read_card(path: Path) -> BrickCard:
    """brick.yaml of a directory, validated."""
    return yamldoc.load(path / CARD).validate(BrickCard)


def write_card(path: Path, card: BrickCard, *, made_by: str = "workbench brick train", record: str = "train.yaml") -> None:
    """Write brick.yaml; its first line says what made it and where settings or measurements stand."""
    data = card.model_dump(mode="json", exclude_defaults=True)
    text = yamldoc.dump({"version": 1, **data}, width=120)
    what = {"train.yaml": "settings stand", "edit.json": "how it was solved stands"}.get(record, "every tensor's error stands")
    write_text(path / CARD, f"# Written by `{made_by}`; {what} in {record}.\n" + text)


def library(project: Path) -> list[tuple[str, BrickCard]]:
    """The bricks of a project's `bricks/` folder, by name."""
    return [(card.parent.name, read_card(card.parent)) for card in sorted((project / "bricks").glob(f"*/{CARD}"))]


def read_licence(path: Path) -> str | None:
    """`license:` of a README's YAML header."""
    return _readme_header(path).get("license")


def read_title(path: Path) -> str | None:
    """`model_name:` of a README's YAML header: what a model is called in cards."""
    return _readme_header(path).get("model_name")


def _readme_header(path: Path) -> dict[str, str]:
    """The texts and numbers at the header's top level, as they are written; none where it is no header that YAML reads."""
    readme = path / "README.md"
    if not readme.is_file():
        return {}
    with readme.open("rb") as stream:
        text = stream.read(yamldoc.MAX_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    match = re.match(r"---[ \t]*\n(.*?)(\n---|\Z)", text, re.DOTALL)
    return top_scalars(match[1]) if match else {}


def vocabulary_digest(path: Path, watched: WatchedFiles | None = None) -> str | None:
    """Digest of the vocabulary and its merges, from tokenizer.json; None where there is no such file. `watched` notes the file."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    content = jsondoc.parse(watched.read(file) if watched else file.read_bytes(), str(file))
    return json_digest(jsondoc.as_object(content, str(file)).get("model"))
