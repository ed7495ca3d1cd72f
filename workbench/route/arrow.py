"""Arrow: the brick whose strongest input direction the prompt's states are most aligned with."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.architecture import counterpart
from workbench.models.hooks import hooked, shaped
from workbench.models.texts import side_by_side
from workbench.route.deciding.fitting import fitted
from workbench.route.deciding.hidden import WINDOW, token_batches, token_rows, windows
from workbench.route.deciding.router import REPAIR, Fitted, restored, state
from workbench.route.deciding.samples import Samples
from workbench.steps import CalibratedRoute, RouteContext, register
from workbench.steps.route import Router
from workbench.weights.lowrank import Factors, core

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from workbench.route.mixing.kernel import Pair
    from workbench.steps.route import Prompts


_PROTOTYPES = "prototypes."


@register
class Arrow(CalibratedRoute):
    """Choose the brick with the largest |x·v|, v being the strongest input direction of its update (Ostapenko et al. 2024, Arrow).

    Use it to compare with PEFT's router: the scores are the same, averaged over modules and over the last tokens. Weights do not say
    what a brick is for, so bricks that change more tokens, or change them more, win. Every prompt costs a forward pass of the base.
    """

    version = 2
    constants: ClassVar[Mapping[str, object]] = {**CalibratedRoute.constants, "window": WINDOW, "standardize": False}
    paper = "Ostapenko et al. 2024, Towards modular LLMs by building and reusing a library of LoRAs, arXiv 2405.11157"
    formula = "sᵢ(x) = meanₘₜ |xₘₜ·vₘᵢ|,  vₘᵢ = first right singular vector of BₘᵢAₘᵢ"

    route: Literal["arrow"]

    def fit(self, context: RouteContext) -> Router:
        """Compute the directions, and the scores of all calibration prompts."""
        samples = Samples.of(context.calibration, context.negatives)
        found = prototypes([context.factors(name) for name in context.bricks])
        rows = token_rows(context.tokenizer, samples.texts)
        samples = samples.with_features(None, pooled_alignments(context.model, found, rows, WINDOW))
        router = ArrowRouter(
            context.bricks, window=WINDOW, prototypes=found
        )  # prompts calibrate the threshold and the ties alone
        return fitted(samples, lambda _rows: router, self, "largest", context.notice)

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
        if "centre" in tensors and bool(tensors["centre"].any()):
            raise WorkbenchError("router.safetensors: has standardized scores, which arrow no longer makes", REPAIR)
        return ArrowRouter(**fields, prototypes={name: state(tensors, f"{_PROTOTYPES}{name}", [size, None]) for name in names})


@dataclass(frozen=True, kw_only=True)
class ArrowRouter(Fitted):
    """Alignment of a prompt's states with each brick's strongest input directions.

    Attributes:
        prototypes: Live module -> [bricks, in], unit vectors; zeros for a brick that does not change the module.
    """

    method: ClassVar[str] = Arrow.name
    prototypes: dict[str, Tensor] = field(repr=False)

    def measure(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the scores [n, bricks]."""
        return pooled_alignments(model, self.prototypes, rows, self.window)

    def score(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Return the scores [n, bricks] that `measure` gave, and the largest of each row [n]."""
        assert prompts.measured is not None
        scores = prompts.measured.double()
        return scores, scores.amax(1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the directions."""
        return {f"{_PROTOTYPES}{name}": vectors for name, vectors in self.prototypes.items()}


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
