"""`brick extract` and `brick bake`: conversion of a fine-tuned checkpoint to an adapter, and of an adapter to a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from workbench.adapters.approximate import AdaptedWeights, Policy
from workbench.adapters.export import write_result
from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.bricks.brick import Brick
from workbench.bricks.card import BaseRecord, BrickCard, read_card, read_licence, read_title, write_card
from workbench.bricks.fitting import fitted
from workbench.bricks.locate import base_of, kinds_of, locate, resolve_base
from workbench.bricks.origin import check_integers
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.files import check_new, new_directory, write_json
from workbench.ground.foreign_names import CARD, brick_name
from workbench.ground.project import cache_of
from workbench.ground.results import JsonObject, Number, Result, absent
from workbench.models.layout import Model
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.device import Work
from workbench.run.execute import execute
from workbench.run.record import RunResult
from workbench.weights.device import exact
from workbench.weights.digests import tensor_digests, weights_digest

RECORD = "extract.json"


class ExtractedTensor(JsonObject):
    """The low-rank update of one tensor."""

    rank: int
    """Rank of the update."""
    norm: Number
    """Norm of the tensor's delta."""
    error: Number
    """Norm of delta minus update, over the norm of the delta."""
    rounding: Number
    """Error from rounding the fine-tune's weights, over the norm of the delta; no rank gets below it."""


class Extraction(Result):
    """An adapter extracted from a fine-tuned checkpoint. All fields but `adapter` are also written to extract.json."""

    adapter: str
    """Directory of the adapter."""
    checkpoint: str
    """Directory or hub id of the checkpoint."""
    base: str
    """Directory or hub id of the base."""
    tensors: dict[str, ExtractedTensor]
    """Tensor -> its update."""
    whole: list[str]
    """Tensors that are saved whole."""
    dropped: list[str]
    """Tensors whose change is dropped."""
    norm: Number
    """Norm of all updates together."""
    error: Number
    """Relative error of all updates together; a dropped tensor counts as lost."""
    rounding: Number
    """Relative rounding error of all updates together."""
    rank: int
    """Largest rank."""
    uniform: bool
    """Whether all updates have the same rank."""
    plain: bool
    """Whether the adapter has low-rank updates only, so that every LoRA loader reads it."""
    digest: str
    """Digest of the adapter's files."""
    digests: dict[str, str]
    """Name of a tensor in the adapter's file -> digest."""
    parameters: int
    """Number of parameters of the adapter."""
    bytes: int
    """Size of the adapter's tensors in bytes."""
    notes: list[str] | None = absent()
    """Notes on tensors that differ from the base in type."""


def extract(checkpoint: str, base: str, out: Path, policy: Policy, work: Work, *, project: Path) -> Extraction:
    """Write the difference between a fine-tuned checkpoint and its base as a PEFT adapter with a card.

    The memory required is a few times the size of the largest tensor per thread.

    Raises:
        WorkbenchError: If the checkpoint is an adapter, has another architecture than the base or equals it, or if `out`
            exists.
    """
    path, _ = locate(checkpoint, project, "checkpoint")
    if "checkpoint" not in kinds_of(path):
        problem = "is already a PEFT adapter" if kinds_of(path) else "is not a checkpoint (it has no config.json)"
        raise WorkbenchError(f"{checkpoint} {problem}", f"`workbench brick show {shell(checkpoint)}` shows its content.")
    brick = Brick(path.name, "checkpoint", path)
    base_checkpoint, _ = resolve_base(base, project)
    base_model = Model(base_checkpoint, base_checkpoint.config)
    tuned = fitted(brick, base_model)
    notes = check_integers(brick, base_checkpoint, tuned)
    adapted = AdaptedWeights(Model(tuned, base_checkpoint.config), base_model, policy)
    with new_directory(out) as partial, exact(work.device):
        written = write_result(
            adapted,
            partial,
            base,
            device=work.device,
            threads=work.threads,
            progress=lambda done, total: work.events(
                {"stage": "extract", "done": done, "total": total, "text": f"{total} tensors"}
            ),
        )
        cache = cache_of(project)
        digest = weights_digest(base_checkpoint.specs, tensor_digests(base_checkpoint.entries, cache), base_checkpoint.config)
        made = Extraction(adapter=str(out), checkpoint=checkpoint, base=base, **written, notes=notes or None)
        write_json(partial / RECORD, {key: value for key, value in made.to_dict().items() if key != "adapter"}, indent=1)
        card = BrickCard(
            version=1,
            name=brick_name(out),
            kind="adapter",
            base=BaseRecord(id=base, title=read_title(base_checkpoint.path), digest=digest),
            digest=_digest(partial),
            licence=read_licence(path),
            extraction={
                "checkpoint": checkpoint,
                "digest": brick.digest(cache),
                "rank": made.rank,
                "error": float(f"{made.error:.3g}"),
                "rounding": float(f"{made.rounding:.3g}"),
                "tensors": len(made.tensors),
                "whole": made.whole,
                "dropped": made.dropped,
            },
        )
        write_card(partial, card, made_by="workbench brick extract", record=RECORD)
    return made


def _digest(path: Path) -> str | None:
    """Return the adapter's digest as `brick verify` computes it, or None if such an adapter cannot be read back."""
    try:
        return Brick(path.name, "adapter", path).digest(None)
    except WorkbenchError:
        return None


def bake(adapter: str, base: str | None, out: Path, work: Work, *, project: Path, dtype: str | None = None) -> RunResult:
    """Write an adapter merged into its base as a checkpoint, by a recipe `merge: task_arithmetic` with one brick.

    An interrupted call resumes when it is repeated.

    Args:
        adapter: Directory or hub id of the adapter.
        base: Directory or hub id of the base; None uses the base that the adapter's card or configuration names.
        out: New directory, written atomically.
        work: Where it computes, and who hears of its progress.
        project: Directory that relative paths start from.
        dtype: Data type of the checkpoint; None keeps the base's.

    Returns:
        The result of the run, with `out` as its model.

    Raises:
        WorkbenchError: If the adapter is a checkpoint or names no base, or if `out` exists.
    """
    path, _ = locate(adapter, project, "adapter")
    files = path / read_card(path).files if (path / CARD).is_file() else path
    if "adapter" not in kinds_of(files):
        problem = "is already a checkpoint" if kinds_of(files) else f"is not an adapter (it has no {ADAPTER_CONFIG})"
        raise WorkbenchError(f"{adapter} {problem}", f"`workbench brick show {shell(adapter)}` shows its content.")
    base = base or base_of(path, project, f"Set --base DIR to the model that {adapter} was trained on.")
    runs = out.with_name(f".{out.name}.baking")
    if out.exists():
        shutil.rmtree(runs, ignore_errors=True)  # of a call that was interrupted after it had written `out`
    check_new(out)
    kind = "brick" if (path / CARD).is_file() else "adapter"
    data = {
        "version": 1,
        "name": brick_name(out),
        "base": base,
        "bricks": {"adapter": {kind: adapter}},
        "steps": [{"merge": "task_arithmetic"}],
        "output": {"dtype": dtype} if dtype else {},
    }
    made = execute(resolve(from_data(data, project)), runs, work)
    if out.is_dir():
        out.rmdir()
    Path(made.place).rename(out)
    shutil.rmtree(runs, ignore_errors=True)
    return made.model_copy(update={"run": None, "model": str(out)})
