"""A new order of layers: names and configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workbench.errors import WorkbenchError
from workbench.models.architecture import model_depth
from workbench.models.layout import Layout
from workbench.models.skeleton import parse_config
from workbench.steps import Grown
from workbench.weights.configuration import DEPTHS, TEXT_CONFIGS

# Fields of config.json that hold layer numbers, or a pattern over them: their meaning changes when layers move.
_NUMBERED = (
    "mlp_only_layers",
    "decoder_sparse_step",
    "first_k_dense_replace",
    "global_attn_every_n_layers",
    "full_attention_interval",
    "moe_layer_freq",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "moe_layer_interval",
    "moe_layers",
)
# Patterns that transformers reads only where the list beside them is absent.
_PATTERNS = {"max_window_layers": "layer_types", "sliding_window_pattern": "layer_types", "_sliding_window_pattern": "layer_types",
             "no_rope_layer_interval": "no_rope_layers"}  # fmt: skip
# One character a layer in config.json of Nemotron-H repositories: "M-M*-".
_LETTERS = ("hybrid_override_pattern",)


def in_order(layout: Layout, order: Sequence[int], make: Callable[[str, int], Grown]) -> dict[str, Grown]:
    """Tensors of a model whose layers are those of another one in some order, in file order.

    Args:
        order: For each new layer the old one.
        make: (old name, new layer) -> the tensor there.
    """
    tensors: dict[str, Grown] = {}
    stack = iter(enumerate(order))
    for name in layout.names:
        if layout.layer(name) is None:
            tensors[name] = Grown(name)
            continue
        # The whole stack stands where its first tensor stood: file order stays embeddings, layers, norm, head.
        for new, old in stack:
            before, after = f"{layout.prefix}{old}.", f"{layout.prefix}{new}."
            tensors |= {after + n.removeprefix(before): make(n, new) for n in layout.in_layer(old)}
    return tensors


def reordered(config: dict[str, Any], depth: int, order: Sequence[int], step: str) -> dict[str, Any]:
    """config.json of that model: its depth, and every list with one entry a layer re-indexed. Errors: layers named by number."""
    if not model_depth({key: value for key, value in config.items() if key not in TEXT_CONFIGS}):
        for part in TEXT_CONFIGS:
            if isinstance(config.get(part), dict):
                return {**config, part: reordered(config[part], depth, order, step)}
    config = _all_sparse(_explicit(config, depth), depth)
    numbered = [key for key in _NUMBERED if config.get(key) not in (None, [], 0, 1, -1)]
    if numbered:
        raise WorkbenchError(
            f"grow {step}: config.json refers to layers by number ({', '.join(numbered)}), which move",
            "Grow a model without these fields.",
        )
    grown = dict(config)
    for key, value in config.items():
        if key in DEPTHS:
            grown[key] = len(order)
        elif isinstance(value, list) and len(value) == depth and ("layer" in key or key.endswith("_types")):
            grown[key] = [value[old] for old in order]
        elif key in _LETTERS and isinstance(value, str) and len(value) == depth:
            grown[key] = "".join(value[old] for old in order)
        elif isinstance(value, dict) and value and all(str(k).isdigit() for k in value) and "layer" in key:
            # Settings of single layers, by number.
            grown[key] = {str(new): value[str(old)] for new, old in enumerate(order) if str(old) in value}
    if "attention_types" in config and "attention_layers" in config:  # GPT-Neo says it twice, once run-length encoded
        grown["attention_types"] = [[grown["attention_layers"], 1]]
    return grown


def _all_sparse(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """config.json without the numbers of mixture layers where these are all layers (ernie4_5_moe: -1 stands for the last; llama4)."""
    if config.get("moe_layers") == list(range(depth)) and config.get("interleave_moe_layer_step") in (None, 1):
        config = {**config, "moe_layers": None}
    first, last, step = (config.get(f"moe_layer_{key}") for key in ("start_index", "end_index", "interval"))
    if last is not None and last in (-1, depth - 1) and first in (None, 0) and step in (None, 1):
        return {**config, "moe_layer_end_index": -1}
    return config


def _explicit(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """With the lists that patterns stand for, as transformers reads them."""
    absent = {found for pattern, found in _PATTERNS.items() if config.get(pattern) is not None and config.get(found) is None}
    if not absent:
        return config
    parsed = parse_config(config).to_dict()
    return {
        **config,
        **{key: parsed[key] for key in sorted(absent) if isinstance(parsed.get(key), list) and len(parsed[key]) == depth},
    }
