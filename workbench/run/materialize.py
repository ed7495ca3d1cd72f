"""Configurations in memory: their digest, a live model, and one model put in another's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from workbench.errors import WorkbenchError
from workbench.events import Events, no_events
from workbench.files import json_digest, read_json, write_json
from workbench.models.live import compute, live_model
from workbench.resolve.resolved import Resolved
from workbench.run.compose import Composition, compose
from workbench.run.memories import attach_memory
from workbench.weights.device import exact
from workbench.weights.digests import tensor_digest, weights_digest
from workbench.weights.writer import output_specs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_memory(digest: str, composition: Composition) -> str:
    """A configuration's digest: its weights', and its memory's where it has one."""
    return json_digest([digest, composition.memory.digest]) if composition.memory else digest


def configuration_digest(
    resolved: Resolved, device: torch.device, events: Events = no_events
) -> tuple[str, dict[str, torch.Tensor] | None]:
    """Digest of the configuration that a recipe produces, and its tensors where they had to be computed for it.

    Computed once a recipe key and kind of device: in memory, with the bytes that a run on the device would write.
    """
    known = read_json(_digest_memo(resolved), digest=str)
    if known and known.get("device", "cpu") == device.type:
        return str(known["digest"]), None
    with exact(device):
        composition = compose(resolved, device, events)
        model = composition.model
        tensors = compute(model, resolved.dtype, device)
    resolved.check_inputs()
    digests = {name: tensor_digest(t) for name, t in tensors.items()}
    digest = with_memory(weights_digest(output_specs(model.weights.specs, resolved.dtype), digests, model.config), composition)
    remember_digest(resolved, digest, device)
    return digest, tensors


def remember_digest(resolved: Resolved, digest: str, device: torch.device) -> None:
    """Keep which configuration a recipe key produces on a kind of device: CPU and CUDA differ in the last bits."""
    write_json(_digest_memo(resolved), {"digest": digest, "device": device.type})


def _digest_memo(resolved: Resolved) -> Path:
    return resolved.cache / "configurations" / f"{resolved.key}.json"


def materialize(
    resolved: Resolved, device: torch.device, tensors: dict[str, torch.Tensor] | None = None, events: Events = no_events
) -> PreTrainedModel:
    """The configuration as a live transformers model in the dtype that would be written, its memory attached, without touching the disk."""
    with exact(device):
        composition = compose(resolved, device, events)
        model, memory = composition.model, composition.memory
        live = live_model(model.config, tensors or compute(model, resolved.dtype, device), resolved.tokenizer_path, device)
    return attach_memory(live, memory.path, resolved.tokenizer_path, memory.version) if memory else live


@contextmanager
def swap(model: PreTrainedModel, resolved: Resolved, tensors: dict[str, torch.Tensor] | None = None) -> Iterator[PreTrainedModel]:
    """Turn a live model into another configuration in place, for a `with` block; then it has its own weights again, bit for bit.

    Args:
        model: From `materialize`: a configuration whose parameters have the same names and shapes.
        resolved: The other configuration; computed in its output dtype, held in the model's, on the model's device.
        tensors: Of the other configuration, where they are computed already.

    Errors: other parameters, as after a grow step; a memory.
    """
    if resolved.recipe.memory or resolved.memory:
        raise WorkbenchError(
            f"recipe {resolved.recipe.name}: its memory is no set of weights that could be exchanged", "Use `materialize`."
        )
    other = materialize(resolved, next(model.parameters()).device, tensors).to(model.dtype)
    mine, theirs = (dict(m.named_parameters()) for m in (model, other))
    if differing := sorted(
        {n for n in mine.keys() | theirs.keys() if n not in mine or n not in theirs or mine[n].shape != theirs[n].shape}
    ):
        raise WorkbenchError(
            f"recipe {resolved.recipe.name}: its parameters are not the live model's ({differing[0]} and {len(differing) - 1} more differ)",
            "A configuration that grows or unties the base is another model: use `materialize`.",
        )

    def exchange() -> None:
        for name, parameter in mine.items():
            parameter.data, theirs[name].data = theirs[name].data, parameter.data

    exchange()
    try:
        yield model
    finally:
        exchange()
