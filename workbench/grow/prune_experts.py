"""Remove experts from a mixture-of-experts model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from workbench.ground.errors import InvalidRecipeError
from workbench.ground.files import read_memo, write_memo
from workbench.grow.mixtures.mixture import Mixture, usage
from workbench.grow.mixtures.texts import TextMethod
from workbench.models.layout import Model
from workbench.steps import GrowContext, Growth, Learns, Measured, Preserves, register
from workbench.steps.fields import Whole


@register
class PruneExperts(TextMethod):
    """Remove experts of a mixture together with their rows of the router, and renumber the others (Lu et al. 2024).

    `drop` and `keep` name the experts. `to` keeps those that are selected most often (Chen et al. 2022).

    A token whose expert was removed goes to the next best one. If no token selected the removed experts, logits stay the same. The
    exceptions are models whose expert weights do not add up to one (`norm_topk_prob: false`), and models that add a bias to the
    softmax before the selection (ernie4_5_moe).
    """

    paper = "Chen et al. 2022, Task-Specific Expert Pruning for Sparse Mixture-of-Experts, arXiv 2206.00277; Lu et al. 2024, Not All Experts are Equal, arXiv 2402.14800"
    formula = "W_r ↦ W_r[kept], E ↦ {E_i : i in kept}; with `to`: kept = the N experts that most tokens of the texts select, layer by layer"
    preserves: ClassVar[Preserves] = "no"
    learns: ClassVar[Learns] = "when_selected"
    builds: ClassVar[bool] = True
    removes: ClassVar[bool] = True

    grow: Literal["prune_experts"]
    drop: tuple[Whole, ...] | None = Field(None, min_length=1)
    """Numbers of the experts to remove, the same in every layer."""
    keep: tuple[tuple[Whole, ...], ...] | None = Field(None, min_length=1)
    """Instead of `drop`: numbers of the experts to keep, one list for each layer with experts; all lists have the same length."""
    to: Whole | None = Field(None, ge=1)
    """Instead of `drop`: how many experts to keep in each layer: those that the most tokens of `calibration` select."""
    calibration: str | None = None
    """Only with `to`: JSONL file of texts, relative to the project: {"text":} or {"prompt":, "completion":} a line."""
    top_k: Whole | None = Field(None, ge=1)
    """Number of experts that the router selects for each token afterwards; if omitted, it does not change."""

    @model_validator(mode="after")
    def _check_fields(self) -> PruneExperts:
        chosen = [f for f in ("drop", "keep", "to") if getattr(self, f) is not None]
        if len(chosen) != 1:
            raise ValueError(
                "expected one of `drop: [3, 5]`, `keep: [[0, 1], [2, 3]]` (one list per layer) and `to: 4` (with `calibration`); "
                f"found {' and '.join(chosen) or 'none'}"
            )
        if (self.to is None) != (self.calibration is None):
            raise ValueError("`to` needs `calibration`, a JSONL file of texts to count on, and only `to` reads it")
        for numbers_kept in self.keep or ():
            if len(numbers_kept) != len(self.keep[0] if self.keep else ()) or not numbers_kept:
                raise ValueError(
                    "expected non-empty lists of equal length in `keep`: config.json has one number of experts for all layers"
                )
        for numbers in [self.drop or (), *(self.keep or ())]:
            if len(set(numbers)) < len(numbers) or any(n < 0 for n in numbers):
                raise ValueError(f"expected numbers of experts, 0 or more and each once; found {list(numbers)}")
        return self

    def measures(self) -> bool:
        """Return whether the step counts which experts are selected: with `to`."""
        return self.to is not None

    def measure(self, model: Model, context: GrowContext) -> Measured:
        """Count how often each expert is selected, layer by layer; of experts with equal counts, the first is kept."""
        file = context.cache.with_suffix(".json")
        if (cached := read_memo(file)) is not None:
            return Measured({}, cached)
        assert self.calibration is not None
        rows = self.rows(self.calibration, model, context)
        counts = usage(
            context.live({}), rows, context.device, lambda done, total: context.progress(done, total, "counting selected experts")
        )
        keep = [sorted(row.argsort(descending=True, stable=True)[: self.to].tolist()) for row in counts.shares]
        record: dict[str, object] = {"kept": keep, **counts.counts().to_dict()}
        context.check_inputs()
        context.cache.parent.mkdir(parents=True, exist_ok=True)
        write_memo(file, record)
        return Measured({}, record)

    def settled(self, measured: Measured) -> PruneExperts:
        """Return the step with the measured lists of experts to keep."""
        if not self.measures():
            return self
        keep = tuple(map(tuple, measured.record["kept"]))
        return self.model_copy(update={"keep": keep, "to": None, "calibration": None})

    def expand(self, model: Model) -> Growth:
        """Plan the model with the remaining experts.

        Raises:
            WorkbenchError: If an expert does not exist, `top_k` exceeds the number of remaining experts, or `Mixture` refuses the
                model.
        """
        mixture = Mixture(model, self.name)
        experts = self._remaining(mixture)
        count = len(next(iter(experts.values())))
        top_k = self.top_k or mixture.top_k
        if top_k > count:
            setting = f"`top_k` is {top_k}" if self.top_k else f"the model selects {top_k} experts per token ({mixture.taken})"
            raise InvalidRecipeError(
                f"grow prune_experts: {setting}, but only {count} of {mixture.count} experts remain",
                f"Set `top_k: {count}` or lower in the step.",
            )
        config = mixture.config(count, self.top_k)
        tensors = mixture.regrown(lambda layer: experts[layer])
        mixture.check(config, {n: g.spec(model.weights.specs[g.source]) for n, g in tensors.items()})
        return Growth(tensors, config, {"experts": count, "of": mixture.count, "top_k": top_k, "layers": mixture.layers})

    def _remaining(self, mixture: Mixture) -> dict[int, tuple[int, ...]]:
        """Return the remaining experts of each layer.

        Until `to` is settled, the first experts take their place: the shapes are the same.
        """
        count, layers = mixture.count, mixture.layers
        listed = [self.drop or (), *(self.keep or ())]
        if beyond := [n for numbers in listed for n in numbers if n >= count]:
            raise InvalidRecipeError(
                f"grow prune_experts: no expert {beyond[0]}: the model has experts 0..{count - 1} in each layer"
            )
        if self.to is not None:
            if self.to > count:
                raise InvalidRecipeError(f"grow prune_experts: `to: {self.to}`: the model has only {count} experts in each layer")
            return dict.fromkeys(layers, tuple(range(self.to)))
        if self.keep is not None:
            if len(self.keep) != len(layers):
                raise InvalidRecipeError(
                    f"grow prune_experts: `keep` has {len(self.keep)} lists, expected {len(layers)}, one for each layer with experts",
                    f"Write one list for each of the layers {', '.join(map(str, layers))}.",
                )
            return dict(zip(layers, self.keep, strict=True))
        remaining = tuple(n for n in range(count) if n not in (self.drop or ()))
        if not remaining:
            raise InvalidRecipeError(f"grow prune_experts: `drop` names all {count} experts; at least one must remain")
        return dict.fromkeys(layers, remaining)
