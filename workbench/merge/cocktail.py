"""Cocktail: a weighted mean whose weights come from each brick's loss on a few examples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from workbench.errors import WorkbenchError
from workbench.files import file_digest, json_digest, read_json, write_json
from workbench.identity import unchanged
from workbench.models.layout import Model
from workbench.models.texts import TextRow, encode, log_likelihood, longest_row, read_texts
from workbench.steps import Combination, Group, Laws, Measured, MergeContext, MergeMethod, register
from workbench.steps.fields import Real, Whole

BASE = ""


@register
class Cocktail(MergeMethod):
    """The mean of the bricks' models, each weighted by how well it predicts the answers of a few examples of the target task
    (Xiao et al. 2023, LM-Cocktail). The weights stand in the run's record."""

    paper = "Xiao et al. 2023, LM-Cocktail, arXiv 2311.13534"
    formula = "θ = Σ wᵢθᵢ,  w = softmax(−L / T),  Lᵢ = mean loss of model i on the answers"
    laws = Laws(exact_rank=True, memory="model", needs="model")
    version = 3  # prompt and answer are tokenized as one text

    merge: Literal["cocktail"]
    examples: str
    """A jsonl of {"prompt":, "answer":} (or completion, response, target) or {"text":}, relative to the project; five are usual."""
    bricks: tuple[str, ...] | None = None
    """Names of the bricks; omitted: all. The losses give the weights."""
    temperature: Real = Field(5.0, gt=0)
    """T: the published 5 is flat (losses of 1 and 2 give weights of 0.55 and 0.45); a small one takes the best brick alone."""
    include_base: bool = False
    """Let the base take part with its own loss."""
    max_length: Whole = Field(512, ge=2)
    """Tokens of an example at most; longer prompts lose their start."""

    def inputs(self) -> list[str]:
        """The examples."""
        return [self.examples]

    def check_inputs(self, project: Path) -> None:
        """Read the examples once."""
        read_texts(project / self.examples, self.examples)

    def measure_bytes(self, model: Model) -> int:
        """Live float32 weights, and half as much again while they are loaded."""
        return 6 * sum(spec.numel for spec in model.weights.specs.values())

    def measure(self, context: MergeContext) -> Measured:
        """Each model's loss on the examples, the models one after the other."""
        longest = longest_row(context.base.config, self.max_length)
        with unchanged(context.project / self.examples):  # the examples that are read are those that the key is made of
            rows = encode(read_texts(context.project / self.examples, self.examples), context.tokenizer, longest)
            data = file_digest(context.project / self.examples)
        names = [*context.bricks, *([BASE] if self.include_base else [])]
        losses = {}
        for i, name in enumerate(names):
            context.progress(i, len(names), f"loss of {name or 'the base'} on {len(rows)} examples")
            known = context.cache / "losses" / f"{json_digest(['loss', 1, context.keys[name], data, longest, 'float32'])}.json"
            record = read_json(known, loss=(int, float))
            if record is None:
                record = {"loss": loss(context, name, rows)}
                write_json(known, record)
            losses[name] = float(record["loss"])
        context.progress(len(names), len(names), "losses")
        weights = softmax(losses, self.temperature)
        shown = {name or "base": {"loss": losses[name], "weight": weights[name]} for name in names}
        return Measured(weights, {"examples": len(rows), "cocktail": shown})

    def prepare(self, group: Group) -> Combination:
        """Σ wᵢτᵢ; the base's own share is the base."""
        return Combination([group.survey[brick] for brick in group.bricks])


def softmax(losses: dict[str, float], temperature: float) -> dict[str, float]:
    """exp(−Lᵢ/T) / Σ exp(−Lⱼ/T)."""
    lowest = min(losses.values())
    powers = {name: math.exp((lowest - value) / temperature) for name, value in losses.items()}
    total = math.fsum(powers.values())
    return {name: power / total for name, power in powers.items()}


def loss(context: MergeContext, brick: str, rows: list[TextRow]) -> float:
    """Mean over examples of the mean −log p of an answer's tokens. Errors: one that is not finite."""
    model = context.live(brick)
    with torch.no_grad():
        losses = [-float(log_likelihood(model, row, context.device)) / row.learned for row in rows]
    value = math.fsum(losses) / len(losses)
    if not math.isfinite(value):
        raise WorkbenchError(
            f"cocktail: the loss of {brick or 'the base'} is {value}", "Check its weights: `workbench brick show`."
        )
    return value
