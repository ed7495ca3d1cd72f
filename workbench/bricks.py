"""What a recipe's references resolve to: files, kinds, cards, digests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from workbench import yamldoc
from workbench.adapters import CONFIG as ADAPTER_CONFIG
from workbench.adapters import WEIGHTS as ADAPTER_WEIGHTS
from workbench.adapters import Adapter
from workbench.errors import WorkbenchError, nearest
from workbench.fields import NAME, BrickRef, Strict
from workbench.hub import CARD, FETCH, Hub
from workbench.layout import Model
from workbench.weights.checkpoint import INDEX, SINGLE, Checkpoint, HeadersOnlyError, is_stand_in, read_config
from workbench.weights.digests import digests_known, entry_digest, fingerprint, json_digest, stamp, tensor_digests, weights_digest
from workbench.weights.specs import Weights

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
STARTER = "bricks/starter/base"
# Fields of config.json that change what equal weights compute.
_SHARED = frozenset({
    "model_type", "hidden_act", "activation_function", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "layer_types", "attention_bias",
    "logit_scale", "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling", "tie_word_embeddings",
})  # fmt: skip


class BaseRecord(Strict):
    """The base that a brick was made on."""

    id: str
    """Directory or hub id."""
    title: str | None = None
    """What it is, for people."""
    digest: str | None = None
    """Measured digest of its weights and configuration."""


class Score(Strict):
    """A held-out score of the brick alone on its base."""

    task: str
    metric: str
    n: int
    value: float
    low: float
    high: float
    base_value: float | None = None
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
    training: dict[str, Any] = {}
    """How it was trained: settings and measured record."""
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
        """The checkpoint. Errors: as `Checkpoint` and `drop_tied_copy`."""
        checkpoint = Checkpoint(self.path, self.label)
        drop_tied_copy(checkpoint)
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
        meaning = ("peft_type", "lora_alpha", "use_rslora", "alpha_pattern", "fan_in_fan_out")
        return json_digest([tensor_digests(self.adapter.entries, cache), {k: self.adapter.config.get(k) for k in meaning}])

    def known(self, cache: Path) -> bool:
        """Whether `digest` reads no large file."""
        return not self.headers_only if self.kind == "adapter" else digests_known(self.checkpoint.entries, cache)

    def stamp(self, cache: Path) -> str:
        """What stands for its content before it is read."""
        if self.kind == "adapter":
            return stamp(self.adapter.entries) if self.headers_only else self.digest(cache)
        return stamp(self.checkpoint.entries)

    def fingerprint(self, cache: Path) -> str:
        """A key of its content that orders bricks and seeds masks; a checkpoint is sampled for it, not read."""
        return self.digest(cache) if self.kind == "adapter" else fingerprint(self.checkpoint.entries)

    def licence(self) -> str | None:
        """Licence as its card or its README states it."""
        return self.card.licence if self.card and self.card.licence else read_licence(self.path)


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
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        raise WorkbenchError(
            f"base: {reference} is a LoRA adapter", "Name the model that it was trained on as base, and it under `bricks`."
        )
    read_config(path, "base")
    checkpoint = Checkpoint(path, "base")
    drop_tied_copy(checkpoint)
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
    found = kind_of(files)
    if found is None:
        if (path / "train.yaml").is_file():
            raise WorkbenchError(
                f"{what}: {ref.target} is built on demand and not there yet", f"workbench brick train {ref.target}"
            )
        raise WorkbenchError(
            f"{what}: {ref.target} holds neither {ADAPTER_CONFIG} nor a checkpoint ({SINGLE}, {INDEX})",
            "Expected a PEFT adapter, a Hugging Face checkpoint, or a directory with a brick.yaml.",
        )
    if ref.kind in ("adapter", "checkpoint") and ref.kind != found:
        raise WorkbenchError(
            f"{what}: {ref.target} is {_article(found)}, the recipe says {ref.kind}", f"Write `{found}: {ref.target}`."
        )
    return Brick(name, found, files, card, revision)


def _article(kind: str) -> str:
    return f"an {kind}" if kind == "adapter" else f"a {kind}"


def kind_of(path: Path) -> str | None:
    """adapter, checkpoint, or None. A directory with pickles only counts as what it tries to be: its reader refuses it."""
    if (path / ADAPTER_CONFIG).is_file():
        return "adapter"
    return "checkpoint" if (path / "config.json").is_file() else None


def check_checkpoint(brick: Brick, base: Model, weights: Weights | None = None) -> None:
    """Fit of a checkpoint brick: the base's tensors, all of them, in the base's shapes. Errors name what differs.

    Args:
        brick: The brick.
        base: The base, with the output's vocabulary.
        weights: The brick's weights where they are not the checkpoint's: aligned to another vocabulary.
    """
    have, want = (weights or brick.checkpoint).specs, base.weights.specs
    for name in want:
        if name in have and have[name].shape != want[name].shape:
            raise WorkbenchError(
                f"{brick.label}: {name} is {list(have[name].shape)}, the base has {list(want[name].shape)}",
                "Bricks of one recipe share the base's shapes.",
            )
    missing = [n for n in want if n not in have]
    extra = [n for n in have if n not in want]
    if missing or extra:
        text = [f"lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"] if missing else []
        text += [f"has {', '.join(extra[:3])}{' …' if len(extra) > 3 else ''} that the base does not"] if extra else []
        raise WorkbenchError(
            f"{brick.label}: {' and '.join(text)} ({len(have)} tensors, the base has {len(want)})",
            "A checkpoint brick is a fine-tune of the recipe's base: same architecture, same tensor names.",
        )


def compare_configs(brick: Brick, base: Checkpoint) -> list[str]:
    """Warnings where a checkpoint brick's config.json changes what equal weights compute."""
    mine, theirs = _meaning(brick.checkpoint.config), _meaning(base.config)
    changed = sorted(k for k in set(mine) & set(theirs) if mine[k] != theirs[k])
    return (
        [f"{brick.label}: config.json differs from the base's in {', '.join(changed)}; the base's is written"] if changed else []
    )


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of the fields in `_SHARED`; rotary settings in one form, whichever transformers wrote them."""
    found = {key: config[key] for key in _SHARED if key in config}
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("rope_theta") is not None:
        found["rope"] = {**{k: v for k, v in rope.items() if k not in ("type", "rope_type")}, "rope_type": kind}
    return found


def drop_tied_copy(checkpoint: Checkpoint) -> None:
    """Forget a stored copy of tied embeddings: one tensor, read and written once.

    Errors: the copy differs from the embeddings, so that what the config ties is not tied in the file.
    """
    if not checkpoint.config.get("tie_word_embeddings"):
        return
    for head in [n for n in checkpoint.entries if n.endswith(_HEADS)]:
        shape = checkpoint.entries[head].spec.shape
        for name, entry in checkpoint.entries.items():
            if name != head and entry.spec.shape == shape and name.endswith(_EMBEDDINGS):
                try:
                    differs = entry_digest(entry) != entry_digest(checkpoint.entries[head])
                except HeadersOnlyError:
                    differs = False
                    checkpoint.deferred.append(f"{checkpoint.label}: {head} equals {name}, as config.json says")
                if differs:
                    raise WorkbenchError(
                        f"{checkpoint.label}: {head} differs from {name}, which config.json says it equals",
                        "Set tie_word_embeddings to false there if the head is its own, else save the model again.",
                    )
                del checkpoint.entries[head]
                break


def read_card(path: Path) -> BrickCard:
    """brick.yaml of a directory, validated."""
    return yamldoc.load(path / CARD).validate(BrickCard)


def write_card(path: Path, card: BrickCard) -> None:
    """Write brick.yaml."""
    data = card.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump({"version": 1, **data}, sort_keys=False, allow_unicode=True, width=120)
    (path / CARD).write_text("# Written by `workbench brick train`; settings stand in train.yaml.\n" + text, "utf-8")


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
    readme = path / "README.md"
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    if not text.startswith("---"):
        return {}
    try:
        header = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return {}
    return {k: str(v) for k, v in header.items() if isinstance(v, (str, int, float))} if isinstance(header, dict) else {}


def vocabulary_digest(path: Path) -> str | None:
    """Digest of the vocabulary and its merges, from tokenizer.json; None where there is no such file."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    return json_digest(json.loads(file.read_text("utf-8")).get("model"))
