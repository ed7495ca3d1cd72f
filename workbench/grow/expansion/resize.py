"""Plan of a model whose feed-forward layers, attention heads or channels change their number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from workbench.errors import InvalidRecipeError
from workbench.grow.expansion.parts import KEYS, NEURONS, STACKED, DecoderParts, LinearPart, check_builds, with_text
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
        self.config: dict[str, Any] = {}
        self.record: dict[str, Any] = {}

    def growth(self, changed: str) -> Growth:
        """Return the plan; its record has the number of resized tensors under the key `changed`."""
        count = sum(g.reshaped for g in self.tensors.values())
        return Growth(self.tensors, with_text(self.parts.model.config, self.config), {**self.record, changed: count})

    def feed_forward(self) -> tuple[list[tuple[list[LinearPart], LinearPart]], int, str]:
        """Return the matrices into and out of the neurons of every layer, the number of neurons, and its field of config.json.

        Raises:
            WorkbenchError: If layers have different numbers of neurons, or config.json has no field for it.
        """
        parts = self.parts
        layers = [parts.ffn(i) for i in range(parts.model.layout.depth)]
        sizes = {parts.sizes(out)[1] for _, out in layers}
        if len(sizes) > 1:
            raise InvalidRecipeError(
                f"grow {parts.step}: layers have {' and '.join(map(str, sorted(sizes)))} neurons; `neurons` needs equal numbers",
            )
        key = next((k for k in NEURONS if k in parts.text or getattr(parts.parsed, k, None) is not None), None)
        if key is None:
            raise InvalidRecipeError(
                f"grow {parts.step}: config.json has no field for the number of neurons of a layer ({', '.join(NEURONS)})"
            )
        return layers, sizes.pop(), key

    def neuron_norm(self) -> str | None:
        """Return a tensor of a norm over the neurons of a layer, or None if there is none."""
        norms = (name for layer in range(self.parts.model.layout.depth) for name in self.parts.ffn_norms(layer))
        return next(norms, None)

    def neurons(self, readers: list[LinearPart], writer: LinearPart, into: Axis, out: Axis, std: float = 0.0) -> None:
        """Change the neurons of a feed-forward layer.

        Args:
            readers: The matrices into the neurons.
            writer: The matrix out of them.
            into: Origin of each neuron's inputs.
            out: Origin of each neuron's outputs.
            std: Standard deviation of new inputs.
        """
        before = self.parts.sizes(writer)[1]
        for reader in readers:
            index = np.concatenate([np.where(into.index == NEW, NEW, into.index + i * before) for i in range(reader.parts)])
            self.outputs(reader, Axis(index), std=std)
        self.inputs(writer, out)

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

    def check_head_size(self, heads: Heads, instead: str, changes: Mapping[str, Any]) -> None:
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
