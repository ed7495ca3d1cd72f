"""`compare` as a gate: what ends with exit status 3, the lines that say why, the marks of guarded tasks, and where no verdict can fall."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from worlds.decided import many
from worlds.toy_scores import BASE, MERGE, SUITE, stored

from workbench.cli._comparison import gate_lines, recommended, rows_table, scores_table, unlisted
from workbench.cli.app import app
from workbench.compare.compare import compare
from workbench.compare.comparison import Comparison
from workbench.console.output import out
from workbench.report.scorecard import with_scores
from workbench.scores.store import Configuration, ScoreStore
from workbench.scores.suite import Suite

OTHER = Configuration("5" * 32, "other", "configuration", ("add", "sort"), "recipes/other.yaml")
N = 240


def right(lost: int, gained: int = 0) -> list[float]:
    """Items of a task whose first half the base gets right: one more lost, or gained, in every cluster in turn."""
    values = np.repeat([1.0, 0.0], N // 2)
    values[:lost] = 0.0
    values[N // 2 : N // 2 + gained] = 1.0
    return values.tolist()


def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    facts: dict[Configuration, list[float]],
    *options: str,
    code: int,
    suite: Suite = SUITE,
    clusters: int = 30,
    skill: Sequence[float] | None = None,
) -> Result:
    """Run `compare` over stored scores: `facts` are the items of the guarded task, `skill` those of another one; nothing else changes."""
    store = ScoreStore(tmp_path / "scores")
    values = {BASE: [right(0)] * 3, **{c: [right(0), skill or right(0), line] for c, line in facts.items()}}
    scores = stored(store, values, suite=suite, clusters=clusters)
    monkeypatch.setattr("workbench.api.results.imported_scores", lambda *_: (scores, store, tmp_path))
    result = CliRunner().invoke(app, ["compare", *(c.name for c in values), *options], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_a_loss_on_a_guarded_task_ends_with_3_and_the_last_line_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, monkeypatch, {MERGE: right(60), OTHER: right(0)}, code=3)
    assert found.stderr.splitlines()[-1] == "exit status 3: merge is worse than base on facts"
    assert "On facts (tolerance 2.0 points), merge is worse than base; other is safe." in found.stderr
    assert "worse (tolerance 2.0)" in found.stdout
    found = run(tmp_path / "both", monkeypatch, {MERGE: right(60)}, code=3, skill=right(60))
    assert [line for line in found.stderr.splitlines() if "exit" in line] == [
        "exit status 3: merge is worse than base on sort, facts"
    ]


def test_require_safe_refuses_what_is_not_shown_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {MERGE: right(12, 10)}
    found = run(tmp_path / "plain", monkeypatch, facts, code=0)
    assert "exit status" not in found.stderr
    assert "not shown safe (tolerance 2.0" in found.stdout
    assert "merge (a loss of up to " in found.stderr
    found = run(tmp_path / "strict", monkeypatch, facts, "--require-safe", code=3)
    assert found.stderr.splitlines()[-1] == "exit status 3: merge is not shown safe (--require-safe) on facts"
    found = run(tmp_path / "json", monkeypatch, facts, "--require-safe", "--json", code=3)
    (row,) = [r for r in json.loads(found.stdout)["rows"] if r["task"] == "facts"]
    assert row["verdict"] == "not shown safe"


def test_what_is_safe_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = SUITE.model_copy(update={"tolerance": 0.2})
    found = run(tmp_path, monkeypatch, {MERGE: right(12, 10)}, "--require-safe", code=0, suite=wide)
    assert "safe (tolerance 20.0)" in found.stdout
    assert "On facts (tolerance 20.0 points), merge is safe." in found.stderr


def test_without_a_tolerance_nothing_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guarded metric in its own unit for which the suite gives no tolerance is a gate too."""
    own = SUITE.model_copy(update={"primary": {**SUITE.primary, "facts": "points"}})
    raw = {c: [10 * v for v in line] for c, line in {BASE: right(0), MERGE: right(12, 10)}.items()}
    found = run(tmp_path, monkeypatch, raw, "--require-safe", code=3, suite=own)
    assert "is worse than base" not in found.stderr
    assert found.stderr.splitlines()[-1] == "exit status 3: merge is not shown safe (--require-safe) on facts"
    assert "merge (the suite gives no tolerance)" in found.stderr


def test_both_reasons_are_said_and_named_once(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    scores = stored(
        store,
        {
            c: [right(0), a, f]
            for c, a, f in ((BASE, right(0), right(0)), (MERGE, right(60), right(60)), (OTHER, right(0), right(12, 10)))
        },
    )
    result = compare(store, scores)
    assert gate_lines(result.worse, result.not_safe, "base") == [
        "exit status 3: merge is worse than base on sort, facts",
        "exit status 3: other is not shown safe (--require-safe) on facts",
    ]
    assert gate_lines([], [], "base") == []


def test_a_model_card_names_the_tolerance(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    scores = stored(store, {BASE: [right(0)] * 3, MERGE: [right(0), right(0), right(60)]})
    comparison = compare(store, scores)
    card = with_scores("# merge\n", "merge", scores[1:], comparison)
    (line,) = [line for line in card.splitlines() if line.startswith("| facts")]
    assert line.endswith("| worse (tolerance 0.02) |")
    assert "| add | em | 240 |" in card
    assert "Holm" not in card
    assert f"that decide the verdict (step-down max-T at 0.05; {comparison.family.text})." in card
    assert "Safe: the interval, adjusted for all guarded comparisons, includes no loss as large as the tolerance" in card


def test_marks_beside_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    store = ScoreStore(tmp_path)
    third = Configuration("6" * 32, "third", "configuration")
    facts = {BASE: right(0), MERGE: right(60), OTHER: right(12, 10), third: right(0, 40)}
    scores_table(compare(store, stored(store, {c: [right(0), right(0), line] for c, line in facts.items()})), [])
    found = capsys.readouterr()
    lines = {line.split()[0]: line for line in found.out.splitlines()[1:]}
    assert "] \N{MINUS SIGN}" in lines["merge"]
    assert "] !" in lines["other"]
    assert "] ~" in lines["third"]
    assert not any(mark in lines["base"] for mark in ("] \N{MINUS SIGN}", "] !", "] ~", "] +"))
    assert "~ safe, ! not shown safe (guarded tasks)" in found.err


def test_where_no_verdict_can_fall_is_said_without_needs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The document's own words decide: whatever finds that no verdict can fall, the terminal says what would help."""
    store = ScoreStore(tmp_path)
    document = compare(store, stored(store, {BASE: [right(0)] * 3, MERGE: [right(2, 1), right(0), right(0)]})).to_dict()
    for row in document["rows"]:
        if row["task"] == "add":
            row |= {"verdict": "cannot tell", "needs": None, "mde": 0.1, "clusters": 10}
            row["reason"] = (
                "no difference can be significant: even if all 10 changed clusters had changed in the same direction, the adjusted p would be 0.13; "
                "more clusters or fewer comparisons are needed"
            )
    rows_table(Comparison.of(document, "made"))
    found = capsys.readouterr()
    (line,) = [line for line in found.out.splitlines() if line.split()[:2] == ["merge", "add"]]
    assert line.rstrip().endswith("cannot tell (no difference can be significant: more clusters or fewer comparisons are needed)")
    assert "No difference can be significant in 1 comparison, on add (10 clusters)" in found.err
    assert "More clusters or fewer comparisons are needed." in found.err


def narrow(monkeypatch: pytest.MonkeyPatch, width: int, colors: bool = False) -> None:
    """Give standard output the width of a terminal."""
    console = Console(
        width=width, soft_wrap=True, highlight=False, force_terminal=colors, color_system="standard" if colors else None
    )
    monkeypatch.setattr(out, "data", console)


def test_two_that_are_named_are_compared_with_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported runs: the first is the baseline; both scores stand in the table, and JSON has the rows of the second alone."""
    facts = {MERGE: right(60), OTHER: right(30)}
    store = ScoreStore(tmp_path / "scores")
    scores = stored(store, {c: [right(0), right(0), line] for c, line in facts.items()})
    monkeypatch.setattr("workbench.api.results.imported_scores", lambda *_: (scores, store, tmp_path))
    found = CliRunner().invoke(app, ["compare", "merge", "other"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    at = lines.index("other against merge")
    assert lines[at + 1].split()[:5] == ["task", "metric", "merge", "other", "diff"]
    (row,) = [line.split() for line in lines if line.startswith("facts")]
    assert row[:5] == ["facts", "acc", "25.0", "37.5", "+12.5"]
    document = json.loads(CliRunner().invoke(app, ["compare", "merge", "other", "--json"], catch_exceptions=False).stdout)
    assert document["baseline"] == "merge"
    assert {r["configuration"] for r in document["rows"]} == {"other"}
    assert document["recommendation"]["baseline"] == "merge"
    turned = CliRunner().invoke(app, ["compare", "merge", "other", "--baseline", "other"], catch_exceptions=False)
    assert turned.exit_code == 3
    assert "against" not in turned.stdout.splitlines()[-1]
    assert turned.stderr.splitlines()[-1] == "exit status 3: merge is worse than other on facts"


def test_the_recommendation_is_printed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reasons below it, or the commands that follow it."""
    found = run(tmp_path, monkeypatch, {MERGE: right(60), OTHER: right(0)}, code=3)
    lines = found.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("No configuration can be recommended: none has a higher mean"))
    assert lines[at + 1].startswith("  what would help: ")
    assert all(line.startswith("  ") for line in lines[at + 1 :])


def test_of_many_the_terminal_shows_the_best_and_no_interval_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 80 columns `eval` shows the baseline and the five best, one sentence for each reason to withhold ratios, then what to ship and how."""
    comparison = many(24, ("dates", "triage", "units"))
    narrow(monkeypatch, 80)
    scores_table(comparison, [])
    recommended(comparison)
    found = capsys.readouterr()
    lines = found.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line.count("[") == line.count("]") for line in lines)
    means = {c.name: c.level for c in comparison.configurations}
    names = list(dict.fromkeys(line.split()[0] for line in lines if line.split()[0] in means))
    assert names[:5] == sorted(means, key=lambda name: -means[name])[:5]
    assert "base" in names
    assert len(names) <= 7
    assert unlisted(comparison) == len(means) - len(names)
    about = comparison.recommendation
    assert about is not None
    assert lines[-len(about.command) :] == [f"  {command}" for command in about.command]
    assert lines[-len(about.command)] == f"  workbench run {about.configuration}"
    assert found.err.count("withheld") == len({(task, reason) for _, task, reason in comparison.withheld})
    rows_table(comparison)  # of `compare`: every configuration, in blocks of this width
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line for line in lines if line in means} == set(means) - {"base"}


@pytest.mark.parametrize("pair", [False, True])
def test_a_table_fits_a_terminal_of_100_columns(
    pair: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ScoreStore(tmp_path)
    long = Configuration("7" * 32, "a-configuration-with-a-long-name-of-its-own", "configuration")
    values = {BASE: right(0), long: right(12, 10), OTHER: right(60)}
    document = compare(store, stored(store, {c: [right(3), right(0), line] for c, line in values.items()}))
    narrow(monkeypatch, 100)
    rows_table(document, ("base", long.name) if pair else None)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("  facts: tolerance 2.0") for line in lines)
    assert [line for line in lines if line in (long.name, "other")] == ([] if pair else [long.name, "other"])
    rows = [line.split() for line in lines if line.startswith("facts ")]
    assert len(rows) == (1 if pair else 2)
    assert all(any(cell.startswith("[") for cell in row) for row in rows)


def test_more_tasks_than_fit_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tuple(f"a-task-with-a-name-{i}" for i in range(9))
    suite = Suite(suite="wide", tasks=tasks, primary=dict.fromkeys(tasks, "em"), roles=dict.fromkeys(tasks, "retention"))
    store = ScoreStore(tmp_path)
    values = {BASE: [right(0)] * 9, MERGE: [right(0)] * 8 + [right(60)]}
    document = compare(store, stored(store, values, suite=suite))
    narrow(monkeypatch, 90)
    scores_table(document, [])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "base", "merge"]
    assert [row.split()[0] for row in rows] == list(tasks), "no row for the mean and the kept skill, which nothing has"
    assert rows[0].split("  ")[-2:] == ["50.0 [43.2, 56.8]", "50.0 [43.2, 56.8] !"]
    assert rows[-1].split("  ")[-1].startswith("25.0 [")
    assert rows[-1].endswith("] \N{MINUS SIGN}")
    narrow(monkeypatch, 400)
    scores_table(document, [])
    assert capsys.readouterr().out.split()[0] == "configuration"


def test_verdicts_have_colors_on_a_terminal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ScoreStore(tmp_path)
    document = compare(store, stored(store, {c: [right(0), right(0), f] for c, f in ((BASE, right(0)), (OTHER, right(60)))}))
    narrow(monkeypatch, 300)
    rows_table(document)
    assert "\x1b[" not in capsys.readouterr().out
    narrow(monkeypatch, 300, colors=True)
    rows_table(document)
    assert "\x1b[31mworse (tolerance 2.0)" in capsys.readouterr().out


def test_names_of_columns_may_be_those_of_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ScoreStore(tmp_path)
    verdict, n = Configuration("8" * 32, "verdict"), Configuration("9" * 32, "n")
    scores = stored(store, {verdict: [right(0), right(0), right(60)], n: [right(0), right(0), right(0)]})
    narrow(monkeypatch, 300)
    rows_table(compare(store, scores, baseline="verdict"), ("verdict", "n"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["task", "metric", "verdict", "n", "diff", "95", "%", "adjusted", "p", "adj", "n", "verdict"]
