"""Trained gates: how much of a delta each neuron needs, learned on a few texts.

The model computes with W + g ⊙ Δ in place of W: gate gᵢ = σ((Sᵢ − c) / T) multiplies the delta in the rows and the column of neuron i. The scores S
are trained on the texts; c keeps the sum of all gates at the wanted number of neurons, and the temperature T falls, so that gates end near 0
and 1. The neurons with the highest scores are the result.

Source: He et al. 2024, Localize-and-Stitch, arXiv 2408.13656, trains one gate per element, with an L1 penalty in place of the fixed sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from workbench.emergent.activations import Progress
from workbench.emergent.labelled import ItemRow
from workbench.emergent.losses import cross_entropies
from workbench.errors import WorkbenchError
from workbench.lazy import no_grad, torch
from workbench.models.attention import head_sees
from workbench.models.batching import side_by_side
from workbench.models.hooks import frozen, hooked

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Product: TypeAlias = "Callable[[Tensor], Tensor]"
"""Maps inputs [..., in] to x Δᵀ [..., out]."""
_BISECTIONS = 50


@dataclass(frozen=True)
class GateSettings:
    """Settings of `train_gates`.

    Attributes:
        steps: Number of optimizer steps.
        batch: Texts of a step.
        rate: Learning rate of Adam.
        bias: Scores of the neurons that start in the set; the others start at its negative.
        coolest: Temperature of the last step; the first one has 1, and it falls geometrically.
        seed: Seed of the order of the texts.
    """

    steps: int = 60
    batch: int = 16
    rate: float = 0.1
    bias: float = 1.0
    coolest: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class GatedModule:
    """The delta of a linear layer into or out of the neurons of a site.

    Attributes:
        name: Live name of the layer.
        site: Index of the site.
        product: Maps the layer's inputs to what its delta adds.
        bias: Delta of its bias [out], or None. Only of a layer into the neurons.
        is_out: Whether the layer maps neurons to the output. Otherwise its outputs are the neurons, once or several times.
    """

    name: str
    site: int
    product: Product
    bias: Tensor | None = None
    is_out: bool = False


@dataclass(frozen=True)
class TrainedGates:
    """Scores of all neurons after training.

    Attributes:
        scores: Score of every unit, per site [units] float32.
        losses: Mean loss of the learned tokens at each step, in nats.
        whole: Mean loss over all texts with the whole delta.
        kept: The same with the delta of the wanted number of neurons alone, those with the highest scores.
        none: The same without the delta of any neuron.
    """

    scores: tuple[Tensor, ...]
    losses: tuple[float, ...]
    whole: float
    kept: float
    none: float


def train_gates(
    model: PreTrainedModel,
    modules: Sequence[GatedModule],
    rows: Sequence[ItemRow],
    start: Sequence[Tensor],
    share: float,
    settings: GateSettings | None = None,
    *,
    told: Progress = lambda *_: None,
) -> TrainedGates:
    """Train one gate per neuron on texts, so that the delta of a share of the neurons does most of what the whole delta does.

    Args:
        model: The live base in float32, which is not changed.
        modules: The linear layers with the delta.
        rows: Texts of the skill. The loss is that of the tokens after their prompts.
        start: Ranking of the units that training starts from, per site [units].
        share: Share of all neurons to keep.
        settings: Settings.
        told: Progress callback; it counts steps.

    Raises:
        WorkbenchError: If no text has a token after its prompt.
    """
    settings = settings or GateSettings()
    learned = [row for row in rows if len(row.tokens) > max(1, row.prompt)]
    if not learned:
        raise WorkbenchError("no text has a token after its prompt whose loss could be computed", "Use other texts.")
    sizes = [len(values) for values in start]
    device = next(model.parameters()).device
    kept = max(1, round(share * sum(sizes)))
    order = torch.cat([values.float() for values in start]).argsort(descending=True)
    scores = torch.full((sum(sizes),), -settings.bias, device=device).index_fill_(0, order[:kept].to(device), settings.bias)
    scores.requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=settings.rate)
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    with frozen(model), torch.enable_grad():
        for step, index in zip(range(settings.steps), _batches(len(learned), settings.batch, generator), strict=False):
            temperature = settings.coolest ** (step / max(1, settings.steps - 1))
            gates = budgeted(scores, kept, temperature)
            with gating(model, modules, torch.split(gates, sizes)):
                loss = _mean_loss(model, [learned[i] for i in index])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
            told(step + 1, settings.steps)
    final = scores.detach()
    ones, zeros = torch.ones_like(final), torch.zeros_like(final)
    best = zeros.index_fill(0, final.topk(kept).indices, 1.0)
    whole, only, none = (gated_loss(model, modules, learned, torch.split(gates, sizes)) for gates in (ones, best, zeros))
    return TrainedGates(tuple(torch.split(final.cpu(), sizes)), tuple(losses), whole, only, none)


def budgeted(scores: Tensor, total: float, temperature: float) -> Tensor:
    """Return gates σ((S − c) / T) whose sum is a given number. Their gradient holds the sum, too.

    Args:
        scores: S [units].
        total: Sum of the gates, above 0 and at most their number.
        temperature: T.
    """
    if total >= len(scores):
        return torch.ones_like(scores) + 0 * scores
    with torch.no_grad():
        values = scores.double()
        spread = temperature * (math.log(len(scores)) + 20)
        low, high = values.min() - spread, values.max() + spread
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            too_many = ((values - middle) / temperature).sigmoid().sum() > total
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        center = ((low + high) / 2).to(scores.dtype)
        slopes = ((scores - center) / temperature).sigmoid()
        slopes = slopes * (1 - slopes)
        slopes /= slopes.sum().clamp_min(1e-30)
    # dc/dSᵢ is the slope of gate i over the sum of all slopes; the value of c stays.
    moved = (slopes * (scores - scores.detach())).sum()
    gates: Tensor = ((scores - center - moved) / temperature).sigmoid()
    return gates


@contextmanager
def gating(model: PreTrainedModel, modules: Sequence[GatedModule], gates: Sequence[Tensor]) -> Iterator[None]:
    """Add the gated deltas to the outputs of the linear layers within the block.

    Args:
        model: The live base.
        modules: The layers with their deltas.
        gates: Gate of every unit, per site [units].
    """
    with ExitStack() as stack:
        for module in modules:
            hook = _adding(module, gates[module.site])
            stack.enter_context(hooked(model.get_submodule(module.name), after=hook))
        yield


def _adding(module: GatedModule, gate: Tensor) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    def add(_layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = args
        if module.is_out:
            return output + module.product(x * gate.to(x.device))
        update = module.product(x)
        if module.bias is not None:
            update = update + module.bias
        return output + update * gate.to(x.device).repeat(update.shape[-1] // len(gate))

    return add


@no_grad
def gated_loss(
    model: PreTrainedModel, modules: Sequence[GatedModule], rows: Sequence[ItemRow], gates: Sequence[Tensor], batch: int = 16
) -> float:
    """Return the mean loss of the tokens after the prompts, in nats per token, with given gates."""
    total = count = 0.0
    with gating(model, modules, gates):
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            tokens = sum(len(row.tokens) - max(1, row.prompt) for row in part)
            total, count = total + tokens * _mean_loss(model, part).item(), count + tokens
    return total / count


def _mean_loss(model: PreTrainedModel, rows: Sequence[ItemRow]) -> Tensor:
    """Return the mean loss of the tokens after the prompts of some texts."""
    head = model.get_output_embeddings()
    if head is None:
        raise WorkbenchError(f"{type(model).__name__} has no output head", "Gates are trained on a causal language model.")
    device = next(model.parameters()).device
    batch = side_by_side([row.tokens for row in rows], device)
    width = batch.tokens.shape[1]
    places = [b * width + t - 1 for b, row in enumerate(rows) for t in range(max(1, row.prompt), len(row.tokens))]
    where = torch.tensor(places, device=device)
    with head_sees(head, where):
        logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits[0]
    return cross_entropies(logits, batch.tokens.flatten()[where + 1]).mean()


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield batches of indices without end: all texts in a random order, again and again."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        del waiting[:size]
