"""plan(recipe): what a run would do, from headers alone: steps, bytes, memory, time, problems."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workbench.adapter_output import keeps_rank, planned_bytes
from workbench.bricks import Brick
from workbench.card import licence_warnings
from workbench.efficacy import is_counted
from workbench.errors import size
from workbench.grow.remap import GrownWeights
from workbench.grow.streamed import streamed_bytes
from workbench.layout import Model
from workbench.peaks import Merged, adapter_bytes, buffer_bytes, device_buffer_bytes, largest, merge_bytes
from workbench.registry import EditMethod, GrowMethod, MemoryMethod, MergeMethod, Step, TrainMethod
from workbench.resolve import Resolved
from workbench.runs import Run, run_for
from workbench.saved import refers_to_base
from workbench.standins import space_problems
from workbench.train import TrainSpec, training_cost
from workbench.trained import check_training
from workbench.weights.parallel import default_threads
from workbench.weights.writer import output_specs

# Resident memory of Python with torch and the workbench, before any tensor: measured 0.25 GB on Linux.
_INTERPRETER = 250_000_000
# More once transformers has built a model on the meta device, which names its modules: measured 0.16 GB.
_TRANSFORMERS = 160_000_000
# Of streaming merges on one core, read and written bytes together: task arithmetic 1.7e9, TIES 1.4e9; `plan` shows an estimate.
_BYTES_PER_SECOND = 1.5e9
# Of a live float32 model that reads text, at 2 FLOP a parameter and token: one core, SmolLM2-135M, rows of 256 tokens, 5.0 ms a token.
# A token of an edit's values (three times that for forward and back, on the layers above the edited one and behind the lookup alone) takes
# about as long as one that is read: measured 5.2 ms looked up at the subject, 2.4 ms at the prompt's end.
_FLOPS_PER_SECOND = 5e10
# Tokens that the check of a growth runs through a model: two rows of logits and one of generation; two steps of gradients, three passes each.
_CHECKED, _LEARNED = 84, 288


@dataclass(frozen=True)
class Plan:
    """What a run would do. `document()` is what `plan --json` prints."""

    recipe: str
    key: str | None
    """The recipe's key; None until the inputs have been read once, by `run` or `eval`."""
    run: str | None
    """Its directory's name; None until the files that name it have been fetched."""
    steps: list[dict[str, Any]]
    read_bytes: int
    write_bytes: int
    peak_bytes: int
    seconds: float
    cached: list[str]
    problems: list[str]
    warnings: list[str] = field(default_factory=list)
    download_bytes: int = 0
    """Fetched from the hub before anything else; not part of `seconds`."""
    downloads: list[dict[str, Any]] = field(default_factory=list)
    """The same per repository: repository, commit, files, bytes."""
    checked_at_run: list[str] = field(default_factory=list)
    """What headers do not show: `run` finds it out before the first step, and warns or refuses."""
    device_bytes: int = 0
    """Peak memory of a CUDA device, where the run is planned for one; `peak_bytes` is then the host's."""

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def run_of(resolved: Resolved, runs: Path) -> Run:
    """The run directory of a recipe; named after the files' stamp until their content has been read."""
    stamped = run_for(runs, resolved.recipe.name, resolved.stamp)
    if not resolved.known:
        return stamped
    keyed = run_for(runs, resolved.recipe.name, resolved.run_key)
    return stamped if stamped.path.is_dir() and not keyed.path.is_dir() else keyed


def plan(resolved: Resolved, runs: Path, threads: int | None = None, *, cuda: bool = False) -> Plan:
    """Predict steps, bytes, memory and time from headers alone; an edit's result is not needed for that.

    Args:
        resolved: The recipe.
        runs: Where run directories stand.
        threads: Tensors that `run` computes at a time; omitted: as many as `run` takes where it is not told.
        cuda: Plan a run on a CUDA device: buffers, whole tensors and live models lie there, staged blocks on the host.
    """
    run = run_of(resolved, runs)
    threads = threads or default_threads()
    needs = _Needs(sum(s.nbytes for s in resolved.base.weights.specs.values()), threads)
    model = resolved.base
    steps: list[dict[str, Any]] = []
    for i, (step, step_id) in enumerate(zip(resolved.recipe.steps, resolved.recipe.step_ids, strict=True)):
        row: dict[str, Any] = {"id": step_id, step.verb: step.name}
        if isinstance(step, MergeMethod):
            row |= _merge_row(step, resolved, needs)
        elif isinstance(step, GrowMethod):
            made, model = _grow_row(step, i, model, resolved, needs)
            row |= made
        else:
            row |= _solved_row(step, i, model, resolved, needs)
        steps.append(row)
    read, live, whole, width, seconds, cached = needs.read, needs.live, needs.whole, needs.width, needs.seconds, needs.cached
    write = sum(s.nbytes for s in output_specs(model.weights.specs, resolved.dtype).values())
    if refers_to_base(resolved):
        write = 0
    if resolved.recipe.fields.output.form == "adapter":
        used = [resolved.bricks[name] for name in resolved.parents]
        adapters = [brick.adapter for brick in used if isinstance(brick, Brick) and brick.kind == "adapter"]
        merges = [step for step in resolved.recipe.steps if isinstance(step, MergeMethod)]
        dense = len(adapters) < len(used) or not all(map(keeps_rank, merges))
        whole_too = len(adapters) < len(used)
        write = planned_bytes(resolved.base, resolved.recipe.fields.output, adapters, dense, whole_too)
        whole = _adapter_whole(resolved, needs, dense)
        live = max(live, whole) + _TRANSFORMERS
    if run.done:
        cached.append("run")
    live = max(live, resolved.vocabulary.memory() if resolved.vocabulary else 0)
    factors = threads * sum(_factor_bytes(b) for b in resolved.bricks.values() if isinstance(b, Brick) and b.kind == "adapter")
    host = buffer_bytes(model.weights.specs, width, threads) + factors + max(live, whole)
    on_device = 0
    if cuda:
        on_device, host = device_buffer_bytes(model.weights.specs, width, threads)
        on_device += factors + max(live, whole)
        host += factors + (_TRANSFORMERS if resolved.recipe.fields.output.form == "adapter" else 0)
    downloads = resolved.downloads
    problems = [*space_problems(downloads, runs, write), *disk_problems(runs, write, run)]
    return Plan(
        resolved.recipe.name,
        resolved.key if resolved.known else None,
        None if resolved.headers_only else run.name,
        steps,
        read,
        write,
        _INTERPRETER + host,
        round(seconds + (read + write) / _BYTES_PER_SECOND, 1),
        cached,
        problems,
        [*resolved.warnings, *licence_warnings(resolved)],
        sum(d.bytes for d in downloads),
        [asdict(d) for d in downloads],
        resolved.deferred,
        on_device,
    )


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


def disk_problems(runs: Path, needed: int, run: Run) -> list[str]:
    place = next(p for p in (runs, *runs.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(place).free + (run.size() if run.path.is_dir() else 0)
    if not run.done and needed * 1.05 > free:
        return [f"{run.path}: needs {size(needed * 1.05)}, {size(free)} free"]
    return []
