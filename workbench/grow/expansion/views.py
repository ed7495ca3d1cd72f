"""Views of models for stacks: some layers of a model under new numbers, and merges of such views."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from workbench.errors import InvalidRecipeError
from workbench.files import json_digest
from workbench.lazy import torch
from workbench.merge.streaming.deltas import StepBricks, WeightsDelta
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.architecture import UntiedWeights, head_of, is_embedding, tied_embeddings
from workbench.models.layout import Layout, Model
from workbench.steps import MergeMethod, Sources
from workbench.weights.specs import Source, TensorSpec, Weights


class RenamedWeights:
    """Some tensors of a model under other names. They are the base of the merges within a stack, so each is its own origin.

    Args:
        weights: The model's weights.
        names: New name -> the model's name.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self._weights = weights
        self._names = names
        self._specs = {name: weights.specs[old] for name, old in names.items()}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs by the new names."""
        return self._specs

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

    def __init__(self, weights: Weights, config: dict[str, Any], layout: Layout) -> None:
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
    method: MergeMethod, base: View, views: Mapping[str, View], sources: Sources, ranges: Mapping[str, Any], where: str
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

    deltas = {name: WeightsDelta(view.weights, base.weights) for name, view in views.items()}
    merged = MergedWeights(base, base, method, StepBricks(deltas, sources.keys, contents), seed=sources.seed)
    return View(merged, base.config, base.layout)
