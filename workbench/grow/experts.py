"""Experts: a dense model as a mixture of experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from workbench.conversion import live_names, parse_config, skeleton
from workbench.errors import WorkbenchError, nearest
from workbench.fields import Real, Whole
from workbench.grow.parts import check_shapes
from workbench.grow.targets import DOWN, GATE, PAIRS, TARGETS, UP, Target
from workbench.layout import Model
from workbench.registry import NEW, Axis, GrowMethod, Grown, Growth, Learns, Preserves, register

_SHARED = 64
"""Neurons of a shared expert that an architecture cannot do without; its output starts as zero."""
_ALWAYS = ("torch_dtype", "dtype")


@register
class Experts(GrowMethod):
    """Every feed-forward layer becomes a mixture of experts that start as copies of it (Komatsuzaki et al. 2023, sparse upcycling).

    Experts that are all alike compute what one of them does, whichever the router takes, because the weights of those it takes add up to
    one. The first expert keeps the layer's bricks; the others, and the router, are new.
    """

    paper = "Komatsuzaki et al. 2023, Sparse Upcycling, arXiv 2212.05055; Nakamura et al. 2025, Drop-Upcycling, arXiv 2502.19261"
    formula = "FFN(x) ↦ Σ over the top k of softmax(W_r x) renormalised · FFN_e(x), FFN_e = FFN"
    preserves: ClassVar[Preserves] = "approximate"
    learns: ClassVar[Learns] = "when_selected"

    grow: Literal["experts"]
    experts: Whole = Field(ge=2)
    """Number of experts in every layer."""
    top_k: Whole = Field(2, ge=1)
    """How many of them a token takes."""
    into: str | None = None
    """Architecture of the result: mixtral, qwen2_moe, qwen3_moe, flex_olmo, granitemoe, ernie4_5_moe; omitted: the usual one for the model."""
    redraw: Real = Field(0.0, ge=0, le=1)
    """Share of the neurons of every expert but the first that are drawn anew, with mean and standard deviation of the old ones: experts
    then differ, and the function changes (Drop-Upcycling: 0.5)."""
    norm_topk_prob: bool = True
    """Whether the weights of the experts that a token takes add up to one."""

    @model_validator(mode="after")
    def _fits(self) -> Experts:
        if self.top_k > self.experts:
            raise ValueError(f"expected top_k of at most {self.experts}, the number of experts; found {self.top_k}")
        if not self.norm_topk_prob:
            raise ValueError("norm_topk_prob: false multiplies what the experts give by the sum of the weights of those taken, which is below "
                             "one, so that the grown model would not compute what the dense one did")  # fmt: skip
        return self

    def promises(self) -> Preserves:
        """Experts that differ compute something else."""
        return "no" if self.redraw else self.preserves

    def expand(self, model: Model) -> Growth:
        """Plan names, sizes and router. Errors: an architecture without such a twin, layers that differ, parts that the twin does not have."""
        target, config = self._target(model)
        plan = _Plan(self, model, target)
        tensors: dict[str, Grown] = {}
        done: set[int] = set()
        for name in model.layout.names:
            layer = model.layout.layer(name)
            if layer is None or name not in plan.dense(layer).values():
                tensors[name] = Grown(name)
            elif layer not in done:  # the experts stand where the layer's first matrix stood
                done.add(layer)
                tensors |= plan.layer(layer)
        _check_places(config, tensors, model)
        check_shapes(config, {n: g.spec(model.weights.specs[g.source]) for n, g in tensors.items()}, "experts")
        return Growth(tensors, config, {"into": target.model_type, "experts": self.experts, "top_k": self.top_k})

    def _target(self, model: Model) -> tuple[Target, dict[str, Any]]:
        """The architecture of the result and its config.json."""
        parsed = parse_config(model.config).to_dict()
        kind = str(model.config.get("model_type"))
        pairs = PAIRS.get(kind)
        if pairs is None:
            raise WorkbenchError(
                f"grow experts: model_type {kind} has no mixture-of-experts twin in transformers that computes the same with experts that are "
                f"all alike; those that have: {', '.join(PAIRS)}", "`workbench methods experts` says more.", 2)  # fmt: skip
        into = self.into or next(iter(pairs))
        if into not in pairs:
            raise WorkbenchError(f"grow experts: {kind} does not become {into} without a change of the function; it can become {', '.join(pairs)}. "
                                 f"{nearest(into, TARGETS)}", None, 2)  # fmt: skip
        target = TARGETS[into]
        known = set(parse_config({"model_type": into}).to_dict())
        config = {k: v for k, v in parsed.items() if k in known or k in _ALWAYS}
        neurons = int(parsed["intermediate_size"])
        config |= (
            dict.fromkeys(target.sizes, neurons) | dict(target.fixed) | {target.experts: self.experts, target.top_k: self.top_k}
        )
        if target.shared:
            config[target.shared[2]] = min(_SHARED, neurons)
        config |= pairs[into](parsed) | {"model_type": into, "architectures": [target.architecture]}
        return target, config


class _Plan:
    """The tensors of one layer."""

    def __init__(self, step: Experts, model: Model, target: Target) -> None:
        self.step, self.model, self.target = step, model, target
        self.std = float(model.config.get("initializer_range") or 0.02)

    def dense(self, layer: int) -> dict[str, str]:
        """Part -> tensor of the dense layer."""
        return {part: f"{self.model.layout.prefix}{layer}.mlp.{part}.weight" for part in (GATE, UP, DOWN)}

    def layer(self, layer: int) -> dict[str, Grown]:
        """Experts, router, and what else the architecture has."""
        prefix, dense, target = f"{self.model.layout.prefix}{layer}.", self.dense(layer), self.target
        if missing := [n for n in dense.values() if n not in self.model.weights.specs]:
            raise WorkbenchError(
                f"grow experts: layer {layer} has no {missing[0]}; experts are made of gated layers (gate_proj, up_proj, down_proj)",
                None,
                2,
            )
        experts = [{part: self._expert(name, part, layer, e) for part, name in dense.items()} for e in range(self.step.experts)]
        found = {
            prefix + name.format(e=e): expert[part] for e, expert in enumerate(experts) for part, name in target.expert.items()
        }
        for name, parts in target.fused.items():
            rows, cols = self._joined(dense, parts)
            found[prefix + name] = Grown(dense[parts[0]], new=True, parts=tuple(expert[part] for expert in experts for part in parts),
                                         shape=(len(experts), rows, cols))  # fmt: skip
        found[prefix + target.router] = self._added(dense[GATE], rows=len(experts), std=self.std)
        for name in target.zeros:
            found[prefix + name] = self._added(dense[GATE], rows=1, cols=len(experts))
        if target.shared:
            module, gate, _ = target.shared
            size = min(_SHARED, self.model.weights.specs[dense[GATE]].rows)
            found |= {f"{prefix}{module}.{part}.weight": self._added(dense[part], rows=size, std=self.std) for part in (GATE, UP)}
            found[f"{prefix}{module}.{DOWN}.weight"] = self._added(dense[DOWN], cols=size)
            found[prefix + gate] = self._added(dense[GATE], rows=1, std=self.std)
        return found

    def _expert(self, name: str, part: str, layer: int, number: int) -> Grown:
        """A copy of the dense matrix; but for the first, with some neurons drawn anew, the same ones in all matrices of an expert."""
        if number == 0 or not self.step.redraw:
            return Grown(name, new=number > 0)
        count = self.model.weights.specs[self.dense(layer)[GATE]].rows
        generator = torch.Generator().manual_seed(layer * self.step.experts + number)
        index = np.arange(count)
        index[torch.randperm(count, generator=generator)[: round(self.step.redraw * count)].numpy()] = NEW
        axis = Axis(index)
        return Grown(name, new=True, like=True, rows=None if part == DOWN else axis, cols=axis if part == DOWN else None)

    def _joined(self, dense: Mapping[str, str], parts: tuple[str, ...]) -> tuple[int, int]:
        specs = [self.model.weights.specs[dense[part]] for part in parts]
        return sum(s.rows for s in specs), specs[0].cols

    @staticmethod
    def _added(source: str, rows: int | None = None, cols: int | None = None, std: float = 0.0) -> Grown:
        """A tensor of rows and columns that are all new."""
        return Grown(source, new=True, rows=None if rows is None else Axis(np.full(rows, NEW)), cols=None if cols is None else Axis(np.full(cols, NEW)), std=std)  # fmt: skip


def _check_places(config: Mapping[str, Any], tensors: Mapping[str, Grown], model: Model) -> None:
    """Errors: tensors that the result's architecture has no place for, and those that it needs and nothing gives."""
    specs = {n: g.spec(model.weights.specs[g.source]) for n, g in tensors.items()}
    places = live_names(config, specs)
    if lost := [n for n, live in places.items() if not live]:
        raise WorkbenchError(
            f"grow experts: {config['model_type']} has no place for {lost[0]} ({len(lost)} such)",
            "Another architecture under `into` may have.",
            2,
        )
    built = skeleton(json.dumps(config, sort_keys=True))
    given = {live for found in places.values() for live in found} | set(built.all_tied_weights_keys)
    if absent := sorted(n for n, _ in built.named_parameters() if n not in given):
        raise WorkbenchError(
            f"grow experts: {config['model_type']} also needs {absent[0]} ({len(absent)} such), which the model does not have",
            None,
            2,
        )
