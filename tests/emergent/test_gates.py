"""Trained gates: budgets, gated deltas, and planted neurons that training tells from neurons with larger deltas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from worlds.planted import CLASSES, NEURONS, UNITS, planted_items, planted_llama

from workbench.emergent.gates import GatedModule, GateSettings, budgeted, gated_loss, gating, train_gates
from workbench.emergent.labelled import ItemRow
from workbench.emergent.losses import losses
from workbench.errors import WorkbenchError

PARTS = ("gate_proj", "up_proj", "down_proj")
DECOYS = {0: (1, 2, 3, 4), 1: (10, 11, 12, 13)}
"""Layer -> neurons whose delta is large and writes where the head does not read."""


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("total", [1, 7, 39])
def test_gates_keep_their_sum(total: int, temperature: float) -> None:
    """Their sum is the budget, they rise with the scores, and their gradient is that of finite differences."""
    scores = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(total)).requires_grad_()
    gates = budgeted(scores, total, temperature)
    assert float(gates.sum()) == pytest.approx(total, rel=1e-9)
    assert bool((gates[scores.argsort()].diff() >= 0).all())
    weights = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad((gates * weights).sum(), scores)
    for unit in (0, 11, 30):
        step = torch.zeros(40, dtype=torch.float64)
        step[unit] = 1e-5
        high, low = ((budgeted(scores.detach() + s * step, total, temperature) * weights).sum() for s in (1, -1))
        assert float(gradient[unit]) == pytest.approx(float(high - low) / 2e-5, rel=1e-4, abs=1e-8)


def test_a_budget_of_all_opens_every_gate() -> None:
    assert budgeted(torch.randn(5), 5, 1.0).tolist() == [1.0] * 5


def without_classes() -> Any:
    """The planted llama before its classes' neurons were planted, and without the neurons that are decoys in `deltas`."""
    model = planted_llama()
    with torch.no_grad():
        for depth, units in (*((depth, [unit]) for depth, unit in NEURONS.values()), *DECOYS.items()):
            mlp = model.model.layers[depth].mlp
            for unit in units:
                mlp.gate_proj.weight[unit] = mlp.up_proj.weight[unit] = 0
                mlp.down_proj.weight[:, unit] = 0
    return model


def deltas() -> dict[str, Tensor]:
    """Live module -> delta [out, in]: the classes' neurons, decoys that fire on every token, and a little noise everywhere."""
    planted, base = planted_llama(), without_classes()
    draw = torch.Generator().manual_seed(3)
    made = {}
    for depth, decoys in DECOYS.items():
        for part in PARTS:
            name = f"model.layers.{depth}.mlp.{part}"
            delta = (planted.get_submodule(name).weight - base.get_submodule(name).weight).detach()
            delta += 1e-3 * torch.randn(delta.shape, generator=draw)
            for unit in decoys:
                if part == "down_proj":
                    delta[:, unit] = 0
                    delta[60, unit] = 0.0005
                else:
                    delta[unit] = 0
                    delta[unit, :24] = 1.0
            made[name] = delta
    return made


def modules_of(made: dict[str, Tensor]) -> list[GatedModule]:
    return [
        GatedModule(name, int(name.split(".")[2]), lambda x, d=delta: x @ d.T, is_out=name.endswith("down_proj"))
        for name, delta in made.items()
    ]


def rows_of_items() -> list[ItemRow]:
    """The items without a prompt, so that every continuation counts."""
    return [ItemRow(row.tokens, 0) for row in planted_items(count=8)[1]]


def test_planted_neurons_are_found() -> None:
    """The ranking that training starts from names the decoys, as norms times activations do; training names the classes' neurons."""
    made, model, rows = deltas(), without_classes(), rows_of_items()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norms = [
        (made[f"model.layers.{n}.mlp.gate_proj"].square().sum(1) + made[f"model.layers.{n}.mlp.down_proj"].square().sum(0)).sqrt()
        for n in DECOYS
    ]
    wanted = {depth * UNITS + unit for depth, unit in NEURONS.values()}
    decoys = {depth * UNITS + unit for depth, units in DECOYS.items() for unit in units}
    assert set(torch.cat(norms).topk(len(decoys)).indices.tolist()) == decoys
    told: list[int] = []
    settings = GateSettings(steps=60, batch=8)
    found = train_gates(
        model, modules_of(made), rows, norms, len(CLASSES) / (2 * UNITS), settings, told=lambda done, _: told.append(done)
    )
    assert set(torch.cat(found.scores).topk(len(CLASSES)).indices.tolist()) == wanted
    assert told == list(range(1, 61))
    assert len(found.losses) == 60
    assert found.kept < found.none - 0.5
    assert found.kept == pytest.approx(found.whole, abs=0.05)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_losses_are_those_of_changed_weights() -> None:
    """Fractional gates, against the weights that they stand for and the losses of `analyze ablate`."""
    made, model, rows = deltas(), without_classes(), rows_of_items()
    gates = [torch.rand(UNITS, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    found = gated_loss(model, modules_of(made), rows, gates, batch=5)
    changed = without_classes()
    with torch.no_grad():
        for name, delta in made.items():
            gate = gates[int(name.split(".")[2])]
            changed.get_submodule(name).weight += delta * (gate if name.endswith("down_proj") else gate[:, None])
    assert found == pytest.approx(losses(changed, rows, scored="response").mean, rel=1e-5)
    assert found != pytest.approx(losses(model, rows, scored="response").mean, rel=1e-3)
    tokens = torch.tensor([rows[0].tokens])
    with torch.no_grad(), gating(model, modules_of(made), gates):
        inside = model(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(inside, changed(tokens).logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model(tokens).logits, inside, atol=1e-3)


def test_texts_without_an_answer_are_refused() -> None:
    with pytest.raises(WorkbenchError, match="no text has a token after its prompt"):
        train_gates(without_classes(), [], [ItemRow([1, 2], 2)], [torch.ones(UNITS)] * 2, 0.5)
