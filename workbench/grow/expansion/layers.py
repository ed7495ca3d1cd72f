"""Tensor names and config.json of a model with its layers in a new order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workbench.errors import WorkbenchError
from workbench.models.architecture import model_depth
from workbench.models.layout import Layout
from workbench.models.skeleton import parse_config
from workbench.steps import Grown
from workbench.weights.configuration import DEPTHS, TEXT_CONFIGS

# Fields of config.json with layer numbers, or with a pattern over them: their meaning changes when layers move.
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
# Patterns that transformers reads only if the corresponding list is absent.
_PATTERNS = {
    "max_window_layers": "layer_types",
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
}
# Fields with one character per layer, in config.json of Nemotron-H repositories: "M-M*-".
_LETTERS = ("hybrid_override_pattern",)


def in_order(layout: Layout, order: Sequence[int], make: Callable[[str, int], Grown]) -> dict[str, Grown]:
    """Return the tensors, in file order, of a model with its layers in a new order.

    Args:
        layout: Layout of the current model.
        order: Index of the old layer for each new layer.
        make: Function from (old name, index of the new layer) to the new tensor.
    """
    tensors: dict[str, Grown] = {}
    stack = iter(enumerate(order))
    for name in layout.names:
        if layout.layer(name) is None:
            tensors[name] = Grown(name)
            continue
        # The whole stack goes to the place of its first tensor, so the file order stays embeddings, layers, norm, head.
        for new, old in stack:
            before, after = f"{layout.prefix}{old}.", f"{layout.prefix}{new}."
            tensors |= {after + n.removeprefix(before): make(n, new) for n in layout.in_layer(old)}
    return tensors


def reordered(config: dict[str, Any], depth: int, order: Sequence[int], step: str) -> dict[str, Any]:
    """Return the config.json of that model: the new depth, and every list with one entry per layer in the new order.

    Args:
        config: The current config.json.
        depth: Current number of layers.
        order: Index of the old layer for each new layer.
        step: Name of the method, for errors.

    Raises:
        WorkbenchError: If config.json refers to layers by number.
    """
    if not model_depth({key: value for key, value in config.items() if key not in TEXT_CONFIGS}):
        for part in TEXT_CONFIGS:
            if isinstance(config.get(part), dict):
                return {**config, part: reordered(config[part], depth, order, step)}
    config = _all_sparse(_explicit(config, depth), depth)
    numbered = [key for key in _NUMBERED if config.get(key) not in (None, [], 0, 1, -1)]
    if numbered:
        raise WorkbenchError(
            f"grow {step}: config.json refers to layers by number ({', '.join(numbered)}), and growth moves layers",
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
            # Settings of individual layers, by number.
            grown[key] = {str(new): value[str(old)] for new, old in enumerate(order) if str(old) in value}
    if "attention_types" in config and "attention_layers" in config:  # GPT-Neo states it twice, once run-length encoded
        grown["attention_types"] = [[grown["attention_layers"], 1]]
    return grown


def _all_sparse(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """Return config.json without the numbers of mixture layers if all layers are mixtures.

    ernie4_5_moe (-1 means the last layer) and llama4 have such numbers.
    """
    if config.get("moe_layers") == list(range(depth)) and config.get("interleave_moe_layer_step") in (None, 1):
        config = {**config, "moe_layers": None}
    first, last, step = (config.get(f"moe_layer_{key}") for key in ("start_index", "end_index", "interval"))
    if last is not None and last in (-1, depth - 1) and first in (None, 0) and step in (None, 1):
        return {**config, "moe_layer_end_index": -1}
    return config


def _explicit(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """Return config.json with the lists that its patterns stand for, as transformers reads them."""
    absent = {
        layers_key
        for pattern, layers_key in _PATTERNS.items()
        if config.get(pattern) is not None and config.get(layers_key) is None
    }
    if not absent:
        return config
    parsed = parse_config(config).to_dict()
    return {
        **config,
        **{key: parsed[key] for key in sorted(absent) if isinstance(parsed.get(key), list) and len(parsed[key]) == depth},
    }
