"""Arrow: the brick whose strongest input direction the prompt's states are most aligned with."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from workbench.errors import WorkbenchError
from workbench.lazy import no_grad, torch
from workbench.models.architecture import counterpart
from workbench.models.hooks import hooked, shaped
from workbench.models.texts import side_by_side
from workbench.route.deciding.fitting import fitted
from workbench.route.deciding.router import REPAIR, Fitted, restored, state
from workbench.route.deciding.samples import Samples
from workbench.route.deciding.texts import beside
from workbench.route.features.hidden import token_batches, token_rows, windows
from workbench.steps import CalibratedRoute, RouteContext, register
from workbench.steps.fields import Whole
from workbench.steps.route import Router
from workbench.weights.lowrank import Factors, core

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from workbench.route.mixing.kernel import Pair
    from workbench.steps.route import Prompts


@dataclass(frozen=True, kw_only=True)
class MeasuredRouter(Fitted):
    """The brick with the largest number, in standard deviations from its mean over calibration prompts.

    Attributes:
        centre: [bricks], each brick's mean.
        scale: [bricks], each brick's standard deviation.
    """

    centre: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)

    def score(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return the standardized numbers [n, bricks] and the largest of each row [n]."""
        assert prompts.measured is not None
        scores = (prompts.measured.double() - self.centre) / self.scale
        return scores, scores.amax(1)

    def tensors(self) -> dict[str, Tensor]:
        """Return means and standard deviations."""
        return {"centre": self.centre, "scale": self.scale}


def standard(samples: Samples, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [bricks] of what was measured on some samples, where every brick's prompts count alike.

    Args:
        samples: The samples, with `measured`.
        rows: Numbers of samples; only prompts as they are count.
    """
    assert samples.measured is not None
    rows = rows[samples.kind("plain")[rows]]
    labels = samples.labels[rows]
    weights = (1.0 / torch.bincount(labels).double())[labels]
    weights = weights / weights.sum()
    values = samples.measured[rows].double()
    centre = weights @ values
    scale = (weights @ (values - centre).square()).sqrt()
    return centre, scale.clamp(min=1e-12)


_PROTOTYPES = "prototypes."


@register
class Arrow(CalibratedRoute):
    """Choose the brick with the largest |x·v|, v being the strongest input direction of its update (Ostapenko et al. 2024, Arrow).

    Use it to compare with PEFT's router: the scores are the same, averaged over modules and over the last tokens. Weights do not say
    what a brick is for, so bricks that change more tokens, or change them more, win. Every prompt costs a forward pass of the base.
    """

    version = 2
    paper = "Ostapenko et al. 2024, Towards modular LLMs by building and reusing a library of LoRAs, arXiv 2405.11157"
    formula = "sᵢ(x) = meanₘₜ |xₘₜ·vₘᵢ|,  vₘᵢ = first right singular vector of BₘᵢAₘᵢ"

    route: Literal["arrow"]
    window: Whole = Field(16, ge=1)
    """Number of last tokens over which scores are averaged. The first token of a text does not count."""
    standardize: bool = False
    """Measure each brick's scores in standard deviations from their mean over the calibration prompts. Not part of Arrow."""

    def fit(self, context: RouteContext) -> Router:
        """Compute the directions, and the scores of all calibration prompts."""
        samples = Samples.of(context.calibration, context.negatives)
        found = prototypes([context.factors(name) for name in context.bricks])
        rows = token_rows(context.tokenizer, samples.texts)
        samples = samples.with_features(None, pooled_alignments(context.model, found, rows, self.window))

        def make(rows: Tensor) -> ArrowRouter:
            size = len(context.bricks)
            plain = (torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64))
            centre, scale = standard(samples, rows) if self.standardize else plain
            return ArrowRouter(context.bricks, window=self.window, centre=centre, scale=scale, prototypes=found)

        router = fitted(samples, make, self, "largest", context.notice)
        return replace(router, record={**router.record, "beside_text": beside(samples)})

    @classmethod
    def restore(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Router:
        """Return the router from its saved state."""
        fields = restored(settings, cls.name)
        size = len(fields["bricks"])
        names = [name.removeprefix(_PROTOTYPES) for name in tensors if name.startswith(_PROTOTYPES)]
        if not names:
            raise WorkbenchError(
                f"router.safetensors: has no tensor '{_PROTOTYPES}…'; the file belongs to another router", REPAIR
            )
        found = {name: state(tensors, f"{_PROTOTYPES}{name}", [size, None]) for name in names}
        return ArrowRouter(
            **fields, centre=state(tensors, "centre", [size]), scale=state(tensors, "scale", [size]), prototypes=found
        )


@dataclass(frozen=True, kw_only=True)
class ArrowRouter(MeasuredRouter):
    """Alignment of a prompt's states with each brick's strongest input directions.

    Attributes:
        prototypes: Live module -> [bricks, in], unit vectors; zeros for a brick that does not change the module.
    """

    prototypes: dict[str, Tensor] = field(repr=False)

    @property
    def method(self) -> str:
        """Name of the method."""
        return Arrow.name

    def measure(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the scores [n, bricks]."""
        return pooled_alignments(model, self.prototypes, rows, self.window)

    def tensors(self) -> dict[str, Tensor]:
        """Return the directions, means and standard deviations."""
        return {**super().tensors(), **{f"{_PROTOTYPES}{name}": vectors for name, vectors in self.prototypes.items()}}


def prototypes(factors: Sequence[Mapping[str, Pair]]) -> dict[str, Tensor]:
    """Return live module -> first right singular vectors of all bricks' updates [brick, in], float32, of arbitrary sign.

    Args:
        factors: For each brick, live module -> (A [rank, in], B [out, rank]).
    """
    found: dict[str, Tensor] = {}
    for number, parts in enumerate(factors):
        for name, (a, b) in parts.items():
            vectors = found.setdefault(name, torch.zeros(len(factors), a.shape[1]))
            vectors[number] = core(Factors(b.cpu(), a.cpu()))[2][0].float()
    return found


def pooled_alignments(model: PreTrainedModel, found: Mapping[str, Tensor], rows: Sequence[Sequence[int]], window: int) -> Tensor:
    """Return the mean of |x·v| over modules and the last tokens [row, brick], float32."""
    return torch.stack([windows(scores, window)[0] for scores in alignments(model, found, rows)])


@no_grad
def alignments(model: PreTrainedModel, found: Mapping[str, Tensor], rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return |x·v| of each token, averaged over modules.

    Args:
        model: The live base.
        found: Live module -> directions [brick, in].
        rows: Tokens, without padding.

    Returns:
        [token, brick] per row, float32, on the CPU.

    Raises:
        WorkbenchError: If the model lacks a module.
    """
    modules = dict(model.named_modules())
    places = {name: counterpart(name, modules) for name in found}
    if missing := [name for name, place in places.items() if place is None]:
        raise WorkbenchError(f"route arrow: the model has no module {missing[0]}", "The bricks belong to another architecture.")
    scores: dict[int, Tensor] = {}
    for numbers in token_batches(rows, model.device):
        batch = side_by_side([rows[i] for i in numbers], model.device)
        sums: list[Tensor] = []

        with ExitStack() as stack:
            for name, vectors in found.items():
                hook = _adding(sums, vectors.to(model.device), batch.tokens.shape)
                stack.enter_context(hooked(modules[str(places[name])], before=hook))
            model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        mean = (sums[0] / len(found)).cpu()
        scores |= {i: mean[place, : len(rows[i])] for place, i in enumerate(numbers)}
    return [scores[i] for i in range(len(rows))]


def _adding(sums: list[Tensor], vectors: Tensor, size: Sequence[int]) -> Any:
    """Return a forward pre-hook that adds |x·v| [row, token, brick] of a module to the only entry of `sums`."""
    thread = threading.get_ident()

    def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() != thread:  # other threads may run the same model at the same time
            return
        aligned = (shaped(inputs[0], *size).float() @ vectors.T).abs()
        sums[:] = [aligned if not sums else sums[0] + aligned]

    return hook
