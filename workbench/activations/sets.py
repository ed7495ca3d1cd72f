"""Sets of neurons: indices by layer with their scores, as files that a brick's card points to, and their places in a checkpoint's tensors.

A neuron has rows of the matrices into it and a column of the matrix out of it. Names and shapes decide, so no model is loaded. A layer with
experts has the experts' tensors instead: one tensor per expert and matrix, or one tensor for all experts whose first dimension counts them. Its
router and its shared experts belong to no expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from workbench.activations.sites import Site
from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest, write_json
from workbench.ground.lazy import torch
from workbench.models.architecture import is_conv1d_layer
from workbench.models.layout import Model
from workbench.weights.digests import tensor_digest
from workbench.weights.header import save_tensors
from workbench.weights.masks import TensorMask
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


RECORD, TENSORS = "neurons.json", "neurons.safetensors"
_MADE_BY = "Make it again with `workbench analyze`."


@dataclass(frozen=True)
class NeuronSet:
    """Some neurons, or experts, of a model.

    Attributes:
        name: Name of the set, usually the function that its neurons serve.
        kind: Neurons of feed-forward layers, or experts.
        units: Layer -> number of neurons or experts that it has.
        indices: Layer -> indices of the set's neurons in ascending order. Layers without any are left out.
        scores: Layer -> the score of each of them, by which they were chosen; empty if they have none.
        base: Digest of the model's weights and configuration; None if unknown.
        evidence: How the set was chosen and what it does, as plain data.
    """

    name: str
    kind: Literal["neurons", "experts"]
    units: Mapping[int, int]
    indices: Mapping[int, Tensor]
    scores: Mapping[int, Tensor] = field(default_factory=dict)
    base: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of neurons in the set."""
        return sum(map(len, self.indices.values()))

    @property
    def share(self) -> float:
        """Share of the model's neurons that are in the set."""
        return self.size / max(1, sum(self.units.values()))

    def digest(self) -> str:
        """Return a digest of the set's places."""
        places = {str(layer): tensor_digest(index) for layer, index in sorted(self.indices.items())}
        return json_digest([self.kind, sorted(self.units.items()), places])

    def overlap(self, other: NeuronSet) -> float:
        """Return |A ∩ B| / min(|A|, |B|); two random sets of share s overlap by s on average."""
        common = sum(
            int(torch.isin(index, other.indices[layer]).sum()) for layer, index in self.indices.items() if layer in other.indices
        )
        return common / max(1, min(self.size, other.size))

    def check_model(self, units: Mapping[int, int], base: str | None, label: str) -> None:
        """Check that the set belongs to a model.

        Args:
            units: Layer -> number of neurons of the model.
            base: Digest of the model; None skips the comparison of digests.
            label: Start of the error message, such as "where.neurons: bricks/math".

        Raises:
            WorkbenchError: If layers or their numbers of neurons differ, or the set was chosen on a model with other weights.
        """
        for layer, count in self.units.items():
            if units.get(layer) != count:
                has = f"{units[layer]} {self.kind}" if layer in units else "no such layer with neurons"
                raise WorkbenchError(
                    f"{label}: the set was chosen on a model with {count} {self.kind} in layer {layer}, this model has {has}",
                    "Choose the neurons on this model: workbench analyze.",
                )
        if base and self.base and base != self.base:
            raise WorkbenchError(
                f"{label}: the set was chosen on a model with other weights or another config.json ({self.base[:12]}, this model is {base[:12]})",
                "Choose the neurons on this model: workbench analyze.",
            )


def top_share(name: str, sites: Sequence[Site], scores: Sequence[Tensor], share: float) -> NeuronSet:
    """Return the set of the neurons with the highest scores of each layer, at least one.

    Args:
        name: Name of the set.
        sites: The sites.
        scores: Score of each unit, per site.
        share: Share of the neurons of a layer to take.
    """
    return set_of(name, sites, [s.topk(max(1, round(share * len(s)))).indices for s in scores], scores)


def set_of(
    name: str, sites: Sequence[Site], chosen: Sequence[Tensor], scores: Sequence[Tensor] | None = None, **rest: Any
) -> NeuronSet:
    """Return the set of chosen units.

    Args:
        name: Name of the set.
        sites: The sites.
        chosen: Indices of the chosen units, per site.
        scores: Score of every unit, per site.
        **rest: Other fields of the set.
    """
    indices = {site.layer: index.sort().values.long() for site, index in zip(sites, chosen, strict=True) if len(index)}
    values: dict[int, Tensor] = {}
    if scores is not None:
        by_layer = {site.layer: score for site, score in zip(sites, scores, strict=True)}
        values = {layer: by_layer[layer][index].float() for layer, index in indices.items()}
    kind: Literal["neurons", "experts"] = "experts" if all(site.kind == "experts" for site in sites) else "neurons"
    return NeuronSet(name, kind, {site.layer: site.units for site in sites}, indices, values, **rest)


def write_set(folder: Path, neurons: NeuronSet) -> None:
    """Write a set as neurons.json and neurons.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"layer.{layer}": index.to(torch.int32) for layer, index in neurons.indices.items()}
    tensors |= {f"score.{layer}": score for layer, score in neurons.scores.items()}
    save_tensors(tensors, folder / TENSORS)
    record = {
        "version": 1,
        "name": neurons.name,
        "kind": neurons.kind,
        "base": neurons.base,
        "size": neurons.size,
        "share": neurons.share,
        "units": {str(layer): count for layer, count in neurons.units.items()},
        "digest": neurons.digest(),
        "evidence": dict(neurons.evidence),
    }
    write_json(folder / RECORD, record, indent=1)


def read_set(folder: Path, label: str | None = None) -> NeuronSet:
    """Read a set that `write_set` has written.

    Args:
        folder: Its directory.
        label: The set's name in messages.

    Raises:
        WorkbenchError: If a file is missing or damaged, an index does not exist in its layer, or the files do not belong together.
    """
    label = label or str(folder)
    record, tensors = read_pair(folder, RECORD, TENSORS, label, _MADE_BY)
    units = record.get("units")
    if record.get("kind") not in ("neurons", "experts") or not isinstance(units, dict) or not units:
        raise WorkbenchError(f"{label}/{RECORD}: expected `kind` and `units` of a set of neurons", _MADE_BY)
    base, evidence = record.get("base"), record.get("evidence") or {}
    if not isinstance(base, str | None) or not isinstance(evidence, dict):
        raise WorkbenchError(f"{label}/{RECORD}: expected a text or null in `base`, and an object in `evidence`", _MADE_BY)
    counts = {int(layer): count for layer, count in units.items() if _is_number(layer) and type(count) is int}
    indices = {int(n[6:]): t.long() for n, t in tensors.items() if n.startswith("layer.") and _is_number(n[6:])}
    scores = {int(n[6:]): t.float() for n, t in tensors.items() if n.startswith("score.") and _is_number(n[6:])}
    for layer, index in indices.items():
        if index.dim() != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= counts.get(layer, 0):
            raise WorkbenchError(
                f"{label}/{TENSORS}: layer {layer} has indices outside 0 to {counts.get(layer, 0) - 1}", _MADE_BY
            )
    if wrong := [layer for layer, score in scores.items() if layer not in indices or score.shape != indices[layer].shape]:
        raise WorkbenchError(f"{label}/{TENSORS}: layer {wrong[0]} has not one score per neuron", _MADE_BY)
    neurons = NeuronSet(str(record.get("name")), record["kind"], counts, indices, scores, base, evidence)
    if record.get("digest") != neurons.digest():
        raise WorkbenchError(f"{label}: {RECORD} and {TENSORS} do not belong together", _MADE_BY)
    return neurons


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def read_pair(folder: Path, record: str, tensors: str, label: str, made_by: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a record and its tensors.

    Args:
        folder: Their directory.
        record: Name of the JSON file.
        tensors: Name of the safetensors file.
        label: Name of the directory in messages.
        made_by: Hint on how to make the files again.

    Raises:
        WorkbenchError: If a file is missing or damaged.
    """
    try:
        content = jsondoc.read_object(folder / record, f"{label}/{record}")
        from safetensors.torch import load_file

        return content, load_file(folder / tensors)
    except (OSError, SafetensorError) as error:
        raise WorkbenchError(f"{label}/{tensors}: the file is missing or damaged ({error})", made_by) from None


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
            "Report this architecture: workbench/activations/sets.py lacks its tensor names.",
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
                "Report this architecture: workbench/activations/sets.py lacks its tensor names.",
            )
