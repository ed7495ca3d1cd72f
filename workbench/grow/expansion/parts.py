"""The parts of a decoder that can be widened: a table of module names, checked against the model that transformers builds.

The orientation of a matrix, the kind of a norm and all shapes come from the model without weights that config.json describes. A
module that is not in the table is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from workbench.errors import InvalidRecipeError, WorkbenchError
from workbench.grow.expansion.norms import is_norm
from workbench.models.architecture import is_conv1d
from workbench.models.layout import Model
from workbench.models.live import live_names
from workbench.models.skeleton import skeleton
from workbench.steps import Grown
from workbench.weights.header import TEXT_CONFIGS
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Leaf of a module's name -> number of matrices stacked in it.
FFN_IN = {"gate_proj": 1, "up_proj": 1, "c_fc": 1, "fc1": 1, "fc_in": 1, "dense_h_to_4h": 1, "gate_up_proj": 2}
QUERIES, KEYS = ("q_proj",), ("k_proj", "v_proj")
# Queries of all heads, then all keys, then all values (Phi-3). Other families with one matrix mix the rows of heads, and transformers
# reads no `head_dim` for them, so that their heads cannot change: see `Resize.check_head_size`.
STACKED = "qkv_proj"
READERS = (*QUERIES, *KEYS, STACKED, *FFN_IN)
WRITERS = ("o_proj", "dense", "down_proj", "fc2", "c_proj")
HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
NEURONS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
NOT_BUILT = (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ArithmeticError)
"""What transformers raises for a config.json that it cannot build a model from (NotImplementedError is a RuntimeError)."""
_HINT = "Report this architecture: workbench/grow/expansion/parts.py lacks its module names."


@dataclass(frozen=True)
class LinearPart:
    """A matrix on disk.

    Attributes:
        weight: Tensor name of the matrix.
        bias: Tensor name of its bias; None if there is none.
        transposed: Whether the matrix is stored as [in, out] (Conv1D).
        parts: Number of matrices stacked in it along its outputs.
    """

    weight: str
    bias: str | None
    transposed: bool
    parts: int = 1

    @property
    def leaf(self) -> str:
        """Last part of the module's name."""
        return self.weight.removesuffix(".weight").rpartition(".")[2]


class DecoderParts:
    """The parts of a model that `width` and `prune` change.

    Args:
        model: The model.
        step: Name of the method, for errors.
        instead: What the step can do with an architecture whose parts are unknown, for errors.

    Raises:
        WorkbenchError: If transformers cannot build the architecture, or a part is not in the table.
    """

    def __init__(self, model: Model, step: str = "width", instead: str = "Grow `depth`.") -> None:
        self.model, self.specs, self.step = model, model.weights.specs, step
        self._instead, self._hint = instead, f"{_HINT} {instead}"
        self.text = text_config(model.config)
        self._live = skeleton(json.dumps(model.config, sort_keys=True))
        self._names = live_names(model.config, self.specs)
        self._modules = dict(self._live.named_modules())
        self.parsed: Any = self._live.config.get_text_config()

    def size(self, field: str) -> Any:
        """Return a field of the text decoder's configuration as transformers reads it, or None.

        Raises:
            WorkbenchError: If the field differs from layer to layer.
        """
        try:
            return getattr(self.parsed, field, None)
        except RuntimeError as error:  # transformers raises it for fields with one value per layer
            reason = " ".join(str(error).split())
            raise InvalidRecipeError(
                f"grow {self.step}: {field} is not a single number in config.json ({reason[:120]})", self._instead
            ) from None

    def _is_conv1d(self, name: str) -> bool:
        """Return whether the live module that a tensor belongs to is transformers' Conv1D."""
        live = self._names[name]
        return bool(live) and is_conv1d(self._modules[live[0].rpartition(".")[0]])

    @cached_property
    def norms(self) -> dict[str, nn.Module]:
        """Modules that normalize their input, by live name. They are found by running them, not by their class names."""
        kinds: dict[tuple[str, tuple[int, ...]], bool] = {}
        norms: dict[str, nn.Module] = {}
        for name, module in self._modules.items():
            if next(module.children(), None) is not None:
                continue
            key = (type(module).__name__, tuple(p.numel() for p in module.parameters()))
            if key not in kinds:
                kinds[key] = is_norm(module)
            if kinds[key]:
                norms[name] = module
        return norms

    def is_inside(self, norm: str) -> bool:
        """Return whether a norm is inside attention or a feed-forward layer, so that it does not read the residual stream."""
        parent = self._modules[norm.rpartition(".")[0]]
        return any(
            leaf in (*QUERIES, *KEYS, *FFN_IN, *WRITERS, "qkv_proj", "query_key_value") for leaf, _ in parent.named_children()
        )

    def norm_of(self, name: str) -> str | None:
        """Return the live name of the norm that a tensor on disk belongs to, or None if it belongs to another module."""
        live = self._names[name]
        owner = live[0].rpartition(".")[0] if live else ""
        return owner if owner in self.norms else None

    def width_factors(self, wider: Mapping[str, object]) -> list[tuple[str, float, float]]:
        """Return the model's numeric attributes that change with the width, such as a factor on the embeddings.

        Args:
            wider: The config.json of the wider model.

        Returns:
            (Module and attribute, value now, value in the wider model) for each.
        """
        wider_modules = dict(skeleton(json.dumps(dict(wider), sort_keys=True)).named_modules())
        factors = []
        for name, module in self._modules.items():
            wider_attributes = vars(wider_modules[name]) if name in wider_modules else {}
            for key, value in vars(module).items():
                current, wider_value = value, wider_attributes.get(key, value)
                if isinstance(current, float) and isinstance(wider_value, float) and current != wider_value and "eps" not in key:
                    factors.append((f"{name}.{key}".lstrip("."), current, wider_value))
        return factors

    def linear(self, weight: str) -> LinearPart:
        """Return a matrix by the tensor name of its weight."""
        bias = f"{weight.removesuffix('.weight')}.bias"
        part = LinearPart(weight, bias if bias in self.specs else None, self._is_conv1d(weight))
        return LinearPart(part.weight, part.bias, part.transposed, FFN_IN.get(part.leaf, 1))

    def ffn(self, layer: int) -> tuple[list[LinearPart], LinearPart]:
        """Return a layer's matrices into its neurons, and the matrix out of them."""
        out = self.model.layout.mlp_out(layer)
        parent = out.removesuffix(".weight").rpartition(".")[0]
        siblings = [
            n
            for n in self.model.layout.in_layer(layer)
            if n.endswith(".weight") and n.rpartition(".")[0].rpartition(".")[0] == parent
        ]
        readers = [self.linear(n) for n in siblings if n != out and self.linear(n).leaf in FFN_IN]
        unknown = [n for n in siblings if n != out and len(self.specs[n].shape) > 1 and self.linear(n).leaf not in FFN_IN]
        if not readers or (unknown and not parent.endswith(str(layer))):
            raise InvalidRecipeError(
                f"grow {self.step}: layer {layer}: no known matrix into the neurons next to {', '.join(unknown) or out}",
                self._hint,
            )
        return readers, self.linear(out)

    def ffn_norms(self, layer: int) -> list[str]:
        """Return the tensors of norms between a layer's neurons and the matrix out of them."""
        parent = self.model.layout.mlp_out(layer).removesuffix(".weight").rpartition(".")[0]
        weights = {self.linear(n).weight for n in self.model.layout.in_layer(layer) if n.endswith(".weight")}
        siblings = [n for n in weights if n.rpartition(".")[0].rpartition(".")[0] == parent]
        return sorted(
            n for n in siblings if (norm := self.norm_of(n)) and self.is_inside(norm) and not parent.endswith(str(layer))
        )

    def head_norms(self, head: int) -> list[str]:
        """Return the tensors of norms inside attention that cover more than one head of `head` channels."""
        outs = [
            self.model.layout.attention_out(i).removesuffix(".weight").rpartition(".")[0] for i in range(self.model.layout.depth)
        ]
        return [
            name
            for name in self.specs
            if (module_leaf(name) in HEAD_NORMS or (self.norm_of(name) and name.rpartition(".")[0].rpartition(".")[0] in outs))
            and self.specs[name].numel > head
        ]

    def attention(self, layer: int) -> tuple[dict[str, LinearPart], LinearPart]:
        """Return a layer's matrices of queries, keys and values, separate or stacked in one, and its output matrix."""
        out = self.linear(self.model.layout.attention_out(layer))
        parent = out.weight.removesuffix(".weight").rpartition(".")[0]
        inner = {n: self.linear(f"{parent}.{n}.weight") for n in (*QUERIES, *KEYS) if f"{parent}.{n}.weight" in self.specs}
        if not inner and f"{parent}.{STACKED}.weight" in self.specs:
            return {STACKED: self.linear(f"{parent}.{STACKED}.weight")}, out
        if len(inner) < 3:
            raise InvalidRecipeError(
                f"grow {self.step}: layer {layer}: heads need q_proj, k_proj and v_proj, or {STACKED}; found {', '.join(inner) or 'none'} "
                f"beside {out.weight}",
                self._hint,
            )
        return inner, out

    def is_resized(self, name: str, config: Mapping[str, object]) -> bool:
        """Return whether a tensor has another shape in the model that transformers builds from another config.json."""
        changed = dict(skeleton(json.dumps(dict(config), sort_keys=True)).named_parameters())
        own = dict(self._live.named_parameters())
        return any(live not in changed or changed[live].shape != own[live].shape for live in self._names[name] if live in own)

    def attention_inputs(self, built: PreTrainedModel) -> int:
        """Return the number of channels that the first layer's attention output matrix reads in a model without weights."""
        name = self.model.layout.attention_out(0)
        rows, cols = dict(built.named_parameters())[self._names[name][0]].shape
        return int(rows if self._is_conv1d(name) else cols)

    def sizes(self, linear: LinearPart) -> tuple[int, int]:
        """Return the numbers of outputs and inputs of a matrix."""
        rows, cols = self.specs[linear.weight].shape
        return (cols, rows) if linear.transposed else (rows, cols)


def module_leaf(name: str) -> str:
    """Return the last part of the name of the module that a tensor belongs to."""
    return name.rpartition(".")[0].rpartition(".")[2]


def text_config(config: Mapping[str, object]) -> dict[str, object]:
    """Return the part of config.json that describes the text decoder."""
    found = _text_part(config)
    return dict(found[1] if found else config)


def with_text(config: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """Return config.json with changed values of the text decoder."""
    found = _text_part(config)
    return {**config, found[0]: {**found[1], **changes}} if found else {**config, **changes}


def _text_part(config: Mapping[str, object]) -> tuple[str, Mapping[str, object]] | None:
    """Return the field of config.json that describes the text decoder, and its value; None if config.json itself does."""
    parts = ((field, config.get(field)) for field in TEXT_CONFIGS)
    return next(((field, part) for field, part in parts if isinstance(part, Mapping) and "hidden_size" in part), None)


def check_builds(config: Mapping[str, object], step: str) -> PreTrainedModel:
    """Return the model without weights of a config.json.

    Raises:
        WorkbenchError: If transformers cannot build a model of these sizes.
    """
    try:
        return skeleton(json.dumps(dict(config), sort_keys=True))
    except (*NOT_BUILT, WorkbenchError) as error:
        reason = error.message if isinstance(error, WorkbenchError) else " ".join(str(error).split())
        raise InvalidRecipeError(
            f"grow {step}: transformers cannot build a model of these sizes: {reason[:300]}", "Choose other sizes."
        ) from None


def check_shapes(config: Mapping[str, object], specs: Mapping[str, TensorSpec], step: str) -> None:
    """Check that transformers builds every tensor in this shape from config.json.

    Raises:
        WorkbenchError: If it builds another shape.
    """
    model = check_builds(config, step)
    live = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, places in live_names(config, specs).items():
        for place in places:
            if len(live[place]) == len(specs[name].shape) and live[place] != specs[name].shape:
                raise InvalidRecipeError(
                    f"grow {step}: {name} would have the shape {list(specs[name].shape)}, but transformers builds "
                    f"{list(live[place])} for model_type {config.get('model_type')}: config.json cannot express this size",
                    _HINT,
                )


class LayerPlan(Protocol):
    """Plan of the tensors that take the place of a dense feed-forward layer."""

    def dense(self, layer: int) -> Mapping[str, str]:
        """Return the tensors of the dense layer, by part."""

    def layer(self, layer: int) -> Mapping[str, Grown]:
        """Return the tensors that replace them."""


def replace_layers(model: Model, plan: LayerPlan) -> tuple[dict[str, Grown], list[int]]:
    """Replace the dense feed-forward layers of a model; all other tensors stay.

    Args:
        model: The model.
        plan: The tensors of each layer, which take the place of the layer's first matrix.

    Returns:
        The tensors in file order, and the layers that were replaced, in order.
    """
    tensors: dict[str, Grown] = {}
    done: set[int] = set()
    for name in model.layout.names:
        layer = model.layout.layer(name)
        if layer is None or name not in plan.dense(layer).values():
            tensors[name] = Grown(name)
        elif layer not in done:
            done.add(layer)
            tensors |= plan.layer(layer)
    return tensors, sorted(done)


def check_places(config: Mapping[str, object], specs: Mapping[str, TensorSpec], step: str, hint: str | None = None) -> None:
    """Check that the tensors are exactly those that the architecture of a config.json needs.

    Raises:
        WorkbenchError: If the architecture has no parameter for a tensor (with `hint`), or needs one that is missing.
    """
    places = live_names(config, specs)
    kind = config.get("model_type")
    if unplaced := [n for n, live in places.items() if not live]:
        raise InvalidRecipeError(f"grow {step}: {kind} has no parameter for {unplaced[0]} ({len(unplaced)} such tensors)", hint)
    built = skeleton(json.dumps(config, sort_keys=True))
    filled = {live for names in places.values() for live in names} | set(built.all_tied_weights_keys)
    if absent := sorted(n for n, _ in built.named_parameters() if n not in filled):
        raise InvalidRecipeError(
            f"grow {step}: {kind} needs {absent[0]}, which the model does not have ({len(absent)} such tensors)"
        )
