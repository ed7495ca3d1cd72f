"""Prune experts: a mixture with fewer of them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from workbench.errors import WorkbenchError
from workbench.files import read_json, write_json
from workbench.grow.mixtures.mixture import Mixture
from workbench.grow.mixtures.texts import TextMethod
from workbench.grow.mixtures.usage import usage
from workbench.models.layout import Model
from workbench.steps import GrowContext, Growth, Learns, Measured, Preserves, register
from workbench.steps.fields import Whole


@register
class PruneExperts(TextMethod):
    """Leave experts of a mixture out, with their rows of the router, and number the others anew (Lu et al. 2024; those that few tokens
    take: Chen et al. 2022).

    Works on every mixture of transformers whose tensors depend on the number of experts in a way that its model without weights proves.
    A token that took an expert which is gone takes the next one. Where no token took it logits stay as they are, if the weights of those
    taken add up to one; where they do not (`norm_topk_prob: false`), or a bias is added to the softmax before the choice (ernie4_5_moe), the
    softmax over fewer experts changes them.
    """

    paper = "Chen et al. 2022, Task-Specific Expert Pruning for Sparse Mixture-of-Experts, arXiv 2206.00277; Lu et al. 2024, Not All Experts are Equal, arXiv 2402.14800"
    formula = "W_r ↦ W_r[kept], E ↦ {E_i : i in kept}; with `to`: kept = the N that most tokens of the texts take, layer by layer"
    preserves: ClassVar[Preserves] = "no"
    learns: ClassVar[Learns] = "when_selected"
    builds: ClassVar[bool] = True

    grow: Literal["prune_experts"]
    drop: tuple[Whole, ...] | None = Field(None, min_length=1)
    """Experts to leave out, the same of every layer."""
    keep: tuple[tuple[Whole, ...], ...] | None = Field(None, min_length=1)
    """Instead: the experts to keep, a list for each layer that has experts, all of one length."""
    to: Whole | None = Field(None, ge=1)
    """Instead: how many to keep of each layer, those that most tokens of `calibration` take."""
    calibration: str | None = None
    """With `to`: a jsonl of {"text":} or {"prompt":, "completion":}, relative to the project."""
    top_k: Whole | None = Field(None, ge=1)
    """How many experts a token takes afterwards; omitted: as before."""

    @model_validator(mode="after")
    def _one(self) -> PruneExperts:
        given = [f for f in ("drop", "keep", "to") if getattr(self, f) is not None]
        if len(given) != 1:
            raise ValueError(
                "expected one of `drop: [3, 5]`, `keep: [[0, 1], [2, 3]]` (a list a layer) and `to: 4` (with `calibration`); "
                f"found {' and '.join(given) or 'none'}"
            )
        if (self.to is None) != (self.calibration is None):
            raise ValueError("`to` and `calibration`, a jsonl of texts to count on, go together")
        for kept in self.keep or ():
            if len(kept) != len(self.keep[0] if self.keep else ()) or not kept:
                raise ValueError(
                    "config.json has one number of experts for all layers: `keep` needs lists of one length, and not empty"
                )
        for numbers in [self.drop or (), *(self.keep or ())]:
            if len(set(numbers)) < len(numbers) or any(n < 0 for n in numbers):
                raise ValueError(f"expected numbers of experts from 0, each once; found {list(numbers)}")
        return self

    def measures(self) -> bool:
        """Of `to`: which experts tokens take."""
        return self.to is not None

    def measure(self, model: Model, context: GrowContext) -> Measured:
        """Count the experts that tokens take, layer by layer; of equal ones the first is kept."""
        file = context.cache.with_suffix(".json")
        if (known := read_json(file)) is not None:
            return Measured({}, known)
        assert self.calibration is not None
        rows = self.rows(self.calibration, model, context)
        found = usage(
            context.live({}), rows, context.device, lambda done, of: context.progress(done, of, "which experts tokens take")
        )
        kept = [sorted(row.argsort(descending=True, stable=True)[: self.to].tolist()) for row in found.shares]
        record = {"kept": kept, **found.document()}
        write_json(file, record)
        return Measured({}, record)

    def settled(self, measured: Measured) -> PruneExperts:
        """The step with the lists that were found."""
        if not self.measures():
            return self
        keep = tuple(map(tuple, measured.record["kept"]))
        return self.model_copy(update={"keep": keep, "to": None, "calibration": None})

    def expand(self, model: Model) -> Growth:
        """Plan the model of the experts that stay. Errors: experts that are not there, a top_k above what stays, what `Mixture` refuses."""
        mixture = Mixture(model, self.name)
        kept = self._kept(mixture)
        count = len(next(iter(kept.values())))
        top_k = self.top_k or mixture.top_k
        if top_k > count:
            said = f"top_k is {top_k}" if self.top_k else f"a token takes {top_k} experts ({mixture.taken})"
            raise WorkbenchError(
                f"grow prune_experts: {said}, and {count} of {mixture.count} experts stay",
                f"Set top_k: {count} or lower in the step.",
                2,
            )
        config = mixture.config(count, self.top_k)
        tensors = mixture.regrown(lambda layer: kept[layer])
        mixture.check(config, {n: g.spec(model.weights.specs[g.source]) for n, g in tensors.items()})
        return Growth(tensors, config, {"experts": count, "of": mixture.count, "top_k": top_k, "layers": mixture.layers})

    def _kept(self, mixture: Mixture) -> dict[int, tuple[int, ...]]:
        """Layer -> the experts that stay. Before `to` is settled the first ones stand for them: sizes are the same."""
        count, layers = mixture.count, mixture.layers
        named = [self.drop or (), *(self.keep or ())]
        if beyond := [n for numbers in named for n in numbers if n >= count]:
            raise WorkbenchError(f"grow prune_experts: no expert {beyond[0]}: a layer of this model has 0..{count - 1}", None, 2)
        if self.to is not None:
            if self.to > count:
                raise WorkbenchError(
                    f"grow prune_experts: to is {self.to}, and a layer of this model has {count} experts", None, 2
                )
            return dict.fromkeys(layers, tuple(range(self.to)))
        if self.keep is not None:
            if len(self.keep) != len(layers):
                raise WorkbenchError(
                    f"grow prune_experts: `keep` has {len(self.keep)} lists, and {len(layers)} layers have experts",
                    f"One list for each of the layers {', '.join(map(str, layers))}.",
                    2,
                )
            return dict(zip(layers, self.keep, strict=True))
        stay = tuple(n for n in range(count) if n not in (self.drop or ()))
        if not stay:
            raise WorkbenchError(f"grow prune_experts: `drop` names all {count} experts, and none stays", None, 2)
        return dict.fromkeys(layers, stay)
