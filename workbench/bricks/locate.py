"""Lookup of the base and the bricks that a recipe names, and bases that are a checkpoint with an adapter on it."""

from __future__ import annotations

from pathlib import Path

from workbench.bricks.brick import STARTER, Brick, checkpoint_digest
from workbench.bricks.card import read_card
from workbench.bricks.hub import FETCH, Hub
from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.files import json_digest
from workbench.ground.foreign_names import ADAPTER, CARD, GGUF, INDEX, SINGLE, retyped
from workbench.ground.lazy import torch
from workbench.ground.manifest import require_whole
from workbench.ground.project import suggestion
from workbench.ground.recognize import look
from workbench.models.layout import Model
from workbench.models.sentences import transformer_in
from workbench.models.skeleton import tidy
from workbench.steps.fields import BrickRef
from workbench.weights.checkpoint import Checkpoint, read_config, refuse_foreign
from workbench.weights.specs import Source


class AdaptedCheckpoint(Checkpoint):
    """The checkpoint of a model with an adapter on it: the files are the model's, and every tensor is read with the adapter's update."""

    def __init__(self, plain: Checkpoint, adapter: Brick) -> None:
        from workbench.adapters.bind import bind

        super().__init__(plain.path, plain.label)
        tidy(self)
        self.adapter = adapter
        model = Model(plain, plain.config)
        if reason := adapter.unties(model):
            raise WorkbenchError(
                f"base: the adapter {reason}, which a base with an adapter cannot represent",
                f"Bake it into a checkpoint: `{shell('workbench', 'brick', 'bake', adapter.path, '--base', plain.path, '-o', 'DIR')}`.",
            )
        self._bound = bind(adapter.adapter, plain.specs, model)

    def open(self, name: str, device: torch.device) -> Source:
        """Open one tensor with the adapter's update."""
        return self._bound.updated(self, name, super().open(name, device), device)


def base_adapter(checkpoint: Checkpoint) -> Brick | None:
    """Return the adapter of a base that has one."""
    return checkpoint.adapter if isinstance(checkpoint, AdaptedCheckpoint) else None


def base_digest(checkpoint: Checkpoint, cache: Path | None) -> str:
    """Return the digest of a base, including its adapter.

    Args:
        checkpoint: The base.
        cache: Directory that caches digests of tensors; None reads all tensors.
    """
    digest, adapter = checkpoint_digest(checkpoint, cache), base_adapter(checkpoint)
    return digest if adapter is None else json_digest([digest, adapter.digest(cache)])


def locate(reference: str, project: Path, what: str, hub: Hub = FETCH) -> tuple[Path, str | None]:
    """Return the directory of a local path or hub id, and the commit of a hub repository.

    An existing path takes precedence over a hub id; `./`, `../`, `~` and `/` force a local path. `hub` downloads files into the
    hub's own cache, or only headers into the project's cache. For a GGUF file it is the directory that stands for the file.

    Args:
        reference: Path or hub id, with an optional "@REVISION".
        project: Directory that relative paths start from.
        what: Name of the model in error messages, such as "base".
        hub: Resolver of hub ids.

    Raises:
        WorkbenchError: If there is no such directory or repository, or it is a result whose files are not as they were written.
    """
    name, _, revision = reference.partition("@")
    local = Path(reference).expanduser()
    local = local if local.is_absolute() else project / local
    if local.exists() and (local.suffix == GGUF or any(local.glob(f"*{GGUF}"))):
        from workbench.bricks.gguf_files import find_gguf, gguf_folder

        if file := find_gguf(local, what):
            return gguf_folder(file, project, what), None
    if local.is_file():
        thing = look(local)
        found, hint = (thing.says, thing.hint) if thing else ("a file", "Use the directory that contains it.")
        hint = f"Write `{{recipe: {reference}}}`." if thing and thing.kind == "recipe" and what.startswith("brick") else hint
        raise WorkbenchError(f"{what}: {reference} is {found}, expected a directory", hint)
    if local.exists():
        require_whole(local.resolve())
        return transformer_in(local.resolve()), None
    forced = reference.startswith(("./", "../", "~", "/")) or retyped(reference)
    if (
        forced
        or "+" in name
        or local.suffix == GGUF
        or name.count("/") != 1
        or name.split("/")[0] in ("bricks", "recipes", "runs")
    ):
        raise _missing(reference, local, what, project)
    path, commit = hub.directory(name, revision or None, what, project)
    return transformer_in(path), commit


def _missing(reference: str, local: Path, what: str, project: Path) -> WorkbenchError:
    if reference == STARTER:
        return WorkbenchError(
            f"{what}: the starter base ({reference}) is not downloaded yet", "Run `workbench brick fetch starter`."
        )
    model, joined, adapter = reference.partition("+")  # as mergekit writes a model with an adapter on it
    if joined and (what == "base" or what.startswith("brick")):
        alone = f"Write {adapter} if {model} is the recipe's base, else make a recipe of the two and write `{{recipe: FILE}}`."
        hint = f"Write `base: {{adapter: {adapter}, on: {model}}}`." if what == "base" else alone
        return WorkbenchError(f"{what}: {reference} names a model and an adapter, expected one of them", hint)
    meant = retyped(reference)
    return WorkbenchError(
        f"{what}: no such {'file' if local.suffix == GGUF else 'directory'}: {reference}",
        f"Write {meant}." if meant else suggestion(local, project) or "Paths are relative to the project folder.",
    )


def resolve_base(reference: str, project: Path, hub: Hub = FETCH) -> tuple[Checkpoint, str | None]:
    """Return the recipe's base and its hub commit.

    Raises:
        WorkbenchError: If the base is missing, is not a checkpoint, or is quantized.
    """
    path, revision = locate(reference, project, "base", hub)
    if kinds_of(path) == ["adapter"]:
        refuse_foreign(path, "base", reference)
        hint = thing.hint if (thing := look(project / reference)) else "Set `base:` to its base, and list it under `bricks:`."
        raise WorkbenchError(f"base: {reference} is a LoRA adapter, expected a model", hint)
    read_config(path, "base")
    checkpoint = Checkpoint(path, "base")
    tidy(checkpoint)
    return checkpoint, revision


def resolve_brick(name: str, ref: BrickRef, project: Path, hub: Hub = FETCH) -> Brick:
    """Return the brick that a reference names, detecting its kind if the reference does not state it.

    Raises:
        WorkbenchError: If the directory is missing, holds neither an adapter nor a checkpoint, or is of another kind than the
            reference states.
    """
    what = f"brick '{name}'"
    path, revision = locate(ref.target, project, what, hub)
    card = read_card(path) if (path / CARD).is_file() else None
    if ref.kind == "brick" and card is None and not (path / "train.yaml").is_file():
        raise WorkbenchError(
            f"{what}: no {CARD} in {ref.target}", "Use `adapter:` or `checkpoint:` for a directory without a card."
        )
    files = path / card.files if card else path
    kinds = [] if card and card.kind == "neurons" else kinds_of(files)
    if not kinds:
        refuse_foreign(files if files.is_dir() and not is_neuron_set(path) else path, what, ref.target)
        raise WorkbenchError(
            f"{what}: {ref.target} holds neither {ADAPTER} nor a checkpoint ({SINGLE}, {INDEX})",
            suggestion(files, project) or "Expected a PEFT adapter, a Hugging Face checkpoint, or a directory with a brick.yaml.",
        )
    wanted = ref.kind if ref.kind in ("adapter", "checkpoint") else None
    if wanted and wanted not in kinds:
        raise WorkbenchError(
            f"{what}: {ref.target} is {'an' if kinds[0] == 'adapter' else 'a'} {kinds[0]}, but the recipe says {ref.kind}",
            f"Write `{kinds[0]}: {ref.target}`.",
        )
    if card and not wanted:
        wanted = "checkpoint" if card.kind == "checkpoint" else "adapter"
    if len(kinds) > 1 and not wanted:
        raise WorkbenchError(
            f"{what}: {ref.target} holds both an adapter ({ADAPTER}) and a checkpoint (config.json and safetensors files)",
            f"State which one to use: `{name}: {{adapter: {ref.target}}}` or `{name}: {{checkpoint: {ref.target}}}`.",
        )
    kind = wanted if wanted in kinds else kinds[0]
    if ref.part and kind == "adapter":
        raise WorkbenchError(
            f"{what}: `part: {ref.part}` is for a multimodal checkpoint, but {ref.target} is an adapter", "Remove `part`."
        )
    return Brick(name, kind, files, card, revision, ref.part)


def is_neuron_set(path: Path) -> bool:
    """Return whether a directory holds a set of neurons."""
    from workbench.activations.sets import RECORD as NEURONS

    return (path / NEURONS).is_file()


def kinds_of(path: Path) -> list[str]:
    """Return the kinds of brick in a directory: "adapter", "checkpoint", both or neither.

    A config.json next to an adapter is not enough for a checkpoint, because trainers leave the base's there. A directory that
    holds only pickles still has a kind, and its reader raises the error.
    """
    adapter = (path / ADAPTER).is_file()
    weights = not adapter or (path / SINGLE).is_file() or (path / INDEX).is_file()
    checkpoint = (path / "config.json").is_file() and weights
    return ["adapter"] * adapter + ["checkpoint"] * checkpoint


def base_of(path: Path, project: Path, hint: str) -> str:
    """Return the base that a brick names on its card or in adapter_config.json.

    Raises:
        WorkbenchError: If the brick names no base, or the base cannot be found.
    """
    card = read_card(path) if (path / CARD).is_file() else None
    files = path / card.files if card else path
    base_name = card.base.id if card else jsondoc.optional(files / ADAPTER).get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        raise WorkbenchError(f"{path}: neither {CARD} nor {ADAPTER} names its base", hint)
    try:
        locate(base_name, project, "base")
    except WorkbenchError as error:
        raise WorkbenchError(f"{path}: the brick's base {base_name} cannot be found ({error.message})", hint) from None
    return str(base_name)
