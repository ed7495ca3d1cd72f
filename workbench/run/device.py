"""Where a run computes: on the CPU without torch, if compiled loops do all arithmetic of a recipe, or on a device of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.bricks.fitting import fitted
from workbench.ground.events import Events, no_events
from workbench.ground.lazy import torch
from workbench.models.architecture import UntiedWeights
from workbench.models.identity import has_cuda, pick_device
from workbench.models.layout import Model
from workbench.resolve.resolved import Resolved
from workbench.steps import MergeMethod
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.device import default_threads
from workbench.weights.kernels import KINDS, backend
from workbench.weights.specs import NUMPY
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    import torch

    from workbench.adapters.read import Adapter


def device_of_run(name: str, resolved: Resolved) -> torch.device:
    """Return the device that a recipe runs on, and prepare it.

    Args:
        name: auto (CUDA if available, else the CPU), cpu, cuda or cuda:N.
        resolved: The recipe.

    Returns:
        `NUMPY` for a run on the CPU that needs no torch; the written files are the same as with torch. Otherwise torch's device.

    Raises:
        WorkbenchError: If there is no such device.
    """
    on_cpu = name == "cpu" or (name == "auto" and not has_cuda())
    return NUMPY if on_cpu and runs_without_torch(resolved) else pick_device(name)


def runs_without_torch(resolved: Resolved) -> bool:
    """Return whether a run on this machine's CPU needs no torch: the recipe needs none, and the loops could be compiled."""
    return needs_no_torch(resolved) and backend().library is not None


def needs_no_torch(resolved: Resolved) -> bool:
    """Return whether a recipe merges stored checkpoints and LoRA adapters into a checkpoint, all by compiled loops.

    Headers and configurations decide this, before any number is read.
    """
    recipe, output = resolved.recipe, resolved.recipe.fields.output
    if output.form != "checkpoint" or output.config or resolved.vocabulary is not None or resolved.beside:
        return False
    names = {name for step in recipe.steps for name in recipe.used_bricks(step)}
    bricks = [resolved.on_disk[name] for name in names if name in resolved.on_disk]
    if len(bricks) < len(names) or any(brick.part for brick in bricks):
        return False
    for step in recipe.steps:
        if not isinstance(step, MergeMethod) or step.plugin or not step.takes_arrays():
            return False
        if step.in_core_space() or step.weighs_overlap() or step.neuron_set():
            return False
    base = resolved.base.weights
    read = [base, *(fitted(brick, resolved.base) for brick in bricks if brick.kind == "checkpoint")]
    stored = [weights.tied if isinstance(weights, UntiedWeights) else weights for weights in read]
    if not all(isinstance(weights, Checkpoint) and not weights.packed for weights in stored):
        return False  # a tensor is not in a file under its name and as its numbers
    specs = [*(weights.specs for weights in read), output_specs(base.specs, resolved.dtype_name)]
    if any(spec.is_float and spec.stored not in KINDS for some in specs for spec in some.values()):
        return False
    adapters = [brick.adapter for brick in bricks if brick.kind == "adapter"]
    return not adapters or _have_products(adapters, resolved.base)


def _have_products(adapters: Sequence[Adapter], base: Model) -> bool:
    """Return whether compiled loops compute the updates of a step's adapters."""
    from workbench.adapters.bind import bind
    from workbench.adapters.lora import LowRank

    for adapter in adapters:
        if adapter.config["peft_type"] != "LORA" or adapter.config.get("use_dora") or adapter.keys.saved:
            return False
        updates = bind(adapter, base.weights.specs, base).places.values()
        if not all(isinstance(update, LowRank) and update.takes_arrays() for update in updates):
            return False
    return True


@dataclass(frozen=True)
class Work:
    """Where a piece of work on tensors computes, and who hears of its progress.

    Attributes:
        device: Device to compute on.
        asked: Number of tensors computed at the same time; None leaves it to `threads`.
        events: Callback that receives progress events.
    """

    device: torch.device
    asked: int | None = None
    events: Events = no_events

    @property
    def threads(self) -> int:
        """Number of tensors computed at the same time: one per core, at most 8, unless another number is asked for."""
        return self.asked or default_threads()
