"""Plan of a model whose feed-forward layers, attention heads or channels change their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from workbench.errors import InvalidRecipeError
from workbench.grow.expansion.parts import KEYS, NEURONS, DecoderParts, LinearPart, with_text
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
            self.outputs(matrix, axis(heads.size if name in KEYS else heads.width), std=std)
        self.inputs(out, axis(heads.width))

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
