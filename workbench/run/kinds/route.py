"""Route steps: a router is fitted on the live current model, and chooses among bricks beside its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.adapters.linear import linear_bytes, linear_factors
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.ground.manifest import reusable
from workbench.models.identity import tokenizer_digest
from workbench.models.layout import Model
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.models.skeleton import causal_skeleton
from workbench.recipe.recipe import dump_step
from workbench.resolve.resolved import Resolved
from workbench.route.deciding.pooling import PooledRoute
from workbench.route.deciding.samples import NEGATIVES
from workbench.route.mixing.kernel import check_places
from workbench.run.compose import cached_adapter
from workbench.run.costs import FLOPS_PER_SECOND, Needs, numel
from workbench.run.forms import brick_bytes
from workbench.run.kind import Kind, StepContext, StepResult, specs_before
from workbench.run.route_statistics import known_statistics
from workbench.run.routers import (
    RECORD,
    RouterRecord,
    SavedRouter,
    brick_rows,
    calibration_rows,
    put_router,
)
from workbench.steps import RouteContext, RouteMethod
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter
    from workbench.route.deciding.hidden import BrickStates

# Copies of a prompt and tokens of each, for the estimate of `plan`: calibration prompts are short, apart from paragraphs before some.
_COPIES, _TOKENS = 5, 64


class RouteKind(Kind[RouteMethod]):
    """Steps whose router chooses among bricks for the live model."""

    cached_in, record, rounded = "routers", RECORD, True

    def apply(self, step: RouteMethod, context: StepContext, current: Model, earlier: Sequence[StepResult]) -> StepResult:
        """Return the unchanged weights and the router. It is fitted now, unless the cache has it."""
        adapters = {name: context.adapter(name) for name in context.recipe.used_bricks(step)}
        saved = SavedRouter(_fitted(step, context, current, adapters))
        router = saved.at({name: adapter.path for name, adapter in adapters.items()})
        record = {"bricks": list(adapters), "solved_on": saved.record.solved_on, "router": saved.record.record}
        return StepResult(current, record, router=router)

    def plan_row(
        self, step: RouteMethod, resolved: Resolved, number: int, model: Model, needs: Needs
    ) -> tuple[dict[str, object], Model]:
        """Add the memory of a live model in the output dtype, and the factors of the bricks in float32."""
        names = resolved.recipe.used_bricks(step)
        row: dict[str, object] = {"bricks": {name: resolved.bricks[name].kind for name in names}, "inputs": step.inputs()}
        needs.read += sum(resolved.bricks[name].input_bytes for name in names)
        if self.is_cached(resolved, number):
            needs.cached.append(resolved.recipe.step_ids[number])
            return row, model
        stored = sum(spec.nbytes for spec in output_specs(model.weights.specs, resolved.dtype_name).values())
        factors = sum(_factor_bytes(resolved, name) for name in names)
        needs.hold(2 * stored + factors)
        if step.reads_texts:
            prompts = sum(map(len, step.prompts(resolved.recipe.project).values()))
            # Half of the blocks run.
            seconds = round(numel(model) * (prompts * _COPIES + NEGATIVES) * _TOKENS / FLOPS_PER_SECOND, 1)
            row |= {"cost": {"prompts": prompts}, "seconds": seconds}
            needs.seconds += seconds
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
            adapters = {name: _known_adapter(resolved, name) for name in resolved.recipe.used_bricks(step)}
            check_places(skeleton, {name: linear_factors(adapter) for name, adapter in adapters.items() if adapter})


KIND = RouteKind()


def _known_adapter(resolved: Resolved, name: str) -> Adapter | None:
    """Return the adapter of a brick; None for a recipe whose adapter has not been computed yet."""
    nested = resolved.nested.get(name)
    return resolved.on_disk[name].adapter if nested is None else cached_adapter(nested, name)


def _factor_bytes(resolved: Resolved, name: str) -> int:
    """Return the memory of a brick's factors in float32; for a recipe that is not computed yet, from the size of its result."""
    adapter = _known_adapter(resolved, name)
    return linear_bytes(adapter) if adapter else brick_bytes(resolved, name)


def _fitted(step: RouteMethod, context: StepContext, current: Model, adapters: Mapping[str, Adapter]) -> Path:
    """Return the directory of a router in the cache; fit it on the live current model if it is not there.

    The model has the output dtype, because its hidden states in that dtype are what the router will see.
    """
    resolved, place = context.resolved, context.place("routers", rounded=True)
    if reusable(place, RECORD, digests=True):
        return place
    prompts = step.prompts(resolved.recipe.project)
    context.say("route", f"{step.name}: {sum(map(len, prompts.values()))} prompts of {len(adapters)} bricks on {context.device}")
    tensors = compute(current, resolved.dtype, context.device)
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    solved_on = weights_digest(output_specs(current.weights.specs, resolved.dtype), digests, current.config)
    source = resolved.tokenizer_at(context.number)
    say = partial(context.say, "route")
    known = _known(step, resolved, solved_on, source, say)
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
            known,
            say,
            step.own_negatives(resolved.recipe.project),
            step.sentence_encoder(resolved.recipe.project),
        )
    )
    _check_finite([router.settings(), router.record], context.id)
    record = RouterRecord(
        method=step.name,
        method_version=step.version,
        settings={},
        tensors={},
        bricks=brick_rows(adapters, step.descriptions()),
        calibration=calibration_rows(prompts, step.prompt_files),
        step=dump_step(step),
        seed=context.seed,
        base=resolved.base_digest,
        solved_on=solved_on,
        record={},
    )
    with context.made(place) as unfinished:
        unfinished.mkdir()
        put_router(unfinished, router, record)
        SavedRouter(unfinished).router  # noqa: B018  what is stored must open again
    return place


def _known(
    step: RouteMethod, resolved: Resolved, solved_on: str, tokenizer: Path, say: Callable[[str], None]
) -> dict[str, BrickStates]:
    """Return brick -> states of its prompts on the current model, from the cards of the bricks."""
    if not isinstance(step, PooledRoute):
        return {}
    digest = tokenizer_digest(tokenizer)
    bricks = (resolved.on_disk[name] for name in resolved.recipe.used_bricks(step) if name in resolved.on_disk)
    found = {brick.name: known_statistics(brick, solved_on, digest, say) for brick in bricks}
    return {name: states for name, states in found.items() if states is not None}


def _check_finite(parts: list[dict[str, object]], step_id: str) -> None:
    """Raise WorkbenchError if a router's settings or record hold NaN or infinity, which JSON has no numbers for."""
    try:
        json.dumps(parts, allow_nan=False)
    except ValueError:
        raise WorkbenchError(
            f"step '{step_id}': the fitted router has NaN or infinite numbers",
            "The hidden states of the base overflow, or all calibration prompts of a brick are equal. Check the base and the prompts.",
        ) from None
