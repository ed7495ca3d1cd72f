"""Neurons of a live model: scaled for a while, and read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Chosen: TypeAlias = Mapping[int, Sequence[int]] | str | Path
"""Layer -> indices of neurons, or the directory of a set of neurons."""


class Neurons:
    """The neurons of a live model: the inputs of its feed-forward output projections, or the experts of its routed layers.

    Weights are never changed. Hooks work on the model as it is, so they compose with each other, with `swap`, and with what a route or a memory adds.

    Args:
        model: A transformers causal language model, such as one from `load`.

    Raises:
        WorkbenchError: If no layer has neurons or experts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from workbench.activations.sites import find_sites

        self.model = model
        depth = int(model.config.get_text_config().num_hidden_layers)
        self.sites = find_sites(model, depth, next(model.parameters()).device)

    @property
    def units(self) -> dict[int, int]:
        """Layer -> number of its neurons or experts."""
        return {site.layer: site.units for site in self.sites}

    @contextmanager
    def scaled(self, neurons: Chosen, factor: float = 0.0) -> Iterator[PreTrainedModel]:
        """Scale what some neurons add to the output, in every forward pass inside the block.

        Without neurons, or with factor 1, the model computes the same bits as outside.

        Args:
            neurons: Layer -> indices, or the directory of a set, such as runs/neurons/MODEL/sets/math.
            factor: 0 switches them off, 2 doubles them.

        Raises:
            WorkbenchError: If the model has no such layer or neuron, or the set belongs to a model with other layers.
        """
        from workbench.activations.sites import scaling

        with scaling(self.model, self.sites, self._indices(neurons), factor):
            yield self.model

    @contextmanager
    def recorded(self, neurons: Chosen) -> Iterator[dict[int, list[Tensor]]]:
        """Record the activations of some neurons in every forward pass inside the block.

        Args:
            neurons: Layer -> indices, or the directory of a set.

        Yields:
            Layer -> one tensor for each pass, [..., neurons] in the order of the indices.

        Raises:
            WorkbenchError: If the model has no such layer or neuron, or the set belongs to a model with other layers.
        """
        from workbench.activations.sites import visiting

        indices = self._indices(neurons)
        found: dict[int, list[Tensor]] = {layer: [] for layer in indices}

        def visit(number: int, activations: Tensor) -> None:
            layer = self.sites[number].layer
            if (index := indices.get(layer)) is not None:
                found[layer].append(activations[..., index.to(activations.device)].detach().clone())

        with visiting(self.model, self.sites, visit):
            yield found

    def _indices(self, neurons: Chosen) -> Mapping[int, Tensor]:
        """Return layer -> indices of neurons that the model has."""
        if isinstance(neurons, str | Path):
            from workbench.activations.sets import read_set

            stored = read_set(Path(neurons))
            stored.check_model(self.units, None, str(neurons))
            return stored.indices
        for layer, chosen in neurons.items():
            units = self.units.get(layer, 0)
            if wrong := [index for index in chosen if not 0 <= index < units]:
                has = f"layer {layer} has neurons 0 to {units - 1}" if units else f"only layers {sorted(self.units)} have neurons"
                raise WorkbenchError(f"the model has no neuron {layer}.{wrong[0]}: {has}", None)
        return {layer: torch.tensor(list(chosen), dtype=torch.long) for layer, chosen in neurons.items()}
