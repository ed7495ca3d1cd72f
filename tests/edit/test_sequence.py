"""Facts one after another: checkpoints, cohorts, and their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call, document
from worlds.people import SUBJECT, write_rows
from worlds.project import CPU, Project
from worlds.report_page import Page

from workbench.evaluate.facts.wanted import Wanted, sequential
from workbench.evaluate.lineup import lineup
from workbench.evaluate.plans import suites_of
from workbench.ground.errors import WorkbenchError
from workbench.recipe.fields import FactsEval, SequentialEval
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.run.device import Work
from workbench.run.execute import execute
from workbench.scores.store import ScoreStore

RECIPE = """
base: people
steps: [{edit: memit, facts: facts.jsonl, layers: [1, 2], position: subject_last, statistics: text.txt, mode: {sequential: {batch: 2}}, unconverged: skip}]
output: {dtype: float32}
eval: [{facts: facts.jsonl, text: text.txt, sequential: {checkpoints: [2, 4, 1000], cohort: 2, sample: 3}}]
"""


@pytest.fixture
def world(tmp_path: Path, cwd: Path) -> Project:
    """Eight facts of people that are written two at a time."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "people").symlink_to(SUBJECT)
    lines = write_rows(tmp_path / "facts.jsonl", 8).read_text("utf-8").splitlines()
    prompts = [f"{p['prompt']} {p['target']}" for line in lines for p in json.loads(line)["neighbours"]]
    (tmp_path / "text.txt").write_text("".join(f"{text}\n" for text in prompts * 8), "utf-8")
    project = Project(tmp_path)
    project.write(RECIPE, "seq.yaml")
    return project


def ids(world: Project) -> list[str]:
    return [json.loads(line)["id"] for line in (world.path / "facts.jsonl").read_text("utf-8").splitlines()]


def test_checkpoints_and_cohorts(world: Project) -> None:
    recipe = load_recipe(world.path / "recipes" / "seq.yaml")
    entries = lineup([recipe])
    assert [entry.name for entry in entries] == ["base", "seq@2", "seq@4", "seq"]
    assert [entry.configuration("0" * 32).first for entry in entries] == [None, 2, 4, None]
    assert [entry.name for entry in lineup([recipe], sequences=False)] == ["base", "seq"]
    (found,) = suites_of([recipe], [], world.path)
    assert isinstance(found, Wanted)
    known = ids(world)
    assert {n: (groups["first"], groups["last"]) for n, groups in found.cohorts.items()} == {
        2: (tuple(known[:2]), tuple(known[:2])), 4: (tuple(known[:2]), tuple(known[2:4])), 8: (tuple(known[:2]), tuple(known[6:]))}  # fmt: skip
    for n, groups in found.cohorts.items():
        assert len(groups["sample"]) == min(n, 3)
        assert set(groups["sample"]) <= set(known[:n])
    assert {fact.id for fact in found.facts} == {i for groups in found.cohorts.values() for part in groups.values() for i in part}
    assert found.suite == "facts-sequential"
    small = sequential(recipe, FactsEval(facts="facts.jsonl", sequential=SequentialEval()))
    assert list(small.cohorts) == [1, 8], "numbers below the edit's own, and that"
    assert len(small.cohorts[8]["last"]) == 8, "cohorts of at least ten where batches are smaller"


def test_facts_are_taken_in_the_order_of_the_file(world: Project) -> None:
    lines = (world.path / "facts.jsonl").read_text("utf-8").splitlines()
    (world.path / "facts.jsonl").write_text("".join(f"{line}\n" for line in reversed(lines[:3])), "utf-8")
    assert ids(world) != sorted(ids(world))
    run = execute(resolve(load_recipe(world.path / "recipes" / "seq.yaml")), world.path / "runs", Work(CPU)).to_dict()
    assert [fact["id"] for fact in run["steps"][0]["facts"]] == ids(world)


def test_scores_at_every_checkpoint(world: Project) -> None:
    text = call("eval", "seq").output
    assert "sample of all so far" in text
    scores = document("eval", "seq")
    call("report", "seq", "-o", "report.html")
    report = json.loads((world.path / "report.json").read_text("utf-8"))
    (entry,) = report["facts"]
    steps = {(row["configuration"], row["facts"]): row["cohorts"] for row in entry["sequence"]}
    assert list(steps) == [("base", 0), ("seq@2", 2), ("seq@4", 4), ("seq", 8)]
    known = ids(world)
    wanted: dict[str, list[str]] = {"seq@2": known[:2], "seq@4": known[2:4], "seq": known[6:], "base": known[6:]}
    rows = right(world, scores["suite"], scores["plan"])
    for (name, _), cohorts in steps.items():
        for cohort, members in (("first", known[:2]), ("last", wanted[name])):
            for kind in ("efficacy", "generated", "neighbours"):
                found = [v for (fact, value) in rows[name][f"facts-sequential-{kind}"] for v in [value] if fact in members]
                assert cohorts[cohort][kind]["value"] == pytest.approx(sum(found) / len(found)), (name, cohort, kind)
                assert cohorts[cohort][kind]["n"] == len(found)
    assert steps["seq", 8]["sample"]["efficacy"]["value"] > 0.5, "the edit works"
    assert steps["base", 0]["sample"]["efficacy"]["value"] == 0
    assert rows["seq@2"]["facts-sequential-efficacy"] != rows["seq"]["facts-sequential-efficacy"]
    assert entry["survival"] == [], "checkpoints are no merges of the edit"
    table = Page((world.path / "report.html").read_text("utf-8")).tables["sequence-facts-sequential"]
    assert [row[:3] for row in table[1:4]] == [["base", "0", c] for c in ("first facts", "latest facts", "sample of all so far")]
    assert "### Facts added one after another: facts.jsonl" in (world.path / "report.md").read_text("utf-8")


def right(world: Project, suite: str, plan: str) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """Configuration -> task -> (fact, primary metric) of every item, from the files of the score store."""
    store = ScoreStore(world.path / "runs" / "scores")
    found: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for file in store.folder(suite, plan).glob("*.json"):
        if file.name == "plan.json":
            continue
        scores: Any = json.loads(file.read_text("utf-8"))
        rows = store.rows(_read(file))
        found[scores["configuration"]["name"]] = {
            task: [(row["id"].partition(".")[0], next(iter(row["metrics"].values()))) for row in part]
            for task, part in rows.items()
        }
    return found


def _read(file: Path) -> Any:
    from workbench.scores.store import Scores

    return Scores.model_validate_json(file.read_text("utf-8"))


def test_refusals(world: Project) -> None:
    (world.path / "others.jsonl").write_text('{"prompt": "a b", "target": "c"}\n')
    world.write(RECIPE.replace("eval: [{facts: facts", "eval: [{facts: others"), "other.yaml")
    recipe = load_recipe(world.path / "recipes" / "other.yaml")
    with pytest.raises(WorkbenchError, match=r"sequential: no edit step uses the facts of others.jsonl"):
        lineup([recipe])
    world.write(RECIPE.replace("text: text.txt,", "limit: 3,"), "both.yaml")
    with pytest.raises(WorkbenchError, match=r"`limit` and `sequential` both select facts"):
        load_recipe(world.path / "recipes" / "both.yaml")
