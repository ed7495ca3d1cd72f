"""Updates beside the weights and their training, beside PEFT and direct computations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worlds.tiny import live, save_adapter, save_model

from workbench.adapters.linear import linear_factors
from workbench.adapters.read import Adapter
from workbench.models.texts import TextRow
from workbench.transplant.training import Course, Teacher, acting, distil
from workbench.weights.lowrank import Factors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("updates")
    for family in ("llama", "gpt2"):
        base = save_model(folder / family, family, dtype=torch.float32, layers=2)
        save_adapter(base, folder / f"{family}-lora", seed=2, family=family)
    return folder


def rows(count: int = 12) -> list[TextRow]:
    """Texts of unequal lengths, of which the last five tokens are learned."""
    generator = torch.Generator().manual_seed(0)
    return [TextRow(torch.randint(2, 60, (8 + i % 3,), generator=generator).tolist(), 5) for i in range(count)]


def updates(folder: Path) -> dict[str, Factors]:
    return {name: Factors(b, a) for name, (a, b) in linear_factors(Adapter(folder, "brick")).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_acting_updates_are_those_of_peft(family: str, place: Path) -> None:
    from peft import PeftModel

    tokens = torch.tensor([rows(1)[0].tokens])
    model = live(place / family)
    with torch.no_grad():
        plain = model(tokens).logits
        with acting(model, updates(place / f"{family}-lora")):
            found = model(tokens).logits
        assert torch.equal(model(tokens).logits, plain)
        expected = PeftModel.from_pretrained(model, place / f"{family}-lora").eval()(tokens).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - plain).abs().max() > 0.1


def test_distilling_brings_the_model_to_its_teacher(place: Path) -> None:
    """The first loss is the mean KL over learned tokens, steps lower it, and the model's own weights stay."""
    model, teacher = live(place / "llama"), Teacher(live(place / "llama"), updates(place / "llama-lora"))
    before = [p.clone() for p in model.parameters()]
    start = {n: Factors(u.left * 0.3, u.right) for n, u in teacher.updates.items()}
    trained, losses = distil(model, start, rows(8), Course(12, 1e-2), teacher)
    expected, count = 0.0, 0
    with torch.no_grad():
        for row in rows(8):
            tokens = torch.tensor([row.tokens])
            with acting(model, start):
                found = model(tokens).logits[0, -6:-1].log_softmax(-1)
            with acting(teacher.model, teacher.updates):
                wanted = teacher.model(tokens).logits[0, -6:-1].log_softmax(-1)
            expected += float((wanted.exp() * (wanted - found)).sum())
            count += 5
    assert losses[0] == pytest.approx(expected / count, rel=1e-4)
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert trained.keys() == start.keys()
    assert distil(model, start, rows(8), Course(12, 1e-2), teacher)[1] == losses


def test_training_on_texts(place: Path) -> None:
    """Without a teacher, the first loss is the cross entropy of the learned tokens."""
    model, start = live(place / "llama"), updates(place / "llama-lora")
    seen: list[tuple[int, int]] = []
    losses = distil(model, start, rows(8), Course(6, 1e-2), progress=lambda done, total, _text: seen.append((done, total)))[1]
    total = 0.0
    with torch.no_grad(), acting(model, start):
        for row in rows(8):
            tokens = torch.tensor([row.tokens])
            total += float(torch.nn.functional.cross_entropy(model(tokens).logits[0, -6:-1], tokens[0, -5:], reduction="sum"))
    assert losses[0] == pytest.approx(total / 40, rel=1e-5)
    assert losses[-1] < losses[0]
    assert seen == [(i + 1, 6) for i in range(6)]
