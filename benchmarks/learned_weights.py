"""`merge: learned`, for benchmarks alone: a sum of deltas whose weights, one for each brick and layer, are learned on texts of the bricks' tasks.

It keeps less than `featcal`, which reads the same texts in less time (docs/merging-methods.md). It is therefore no method of the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest, read_memo, write_memo
from workbench.ground.lazy import no_grad, torch
from workbench.merge.measuring.calibration import Calibrated, check_weights
from workbench.models.layout import Layout, Model
from workbench.models.texts import TextRow, side_by_side
from workbench.steps import Combination, Group, Laws, Measured, MergeContext, register
from workbench.steps.fields import Real, Whole
from workbench.steps.step import REGISTERED

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 4
"""Texts of each brick in a step."""


@register
class Learned(Calibrated):
    """A sum of the deltas with one weight for each brick and layer, learned by gradient on texts of the bricks' tasks.

    AdaMerging (Yang et al. 2024) learns these weights from the entropy of a classifier's outputs on the inputs that it is tested on. For a
    language model the loss is that of the answers. A step costs as much as a training step of the whole model; all deltas are in memory
    as dense float32.
    """

    paper = "Yang et al. 2024, AdaMerging: adaptive model merging for multi-task learning, arXiv 2310.02575"
    formula = (
        "θˡ = θ₀ˡ + Σ λᵢˡτᵢˡ,  λ = argmin Σ wᵢLᵢ / Σ wᵢ,  Lᵢ = mean of −log p over the tokens of the answers of brick i's texts"
    )
    laws = Laws(
        zero_is_base=False, permutation_invariant=False, single_is_identity=False, exact_rank=True, memory="model", needs="model"
    )

    merge: Literal["learned"]
    per: Literal["layer", "brick"] = "layer"
    """`layer`: a weight for each brick and layer, and one for what is outside of the layers. `brick`: one weight for each brick."""
    lam: Real = Field(0.5, alias="lambda")
    """Value of all weights at the start."""
    steps: Whole = Field(40, ge=1)
    """Number of steps; each reads four texts of every brick."""
    learning_rate: Real = Field(0.05, gt=0)
    """Learning rate of Adam."""

    @model_validator(mode="after")
    def _one_weight(self) -> Self:
        for name in self.bricks or ():
            if not isinstance(self.entry(name).weight, float):
                raise ValueError(f"the weight of '{name}' is that of its loss: expected a number, found a schedule")
        return self

    def measure_bytes(self, model: Model) -> int:
        """Return the size of the model, its gradients, a brick's model and the bricks' deltas in float32, and of the loss of some texts."""
        return (3 + self.count) * sum(4 * spec.numel for spec in model.weights.specs.values()) + 5 * BATCH * model.logits_bytes(
            self.max_length
        )

    def measure(self, context: MergeContext) -> Measured:
        """Learn the weights, or find them in the cache."""
        rows, keys = {}, []
        for brick in context.bricks:
            rows[brick], key = self.rows(context, brick)
            keys.append(key)
        shares = [weight for brick in context.bricks if isinstance(weight := self.entry(brick).weight, float)]
        check_weights(shares, "every tensor", "learned")
        settings = [self.per, self.lam, self.steps, self.learning_rate]
        file = context.cache / "learned" / f"{json_digest([self.code_key(), keys, shares, settings])}.json"
        found = read_memo(file, weights=dict, first=dict, last=dict)
        if found is None:
            found = _Lesson(self, context, rows, shares).learned()
            write_memo(file, found)
        return Measured(found["weights"], {"learned": found})

    def prepare(self, group: Group) -> Combination:
        """Return Σ λᵢτᵢ with the weights of the tensor's layer."""
        layer = group.model.layout.layer(group.tensor)
        return Combination([_at(group.survey[brick], layer) for brick in group.bricks])


def _at(weights: Sequence[float], layer: int | None) -> float:
    """Return a brick's weight in a layer; the last one is that of what is outside of the layers, and a single one is everywhere."""
    return weights[-1 if layer is None or len(weights) == 1 else layer]


class _Lesson:
    """The live base with the bricks' deltas, whose weights are learned.

    Args:
        step: The step.
        context: Models and texts.
        rows: Brick -> its texts.
        shares: Weight of each brick's loss.
    """

    def __init__(
        self, step: Learned, context: MergeContext, rows: Mapping[str, Sequence[TextRow]], shares: Sequence[float]
    ) -> None:
        self.step, self.context, self.rows = step, context, rows
        self.shares = [share / sum(shares) for share in shares]
        self.model = context.live("")
        self.parameters = dict(self.model.named_parameters())
        self.deltas: list[dict[str, Tensor]] = []
        for brick in context.bricks:
            with torch.no_grad():
                changed = {name: p.detach().sub_(self.parameters[name]) for name, p in context.live(brick).named_parameters()}
            self.deltas.append({name: delta for name, delta in changed.items() if bool(delta.any())})
        layout = Layout.from_config(self.parameters, context.base.config)
        count = 1 if step.per == "brick" else layout.depth + 1
        self.places = {name: -1 if count == 1 or (at := layout.layer(name)) is None else at for name in self.parameters}
        self.weights = torch.zeros(len(context.bricks), count)

    def learned(self) -> dict[str, Any]:
        """Return brick -> weights, and the loss of each brick in the first and in the last step."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(any(name in own for own in self.deltas))
        self._move(torch.full_like(self.weights, float(self.step.lam)))
        following = self.weights.clone().requires_grad_()
        optimizer = torch.optim.Adam([following], lr=float(self.step.learning_rate))
        losses = []
        for number in range(self.step.steps):
            self.context.progress(number, self.step.steps, "learned: weights of the bricks")
            losses.append([self._loss(brick, share, number) for brick, share in zip(self.rows, self.shares, strict=True)])
            if not all(map(math.isfinite, losses[-1])):
                message = f"learned: the losses in step {number + 1} are {losses[-1]}, expected finite numbers"
                raise WorkbenchError(message, "Lower `learning_rate`.")
            following.grad = self._gradient()
            optimizer.step()
            self._move(following.detach())
        self.context.progress(self.step.steps, self.step.steps, "learned: weights of the bricks")
        first, last = (dict(zip(self.rows, row, strict=True)) for row in (losses[0], losses[-1]))
        return {"weights": dict(zip(self.rows, self.weights.tolist(), strict=True)), "first": first, "last": last}

    def _loss(self, brick: str, share: float, step: int) -> float:
        """Add the gradient of a brick's share of the loss on the texts of a step, and return the brick's loss."""
        texts = self.rows[brick]
        rows = [texts[(step * BATCH + i) % len(texts)] for i in range(min(BATCH, len(texts)))]
        batch = side_by_side([row.tokens for row in rows], self.context.device)
        logits = self.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
        ends = [(i, len(row.tokens), row.learned) for i, row in enumerate(rows)]
        said = torch.cat([logits[i, end - learned - 1 : end - 1] for i, end, learned in ends]).float()
        wanted = torch.cat([batch.tokens[i, end - learned : end] for i, end, learned in ends])
        loss = torch.nn.functional.cross_entropy(said, wanted)
        (share * loss).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @no_grad
    def _gradient(self) -> Tensor:
        """Return the gradient of the loss by the weights, Σ ⟨∂L/∂θ, τᵢ⟩ over the tensors of a layer, and clear the model's."""
        found = torch.zeros_like(self.weights)
        for name, parameter in self.parameters.items():
            for i, own in enumerate(self.deltas):
                if parameter.grad is not None and name in own:
                    found[i, self.places[name]] += float((parameter.grad * own[name]).sum())
            parameter.grad = None
        return found

    @no_grad
    def _move(self, to: Tensor) -> None:
        """Set the weights, and the model to the base with the deltas at these weights."""
        for i, own in enumerate(self.deltas):
            for name, delta in own.items():
                place = self.places[name]
                self.parameters[name].add_(delta, alpha=float(to[i, place] - self.weights[i, place]))
        self.weights = to.clone()


REGISTERED[Learned.tag] = Learned  # recipes name only methods that are registered
