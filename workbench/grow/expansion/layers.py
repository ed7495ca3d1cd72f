"""Layers in a new order: tensor names, config.json, and views of some layers of a model for stacks and merges of slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TypeGuard

from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.merge.streaming.deltas import StepBricks, WeightsDelta
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.architecture import LAYER_KINDS, UntiedWeights, head_of, is_embedding, model_depth, tied_embeddings
from workbench.models.layout import Layout, Model
from workbench.models.skeleton import parse_config
from workbench.steps import Grown, MergeMethod, Sources
from workbench.weights.header import DEPTHS, TEXT_CONFIGS
from workbench.weights.specs import Source, TensorSpec, Weights

# Fields of config.json whose meaning changes when layers move: lists of layer numbers, numbers of dense layers before the layers with
# experts, and patterns over layer numbers, each with the value that has no meaning.
_LISTED = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "moe_layers")
_FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_STEPS = (
    "decoder_sparse_step",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "moe_layer_freq",
    "moe_layer_interval",
    "interleave_moe_layer_step",
    "attn_layer_period",
    "expert_layer_period",
)
_NEUTRAL: dict[str, object] = {
    **{key: [] for key in _LISTED},
    **dict.fromkeys(_FIRST_DENSE, 0),
    **dict.fromkeys(_STEPS, 1),
    "moe_layer_end_index": -1,
}
# Patterns that transformers reads only if the corresponding list is absent.
_PATTERNS = {
    "max_window_layers": "layer_types",
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "full_attn_idxs": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
}
# Fields with one character per layer, in config.json of Nemotron-H repositories: "M-M*-".
_LETTERS = ("hybrid_override_pattern",)
_KINDS = ("layer_types", *LAYER_KINDS, *_LETTERS)
# Kinds of layers that keep no keys of earlier tokens, in config.json of all versions of transformers.
_WITHOUT_KEYS = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp", *"ME-"})


def with_attention(config: Mapping[str, object], depth: int) -> list[int]:
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


def removable(config: Mapping[str, object], depth: int, ranking: Iterable[int], count: int) -> list[int]:
    """Return the first `count` layers of a ranking that can go; the last layer with attention stays."""
    gone, attention = list[int](), set(with_attention(config, depth))
    for layer in ranking:
        if len(gone) < count and (not attention or attention - {*gone, layer}):
            gone.append(layer)
    return gone


def in_order(
    layout: Layout, order: Sequence[int], make: Callable[[str, int], Grown], names: Callable[[int], Sequence[str]] | None = None
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
            number = layout.number(name)  # of a layer that predicts additional tokens, which stays behind the last one
            behind = None if number is None else f"{layout.prefix}{number + len(order) - layout.depth}."
            tensors[behind + name.removeprefix(f"{layout.prefix}{number}.") if behind else name] = Grown(name)
            continue
        # The whole stack goes to the place of its first tensor, so the file order stays embeddings, layers, norm, head.
        for new, old in stack:
            before, after = f"{layout.prefix}{old}.", f"{layout.prefix}{new}."
            tensors |= {after + n.removeprefix(before): make(n, new) for n in (names(new) if names else layout.in_layer(old))}
    return tensors


def reordered(config: Mapping[str, object], depth: int, order: Sequence[int], step: str) -> dict[str, object]:
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
            if isinstance(inner := config.get(part), dict):
                return {**config, part: reordered(inner, depth, order, step)}
    config = _all_sparse(_explicit(config, depth), depth)
    moved = _moved_numbers(config, order, step)
    if numbered := [key for key in _fields_with_numbers(config, depth) if key not in moved]:
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
        elif _has_entry_per_layer(value, key, depth):
            grown[key] = "".join(value[old] for old in order) if isinstance(value, str) else [value[old] for old in order]
        elif _is_by_number(value, key):
            grown[key] = {str(new): value[str(old)] for new, old in enumerate(order) if str(old) in value}
    grown |= moved
    if "attention_types" in config and "attention_layers" in config:  # GPT-Neo states it twice, once run-length encoded
        grown["attention_types"] = [[grown["attention_layers"], 1]]
    return grown


def concatenated(configs: Sequence[tuple[Mapping[str, object], int]], step: str) -> dict[str, object]:
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
                parts = [(config.get(part), depth) for config, depth in configs]
                inner = [(own if isinstance(own, dict) else {}, depth) for own, depth in parts]
                return {**first, part: concatenated(inner, step)}
    explicit = [(_all_sparse(_explicit(config, depth), depth), depth) for config, depth in configs]
    for config, depth in explicit:
        if numbered := [
            *(key for key, value in config.items() if _is_by_number(value, key)),
            *_fields_with_numbers(config, depth),
        ]:
            raise WorkbenchError(
                f"grow {step}: config.json of a model refers to layers by number ({', '.join(numbered)}), and its layers move",
                "Stack layers of models without these fields.",
            )
    joined, depth = dict(explicit[0][0]), explicit[0][1]
    for key, value in explicit[0][0].items():
        if key in DEPTHS:
            joined[key] = sum(depth for _, depth in explicit)
            continue
        if not _has_entry_per_layer(value, key, depth):
            continue
        entries = list(value)
        for config, count in explicit[1:]:
            other = config.get(key)
            if not _has_entry_per_layer(other, key, count):
                raise WorkbenchError(
                    f"grow {step}: {key} in config.json has an entry for each layer, and one of the models has no such list",
                    "Stack layers of models whose config.json describes them in the same way.",
                )
            entries += other
        joined[key] = "".join(map(str, entries)) if isinstance(value, str) else entries
    return joined


def _moved_numbers(config: Mapping[str, object], order: Sequence[int], step: str) -> dict[str, object]:
    """Return the fields that refer to layers by number, for layers in a new order.

    Raises:
        WorkbenchError: If the first layers are dense, and a layer with experts would stand before one of them.
    """
    moved: dict[str, object] = {}
    listed = {key: set(value) for key in _LISTED if isinstance(value := config.get(key), list)}
    every = config.get("decoder_sparse_step")
    if isinstance(every, int) and every > 1:  # layers between its multiples are dense
        listed.setdefault("mlp_only_layers", set()).update(old for old in order if (old + 1) % every)
        moved["decoder_sparse_step"] = 1
    for key, numbers in listed.items():
        moved[key] = [new for new, old in enumerate(order) if old in numbers]
    for key in _FIRST_DENSE:
        if isinstance(first := config.get(key), int):
            dense = [old < first for old in order]
            if dense != sorted(dense, reverse=True):
                raise WorkbenchError(
                    f"grow {step}: in config.json, the first {first} layers are dense ({key}), so no layer with experts can stand before them",
                    f"Keep the layers below {first} in front.",
                )
            moved[key] = sum(dense)
    return moved


def _fields_with_numbers(config: Mapping[str, object], depth: int) -> list[str]:
    """Return the fields that refer to layers by number, and do not have a list with one entry per layer (as `moe_layer_freq` of MiMo)."""
    stated = [key for key, neutral in _NEUTRAL.items() if config.get(key) not in (None, neutral, 0)]
    return [
        k
        for k in stated
        if not config.get(_PATTERNS.get(k, "")) and (k in _LISTED or not _has_entry_per_layer(config[k], k, depth))
    ]


def _has_entry_per_layer(value: object, key: str, depth: int) -> TypeGuard[list[object] | str]:
    """Return whether a field is a list with one entry per layer, or a text with one character per layer."""
    if isinstance(value, list):
        return len(value) == depth and ("layer" in key or key.endswith("_types"))
    return key in _LETTERS and isinstance(value, str) and len(value) == depth


def _is_by_number(value: object, key: str) -> TypeGuard[dict[str, object]]:
    """Return whether a field has settings of individual layers, by their numbers."""
    return isinstance(value, dict) and bool(value) and "layer" in key and all(str(number).isdigit() for number in value)


def _all_sparse(config: Mapping[str, object], depth: int) -> Mapping[str, object]:
    """Return config.json without the numbers of mixture layers if all layers are mixtures.

    ernie4_5_moe (-1 means the last layer) and llama4 have such numbers.
    """
    if config.get("moe_layers") == list(range(depth)) and config.get("interleave_moe_layer_step") in (None, 1):
        config = {**config, "moe_layers": None}
    last, step = (config.get(f"moe_layer_{key}") for key in ("end_index", "interval"))
    if last is not None and last in (-1, depth - 1) and step in (None, 1):
        return {**config, "moe_layer_end_index": -1}
    return config


def _explicit(config: Mapping[str, object], depth: int) -> Mapping[str, object]:
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


class RenamedWeights:
    """Some tensors of a model under other names. They are the base of the merges within a stack, so each is its own origin.

    Args:
        weights: The model's weights.
        names: New name -> the model's name.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self._weights = weights
        self._names = names
        self.specs: Mapping[str, TensorSpec] = {name: weights.specs[old] for name, old in names.items()}
        """Specs by the new names."""

    def origin(self, name: str) -> str | None:
        """Return the name itself."""
        return name

    def open(self, name: str, device: torch.device) -> Source:
        """Open a tensor of the model."""
        return self._weights.open(self._names[name], device)


class View(Model):
    """A part of a model with a layout of its own, which schedules of merges follow.

    Args:
        weights: The tensors.
        config: The model's config.json.
        layout: Layers of the view.
    """

    def __init__(self, weights: Weights, config: dict[str, object], layout: Layout) -> None:
        super().__init__(weights, config)
        object.__setattr__(self, "_layout", layout)

    @cached_property
    def layout(self) -> Layout:
        """The layers of the view."""
        layout: Layout = vars(self)["_layout"]
        return layout


def layers_of(model: Model, first: int, stop: int) -> View:
    """Return the view of a range of layers, numbered from 0.

    Args:
        model: The model.
        first: The first layer.
        stop: The layer after the last one.
    """
    prefix, names = model.layout.prefix, dict[str, str]()
    for number, layer in enumerate(range(first, stop)):
        before = len(f"{prefix}{layer}.")
        names |= {f"{prefix}{number}.{name[before:]}": name for name in model.layout.in_layer(layer)}
    return View(RenamedWeights(model.weights, names), model.config, Layout(prefix, stop - first, tuple(names)))


def group_of(model: Model, group: str) -> View:
    """Return the view of the tensors outside the layers that belong to one part of the model; see `Layout.group`."""
    names = {name: name for name in model.layout.names if model.layout.group(name) == group}
    return View(RenamedWeights(model.weights, names), model.config, Layout(model.layout.prefix, 0, tuple(names)))


def with_head(model: Model, like: Model) -> Model:
    """Return a model with a head as a separate tensor: its own, or a copy of its embeddings if it ties them.

    Args:
        model: The model.
        like: The model whose name for the head is used.
    """
    tied = tied_embeddings(model.weights.specs, model.config)
    if tied is None:
        return model
    head = next((name for name in like.layout.names if like.layout.group(name) == "head" and name.endswith(".weight")), tied[1])
    return Model(UntiedWeights(model.weights, tied[0], head), model.config)


def head_name(model: Model) -> str | None:
    """Return the name that the head of a tied model would have as a separate tensor; None if the model is not tied."""
    if tied_embeddings(model.weights.specs, model.config) is None:
        return None
    return head_of(model.config, next(name for name in model.layout.names if is_embedding(name)))


def merged_views(
    method: MergeMethod, base: View, views: Mapping[str, View], sources: Sources, ranges: Mapping[str, object], where: str
) -> View:
    """Return the merge of views with the same tensors.

    Args:
        method: The merge method, with its bricks.
        base: The view that deltas are taken from.
        views: Brick -> its view.
        sources: Keys of the bricks, and the seed.
        ranges: Brick -> the layers that its view shows; random masks differ between ranges.
        where: The place in the step, for errors.

    Raises:
        WorkbenchError: If the method merges nothing.
    """
    if method.where is not None and (unmatched := method.where.unmatched(base)):
        raise InvalidRecipeError(
            f"{where}: {unmatched} matches no tensor of the slice",
            "Layers are counted from the first layer of the slice: its first one is layer 0.",
        )

    def contents() -> Mapping[str, str]:
        digests = sources.contents() if sources.contents else {}
        return {name: json_digest([digests.get(name, name), ranges.get(name)]) for name in views}

    deltas = {name: WeightsDelta(view.weights) for name, view in views.items()}
    merged = MergedWeights(base, base, method, StepBricks(deltas, sources.keys, contents), seed=sources.seed)
    return View(merged, base.config, base.layout)
