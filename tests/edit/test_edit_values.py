"""Values of facts: the descent written out fact by fact, without batches, padding or caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds.dense import context_of
from worlds.edit_steps import counting
from worlds.project import Project

from workbench.edit.closed_form import values
from workbench.edit.closed_form.lookup import Group, Lookup
from workbench.edit.closed_form.values import Settings, Value
from workbench.edit.places.parts import Parts, row_of
from workbench.facts.facts import Fact
from workbench.models.hooks import hooked
from workbench.steps import MethodContext

BEFORE = ["w1 w2 w3 w4"]
GROUPS: list[Group] = [
    (Fact("a", "w8 w9 w2 of {subject} is", "w13 w14", "w33"),),
    (Fact("b", "w3 of {subject} is", "w10 w20", "w30 w31"), Fact("c", "{subject} w7", "w10 w20", "w32")),
]
ENDS = {
    "its steps are used up": Settings(5, 0.3, 20.0, 0.9, kl=0.5),
    "the clamp holds it": Settings(8, 0.3, 0.4, 0.9, end=True),
    "it is sure enough": Settings(40, 0.25, 20.0, 0.1),
}


class Plain:
    """Single rows through the live model, with a shift of layer 1's projection at the lookup."""

    def __init__(self, context: MethodContext) -> None:
        self.context, self.parts = context, Parts.find(context)

    def __call__(self, row: Any, shift: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [token, word], and the projection's input and output at the lookup."""
        seen: list[tuple[Tensor, Tensor]] = []

        def add(_module: Any, args: Any, output: Tensor) -> Tensor:
            seen.append((args[0][0, row.lookup], output[0, row.lookup]))
            here = torch.arange(output.shape[1])[:, None] == row.lookup
            return output if shift is None else output + here * shift

        with hooked(self.parts.out(1), after=add):
            logits = self.context.model(torch.tensor([row.tokens])).logits[0]
        return logits.log_softmax(-1), *seen[0]


def written_out(plain: Plain, group: Group, settings: Settings) -> Value:
    """ROME's descent with steps of one length: δ ← δ − rate·‖v‖·u, u the mean of the last direction and −∇/‖∇‖, ‖δ‖ ≤ clamp·‖v‖."""
    tokenizer = plain.context.tokenizer
    rows = [row_of(f, tokenizer, "subject_last", text, settings.end) for f in group for text in ("", *BEFORE)]
    essence = row_of(Fact("e", "{subject} is a", group[0].subject, "thing"), tokenizer, "subject_last").prompt
    with torch.no_grad():
        keys, outputs = (torch.stack([plain(row)[part] for row in rows]) for part in (1, 2))
        reference = plain(essence)[0][-1]
    anchor, shift, velocity, losses, steps = outputs.mean(0).norm(), torch.zeros(32), torch.zeros(32), list[float](), 0
    while True:
        shift.requires_grad_()
        found = [plain(row, shift)[0][row.start :] for row in rows]
        means = torch.stack([p.gather(1, torch.tensor(row.target)[:, None]).mean() for p, row in zip(found, rows, strict=True)])
        right = [p.argmax(1).tolist() == list(row.target) for p, row in zip(found, rows, strict=True)]
        losses.append(-float(means.detach()[:: 1 + len(BEFORE)].min()))
        if steps == settings.steps or (all(right) and float(means.detach().exp().mean()) >= settings.confidence):
            break
        moved = plain(essence, shift)[0][-1]
        total = -means.mean() + settings.kl * (reference.exp() * (reference - moved)).sum()
        (gradient,) = torch.autograd.grad(total, shift)
        velocity = (velocity + gradient / gradient.norm()) / 2
        shift = (shift - settings.rate * anchor * velocity).detach()
        shift *= min(1.0, float(settings.clamp * anchor / shift.norm()))
        steps += 1
    key = keys.mean(0)
    spread = (keys - key) / len(rows) ** 0.5
    return Value(key, spread, shift.detach(), outputs.mean(0), losses[-1], losses[0], all(right[:: 1 + len(BEFORE)]), steps)


@pytest.mark.parametrize("end", ENDS)
def test_a_value_is_the_descent_written_out(end: str, facts: Project) -> None:
    """Two facts with one value and another fact, in one batch of rows of different lengths."""
    context, settings = context_of(facts), ENDS[end]
    context.tokenizer.eos_token = "<eos>"
    assert row_of(GROUPS[0][0], context.tokenizer, "subject_last", end=True).target == (35, 1)
    at = Lookup(context, Parts.find(context), 1, "subject_last", BEFORE)
    found = list(values.values(at, GROUPS, settings, "model"))
    expected = [written_out(Plain(context), group, settings) for group in GROUPS]
    for one, other in zip(found, expected, strict=True):
        for part in ("key", "spread", "output", "change"):
            torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=1e-3, atol=2e-4)
        assert (one.loss, one.before) == pytest.approx((other.loss, other.before), abs=1e-3)
        assert (one.top, one.steps) == (other.top, other.steps)
    assert (found[0].steps < settings.steps) == (end == "it is sure enough"), "each value ends for itself"
    lengths = [float(value.change.norm() / value.output.norm()) for value in found]
    assert (max(lengths) <= 0.4 * (1 + 1e-5)) == (end == "the clamp holds it")
    assert found[0].top or end != "it is sure enough"


def test_facts_of_alike_lengths_are_optimized_together(facts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prompts first, whatever their order, about `AT_ONCE` facts a time; a value that is there is not optimized again."""
    context = context_of(facts)
    at = Lookup(context, Parts.find(context), 1, "subject_last")
    words = ["w1 " * (number % 5) for number in range(10)]
    groups = [(Fact(str(i), f"{words[i]}{{subject}} is", f"w{i + 10}", "w30"),) for i in range(10)]
    calls = counting(monkeypatch, values, "_optimize")
    settings = Settings(0, 0.1, 1.0, 0.9)
    found = values.values(at, groups, settings, "model")
    order: Sequence[str] = [group[0].id for call in calls for group in call[1]]
    assert order == ["0", "5", "1", "6", "2", "7", "3", "8", "4", "9"]
    assert [len(call[1]) for call in calls] == [8, 2]
    again = values.values(at, groups[::-1], settings, "model")
    assert again.files == found.files[::-1]
    assert len(calls) == 2
    for other in (replace(settings, end=True), replace(settings, kl=0.0), replace(settings, clamp=2.0)):
        assert not {*values.values(at, groups[:1], other, "model").files} & {*found.files}
    assert not {*values.values(at, groups[:1], settings, "other").files} & {*found.files}
