"""Checkpoints as they lie on the hub, architecture by architecture: merged, loaded by transformers, run; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_layouts import LAYOUTS, Tensors, live_model, model_class, save_hub, save_native
from project import CPU, Project

from workbench.engine import materialize

WEIGHTS = {"one": 0.7, "two": -0.4}
ARITHMETIC = f"steps: [{{merge: task_arithmetic, bricks: {WEIGHTS}}}]\n".replace("'", "")
BRICKS = "bricks: {one: {checkpoint: one}, two: {checkpoint: two}}\n"
TOKENS = torch.tensor([[5, 9, 11, 3, 40, 22, 7, 18, 30, 12, 2, 60]])


@dataclass(frozen=True)
class Family:
    """A base and two fine-tunes: live, and in a project folder as the hub stores them (native/: as transformers does)."""

    layout: str
    project: Project
    base: Any
    tuned: dict[str, Any]

    @property
    def kind(self) -> Any:
        return model_class(LAYOUTS[self.layout].family)

    def states(self) -> tuple[Tensors, dict[str, Tensors]]:
        return self.base.state_dict(), {name: model.state_dict() for name, model in self.tuned.items()}


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Layout -> its models, made when first asked for. Not to be changed by a test."""
    made: dict[str, Family] = {}

    def get(layout: str) -> Family:
        if layout not in made:
            place = tmp_path_factory.mktemp("layout")
            (place / "recipes").mkdir()
            name = LAYOUTS[layout].family
            base = live_model(name, 0)
            tuned = {brick: live_model(name, seed, base) for seed, brick in enumerate(WEIGHTS, 1)}
            for at, model in {"base": base, **tuned}.items():
                save_hub(model, layout, place / at)
                save_native(model, place / "native" / at)
            made[layout] = Family(layout, Project(place), base, tuned)
        return made[layout]

    return get


def loaded(kind: Any, path: Path) -> Any:
    """The model in a directory, with nothing missing, unexpected or mismatched."""
    model, info = kind.from_pretrained(path, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def close(found: Tensors, expected: Tensors, tolerance: float = 1e-6) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_task_arithmetic_is_that_of_the_live_models(layout: str, family_of: Callable[[str], Family]) -> None:
    family = family_of(layout)
    base, tuned = family.states()
    document = family.project.run(BRICKS + ARITHMETIC, "arithmetic.yaml")
    merged = loaded(family.kind, Path(document["model"]))
    close(merged.state_dict(), {n: t + sum(w * (tuned[b][n] - t) for b, w in WEIGHTS.items()) for n, t in base.items()})
    assert not torch.equal(logits(merged), logits(family.base))
    live = materialize(family.project.resolve(BRICKS + ARITHMETIC, "arithmetic.yaml"), CPU)
    assert torch.equal(logits(live), logits(merged)), "in memory as on disk"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hub_names_are_those_that_transformers_reads(layout: str, family_of: Callable[[str], Family]) -> None:
    """The fixtures themselves: transformers finds every weight in them."""
    family = family_of(layout)
    close(loaded(family.kind, family.project.path / "base").state_dict(), family.base.state_dict(), 0)
