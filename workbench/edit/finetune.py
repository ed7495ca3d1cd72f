"""Fine-tune: teach facts by gradient to a low-rank update of one layer's feed-forward output."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from workbench.errors import WorkbenchError
from workbench.facts import Fact, read_facts
from workbench.fields import Real, Whole
from workbench.names import live_module
from workbench.registry import Edit, EditMethod, MethodContext, register
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class Finetune(EditMethod):
    """Breadth-first localised fine-tuning: epochs over all facts, cross-entropy on target and end-of-text, one
    feed-forward down-projection, as a low-rank update (Yang et al. 2025, LocFT-BF, with LoRA in place of the full matrix)."""

    paper = "Yang et al. 2025, Fine-tuning done right in model editing, arXiv 2509.22072"
    formula = "min over A, B of Σ −log p(target, end | prompt; W_down + BA)"

    edit: Literal["finetune"]
    facts: str
    """A jsonl of {"prompt":, "target":}, relative to the project."""
    layers: tuple[Whole, ...] | None = None
    """Layers whose down-projection is updated; omitted: three, at 2, 3 and 4 fifteenths of the depth."""
    rank: Whole = Field(8, ge=1, le=1024)
    """Rank of the update of each layer."""
    epochs: Whole = Field(40, ge=1)
    """Passes over all facts, at most: training stops when every batch's loss is below `stop`."""
    batch_size: Whole = Field(8, ge=1)
    """Facts a gradient step."""
    learning_rate: Real = Field(2e-3, gt=0, le=10)
    """Adam's step size on the factors."""
    stop: Real = Field(1e-2, ge=0)
    """A batch whose loss is below this is skipped."""

    def inputs(self) -> list[str]:
        """The facts."""
        return [self.facts]

    def check(self, project: Path) -> None:
        """Read the facts once."""
        read_facts(project / self.facts, self.facts)

    def solve(self, context: MethodContext) -> Edit:
        """Train the factors on the live model, take them out again and return them."""
        facts = read_facts(context.project / self.facts, self.facts)
        layout = context.layout.layout
        layers = sorted(set(self.layers or (layout.depth * part // 15 for part in (2, 3, 4))))
        if bad := [i for i in layers if not 0 <= i < layout.depth]:
            raise WorkbenchError(f"edit finetune: layer {bad[0]} does not exist; the model has 0..{layout.depth - 1}", None, 2)
        names = [layout.mlp_out(layer) for layer in layers]
        live = dict(context.model.named_modules())
        modules = [live_module(name, live) for name in names]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            updates = [_Update(live[module], self.rank, context.device) for module in modules]
        try:
            record = self._train(context, facts, updates)
        finally:
            for update in updates:
                update.remove()
        # Under the live names, which are what PEFT looks for.
        factors = {f"{module}.weight": update.factors() for module, update in zip(modules, updates, strict=True)}
        return Edit(factors, record, fan_in_fan_out=updates[0].transposed, facts=facts)

    def _train(self, context: MethodContext, facts: list[Fact], updates: list[_Update]) -> dict[str, Any]:
        rows = [_tokens(fact, context.tokenizer) for fact in facts]
        order = torch.Generator().manual_seed(context.seed)
        optimizer = torch.optim.Adam([p for u in updates for p in (u.left, u.right)], lr=self.learning_rate)
        context.model.requires_grad_(False)
        worst, steps, epoch = float("inf"), 0, 0
        for epoch in range(1, self.epochs + 1):
            worst = 0.0
            shuffled = torch.randperm(len(rows), generator=order).tolist()
            for start in range(0, len(rows), self.batch_size):
                loss = _loss(context, [rows[i] for i in shuffled[start : start + self.batch_size]])
                value = loss.item()
                if not math.isfinite(value):
                    raise WorkbenchError(
                        f"edit finetune: the loss is {value} in epoch {epoch}", f"Lower learning_rate ({self.learning_rate:g})."
                    )
                worst = max(worst, value)
                if value < self.stop:
                    continue
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                steps += 1
            context.progress(epoch, self.epochs, f"loss {worst:.3f}")
            if worst < self.stop:
                break
        return {"facts": len(facts), "epochs": epoch, "steps": steps, "loss": worst}


class _Update:
    """A low-rank update of a live Linear or Conv1D, added to its output by a hook while it is trained."""

    def __init__(self, module: nn.Module, rank: int, device: torch.device) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        self.transposed = type(module).__name__ == "Conv1D"  # stores [in, out]
        rows, cols = weight.shape[::-1] if self.transposed else weight.shape
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        right = torch.randn(rank, cols, generator=generator) / cols**0.5
        self.right = right.to(device).requires_grad_()
        self.left = torch.zeros(rows, rank, device=device, requires_grad=True)
        self._hook = module.register_forward_hook(self._add)

    def _add(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        update: Tensor = (inputs[0] @ self.right.T) @ self.left.T
        return output + update

    def remove(self) -> None:
        """Give the module back its own output."""
        self._hook.remove()

    def factors(self) -> Factors:
        """The trained update, for the weight as it is stored."""
        factors = Factors(self.left.detach().cpu(), self.right.detach().cpu())
        return factors.transposed() if self.transposed else factors


def _tokens(fact: Fact, tokenizer: Any) -> tuple[list[int], int]:
    """Token ids of prompt, target and end of text, and where the target starts."""
    prompt = tokenizer(fact.text)["input_ids"]
    target = tokenizer(fact.continuation, add_special_tokens=False)["input_ids"]
    if not prompt or not target:
        text = fact.continuation if prompt else fact.text
        raise WorkbenchError(
            f"edit finetune: {text!r} has no tokens in the base's vocabulary", "Word the fact in what the tokenizer knows."
        )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*prompt, *target, *end], len(prompt)


def _loss(context: MethodContext, rows: list[tuple[list[int], int]]) -> Tensor:
    """Mean cross-entropy over the target tokens of a batch, padded on the right."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (ids, start) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        labels[row, start : len(ids)] = torch.tensor(ids[start:])
    tokens, labels, mask = (t.to(context.device) for t in (tokens, labels, mask))
    logits = context.model(input_ids=tokens, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
