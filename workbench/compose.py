"""Steps applied to lazy weights: what a resolved recipe means, before anything is computed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.adapter_output import adapt, changes_result
from workbench.adapters import CONFIG, Adapter, write_adapter
from workbench.bricks import Brick, fitted
from workbench.conversion import live_names, parse_config
from workbench.errors import WorkbenchError
from workbench.grow.preserve import check_preserved
from workbench.grow.remap import GrownWeights
from workbench.layout import Model
from workbench.merge.rows import AlignedDeltas
from workbench.merge.stream import Deltas, MergedWeights, WeightsDelta
from workbench.registry import EditMethod, GrowMethod, MergeMethod, MethodContext
from workbench.resolve import Resolved
from workbench.vocabulary.align import Vocabulary
from workbench.weights.digests import read_json, tensor_digest, weights_digest, write_json
from workbench.weights.lowrank import LowRankSum
from workbench.weights.parallel import load_all
from workbench.weights.specs import TensorSpec
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_INCOMPLETE = "The base's files are incomplete, or its config.json is of another model: fetch both again."

Events = Callable[[dict[str, Any]], None]


def no_events(_event: dict[str, Any]) -> None:
    """Ignore events."""


@dataclass(frozen=True)
class Composition:
    """A configuration as lazy weights, and what its steps recorded.

    Attributes:
        model: Weights and configuration after the last step.
        steps: One record a step.
        edits: Step id -> directory of the edit's adapter, in the cache.
    """

    model: Model
    steps: list[dict[str, Any]]
    edits: dict[str, Path] = field(default_factory=dict)


def deltas(
    brick: Brick | Resolved, base: Model, device: torch.device, events: Events = no_events, vocabulary: Vocabulary | None = None
) -> Deltas:
    """A brick's deltas on a base, in the output's vocabulary. Errors: a recipe whose result no longer has the base's tensors."""
    if isinstance(brick, Resolved):
        inner = compose(brick, device, events).model.weights
        if vocabulary is not None and brick.vocabulary is None:
            inner = vocabulary.on_base(inner)
        if {n: s.shape for n, s in inner.specs.items()} != {n: s.shape for n, s in base.weights.specs.items()}:
            raise WorkbenchError(
                f"recipe {brick.recipe.name} grows the base: its tensors have no counterpart to take a delta from",
                "Put its grow step into this recipe instead.",
            )
        return WeightsDelta(inner, base.weights)
    if brick.kind == "adapter" and vocabulary is not None:
        bound = brick.adapter.bind(vocabulary.plain.specs)
        return AlignedDeltas(bound, vocabulary.base_rows, vocabulary.tensors)
    if brick.kind == "adapter":
        return brick.adapter.bind(base.weights.specs)
    return WeightsDelta(fitted(brick, base, vocabulary.view(brick.name) if vocabulary else None), base.weights)


def compose(resolved: Resolved, device: torch.device, events: Events = no_events) -> Composition:
    """Wrap the base in the recipe's steps. Edits are solved here, on a live model, unless the cache has them."""
    current = resolved.base
    records: list[dict[str, Any]] = []
    edits: dict[str, Path] = {}
    recipe = resolved.recipe
    for i, (step, step_id) in enumerate(zip(recipe.steps, recipe.step_ids, strict=True)):
        record: dict[str, Any] = {"id": step_id, step.verb: step.name}
        if isinstance(step, MergeMethod):
            bricks = {
                name: deltas(resolved.bricks[name], resolved.base, device, events, resolved.vocabulary)
                for name in recipe.used_bricks(step)
            }
            merged = MergedWeights(current, resolved.base, step, bricks, resolved.fingerprints, recipe.fields.seed)
            if not merged.merged:
                raise recipe.error(
                    ("steps", len(records), "where"),
                    f"{step_id}: no tensor to merge",
                    "Its bricks and `where` have no tensor in common: see `workbench brick show`.",
                )
            record |= {"bricks": list(bricks), "tensors": len(merged.merged)}
            if whole := merged.whole(device):
                record["merged_whole"] = whole
                events(
                    {
                        "stage": "merge",
                        "step": step_id,
                        "text": f"space: core: {len(whole)} tensors are merged whole: {', '.join(whole[:3])}",
                    }
                )
            current = Model(merged, current.config)
        elif isinstance(step, EditMethod):
            place = solve_edit(resolved, step, step_id, resolved.keys[i], current, device, events)
            edits[step_id] = place
            edit = Adapter(place, f"edit '{step_id}'").bind(current.weights.specs)
            factors = {name: edit.factors(name, device) for name in edit.places}
            record |= {"tensors": len(factors), **(read_json(place / "edit.json") or {})}
            current = Model(LowRankSum(current.weights, factors), current.config)
        elif isinstance(step, GrowMethod):
            growth = step.expand(current)
            record |= {"tensors": sum(g.new for g in growth.tensors.values()), **growth.record}
            current = Model(GrownWeights(current.weights, growth), growth.config)
        records.append(record)
    if changes_result(recipe.fields.output):
        current = Model(adapt(current, resolved.base, recipe.fields.output), current.config)
    return Composition(current, records, edits)


def solve_edit(
    resolved: Resolved, step: EditMethod, step_id: str, key: str, current: Model, device: torch.device, events: Events
) -> Path:
    """The directory of an edit's result: from the cache, or solved on the live current model and put there."""
    place = resolved.cache / "edits" / key
    if (place / "edit.json").is_file():
        return place
    from transformers import AutoTokenizer

    events({"stage": "edit", "step": step_id, "text": f"{step.name} on {device}"})
    tensors = compute(current, torch.float32, device)
    specs = output_specs(current.weights.specs, torch.float32)
    solved_on = weights_digest(specs, {n: tensor_digest(t) for n, t in tensors.items()}, current.config)
    live = live_model(current.config, tensors, resolved.tokenizer_path, device)
    tokenizer = AutoTokenizer.from_pretrained(resolved.tokenizer_path, trust_remote_code=False)

    def progress(done: int, total: int, text: str) -> None:
        events({"stage": "edit", "step": step_id, "done": done, "total": total, "text": text})

    context = MethodContext(live, tokenizer, current, device, resolved.recipe.project, resolved.recipe.fields.seed, progress)
    edit = step.solve(context)
    with tempfile.TemporaryDirectory(dir=_made(resolved.cache / "edits"), prefix=".solving-") as folder:
        partial = Path(folder) / "edit"
        write_adapter(partial, edit.factors, resolved.recipe.fields.base, fan_in_fan_out=edit.fan_in_fan_out)
        write_json(
            partial / "edit.json", {"method": step.name, "base": resolved.base_digest, "solved_on": solved_on, **edit.record}
        )
        if not place.exists():
            partial.rename(place)
    return place


def copy_edit(place: Path, out: Path) -> None:
    """An edit from the cache into a run, as a PEFT adapter directory."""
    shutil.copytree(place, out, dirs_exist_ok=True)
    assert (out / CONFIG).is_file()


def compute(model: Model, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a configuration in memory, computed in float32 and cast once; None keeps each tensor's dtype."""
    return load_all(model.weights, dtype, device)


def live_model(config: dict[str, Any], tensors: dict[str, Tensor], source: Path, device: torch.device) -> PreTrainedModel:
    """A transformers model around tensors in memory, under the names that the checkpoint has on disk.

    transformers converts the names (fused experts, prefixes) itself, as if it read them from files.

    Args:
        config: config.json.
        tensors: Name -> tensor; all floats of one dtype. They are used as they are, not copied.
        source: Directory with generation_config.json.
        device: Where the model goes.

    Errors: an architecture without a causal language model, weights that the model needs and the tensors lack.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    parsed = parse_config(config)
    if type(parsed) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise WorkbenchError(
            f"config.json: model_type {config.get('model_type')} is not a decoder-only language model",
            "Live models (edit, eval, chat) need one; merges by tensor name work all the same.",
        )
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)]
    try:
        model, info = kind.from_pretrained(
            None, config=parsed, state_dict=dict(tensors), dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except RuntimeError as error:
        live_names(config, {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()})  # names what does not convert
        raise WorkbenchError(
            f"{source}: transformers cannot load these weights ({str(error).strip()[:200]})", _INCOMPLETE
        ) from error
    # A pair is a mismatch: its name, the shape found, the shape expected.
    lost = [name if isinstance(name, str) else name[0] for name in (*info["missing_keys"], *info["mismatched_keys"])]
    if lost:
        raise WorkbenchError(
            f"{source}: {kind.__name__} finds no weight that fits {min(lost)} ({len(lost)} such): its values would be random",
            _INCOMPLETE,
        )
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    live: PreTrainedModel = model.to(device).eval()
    return live


def check_growth(resolved: Resolved, device: torch.device, events: Events = no_events) -> dict[str, dict[str, Any]]:
    """Compare the live model before and after every grow step that claims to preserve the function.

    Returns:
        Step id -> what was measured. Errors: a difference (exit code 3).
    """
    found: dict[str, dict[str, Any]] = {}
    recipe = resolved.recipe
    for i, (step, step_id) in enumerate(zip(recipe.steps, recipe.step_ids, strict=True)):
        if not (isinstance(step, GrowMethod) and step.preserves and getattr(step, "check", True)):
            continue
        known = resolved.cache / "growth" / f"{resolved.keys[i]}.json"
        record = read_json(known)
        if record is None:
            events({"stage": "check", "step": step_id, "text": "logits and cached generation, before and after"})
            before, after = (_live_after(resolved, count, device) for count in (i, i + 1))
            record = check_preserved(before, after, step_id)
            write_json(known, record)
        found[step_id] = record
    return found


def _live_after(resolved: Resolved, steps: int, device: torch.device) -> PreTrainedModel:
    """The live float32 model after the first steps."""
    from dataclasses import replace

    recipe = replace(resolved.recipe, steps=resolved.recipe.steps[:steps])
    model = compose(replace(resolved, recipe=recipe), device).model
    return live_model(model.config, compute(model, torch.float32, device), resolved.tokenizer_path, device)


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
