"""Places of neurons and experts in the tensors of a checkpoint: rows of matrices into them, columns of the matrix out of them.

Names and shapes decide, so no model is loaded. A layer with experts has the experts' tensors instead: one tensor per expert and
matrix, or one tensor for all experts whose first dimension counts them. Its router and its shared experts belong to no expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from workbench.activations.sets import NeuronSet
from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.models.architecture import is_conv1d_layer
from workbench.models.layout import Model
from workbench.weights.masks import TensorMask
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

# Modules that stack the gate's rows and then the up projection's rows in one matrix: Phi-3, GLM.
_STACKED = ("gate_up_proj",)
# Tensors of experts in most models | in Granite. In JetMoE, the attention has experts too, which hold no feed-forward neurons.
_EXPERT = re.compile(r"(?<!attention)\.experts\.(?:(\d+)\.)?|\.block_sparse_moe\.(?:input|output)_linear\.")
# Matrices out of an expert: most models | Mixtral, DBRX | Granite.
_EXPERT_OUT = re.compile(r"(down_proj|w2|output_linear)(\.weight|\.bias|_bias)?$")


@dataclass(frozen=True)
class NeuronAxis:
    """The axis of a tensor along which the units (neurons or experts) of a layer lie.

    Attributes:
        layer: The layer.
        units: Number of units of the layer.
        axis: Axis of the row view.
        run: Number of consecutive rows of a unit: 1 for a neuron, the rows of one expert in a fused tensor.
        expert: The expert that the whole tensor belongs to; None if the tensor has parts of several units.
        is_out: True if the tensor maps the units to the layer's output.
    """

    layer: int
    units: int
    axis: Literal["rows", "columns"]
    run: int = 1
    expert: int | None = None
    is_out: bool = False

    def unit_of(self, spec: TensorSpec) -> Tensor:
        """Return the unit of each row or column of a tensor of this shape, int64."""
        length = spec.rows if self.axis == "rows" else spec.cols
        if self.expert is not None:
            return torch.full((length,), self.expert)
        return torch.arange(length) // self.run % self.units

    def mask(self, index: Tensor, spec: TensorSpec) -> TensorMask:
        """Return the rows or columns of some units.

        Args:
            index: Indices of the units.
            spec: Shape of the tensor.
        """
        chosen = torch.zeros(self.units, dtype=torch.bool).index_fill_(0, index.long(), True)
        return TensorMask(self.axis, chosen[self.unit_of(spec)])


def neuron_axes(model: Model) -> dict[str, NeuronAxis]:
    """Return tensor -> axis for all tensors whose rows or columns belong to single neurons or experts.

    Layers whose feed-forward tensors have unknown names are left out.

    Raises:
        WorkbenchError: If a matrix stacks several matrices into the neurons in an unknown order.
    """
    axes: dict[str, NeuronAxis] = {}
    for layer in range(model.layout.depth):
        names = model.layout.in_layer(layer)
        experts = [name for name in names if _EXPERT.search(name)]
        axes |= dict(_of_experts(experts, layer, model) if experts else _of_neurons(names, layer, model))
    return axes


def unit_counts(axes: Mapping[str, NeuronAxis]) -> dict[int, int]:
    """Return layer -> number of its neurons or experts."""
    return {axis.layer: axis.units for axis in axes.values()}


def set_masks(
    neurons: NeuronSet, model: Model, label: str, base: str | None = None, *, only_out: bool = False
) -> dict[str, TensorMask]:
    """Return tensor -> rows or columns of a set's units, for all tensors with units; empty masks where the set has none.

    Args:
        neurons: The set.
        model: Names, shapes and configuration of the model.
        label: Start of error messages, such as "where.neurons: bricks/math".
        base: Digest of the model; None skips the comparison of digests.
        only_out: Only return tensors that map the units to the layer's output.

    Raises:
        WorkbenchError: If the set does not belong to the model, or the names of its feed-forward tensors are unknown.
    """
    axes = neuron_axes(model)
    counts = unit_counts(axes)
    if unknown := [layer for layer in neurons.units if layer < model.layout.depth and layer not in counts]:
        raise WorkbenchError(
            f"{label}: the tensors of layer {unknown[0]} have no known feed-forward matrix "
            f"(model_type {model.config.get('model_type')})",
            "Report this architecture: workbench/activations/places.py lacks its tensor names.",
        )
    neurons.check_model(counts, base, label)
    none = torch.zeros(0, dtype=torch.long)
    specs = model.weights.specs
    return {
        name: axis.mask(neurons.indices.get(axis.layer, none), specs[name])
        for name, axis in axes.items()
        if axis.is_out or not only_out
    }


def _of_experts(names: list[str], layer: int, model: Model) -> Iterator[tuple[str, NeuronAxis]]:
    """Yield the tensors of a layer's experts."""
    specs = model.weights.specs
    numbers = {name: match[1] for name in names if (match := _EXPERT.search(name))}
    single = [int(number) for number in numbers.values() if number is not None]
    fused = [specs[name].shape[0] for name in numbers if len(specs[name].shape) == 3]
    if not single and not fused:
        return
    count = max(single) + 1 if single else fused[0]
    for name, number in numbers.items():
        is_out = bool(_EXPERT_OUT.search(name))
        if number is not None:
            yield name, NeuronAxis(layer, count, "rows", expert=int(number), is_out=is_out)
        elif specs[name].shape[0] == count:
            yield name, NeuronAxis(layer, count, "rows", run=specs[name].rows // count, is_out=is_out)


def _of_neurons(names: list[str], layer: int, model: Model) -> Iterator[tuple[str, NeuronAxis]]:
    """Yield the tensors of a layer's neurons: the matrices into them with biases, norms over them, the matrix out of them."""
    try:
        out = model.layout.mlp_out(layer)
    except WorkbenchError:  # a layer without a dense feed-forward part, or of an unknown architecture
        return
    specs = model.weights.specs
    is_transposed = is_conv1d_layer(model.config, out.removesuffix(".weight"))
    units = specs[out].shape[0 if is_transposed else 1]
    yield out, NeuronAxis(layer, units, "rows" if is_transposed else "columns", is_out=True)
    own = out.removesuffix(".weight")
    parent = own.rpartition(".")[0]
    is_shared = parent.endswith(f".{layer}")  # OPT: the layer itself holds the matrices, and norms of the hidden state
    for name in names:
        module, _, kind = name.rpartition(".")
        if module == own or module.rpartition(".")[0] != parent:
            continue
        weight = specs.get(f"{module}.weight")
        if weight is None or len(weight.shape) != 2:
            if not is_shared and specs[name].shape == (units,):
                yield name, NeuronAxis(layer, units, "rows")
            continue
        outputs = weight.shape[1 if is_conv1d_layer(model.config, module) else 0]
        if outputs == units or (outputs == 2 * units and module.endswith(_STACKED)):
            in_columns = kind == "weight" and is_conv1d_layer(model.config, module)
            yield name, NeuronAxis(layer, units, "columns" if in_columns else "rows")
        elif outputs % units == 0:
            raise WorkbenchError(
                f"{name} has {outputs} outputs for {units} neurons, and it is unknown how they are stacked",
                "Report this architecture: workbench/activations/places.py lacks its tensor names.",
            )
