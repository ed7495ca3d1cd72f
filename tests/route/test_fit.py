"""Routers that are fitted on a tiny model: they find the brick of new prompts, abstain, tie, record and restore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.routing import BUILT_IN, context, outside, prompts, requests
from worlds.tiny import live, save_model

from workbench.ground.errors import WorkbenchError
from workbench.models.prompts import load_tokenizer
from workbench.recipe.methods import methods
from workbench.route.deciding.hidden import pooled, token_rows
from workbench.route.deciding.samples import COPIES
from workbench.steps.route import Prompts, Router

BRICKS = {"a": 0, "b": 1, "c": 2}
METHODS = ["ridge", "centroid", "text"]
LEAST = {"ridge": 0.9, "centroid": 0.6, "text": 0.9}
"""Right share of new prompts. The model is random: its states hardly turn with the words, and one direction of them dominates a cosine."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    base = save_model(tmp_path_factory.mktemp("base") / "base")
    return live(base), load_tokenizer(base)


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that no brick is for in words of the tiny model, which cannot read the built-in ones."""
    monkeypatch.setattr(BUILT_IN, requests)


def fit(world: tuple[Any, Any], name: str, calibration: dict[str, list[str]], **fields: Any) -> Router:
    step = methods()[f"route:{name}"].model_validate({"route": name, "calibration": "{brick}.jsonl", **fields})
    return step.fit(context(*world, calibration))  # type: ignore[attr-defined,no-any-return]


def seen(world: tuple[Any, Any], router: Router, texts: list[str]) -> Prompts:
    model, tokenizer = world
    rows = token_rows(tokenizer, texts)
    hidden = None if router.layer is None else pooled(model, rows, router.layer, router.window)
    return Prompts(texts, hidden, router.measure(model, rows))


@pytest.mark.parametrize("name", METHODS)
def test_a_router_finds_the_brick_of_new_prompts(world: tuple[Any, Any], name: str) -> None:
    router = fit(world, name, {brick: prompts(i) for brick, i in BRICKS.items()})
    assert router.method == name
    assert router.bricks == ("a", "b", "c")
    assert router.layer == (None if name == "text" else 2)
    for column, number in enumerate(BRICKS.values()):
        decisions = router.decide(seen(world, router, prompts(number, seed=1)))
        assert (decisions.scores.argmax(1) == column).double().mean() >= LEAST[name]
        chosen = decisions.weights[decisions.weights.any(1)]
        assert len(chosen) >= 0.7 * len(decisions.weights)
        assert torch.equal(chosen.sum(1), torch.ones(len(chosen)))


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize("name", METHODS)
def test_other_prompts_go_to_the_base_unless_abstain_is_null(world: tuple[Any, Any], name: str) -> None:
    calibration = {brick: prompts(i, templates=8, count=32) for brick, i in BRICKS.items()}
    record = fit(world, name, calibration).record
    assert not any("could not read" in line for line in record["warnings"])
    assert record["curve"][-1]["routed"] == 0
    router = fit(world, name, calibration, threshold=record["curve"][-1]["threshold"])
    strange = router.decide(seen(world, router, outside()))
    own = router.decide(seen(world, router, prompts(0, templates=8, seed=1)))
    assert (~strange.weights.any(1)).double().mean() > (~own.weights.any(1)).double().mean() + 0.3
    never = fit(world, name, calibration, abstain=None)
    assert never.threshold is None
    assert bool(never.decide(seen(world, never, outside())).weights.any(1).all())


@pytest.mark.parametrize("name", METHODS)
def test_bricks_with_the_same_kind_of_prompts_are_tied(world: tuple[Any, Any], name: str) -> None:
    router = fit(world, name, {"a": prompts(0), "z": prompts(0, seed=5), "b": prompts(1)})
    assert router.settings()["ties"] == [["a", "z"]]
    (tie,) = router.record["ties"]
    assert tie["bricks"] == ["a", "z"]
    assert tie["acts"] == "a"
    assert tie["confusion"] >= 0.3
    decisions = router.decide(seen(world, router, prompts(0, seed=2)))
    assert not bool(decisions.weights[:, 1].any())
    assert torch.equal(decisions.scores[:, 0], decisions.scores[:, 1])
    assert bool((decisions.scores.argmax(1) != 2).all())


@pytest.mark.parametrize("name", METHODS)
def test_a_restored_router_decides_as_the_fitted_one(world: tuple[Any, Any], name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    router = fit(world, name, {brick: prompts(i) for brick, i in BRICKS.items()})
    save_file(router.tensors(), tmp_path / "router.safetensors")
    settings = json.loads(json.dumps(router.settings()))
    again = methods()[f"route:{name}"].restore(settings, load_file(tmp_path / "router.safetensors"))  # type: ignore[attr-defined]
    texts = prompts(1, seed=3) + outside(seed=3)
    one, two = (r.decide(seen(world, r, texts)) for r in (router, again))
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(one.scores, two.scores)
    assert torch.equal(one.confidence, two.confidence)
    assert again.settings() == router.settings()


def test_the_record_has_accuracies_and_the_threshold(world: tuple[Any, Any]) -> None:
    record = fit(world, "ridge", {brick: prompts(i) for brick, i in BRICKS.items()}).record
    assert record == json.loads(json.dumps(record))
    assert record["prompts"] == {"a": 16, "b": 16, "c": 16}
    assert set(record["templates"]) == set(BRICKS)
    table = record["accuracy"]
    assert set(table["seen_templates"]) == set(table["held_out_templates"]) == set(COPIES)
    assert set(table["by_brick"]) == set(BRICKS)
    assert table["seen_templates"]["plain"] >= 0.9
    abstain = record["abstain"]
    assert abstain["share"] == 0.01
    rule = abstain["rule"]
    assert abstain["threshold"] == rule["threshold"] == rule["negatives"] + 0.3 * (rule["prompts"] - rule["negatives"])
    assert set(abstain["to_base"]) == set(COPIES)
    assert 0.0 <= abstain["routed"] <= 0.3
    assert [row["routed"] for row in record["curve"]] == sorted((row["routed"] for row in record["curve"]), reverse=True)
    warning, *_, unread = record["warnings"]
    assert "as if it could not read them" in unread
    assert warning.startswith("brick 'a' has 16 calibration prompts in 1 template; with fewer than 16 prompts or 6 templates")
    given = fit(world, "ridge", {brick: prompts(i) for brick, i in BRICKS.items()}, threshold=0.5)
    assert given.threshold == given.record["abstain"]["threshold"] == 0.5
    assert given.record["abstain"]["rule"] == rule


def test_descriptions_are_texts_and_missing_prompts_are_refused(world: tuple[Any, Any]) -> None:
    with pytest.raises(WorkbenchError, match="brick 'b' has no calibration prompts"):
        fit(world, "ridge", {"a": prompts(0), "b": []})
    with pytest.raises(WorkbenchError, match="expected two or more bricks, found 1"):
        fit(world, "centroid", {"a": prompts(0)})
    step = methods()["route:text"].model_validate({"route": "text", "calibration": "{brick}.jsonl"})
    calibration = {brick: prompts(i) for brick, i in BRICKS.items()}
    router = step.fit(context(*world, calibration, descriptions={"c": "sums of money"}))  # type: ignore[attr-defined]
    decisions = router.decide(Prompts(["some money"]))
    assert int(decisions.scores.argmax()) == 2
    assert float(decisions.confidence) > 0
