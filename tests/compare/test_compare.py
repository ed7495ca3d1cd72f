"""Paired statistics against statsmodels and by hand, calibration, and comparisons of stored scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from worlds.decided import situation
from worlds.toy_scores import ADD, BASE, MERGE, SHARES, SORT, SUITE, digest_of_plan, stored

from workbench.compare.compare import Comparison, compare
from workbench.compare.warnings import tokenizer_warnings
from workbench.ground.errors import WorkbenchError
from workbench.scores.store import Configuration, ScoreStore
from workbench.scores.suite import Suite

# Comparisons of stored scores


def shares(n: int = 240) -> dict[Configuration, list[list[float]]]:
    """Items right at random places, the same places for equal tasks, so that better configurations hold the worse ones' items."""
    rank = np.random.default_rng(0).permuted(np.tile(np.arange(n), (3, 1)), axis=1)
    return {c: [(rank[t] < share * n).astype(float).tolist() for t, share in enumerate(line)] for c, line in SHARES.items()}


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "merge.yaml").write_text("version: 1\n")
    store = ScoreStore(tmp_path / "scores")
    return compare(store, stored(store, shares()), project=tmp_path, command="workbench compare")


def test_the_document_has_no_undefined_number_and_says_what_was_tested(comparison: Comparison) -> None:
    document = comparison.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["baseline"] == "base"
    assert [c["name"] for c in document["configurations"]] == ["base", "add", "sort", "average", "merge"]
    assert document["configurations"][4]["recipe_text"] == "version: 1\n"
    assert document["family"] == {
        "size": 2,
        "compared": 2,
        "guarded": 4,
        "controls": 6,
        "min_effect": 0.02,
        "alpha": 0.05,
        "correction": "max-t",
        "looked_at": 0,
        "text": "primary metric of 2 tasks x 1 configuration against base; 1 guarded task and 3 controls tested separately",
    }
    assert document["tasks"][2] == {
        "task": "facts",
        "metric": "acc",
        "n": 240,
        "clusters": 30,
        "chance": 0.5,
        "role": "retention",
        "owner": None,
        "suite": "toy",
        "plan": digest_of_plan("p" * 32),
        "lower": False,
        "ratio": None,
        "share": True,
        "min_effect": 0.02,
        "tolerance": 0.02,
        "scorer": "hflm",
        "contrast": None,
    }
    assert document["provenance"]["scorers"] == {"toy": "hflm"}
    assert document["warnings"] == ['facts: "safe" is about further items of its 30 clusters only (`drawn: items` in the suite).']


def test_rows_name_their_family_and_tolerance(comparison: Comparison) -> None:
    document = comparison.to_dict()
    found = {(r["configuration"], r["task"]): (r["family"], r["tolerance"]) for r in document["rows"]}
    assert found["merge", "add"] == ("compared", None)
    assert found["merge", "facts"] == found["add", "facts"] == ("guarded", 0.02)
    assert found["add", "sort"] == ("controls", None)
    assert [t["tolerance"] for t in document["tasks"]] == [None, None, 0.02]


def test_verdicts(comparison: Comparison) -> None:
    verdicts = {(r.configuration, r.task): r.verdict for r in comparison.rows}
    assert verdicts == {
        ("add", "add"): "better",
        ("add", "sort"): "no item changed",
        ("add", "facts"): "not shown safe",
        ("sort", "add"): "no item changed",
        ("sort", "sort"): "better",
        ("sort", "facts"): "worse",
        ("average", "add"): "better",
        ("average", "sort"): "better",
        ("average", "facts"): "not shown safe",
        ("merge", "add"): "better",
        ("merge", "sort"): "better",
        ("merge", "facts"): "not shown safe",
    }
    assert not comparison.worse  # only a control is worse
    row = next(r for r in comparison.rows if (r.configuration, r.task) == ("sort", "facts"))
    assert row.diff == pytest.approx(-0.2)
    assert (row.wins, row.losses) == (0, 48)
    assert row.low_adj <= row.low < row.high <= row.high_adj < 0
    assert row.p <= row.p_adj <= 0.05


def test_kept_interference_and_mean(comparison: Comparison) -> None:
    document = comparison.to_dict()
    merge = document["configurations"][4]
    assert merge["kept"]["add"]["value"] == pytest.approx(0.75)
    assert merge["kept"]["sort"]["value"] == pytest.approx(0.5)
    assert set(merge["kept"]) == {"add", "sort"}
    assert merge["kept"]["sort"]["low"] < 0.5 < merge["kept"]["sort"]["high"]
    assert merge["kept_mean"]["value"] == pytest.approx(1.2 / 1.9)
    assert merge["mean"]["value"] == pytest.approx(0.6)
    assert merge["mean"]["low"] < 0.6 < merge["mean"]["high"]
    assert merge["scores"]["facts"]["corrected"] == pytest.approx(0.6)
    base = document["configurations"][0]
    assert base["kept"] == {}
    assert base["kept_mean"] is None
    assert base["mean"]["value"] == pytest.approx(0.05)
    assert base["mean"]["low"] < 0.05 < base["mean"]["high"]
    matrix = document["interference"]
    assert (matrix["bricks"], matrix["tasks"]) == (["add", "sort"], ["add", "sort", "facts"])
    assert matrix["diff"] == [pytest.approx([1.0, 0.0, 0.0]), pytest.approx([0.0, 0.8, -0.2])]
    assert matrix["verdict"][1] == ["no item changed", "better", "worse"]


def test_flips_are_the_items_that_changed(comparison: Comparison) -> None:
    flips = comparison.to_dict()["flips"]
    assert {name: len(rows) for name, rows in flips.items()} == {"add": 240, "sort": 240, "average": 192, "merge": 264}
    flip = next(f for f in flips["sort"] if f["task"] == "facts")
    assert flip["prompt"] == f"{flip['id']}?"
    assert flip["baseline"]["response"] == "1.0"
    assert flip["configuration"] == {"response": "0.0", "metrics": {"acc": 0.0}, "loglikelihoods": None}


def test_another_baseline(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    result = compare(store, stored(store, shares()), baseline="average")
    assert result.baseline == "average"
    assert [(r.configuration, r.task) for r in result.worse] == [("merge", "sort")]
    assert {r.verdict for r in result.rows if (r.configuration, r.task) == ("base", "add")} == {"worse"}
    assert result.to_dict()["interference"]["diff"][0] == pytest.approx([1.0, 0.0, 0.0])  # still against the base


def test_worse_configuration_is_a_loss(tmp_path: Path) -> None:
    store, values = ScoreStore(tmp_path), shares()
    result = compare(store, stored(store, {BASE: values[BASE], MERGE: values[SORT]}))
    assert [r.task for r in result.worse] == ["facts"]


def test_a_against_itself_says_that_no_item_changed(tmp_path: Path) -> None:
    store, values = ScoreStore(tmp_path), shares()
    result = compare(store, stored(store, {BASE: values[BASE], MERGE: values[BASE]}))
    assert [r.verdict for r in result.rows] == ["no item changed", "no item changed", "safe"]
    same = compare(store, stored(store, {BASE: values[BASE]}) * 2)
    assert not same.rows  # equal digests are one configuration
    brick = compare(store, stored(store, {ADD: values[ADD]}) * 2, baseline="add")
    assert [(r.configuration, r.verdict) for r in brick.rows] == [("add", "no item changed")] * 3


def test_equivalent_and_cannot_tell(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = rng.random(3000) < 0.5
    after = np.where(rng.random(3000) < 0.004, ~before, before)
    suite = Suite(suite="one", tasks=("x",), primary={"x": "em"})
    store = ScoreStore(tmp_path)
    (row,) = compare(store, stored(store, {BASE: [before.tolist()], MERGE: [after.tolist()]}, suite=suite, clusters=300)).rows
    assert row.verdict == "equivalent"
    assert -0.02 <= row.low_adj < 0 < row.high_adj <= 0.02
    (row,) = compare(
        store,
        stored(
            store,
            {BASE: [before[:80].tolist()], MERGE: [(rng.random(80) < 0.5).tolist()]},
            suite=suite,
            clusters=40,
            plan="q" * 32,
        ),
    ).rows
    assert row.verdict == "cannot tell"
    assert row.needs is not None
    assert row.mde is not None
    assert row.needs > 80


def test_too_few_clusters(tmp_path: Path) -> None:
    store, values = ScoreStore(tmp_path), shares()
    result = compare(store, stored(store, {BASE: values[BASE], ADD: values[ADD]}, clusters=6))
    row = result.rows[0]
    assert (row.verdict, row.reason) == ("cannot tell", "too few clusters: 6, at least 8 needed")
    assert row.needs == 800
    assert "add: only 6 clusters; differences get a verdict only with at least 8." in result.to_dict()["warnings"]


def test_warnings(tmp_path: Path) -> None:
    store, values = ScoreStore(tmp_path), shares(60)
    other = Suite(suite="more", tasks=("extra",), primary={"extra": "em"}, owners={"extra": "ad"})
    scores = [
        *stored(store, {ADD: values[ADD], MERGE: values[MERGE]}, clusters=15, partial=True),
        *stored(store, {ADD: values[ADD][:1]}, suite=other, plan="q" * 32),
    ]
    text = "\n".join(compare(store, scores, baseline="add").to_dict()["warnings"])
    for expected in (
        "Partial: --limit cut the number of items",
        "add: only 15 clusters; the test detects only large differences",
        "add, sort, facts, extra: only 60 items; if one item in ten changes, a difference below about 12 points",
        "2 suites are compared together",
        "Missing controls: base, sort, average.",
        "its owner 'ad' is not among the scored configurations. Did you mean 'add'?",
        "extra: no scores of merge.",
    ):
        assert expected in text
    assert "devices" not in text
    moved = [scores[0].model_copy(update={"device": "cuda:0"}), *scores[1:]]
    assert "The scores come from different devices" in "\n".join(compare(store, moved, baseline="add").warnings)
    texts = [
        s.model_copy(update={"configuration": replace(s.configuration, name=name, tokenizer=tokenizer)})
        for name, tokenizer, s in zip("abcd", ("x", "x", "y", None), [*scores, *scores], strict=False)
    ]
    assert [w[:31] for w in tokenizer_warnings(texts)] == ["a, c have different tokenizers,"]
    assert not list(tokenizer_warnings([texts[0], texts[1], texts[3]]))


def test_warnings_of_unequal_clusters_and_many_tasks(tmp_path: Path) -> None:
    """Half of the items in one cluster: 121 clusters are worth 240^2 / (120^2 + 120) = 4.0 equal ones."""
    label = [0] * 120 + list(range(1, 121))
    one = Suite(suite="one", tasks=("x",), primary={"x": "em"})
    store = ScoreStore(tmp_path / "one")
    scores = stored(store, {BASE: [[1.0] * 240], MERGE: [[0.0] * 240]}, suite=one, clusters=label)
    said = "x: its 121 clusters of unequal size are worth only 4.0 clusters of equal size (the largest has 50% of the items); "
    assert [w for w in compare(store, scores).to_dict()["warnings"] if w.startswith(said)]
    plain = compare(store, scores, suites={"one": one.model_copy(update={"correction": "none"})})
    assert (plain.family.size, [w for w in plain.warnings if "without correction" in w]) == (1, []), "one comparison needs none"
    names = tuple(f"t{i}" for i in range(21))
    many = Suite(suite="many", tasks=names, primary=dict.fromkeys(names, "em"))
    store, values = ScoreStore(tmp_path / "many"), {BASE: [[1.0] * 120] * 21, MERGE: [[0.0, 1.0] * 60] * 21}
    told = compare(store, stored(store, values, suite=many)).to_dict()["warnings"]
    assert any(
        w.startswith("21 tasks and contrasts are in one family, and each of them lowers the power of the others") for w in told
    )
    fewer = many.model_copy(update={"roles": {"t0": "guarded"}})  # it is tested apart
    told = compare(store, stored(store, values, suite=fewer, plan="q" * 32)).to_dict()["warnings"]
    assert not any("in one family" in w for w in told)


def test_different_plans_are_refused_with_both_digests(tmp_path: Path) -> None:
    store, values = ScoreStore(tmp_path), shares()
    scores = [*stored(store, {BASE: values[BASE]}), *stored(store, {ADD: values[ADD]}, plan="q" * 32)]
    with pytest.raises(
        WorkbenchError,
        match=f"'add' was scored under plan {digest_of_plan('q' * 32)[:12]}, other configurations under plan {digest_of_plan('p' * 32)[:12]}",
    ):
        compare(store, scores)


def test_bad_comparisons(tmp_path: Path) -> None:
    store, values = ScoreStore(tmp_path), shares()
    scores = stored(store, {BASE: values[BASE], ADD: values[ADD]})
    with pytest.raises(WorkbenchError, match=r"no scores to compare"):
        compare(store, [])
    with pytest.raises(WorkbenchError, match=r"baseline 'bas' is not among") as error:
        compare(store, scores, baseline="bas")
    assert error.value.hint == "Did you mean 'base'?"
    with pytest.raises(WorkbenchError, match=r"plan\.json: task 'more' of the suite is missing"):
        compare(store, scores, suites={"toy": SUITE.model_copy(update={"tasks": (*SUITE.tasks, "more")})})
    twin = Configuration("9" * 32, "add", "configuration")
    with pytest.raises(WorkbenchError, match=r"two configurations are called 'add': 1{12} and 9{12}"):
        compare(store, [*scores, *stored(store, {twin: values[SORT]})])
    more = Suite(suite="more", tasks=("extra",), primary={"extra": "em"})
    with pytest.raises(WorkbenchError, match=r"baseline 'base' has no scores on suite 'more'"):
        compare(store, [*scores, *stored(store, {ADD: values[ADD][:1]}, suite=more, plan="q" * 32)])
    with pytest.raises(WorkbenchError, match=r"task 'facts' has no metric 'ac'"):
        compare(store, scores, suites={"toy": SUITE.model_copy(update={"primary": {**SUITE.primary, "facts": "ac"}})})
    with pytest.raises(ValueError, match=r"role 'parent' of x: expected one of base, brick"):
        Configuration("1" * 32, "x", "parent")
    path = store.folder("toy", digest_of_plan("p" * 32))
    (path / f"{ADD.digest[:12]}.jsonl.gz").write_bytes((path / f"{BASE.digest[:12]}.jsonl.gz").read_bytes()[:0])
    with pytest.raises(WorkbenchError, match=r"1{12}\.jsonl\.gz: the rows changed after scoring"):
        compare(store, scores)


def test_a_comparison_is_read_as_it_was_written(tmp_path: Path) -> None:
    comparison = situation("winner")
    comparison.write(tmp_path / "comparison.json")
    assert Comparison.read(tmp_path / "comparison.json") == comparison


def test_the_comparison_of_an_older_search_is_read(tmp_path: Path) -> None:
    comparison = situation("winner")
    older = comparison.to_dict()
    for c in older["configurations"]:
        del c["costs"], c["roles"]
    for task in older["tasks"]:
        del task["min_effect"]
    read = Comparison.of(older, "older")
    costs = read.configurations[0].costs
    assert (costs.seconds, costs.peak_bytes) == (comparison.configurations[0].seconds, None)
    assert costs.missing["peak_bytes"] == "the comparison was made by an earlier version"
    assert read.configurations[0].roles == ["base"]
    assert read.tasks[0].min_effect == comparison.family.min_effect
