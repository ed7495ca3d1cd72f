"""Steps applied to lazy weights: what a resolved recipe means, before anything is computed."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.adapter_output import adapt, changes_result
from workbench.adapters import CONFIG, Adapter, write_adapter
from workbench.bricks import Brick, fitted, vocabulary_digest
from workbench.conversion import live_names, parse_config
from workbench.errors import WorkbenchError
from workbench.grow.preserve import check_preserved
from workbench.grow.remap import GrownWeights
from workbench.layout import Model
from workbench.merge.rows import AlignedDeltas
from workbench.merge.stream import Deltas, MergedWeights, WeightsDelta
from workbench.registry import EditMethod, GrowMethod, Measured, MergeContext, MergeMethod, MethodContext, methods
from workbench.resolve import Resolved
from workbench.vocabulary.align import Vocabulary
from workbench.weights.digests import json_digest, read_json, tensor_digest, weights_digest, write_json
from workbench.weights.lowrank import LowRankSum
from workbench.weights.parallel import load_all, one_thread
from workbench.weights.specs import TensorSpec, Weights
from workbench.weights.tied import with_head_of
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
        reports: Step id -> what a merge method has to say once its tensors have been computed.
    """

    model: Model
    steps: list[dict[str, Any]]
    edits: dict[str, Path] = field(default_factory=dict)
    reports: dict[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """The steps' records with the methods' reports: to be asked for when the weights are written."""
        return [{**s, **(self.reports[s["id"]]() if s["id"] in self.reports else {})} for s in self.steps]


def deltas(
    brick: Brick | Resolved, base: Model, device: torch.device, events: Events = no_events, vocabulary: Vocabulary | None = None
) -> Deltas:
    """A brick's deltas on a base, in the output's vocabulary. Errors: a recipe whose result no longer has the base's tensors."""
    if isinstance(brick, Resolved):
        composed = compose(brick, device, events).model
        inner = with_head_of(composed.weights, base.weights, composed.config)
        if vocabulary is not None and brick.vocabulary is None:
            inner = vocabulary.on_base(inner)
        if {n: s.shape for n, s in inner.specs.items()} != {n: s.shape for n, s in base.weights.specs.items()}:
            raise WorkbenchError(
                f"recipe {brick.recipe.name} grows the base: its tensors have no counterpart to take a delta from",
                "Put its grow step into this recipe instead.",
            )
        return WeightsDelta(inner, base.weights)
    if brick.kind == "adapter" and vocabulary is not None:
        bound = brick.adapter.bind(vocabulary.plain.specs, Model(vocabulary.plain, base.config))
        return AlignedDeltas(bound, vocabulary.base_rows, vocabulary.tensors)
    if brick.kind == "adapter":
        return brick.adapter.bind(base.weights.specs, base)
    return WeightsDelta(fitted(brick, base, vocabulary.view(brick.name) if vocabulary else None), base.weights)


def compose(resolved: Resolved, device: torch.device, events: Events = no_events) -> Composition:
    """Wrap the base in the recipe's steps. Edits are solved here, on a live model, unless the cache has them."""
    current = resolved.base
    records: list[dict[str, Any]] = []
    edits: dict[str, Path] = {}
    reports: dict[str, Callable[[], dict[str, Any]]] = {}
    recipe = resolved.recipe
    for i, (step, step_id) in enumerate(zip(recipe.steps, recipe.step_ids, strict=True)):
        record: dict[str, Any] = {"id": step_id, step.verb: step.name}
        if isinstance(step, MergeMethod):
            bricks = {
                name: deltas(resolved.bricks[name], resolved.base, device, events, resolved.vocabulary)
                for name in recipe.used_bricks(step)
            }
            found = measure(resolved, step, step_id, bricks, device, events)
            merged = MergedWeights(current, resolved.base, step, bricks, resolved.fingerprints, recipe.fields.seed, found.value)
            if not merged.merged:
                raise recipe.error(
                    ("steps", len(records), "where"),
                    f"{step_id}: no tensor to merge",
                    "Its bricks and `where` have no tensor in common: see `workbench brick show`.",
                )
            record |= {"bricks": list(bricks), "tensors": len(merged.merged), **found.record}
            reports[step_id] = partial(step.report, merged.notes)
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
            edit = Adapter(place, f"edit '{step_id}'").bind(current.weights.specs, current)
            factors = {name: update for name in edit.places if (update := edit.factors(name, device)) is not None}
            assert len(factors) == len(edit.places), "an edit is a product of factors everywhere"
            record |= {"tensors": len(factors), **(read_json(place / "edit.json") or {})}
            current = Model(LowRankSum(current.weights, factors), current.config)
        elif isinstance(step, GrowMethod):
            growth = step.expand(current)
            record |= {"tensors": sum(g.new for g in growth.tensors.values()), **growth.record}
            current = Model(GrownWeights(current.weights, growth), growth.config)
        records.append(record)
    if changes_result(recipe.fields.output):
        current = Model(adapt(current, resolved.base, recipe.fields.output), current.config)
    return Composition(current, records, edits, reports)


def measure(
    resolved: Resolved, step: MergeMethod, step_id: str, bricks: Mapping[str, Deltas], device: torch.device, events: Events
) -> Measured:
    """What a merge method measures on texts or models before the first tensor; None where it needs only tensors."""
    if step.laws.needs == "tensor":
        return Measured(None)
    from transformers import AutoTokenizer

    base, source = resolved.base, resolved.tokenizer_path
    alone = methods()["merge:average"].model_validate({"merge": "average"})
    assert isinstance(alone, MergeMethod)

    def weights(brick: str) -> Weights:
        return MergedWeights(base, base, alone, {brick: bricks[brick]}) if brick else base.weights

    def live(brick: str) -> PreTrainedModel:
        gc.collect()  # the model before hangs in reference cycles
        return live_model(base.config, compute(Model(weights(brick), base.config), torch.float32, device), source, device)

    def progress(done: int, total: int, text: str) -> None:
        events({"stage": "measure", "step": step_id, "done": done, "total": total, "text": text})

    digests = {name: resolved.digests[name] for name in bricks} | {"": ""}
    words = [vocabulary_digest(source), resolved.recipe.fields.model_dump(mode="json").get("tokenizer")]
    keys = {name: json_digest([resolved.base_digest, digest, words]) for name, digest in digests.items()}
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    context = MergeContext(
        list(bricks), keys, base, weights, live, partial(skeleton, base.config, device), tokenizer, device,
        resolved.recipe.project, resolved.cache, progress)  # fmt: skip
    with one_thread():
        return step.measure(context)


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
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[_decoder(parsed, config)]
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


def skeleton(config: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """A transformers model without weights, in eval mode: parameters on the meta device, buffers computed, on `device`."""
    from torch import nn
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    parsed = parse_config(config)
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[_decoder(parsed, config)]._from_config(parsed, dtype=torch.float32)
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    for module in model.modules():
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else value.to(device)
    return model.eval()


def check_decoder(config: dict[str, Any]) -> None:
    """Errors: a config.json that transformers cannot read, or not of a decoder-only language model."""
    _decoder(parse_config(config), config)


def _decoder(parsed: Any, config: dict[str, Any]) -> type[Any]:
    """The configuration's class. Errors: not that of a decoder-only language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(parsed) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise WorkbenchError(
            f"config.json: model_type {config.get('model_type')} is not a decoder-only language model",
            "Live models (edit, eval, chat) need one; merges by tensor name work all the same.",
        )
    return type(parsed)


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
