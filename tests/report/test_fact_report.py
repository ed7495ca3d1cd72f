"""What survives of an edit, and the report's view of facts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from worlds.commands import call
from worlds.fact_world import EDIT, F32, lay_out
from worlds.project import Project
from worlds.report_additions import with_facts
from worlds.report_document import make_document
from worlds.report_page import Page, render

from workbench.compare.survival import facts_of as edited_facts_of
from workbench.compare.tables import Table
from workbench.scores.paired import paired
from workbench.scores.statistics import codes, score_interval
from workbench.scores.store import Configuration, Scores
from workbench.scores.suite import FactTasks, Suite

FACTS = "f" * 32
SUITE = Suite(
    suite="towns-facts", tasks=("towns-efficacy", "towns-paraphrase"),
    facts=FactTasks(tasks={"efficacy": "towns-efficacy", "paraphrase": "towns-paraphrase"}, source="facts/towns.jsonl", digest=FACTS))  # fmt: skip
# name -> role, parents, edits, answers to ten facts and to two paraphrases of each of the first three
LINEUP: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str, str]] = {
    "base": ("base", (), (), "1000000000", "000000"),
    "towns": ("brick", ("towns",), (FACTS,), "1111111100", "110111"),
    "add": ("brick", ("add",), (), "0000000001", "000000"),
    "merged": ("configuration", ("towns", "add"), (FACTS,), "1111110011", "100110"),
    "other": ("configuration", ("add",), ("e" * 32,), "0000000000", "000000"),
}


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    return lay_out(project)


def digits(name: str) -> str:
    return (name[0] * 32)[:32]


def entry(name: str, **changes: Any) -> list[Scores]:
    role, parents, edits, *_ = LINEUP[name]
    c = Configuration(**{"digest": digits(name), "name": name, "role": role, "parents": parents, "edits": edits, **changes})
    return [Scores(suite="towns-facts", plan="p", configuration=c, seconds=0, device="cpu", created="", versions={}, tasks={})]


def table(task: str, column: int, per_fact: int) -> Table:
    values = {digits(name): np.array([float(x) for x in row[column]]) for name, row in LINEUP.items()}
    clusters = [str(i // per_fact) for i in range(values[digits("base")].size)]
    items = [{"id": str(i), "cluster": c} for i, c in enumerate(clusters)]
    return Table(
        name=task,
        metric="acc",
        suite=SUITE,
        plan="p",
        items=items,
        cluster=codes(clusters),
        values=values,
        rows={},
        kind="loglikelihood",
    )


TABLES = [table("towns-efficacy", 3, 1), table("towns-paraphrase", 4, 2)]


def facts_of(*arguments: Any) -> list[dict[str, Any]]:
    """The document's entries of edited facts."""
    return [one.to_dict() for one in edited_facts_of(*arguments)]


def wilson(share: float, n: float, clusters: int) -> tuple[float, float]:
    """Wilson's interval with a t quantile, written as the roots of (p - share)^2 = t^2 p (1 - p) / n."""
    t = stats.t.ppf(0.975, clusters - 1)
    roots = np.roots([1 + t**2 / n, -(2 * share + t**2 / n), share**2])
    return float(min(roots)), float(max(roots))


def test_survival_by_hand() -> None:
    (found,) = facts_of(TABLES, {"towns-facts": SUITE}, [entry(name) for name in LINEUP])
    assert (found["suite"], found["source"], found["facts"]) == ("towns-facts", "facts/towns.jsonl", 10)
    (left,) = found["survival"]
    assert left["alone"] == "towns"
    assert list(left["rows"]) == ["base", "add", "merged", "other"]
    assert left["without"] == ["base", "add", "other"]
    merged = left["rows"]["merged"]
    assert {k: merged["efficacy"][k] for k in ("kept", "of", "value")} == {"kept": 6, "of": 8, "value": 0.75}
    assert (merged["efficacy"]["low"], merged["efficacy"]["high"]) == pytest.approx(wilson(0.75, 8 * 7 / 8, 8)), (
        "the variance over clusters has the factor k/(k-1)"
    )
    assert left["rows"]["base"]["efficacy"]["kept"] == 1, "what was known without the edit"
    assert left["rows"]["add"]["efficacy"]["kept"] == 0, "the facts that the edit alone has wrong do not count"
    # Paraphrases: five are right with the edit alone, of three facts; the merge has the first of fact 0, and both of fact 1's two: 1 of 2, 1 of 1, 1 of 2.
    assert {k: merged["paraphrase"][k] for k in ("kept", "of")} == {"kept": 3, "of": 5}


def test_nothing_survives_where_the_edit_was_not_scored_alone() -> None:
    (found,) = facts_of(TABLES, {"towns-facts": SUITE}, [entry(name) for name in ("base", "add", "merged")])
    assert (found["survival"], found["control_missing"]) == ([], True)
    (found,) = facts_of(TABLES, {"towns-facts": SUITE}, [entry(name) for name in ("base", "towns")])
    assert (found["survival"], found["control_missing"]) == ([], False), "nothing else holds the edit"
    (found,) = facts_of(TABLES, {"towns-facts": SUITE}, [entry(name) for name in ("base", "other")])
    assert (found["survival"], found["control_missing"]) == ([], False), "nothing holds it"
    assert facts_of(TABLES, {"towns-facts": SUITE.model_copy(update={"facts": None})}, [entry("base")]) == []


def test_which_edit_is_alone_and_what_is_held_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge of the edit, the facts in a prompt and the edit with other facts are not the edit alone; a recipe of its weights is."""

    def left(*entries: list[Scores]) -> dict[str, Any]:
        (found,) = facts_of([table("towns-efficacy", 3, 1)], {"towns-facts": SUITE}, entries)
        (survival,) = found["survival"]
        return {"alone": survival["alone"], "rows": list(survival["rows"]), "without": survival["without"]}

    both = entry("other", digest=digits("other"), parents=(), edits=("e" * 32, FACTS))
    assert left(entry("base"), entry("towns"), both) == {"alone": "towns", "rows": ["base", "other"], "without": ["base"]}
    recipe = [entry("towns")[0].called(Configuration(digits("towns"), "just-towns", "configuration", ("towns",), edits=(FACTS,)))]
    found = left(entry("base"), recipe, entry("merged"))
    assert (found["alone"], found["rows"]) == ("just-towns", ["base", "merged"]), "the recipe's name is shown"
    for name, role in (("rival", "configuration"), ("in-prompt", "memory")):
        monkeypatch.setitem(LINEUP, name, (role, (), (FACTS,), "1110000000", "000000"))
        found = left(*(entry(one) for one in LINEUP))
        assert (found["alone"], found["rows"]) == ("towns", ["base", "add", "merged", "other"]), name
        monkeypatch.delitem(LINEUP, name)
    unknown = entry("merged", parents=("add",))
    assert left(entry("base"), entry("towns"), unknown)["rows"] == ["base", "merged"], "its edit can be that one alone"
    monkeypatch.setitem(LINEUP, "second", ("brick", ("second",), (FACTS,), "1110000000", "000000"))
    two = [entry(name) for name in ("base", "towns", "second")]
    assert left(*two, entry("merged")) == {"alone": "towns", "rows": ["base", "merged"], "without": ["base"]}
    (found,) = facts_of([table("towns-efficacy", 3, 1)], {"towns-facts": SUITE}, [*two, unknown])
    assert found["survival"] == [], "which of two edits it has is not known"


def test_scores_after_the_first_facts() -> None:
    """The base and what has the edit, after a number of facts that the suite names; another way to teach them is left out."""
    kinds = ["efficacy", "paraphrase", "generated", "neighbours", "portability"]
    cohorts = {5: {"first": ("0", "1"), "last": ("3", "4")}, 10: {"first": ("0", "1"), "last": ("7", "8", "9")}}
    facts = FactTasks.model_validate(
        {"tasks": {kind: f"towns-{kind}" for kind in [*kinds, "generated-paraphrase"]}, "digest": FACTS, "cohorts": cohorts}
    )
    suite = SUITE.model_copy(update={"tasks": tuple(facts.tasks.values()), "facts": facts})
    tables = [replace(table(task, 3, 1), suite=suite) for task in suite.tasks]
    others = [entry("add"), entry("add", edits=(FACTS,), first=7), entry("other", edits=(FACTS,), role="memory")]
    entries = [entry("base"), entry("towns", first=5), entry("merged"), *others]
    (found,) = facts_of(tables, {"towns-facts": suite}, entries)
    steps = {(step["configuration"], step["facts"]): step["cohorts"] for step in found["sequence"]}
    assert list(steps) == [("base", 0), ("towns", 5), ("merged", 10)]
    assert [list(shares) for step in steps.values() for shares in step.values()] == [kinds] * 6
    values = {key: [(step[c]["efficacy"]["value"], step[c]["efficacy"]["n"]) for c in step] for key, step in steps.items()}
    assert values["base", 0] == [(0.5, 2), (0.0, 3)]
    assert values["towns", 5] == [(1.0, 2), (1.0, 2)]
    assert values["merged", 10] == [(1.0, 2), (pytest.approx(2 / 3), 3)]
    last = steps["merged", 10]["last"]["portability"]
    assert (last["low"], last["high"]) == score_interval(np.array([0.0, 1.0, 1.0]), np.arange(3))


def test_report(tmp_path: Path) -> None:
    document = with_facts(make_document())
    html, markdown, data = (p.read_text("utf-8") for p in render(document, tmp_path / "report"))
    page = Page(html)
    assert "edited" in page.ids
    head, *rows = page.tables["facts-towns-facts"]
    assert head == ["Configuration", "Efficacyteacher-forced", "Paraphraseteacher-forced"]
    assert len(rows) == len(document["configurations"])
    ties = next(row for row in rows if row[0].startswith("starter-ties"))
    score = next(c for c in document["configurations"] if c["name"] == "starter-ties")["scores"]["add"]
    assert ties[1].split("[")[0].strip() == f"{100 * score['value']:.1f}"
    head, *rows = page.tables["survival-towns-facts-1"]
    assert [row[:2] for row in rows] == [
        ["starter-tiesadd + reverse + triage", "15 of 2075 [55, 90] %"],
        ["basewithout this edit", "1 of 205 [0, 20] %"],
    ]
    assert "Right answers of other configurations among these: starter-ties 15 (75 [55, 90] %)." in html
    assert "<i>" not in html.split('id="edited"')[1].split("</section>")[0], "texts are escaped"
    assert "### facts/towns\\|&lt;i&gt;.jsonl: 24 facts" in markdown
    assert "| starter-ties | 15 of 20 (75 \\[55, 90\\] %) |" in markdown
    assert json.loads(data)["facts"][0]["survival"][0]["rows"]["base"]["efficacy"]["kept"] == 1
    plain, short, _ = (p.read_text("utf-8") for p in render(make_document(), tmp_path / "plain"))
    assert "edited" not in Page(plain).ids
    assert "## Facts" not in short


def test_facts_that_survive_a_merge(world: Project) -> None:
    ran = world.run((world.path / "recipes" / "edit.yaml").read_text(), "edit.yaml")
    (world.path / "here").mkdir()
    (world.path / "here" / "towns").symlink_to(Path(ran["run"]) / "edits" / "edit-finetune")
    text = "bricks: {towns: here/towns, two: bricks/two}\nsteps: [{merge: task_arithmetic}]\neval: [edits]\n" + F32
    world.write(text, "kept.yaml")
    call("eval", "kept")
    call("report", "kept", "-o", "report.html")
    document = json.loads((world.path / "report.json").read_text("utf-8"))
    (entry,) = document["facts"]
    (left,) = entry["survival"]
    assert left["alone"] == "towns"
    assert set(left["rows"]) == {"base", "two", "average", "kept"}
    scores = {c["name"]: c["scores"] for c in document["configurations"]}
    right = scores["towns"]["towns-efficacy"]["value"] * 3
    assert right >= 1
    assert left["rows"]["kept"]["efficacy"]["of"] == math.floor(right + 0.5)
    assert "Survival of towns" in (world.path / "report.html").read_text("utf-8")
    world.write(EDIT + F32 + "eval: [edits]\n", "edit.yaml")
    call("eval", "edit", "kept")
    call("report", "edit", "kept", "-o", "report.html")
    (entry,) = json.loads((world.path / "report.json").read_text("utf-8"))["facts"]
    assert [left["alone"] for left in entry["survival"]] == ["edit"], (
        "the brick alone and its recipe are the same weights: one row"
    )


WRITTEN = SUITE.model_copy(
    update={
        "tasks": ("towns-efficacy", "towns-generated"),
        "facts": FactTasks(
            tasks={"efficacy": "towns-efficacy", "generated": "towns-generated"}, source="facts/towns.jsonl", digest=FACTS
        ),
    }
)


def written_tables(forced: str, exact: str, begins: str) -> list[Table]:
    """Answers of `towns` to facts by id; the generated ones are stored in the opposite order."""
    efficacy = replace(table("towns-efficacy", 3, 1), suite=WRITTEN)
    items = [{"id": str(i), "cluster": str(i)} for i in range(len(forced))]
    backwards = items[::-1]
    values = {digits("towns"): np.array([float(x) for x in exact[::-1]])}
    rows = {digits("towns"): [{"id": "", "cluster": "", "metrics": {"starts_with": float(x)}} for x in begins[::-1]]}
    generated = Table("towns-generated", "exact_match", WRITTEN, "p", backwards, np.arange(len(forced)), values, rows)
    forced_values = {digits("towns"): np.array([float(x) for x in forced])}
    return [replace(efficacy, items=items, cluster=np.arange(len(forced)), values=forced_values), generated]


def test_generated_answers_beside_teacher_forced_ones() -> None:
    forced, exact, begins = "1" * 18 + "00", "1" * 6 + "0" * 14, "1" * 15 + "0" * 5
    entries = [entry("base"), entry("towns"), entry("add")]
    (found,) = facts_of(written_tables(forced, exact, begins), {"towns-facts": WRITTEN}, entries)
    (row,) = found["generation"]
    assert (row["configuration"], row["n"]) == ("towns", 20), "base and add are not edited for the facts"
    assert [row[k]["value"] for k in ("exact", "begins", "forced")] == pytest.approx([0.3, 0.75, 0.9])
    same = paired([float(x) for x in forced], [float(x) for x in exact])
    assert (row["gap"]["diff"], row["gap"]["low"], row["gap"]["high"]) == pytest.approx((-0.6, *same.interval(0.05)))
    assert row["gap"]["high"] < 0
    # Paired by id: if the order of the rows counted, three more facts would differ.
    (found,) = facts_of(written_tables(forced, forced, forced), {"towns-facts": WRITTEN}, entries)
    assert found["generation"][0]["gap"] == {"diff": 0, "low": 0, "high": 0}
    (found,) = facts_of(TABLES, {"towns-facts": SUITE}, entries)
    assert found["generation"] == [], "nothing was generated"


def test_the_report_names_the_gap_where_it_is_shown(tmp_path: Path) -> None:
    document = with_facts(make_document())
    share = {"low": 0.2, "high": 0.5}
    row = {
        "configuration": "base",
        "n": 20,
        "exact": {"value": 0.3, **share},
        "begins": {"value": 0.75, "low": 0.6, "high": 0.9},
        "forced": {"value": 0.9, "low": 0.7, "high": 1.0},
        "gap": {"diff": -0.6, "low": -0.8, "high": -0.4},
    }
    document["facts"][0]["generation"] = [
        row,
        {**row, "configuration": "starter-ties", "begins": None, "gap": {"diff": -0.1, "low": -0.3, "high": 0.1}},
    ]
    html, markdown, _ = (p.read_text("utf-8") for p in render(document, tmp_path / "report"))
    told = "generates the target and stops for 30 [20, 50] % of the facts"
    gap = "This is 60 [40, 80] points lower than its teacher-forced efficacy of 90 %."
    assert f"base {told}; 75 [60, 90] % of the texts begin with the target. {gap}" in html
    assert f">starter-ties {told}.</p>" in html
    assert gap in markdown.replace("\\", "")
