"""Experts behind those that a mixture has: from a base that is a mixture too, or made by bricks of a dense base."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from workbench.errors import WorkbenchError
from workbench.grow.expansion.targets import DOWN, GATE, TARGETS, UP, Target
from workbench.grow.mixtures.mixture import Mixture, numbered
from workbench.models.layout import Model
from workbench.steps import NEW, Axis, Grown
from workbench.weights.specs import TensorSpec


def from_base(mixture: Mixture, base: Model, numbers: Sequence[int]) -> dict[str, Grown]:
    """The tensors of a mixture with experts of its base behind its own, their rows of the router too.

    Errors: a base without experts, numbers that it does not have, layers that are not the base's, other shapes.
    """
    theirs = Mixture(base, f"{mixture.step}: the base")
    if beyond := [n for n in numbers if not 0 <= n < theirs.count]:
        raise WorkbenchError(
            f"grow {mixture.step}: no expert {beyond[0]}: a layer of the base has 0..{theirs.count - 1}", None, 2
        )
    origin, old = mixture.model.weights.origin, mixture.count

    def own(name: str, i: int) -> Grown:
        found = next((o for e in range(old) if (o := origin(numbered(name, e)))), None)
        source = numbered(found, numbers[i]) if found else None
        if source not in theirs.places:
            raise _foreign(mixture, name)
        return Grown(source, base=True, new=True)

    def shared(name: str) -> Grown:
        source = origin(name)
        if source is None or source not in theirs.places:
            raise _foreign(mixture, name)
        place, spec = mixture.places[name], mixture.model.weights.specs[name]
        parts = (Grown(name), *(theirs.part(source, [n], base=True) for n in numbers))
        return Grown(name, parts=parts, shape=place.shape(spec, old + len(numbers), old))

    return _appended(mixture, base, len(numbers), own, shared)


def from_bricks(mixture: Mixture, base: Model, names: Sequence[str], std: float) -> dict[str, Grown]:
    """The tensors of a mixture with what bricks make of the base's feed-forward layers as experts behind its own.

    Args:
        std: Of the rows of the router, which are drawn.

    Errors: an architecture that `grow: experts` does not make, a base that is not dense, layers that are not the base's, other shapes.
    """
    model, count = mixture.model, len(names)
    kind = str(model.config.get("model_type"))
    if kind not in TARGETS:
        raise WorkbenchError(
            f"grow {mixture.step}: `bricks` become experts of {', '.join(TARGETS)}, and this model is {kind}",
            "`copy` and `base` take every mixture.",
            2,
        )
    target, dense = TARGETS[kind], {layer: _dense(mixture, base, layer) for layer in mixture.layers}

    def own(name: str, i: int) -> Grown:
        prefix, layer = _prefix(mixture, name)
        part = {prefix + n.format(e=mixture.places[name].number): p for p, n in target.expert.items()}.get(name)
        if part is None:
            raise _unnamed(mixture, name, target)
        return Grown(dense[layer][part], brick=names[i], base=True, new=True)

    def shared(name: str) -> Grown:
        (prefix, layer), place, spec = _prefix(mixture, name), mixture.places[name], model.weights.specs[name]
        leaf = name.removeprefix(prefix)
        added = Axis(np.concatenate([place.index(range(mixture.count)), np.full(count * place.size, NEW)]))
        if leaf == target.router:
            return Grown(name, rows=added, std=std)
        if leaf in target.zeros:
            return Grown(name, cols=added)
        if leaf not in target.fused:
            raise _unnamed(mixture, name, target)
        parts = (Grown(dense[layer][p], brick=brick, base=True, new=True) for brick in names for p in target.fused[leaf])
        return Grown(name, parts=(Grown(name), *parts), shape=place.shape(spec, mixture.count + count, mixture.count))

    return _appended(mixture, base, count, own, shared)


def routers(mixture: Mixture) -> dict[int, str]:
    """Layer -> the router's weight, of an architecture that `grow: experts` makes."""
    target = TARGETS[mixture.model.config["model_type"]]
    return {layer: f"{mixture.model.layout.prefix}{layer}.{target.router}" for layer in mixture.layers}


def corrections(mixture: Mixture) -> dict[int, list[str]]:
    """Layer -> what is added to the router's scores before the choice."""
    target = TARGETS[mixture.model.config["model_type"]]
    return {layer: [f"{mixture.model.layout.prefix}{layer}.{n}" for n in target.zeros] for layer in mixture.layers}


def _appended(
    mixture: Mixture, base: Model, count: int, own: Callable[[str, int], Grown], shared: Callable[[str], Grown]
) -> dict[str, Grown]:
    """A mixture with experts behind its own.

    Args:
        own: (tensor that the last expert has for itself, i) -> the i-th new expert's.
        shared: Tensor with a part for every expert -> the same with the new ones' parts behind.
    """
    found: dict[str, Grown] = {}
    for name in mixture.model.layout.names:
        place = mixture.places.get(name)
        found[name] = Grown(name) if place is None or place.number is not None else shared(name)
        if place is not None and place.number == mixture.count - 1:
            found |= {numbered(name, mixture.count + i): own(name, i) for i in range(count)}
    for name, grown in found.items():
        _check_shape(mixture, base, name, grown)
    return found


def _check_shape(mixture: Mixture, base: Model, name: str, grown: Grown) -> None:
    """Errors: a part of another shape than those of the model's own experts."""
    here, there = mixture.model.weights.specs, base.weights.specs
    if grown.base:
        like = here[numbered(name, 0)]
        if (spec := grown.spec(there[grown.source])).shape != like.shape:
            raise _differs(mixture, grown.source, spec, like)
    for part in grown.parts:
        spec, like = part.spec((there if part.base else here)[part.source]), here[grown.source]
        side = mixture.places[grown.source].columns
        if (spec.rows if side else spec.cols) != (like.rows if side else like.cols):
            raise _differs(mixture, part.source, spec, like)


def _differs(mixture: Mixture, source: str, spec: TensorSpec, like: TensorSpec) -> WorkbenchError:
    return WorkbenchError(
        f"grow {mixture.step}: the base's {source} is {list(spec.shape)}, and the model has {list(like.shape)} by now",
        "Add experts before a step that changes sizes.",
        2,
    )


def _dense(mixture: Mixture, base: Model, layer: int) -> dict[str, str]:
    """Part -> tensor of the base's dense layer that a layer goes back to."""
    model = mixture.model
    places = (base.layout.layer(o) for n in model.layout.in_layer(layer) if (o := model.weights.origin(n)))
    there = next((p for p in places if p is not None), None)
    found = {part: f"{base.layout.prefix}{there}.mlp.{part}.weight" for part in (GATE, UP, DOWN)}
    if missing := [n for n in found.values() if n not in base.weights.specs]:
        raise WorkbenchError(
            f"grow {mixture.step}: the base has no {missing[0]} for `bricks` to make an expert of: layer {layer} goes back to no dense "
            "feed-forward layer",
            "`bricks` follow `grow: experts` in a recipe with a dense base; a mixture as the base has `base: N` and `copy: N`.",
            2,
        )
    return found


def _prefix(mixture: Mixture, name: str) -> tuple[str, int]:
    layer = mixture.places[name].layer
    return f"{mixture.model.layout.prefix}{layer}.", layer


def _foreign(mixture: Mixture, name: str) -> WorkbenchError:
    return WorkbenchError(
        f"grow {mixture.step}: {name} goes back to no tensor of the base's experts, so that `base` has nothing to add there",
        "`copy: N` has an expert of the current model twice.",
        2,
    )


def _unnamed(mixture: Mixture, name: str, target: Target) -> WorkbenchError:
    return WorkbenchError(
        f"grow {mixture.step}: {name} is no tensor of {target.model_type} as `grow: experts` names them", None, 2
    )
