"""Plan of a model whose feed-forward layers, attention heads or channels of the residual stream change their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.lazy import np
from workbench.grow.expansion.neurons import FeedForward, feed_forward, neuron_fields, neurons_with
from workbench.grow.expansion.norms import layer_norm, rms_norm
from workbench.grow.expansion.parts import (
    HEAD_NORMS,
    KEYS,
    READERS,
    STACKED,
    WRITERS,
    DecoderParts,
    LinearPart,
    check_builds,
    module_leaf,
    with_text,
)
from workbench.models.architecture import is_embedding, is_head, is_head_module
from workbench.steps import NEW, Axis, Grown, Growth


@dataclass(frozen=True)
class Heads:
    """Attention heads of every layer.

    Attributes:
        queries: Number of query heads.
        groups: Number of key-value heads, each with its group of query heads.
        size: Channels of a head.
    """

    queries: int
    groups: int
    size: int

    @property
    def width(self) -> int:
        """Channels that the query heads of a group have together."""
        return self.size * (self.queries // self.groups)


class Resize:
    """The tensors and sizes of the resized model, changed step by step.

    Args:
        parts: The matrices of the model.
    """

    def __init__(self, parts: DecoderParts) -> None:
        self.parts = parts
        self.tensors = {name: Grown(name) for name in parts.specs}
        self.config: dict[str, float] = {}
        self.record: dict[str, object] = {}

    def growth(self, changed: str) -> Growth:
        """Return the plan; its record has the number of resized tensors under the key `changed`."""
        count = sum(g.reshaped for g in self.tensors.values())
        return Growth(self.tensors, with_text(self.parts.model.config, self.config), {**self.record, changed: count})

    def feed_forward(self) -> tuple[list[FeedForward], int]:
        """Return the feed-forward parts of the model, and the number of neurons of each: of each expert in a mixture.

        Raises:
            WorkbenchError: If layers, or experts, have different numbers of neurons, or config.json has no field for it.
        """
        parts = feed_forward(self.parts)
        counted = [part for part in parts if part.is_expert] or [part for part in parts if part.field == parts[0].field]
        if len(sizes := {part.count for part in counted}) > 1:
            raise InvalidRecipeError(
                f"grow {self.parts.step}: layers have {' and '.join(map(str, sorted(sizes)))} neurons; `neurons` needs equal numbers"
            )
        return sorted(parts, key=lambda part: part.is_expert != counted[0].is_expert), sizes.pop()

    def count_neurons(self, parts: list[FeedForward], before: int, count: int) -> list[int]:
        """Set the numbers of neurons in config.json, the first part's to `count` and others in the same proportion, and return each part's."""
        sizes: dict[str, int] = {}
        for part in parts:
            size = getattr(self.parts.parsed, part.field, None)
            size = size if isinstance(size, int) and part.field != parts[0].field else before
            sizes.setdefault(part.field, -(-size * count // before))
        fields = neuron_fields(self.parts, sizes)
        self.config |= fields
        self.record["neurons"] = [before, count]
        return neurons_with(self.parts, parts, fields)

    def neurons(self, part: FeedForward, into: Axis, out: Axis, std: float = 0.0) -> None:
        """Change the neurons of a feed-forward part.

        Args:
            part: The part.
            into: Origin of each neuron's inputs.
            out: Origin of each neuron's outputs.
            std: Standard deviation of new inputs.
        """
        for name, axis in part.axes.items():
            if name == part.out:
                self._along(name, axis, out)
                continue
            stacked = self.parts.specs[name].shape[-axis] // part.count
            index = _stacked(into.index, part.count, stacked, part.interleaved)
            self._along(name, axis, Axis(index), 0.0 if name.endswith("bias") else std)

    def _along(self, name: str, axis: int, origin: Axis, std: float = 0.0) -> None:
        """Change a tensor along its last axis (1), or along the one before it (2), where each expert has rows of its own."""
        spec = self.parts.specs[name]
        shape = list(spec.shape)
        blocks, rows, shape[-axis] = spec.rows // shape[-axis], shape[-axis], len(origin.index)
        whole = tuple(shape) if len(shape) > 2 else None
        if axis == 1 and len(shape) > 1:
            self.change(name, cols=origin, std=std, shape=whole)
            return
        scale = None if origin.scale is None else np.tile(origin.scale, blocks)
        starts = np.arange(blocks)[:, None] * rows
        index = np.where(origin.index == NEW, NEW, origin.index + starts).reshape(-1)
        self.change(name, rows=Axis(index, scale), std=std, shape=whole)

    def heads(self, instead: str) -> Heads:
        """Return the attention heads of every layer.

        Args:
            instead: Hint if the model has no attention heads.

        Raises:
            WorkbenchError: If the model has no attention heads.
        """
        size = self.parts.size
        queries = int(size("num_attention_heads") or 0)
        if not queries:
            raise InvalidRecipeError(
                f"grow {self.parts.step}: model_type {self.parts.parsed.model_type} has no attention heads (num_attention_heads)",
                instead,
            )
        groups = int(size("num_key_value_heads") or queries)
        return Heads(queries, groups, int(size("head_dim") or (size("hidden_size") or 0) // queries))

    def attention(self, layer: int, heads: Heads, axis: Callable[[int], Axis], std: float = 0.0) -> None:
        """Change the key-value heads of a layer, each with its group of query heads.

        Args:
            layer: The layer.
            heads: Its heads.
            axis: Function from the number of channels that belong to a key-value head to the origin of all channels.
            std: Standard deviation of new inputs.
        """
        inner, out = self.parts.attention(layer)
        for name, matrix in inner.items():
            origin = self._stacked(matrix, heads, axis) if name == STACKED else axis(heads.size if name in KEYS else heads.width)
            self.outputs(matrix, origin, std=std)
        self.inputs(out, axis(heads.width))

    def _stacked(self, matrix: LinearPart, heads: Heads, axis: Callable[[int], Axis]) -> Axis:
        """Return the origin of the outputs of a matrix that has all queries, then all keys, then all values."""
        parts, start = list[Any](), 0
        for each in (heads.width, heads.size, heads.size):
            index = axis(each).index
            parts.append(np.where(index == NEW, NEW, index + start))
            start += each * heads.groups
        if (rows := self.parts.sizes(matrix)[0]) != start:
            raise InvalidRecipeError(
                f"grow {self.parts.step}: {matrix.weight} has {rows} outputs, expected {start}: {heads.queries} queries, "
                f"{heads.groups} keys and {heads.groups} values of {heads.size} channels"
            )
        return Axis(np.concatenate(parts))

    def head_counts(self, heads: Heads, count: int) -> dict[str, int]:
        """Return the fields of config.json with the numbers of heads for a number of key-value heads."""
        name = getattr(self.parts.parsed, "attribute_map", {}).get("num_attention_heads", "num_attention_heads")
        return {name: heads.queries // heads.groups * count, "num_key_value_heads": count}

    def check_head_size(self, heads: Heads, instead: str, changes: Mapping[str, object]) -> None:
        """Check that config.json can keep the channels of a head when the number of heads, or the hidden size, changes.

        Args:
            heads: The model's heads.
            instead: Hint if it cannot.
            changes: Fields of the changed model's config.json.

        Raises:
            WorkbenchError: If transformers computes the channels of a head from the hidden size and the number of heads.
        """
        parts = self.parts
        names = {key: getattr(parts.parsed, "attribute_map", {}).get(key, key) for key in ("hidden_size", "num_attention_heads")}
        hidden = int(parts.size("hidden_size") or 0)
        if hidden != heads.size * heads.queries:
            return  # the width of a head is stated already
        own = getattr(type(parts.parsed), "head_dim", None)
        is_computed = isinstance(own, property) and own.fset is None
        reason = (
            "whatever its `head_dim` is"
            if parts.size("head_dim") and not is_computed
            else "because its config.json has no `head_dim`"
        )
        computed = InvalidRecipeError(
            f"grow {parts.step}: transformers computes the channels of a head of model_type {parts.parsed.model_type} as "
            f"{' / '.join(names.values())} ({hidden} / {heads.queries} = {heads.size}), {reason}; another quotient would change the heads "
            "that stay",
            instead,
        )
        if is_computed:
            raise computed
        built = check_builds(with_text(parts.model.config, {**changes, "head_dim": heads.size}), parts.step)
        text, inputs = built.config.get_text_config(), parts.attention_inputs(built)
        if inputs == text.hidden_size != text.num_attention_heads * heads.size:
            raise computed

    def resize_heads(self, heads: Heads, count: int) -> None:
        """Set the number of key-value heads in config.json, and record it."""
        self.config |= {"num_attention_heads": heads.queries // heads.groups * count, "head_dim": heads.size}
        if "num_key_value_heads" in self.parts.text or heads.groups != heads.queries:
            self.config["num_key_value_heads"] = count
        self.record["key_value_heads"] = [heads.groups, count]

    def outputs(self, linear: LinearPart, axis: Axis, std: float = 0.0) -> None:
        """Change the outputs of a matrix, and of its bias."""
        self.change(linear.weight, **{"cols" if linear.transposed else "rows": axis}, std=std)
        if linear.bias is not None:
            self.change(linear.bias, rows=axis)

    def inputs(self, linear: LinearPart, axis: Axis, std: float = 0.0, scale: float = 1.0) -> None:
        """Change the inputs of a matrix; `scale` multiplies its outputs and its bias."""
        self.change(linear.weight, **{"rows" if linear.transposed else "cols": axis}, std=std, scale=scale)
        if linear.bias is not None and scale != 1:
            self.change(linear.bias, scale=scale)

    def change(self, name: str, **changes: Any) -> None:
        """Change fields of the plan of a tensor."""
        self.tensors[name] = replace(self.tensors[name], **changes)


def _stacked(index: Any, count: int, stacked: int, interleaved: bool) -> Any:
    """Return the origin of the rows of several stacked matrices with `count` rows each: one after the other, or in turn."""
    rows = np.arange(stacked)[:, None] * (1 if interleaved else count) + index * (stacked if interleaved else 1)
    rows = np.where(index == NEW, NEW, rows)
    return (rows.T if interleaved else rows).reshape(-1)


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
    config: Mapping[str, object]


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
    heads = [n for n in parts.specs if module_leaf(n) in HEAD_NORMS and not parts.norm_of(n)]
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
        leaf = module_leaf(name)
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
    changes: dict[str, float] = {
        "hidden_size": count,
        norms.field: norms.eps * share,
        "head_dim": plan.config.get("head_dim", head_dim),
    }
    plan.config |= changes
    plan.record["hidden"] = [before, count]


def _same_epsilon(actual: float, expected: float) -> bool:
    """Return whether two epsilons agree within the precision of a measured one."""
    return abs(actual - expected) <= 0.02 * max(actual, expected) + 1e-10
