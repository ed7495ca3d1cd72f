"""Depth: new layers that compute nothing yet, ready to be trained."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from workbench.errors import WorkbenchError
from workbench.fields import Whole
from workbench.layout import Layout, Model
from workbench.registry import GrowMethod, Grown, Growth, register

# Fields of config.json that hold layer numbers, or a pattern over them: their meaning changes when layers move.
_NUMBERED = ("mlp_only_layers", "max_window_layers", "decoder_sparse_step", "first_k_dense_replace", "no_rope_layer_interval",
             "global_attn_every_n_layers", "full_attention_interval", "moe_layer_freq")  # fmt: skip
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers")


@register
class Depth(GrowMethod):
    """Copies of layers behind their originals, with all that they write to the residual stream set to zero, so that the
    model computes exactly what it did (Wu et al. 2024, LLaMA Pro, section 3.2)."""

    paper = "Wu et al. 2024, LLaMA Pro: Progressive LLaMA with block expansion, arXiv 2401.02415"
    formula = "layer i ↦ layer i, then a copy of it with W_o = 0 and W_down = 0, biases too"
    preserves: ClassVar[bool] = True

    grow: Literal["depth"]
    blocks: Whole | None = Field(None, ge=1)
    """Number of new layers, spread evenly: the last layer of each of `blocks` groups is copied."""
    after: tuple[Whole, ...] | None = None
    """Instead of `blocks`: the layers to copy, by their current index; negative ones count from the end."""
    check: bool = True
    """Compare logits and cached generation with the model before growth, at `run`. Needs both in memory, in float32."""

    @model_validator(mode="after")
    def _one(self) -> Depth:
        if (self.blocks is None) == (self.after is None):
            raise ValueError(
                "expected one of `blocks: 4` and `after: [3, 7]`, found " + ("none" if self.after is None else "both")
            )
        return self

    def copied(self, depth: int) -> list[int]:
        """Indices of the layers to copy, ascending. Errors: out of range, more than one copy of a layer."""
        if self.after is not None:
            if bad := [i for i in self.after if not -depth <= i < depth]:
                raise WorkbenchError(f"grow depth: `after` names layer {bad[0]}; the model has 0..{depth - 1}", None, 2)
            return sorted({i % depth for i in self.after})
        blocks = self.blocks or 0
        if blocks > depth:
            raise WorkbenchError(
                f"grow depth: {blocks} blocks for {depth} layers, at most one copy a layer",
                f"Set blocks: {depth}, and add a second grow step for more.",
                2,
            )
        return [(i + 1) * depth // blocks - 1 for i in range(blocks)]

    def expand(self, model: Model) -> Growth:
        """Every layer moves up by the number of copies before it; a copy follows its original."""
        layout = model.layout
        copied = self.copied(layout.depth)
        order = [(i, copy) for i in range(layout.depth) for copy in ((False, True) if i in copied else (False,))]
        zero = {name for i in copied for name in layout.residual_writers(i)}
        tensors: dict[str, Grown] = {}
        stack = iter(order)
        for name in layout.names:
            if layout.layer(name) is None:
                tensors[name] = Grown(name)
            else:
                # The whole stack stands where its first tensor stood: file order stays embeddings, layers, norm, head.
                for new, (old, copy) in enumerate(stack):
                    tensors |= _layer(layout, old, new, copy, zero)
        return Growth(
            tensors,
            _config(model.config, layout.depth, [old for old, _ in order]),
            {"copied_layers": copied, "new_layers": [n for n, (_, copy) in enumerate(order) if copy]},
        )


def _layer(layout: Layout, old: int, new: int, copy: bool, zero: set[str]) -> dict[str, Grown]:
    before, after = f"{layout.prefix}{old}.", f"{layout.prefix}{new}."
    return {after + name.removeprefix(before): Grown(name, new=copy, zero=copy and name in zero)
            for name in layout.in_layer(old)}  # fmt: skip


def _config(config: dict[str, Any], depth: int, order: list[int]) -> dict[str, Any]:
    """config.json of the grown model: its depth, and every list with one entry a layer re-indexed."""
    if "text_config" in config and not any(config.get(key) for key in _DEPTH):
        return {**config, "text_config": _config(config["text_config"], depth, order)}
    numbered = [key for key in _NUMBERED if config.get(key) not in (None, [], 0, 1)]
    unused = numbered == ["max_window_layers"] and ("layer_types" in config or not config.get("use_sliding_window"))
    if numbered and not unused:
        raise WorkbenchError(
            f"grow depth: config.json refers to layers by number ({', '.join(numbered)}), which move",
            "Grow a model without these fields.",
        )
    grown = dict(config)
    for key, value in config.items():
        if key in _DEPTH:
            grown[key] = len(order)
        elif isinstance(value, list) and len(value) == depth and key.endswith(("_types", "_layers", "layers")):
            grown[key] = [value[old] for old in order]
    if "attention_types" in config and "attention_layers" in config:  # GPT-Neo says it twice, once run-length encoded
        grown["attention_types"] = [[grown["attention_layers"], 1]]
    return grown
