"""The recommendation of a comparison: what is recommended in made-up situations, why nothing is, and the family of pairs behind it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worlds.decided import BRICK, CLUSTERS, CONTROLS, MB, SITUATIONS, WEAK, compared, items, made, many, situation
from worlds.stored_scores import BASE, stored

from workbench.compare import advice, leaders, recommend
from workbench.compare.advice import Candidate, Guarded
from workbench.compare.compare import compare
from workbench.scores.store import Configuration, ScoreStore


def recommended(name: str, folder: Path, **settings: Any) -> dict[str, Any]:
    comparison = compared(folder, {**CONTROLS, **SITUATIONS[name]}, **settings) if settings else situation(name)
    found: dict[str, Any] = comparison.to_dict()["recommendation"]
    return found


def test_a_clear_winner_is_shipped_with_its_reason(tmp_path: Path) -> None:
    document = situation("winner").to_dict()
    found = document["recommendation"]
    assert (found["configuration"], found["closest"], found["cause"], found["help"]) == ("ties", None, None, [])
    assert found["leaders"] == ["ties"]
    pair = found["candidates"][0]["against_baseline"]
    assert pair["diff"] == pytest.approx(0.725 - 0.3, abs=1e-9)
    ends = f"+42.5 [+{100 * pair['low']:.1f}, +{100 * pair['high']:.1f}] points"
    assert found["text"] == f"Ship ties: highest mean over skills, 72.5; {ends} against base; safe on facts."
    assert found["details"] == [
        "Every other configuration with a lower mean is shown to be worse than ties.",
        "This is shown for items like the 960 of add and sort, in 96 clusters.",
    ]
    ranked = [(c["configuration"], c["role"]) for c in found["candidates"]]
    assert ranked[0] == ("ties", "configuration")
    assert sorted(ranked[1:4]) == [("add", "brick"), ("dare", "configuration"), ("sort", "brick")]
    assert ranked[4:] == [("average", "average"), ("linear", "configuration")]
    assert found["family"] == {
        "members": 7,
        "pairs": 6 + 6 * 5 // 2,
        "alpha": 0.05,
        "looked_at": 0,
        "text": "mean over skills of 7 configurations: each against base, and every two of the others",
    }
    means = {c["name"]: c["mean"]["value"] for c in document["configurations"]}
    assert {c["configuration"]: c["mean"] for c in found["candidates"]} == pytest.approx({n: means[n] for n, _ in ranked})


def test_a_merge_that_loses_its_bricks_skills_names_the_command_for_advice(tmp_path: Path) -> None:
    """The sentence needs a share that is shown to be below what a merge is expected to keep."""
    shares = {**CONTROLS, **SITUATIONS["winner"]}
    ties = next(c for c in shares if c.name == "ties")
    add = next(c for c in shares if c.name == "add")
    sort = next(c for c in shares if c.name == "sort")
    merged = replace(ties, recipe="recipes/ties mix.yaml", parents=("add", "sort"))
    rest = {c: share for c, share in shares.items() if c not in (ties, add, sort)}
    for own, said in ((0.98, True), (0.74, False)):
        scores = {**rest, add: (own, 0.3, 0.8), sort: (0.3, own, 0.8), merged: shares[ties]}
        found = compared(tmp_path / str(own), scores).to_dict()["recommendation"]
        sentences = [text for text in found["details"] if "keeps" in text]
        assert bool(sentences) == said
        for changes in ({"form": "configuration"}, {"recipe": None}, {"parents": ("add",)}):  # no merge of a recipe
            other = {**rest, add: (own, 0.3, 0.8), sort: (0.3, own, 0.8), replace(merged, **changes): shares[ties]}
            folder = tmp_path / f"{own} {next(iter(changes))}"
            assert not [t for t in compared(folder, other).to_dict()["recommendation"]["details"] if "keeps" in t]
        if said:
            assert sentences[0].startswith("ties keeps ")
            assert sentences[0].endswith(
                "of what its bricks score alone: `workbench brick advise 'recipes/ties mix.yaml'` tells whether they overlap or contradict each other."
            )


def test_two_that_cannot_be_told_apart_are_both_named_with_the_smaller_one(tmp_path: Path) -> None:
    found = recommended("alike", tmp_path)
    assert found["configuration"] == "wide"
    assert found["leaders"] == ["wide", "lean"]
    (pair,) = found["pairs"]
    assert (pair["configuration"], pair["against"], pair["verdict"]) == ("lean", "wide", "cannot tell")
    assert found["details"][0].startswith("lean is not distinguishable from it (\N{MINUS SIGN}0.5 [")
    assert found["details"][0].endswith(" and is smaller (12.0 MB against 400 MB).")
    assert {c["configuration"]: (c["form"], c["bytes"], c["bricks"]) for c in found["candidates"]}["lean"] == (
        "adapter",
        12 * MB,
        2,
    )


def test_an_equivalent_one_that_costs_less_is_shipped_instead(tmp_path: Path) -> None:
    """Not told apart is no proof of being equal; within the smallest effect of interest is."""
    found = recommended("alike", tmp_path, min_effect=0.05)
    assert found["configuration"] == "lean"
    assert found["text"].startswith(
        "Ship lean: equivalent to wide, which has the highest mean, and smaller (12.0 MB against 400 MB); +38.4 ["
    )
    (pair,) = [p for p in found["pairs"] if p["configuration"] == "wide"]
    assert pair["verdict"] == "equivalent"
    assert -0.05 < pair["low"] < 0 < pair["high"] < 0.05


def test_the_best_one_is_unsafe_and_nothing_else_is_better(tmp_path: Path) -> None:
    found = recommended("unsafe", tmp_path)
    assert (found["configuration"], found["closest"], found["cause"]) == (None, "greedy", "unsafe")
    assert found["text"] == (
        "No configuration can be recommended: greedy has the highest mean, 77.5, but is worse than base on facts (\N{MINUS SIGN}20.0 points)."
    )
    assert found["help"] == [
        "Lower the weights (lambda) of its merge, or leave out bricks one at a time to find the one that harms."
    ]


def test_a_brick_that_harms_alone_is_named(tmp_path: Path) -> None:
    shares = {**CONTROLS, **SITUATIONS["unsafe"]}
    harmful = next(c for c in shares if c.name == "add")
    found = compared(tmp_path, {**shares, harmful: (0.7, 0.3, 0.6)}).to_dict()["recommendation"]
    assert found["help"] == ["Alone, add is worse on facts too: lower its weight or leave it out."]


def test_the_best_one_is_unsafe_and_the_next_is_shipped(tmp_path: Path) -> None:
    found = recommended("second", tmp_path)
    assert (found["configuration"], found["cause"]) == ("ties", None)
    assert found["text"].startswith("Ship ties: highest mean over skills of those that can be recommended, 60.0; +30.0 [")
    assert found["details"][0] == "greedy has a higher mean, 77.5, but is worse than base on facts (\N{MINUS SIGN}20.0 points)."
    assert found["leaders"] == ["greedy"]


def test_nothing_is_better_than_the_base(tmp_path: Path) -> None:
    found = recommended("nothing", tmp_path)
    assert (found["configuration"], found["closest"], found["cause"]) == (None, "ties", "not better")
    assert found["text"].startswith(
        "No configuration can be recommended: none is shown to be better than base; ties comes closest, +1.0 ["
    )
    assert found["help"][0].startswith("About ")
    assert "items over the skill tasks would show a difference as large as +1.0 points" in found["help"][0]
    worse = {**CONTROLS, **dict.fromkeys(WEAK, (0.25, 0.25, 0.8)), made("ties", 1): (0.29, 0.28, 0.8)}
    below = compared(tmp_path / "below", worse).to_dict()["recommendation"]
    assert below["text"].startswith(
        "No configuration can be recommended: none has a higher mean over skills than base; ties comes closest, "
    )
    assert below["help"] == [
        "More items would hardly change this: try other methods, weights or bricks, for example with `workbench search`."
    ]


def test_too_little_data(tmp_path: Path) -> None:
    few = recommended("winner", tmp_path / "few", clusters=6)
    assert (few["configuration"], few["cause"]) == (None, "too few clusters")
    assert (
        "these items cannot show whether ties is better than base (too few clusters: add has 6, at least 8 needed)" in few["text"]
    )
    assert few["help"] == [
        "Items in more clusters, such as from more templates or passages; more items of the same clusters do not help."
    ]
    doubt = recommended("winner", tmp_path / "doubt", tolerance=0.001)
    assert (doubt["configuration"], doubt["closest"], doubt["cause"]) == (None, "ties", "not shown safe")
    assert "ties has the highest mean, 72.5, but is not shown safe on facts (a loss of up to " in doubt["text"]
    assert "points is possible, the tolerance is 0.1 points)." in doubt["text"]
    assert doubt["help"][0].startswith("About ")
    assert doubt["help"][0].endswith(" items of facts would show that a loss as large as the observed one is safe.")


def test_what_cannot_be_averaged_or_is_not_guarded(tmp_path: Path) -> None:
    none = recommended("winner", tmp_path / "none", roles={"add": "other", "sort": "other", "facts": "retention"})
    assert (none["cause"], none["candidates"], none["closest"]) == ("no mean", [], None)
    assert none["help"] == ["Give the suite a task with the role `skill` whose scores lie between 0 and 1."]
    free = recommended("winner", tmp_path / "free", roles={"facts": "other"})
    assert free["configuration"] == "ties"
    assert free["text"].endswith("; no guarded task tests for harm.")


def test_the_weights_of_the_baseline_are_no_candidate(tmp_path: Path) -> None:
    same = Configuration(BASE.digest, "noop", "configuration", ("add",), "recipes/noop.yaml")
    found = compared(tmp_path, {**CONTROLS, same: CONTROLS[BASE]}).to_dict()["recommendation"]
    assert (found["cause"], found["text"]) == (
        "same weights",
        "No configuration can be recommended: all have the weights of base.",
    )


def test_a_brick_alone_that_is_best_is_shipped(tmp_path: Path) -> None:
    found = recommended("brick", tmp_path)
    assert (found["configuration"], found["leaders"]) == ("add", ["add"])
    assert found["text"].startswith("Ship add: highest mean over skills, 65.0; +35.0 [")
    assert found["details"][0] == "add is a brick alone: nothing has to be merged."
    assert {"configuration": "add", "role": "brick"}.items() <= found["candidates"][0].items()
    unsafe = {**CONTROLS, **SITUATIONS["brick"]}
    brick = next(c for c in unsafe if c.name == "add")
    other = compared(tmp_path / "unsafe", {**unsafe, brick: (0.8, 0.5, 0.5)}).to_dict()["recommendation"]
    assert other["configuration"] == "mine"
    assert other["details"][0] == "add has a higher mean, 65.0, but is worse than base on facts (\N{MINUS SIGN}30.0 points)."


def test_a_brick_that_is_equivalent_to_a_merge_is_shipped_by_the_bytes_of_its_own_files(tmp_path: Path) -> None:
    brick = replace(BRICK, bytes=400 * MB, bricks={"add": 12 * MB})
    shares = {c: line for c, line in {**CONTROLS, **SITUATIONS["brick"]}.items() if c not in (BRICK, made("mine", 1))}
    merge = made("mine", 1)
    found = compared(tmp_path, {**shares, brick: (0.69, 0.68, 0.8), merge: (0.7, 0.68, 0.8)}, min_effect=0.05)
    text = found.to_dict()["recommendation"]["text"]
    assert text.startswith("Ship add: equivalent to mine, which has the highest mean, and smaller (12.0 MB against 400 MB); ")


def test_controls_that_are_made_for_the_comparison_are_no_candidates(tmp_path: Path) -> None:
    tuned = Configuration(f"{0xC0:012x}{0:020x}", "tuned", "finetune")
    found = compared(tmp_path, {**CONTROLS, **SITUATIONS["winner"], tuned: (0.8, 0.8, 0.8)}).to_dict()["recommendation"]
    assert found["configuration"] == "ties"
    assert found["details"][0] == (
        "The control tuned (80.0) has a higher mean. It is no candidate: name a recipe that makes the same weights to have it tested."
    )


def test_a_named_baseline_and_few_clusters_in_one_task_name_the_task(tmp_path: Path) -> None:
    """The base is a candidate too where it is not the baseline."""
    store, shares = ScoreStore(tmp_path), {**CONTROLS, **SITUATIONS["winner"]}
    values = {
        c: {t: items(x, i) for i, (t, x) in enumerate(zip(("add", "sort"), line, strict=False))} for c, line in shares.items()
    }
    scores = stored(store, values, clusters=CLUSTERS, few={"sort": 6})
    found = compare(store, scores, baseline="linear").to_dict()["recommendation"]
    assert found["configuration"] == "linear"
    assert found["details"][0] == (
        "ties has a higher mean, 72.5, but is not shown to be better than linear (too few clusters: sort has 6, at least 8 needed)."
    )
    assert "base" in [c["configuration"] for c in found["candidates"]]


def test_controls_alone_get_none(tmp_path: Path) -> None:
    assert "recommendation" not in compared(tmp_path, CONTROLS).to_dict()


def test_a_configuration_as_the_baseline_is_a_candidate(tmp_path: Path) -> None:
    a, b = made("a", 1), made("b", 2)
    found = compared(tmp_path, {a: (0.7, 0.7, 0.8), b: (0.4, 0.4, 0.8)}, baseline="a").to_dict()["recommendation"]
    assert found["text"] == "Ship a: highest mean over skills, 70.0; it is the baseline."
    assert found["family"]["members"] == 2
    assert [c["guarded"] for c in found["candidates"]] == ["baseline", "safe"]


def test_a_baseline_under_another_name_of_its_weights_is_a_candidate_by_that_name(tmp_path: Path) -> None:
    a, twin, b = made("a", 1), Configuration(f"{1:012d}{0:020d}", "a-again"), made("b", 2)
    store = ScoreStore(tmp_path)
    values = {c: {"add": items(share, 1), "sort": items(share, 2)} for c, share in ((a, 0.7), (b, 0.4))}
    first, second = stored(store, values, clusters=CLUSTERS)
    document = compare(store, [first, first.called(twin), second], baseline="a-again").to_dict()
    found = document["recommendation"]
    assert document["baseline"] == found["baseline"] == "a-again"
    assert [c["configuration"] for c in found["candidates"]] == ["a-again", "b"]


def test_more_members_than_pairs_are_tested_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is still tested against the baseline, so that one can be shipped; nothing is said about pairs."""
    for module in (recommend, leaders, advice):
        monkeypatch.setattr(module, "MOST_MEMBERS", 6)
    found = compared(tmp_path, {**CONTROLS, **SITUATIONS["winner"]}).to_dict()["recommendation"]
    assert (found["configuration"], found["cause"], found["pairs"]) == ("ties", None, [])
    assert found["details"] == [
        "The 7 configurations are not tested against each other, which is done for 6 at most: others may be as good.",
        "This is shown for items like the 960 of add and sort, in 96 clusters.",
    ]
    assert found["family"]["pairs"] == 6
    assert found["family"]["text"] == "mean over skills of 7 configurations: each against base"
    against = found["candidates"][1]["against_best"]
    assert (against["verdict"], against["low"], against["high"]) == ("cannot tell", None, None)
    assert found["candidates"][1]["against_baseline"]["verdict"] == "better"


def candidate(name: str, mean: float, guarded: Guarded, bytes: int | None = None, bricks: int = 0) -> Candidate:
    return Candidate(
        configuration=name,
        role="configuration",
        mean=mean,
        guarded=guarded,
        against_baseline=None,
        against_best=None,
        form=None,
        bytes=bytes,
        bricks=bricks,
    )


def test_a_guarded_task_without_scores_shows_no_safety() -> None:
    assert not candidate("a", 0.5, "not shown safe").recommendable
    assert candidate("a", 0.5, "no guarded task").recommendable


def test_costs_are_compared_by_bytes_and_then_by_bricks() -> None:
    small, large = candidate("s", 0, "safe", bytes=10, bricks=5), candidate("l", 0, "safe", bytes=20, bricks=1)
    assert (small.cheaper(large), large.cheaper(small)) == ("smaller (10 B against 20 B)", "")
    near, other = candidate("n", 0, "safe", bytes=100, bricks=2), candidate("o", 0, "safe", bytes=95, bricks=3)
    assert (near.cheaper(other), other.cheaper(near)) == ("made from fewer bricks (2 against 3)", "")
    assert candidate("a", 0, "safe").cheaper(small) == ""


def test_leaders_are_those_that_are_not_shown_to_be_worse(tmp_path: Path) -> None:
    found = many().to_dict()["recommendation"]
    by_name = {c["configuration"]: c for c in found["candidates"]}
    means = [c["mean"] for c in found["candidates"]]
    assert means == sorted(means, reverse=True)
    best = found["candidates"][0]["configuration"]
    expected = [n for n, c in by_name.items() if n == best or c["against_best"]["verdict"] != "worse"]
    assert found["leaders"] == expected
    assert 2 <= len(expected) < 24
    assert found["family"]["pairs"] == 27 + 27 * 26 // 2


def test_items_of_situations_resemble_each_other() -> None:
    a, b = np.array(items(0.5, 1)), np.array(items(0.5, 2))
    assert a.mean() == b.mean() == 0.5
    assert 0.02 < (a != b).mean() < 0.3
