"""Add experts to a mixture-of-experts model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from workbench.ground.errors import InvalidRecipeError
from workbench.ground.lazy import torch
from workbench.grow.mixtures.gates import TEMPERATURE, never_gates, prompt_gates
from workbench.grow.mixtures.mixture import Mixture
from workbench.grow.mixtures.targets import TARGETS, corrections, from_base, from_bricks, routers
from workbench.grow.mixtures.texts import TextMethod
from workbench.models.layout import Model
from workbench.steps import GrowContext, Growth, Learns, Measured, Preserves, register
from workbench.steps.fields import BrickEntry, Bricks, Whole
from workbench.weights.specs import load


class AddEntry(BrickEntry):
    """A brick's fields in an `add_expert` step."""

    prompts: tuple[str, ...] | None = Field(None, min_length=1)
    """Example prompts that the router should send to this expert, for `gate: prompts`."""
    negative_prompts: tuple[str, ...] | None = Field(None, min_length=1)
    """Example prompts that the router should not send to this expert."""


@register
class AddExpert(TextMethod):
    """Append experts to every layer of a mixture-of-experts model (Sukhbaatar et al. 2024, Branch-Train-MiX).

    The new experts are copies of the model's own experts, experts of the recipe's base, or a dense base's feed-forward layers with a
    brick applied. An expert of the base that `prune_experts` has removed comes back unchanged with its row of the router, under
    another number.
    """

    paper = "Sukhbaatar et al. 2024, Branch-Train-MiX, arXiv 2403.07816"
    formula = "E_n = E_i, E_i of θ₀, or the FFN of θ₀ + wτ; row of the router: that of i; or −c m/(‖m‖ s), m the mean of the router's inputs, s their mean norm"
    preserves: ClassVar[Preserves] = "no"
    learns: ClassVar[Learns] = "when_selected"
    builds: ClassVar[bool] = True
    random: ClassVar[bool] = True
    constants: ClassVar[Mapping[str, object]] = {"temperature": TEMPERATURE}

    grow: Literal["add_expert"]
    copy_of: Whole | None = Field(None, ge=0, alias="copy")
    """Number of the expert of the current model to copy, together with its row of the router."""
    base: Whole | tuple[Whole, ...] | None = None
    """Instead of `copy`: a number or a list of numbers of experts of the recipe's base, which are added with their rows of the
    router."""
    bricks: Bricks[AddEntry] | None = None
    """Instead of `copy`: bricks, each of which becomes an expert. The mixture must come from `grow: experts` on a dense base in
    this recipe. Mapping of brick name to weight, or to {weight:, prompts:, negative_prompts:}."""
    gate: Literal["never", "prompts", "random"] | None = None
    """Only with `bricks`: initial rows of the router. `never` (the default): no token of `calibration` selects the expert before
    training. `prompts`: the mean of the router's inputs on each expert's prompts. `random`: random numbers."""
    calibration: str | None = None
    """Only with `gate: never`: JSONL file of texts, relative to the project: {"text":} or {"prompt":, "completion":} a line."""

    _base: Model | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check_fields(self) -> AddExpert:
        sources = [n for n, v in (("copy", self.copy_of), ("base", self.base), ("bricks", self.bricks)) if v is not None]
        if len(sources) != 1 or (self.bricks is not None and not self.bricks):
            raise ValueError(
                f"expected one of `copy: 0`, `base: [3]` and `bricks: {{math: 1.0}}`; found {' and '.join(sources) or 'none'}"
            )
        if self.bricks is None and self.gate:
            raise ValueError(f"`gate` applies to `bricks` only; an expert from `{sources[0]}` has its own row of the router")
        if isinstance(self.base, tuple) and (not self.base or len(set(self.base)) < len(self.base)):
            raise ValueError(f"expected numbers of the base's experts in `base`, each once; found {list(self.base)}")
        if (self.way == "never") != (self.calibration is not None):
            raise ValueError(
                "`gate: never` needs `calibration`, a JSONL file of texts for which the router must not select the expert; other "
                "gates do not read it"
            )
        if self.way == "prompts" and (missing := [n for n in self.names() if not self.prompts_of(n)]):
            raise ValueError(f"`gate: prompts` needs `prompts`, a list of texts, for {', '.join(missing)}")
        return self

    @property
    def way(self) -> str | None:
        """Method that makes the rows of the router, or None if the experts have their own."""
        return (self.gate or "never") if self.bricks else None

    def prompts_of(self, brick: str, negative: bool = False) -> tuple[str, ...]:
        """Return a brick's prompts, or its negative prompts."""
        return getattr(self.entry(brick), "negative_prompts" if negative else "prompts", None) or ()

    def bind(self, base: Model, tokenizer: Path, project: Path, cache: Path) -> tuple[AddExpert, Path]:
        """Return the step bound to the base whose experts it adds, or whose feed-forward layers the bricks change."""
        bound = self.model_copy()
        bound._base = base
        return bound, tokenizer

    def measures(self) -> bool:
        """Return whether the rows of the router are made from texts."""
        return self.way in ("never", "prompts")

    def measure(self, model: Model, context: GrowContext) -> Measured:
        """Measure the new rows of each layer's router, and append them to its old ones."""
        mixture = Mixture(model, self.name)
        names = list(routers(mixture).values())
        old = {name: load(model.weights, name, torch.float32) for name in names}
        if self.way == "prompts":
            prompts = {b: (self.prompts_of(b), self.prompts_of(b, True)) for b in self.names()}
            gates = prompt_gates(
                context, prompts, {name: {} for name in prompts}, {n: n for n in names}, model, self.max_length, old
            )
            rows = gates.rows
        else:
            assert self.calibration is not None
            texts = self.rows(self.calibration, model, context)
            biases = {
                routers(mixture)[layer]: load(model.weights, name, torch.float32).flatten()
                for layer, correction_names in corrections(mixture).items()
                for name in correction_names
            }
            gates = never_gates(context, texts, old, biases, model, mixture.top_k)
            rows = {name: row.expand(len(self.names()), -1) for name, row in gates.rows.items()}
        return Measured({name: torch.cat([old[name], rows[name]]) for name in names}, {"gate": gates.record})

    def expand(self, model: Model) -> Growth:
        """Plan the model with the new experts after its own.

        Raises:
            WorkbenchError: If an expert does not exist, `base` is used and the base is no mixture, `bricks` are used and the base
                is not dense, or `Mixture` refuses the model.
        """
        mixture = Mixture(model, self.name)
        if self.copy_of is not None:
            chosen = [*range(mixture.count), self.copy_of]
            if self.copy_of >= mixture.count:
                raise InvalidRecipeError(
                    f"grow add_expert: `copy: {self.copy_of}`: the model has experts 0..{mixture.count - 1} in each layer"
                )
            tensors, added = mixture.regrown(lambda _: chosen), [f"copy of {self.copy_of}"]
        else:
            assert self._base is not None, "`bind` must run before `expand`"
            if numbers := [self.base] if isinstance(self.base, int) else list(self.base or ()):
                tensors, added = from_base(mixture, self._base, numbers), [f"base {n}" for n in numbers]
            else:
                std = float(mixture.parsed.get("initializer_range") or 0.02)
                tensors, added = from_bricks(mixture, self._base, self.names(), std), self.names()
        config = mixture.config(mixture.count + len(added))
        base = self._base or model
        mixture.check(config, {n: g.spec((base if g.base else model).weights.specs[g.source]) for n, g in tensors.items()})
        router_names = tuple(routers(mixture).values()) if model.config.get("model_type") in TARGETS else ()
        record = {"experts": mixture.count + len(added), "added": added, "layers": mixture.layers}
        return Growth(tensors, config, record, routers=router_names)
