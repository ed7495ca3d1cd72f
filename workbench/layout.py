"""Where a model keeps its parts, found from tensor names: the layer stack, and what writes to the residual stream."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from workbench.errors import WorkbenchError
from workbench.weights.specs import Weights

# What writes to the residual stream, per block, by family:
#   llama mistral qwen2 qwen3 gemma olmo granite   self_attn.o_proj, mlp.down_proj
#   gpt2 starcoder2                                attn.c_proj, mlp.c_proj (self_attn.o_proj, mlp.c_proj)
#   gpt_neox falcon bloom                          attention.dense | self_attention.dense, mlp.dense_4h_to_h
#   phi opt                                        self_attn.dense | self_attn.out_proj, mlp.fc2 | fc2
#   gptj gpt_neo                                   attn.out_proj | attn.attention.out_proj, mlp.fc_out | mlp.c_proj
_ATTENTION_OUT = re.compile(
    r"(self_attn\.(o_proj|dense|out_proj)|attn\.(c_proj|out_proj)|attn\.attention\.out_proj|(self_)?attention\.dense)$"
)
_MLP_OUT = re.compile(r"(mlp\.(down_proj|c_proj|dense_4h_to_h|fc2|fc_out)|^fc2)$")
_FIRST = re.compile(r"(embed(?!_out)|wte|wpe)")  # embed_out is GPT-NeoX's head


@dataclass(frozen=True)
class Layout:
    """The layer stack of a decoder-only model.

    Attributes:
        prefix: What stands before a layer's number, dot included: "model.layers.".
        depth: Number of layers.
        names: All tensor names.
    """

    prefix: str
    depth: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str], config: Mapping[str, Any]) -> Layout:
        """Find the stack: the shortest prefix that is followed by exactly 0..depth-1.

        Errors: no such prefix, as in encoder-decoder or convolutional checkpoints.
        """
        names = tuple(names)
        depth = int(config.get("num_hidden_layers") or config.get("n_layer") or config.get("num_layers") or 0)
        numbers: dict[str, set[int]] = {}
        for name in names:
            for match in re.finditer(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", name):
                numbers.setdefault(name[: match.start()], set()).add(int(match.group()))
        stacks = [prefix for prefix, found in numbers.items() if found == set(range(depth))]
        if not depth or not stacks:
            found = ", ".join(f"{p}0..{max(n)}" for p, n in sorted(numbers.items())[:3]) or "none"
            raise WorkbenchError(
                f"no stack of {depth or 'num_hidden_layers'} layers among the tensor names (stacks: {found})",
                "Layer schedules, edits and growth need a decoder-only model.",
            )
        return cls(min(stacks, key=len), depth, names)

    def layer(self, name: str) -> int | None:
        """The layer that a tensor belongs to; None for embeddings, final norm and head."""
        if not name.startswith(self.prefix):
            return None
        number = name[len(self.prefix) :].partition(".")[0]
        return int(number) if number.isdigit() else None

    def position(self, name: str) -> float:
        """Place on the depth axis in 0..1: layers evenly, embeddings 0, final norm and head 1."""
        layer = self.layer(name)
        if layer is None:
            return 0.0 if _FIRST.search(name) else 1.0
        return layer / (self.depth - 1) if self.depth > 1 else 0.0

    def in_layer(self, layer: int) -> list[str]:
        """Tensors of one layer, in file order."""
        return [name for name in self.names if self.layer(name) == layer]

    def mlp_out(self, layer: int) -> str:
        """The weight of the layer's feed-forward down-projection."""
        return self._one(layer, _MLP_OUT, "feed-forward down-projection")

    def residual_writers(self, layer: int) -> list[str]:
        """Every tensor, biases included, through which a layer adds to the residual stream."""
        modules = [
            self._one(layer, _ATTENTION_OUT, "attention output projection").removesuffix(".weight"),
            self.mlp_out(layer).removesuffix(".weight"),
        ]
        return [name for name in self.in_layer(layer) if name.rpartition(".")[0] in modules]

    def _one(self, layer: int, pattern: re.Pattern[str], what: str) -> str:
        start = len(f"{self.prefix}{layer}.")
        found = [n for n in self.in_layer(layer) if n.endswith(".weight") and pattern.search(n[start:].removesuffix(".weight"))]
        if len(found) != 1:
            raise WorkbenchError(
                f"layer {layer}: expected one {what}, found {len(found)} ({', '.join(found) or 'none'})",
                "This architecture (mixture of experts, state space or hybrid) is not supported here.",
            )
        return found[0]


@dataclass(frozen=True)
class Model:
    """Weights and the config.json that gives them meaning: what a step takes and gives."""

    weights: Weights
    config: dict[str, Any]

    @cached_property
    def layout(self) -> Layout:
        """The layer stack. Errors: as `Layout.of`."""
        return Layout.of(self.weights.specs, self.config)
