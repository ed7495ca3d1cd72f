"""Many bricks: groups of one skill, the recipes of a route between them, and what a route answers and costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worlds.commands import call, document, refused
from worlds.project import Project
from worlds.tiny import baked, live

from workbench.advice import pools, proposal
from workbench.advice.evidence import Candidate, RoutePrice
from workbench.advice.groups import grouped
from workbench.advice.pools import Pair, Shared
from workbench.advice.proposal import Proposal
from workbench.api import loading
from workbench.ground import yamldoc
from workbench.models.prompts import load_tokenizer


def pair(names: str, rv: float, cosine: float = 0.1, different: int = -1) -> Pair:
    shared = Shared(prompts=10, of=100 if different < 0 else 12, different=max(0, different))
    return Pair(
        one=names[0],
        two=names[1],
        rv=rv,
        rv_lowest_layer=None,
        rv_highest_layer=None,
        cosine=cosine,
        sign_conflict=None,
        shared=shared,
    )


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("ab", 0.9), ("bc", 0.1), ("ac", 0.1)], ["ab", "c"]),
        ([("ab", 0.5), ("bc", 0.9), ("ac", 0.2)], ["a", "bc"]),  # b is like both, and a is not like c: the closest pair joins
        ([("ab", 0.9), ("bc", 0.9), ("ac", 0.9)], ["abc"]),
        ([("ab", 0.9), ("bc", 0.9), ("ac", 0.9, 0.1, 9)], ["ab", "c"]),  # a and c answer the same prompts differently
        ([("ab", 0.9, -0.9), ("bc", 0.1), ("ac", 0.46)], ["ac", "b"]),
        ([("ab", 0.1), ("bc", 0.1), ("ac", 0.1)], ["a", "b", "c"]),
        ([("ab", 0.1, 0.1, 0), ("bc", 0.1), ("ac", 0.1)], ["ab", "c"]),  # the same prompts with the same answers
    ],
)
def test_groups_are_bricks_that_all_overlap(pairs: list[tuple[Any, ...]], expected: list[str]) -> None:
    found = grouped(dict.fromkeys("abc", 1.0), [pair(*one) for one in pairs])
    assert ["".join(group.bricks) for group in found] == expected
    assert [group.step for group in found] == [{"merge": "average"} if len(names) > 1 else None for names in expected]
    assert all(
        group.name == (f"{names[0]}-group" if len(names) > 1 else names) for group, names in zip(found, expected, strict=True)
    )


def test_a_group_of_unequal_norms_has_weights_and_a_free_name() -> None:
    found = grouped({"a": 1.0, "b": 4.0, "a-group": 1.0}, [pair("ab", 0.9)])
    assert found[0].name == "a-group-group"
    assert found[0].step == {"merge": "task_arithmetic", "bricks": {"a": 1.0, "b": 0.25}}


@pytest.fixture
def folder(project: Project, cwd: Path) -> Path:
    """A project whose bricks `one` and `two` have prompts that they answer alone, beside `twin`, which is `one` with noise."""
    from safetensors.torch import load_file, save_file

    one, noise = load_file(project.path / "bricks" / "one" / "adapter_model.safetensors"), torch.Generator().manual_seed(7)
    (project.path / "more" / "twin").mkdir(parents=True)
    (project.path / "more" / "twin" / "adapter_config.json").write_bytes(
        (project.path / "bricks" / "one" / "adapter_config.json").read_bytes()
    )
    mixed = {n: t + 0.03 * torch.randn(t.shape, generator=noise) if "lora_B" in n else t for n, t in one.items()}
    save_file(mixed, project.path / "more" / "twin" / "adapter_model.safetensors")
    tokenizer = load_tokenizer(project.path / "base")
    prompts = {"one": [f"w{i} w{59 - i}" for i in range(40)], "two": [f"w{i} is of is of" for i in range(40)]}
    prompts["twin"] = [f"w{i} w{i} w{59 - i}" for i in range(30)]
    for name, texts in prompts.items():
        model = live(project.path / "base")
        adapter = project.path / ("more" if name == "twin" else "bricks") / name
        model.load_state_dict({n: t.float() for n, t in baked(project.path / "base", adapter).items()}, strict=False)
        with torch.no_grad():
            top = [int(model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].argmax()) for text in texts]
        rows = [{"prompt": p, "completion": tokenizer.decode([t]).strip()} for p, t in zip(texts, top, strict=True)]
        (project.path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return project.path


BRICKS = ("one", "two", "more/twin", "--base", "base", "--device", "cpu")
TEXTS = tuple(part for name in ("one", "two", "twin") for part in ("--texts", f"{name}={name}.jsonl"))


def test_many_groups_are_routed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written recipe routes between `two` and the average of the other two, and runs."""
    monkeypatch.setattr(pools, "FAR", 100)
    assert document("brick", "advise", *BRICKS, *TEXTS)["step"]["merge"] == "tsv"
    monkeypatch.setattr(proposal, "MOST", 1)
    found = document("brick", "advise", *BRICKS, *TEXTS)
    assert (found["step"], found["sweep"]) == ({"route": "ridge"}, [])
    assert [(group["name"], group["bricks"]) for group in found["groups"]] == [("one-group", ["one", "twin"]), ("two", ["two"])]
    printed = call("brick", "advise", *BRICKS, *TEXTS, "--write", "recipes/many.yaml").stdout
    assert "recommended: {route: ridge} between one-group (one + twin, {merge: average}), two" in printed
    group = yamldoc.load(folder / "recipes" / "many-one-group.yaml").data
    assert group["bricks"] == {"one": "bricks/one", "twin": "more/twin"}
    assert group["steps"] == [{"merge": "average"}]
    routed = yamldoc.load(folder / "recipes" / "many.yaml").data
    assert routed["bricks"] == {"one-group": {"recipe": "recipes/many-one-group.yaml"}, "two": "bricks/two"}
    assert routed["steps"][0]["bricks"]["one-group"] == {"calibration": ["one.jsonl", "twin.jsonl"]}
    assert document("run", "recipes/many.yaml", "--device", "cpu")["status"] == "done"
    (folder / "recipes" / "many.yaml").unlink()
    error = refused("brick", "advise", *BRICKS, *TEXTS, "--write", "recipes/many.yaml")
    assert "many-one-group.yaml: already exists" in error.message
    assert not (folder / "recipes" / "many.yaml").exists()


def test_what_no_router_can_choose_among(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, and bricks without prompts, leave the merge, with what a route needs."""
    monkeypatch.setattr(pools, "FAR", 100)
    monkeypatch.setattr(proposal, "MOST", 1)
    found = document("brick", "advise", *BRICKS, *TEXTS[:4])
    assert found["step"]["merge"] == "tsv"
    assert "twin has none: --texts twin=FILE.jsonl" in found["reasons"][1]
    found = document("brick", "advise", "one", "full", "--base", "base", "--texts", "one=one.jsonl")
    assert "full is a checkpoint: workbench brick extract" in found["reasons"][1]


def test_a_route_answers_by_the_brick_that_it_chooses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial's answers are those of the recipe, fitted on the prompts that are not asked, which generates them."""
    monkeypatch.setattr(pools, "OVERLAPPING", 2)  # each brick is a group
    found = document("brick", "advise", *BRICKS, *TEXTS, "--measure")
    trial = found["trial"]
    routed = next(row for row in trial["candidates"] if row["name"] == "route")
    assert trial["price"]["adapters"] == 3
    assert trial["price"]["bytes"] == sum(file.stat().st_size for file in _weights(folder))
    assert any(reason.startswith("Price: the route holds 3 adapters (") for reason in found["reasons"])
    asked = {}
    for name in ("one", "two", "twin"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
        asked[name] = [rows[i * len(rows) // 24] for i in range(24)]
        others = [row for row in rows if row not in asked[name]]
        (folder / f"{name}-others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others), "utf-8")
    recipe = {
        "version": 1,
        "base": "base",
        "bricks": {"one": "bricks/one", "two": "bricks/two", "twin": "more/twin"},
        "steps": [{"route": "ridge", "calibration": "{brick}-others.jsonl"}],
        "output": {"dtype": "float32"},
    }
    (folder / "recipes" / "same.yaml").write_text(yamldoc.dump(recipe), "utf-8")
    model, tokenizer = loading.load_recipe("recipes/same.yaml").model(), load_tokenizer(folder / "base")
    for row in routed["bricks"]:
        right = []
        for text in asked[row["brick"]]:
            ids = torch.tensor([tokenizer(text["prompt"])["input_ids"]])
            said = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)[0, -1:]
            right.append(tokenizer.decode(said).strip() == text["completion"])
        assert row["accuracy"]["value"] == pytest.approx(sum(right) / 24), row["brick"]
    assert trial["base"]["accuracy"]["value"] < 0.4 < routed["accuracy"]["value"]


@pytest.mark.parametrize(("routed", "advised"), [(22, "route"), (9, "tsv, lambda 1")])
def test_a_route_is_advised_only_if_it_answers_clearly_more(routed: int, advised: str) -> None:
    """Its price stands beside either verdict; what it cannot tell apart is a warning of the route alone."""

    def candidate(name: str, right: int) -> Candidate:
        return Candidate(name, {}, {brick: np.array([1.0] * right + [0.0] * (24 - right)) for brick in "ab"})

    merge = {"merge": "tsv", "weights": "auto"}
    before = Proposal("disjoint", "Disjoint.", ["why"], {}, [], grouped({"a": 1.0, "b": 1.0}, []), merge, (0.6, 1))
    price = RoutePrice(adapters=2, bytes=2_000_000, seconds=0.4, merged_seconds=0.3)
    after, verdict = proposal._beside_route(
        before, candidate("tsv, lambda 1", 8), candidate("route", routed), price, [["a", "b"]]
    )
    assert verdict.name == advised
    assert any("2 adapters (2.0 MB)" in reason and "0.4 s" in reason for reason in after.reasons)
    tied = ["Prompts do not tell a and b apart: of these a router takes a."]
    expected = ({"route": "ridge"}, (), tied) if advised == "route" else (merge, (0.6, 1), [])
    assert (after.step, after.sweep, after.warnings) == expected


def _weights(folder: Path) -> list[Path]:
    places = (folder / "bricks" / "one", folder / "bricks" / "two", folder / "more" / "twin")
    return [place / "adapter_model.safetensors" for place in places]
