"""Add experts: a mixture with more of them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator

from workbench.errors import WorkbenchError
from workbench.grow.expansion.appended import corrections, from_base, from_bricks, routers
from workbench.grow.expansion.never import never_gates
from workbench.grow.expansion.targets import TARGETS
from workbench.grow.mixtures.gates import encode_prompts, prompt_gates
from workbench.grow.mixtures.mixture import Mixture
from workbench.grow.mixtures.texts import TextMethod
from workbench.models.layout import Model
from workbench.models.texts import longest_row
from workbench.steps import GrowContext, Growth, Learns, Measured, Preserves, register
from workbench.steps.fields import BrickEntry, Bricks, Real, Whole
from workbench.weights.specs import load


class AddEntry(BrickEntry):
    """A brick's fields in an `add_expert` step."""

    prompts: tuple[str, ...] | None = Field(None, min_length=1)
    """Texts as the expert's tokens are, for `gate: prompts`."""
    negative_prompts: tuple[str, ...] | None = Field(None, min_length=1)
    """Texts as they are not."""


@register
class AddExpert(TextMethod):
    """Append experts to every layer of a mixture: copies of its own, experts of the recipe's base, or what bricks make of the base's
    feed-forward layer, where the base is dense (as Sukhbaatar et al. 2024 make experts of fine-tuned models).

    Experts of the base bring their rows of the router: what `prune_experts` has left out comes back as it was, with another number.
    """

    paper = "Sukhbaatar et al. 2024, Branch-Train-MiX, arXiv 2403.07816"
    formula = "E_n = E_i, E_i of θ₀, or the FFN of θ₀ + wτ; row of the router: that of i; or −c m/(‖m‖ s), m the mean of what the router reads, s the mean norm"
    preserves: ClassVar[Preserves] = "no"
    learns: ClassVar[Learns] = "when_selected"
    builds: ClassVar[bool] = True
    random: ClassVar[bool] = True

    grow: Literal["add_expert"]
    copy_of: Whole | None = Field(None, ge=0, alias="copy")
    """An expert of the current model, to have twice, with its row of the router."""
    base: Whole | tuple[Whole, ...] | None = None
    """Instead: experts of the recipe's base, with their rows: a number or a list."""
    bricks: Bricks[AddEntry] | None = None
    """Instead: bricks that become an expert each, of a mixture that `grow: experts` has made of a dense base in this recipe. Brick name ->
    weight, or {weight:, prompts:, negative_prompts:}."""
    gate: Literal["never", "prompts", "random"] | None = None
    """With `bricks`: rows of the router. never (the default): no token of `calibration` takes the expert, until it is trained;
    prompts: the mean of what the router reads on each expert's prompts; random: drawn."""
    calibration: str | None = None
    """With `gate: never`: a jsonl of {"text":} or {"prompt":, "completion":}, relative to the project."""
    temperature: Real = Field(0.1, gt=0)
    """With `gate: prompts`: what cosines to the prompts' means are divided by."""

    _base: Model | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _one(self) -> AddExpert:
        given = [n for n, v in (("copy", self.copy_of), ("base", self.base), ("bricks", self.bricks)) if v is not None]
        if len(given) != 1 or (self.bricks is not None and not self.bricks):
            raise ValueError(
                f"expected one of `copy: 0`, `base: [3]` and `bricks: {{math: 1.0}}`; found {' and '.join(given) or 'none'}"
            )
        if self.bricks is None and self.gate:
            raise ValueError(f"`gate` is of bricks; an expert of `{given[0]}` brings its row of the router")
        if isinstance(self.base, tuple) and (not self.base or len(set(self.base)) < len(self.base)):
            raise ValueError("expected numbers of the base's experts in `base`, each once")
        if (self.way == "never") != (self.calibration is not None):
            raise ValueError(
                "`gate: never` and `calibration`, a jsonl of texts of which no token may take the expert, go together"
            )
        if self.way == "prompts" and (missing := [n for n in self.names() if not self.prompts_of(n)]):
            raise ValueError(f"`gate: prompts` needs `prompts`, a list of texts, for {', '.join(missing)}")
        return self

    @property
    def way(self) -> str | None:
        """How rows of the router are made; None where experts bring them."""
        return (self.gate or "never") if self.bricks else None

    def prompts_of(self, brick: str, negative: bool = False) -> tuple[str, ...]:
        """A brick's prompts."""
        return getattr(self.entry(brick), "negative_prompts" if negative else "prompts", None) or ()

    def bind(self, base: Model, tokenizer: Path, project: Path, cache: Path) -> tuple[AddExpert, Path]:
        """The step with the base whose experts, or whose bricks, it adds."""
        found = self.model_copy()
        found._base = base
        return found, tokenizer

    def measures(self) -> bool:
        """Of rows that are made from texts."""
        return self.way in ("never", "prompts")

    def measure(self, model: Model, context: GrowContext) -> Measured:
        """The router's rows, layer by layer, below those that it has."""
        mixture = Mixture(model, self.name)
        names = list(routers(mixture).values())
        old = {name: load(model.weights, name, torch.float32) for name in names}
        longest = longest_row(model.config, self.max_length)
        if self.way == "prompts":
            asked = {
                b: (
                    encode_prompts(self.prompts_of(b), context, longest, b),
                    encode_prompts(self.prompts_of(b, True), context, longest, b),
                )
                for b in self.names()
            }
            found = prompt_gates(
                context, asked, {brick: {} for brick in asked}, {n: n for n in names}, model, self.temperature, old
            )
            rows = found.rows
        else:
            assert self.calibration is not None
            texts = self.rows(self.calibration, model, context)
            biases = {
                routers(mixture)[layer]: load(model.weights, name, torch.float32).flatten()
                for layer, of in corrections(mixture).items()
                for name in of
            }
            found = never_gates(context, texts, old, biases, model, mixture.top_k)
            rows = {name: row.expand(len(self.names()), -1) for name, row in found.rows.items()}
        return Measured({name: torch.cat([old[name], rows[name]]) for name in names}, {"gate": found.record})

    def expand(self, model: Model) -> Growth:
        """Plan the model with the experts behind its own. Errors: experts that are not there, a base that is no mixture, or, of bricks, one
        that is not dense, what `Mixture` refuses."""
        mixture = Mixture(model, self.name)
        if self.copy_of is not None:
            chosen = [*range(mixture.count), self.copy_of]
            if self.copy_of >= mixture.count:
                raise WorkbenchError(
                    f"grow add_expert: no expert {self.copy_of}: a layer of this model has 0..{mixture.count - 1}", None, 2
                )
            tensors, added = mixture.regrown(lambda _: chosen), [f"copy of {self.copy_of}"]
        else:
            assert self._base is not None, "the step is bound to the recipe's base first"
            if numbers := self._numbers():
                tensors, added = from_base(mixture, self._base, numbers), [f"base {n}" for n in numbers]
            else:
                std = float(mixture.parsed.get("initializer_range") or 0.02)
                tensors, added = from_bricks(mixture, self._base, self.names(), std), self.names()
        config = mixture.config(mixture.count + len(added))
        base = self._base or model
        mixture.check(config, {n: g.spec((base if g.base else model).weights.specs[g.source]) for n, g in tensors.items()})
        known = tuple(routers(mixture).values()) if model.config.get("model_type") in TARGETS else ()
        record = {"experts": mixture.count + len(added), "added": added, "layers": mixture.layers}
        return Growth(tensors, config, record, routers=known)

    def _numbers(self) -> list[int]:
        """Experts of the base."""
        return [self.base] if isinstance(self.base, int) else list(self.base or ())
