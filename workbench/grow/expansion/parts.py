"""The parts of a decoder that can be widened: a table of module names, checked against the model that transformers builds.

The orientation of a matrix, the kind of a norm and all shapes come from the model without weights that config.json describes. A
module that is not in the table is refused by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from workbench.ground.errors import InvalidRecipeError, WorkbenchError
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

# Last part of a module's name.
FFN_IN = ("gate_proj", "up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "gate_up_proj")
QUERIES, KEYS = ("q_proj",), ("k_proj", "v_proj")
# Queries of all heads, then all keys, then all values (Phi-3). Other families with one matrix mix the rows of heads, and transformers
# reads no `head_dim` for them, so that their heads cannot change: see `Resize.check_head_size`.
STACKED = "qkv_proj"
READERS = (*QUERIES, *KEYS, STACKED, *FFN_IN)
WRITERS = ("o_proj", "dense", "down_proj", "fc2", "c_proj")
HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
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
    """

    weight: str
    bias: str | None
    transposed: bool


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
        self.instead, self.hint = instead, f"{_HINT} {instead}"
        self.text = text_config(model.config)
        self.built = skeleton(json.dumps(model.config, sort_keys=True))
        self.places = live_names(model.config, self.specs)
        self.modules = dict(self.built.named_modules())
        self.parsed: Any = self.built.config.get_text_config()

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
                f"grow {self.step}: {field} is not a single number in config.json ({reason[:120]})", self.instead
            ) from None

    def _is_conv1d(self, name: str) -> bool:
        """Return whether the live module that a tensor belongs to is transformers' Conv1D."""
        live = self.places[name]
        return bool(live) and is_conv1d(self.modules[live[0].rpartition(".")[0]])

    @cached_property
    def norms(self) -> dict[str, nn.Module]:
        """Modules that normalize their input, by live name. They are found by running them, not by their class names."""
        kinds: dict[tuple[str, tuple[int, ...]], bool] = {}
        norms: dict[str, nn.Module] = {}
        for name, module in self.modules.items():
            if next(module.children(), None) is not None:
                continue
            key = (type(module).__name__, tuple(p.numel() for p in module.parameters()))
            if key not in kinds:
                kinds[key] = is_norm(module)
            if kinds[key]:
                norms[name] = module
        return norms

    def check_unused(self) -> None:
        """Raise WorkbenchError if the files have layers that transformers does not build, which predict additional tokens.

        Their sizes are those of the other layers, and nothing says which of their tensors would change.
        """
        layout, unused = self.model.layout, (name for name, live in self.places.items() if not live)
        behind = (name for name in unused if layout.layer(name) is None and (layout.number(name) is not None or "mtp." in name))
        if name := next(behind, None):
            raise InvalidRecipeError(
                f"grow {self.step}: transformers does not build {name}, so its size cannot follow that of the other layers",
                "Load and save the model with transformers, which leaves such tensors out.",
            )

    def is_inside(self, norm: str) -> bool:
        """Return whether a norm is inside attention or a feed-forward layer, so that it does not read the residual stream."""
        parent = self.modules[norm.rpartition(".")[0]]
        return any(
            leaf in (*QUERIES, *KEYS, *FFN_IN, *WRITERS, "qkv_proj", "query_key_value") for leaf, _ in parent.named_children()
        )

    def norm_of(self, name: str) -> str | None:
        """Return the live name of the norm that a tensor on disk belongs to, or None if it belongs to another module."""
        live = self.places[name]
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
        for name, module in self.modules.items():
            wider_attributes = vars(wider_modules[name]) if name in wider_modules else {}
            for key, value in vars(module).items():
                current, wider_value = value, wider_attributes.get(key, value)
                if isinstance(current, float) and isinstance(wider_value, float) and current != wider_value and "eps" not in key:
                    factors.append((f"{name}.{key}".lstrip("."), current, wider_value))
        return factors

    def linear(self, weight: str) -> LinearPart:
        """Return a matrix by the tensor name of its weight."""
        bias = f"{weight.removesuffix('.weight')}.bias"
        return LinearPart(weight, bias if bias in self.specs else None, self._is_conv1d(weight))

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
                self.hint,
            )
        return inner, out

    def is_resized(self, name: str, config: Mapping[str, object]) -> bool:
        """Return whether a tensor has another shape in the model that transformers builds from another config.json."""
        changed = dict(skeleton(json.dumps(dict(config), sort_keys=True)).named_parameters())
        own = dict(self.built.named_parameters())
        return any(live not in changed or changed[live].shape != own[live].shape for live in self.places[name] if live in own)

    def attention_inputs(self, built: PreTrainedModel) -> int:
        """Return the number of channels that the first layer's attention output matrix reads in a model without weights."""
        name = self.model.layout.attention_out(0)
        rows, cols = dict(built.named_parameters())[self.places[name][0]].shape
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
    if found := other_shape(check_builds(config, step), live_names(config, specs), specs):
        name, built = found
        raise InvalidRecipeError(
            f"grow {step}: {name} would have the shape {list(specs[name].shape)}, but transformers builds {list(built)} for model_type "
            f"{config.get('model_type')}: config.json cannot express this size",
            _HINT,
        )


def other_shape(
    built: PreTrainedModel, places: Mapping[str, Sequence[str]], specs: Mapping[str, TensorSpec]
) -> tuple[str, tuple[int, ...]] | None:
    """Return a tensor that alone fills a parameter of another shape, and that shape; None if there is none.

    The rows of split and joined tensors are compared by transformers' conversion.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    filled = Counter(place for live in places.values() for place in live)
    for name, live in places.items():
        if (
            len(live) == 1 == filled[live[0]]
            and len(shape := shapes[live[0]]) == len(specs[name].shape)
            and shape != specs[name].shape
        ):
            return name, shape
    return None


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
