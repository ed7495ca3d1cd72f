"""Route steps: a router is fitted on the live current model, and chooses among bricks beside its weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.adapters.linear import linear_bytes, linear_factors
from workbench.errors import WorkbenchError
from workbench.files import publish, write_json
from workbench.lazy import torch
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.skeleton import causal_skeleton
from workbench.models.tokenizer import load_tokenizer
from workbench.recipe.recipe import dump_step
from workbench.resolve.resolved import Resolved
from workbench.route.mixing.modules import check_places
from workbench.run.costs import FLOPS_PER_SECOND, Needs, numel
from workbench.run.kind import Kind, StepContext, StepResult
from workbench.run.routers import FORMAT, RECORD, TENSORS, SavedRouter, brick_rows, calibration_rows
from workbench.run.shapes import specs_before
from workbench.steps import RouteContext, RouteMethod
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.saving import save_tensors
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter

# Tokens of a prompt, for the estimate of `plan`: calibration prompts are short, and each is read plain and in a few copies.
_TOKENS = 4 * 64


class RouteKind(Kind[RouteMethod]):
    """Steps whose router chooses among bricks for the live model."""

    def apply(self, step: RouteMethod, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Return the unchanged weights and the router. It is fitted now, unless the cache has it."""
        saved = SavedRouter(_fitted(step, context, current))
        adapters = _adapters(step, context.resolved)
        router = saved.at({name: adapter.path for name, adapter in adapters.items()})
        record = {"bricks": list(adapters), "solved_on": saved.record["solved_on"], "router": saved.record["record"]}
        return StepResult(current, record, router=router)

    def plan_row(
        self, step: RouteMethod, resolved: Resolved, number: int, model: Model, needs: Needs
    ) -> tuple[dict[str, Any], Model]:
        """Add the memory of a live model in the output dtype, and the factors of the bricks in float32."""
        adapters = _adapters(step, resolved)
        row: dict[str, Any] = {"bricks": dict.fromkeys(adapters, "adapter"), "inputs": step.inputs()}
        needs.read += sum(resolved.bricks[name].input_bytes for name in adapters)
        if self.is_cached(resolved, number):
            needs.cached.append(resolved.recipe.step_ids[number])
            return row, model
        stored = sum(spec.nbytes for spec in output_specs(model.weights.specs, resolved.dtype_name).values())
        needs.live = max(needs.live, 2 * stored + sum(map(linear_bytes, adapters.values())))
        if step.reads_texts:
            prompts = sum(map(len, step.prompts(resolved.recipe.project).values()))
            row["cost"] = {"prompts": prompts}
            row["seconds"] = round(numel(model) * prompts * _TOKENS / FLOPS_PER_SECOND, 1)  # half of the blocks run
            needs.seconds += row["seconds"]
        return row, model

    def check(self, step: RouteMethod, context: StepContext) -> None:
        """Check before any work that the bricks fit the model that earlier steps make.

        Raises:
            WorkbenchError: If a step before the route step changes layers, or a brick updates something else than linear layers.
        """
        resolved, base = context.resolved, context.resolved.base
        before = specs_before(resolved, context.number)
        if {n: s.shape for n, s in before.items()} != {n: s.shape for n, s in base.weights.specs.items()}:
            raise WorkbenchError(
                f"step '{context.id}': a step before it changes the layers of the base, but the bricks were trained on the base's own layers",
                "Write the grown model with a recipe of its own, train bricks on it, and route among these.",
            )
        if not self.is_cached(resolved, context.number):
            skeleton = causal_skeleton(base.config, torch.device("cpu"))
            check_places(skeleton, {name: linear_factors(adapter) for name, adapter in _adapters(step, resolved).items()})

    def is_cached(self, resolved: Resolved, number: int) -> bool:
        """Return True if the router is in the cache."""
        return not resolved.headers_only and (_place(resolved, number) / RECORD).is_file()


KIND = RouteKind()


def _place(resolved: Resolved, number: int) -> Path:
    """Return the directory of a router in the cache."""
    return resolved.cache / "routers" / resolved.keys[number]


def _adapters(step: RouteMethod, resolved: Resolved) -> dict[str, Adapter]:
    """Return brick -> adapter, in the step's order."""
    return {name: resolved.adapters[name] for name in resolved.recipe.used_bricks(step)}


def _fitted(step: RouteMethod, context: StepContext, current: Model) -> Path:
    """Return the directory of a router in the cache; fit it on the live current model if it is not there.

    The model has the output dtype, because its hidden states in that dtype are what the router will see.
    """
    resolved, place = context.resolved, _place(context.resolved, context.number)
    if (place / RECORD).is_file():
        return place
    adapters, project = _adapters(step, resolved), resolved.recipe.project
    prompts = step.prompts(project)
    context.told("route", f"{step.name}: {sum(map(len, prompts.values()))} prompts of {len(adapters)} bricks on {context.device}")
    tensors = compute(current, resolved.dtype, context.device)
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    solved_on = weights_digest(output_specs(current.weights.specs, resolved.dtype), digests, current.config)
    source = resolved.tokenizer_at(context.number)
    router = step.fit(
        RouteContext(
            live_model(current.config, tensors, source, context.device),
            load_tokenizer(source),
            context.device,
            {name: prompts.get(name, []) for name in adapters},
            step.descriptions(),
            lambda name: linear_factors(adapters[name]),
            context.seed,
            context.progress("route"),
        )
    )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(router.tensors().items())}
    record = {
        "format": FORMAT,
        "method": step.name,
        "method_version": step.version,
        "layer": router.layer,
        "window": router.window,
        "threshold": router.threshold,
        "settings": router.settings(),
        "tensors": {name: tensor_digest(tensor) for name, tensor in state.items()},
        "bricks": brick_rows(adapters, resolved.digests, step.descriptions()),
        "calibration": calibration_rows(prompts, step.file),
        "step": dump_step(step),
        "seed": context.seed,
        "base": resolved.base_digest,
        "solved_on": solved_on,
        "record": router.record,
    }
    _check_finite(record, context.id)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".fitting-") as folder:
        partial = Path(folder) / "router"
        partial.mkdir()
        save_tensors(state, partial / TENSORS)
        write_json(partial / RECORD, record, indent=2)
        SavedRouter(partial).router  # noqa: B018  what is stored must open again
        resolved.check_inputs()
        if not place.exists():
            publish(partial, place)
    return place


def _check_finite(record: dict[str, Any], step_id: str) -> None:
    """Raise WorkbenchError if a router's settings or record hold NaN or infinity, which JSON has no numbers for."""
    try:
        json.dumps(record, allow_nan=False)
    except ValueError:
        raise WorkbenchError(
            f"step '{step_id}': the fitted router has NaN or infinite numbers",
            "The hidden states of the base overflow, or all calibration prompts of a brick are equal. Check the base and the prompts.",
        ) from None
