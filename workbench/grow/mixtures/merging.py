"""Merge experts: the average of an expert that stays with those that go, weighted by how often tokens select them.

Experts join the remaining expert whose router logits are the most similar. Before they are averaged, their neurons are put in the order
of those that they resemble most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.errors import InvalidRecipeError
from workbench.grow.mixtures.gates import live_modules, read_inputs
from workbench.grow.mixtures.mixture import Mixture, numbered
from workbench.lazy import no_grad, torch
from workbench.models.texts import TextRow
from workbench.weights.specs import load

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Leaf of the name of a matrix into the neurons -> number of matrices stacked in it; leaves of matrices out of the neurons.
_INTO = {"w1": 1, "w3": 1, "gate_proj": 1, "up_proj": 1, "gate_up_proj": 2, "input_linear": 2}
_OUT = ("w2", "down_proj", "output_linear")


@dataclass(frozen=True)
class _Place:
    """The part of an expert in a tensor on disk.

    Attributes:
        name: The tensor; of an expert with tensors of its own, that of expert 0.
        stacked: Number of matrices into the neurons; 0 for a matrix out of them, None for a part of the router.
    """

    name: str
    stacked: int | None


class Merger:
    """The experts of one layer, as matrices.

    Args:
        mixture: The mixture.
        layer: The layer.

    Raises:
        WorkbenchError: If it is unknown which rows of a tensor are neurons.
    """

    def __init__(self, mixture: Mixture, layer: int) -> None:
        self._mixture, self._layer = mixture, layer
        names = [*mixture.of_expert(layer, 0), *mixture.shared(layer)]
        self._places = [_Place(name, self._stacked(name)) for name in names]
        routers = [p.name for p in self._places if p.stacked is None and p.name.endswith(".weight")]
        if len(routers) != 1 or not any(p.stacked == 0 for p in self._places) or not any(p.stacked for p in self._places):
            raise self._unknown(", ".join(names))
        self.router = routers[0]
        (out,) = (p for p in self._places if p.stacked == 0)
        hidden, neurons = self._shape(out)
        for place in self._places:
            if place.stacked and self._shape(place) != (place.stacked * neurons, hidden):
                raise self._unknown(place.name)

    def _unknown(self, name: str) -> InvalidRecipeError:
        """Return the error for experts whose neurons are unknown."""
        return InvalidRecipeError(
            f"grow {self._mixture.step}: `average` does not know which rows and columns of {name} are neurons "
            f"(model_type {self._mixture.model.config.get('model_type')})",
            "Leave `average` out: the experts are then removed.",
        )

    def _stacked(self, name: str) -> int | None:
        """Return the kind of a tensor; see `_Place`."""
        place, spec = self._mixture.places[name], self._mixture.model.weights.specs[name]
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if leaf in _OUT or leaf in _INTO:
            return _INTO.get(leaf, 0)
        is_matrix = len(spec.shape) == 2 and name.endswith(".weight") and not place.columns
        if place.number is None and place.size == 1 and (is_matrix or place.columns or len(spec.shape) == 1):
            return None  # the router's matrix, or one number for each expert
        raise self._unknown(name)

    def _shape(self, place: _Place) -> tuple[int, int]:
        """Return the shape of an expert's matrix."""
        spec = self._mixture.model.weights.specs[place.name]
        where = self._mixture.places[place.name]
        return (spec.rows, spec.cols) if where.number is not None else (where.size, spec.cols)

    def read(self, expert: int) -> dict[str, Tensor]:
        """Return the parts of an expert in float32: name of the tensor -> matrix."""
        weights, parts = self._mixture.model.weights, {}
        for place in self._places:
            where = self._mixture.places[place.name]
            if where.number is not None:
                parts[place.name] = load(weights, numbered(place.name, expert), torch.float32)
                continue
            spec = weights.specs[place.name]
            if where.columns:
                parts[place.name] = load(weights, place.name, torch.float32).reshape(spec.rows, spec.cols)[
                    :, where.index([expert])
                ]
                continue
            rows = torch.empty(where.size, spec.cols)
            weights.open(place.name, torch.device("cpu")).read(expert * where.size, (expert + 1) * where.size, rows)
            parts[place.name] = rows
        return parts

    def aligned(self, parts: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an expert with its neurons in the order of those of another expert that they resemble most.

        The order maximizes the sum over matrices of the products of weights of matched neurons, which leaves the function as it is.

        Source:
            Li et al. 2024, MC-SMoE, arXiv 2310.01334, section 3.2; Ainsworth et al. 2023, Git Re-Basin, arXiv 2209.04836, section 3.2.
        """
        from scipy.optimize import linear_sum_assignment

        similar: Tensor | float = 0.0
        for place in self._places:
            one, other = parts[place.name], like[place.name]
            if place.stacked:
                pairs = zip(other.chunk(place.stacked), one.chunk(place.stacked), strict=True)
                similar = similar + sum((a.double() @ b.double().T for a, b in pairs), torch.zeros(1, dtype=torch.float64))
            elif place.stacked == 0:
                similar = similar + other.double().T @ one.double()
        assert isinstance(similar, torch.Tensor)
        order = torch.from_numpy(linear_sum_assignment(similar.numpy(), maximize=True)[1])
        made = dict(parts)
        for place in self._places:
            if place.stacked:
                made[place.name] = torch.cat([half[order] for half in parts[place.name].chunk(place.stacked)])
            elif place.stacked == 0:
                made[place.name] = parts[place.name][:, order]
        return made

    def merged(self, groups: Sequence[Sequence[int]], shares: Sequence[float]) -> dict[str, Tensor]:
        """Return the tensors of the layer that change: name in the smaller model -> tensor.

        Args:
            groups: Experts of each group, in the new order; the first one of a group gives the order of the neurons.
            shares: How often tokens select each expert. A group that no token selects has equal weights.
        """
        tensors: dict[str, Tensor] = {}
        joined: dict[str, list[Tensor]] = {}
        for number, group in enumerate(groups):
            first = self.read(group[0])
            total = sum(shares[e] for e in group)
            mean = {name: part * self._weight(group[0], group, shares, total) for name, part in first.items()}
            for expert in group[1:]:
                for name, part in self.aligned(self.read(expert), first).items():
                    mean[name] += part * self._weight(expert, group, shares, total)
            for name, part in mean.items():
                if self._mixture.places[name].number is None:
                    joined.setdefault(name, []).append(part)
                elif len(group) > 1:
                    tensors[numbered(name, number)] = part
        specs, dtypes = self._mixture.model.weights.specs, (torch.bfloat16, torch.float16, torch.float32)
        for name, parts in joined.items():
            shape = self._mixture.places[name].shape(specs[name], len(groups), self._mixture.count)
            tensors[name] = torch.cat(parts, dim=int(self._mixture.places[name].columns)).reshape(shape)
        sources = {
            **{name: name for name in joined},
            **{numbered(p.name, n): p.name for p in self._places for n in range(len(groups))},
        }
        return {
            name: part.to(dtype).contiguous()
            for name, part in tensors.items()
            for dtype in [specs[sources[name]].dtype if specs[sources[name]].dtype in dtypes else torch.float32]
        }

    @staticmethod
    def _weight(expert: int, group: Sequence[int], shares: Sequence[float], total: float) -> float:
        """Return the weight of an expert in its group."""
        return shares[expert] / total if total else 1 / len(group)


def grouped(kept: Sequence[int], similarity: Tensor) -> list[list[int]]:
    """Return the groups of experts: each expert that goes joins the one that stays and is the most similar.

    Args:
        kept: Experts that stay.
        similarity: [experts, experts].
    """
    groups = [[expert] for expert in kept]
    for expert in range(len(similarity)):
        if expert not in kept:
            groups[int(similarity[expert, list(kept)].argmax())].append(expert)
    return groups


@no_grad
def logit_similarity(
    mixture: Mixture,
    routers: Mapping[int, str],
    live: PreTrainedModel,
    rows: Sequence[TextRow],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[int, Tensor]:
    """Return the cosine of the logits that the router gives to each pair of experts on texts: layer -> [experts, experts], float64.

    Args:
        mixture: The mixture.
        routers: Layer -> name of the router's matrix.
        live: The live model.
        rows: The texts as tokens.
        progress: Receives (tokens done, tokens).

    Source:
        Li et al. 2024, MC-SMoE, arXiv 2310.01334, section 3.1.
    """
    modules = live_modules(mixture.model, routers.values())
    device, done, total = next(live.parameters()).device, 0, sum(len(row.tokens) for row in rows)
    grams = {name: torch.zeros(mixture.count, mixture.count, dtype=torch.float64) for name in modules}
    for inputs in read_inputs(live, modules, rows, device):
        for name, x in inputs.items():
            logits = x @ live.get_submodule(modules[name]).weight.float().T
            grams[name] += (logits.double().T @ logits.double()).cpu()
        done += len(next(iter(inputs.values())))
        progress(done, total)
    norms = {name: gram.diagonal().sqrt().clamp_min(1e-300) for name, gram in grams.items()}
    return {layer: grams[name] / norms[name][:, None] / norms[name] for layer, name in routers.items()}
