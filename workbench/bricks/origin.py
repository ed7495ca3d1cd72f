"""Checks of bricks against the recipe's base: where they were made, their integer tensors, and whether they untie its head."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.bricks.brick import Brick, BrickSource
from workbench.bricks.card import readme_header
from workbench.bricks.fitting import PartlyFitted, lacking
from workbench.bricks.header_folders import snapshot_with
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import read_json
from workbench.models.architecture import (
    UntiedWeights,
    counterpart,
    model_depth,
    text_parts,
    tied_embeddings,
    untied_config,
    with_head_of,
)
from workbench.models.layout import Model
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import entry_digest, fingerprint, tensor_digests
from workbench.weights.header import HeadersOnlyError
from workbench.weights.specs import Weights

_CARD, _CONFIG = "brick.yaml", "adapter_config.json"
# Settings of PEFT that restrict an adapter to some layers, so that missing layers show nothing about the base.
_RESTRICTIONS = ("layers_to_transform", "layers_pattern", "exclude_modules", "layer_replication")


@dataclass(frozen=True)
class NamedBase:
    """The recipe's base and its names.

    Attributes:
        reference: The directory or hub id that the recipe gives.
        path: Its directory.
        model: Its tensors and config.json.
        digest: Digest of its weights and configuration, or None if it is not known.
    """

    reference: str
    path: Path
    model: Model
    digest: str | None = None

    def is_named(self, name: str, project: Path) -> bool:
        """Return whether a name refers to this base: the same hub id, directory or digest."""
        names = [text.partition("@")[0].rstrip("/") for text in (name, self.reference, str(self.path))]
        ids = [(_hub_id(text) or os.path.normpath(text)).casefold() for text in names]
        if names[0] and (names[0] == self.digest or ids[0] in ids[1:]):
            return True
        place = _directory(names[0], project)
        return place is not None and place.resolve() == self.path.resolve()

    def is_called(self, name: str) -> bool | None:
        """Return whether a name ends as this base's does: a copy of org/llama-3-8b in models/llama-3-8b; None if one could be any model's."""
        ends = [
            (_hub_id(text) or text).partition("@")[0].rstrip("/").rpartition("/")[2].casefold()
            for text in (name, self.reference, str(self.path))
        ]
        mine, given, folder = ["" if _ANY_MODEL.fullmatch(end) else end for end in ends]
        return True if mine and mine in (given, folder) else False if mine and given else None


_ANY_MODEL = re.compile(
    r"(base|model|merged|output|out|final|last|latest|best|hf|ckpt|checkpoint|results?|global_step)([-_]?\d+)?", re.IGNORECASE
)
"""Names of directories that any model may have."""


def recorded_digests(brick: Brick) -> list[str]:
    """Return the digest and aliases of the base on the brick's card, or nothing if the card has no digest."""
    if brick.card is None or brick.card.base.digest is None:
        return []
    return [brick.card.base.digest, *brick.card.base.aliases]


def check_origin(brick: Brick, base: NamedBase, project: Path, *, any_base: bool = False) -> list[str]:
    """Compare what a brick says about its base with the recipe's base.

    The evidence, strongest first: the digest on the brick's card, names of the base, model type and depth, layers that the
    adapter must have updated on this base. An equal digest ends the search.

    Returns:
        Warnings: no proof that the brick was made on the base, a name that contradicts it, or a contradiction that the recipe accepts.

    Raises:
        WorkbenchError: If the evidence contradicts the base and `any_base` is false.
    """
    digests = recorded_digests(brick)
    if base.digest and base.digest in digests:
        return []
    names, reasons = _names(brick), []
    if digests and base.digest:
        reasons.append(f"its {_CARD} records other weights or another config.json ({digests[0][:10]}, here {base.digest[:10]})")
    reasons += _contradictions(brick, base, project)
    if reasons:
        text = f"{brick.label} was made on another base than {base.reference}: {'; '.join(reasons)}"
        if any_base:
            return [f"{text}. The recipe accepts this (any_base), but the delta transfers only approximately"]
        reference = {"adapter": "adapter", "checkpoint": "checkpoint"}[brick.kind]
        own = f"the brick's own base ({next(iter(names))})" if names else "the brick's own base"
        raise WorkbenchError(
            text,
            f"Set `base:` to {own}. To merge the brick on this base anyway, set any_base in the recipe: "
            f"`{brick.name}: {{{reference}: …, any_base: true}}`.",
        )
    should_name_base = brick.kind == "adapter" or names
    called = {name: True if base.is_named(name, project) else base.is_called(name) for name in names}
    if not should_name_base or any_base or digests or True in called.values():
        return []
    mapping = brick.adapter.config.get("auto_mapping") if brick.kind == "adapter" else None
    alike = " and model class" if "transformers.models." in str(mapping) and _types(base.model.config) else ""  # else refused
    fits = f"{brick.label} fits {base.reference} in shape{alike}"
    evidence = f"{next(iter(names.values()))} names {next(iter(names))}" if names else f"its {_CONFIG} names no base"
    if other := next((name for name, same in called.items() if same is False), None):
        return [
            f"{fits}, but {names[other]} names {other}. If that is the same model, add `any_base: true` to the brick in the recipe, "
            f"or list {base.reference} under base.aliases in its {_CARD}"
        ]
    return [f"{fits}, which does not prove that it was made on {base.reference} ({evidence})"]


def changes_nothing(brick: Brick, base: Model, cache: Path) -> bool:
    """Return whether every tensor of the brick's delta is zero, stopping at the first one that is not."""
    if brick.kind == "adapter":
        from workbench.adapters.bind import bind

        return bind(brick.adapter, base.weights.specs, base).is_zero(base)
    mine, theirs = brick.checkpoint, getattr(base.weights, "entries", None)
    if theirs is None or mine.specs != base.weights.specs or fingerprint(mine.entries) != fingerprint(theirs):
        return False
    return tensor_digests(mine.entries, cache) == tensor_digests(theirs, cache)


def _names(brick: Brick) -> dict[str, str]:
    """Return the names that the brick gives its base, the card's first, and the file that says each; an adapter's README.md counts."""
    card = dict.fromkeys(filter(None, [brick.card.base.id, *brick.card.base.aliases] if brick.card else ()), _CARD)
    if brick.kind != "adapter":
        return card
    config, readme = brick.adapter.config.get("base_model_name_or_path"), readme_header(brick.path).get("base_model")
    others = [(config, _CONFIG), (None if readme == config else readme, "README.md")]
    return card | {str(name): file for name, file in others if name and name not in card}


def _contradictions(brick: Brick, base: NamedBase, project: Path) -> Iterator[str]:
    """Yield evidence that the brick was made on another architecture."""
    config = base.model.config
    for source, other in _configs(brick, base, project):
        if _types(other) and _types(config) and not _types(other) & _types(config):
            yield f"{source} is of a {other.get('model_type')} model, the base is a {config.get('model_type')} model"
            return
        mine, theirs = model_depth(config), model_depth(other)
        if mine and theirs and mine != theirs:
            yield f"{source} is of a model with {theirs} layers, the base has {mine}"
            return
    if brick.kind != "adapter":
        return
    if (wrong := _other_class(brick.adapter.config, config)) or (wrong := _lost_layers(brick, base.model)):
        yield wrong


def _configs(brick: Brick, base: NamedBase, project: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (description, content) of each local config.json of the brick's own base."""
    if brick.kind == "checkpoint":
        yield "its config.json", brick.checkpoint.config
        return
    if isinstance(config := read_json(brick.path / "config.json"), dict):
        yield "the config.json next to it", config
    for name in _names(brick):
        if base.is_named(name, project):
            continue
        place = _directory(name, project)
        if place is None and _hub_id(name) == name:
            place = snapshot_with(name, None, "config.json")
        if place is not None and isinstance(config := read_json(place / "config.json"), dict):
            yield f"{name}, the base that it names,", config


def _directory(name: str, project: Path) -> Path | None:
    """Return the directory that a name refers to, or None if it does not exist or is not a valid path."""
    try:
        place = project / Path(name).expanduser()
        return place if name and place.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # name too long, NUL character, home directory of an unknown user
        return None


def _types(config: Mapping[str, object]) -> set[str]:
    """Return the model types of a configuration and its text decoder; of an Omni model also of its thinker, which is trained and saved alone."""
    thinker = config.get("thinker_config")
    parts = [*text_parts(config), *(text_parts(thinker) if isinstance(thinker, Mapping) else ())]
    return {str(part["model_type"]) for part in parts if part.get("model_type")}


def _other_class(adapter: Mapping[str, object], config: Mapping[str, object]) -> str | None:
    """Compare the class that PEFT records in `auto_mapping` with the base's model type, and describe a difference."""
    recorded = adapter.get("auto_mapping")
    if not isinstance(recorded, dict):
        return None
    library = str(recorded.get("parent_library") or "").split(".")
    if library[:2] != ["transformers", "models"] or len(library) < 3 or not _types(config):
        return None
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    families = {model_type_to_module_name(name) for name in _types(config)}
    if library[2] in families:
        return None
    return f"its {_CONFIG} records the class {recorded.get('base_model_class')}, the base is a {config.get('model_type')} model"


def _lost_layers(brick: Brick, base: Model) -> str | None:
    """Describe the last layers of the base that match the adapter's `target_modules` but have no update in the adapter.

    PEFT updates every module whose name is in the list, or ends with a listed name after a dot, in all layers. An adapter that
    updates only the first layers was therefore made on a model with fewer layers. Gaps between updated layers prove nothing.
    """
    config = brick.adapter.config
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in _RESTRICTIONS):
        return None
    try:
        layout = base.layout
    except WorkbenchError:
        return None
    disks = [counterpart(f"{part.module}.weight", base.weights.specs) for part in brick.adapter.keys.parts]
    layers = {layout.layer(disk) for disk in disks if disk is not None} - {None}
    count = len(layers)
    ends = tuple(f".{target}.weight" for target in targets)
    lost = [n for n in range(count, layout.depth) if any(f".{name}".endswith(ends) for name in layout.in_layer(n))]
    if None in disks or not layers or layers != set(range(count)) or not lost or len(lost) < layout.depth - count:
        return None
    return f"it updates layers 0 to {count - 1}, and its target_modules name modules of the base's {layout.depth} layers"


def _hub_id(name: str) -> str | None:
    """Return the hub id in a name or in the path of a directory in the hub's cache, or None."""
    parts = Path(name).parts
    cached = [part for part in parts if part.startswith("models--")]
    if cached:
        return cached[-1].removeprefix("models--").replace("--", "/")
    return name if name.count("/") == 1 and not name.startswith((".", "~", "/")) else None


# Integer buffers that count training steps. BatchNorm reads its counter only in training, and only with momentum=None.
_COUNTERS = ("num_batches_tracked",)


def check_integers(brick: Brick, base: Checkpoint, weights: Weights) -> list[str]:
    """Compare the integer and boolean tensors of a checkpoint brick with the base's.

    Returns:
        A note if counters differ. The result uses the base's values.

    Raises:
        WorkbenchError: If another integer tensor differs. Such tensors are lookup tables or masks, which cannot be averaged.
    """
    kept, weights = lacking(weights), weights.weights if isinstance(weights, PartlyFitted) else weights
    integers = {n: e for n, e in base.entries.items() if not e.spec.is_float and n in weights.specs and n not in kept}
    if not integers:
        return []
    from workbench.models.live import Aligned

    counters = []
    for name, entry in integers.items():
        sources = weights.sources(name) if isinstance(weights, Aligned) else [name]
        if len(sources) == 1 and entry_digest(entry) == entry_digest(brick.checkpoint.entries[sources[0]]):
            continue
        if name.rpartition(".")[2] in _COUNTERS:
            counters.append(name)
            continue
        raise WorkbenchError(
            f"{brick.label}: the {entry.spec.kind} tensor {name} differs from the base's, but only floating-point tensors can be merged",
            "Use a fine-tune that leaves this tensor unchanged.",
        )
    if not counters:
        return []
    shown = f"{counters[0]}{', …' if len(counters) > 1 else ''}"
    return [f"{brick.label}: {len(counters)} training counters differ ({shown}); the result uses the base's values"]


def untied(checkpoint: Checkpoint) -> Model:
    """Return a tied base with its head as a separate tensor."""
    names = tied_embeddings(checkpoint.specs, checkpoint.config)
    assert names is not None
    return Model(UntiedWeights(checkpoint, *names), untied_config(checkpoint.config))


def base_for(bricks: Sequence[Brick], checkpoint: Checkpoint) -> Model:
    """Return the base for a set of bricks, with a separate head if one of them unties it, and with the rows that an only adapter adds."""
    tied = Model(checkpoint, checkpoint.config)
    base = untied(checkpoint) if any(brick.unties(tied) for brick in bricks) else tied
    if [brick.kind for brick in bricks] != ["adapter"]:
        return base
    from workbench.adapters.bind import AdaptedWeights

    return AdaptedWeights(bricks[0].adapter, base).base


def find_ties(
    bricks: Mapping[str, BrickSource], checkpoint: Checkpoint, later: list[str]
) -> tuple[dict[str, str], dict[str, WorkbenchError]]:
    """Find the bricks that untie the base's head from its embeddings.

    Args:
        bricks: Name -> brick.
        checkpoint: The base.
        later: List that receives messages about checks that require tensors not downloaded yet.

    Returns:
        Brick -> how it unties the base, and brick -> error for bricks that cannot be read.
    """
    reasons, problems = {}, {}
    tied = Model(checkpoint, checkpoint.config)
    for name, brick in bricks.items():
        try:
            if reason := brick.unties(tied):
                reasons[name] = f"brick '{name}' {reason}: the output is untied, with its head stored as a separate tensor"
        except HeadersOnlyError:
            later.append(f"brick '{name}': head and embeddings stay tied")
        except WorkbenchError as error:
            problems[name] = error
    return reasons, problems


def rows_of(brick: Brick, base: Model) -> tuple[Weights, dict[str, object] | None]:
    """Return the weights of a brick, the source of vocabulary rows, and the configuration of a checkpoint; an adapter has none."""
    if brick.kind == "adapter":
        from workbench.adapters.bind import AdaptedWeights

        return AdaptedWeights(brick.adapter, base), None
    return with_head_of(brick.checkpoint, base.weights, brick.checkpoint.config), brick.checkpoint.config
