"""Cocktail: a weighted mean whose weights come from each brick's loss on a few examples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import file_digest, json_digest, read_memo, write_memo
from workbench.ground.identity import open_unchanged
from workbench.ground.lazy import torch
from workbench.models.layout import Model
from workbench.models.texts import TextRow, encode, log_likelihood, longest_row, read_texts
from workbench.steps import Combination, Group, Laws, Measured, MergeContext, MergeMethod, register
from workbench.steps.fields import Real, Whole

BASE = ""


@register
class Cocktail(MergeMethod):
    """The mean of the bricks' models, weighted by how well each predicts a few examples (Xiao et al. 2023, LM-Cocktail).

    The examples come from the target task, and the losses are taken on their answers. The run's record lists the losses and the
    weights.
    """

    paper = "Xiao et al. 2023, LM-Cocktail, arXiv 2311.13534"
    formula = "θ = Σ wᵢθᵢ,  w = softmax(−L / T),  Lᵢ = mean loss of model i on the answers"
    laws = Laws(exact_rank=True, memory="model", needs="model")
    version = 3  # prompt and answer are tokenized as one text

    merge: Literal["cocktail"]
    examples: str
    """JSONL file of examples, relative to the project: {"prompt":, "answer":} (or completion, response, target) or {"text":} a
    line. Five examples are usual."""
    bricks: tuple[str, ...] | None = None
    """Names of the bricks; if omitted, all bricks. They take no weights here: the losses determine them."""
    temperature: Real = Field(5.0, gt=0)
    """Temperature T of the softmax. The published value 5 gives nearly equal weights (losses of 1 and 2 become weights of 0.55
    and 0.45); a small value selects the best brick alone."""
    include_base: bool = False
    """Include the base as one of the models, weighted by its own loss."""
    max_length: Whole = Field(512, ge=2)
    """Largest number of tokens of an example. Longer texts lose their end; longer prompts lose their start."""

    def inputs(self) -> list[str]:
        """Return the file of examples."""
        return [self.examples]

    def check_inputs(self, project: Path) -> None:
        """Read the examples once, so that errors in the file appear before any work."""
        read_texts(project / self.examples, self.examples)

    def measure_bytes(self, model: Model) -> int:
        """Return 6 bytes a parameter: the float32 weights, and half as much again while they are loaded."""
        return 6 * sum(spec.numel for spec in model.weights.specs.values())

    def measure(self, context: MergeContext) -> Measured:
        """Measure the loss of each model on the examples, one model at a time, and derive the weights."""
        longest = longest_row(context.base.config, self.max_length)
        with open_unchanged(context.project / self.examples):  # the cache key must describe the examples that were read
            rows = encode(read_texts(context.project / self.examples, self.examples), context.tokenizer, longest)
            data = file_digest(context.project / self.examples)
        names = [*context.bricks, *([BASE] if self.include_base else [])]
        losses = {}
        for i, name in enumerate(names):
            context.progress(i, len(names), f"loss of {name or 'the base'} on {len(rows)} examples")
            cache_file = context.cache / "losses" / f"{json_digest([self.code_key(), context.keys[name], data, longest])}.json"
            record = read_memo(cache_file, loss=(int, float))
            if record is None:
                record = {"loss": loss(context, name, rows)}
                write_memo(cache_file, record)
            losses[name] = float(record["loss"])
        context.progress(len(names), len(names), "losses")
        weights = softmax(losses, self.temperature)
        by_model = {name or "base": {"loss": losses[name], "weight": weights[name]} for name in names}
        return Measured(weights, {"examples": len(rows), "cocktail": by_model})

    def prepare(self, group: Group) -> Combination:
        """Return Σ wᵢτᵢ. The weight of the base, if it has one, needs no term: its delta is zero."""
        return Combination([group.survey[brick] for brick in group.bricks])


def softmax(losses: dict[str, float], temperature: float) -> dict[str, float]:
    """Return the weights exp(−Lᵢ/T) / Σ exp(−Lⱼ/T), by brick name."""
    lowest = min(losses.values())
    powers = {name: math.exp((lowest - value) / temperature) for name, value in losses.items()}
    total = math.fsum(powers.values())
    return {name: power / total for name, power in powers.items()}


def loss(context: MergeContext, brick: str, rows: list[TextRow]) -> float:
    """Return the mean over examples of the mean −log p of the answer's tokens."""
    model = context.live(brick)
    with torch.no_grad():
        losses = [-float(log_likelihood(model, row, context.device)) / row.learned for row in rows]
    value = math.fsum(losses) / len(losses)
    if not math.isfinite(value):
        raise WorkbenchError(
            f"cocktail: the loss of {brick or 'the base'} on the examples is {value}, expected a finite number",
            "Check the model's weights: `workbench brick show`.",
        )
    return value
