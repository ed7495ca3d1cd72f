"""Split: divide the feed-forward neurons of a dense model into experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from workbench.activations.partition import WITH_TEXTS, Division, Partition
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.lazy import np
from workbench.grow.expansion.parts import replace_layers
from workbench.grow.mixtures.split import MeasuredSplit, SplitPlan, measure_split
from workbench.grow.mixtures.targets import (
    DOWN,
    GATE,
    SPLIT_PAIRS,
    Target,
    check_mixture,
    chosen_target,
    dense_layer,
    expert_tensors,
    mixture_config,
)
from workbench.grow.mixtures.texts import TextMethod
from workbench.models.architecture import EXPERT_COUNTS
from workbench.models.layout import Model
from workbench.models.skeleton import parse_config
from workbench.steps import NEW, Axis, GrowContext, Grown, Growth, Learns, Measured, Preserves, register
from workbench.steps.fields import Whole

_ALIGNED = 8
"""Rows of an expert must be a multiple of 16 bytes for grouped matrix products, also in bfloat16."""
_UNUSED = 64
"""Number of neurons of the shared expert of qwen2_moe, whose output is zero."""


@register
class SplitFfn(TextMethod):
    """Divide the neurons of every feed-forward layer into experts of equal size, of which a token takes some.

    No weight is trained (MoEfication, Zhang et al. 2022; CMoE, Pei et al. 2025). With `top_k` equal to `experts`, the result
    computes what the dense model does. With fewer it does not: measure the loss with `workbench analyze MODEL --partition`, then train (`train: {data: FILE, parameters: routers}`).

    The selected experts get equal weights up to 0.1 %, and the output matrices, or the router's factor, are multiplied by their
    number. Shared experts serve every token and need an architecture with such a module (glm4_moe). CMoE's own router is not linear,
    so its partition takes the rows of `router` too.
    """

    paper = "Zhang et al. 2022, MoEfication, arXiv 2110.01786; Pei et al. 2025, CMoE, arXiv 2502.04416"
    formula = "FFN(x) = Σ_e FFN_e(x) ↦ Σ over shared e, and over the top k of W_r x, of FFN_e(x)"
    learns: ClassVar[Learns] = "when_selected"
    builds: ClassVar[bool] = True
    constants: ClassVar[Mapping[str, object]] = {"sparsity": None, "seed": 0}

    grow: Literal["split_ffn"]
    experts: Whole = Field(ge=2)
    """Number of experts of a layer, shared ones included. It divides the number of neurons into multiples of 8."""
    top_k: Whole = Field(ge=1)
    """Number of experts that serve a token, shared ones included."""
    method: Literal["random", "kmeans", "coactivation", "cmoe"] = "kmeans"
    """How neurons are divided: at `random`; by balanced clusters of the normalized rows of the gate (`kmeans`), or of the tokens on
    which neurons are active (`coactivation`); or as CMoE does (`cmoe`)."""
    shared: Whole | None = Field(None, ge=0)
    """Number of experts that serve every token: they take the neurons that are active most often. If omitted, half of `top_k` for
    `cmoe`, and none otherwise."""
    calibration: str | None = None
    """JSONL file of texts, relative to the project: {"text":} or {"prompt":, "completion":} a line. `random` and `kmeans` without
    shared experts do without it if every token takes all experts."""
    router: Literal["gate", "ridge"] = "gate"
    """Rows of the router: means of the experts' gate rows (`gate`), or the rows that predict each expert's share of the activations
    best on the calibration texts (`ridge`)."""
    into: str | None = None
    """Architecture of the result: glm4_moe if there are shared experts, otherwise the usual one for the model, as in `experts`."""

    _partition: Partition | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check_fields(self) -> SplitFfn:
        if self.top_k > self.experts:
            raise ValueError(f"expected top_k of at most {self.experts}, the number of experts; found {self.top_k}")
        if self.shared is not None and self.shared >= self.top_k:
            raise ValueError(
                f"expected fewer shared experts than the {self.top_k} that serve a token, so that the router selects at least one; "
                f"found {self.shared}"
            )
        if self.calibration is None and (needs := self._needs_texts()):
            raise ValueError(f"{needs} needs `calibration`, a JSONL file of texts")
        return self

    def _needs_texts(self) -> str:
        """Return what needs calibration texts; empty if nothing does."""
        if self.method in WITH_TEXTS:
            return f"`method: {self.method}`"
        if self.shared:
            return "`shared`"
        return "a router that selects experts" if self.top_k < self.experts else ""

    def _shared_count(self) -> int:
        """Return the number of shared experts, the same in every layer."""
        if self.shared is not None or self.method != "cmoe":
            return self.shared or 0
        return self.top_k // 2

    def promises(self) -> Preserves:
        """Return whether the function is preserved: it is if every token takes all experts."""
        return "approximate" if self.top_k == self.experts else "no"

    def measures(self) -> bool:
        """Return True: the partition comes from weights or texts."""
        return True

    def measure(self, model: Model, context: GrowContext) -> Measured:
        """Divide the neurons, and make the routers."""
        target, _ = self._target(model)
        shared = self._shared_count()
        division = Division(self.method, self.experts, shared)
        texts = self.rows(self.calibration, model, context) if self.calibration else None
        measured = measure_split(SplitPlan(division, self.top_k, self.router), texts, model.layout.depth, context)
        return replace(
            measured, value={f"{model.layout.prefix}{n}.{target.router}": rows[shared:] for n, rows in measured.rows.items()}
        )

    def settled(self, measured: Measured) -> SplitFfn:
        """Return the step with the measured partition."""
        assert isinstance(measured, MeasuredSplit)
        step = self.model_copy()
        step._partition = measured.partition
        return step

    def expand(self, model: Model) -> Growth:
        """Plan the names, shapes and sources of the mixture's tensors.

        Raises:
            WorkbenchError: If the model is a mixture already or has no matching architecture, the experts do not divide the neurons,
                or the target architecture has no place for a tensor or for shared experts.
        """
        target, config = self._target(model)
        plan = _SplitLayers(self, model, target)
        tensors, done = replace_layers(model, plan)
        if absent := sorted(set(range(model.layout.depth)) - set(done)):
            raise InvalidRecipeError(
                f"grow split_ffn: layer {absent[0]} has no gate_proj, up_proj and down_proj; expected a gated feed-forward layer"
            )
        check_mixture(model, tensors, config, "split_ffn")
        routers = tuple(f"{model.layout.prefix}{layer}.{target.router}" for layer in done)
        record = {"into": target.model_type, "experts": self.experts, "top_k": self.top_k, "method": self.method}
        return Growth(tensors, config, record, routers=routers)

    def _target(self, model: Model) -> tuple[Target, dict[str, object]]:
        """Return the target architecture and the grown config.json."""
        kind = str(model.config.get("model_type"))
        pairs = SPLIT_PAIRS.get(kind)
        parsed = parse_config(model.config).get_text_config().to_dict()
        if any(parsed.get(name) for name in EXPERT_COUNTS):
            raise InvalidRecipeError(
                f"grow split_ffn: model_type {kind} is a mixture of experts already",
                "`grow: prune_experts` and `grow: add_expert` change the experts of a mixture.",
            )
        if pairs is None:
            raise InvalidRecipeError(
                f"grow split_ffn: model_type {kind} has no mixture-of-experts counterpart in transformers; supported: "
                f"{', '.join(SPLIT_PAIRS)}",
                "`workbench analyze MODEL --partition kmeans` divides the neurons of any dense model, and measures the loss.",
            )
        has_shared = self._shared_count() != 0
        into = self.into or ("glm4_moe" if has_shared and "glm4_moe" in pairs else next(iter(pairs)))
        target = chosen_target(model, pairs, into, "split_ffn")
        if has_shared and not target.serving_all:
            raise InvalidRecipeError(
                f"grow split_ffn: {into} has no experts that serve every token, and `method: {self.method}` makes some",
                "Write `into: glm4_moe`." if "glm4_moe" in pairs else "Write `shared: 0`.",
            )
        if target.serving_all and self.experts - self._shared_count() < 2:
            raise InvalidRecipeError(
                f"grow split_ffn: {self._shared_count()} shared experts of {self.experts} leaves 1 expert to the router; {into} needs 2 or more",
                "Choose fewer shared experts.",
            )
        if target.serving_all and (parsed.get("sliding_window") and parsed.get("use_sliding_window", True)):
            raise InvalidRecipeError(
                f"grow split_ffn: {into} has no sliding window, and the model has one of {parsed['sliding_window']} tokens",
                f"Write `shared: 0` and `into: {next(iter(pairs))}`.",
            )
        units = int(parsed["intermediate_size"])
        try:
            Division(self.method, self.experts, self.shared).check(dict.fromkeys(range(model.layout.depth), units))
        except WorkbenchError as error:
            raise InvalidRecipeError(f"grow split_ffn: {error.message}", error.hint) from None
        if units // self.experts % _ALIGNED:
            fitting = [e for e in range(2, 257) if units % (_ALIGNED * e) == 0]
            raise InvalidRecipeError(
                f"grow split_ffn: {self.experts} experts have {units // self.experts} neurons each, and transformers multiplies the experts "
                f"of a mixture in groups only if their number is a multiple of {_ALIGNED}",
                f"Numbers of experts that fit: {', '.join(map(str, fitting[-6:]))}."
                if fitting
                else "This model cannot be divided.",
            )
        return target, mixture_config(parsed, target, self._sizes(target, units, pairs[into](parsed)))

    def _sizes(self, target: Target, units: int, derived: Mapping[str, object]) -> dict[str, object]:
        """Return the fields of config.json that the target adds."""
        shared = self._shared_count()
        selected = self.top_k - shared
        sizes = dict.fromkeys(target.sizes, units // self.experts) | dict(target.fixed)
        sizes |= {target.experts: self.experts - shared, target.top_k: selected}
        if target.serving_all:
            sizes[target.serving_all[1]] = max(1, shared)
        if target.factor:
            sizes[target.factor] = float(selected)
        if target.shared:
            sizes[target.shared[2]] = min(_UNUSED, units)
        return {**sizes, **derived}


@dataclass(frozen=True)
class _SplitLayers:
    """The tensors of the divided layers."""

    step: SplitFfn
    model: Model
    target: Target

    def dense(self, layer: int) -> dict[str, str]:
        """Return the tensors of a dense feed-forward layer, by part."""
        return dense_layer(self.model, layer)

    def layer(self, layer: int) -> dict[str, Grown]:
        """Return the tensors of a layer's experts and router, and the others that the architecture needs."""
        prefix, dense, target = f"{self.model.layout.prefix}{layer}.", self.dense(layer), self.target
        if missing := [n for n in dense.values() if n not in self.model.weights.specs]:
            raise InvalidRecipeError(
                f"grow split_ffn: layer {layer} has no {missing[0]}; expected a gated layer with gate_proj, up_proj and down_proj"
            )
        partition, shared = self.step._partition, self.step._shared_count()
        if partition is None:  # before it is measured: runs of neurons
            index = np.arange(self.model.weights.specs[dense[GATE]].rows).reshape(self.step.experts, -1)
        else:
            index = partition.layers[layer].experts.numpy()
        factor = 1.0 if target.factor else float(self.step.top_k)
        experts = [{part: self._slice(name, part, own, factor) for part, name in dense.items()} for own in index[shared:]]
        tensors = {
            # The factor of each part marks the whole tensor as rescaled.
            name: replace(grown, scale=grown.parts[0].scale) if grown.parts else grown
            for name, grown in expert_tensors(self.model, target, prefix, experts).items()
        }
        tensors[prefix + target.router] = _zeros(dense[GATE], rows=len(experts))
        for name in target.zeros:
            tensors[prefix + name] = _zeros(dense[GATE], rows=1, cols=len(experts))
        if target.always:
            specs, names = self.model.weights.specs, self.model.layout.in_layer(layer)
            vector = next(name for name in names if len(specs[name].shape) == 1)  # for its dtype
            tensors[prefix + target.always] = _zeros(vector, rows=len(experts))
        if target.serving_all:
            module, own = target.serving_all[0], index[: max(1, shared)].flatten()
            for part, name in dense.items():
                made = self._slice(name, part, own, 1.0) if shared else _unused(name, part, len(own))
                tensors[f"{prefix}{module}.{part}.weight"] = made
        if target.shared:
            size = min(_UNUSED, self.model.weights.specs[dense[GATE]].rows)
            tensors |= {f"{prefix}{target.shared[0]}.{part}.weight": _unused(name, part, size) for part, name in dense.items()}
            tensors[prefix + target.shared[1]] = _zeros(dense[GATE], rows=1)
        return tensors

    @staticmethod
    def _slice(name: str, part: str, index: np.ndarray[Any, np.dtype[np.int64]], factor: float) -> Grown:
        """Return the rows, or for the output matrix the columns, of some neurons."""
        axis = Axis(index)
        return Grown(name, cols=axis, scale=factor) if part == DOWN else Grown(name, rows=axis)


def _zeros(source: str, rows: int, cols: int | None = None) -> Grown:
    """Return a new tensor of zeros, which a measurement may replace."""
    return Grown(
        source, new=True, zero=True, rows=Axis(np.full(rows, NEW)), cols=None if cols is None else Axis(np.full(cols, NEW))
    )


def _unused(source: str, part: str, size: int) -> Grown:
    """Return a matrix of a shared expert that the architecture requires and the partition does not have; its output is zero."""
    axis = Axis(np.full(size, NEW))
    return Grown(source, new=True, zero=True, rows=None if part == DOWN else axis, cols=axis if part == DOWN else None)
