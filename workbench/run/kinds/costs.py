"""Costs of steps for `plan`: bytes, tokens and memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workbench.bricks.brick import Brick
from workbench.grow.expansion.remap import GrownWeights
from workbench.grow.expansion.streamed import streamed_bytes
from workbench.models.layout import Model
from workbench.resolve.adapter_form import keeps_rank
from workbench.resolve.resolved import Resolved
from workbench.run.efficacy import is_counted
from workbench.run.kinds.train_new import check_training
from workbench.run.peaks import Merged, adapter_bytes, largest, merge_bytes
from workbench.steps import EditMethod, GrowMethod, MemoryMethod, MergeMethod, Step, TrainMethod
from workbench.train import TrainSpec, training_cost
from workbench.weights.writer import output_specs

# More once transformers has built a model on the meta device, which names its modules: measured 0.16 GB.
_TRANSFORMERS = 160_000_000


# Of a live float32 model that reads text, at 2 FLOP a parameter and token: one core, SmolLM2-135M, rows of 256 tokens, 5.0 ms a token.
# A token of an edit's values (three times that for forward and back, on the layers above the edited one and behind the lookup alone) takes
# about as long as one that is read: measured 5.2 ms looked up at the subject, 2.4 ms at the prompt's end.
_FLOPS_PER_SECOND = 5e10


# Tokens that the check of a growth runs through a model: two rows of logits and one of generation; two steps of gradients, three passes each.
_CHECKED, _LEARNED = 84, 288


@dataclass
class _Needs:
    """What the steps of a plan add up to.

    Attributes:
        read: Bytes read.
        threads: Tensors that are computed at a time.
        live: Most memory of live models, in bytes.
        whole: Bytes of the largest tensors that a step holds whole, one a thread.
        tensors: Tensor -> most bytes that a merge step takes for it.
        ranks: Tensor -> rank of what the merge steps add to it; None where that is no product of factors.
        width: Most bricks of a merge.
        seconds: Of work that is not reading and writing.
        cached: Steps whose result is kept.
    """

    read: int
    threads: int
    live: int = 0
    whole: int = 0
    tensors: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int | None] = field(default_factory=dict)
    width: int = 1
    seconds: float = 1.5
    cached: list[str] = field(default_factory=list)


def _numel(model: Model) -> int:
    return sum(s.numel for s in model.weights.specs.values())


def _merge_row(step: MergeMethod, resolved: Resolved, needs: _Needs) -> dict[str, Any]:
    names = resolved.recipe.used_bricks(step)
    row: dict[str, Any] = {"bricks": {n: kind_name(resolved.bricks[n]) for n in names}, "passes": step.laws.passes}
    needs.read += sum(
        _brick_bytes(resolved.bricks[n]) * (step.laws.passes if kind_name(resolved.bricks[n]) != "adapter" else 1) for n in names
    )
    needs.width = max(needs.width, len(names))
    merged = Merged.of(resolved, names)
    sizes = merge_bytes(step, resolved, names, merged)
    needs.whole = max(needs.whole, largest(sizes.values(), needs.threads))
    for name, held in sizes.items():
        needs.tensors[name] = max(held, needs.tensors.get(name, 0))
        rank = merged.ranks[name] if merged and keeps_rank(step) else None
        before = needs.ranks.get(name, 0)
        needs.ranks[name] = None if rank is None or before is None else before + rank
    if edits := [edit for n in names for edit in _inner_edits(resolved.bricks[n], n)]:
        row["edits"] = edits
        needs.seconds += sum(edit.get("seconds", 0) for edit in edits)
        needs.live = max(needs.live, 8 * _numel(resolved.base))
    if step.laws.needs != "tensor":
        row |= {"needs": step.laws.needs, "inputs": step.inputs()}
        needs.live = max(needs.live, step.measure_bytes(resolved.base))
    return row


def _grow_row(step: GrowMethod, at: int, model: Model, resolved: Resolved, needs: _Needs) -> tuple[dict[str, Any], Model]:
    """The row, and the grown model."""
    growth, before = step.expand(model), _numel(model)
    row = dict(growth.record)
    if names := step.names():
        row["bricks"] = {n: kind_name(resolved.bricks[n]) for n in names}
        needs.read += sum(_brick_bytes(resolved.bricks[n]) for n in names)
    if files := step.files():
        row["inputs"] = files
    weights = GrownWeights(model.weights, growth, base=resolved.base.weights)
    check_training(step, weights)
    grown = Model(weights, growth.config)
    after, written = _numel(grown), sum(s.nbytes for s in output_specs(weights.specs, resolved.dtype).values())
    # The check holds the model before, the one after, its gradients, and a copy while it is loaded: measured 3.7 GB of 134 to 226 million.
    live = [
        4 * before + 12 * after if step.is_checked() else 0,
        8 * before if step.measures() else 0,
        _TRANSFORMERS if step.builds else 0,
    ]
    if step.check != "off":
        row["check"] = step.check
        needs.read += written
    if step.check != "off" and not step.is_checked():  # logits of two short prompts, both models streamed
        live.append(_TRANSFORMERS + max(streamed_bytes(m) for m in (model, grown)))
        needs.read += sum(s.nbytes for m in (model, grown) for s in m.weights.specs.values())
    if step.check == "full":
        live.append(2 * written)  # what was written, loaded by transformers
        needs.seconds += 2 * 2 * after * _CHECKED / _FLOPS_PER_SECOND
    if step.is_checked():
        needs.seconds += 2 * (before * _CHECKED + after * (_CHECKED + _LEARNED)) / _FLOPS_PER_SECOND
    if step.train:
        row["trains_on"] = step.train.data
        if not _is_cached(resolved, at):
            row |= _training_cost(training_cost(TrainSpec(**step.train.settings()), resolved.recipe.project), after)
            needs.seconds += row.get("seconds", 0)
            live.append(20 * after)  # weights, gradients, Adam's two moments, and a copy while it is loaded
    needs.live = max(needs.live, *live)
    return row, grown


def _solved_row(step: Step, at: int, model: Model, resolved: Resolved, needs: _Needs) -> dict[str, Any]:
    """Of a step whose result is kept: an edit, a memory, a brick that is trained."""
    assert isinstance(step, (EditMethod, MemoryMethod, TrainMethod))
    row: dict[str, Any] = {"inputs": step.inputs()}
    per_parameter = 8
    if _is_cached(resolved, at):
        needs.cached.append(resolved.recipe.step_ids[at])
        if not isinstance(step, TrainMethod) and not is_counted(resolved, at):  # its facts are asked for on a live model
            needs.live = max(needs.live, per_parameter * _numel(model))
        return row
    if isinstance(step, TrainMethod) and not isinstance(data := step.settings(0).data, str):
        row["trains_on"] = data.hub
    if isinstance(step, EditMethod):
        row |= _edit_cost(step, model, resolved)
    elif isinstance(step, TrainMethod):
        row |= _training_cost(step.cost(resolved.recipe.project), _numel(model))
        per_parameter = 20 if step.settings(0).method == "full" else 8
    needs.live = max(needs.live, per_parameter * _numel(model))
    needs.seconds += row.get("seconds", 0)
    return row


def _training_cost(cost: dict[str, Any], parameters: int) -> dict[str, Any]:
    """With the seconds that it takes, where tokens are known: forward and back are three times a forward pass."""
    return {
        "cost": cost,
        **({"seconds": round(6 * parameters * cost["tokens"] / _FLOPS_PER_SECOND, 1)} if "tokens" in cost else {}),
    }


def _is_cached(resolved: Resolved, number: int) -> bool:
    """Whether the cache has what a step solves or trains."""
    step = resolved.recipe.steps[number]
    if resolved.headers_only:
        return False
    key = resolved.keys[number]
    kept = {MemoryMethod: f"memories/{key}/memory.json", EditMethod: f"edits/{key}/edit.json", TrainMethod: f"bricks/{key}/brick.yaml",
            GrowMethod: f"grown/{key}.safetensors"}  # fmt: skip
    return any(isinstance(step, kind) and (resolved.cache / file).is_file() for kind, file in kept.items())


def _inner_edits(brick: Brick | Resolved, name: str) -> list[dict[str, Any]]:
    """Edits of a recipe as a brick, and of its own bricks, that are not solved yet: what they cost."""
    if isinstance(brick, Brick):
        return []
    found = [edit for n, inner in brick.bricks.items() for edit in _inner_edits(inner, f"{name}.{n}")]
    for i, (step, step_id) in enumerate(zip(brick.recipe.steps, brick.recipe.step_ids, strict=True)):
        if isinstance(step, EditMethod) and not _is_cached(brick, i):
            found.append({"id": f"{name}.{step_id}", "edit": step.name, **_edit_cost(step, brick.base, brick)})
    return found


def _edit_cost(step: EditMethod, model: Model, resolved: Resolved) -> dict[str, Any]:
    """What an edit that the cache does not have costs, as its method says, and about how long its tokens take."""
    cost = step.cost(model, resolved.recipe.project, resolved.cache)
    if "tokens" not in cost:
        return {"cost": cost} if cost else {}
    parameters = sum(s.numel for s in model.weights.specs.values())
    return {"cost": cost, "seconds": round(2 * parameters * cost["tokens"] / _FLOPS_PER_SECOND, 1)}


def kind_name(brick: Brick | Resolved) -> str:
    return brick.kind if isinstance(brick, Brick) else "recipe"


def _brick_bytes(brick: Brick | Resolved) -> int:
    if isinstance(brick, Resolved):
        return sum(_brick_bytes(b) for b in brick.bricks.values()) + sum(s.nbytes for s in brick.base.weights.specs.values())
    return sum(file.stat().st_size for file in brick.files())


def _adapter_whole(resolved: Resolved, needs: _Needs, dense: bool) -> int:
    """Bytes that an adapter's updates take: of the largest tensors while they are brought to their rank, and of all that are held."""
    base, rank = resolved.base, resolved.recipe.fields.output.rank
    linear = {n: s for n, s in base.weights.specs.items() if len(s.shape) == 2 and base.layout.layer(n) is not None}
    reached = {n: s for n, s in (linear if dense else base.weights.specs).items() if n in needs.ranks and len(s.shape) == 2}
    work, held = adapter_bytes(reached, needs.ranks, rank if isinstance(rank, int) else None, needs.tensors)
    return largest(work, needs.threads) + held


def _factor_bytes(brick: Brick) -> int:
    """What an adapter's largest update takes while it is merged: two factors as read, in float32, and stacked with others."""
    return 24 * max((entry.spec.numel for entry in brick.adapter.entries.values()), default=0)
