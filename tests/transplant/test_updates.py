"""Updates that act beside the weights are those of PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worlds.tiny import live, save_adapter, save_model

from workbench.adapters.linear import linear_factors
from workbench.adapters.read import Adapter
from workbench.transplant.carried import acting
from workbench.weights.lowrank import Factors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("updates")
    for family in ("llama", "gpt2"):
        base = save_model(folder / family, family, dtype=torch.float32, layers=2)
        save_adapter(base, folder / f"{family}-lora", seed=2, family=family)
    return folder


def updates(folder: Path) -> dict[str, Factors]:
    return {name: Factors(b, a) for name, (a, b) in linear_factors(Adapter(folder, "brick")).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_acting_updates_are_those_of_peft(family: str, place: Path) -> None:
    from peft import PeftModel

    tokens = torch.randint(2, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    model = live(place / family)
    with torch.no_grad():
        plain = model(tokens).logits
        with acting(model, updates(place / f"{family}-lora")):
            found = model(tokens).logits
        assert torch.equal(model(tokens).logits, plain)
        expected = PeftModel.from_pretrained(model, place / f"{family}-lora").eval()(tokens).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - plain).abs().max() > 0.1
