"""Remove experts from a mixture-of-experts model, or merge them into those that remain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from workbench.errors import InvalidRecipeError
from workbench.files import read_json, write_json
from workbench.grow.mixtures.merging import Merger, grouped, logit_similarity
from workbench.grow.mixtures.mixture import Mixture
from workbench.grow.mixtures.texts import TextMethod
from workbench.grow.mixtures.usage import Usage, usage
from workbench.models.layout import Model
from workbench.models.texts import TextRow
from workbench.steps import GrowContext, Growth, Learns, Measured, Preserves, register
from workbench.steps.fields import Whole
from workbench.weights.header import save_tensors


@register
class PruneExperts(TextMethod):
    """Remove experts of a mixture together with their rows of the router, and renumber the others (Lu et al. 2024).

    `drop` and `keep` name the experts. `to` keeps those that are selected most often (Chen et al. 2022).

    A token whose expert was removed goes to the next best one. If no token selected the removed experts, logits stay the same. The
    exceptions are models whose expert weights do not add up to one (`norm_topk_prob: false`), and models that add a bias to the
    softmax before the selection (ernie4_5_moe).

    With `average`, each removed expert is averaged into a remaining one instead (Li et al. 2024, MC-SMoE). In the paper, the router keeps
    the rows of all experts; here a merged expert has the same average of their rows, because a stock mixture has one row per expert.
    """

    paper = "Chen et al. 2022, Task-Specific Expert Pruning for Sparse Mixture-of-Experts, arXiv 2206.00277; Lu et al. 2024, Not All Experts are Equal, arXiv 2402.14800; Li et al. 2024, MC-SMoE, arXiv 2310.01334"
    formula = "W_r ↦ W_r[kept], E ↦ {E_i : i in kept}; with `to`: kept = the N experts that most tokens of the texts select, layer by layer; with `average`: E ↦ Σ f_j π_j(E_j) / Σ f_j, W_r ↦ Σ f_j w_j / Σ f_j over a group"
    preserves: ClassVar[Preserves] = "no"
    learns: ClassVar[Learns] = "when_selected"
    builds: ClassVar[bool] = True
    removes: ClassVar[bool] = True
    keyed_if_set: ClassVar[frozenset[str]] = frozenset({"average"})

    grow: Literal["prune_experts"]
    drop: tuple[Whole, ...] | None = Field(None, min_length=1)
    """Numbers of the experts to remove, the same in every layer."""
    keep: tuple[tuple[Whole, ...], ...] | None = Field(None, min_length=1)
    """Instead of `drop`: numbers of the experts to keep, one list for each layer with experts; all lists have the same length."""
    to: Whole | None = Field(None, ge=1)
    """Instead of `drop`: how many experts to keep in each layer: those that the most tokens of `calibration` select."""
    calibration: str | None = None
    """Only with `to`: JSONL file of texts, relative to the project: {"text":} or {"prompt":, "completion":} a line."""
    average: Literal["frequency"] | None = None
    """Only with `to`: average each removed expert into the remaining one with the most similar router logits, weighted by how often
    tokens select them. Neurons are matched before. The record has the `groups`. If omitted, experts are removed."""
    top_k: Whole | None = Field(None, ge=1)
    """Number of experts that the router selects for each token afterwards; if omitted, it does not change."""

    _merged: frozenset[str] = PrivateAttr(frozenset())

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
        if self.average is not None and self.to is None:
            raise ValueError("average: experts are grouped and weighted on texts; expected `to: 4` with `calibration`")
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
        from safetensors.torch import load_file

        file = context.cache.with_suffix(".json")
        if (cached := read_json(file)) is not None and (self.average is None or context.cache.is_file()):
            return Measured(load_file(context.cache) if self.average else {}, cached)
        assert self.calibration is not None
        rows = self.rows(self.calibration, model, context)
        counts = usage(
            context.live({}), rows, context.device, lambda done, total: context.progress(done, total, "counting selected experts")
        )
        keep = [sorted(row.argsort(descending=True, stable=True)[: self.to].tolist()) for row in counts.shares]
        record: dict[str, Any] = {"kept": keep, **counts.document()}
        merged: dict[str, Any] = {}
        if self.average is not None:
            merged, record["groups"] = self._merge(model, keep, counts, rows, context)
            context.check_inputs()
            context.cache.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(merged, context.cache)
        write_json(file, record)
        return Measured(merged, record)

    def _merge(
        self, model: Model, keep: list[list[int]], counts: Usage, rows: list[TextRow], context: GrowContext
    ) -> tuple[dict[str, Any], list[list[list[int]]]]:
        """Return the tensors of merged experts, by their names in the smaller model, and the groups of each layer.

        Args:
            model: The model before the step.
            keep: Experts that stay, for each layer.
            counts: How often tokens select each expert.
            rows: The texts as tokens.
            context: Live models and progress.
        """
        mixture = Mixture(model, self.name)
        mergers = {layer: Merger(mixture, layer) for layer in mixture.layers}
        similarity = logit_similarity(
            mixture,
            {layer: merger.router for layer, merger in mergers.items()},
            context.live({}),
            rows,
            lambda done, total: context.progress(done, total, "logits of the router"),
        )
        tensors: dict[str, Any] = {}
        groups = [grouped(kept, similarity[layer]) for layer, kept in zip(mixture.layers, keep, strict=True)]
        for number, (layer, layer_groups) in enumerate(zip(mixture.layers, groups, strict=True)):
            context.progress(number, len(groups), "merging experts")
            tensors |= mergers[layer].merged(layer_groups, counts.shares[number].tolist())
        return tensors, groups

    def settled(self, measured: Measured) -> PruneExperts:
        """Return the step with the measured lists of experts to keep."""
        if not self.measures():
            return self
        keep = tuple(map(tuple, measured.record["kept"]))
        step = self.model_copy(update={"keep": keep, "to": None, "calibration": None})
        step._merged = frozenset(measured.value)
        return step

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
        if self.average is not None:
            for layer in mixture.layers:
                Merger(mixture, layer)  # refuses experts whose neurons are unknown
        tensors = {
            name: replace(grown, new=True) if name in self._merged else grown
            for name, grown in mixture.regrown(lambda layer: experts[layer]).items()
        }
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
