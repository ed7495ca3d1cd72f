"""Comparisons of corpus metrics, of metrics where lower is better, of contrasts; margins beside verdicts; forgetting; damaged rows."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worlds.metric_scores import BASE, MISSING, SUITE, TASKS, A, Data, N, data, stored
from worlds.report_page import render

from workbench.cli._comparison import rows_table, scores_table
from workbench.compare.compare import Comparison, compare
from workbench.ground.errors import WorkbenchError
from workbench.ground.numbers import about
from workbench.report.numbers import unit_of
from workbench.scores.paired import paired
from workbench.scores.statistics import ratio
from workbench.scores.store import Configuration, Metric, ScoreStore
from workbench.scores.suite import Suite


def made(tmp_path: Path, base: Data, a: Data, **suite: Any) -> Comparison:
    """`a` against the base; `suite` replaces fields of the suite's analysis."""
    store = ScoreStore(tmp_path / "scores")
    return compare(store, stored(store, {BASE: base, A: a}), suites={"toy": SUITE.model_copy(update=suite)})


def test_corpus_metrics_and_lower_is_better(tmp_path: Path) -> None:
    base, better = data(), data(1, loss=0.8, error=0.3)
    result = made(tmp_path, base, better)
    rows = {r.task: r for r in result.rows}
    expected = [math.exp(-sum(x for x, _ in d["text"]) / sum(w for _, w in d["text"])) for d in (base, better)]
    assert (rows["text"].baseline_value, rows["text"].value) == pytest.approx(tuple(expected))
    assert rows["text"].diff == pytest.approx(expected[1] - expected[0])
    assert (rows["text"].verdict, rows["text"].lower, rows["text"].ratio, rows["text"].metric) == (
        "better",
        True,
        True,
        "word_perplexity",
    )
    assert rows["text"].low_adj <= rows["text"].low < rows["text"].diff < rows["text"].high <= rows["text"].high_adj < 0
    assert (rows["text"].wins, rows["text"].losses) == (N, 0)  # fewer nats on every text
    assert (rows["told"].verdict, rows["told"].lower, rows["told"].ratio) == ("better", True, False)
    assert rows["told"].diff < 0
    document = result.to_dict()
    summary = document["configurations"][1]
    assert summary["scores"]["text"]["corrected"] is None
    low, high = (summary["scores"]["text"][k] for k in ("low", "high"))
    assert low < expected[1] < high
    assert summary["mean"]["value"] == pytest.approx(
        (summary["scores"]["pick"]["value"] - 0.25) / 0.75
    )  # corpus metrics and errors apart
    tasks = {t["task"]: t for t in document["tasks"]}
    assert (tasks["text"]["ratio"], tasks["text"]["lower"], tasks["text"]["min_effect"]) == ("weighted_perplexity", True, 0.5)
    assert (tasks["told"]["ratio"], tasks["told"]["lower"], tasks["told"]["min_effect"]) == (None, True, 0.02)
    assert {f["task"] for f in document["flips"]["a"]} <= {"told", "stripped", "pick", "facts"}


def test_a_loss_is_worse_and_gates(tmp_path: Path) -> None:
    result = made(tmp_path, data(), data(1, loss=1.2, error=0.5))
    assert {r.task for r in result.worse} >= {"text", "told"}
    row = next(r for r in result.rows if r.task == "text")
    assert (row.wins, row.losses) == (0, N)


def test_equivalence_of_perplexities_needs_a_margin(tmp_path: Path) -> None:
    base, near = data(), data(1)
    row = next(r for r in made(tmp_path, base, near).rows if r.task == "text")
    assert row.verdict == "equivalent"  # within 0.5 of each other
    row = next(r for r in made(tmp_path, base, near, min_effect=0.02).rows if r.task == "text")
    assert row.verdict == "cannot tell"
    assert row.reason == "the adjusted interval includes 0, and the suite gives no min_effect for this metric"
    assert row.needs is not None
    assert row.mde is not None


def test_contrast_pairs_two_tasks_by_id(tmp_path: Path) -> None:
    base, a = data(), data(1, stripped=0.75)
    result = made(tmp_path, base, a)
    row = next(r for r in result.rows if r.task == "prior_gain")
    gain = [np.mean(d["stripped"]) - np.mean(d["told"]) for d in (base, a)]
    assert (row.baseline_value, row.value) == pytest.approx(tuple(gain))
    cluster = [i % 30 for i in range(N)]
    items = [np.subtract(d["stripped"], d["told"]) for d in (base, a)]
    assert (row.low, row.high) == pytest.approx(paired(*items, cluster, span=2.0).interval())
    assert (row.verdict, row.lower, row.metric, row.companion) == ("better", False, "error", None)
    document = result.to_dict()
    about = document["tasks"][-1]
    assert about["contrast"] == {"of": "stripped", "minus": "told"}
    assert (about["task"], about["role"], about["n"], about["clusters"]) == ("prior_gain", "other", N, 30)
    assert document["family"]["text"] == (
        "primary metric of 4 tasks and 1 contrast x 1 configuration against base; 1 guarded task tested separately"
    )
    assert document["family"]["size"] == 5
    assert not [w for w in document["warnings"] if "have a matching item" in w], "all have one"


def test_margin_goes_beside_choices(tmp_path: Path) -> None:
    base, a = data(), data(1, lead=0.13)
    result = made(tmp_path, base, a)
    rows = {r.task: r for r in result.rows}
    assert rows["told"].companion is None
    found = rows["pick"].companion
    assert found is not None
    margins = [[x[0] - max(x[1:]) for x in d["pick"]] for d in (base, a)]
    pair = paired(*margins, [i % 30 for i in range(N)])
    assert (found.metric, found.unit) == ("margin", "nats")
    assert (found.diff, found.low, found.high, found.p) == pytest.approx((pair.diff, *pair.interval(), pair.p))
    assert found.baseline_value == pytest.approx(np.mean(margins[0]))
    # The margin as primary metric: no companion, and no mean with scores in [0, 1].
    again = made(tmp_path, base, a, primary={"pick": "margin"})
    row = next(r for r in again.rows if r.task == "pick")
    assert (row.metric, row.companion, row.verdict) == ("margin", None, "better")
    assert again.to_dict()["configurations"][0]["mean"] is None


def test_forgetting_is_the_retention_lost(tmp_path: Path) -> None:
    document = made(tmp_path, data(), data(1, facts=0.7)).to_dict()
    assert document["configurations"][0]["forgetting"] is None
    found, row = document["configurations"][1]["forgetting"], next(r for r in document["rows"] if r["task"] == "facts")
    assert found["diff"] == pytest.approx(row["diff"] / 0.5)
    assert (found["low"], found["high"]) == pytest.approx((row["low"] / 0.5, row["high"] / 0.5), abs=0.02)
    assert found["verdict"] == "worse"
    few = made(tmp_path / "same", data(), data(1)).to_dict()["configurations"][1]["forgetting"]
    assert few == {"diff": 0.0, "low": 0.0, "high": 0.0, "verdict": "safe"}


def test_forgetting_is_judged_by_the_corrected_tolerance(tmp_path: Path) -> None:
    """One retention task: what is safe of its row, alone, is safe of forgetting, at any chance."""
    for tolerance, verdict in ((0.1, "safe"), (0.05, "worse")):
        made_with = made(
            tmp_path / verdict, data(), data(1, facts=0.85), chance={"pick": 0.25, "facts": 0.5}, tolerance=tolerance
        )
        row = next(r for r in made_with.rows if r.task == "facts")
        assert row.low > -0.1
        assert made_with.to_dict()["configurations"][1]["forgetting"]["verdict"] == row.verdict == verdict


def test_forgetting_over_few_clusters_is_the_paired_interval(tmp_path: Path) -> None:
    store, wrong = ScoreStore(tmp_path), data(1, facts=0.7)
    for clusters, verdict in ((6, "not shown safe"), (12, "worse")):
        document = compare(store, stored(store, {BASE: data(), A: wrong}, clusters=clusters)).to_dict()
        found, row = document["configurations"][1]["forgetting"], next(r for r in document["rows"] if r["task"] == "facts")
        expected = {k: None if row[k] is None else pytest.approx(row[k] / 0.5) for k in ("diff", "low", "high")}
        assert found == {**expected, "verdict": verdict}
        shutil.rmtree(store.root)


def test_without_correction_every_level_is_alpha(tmp_path: Path) -> None:
    base, a = data(), data(1, error=0.405, facts=0.85)
    corrected = made(tmp_path, base, a)
    plain = made(tmp_path, base, a, correction="none")
    assert all(r.p_adj == r.p and (r.low_adj, r.high_adj) == (r.low, r.high) for r in plain.rows)
    assert any(r.p_adj > r.p for r in corrected.rows)
    document = plain.to_dict()
    assert document["family"]["correction"] == "none"
    expected = "5 comparisons are tested at 0.05 each, without correction: if no configuration differs, about 0.25 false verdicts of better or worse are expected."
    assert expected in document["warnings"]


def test_equal_weights_under_two_names(tmp_path: Path) -> None:
    store, again = ScoreStore(tmp_path), Configuration(BASE.digest, "again", "configuration")
    base, worse = stored(store, {BASE: data(), A: data(1, error=0.6)})
    result = compare(store, [base, base.called(again), worse])
    rows = {(r.configuration, r.task): r.verdict for r in result.rows}
    assert {v for (c, _), v in rows.items() if c == "again"} == {"no item changed"}
    assert result.to_dict()["family"]["size"] == 5  # not tested, not counted
    both = compare(store, [base, worse.called(Configuration(A.digest, "average", "average")), worse])
    assert {r.configuration for r in both.worse} == {"a"}  # a named recipe gates although a control has its weights
    alone = compare(store, [worse, worse], baseline="a")
    assert {r.verdict for r in alone.rows} == {"no item changed"}
    for path in render(result.to_dict(), tmp_path / "report.html"):
        assert path.stat().st_size


def spoil(base: Data, how: str) -> Data:
    if how == "NaN":
        base["told"][3] = math.nan
    elif how == "no weight":
        base["text"][3] = -1.0
    elif how == "weights":
        base["text"][3] = (base["text"][3][0], base["text"][3][1] + 1)
    elif how == "missing":
        base["told"][3] = MISSING
    return base


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("NaN", r"1{12}\.jsonl\.gz:\d+: not JSON: NaN, expected a finite number"),
        ("no weight", r"'a', item '3' of 'text': word_perplexity is -1.0, expected a log-likelihood and a weight"),
        ("weights", r"items of 1{12} on 'text' have other weights"),
        ("missing", r"'a' has no 'error' for item '3' of 'told'"),
    ],
)
def test_damaged_rows(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message) as error:
        made(tmp_path, data(), spoil(data(1), how))
    assert "score again" in str(error.value.hint)


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        ({"of": "stripped", "minus": "facts", "metric": "error"}, "task 'facts' has no metric 'error'"),
        ({"of": "pick", "minus": "told", "metric": "erorr"}, "task 'pick' has no metric 'erorr'"),
        ({"of": "text", "minus": "told"}, "task 'told' has no metric 'word_perplexity'"),
    ],
)
def test_bad_contrasts(tmp_path: Path, contrast: dict[str, str], message: str) -> None:
    suite, store = Suite.model_validate({**SUITE.model_dump(), "contrasts": {"c": contrast}}), ScoreStore(tmp_path)
    with pytest.raises(WorkbenchError, match=message):
        compare(store, stored(store, {BASE: data(), A: data(1)}, suite))


def test_scores_that_do_not_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other items, texts without a word, and a contrast of a metric of which an item has no score."""
    store = ScoreStore(tmp_path / "ids")
    before = stored(store, {BASE: data()})
    with pytest.raises(WorkbenchError, match=r"items of 0{12} on 'facts' differ from the plan's items"):
        compare(store, [*stored(store, {A: data(1)}, common=24), *before])
    empty = {**data(), "text": [(numerator, 0) for numerator, _ in data()["text"]]}
    with pytest.raises(WorkbenchError, match="all weights of 'word_perplexity' on 'text' are 0"):
        made(tmp_path / "empty", empty, empty)
    monkeypatch.setitem(TASKS, "facts", TASKS["text"])
    suite = Suite.model_validate({**SUITE.model_dump(), "contrasts": {"c": {"of": "text", "minus": "facts"}}})
    store, values = ScoreStore(tmp_path / "ratio"), {c: {**data(), "facts": data()["text"]} for c in (BASE, A)}
    with pytest.raises(WorkbenchError, match="contrast 'c': 'word_perplexity' is computed from all items together"):
        compare(store, stored(store, values, suite))


def test_contrast_without_common_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "facts", ("generate_until", ("error",), (), {}))
    suite, store = (
        Suite.model_validate({**SUITE.model_dump(), "contrasts": {"c": {"of": "told", "minus": "facts"}}}),
        ScoreStore(tmp_path),
    )
    with pytest.raises(
        WorkbenchError, match=r"'told' and 'facts' have no item id in common; their first ids are '0' and 'facts-0'"
    ) as error:
        compare(store, stored(store, {BASE: data(), A: data(1)}, suite))
    assert "the same ids" in str(error.value.hint)
    other = ScoreStore(tmp_path / "some")
    found = compare(other, stored(other, {BASE: data(), A: data(1)}, suite, common=24))
    assert "c: 24 of 240 items have a matching item in the other task; the others are ignored." in found.warnings
    assert {row.n for row in found.rows if row.task == "c"} == {24}


def test_value_is_the_ratio_of_sums(tmp_path: Path) -> None:
    base = data()
    suite = SUITE.model_copy(update={"primary": {"text": "bits_per_byte"}})
    store = ScoreStore(tmp_path)
    result = compare(store, stored(store, {BASE: base, A: data(1, loss=0.9)}, suite))
    row = next(r for r in result.rows if r.task == "text")
    numerators, weights = zip(*base["text"], strict=True)
    assert (
        row.baseline_value
        == ratio("bits_per_byte", numerators, weights)
        == pytest.approx(-sum(numerators) / sum(weights) / math.log(2))
    )


def test_terminal_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of each metric; beside "cannot tell" the smallest difference that would be found, the items needed, the margin."""
    monkeypatch.setenv("COLUMNS", "400")
    base, a = data(), data(1, loss=0.8, error=0.3, lead=0.13, facts=0.85)
    result = made(tmp_path, base, a)
    rows_table(result)
    found = capsys.readouterr()
    lines = {line.split()[1]: line for line in found.out.splitlines() if line.startswith("a ")}
    rows = {r.task: r for r in result.rows}
    assert unit_of(result, "text").diff(rows["text"].diff) in lines["text"]
    assert unit_of(result, "told").diff(rows["told"].diff) in lines["told"]
    row = rows["pick"]
    assert row.mde is not None
    assert row.companion is not None
    assert f"cannot tell (mde {100 * row.mde:.1f}, needs about n = {about(row.needs)})" in lines["pick"]
    assert f"{row.companion.diff:+.2f} [" in lines["pick"]
    lost = rows["facts"]
    assert lost.stands_up_to is not None
    assert f"worse (tolerance 2.0, unless an unseen item rises by {100 * lost.stands_up_to:.1f})" in lines["facts"]
    assert "(of text in the metric's own units) against base" in found.err
    assert "lower is better: text, told, stripped" in found.err
    family = result.to_dict()["family"]
    told = f"{family['compared']} comparisons in the main family; tested separately: {family['guarded']} on guarded tasks"
    assert f"step-down max-T at 0.05: {told}" in found.err
    assert "On facts (tolerance 2.0 points), a is worse than base." in found.err
    scores_table(result, [])
    found = capsys.readouterr()
    assert "mean over skills" in found.err
    assert found.err.splitlines()[0].endswith("~ safe, ! not shown safe (guarded tasks)")


def test_an_interval_without_ends_is_kept() -> None:
    """One item of a metric without a range: JSON has no infinity, and what was stored is read again."""
    metric = Metric.of([4.5], np.array([0]))
    assert (metric.low, metric.high) == (-math.inf, math.inf)
    assert Metric.model_validate_json(metric.model_dump_json()) == metric
