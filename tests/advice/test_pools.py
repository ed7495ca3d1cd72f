"""Advice names relations of bricks, what a merge leaves out, weights for equal norms, and the best of the merges that were run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from worlds.commands import document, refused
from worlds.project import Project
from worlds.tiny import baked, live, tensors_of

from workbench.advice import pools
from workbench.advice.evidence import Candidate, decide, falls
from workbench.advice.pools import Pair, Shared, shared_prompts
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import Text


def pair(rv: float = 0.0, cosine: float = 0.0, shared: Shared | None = None, names: tuple[str, str] = ("a", "b")) -> Pair:
    one, two = names
    return Pair(one=one, two=two, rv=rv, rv_lowest_layer=rv, rv_highest_layer=rv, cosine=cosine, sign_conflict=0.5, shared=shared)


@pytest.mark.parametrize(
    ("pairs", "norm", "regime", "step"),
    [
        ([], 0.01, "single", None),
        ([pair(0.1499)], 0.01, "disjoint", "tsv"),
        ([pair(0.2)], 0.01, "between", "tsv"),
        ([pair(0.4501)], 0.01, "overlapping", "average"),
        ([pair(0.4499)], 0.01, "between", "tsv"),
        ([pair(0.9), pair(0.01, names=("a", "c")), pair(0.01, names=("b", "c"))], 0.01, "overlapping", "tsv"),
        ([pair(0.9995, 0.9995)], 0.01, "same", None),
        ([pair(0.9995, -0.9995)], 0.01, "opposed", None),
        ([pair(0.05)], 0.16, "far", None),
        ([pair(0.05)], 0.14, "disjoint", "tsv"),
        ([pair(0.5)], 0.16, "far", "average"),
        ([pair(0.9995, 0.9995)], 0.16, "same", None),
        ([pair(0.9995, -0.9995)], 0.16, "opposed", None),
        ([pair(0.5, shared=Shared(prompts=8, of=8, different=5))], 0.01, "contradicting", None),
        ([pair(0.5, shared=Shared(prompts=8, of=8, different=4))], 0.01, "overlapping", "average"),
        ([pair(0.2, shared=Shared(prompts=8, of=16, different=4))], 0.01, "between", "average"),
        ([pair(0.2, shared=Shared(prompts=8, of=17, different=0))], 0.01, "between", "tsv"),
        ([pair(0.2, shared=Shared(prompts=7, of=7, different=0))], 0.01, "between", "tsv"),
        ([pair(0.5, shared=Shared(prompts=7, of=8, different=7))], 0.01, "overlapping", "average"),
    ],
)
def test_regimes(pairs: list[Pair], norm: float, regime: str, step: str | None) -> None:
    found, says = pools.regime_of({"a": norm, "b": norm / 2}, pairs)
    places = {"a": "lora/a", "b": "my b", "c": "c"}
    recommended, reasons = pools.recommended(found, places, pairs, "org/base")
    assert (found, (recommended or {}).get("merge")) == (regime, step)
    assert says.endswith(".")
    assert reasons
    typed = {
        "far": "barrier lora/a 'my b' --base org/base --text TEXTS.jsonl",
        "contradicting": "advise lora/a c, or workbench brick",
    }
    assert step or f"workbench brick {typed.get(found, '')}" in "workbench brick " + " ".join(reasons), (
        "paths, which can be typed"
    )


@pytest.mark.parametrize(
    ("pairs", "alone", "goes"),
    [
        ([pair(1, 1)], {}, {"b"}),
        ([pair(1, 1)], {"a": [0, 0], "b": [1, 0]}, {"a"}),
        ([pair(0.5, -0.31)], {}, {"b"}),
        ([pair(0.5, -0.29)], {}, set()),
        ([pair(0.5, -0.31)], {"a": [0, 0], "b": [0, 1]}, {"a"}),
        ([pair(0.5, -0.5), pair(0.5, -0.5, names=("a", "c"))], {}, {"a"}),
        ([pair(1, -1), pair(1, -1, names=("a", "c")), pair(1, 1, names=("b", "c"))], {}, {"a", "c"}),
        ([pair(1, 1), pair(1, 1, names=("a", "c")), pair(1, 1, names=("b", "c"))], {}, {"b", "c"}),
    ],
)
def test_one_brick_of_a_pair_goes(pairs: list[Pair], alone: dict[str, list[int]], goes: set[str]) -> None:
    """The one that knows less alone, else the one that more bricks point against, else the later one."""
    known = {name: np.array(right, np.float64) for name, right in alone.items()}
    found, warnings = pools.left_out({"a": 0.01, "b": 0.01, "c": 0.01}, pairs, known)
    assert set(found) == goes
    assert bool(warnings) == (not alone and len(pairs) == 1 and pairs[0].opposed)


def test_equal_norms_and_contradictions() -> None:
    assert pools.equal_weights({"a": 0.04, "b": 0.01, "c": 0.0025}) == {"a": 0.25, "b": 1, "c": 4}
    assert pools.equal_weights({"a": 0.04, "b": 0.01}) == {"a": 0.5, "b": 2}
    assert pools.equal_weights({"a": 0.04, "b": 0.01}, ["b"]) == {"a": 0.25, "b": 1}

    def rows(*answers: str) -> list[Text]:
        return [Text("p", answer, "f:1") for answer in answers]

    assert shared_prompts({"a": rows("x", "y"), "b": rows("Y ", "z")})["a", "b"] == Shared(prompts=1, of=1, different=0)
    assert shared_prompts({"a": rows("x"), "b": rows("z")})["a", "b"] == Shared(
        prompts=1, of=1, different=1, example=["p", "x", "z"]
    )
    assert shared_prompts({"a": [Text("", "x", "f:1")], "b": [Text("", "y", "f:1")]})["a", "b"] == Shared(
        prompts=0, of=0, different=0
    )


def candidate(name: str, **right: int) -> Candidate:
    """A candidate with so many right answers of 24 to the prompts of each brick."""
    answers = {brick: np.array([1.0] * count + [0.0] * (24 - count)) for brick, count in right.items()}
    return Candidate(name, {"merge": name}, answers)


def test_the_best_is_advised_only_if_it_is_clearly_better() -> None:
    few, more, most = candidate("tsv", a=8, b=8), candidate("sum", a=9, b=9), candidate("average", a=20, b=20)
    verdict = decide([few, more, most], "tsv")
    assert (verdict.name, verdict.clear) == ("average", True)
    assert "average answers 83 [70, 92] % of the prompts, tsv 33 [21, 48] %: +50 [" in verdict.says
    verdict = decide([few, more], "tsv")
    assert (verdict.name, verdict.clear) == ("tsv", False)
    assert "48 prompts cannot tell" in verdict.says
    verdict = decide([few, more, most], "average")
    assert (verdict.name, verdict.clear) == ("average", True)
    assert "sum 38" in verdict.says
    alone = {name: np.ones(24) for name in ("a", "b")}
    assert set(falls(alone, candidate("tsv", a=23, b=5))) == {"b"}


def test_measured_answers_are_those_of_the_merged_weights(project: Project, cwd: Path) -> None:
    """Each brick is asked what it says itself; answers of the base and of the average are recomputed from dense weights."""
    tokenizer, base = load_tokenizer(project.path / "base"), tensors_of(project.path / "base")
    tuned = {name: baked(project.path / "base", project.path / "bricks" / name) for name in ("one", "two")}
    prompts = {"one": [f"w{i} w{3 * i}" for i in range(12)], "two": [f"w{i} is w{2 * i}" for i in range(12)]}

    def said(weights: dict[str, torch.Tensor], brick: str) -> list[str]:
        model = live(project.path / "base")
        model.load_state_dict({n: t.float() for n, t in weights.items()}, strict=False)
        with torch.no_grad():
            top = [int(model(torch.tensor([tokenizer(p)["input_ids"]])).logits[0, -1].argmax()) for p in prompts[brick]]
        return [tokenizer.decode([token]).strip() for token in top]

    answers = {name: said(weights, name) for name, weights in tuned.items()}
    for name in tuned:
        rows = [{"prompt": p, "completion": a} for p, a in zip(prompts[name], answers[name], strict=True)]
        (project.path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    texts = ("--texts", "one=one.jsonl", "--texts", "two=two.jsonl", "--measure", "--device", "cpu")
    trial = document("brick", "advise", "one", "two", "--base", "base", *texts, "--json")["trial"]
    assert trial["items"] == 12
    assert [row["accuracy"]["value"] for row in trial["alone"]] == [1, 1]
    mean = {n: (tuned["one"][n].float() + tuned["two"][n].float()) / 2 for n in base}
    average = next(c for c in trial["candidates"] if c["name"] == "average")
    for model, weights in ((trial["base"], base), (average, mean)):
        for row in model["bricks"]:
            right = [a == b for a, b in zip(said(weights, row["brick"]), answers[row["brick"]], strict=True)]
            assert row["accuracy"]["value"] == pytest.approx(np.mean(right)), (model["name"], row["brick"])


def test_measuring_needs_prompts_of_each_brick(project: Project, cwd: Path) -> None:
    for name, rows in (("one", 8), ("three", 1)):
        lines = [json.dumps({"prompt": f"w{i}", "completion": "w2"}) + "\n" for i in range(rows)]
        (project.path / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    asked = ("brick", "advise", "one", "two", "--base", "base", "--measure", "--texts", "one=one.jsonl")
    assert "--measure compares bricks on their own texts, and two has none; expected 8" in refused(*asked).message
    (project.path / "long.jsonl").write_text(json.dumps({"prompt": "w1 " * 900, "completion": "w2"}) + "\n", "utf-8")
    assert "two has none" in refused(*asked, "--texts", "two=long.jsonl").message
    assert "two has 1;" in refused(*asked, "--texts", "two=three.jsonl").message
