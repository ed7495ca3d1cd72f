"""Tensor names and config.json of a model with its layers in a new order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from workbench.errors import WorkbenchError
from workbench.models.architecture import LAYER_KINDS, model_depth
from workbench.models.layout import Layout
from workbench.models.skeleton import parse_config
from workbench.steps import Grown
from workbench.weights.header import DEPTHS, TEXT_CONFIGS

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
_KINDS = ("layer_types", *LAYER_KINDS, *_LETTERS)
# Kinds of layers that keep no keys of earlier tokens, in config.json of all versions of transformers.
_WITHOUT_KEYS = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp", *"ME-"})


def with_attention(config: Mapping[str, Any], depth: int) -> list[int]:
    """Return the layers that keep keys of earlier tokens, by the list of kinds in config.json; none without such a list.

    transformers counts a text's earlier tokens in the first of them, so that a hybrid model cannot run without any.
    """
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        if isinstance(part, dict):
            explicit = _explicit(part, depth)
            kinds = next((list(k) for key in _KINDS if isinstance(k := explicit.get(key), (list, str)) and len(k) == depth), [])
            if kinds:
                return [layer for layer, kind in enumerate(kinds) if kind not in _WITHOUT_KEYS]
    return []


def removable(config: Mapping[str, Any], depth: int, ranking: Iterable[int], count: int) -> list[int]:
    """Return the first `count` layers of a ranking that can go; the last layer with attention stays."""
    gone, attention = list[int](), set(with_attention(config, depth))
    for layer in ranking:
        if len(gone) < count and (not attention or attention - {*gone, layer}):
            gone.append(layer)
    return gone


def in_order(
    layout: Layout,
    order: Sequence[int],
    make: Callable[[str, int], Grown],
    names: Callable[[int], Sequence[str]] | None = None,
) -> dict[str, Grown]:
    """Return the tensors, in file order, of a model with its layers in a new order.

    Args:
        layout: Layout of the current model.
        order: Index of the old layer for each new layer.
        make: Function from (old name, index of the new layer) to the new tensor.
        names: Function from the index of the new layer to its old names; None takes the current model's.
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
            tensors |= {after + n.removeprefix(before): make(n, new) for n in (names(new) if names else layout.in_layer(old))}
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
    if (attention := with_attention(config, depth)) and not set(attention) & set(order):
        raise WorkbenchError(
            f"grow {step}: no layer with attention would remain, and transformers cannot run this architecture without any",
            f"Keep a layer with attention: {', '.join(map(str, attention))}.",
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


def concatenated(configs: Sequence[tuple[dict[str, Any], int]], step: str) -> dict[str, Any]:
    """Return the config.json of a model with the layers of several models, one model after the other.

    All fields but the lists with one entry per layer are those of the first model.

    Args:
        configs: The models' config.json with their numbers of layers.
        step: Name of the method, for errors.

    Raises:
        WorkbenchError: If a model lacks a list that the first one has.
    """
    first = configs[0][0]
    if not model_depth({key: value for key, value in first.items() if key not in TEXT_CONFIGS}):
        for part in TEXT_CONFIGS:
            if isinstance(first.get(part), dict):
                return {**first, part: concatenated([(config.get(part) or {}, depth) for config, depth in configs], step)}
    explicit = [(_all_sparse(_explicit(config, depth), depth), depth) for config, depth in configs]
    for config, _ in explicit:
        by_number = [
            k for k, v in config.items() if isinstance(v, dict) and v and "layer" in k and all(str(n).isdigit() for n in v)
        ]
        if numbered := [*by_number, *(key for key in _NUMBERED if config.get(key) not in (None, [], 0, 1, -1))]:
            raise WorkbenchError(
                f"grow {step}: config.json of a model refers to layers by number ({', '.join(numbered)}), and its layers move",
                "Stack layers of models without these fields.",
            )
    joined, depth = dict(explicit[0][0]), explicit[0][1]
    for key, value in explicit[0][0].items():
        if key in DEPTHS:
            joined[key] = sum(depth for _, depth in explicit)
            continue
        is_list = isinstance(value, list) and len(value) == depth and ("layer" in key or key.endswith("_types"))
        if not (is_list or (key in _LETTERS and isinstance(value, str) and len(value) == depth)):
            continue
        for config, count in explicit[1:]:
            other = config.get(key)
            if not isinstance(other, type(value)) or len(other) != count:
                raise WorkbenchError(
                    f"grow {step}: {key} in config.json has an entry for each layer, and one of the models has no such list",
                    "Stack layers of models whose config.json describes them in the same way.",
                )
            joined[key] = joined[key] + other
    return joined


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
