"""Change of the number of channels of the residual stream: the role of every tensor, and the norms that it rescales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.errors import InvalidRecipeError, WorkbenchError
from workbench.grow.expansion.norms import layer_norm, rms_norm
from workbench.grow.expansion.parts import HEAD_NORMS, READERS, WRITERS, DecoderParts, check_builds, with_text
from workbench.grow.expansion.resize import Resize
from workbench.models.architecture import is_embedding, is_head, is_head_module
from workbench.steps import Axis

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps")


@dataclass(frozen=True)
class StreamNorms:
    """Norms of the residual stream.

    Attributes:
        field: Field of config.json with their epsilon.
        eps: Their epsilon.
        centered: Live name of each norm -> whether it subtracts the mean.
        config: The config.json of the changed model, before other changes of the step.
    """

    field: str
    eps: float
    centered: Mapping[str, bool]
    config: Mapping[str, Any]


def stream_norms(parts: DecoderParts, sizes: Mapping[str, int], instead: str, means: bool = False) -> StreamNorms:
    """Return the norms of the residual stream.

    `expansion/norms.py` runs the norms to find what they compute. An RMS norm with its own weight and the epsilon of config.json gives
    channels the same output beside others that are zero, once its weight and epsilon are rescaled.

    Args:
        parts: The parts of the model.
        sizes: Fields of config.json of the changed model: `hidden_size`, `head_dim`, and the numbers of heads if they change.
        instead: Hint for models that are refused.
        means: Whether norms may subtract the mean over the channels.

    Raises:
        WorkbenchError: If a norm, or a factor that depends on the width, does not allow another number of channels.
    """
    kind, before, count = parts.parsed.model_type, int(parts.size("hidden_size") or 0), sizes["hidden_size"]

    def refuse(reason: str) -> WorkbenchError:
        return InvalidRecipeError(f"grow {parts.step}: `hidden` does not support model_type {kind}: it {reason}", instead)

    other = "more" if count > before else "fewer"
    field = next((f for f in (_EPSILONS if means else _EPSILONS[:1]) if parts.size(f) is not None), None)
    if field is None:
        raise refuse(
            f"has none of the fields {', '.join(_EPSILONS)} in config.json for the epsilon of its norms"
            if means
            else f"has no RMS norms (rms_norm_eps), and a mean over {other} channels has another value"
        )
    eps = float(parts.size(field))
    changed = with_text(parts.model.config, sizes)
    check_builds(changed, parts.step)
    if factors := parts.width_factors(changed):
        name, value, changed_value = factors[0]
        description = "its embeddings" if "embed" in name else "something"
        raise refuse(
            f"scales {description} by the width ({name} is {value:g} with {before} channels and {changed_value:g} with {count})"
        )
    heads = [n for n in parts.specs if _module_name(n) in HEAD_NORMS and not parts.norm_of(n)]
    if means and heads:
        raise refuse(f"has norms of queries and keys whose computation is unknown ({heads[0]})")
    centered = {}
    for name, module in parts.norms.items():
        norm = rms_norm(module) or (layer_norm(module) if means else None)
        if name.rpartition(".")[2] in HEAD_NORMS:
            if norm is None or not _same_epsilon(norm.eps, eps):
                description = (
                    "that are no RMS norms" if norm is None else f"with an epsilon of their own ({norm.eps:g}, {field}: {eps:g})"
                )
                raise refuse(f"has norms of queries and keys {description} ({name})")
            continue
        if parts.is_inside(name):
            raise refuse(f"has a norm inside its layers that does not read the residual stream ({name})")
        if norm is None:
            raise refuse(
                f"has norms whose computation is unknown ({name})"
                if means
                else f"has norms that are no RMS norms ({name}), and a mean over {other} channels has another value"
            )
        if not norm.has_weight:
            raise refuse(f"has a norm without a weight ({name}), whose output growth cannot rescale")
        if norm.offset or (norm.has_bias and not norm.centered):
            raise refuse(
                f"has a norm with {'a bias' if norm.has_bias and not norm.offset else 'the gain 1 + weight'} ({name}), which growth "
                "cannot rescale"
            )
        if not _same_epsilon(norm.eps, eps):
            raise refuse(f"has a norm with an epsilon of its own ({name}: {norm.eps:g}, {field}: {eps:g})")
        centered[name] = norm.centered
    return StreamNorms(field, eps, centered, changed)


def resize_stream(
    plan: Resize, norms: StreamNorms, axis: Axis, head_dim: int, scales: Mapping[str, float] | None = None, std: float = 0.0
) -> None:
    """Change the channels of the residual stream in every tensor that reads or writes it, in the norms, and in config.json.

    Args:
        plan: The plan to change.
        norms: The norms of the stream.
        axis: Origin of each channel.
        head_dim: Number of channels of a head.
        scales: Live name of a norm -> factor of its weight; None stands for sqrt(channels before / after), which keeps the output of
            channels beside others that are zero.
        std: Standard deviation of new columns of matrices that read the stream.

    Raises:
        WorkbenchError: If a tensor is unknown.
    """
    parts, count = plan.parts, len(axis.index)
    before = int(parts.size("hidden_size") or 0)
    share = before / count
    normed = {leaf[0] for name in parts.norms if (leaf := name.rpartition(".")[2]) in HEAD_NORMS}
    for name in parts.specs:
        leaf = _module_name(name)
        if leaf in HEAD_NORMS:
            continue
        if norm := parts.norm_of(name):
            if name.endswith(".bias"):
                plan.change(name, rows=axis)
            else:
                plan.change(name, rows=axis, scale=(scales or {}).get(norm, math.sqrt(share)), value=1.0)
        elif is_embedding(name):
            plan.change(name, cols=axis)
        elif (leaf in READERS and name.endswith(".weight")) or is_head(name):
            # Norms of queries and keys use the same epsilon: scaling their input by its root keeps their output.
            scale = math.sqrt(share) if leaf.endswith("_proj") and leaf[0] in normed else 1.0
            plan.inputs(parts.linear(name), axis, std=std, scale=scale)
        elif leaf in WRITERS and name.endswith(".weight"):
            plan.outputs(parts.linear(name), axis)
        elif name.endswith(".bias") and (leaf in (*READERS, *WRITERS) or is_head_module(name.removesuffix(".bias"))):
            continue  # it follows its matrix, or has no channels
        elif parts.is_resized(name, norms.config):
            raise InvalidRecipeError(f"grow {parts.step}: `hidden` does not know the role of {name}", "Report this architecture.")
    changes: dict[str, Any] = {
        "hidden_size": count,
        norms.field: norms.eps * share,
        "head_dim": plan.config.get("head_dim", head_dim),
    }
    plan.config |= changes
    plan.record["hidden"] = [before, count]


def _same_epsilon(actual: float, expected: float) -> bool:
    """Return whether two epsilons agree within the precision of a measured one."""
    return abs(actual - expected) <= 0.02 * max(actual, expected) + 1e-10


def _module_name(name: str) -> str:
    """Return the last part of the name of the module that a tensor belongs to."""
    return name.rpartition(".")[0].rpartition(".")[2]
