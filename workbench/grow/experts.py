"""Experts: turn a dense model into a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from workbench.ground.errors import InvalidRecipeError
from workbench.ground.lazy import np, torch
from workbench.grow.expansion.parts import replace_layers
from workbench.grow.mixtures.gates import RIDGE, TEMPERATURE, prompt_gates, ridge_gates
from workbench.grow.mixtures.targets import (
    DOWN,
    GATE,
    PAIRS,
    UP,
    Target,
    check_mixture,
    chosen_target,
    dense_layer,
    expert_tensors,
    mixture_config,
)
from workbench.grow.mixtures.texts import TextMethod
from workbench.models.layout import Model
from workbench.models.skeleton import parse_config
from workbench.steps import NEW, Axis, GrowContext, Grown, Growth, Learns, Measured, Preserves, register
from workbench.steps.fields import BrickEntry, Bricks, Real, Whole

_SHARED = 64
"""Number of neurons of the shared expert that some architectures require; its output starts as zero."""


class ExpertEntry(BrickEntry):
    """A brick's fields in an `experts` step."""

    calibration: str | None = None
    """JSONL file of texts from the brick's own task, for `gate: ridge`."""
    prompts: tuple[str, ...] | None = Field(None, min_length=1)
    """Example prompts that the router should send to this expert, for `gate: prompts`."""
    negative_prompts: tuple[str, ...] | None = Field(None, min_length=1)
    """Example prompts that the router should not send to this expert."""


@register
class Experts(TextMethod):
    """Turn every feed-forward layer into a mixture of experts (sparse upcycling, Komatsuzaki et al. 2023).

    The experts are copies of the layer, which compute the same function, because the weights of the selected experts add up to one. Or
    there is one expert for each brick, the base's layer with the brick applied, beside the current layer as an anchor (Branch-Train-MiX,
    Sukhbaatar et al. 2024).

    Later bricks change the first copy, or the anchor. The other experts and the router are new. Tensors outside the feed-forward
    layers do not change.
    """

    paper = "Komatsuzaki et al. 2023, Sparse Upcycling, arXiv 2212.05055; Sukhbaatar et al. 2024, Branch-Train-MiX, arXiv 2403.07816; Nakamura et al. 2025, Drop-Upcycling, arXiv 2502.19261"
    formula = "FFN(x) ↦ Σ over the top k of softmax(W_r x) renormalized · FFN_e(x), FFN_e = FFN, or that of θ₀ + wτ_e"
    preserves: ClassVar[Preserves] = "approximate"
    learns: ClassVar[Learns] = "when_selected"
    builds: ClassVar[bool] = True
    random: ClassVar[bool] = True
    constants: ClassVar[Mapping[str, object]] = {"ridge": RIDGE, "temperature": TEMPERATURE, "norm_topk_prob": True}

    grow: Literal["experts"]
    experts: Whole | None = Field(None, ge=2)
    """Number of copies of every feed-forward layer, the original included."""
    bricks: Bricks[ExpertEntry] | None = None
    """Instead of `experts`: bricks, each of which becomes an expert. Mapping of brick name to weight, or to {weight:,
    calibration:, prompts:, negative_prompts:}."""
    anchor: bool = True
    """Only with `bricks`: use the current layer, unchanged, as the first expert."""
    top_k: Whole = Field(2, ge=1)
    """Number of experts that the router selects for each token."""
    into: str | None = None
    """Architecture of the result: mixtral, qwen2_moe, qwen3_moe, flex_olmo, granitemoe or ernie4_5_moe; if omitted, the usual one
    for the model."""
    redraw: Real = Field(0.0, ge=0, le=1)
    """Only with `experts`: share of the neurons of every expert but the first that are drawn at random, with the mean and standard
    deviation of the old weights. The experts then differ, and the model computes another function (Drop-Upcycling uses 0.5)."""
    gate: Literal["random", "ridge", "prompts"] = "random"
    """Initialization of the rows of the router: drawn at random (`random`); solved by ridge regression from the router's inputs on
    each expert's texts (`ridge`); or the mean of the router's inputs on each expert's prompts (`prompts`)."""
    calibration: str | None = None
    """Only with `gate: ridge`: JSONL file of texts for the anchor, relative to the project: {"text":} or {"prompt":, "completion":} a
    line."""
    prompts: tuple[str, ...] | None = Field(None, min_length=1)
    """Only with `gate: prompts`: example prompts that the router should send to the anchor."""
    negative_prompts: tuple[str, ...] | None = Field(None, min_length=1)
    """Only with `gate: prompts`: example prompts that the router should not send to the anchor."""
    samples: Whole = Field(256, ge=5)
    """Largest number of texts read from each file, evenly spaced over the file. Every fifth text is held out, to measure how
    often the router selects the right expert."""

    @model_validator(mode="after")
    def _check_fields(self) -> Experts:
        if (self.experts is None) == (not self.bricks):
            raise ValueError("expected one of `experts: 4` and `bricks: {math: 1.0, code: 1.0}`")
        if len(self.members()) < 2:
            raise ValueError("expected at least two experts: one brick needs `anchor: true`")
        if self.top_k > len(self.members()):
            raise ValueError(f"expected top_k of at most {len(self.members())}, the number of experts; found {self.top_k}")
        if self.redraw and self.bricks:
            raise ValueError("`redraw` applies to `experts` only; experts made from bricks differ already")
        if self.gate != "random":
            if not self.bricks:
                raise ValueError(f"`gate: {self.gate}` needs `bricks`: copies are all alike, and a router cannot tell them apart")
            source_of, field, expected = (
                (self.texts, "calibration", "a JSONL file of texts")
                if self.gate == "ridge"
                else (self.prompts_of, "prompts", "a list of texts")
            )
            if missing := [name or f"the anchor (the step's `{field}`)" for name in self.members() if not source_of(name)]:
                raise ValueError(f"`gate: {self.gate}` needs `{field}`, {expected}, for {', '.join(missing)}")
        return self

    def members(self) -> list[str]:
        """Return the experts of a layer: the brick's name for each, or "" for the current layer."""
        if self.experts is not None:
            return [""] * self.experts
        return [*([""] if self.anchor else []), *self.names()]

    def texts(self, member: str) -> str | None:
        """Return the file of an expert's texts."""
        entry = self.entry(member)
        return self.calibration if not member else entry.calibration if isinstance(entry, ExpertEntry) else None

    def prompts_of(self, member: str, negative: bool = False) -> tuple[str, ...]:
        """Return an expert's prompts, or its negative prompts."""
        entry = self.entry(member) if member else self
        return getattr(entry, "negative_prompts" if negative else "prompts", None) or ()

    def inputs(self) -> list[str]:
        """Return the files of texts."""
        return list(dict.fromkeys(f for m in self.members() if self.gate == "ridge" and (f := self.texts(m))))

    def promises(self) -> Preserves:
        """Return whether the function is preserved: it is not if the experts differ."""
        return "no" if self.redraw or self.bricks else self.preserves

    def measures(self) -> bool:
        """Return whether the router is made from texts."""
        return self.gate != "random"

    def measure(self, model: Model, context: GrowContext) -> Measured:
        """Measure the rows of each layer's router."""
        target, _ = self._target(model)
        plan = _ExpertsPlan(self, model, target)
        layers, members = range(model.layout.depth), self.members()
        changes = {m: {n: Grown(n, brick=m or None) for layer in layers for n in plan.dense(layer).values()} for m in members}
        readers = {plan.dense(i)[GATE]: f"{model.layout.prefix}{i}.{target.router}" for i in layers}
        if self.gate == "prompts":
            prompts = {m: (self.prompts_of(m), self.prompts_of(m, True)) for m in members}
            gates = prompt_gates(context, prompts, changes, readers, model, self.max_length)
        else:
            rows = {m: self.rows(f, model, context) for m in members if (f := self.texts(m)) is not None}
            gates = ridge_gates(context, rows, changes, readers, model)
        return Measured(gates.rows, {"gate": gates.record})

    def expand(self, model: Model) -> Growth:
        """Plan the names, shapes and sources of the mixture's tensors.

        Raises:
            WorkbenchError: If no mixture-of-experts architecture matches the model's, a layer has no gated feed-forward layer, or
                the target architecture has no place for a tensor.
        """
        target, config = self._target(model)
        plan = _ExpertsPlan(self, model, target)
        tensors, done = replace_layers(model, plan)
        check_mixture(model, tensors, config, "experts")
        routers = tuple(f"{model.layout.prefix}{layer}.{target.router}" for layer in done)
        record = {"into": target.model_type, "experts": [m or "current" for m in self.members()], "top_k": self.top_k}
        return Growth(tensors, config, record, routers=routers)

    def _target(self, model: Model) -> tuple[Target, dict[str, object]]:
        """Return the target architecture and the grown config.json."""
        parsed = parse_config(model.config).to_dict()
        kind = str(model.config.get("model_type"))
        pairs = PAIRS.get(kind)
        if pairs is None:
            raise InvalidRecipeError(
                f"grow experts: model_type {kind} has no mixture-of-experts counterpart in transformers that computes the same "
                f"function with identical experts; supported: {', '.join(PAIRS)}",
                "See `workbench methods experts`.",
            )
        target = chosen_target(model, pairs, self.into or next(iter(pairs)), "experts")
        neurons = int(parsed["intermediate_size"])
        sizes = dict.fromkeys(target.sizes, neurons) | dict(target.fixed)
        sizes |= {target.experts: len(self.members()), target.top_k: self.top_k}
        if target.shared:
            sizes[target.shared[2]] = min(_SHARED, neurons)
        return target, mixture_config(parsed, target, {**sizes, **pairs[target.model_type](parsed)})


class _ExpertsPlan:
    """The tensors of the grown layers."""

    def __init__(self, step: Experts, model: Model, target: Target) -> None:
        self.step, self.model, self.target = step, model, target
        self.std = float(model.config.get("initializer_range") or 0.02)
        self.members = step.members()
        self.count = len(self.members)

    def dense(self, layer: int) -> dict[str, str]:
        """Return the tensors of a dense feed-forward layer, by part."""
        return dense_layer(self.model, layer)

    def layer(self, layer: int) -> dict[str, Grown]:
        """Return the tensors of a layer's experts and router, and the others that the architecture needs."""
        prefix, dense, target = f"{self.model.layout.prefix}{layer}.", self.dense(layer), self.target
        if missing := [n for n in dense.values() if n not in self.model.weights.specs]:
            raise InvalidRecipeError(
                f"grow experts: layer {layer} has no {missing[0]}; expected a gated layer with gate_proj, up_proj and down_proj"
            )
        experts = [{part: self._expert(name, part, layer, e) for part, name in dense.items()} for e in range(self.count)]
        tensors = {
            name: replace(grown, new=True) if grown.parts else grown
            for name, grown in expert_tensors(self.model, target, prefix, experts).items()
        }
        tensors[prefix + target.router] = self._new_tensor(dense[GATE], rows=len(experts), std=self.std)
        for name in target.zeros:
            tensors[prefix + name] = self._new_tensor(dense[GATE], rows=1, cols=len(experts))
        if target.shared:
            module, gate, _ = target.shared
            size = min(_SHARED, self.model.weights.specs[dense[GATE]].rows)
            tensors |= {
                f"{prefix}{module}.{part}.weight": self._new_tensor(dense[part], rows=size, std=self.std) for part in (GATE, UP)
            }
            tensors[f"{prefix}{module}.{DOWN}.weight"] = self._new_tensor(dense[DOWN], cols=size)
            tensors[prefix + gate] = self._new_tensor(dense[GATE], rows=1, std=self.std)
        return tensors

    def _expert(self, name: str, part: str, layer: int, number: int) -> Grown:
        """Return a matrix of an expert: the brick's, or a copy of the dense one.

        With `redraw`, every copy but the first has some neurons drawn at random, the same ones in all matrices of the expert.
        """
        member = self.members[number]
        if member or number == 0 or not self.step.redraw:
            return Grown(name, brick=member or None, new=bool(member) or number > 0)
        count = self.model.weights.specs[self.dense(layer)[GATE]].rows
        generator = torch.Generator().manual_seed(layer * self.count + number)
        index = np.arange(count)
        index[torch.randperm(count, generator=generator)[: round(self.step.redraw * count)].numpy()] = NEW
        axis = Axis(index)
        return Grown(name, new=True, like=True, rows=None if part == DOWN else axis, cols=axis if part == DOWN else None)

    @staticmethod
    def _new_tensor(source: str, rows: int | None = None, cols: int | None = None, std: float = 0.0) -> Grown:
        """Return a tensor with only new rows or columns."""
        return Grown(
            source,
            new=True,
            rows=None if rows is None else Axis(np.full(rows, NEW)),
            cols=None if cols is None else Axis(np.full(cols, NEW)),
            std=std,
        )
