"""Searches end to end on a tiny model: exact, resumable, shared, honest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import call, document
from worlds.project import CPU, Project
from worlds.search_world import SPACE, folder_of, search_of, searched

from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.run.device import Work
from workbench.run.execute import execute
from workbench.scores.plan import ScorePlan
from workbench.search.run import Scoring, Search, arms, finished, open_study, prepare, run
from workbench.search.winner import conclude


def trials_of(search: Search) -> list[dict[str, Any]]:
    study = open_study(search)
    try:
        return [{k: v for k, v in r.to_dict().items() if k != "seconds"} for r in study.finished("search")]
    finally:
        study.close()


def test_a_search(world: Project) -> None:
    """From the command line: everything is counted, the winner's recipe gives the winner's bytes, and what was tested was not searched on."""
    world.write(searched(SPACE, ", trials: 6, random: 2"))
    found = document("search", "recipes/test.yaml")
    assert found["sampler"] == "gp"
    assert found["items"] == {"search": 16, "test": 40}, "both tasks are tested, one is searched on"
    assert found["stages"] == [8, 8]
    (objective,) = found["objectives"]
    assert objective["items"] == {"search": 16, "test": 20}, "of the objective's own task"
    assert objective["clusters"]["test"] == 10
    assert found["warnings"] == []
    assert [t["name"] for t in found["trials"]] == [*(f"trial-{i}" for i in range(6)), "random-0", "random-1"]
    assert found["trials"][0]["values"] == {"mix.lambda": 1.0, "mix.bricks.two": 1.0}, "the recipe as it is written comes first"
    names = [c["name"] for c in found["controls"]]
    assert names == [
        "base",
        "one",
        "two",
        "average",
        "test",
        "task-arithmetic-0.3",
        "task-arithmetic-0.6",
        "task-arithmetic-1",
        "cocktail",
    ]
    for one in [t for t in [*found["controls"], *found["trials"]] if not t.get("stopped")]:
        for score, ends in zip(one["scores"], one["intervals"], strict=True):
            assert ends is None or ends[0] <= score <= ends[1]
    control = next(c for c in found["controls"] if c["name"] == found["best_control"])
    assert control["intervals"] == [[*control["scores"], *control["scores"]]], "it does not differ from itself"
    full = [t for t in found["trials"] if t["arm"] == "search" and not t["stopped"]]
    best = max(full, key=lambda t: t["scores"][0])
    assert found["winner"] == best["name"]
    assert all(t["items"] == 8 and t["beaten_by"] for t in found["trials"] if t["stopped"])

    winner = Path(found["recipes"][best["name"]])
    ran = document("run", str(winner))
    assert ran["configuration"] == best["digest"], "in another composition, from the recipe alone"
    assert "search" not in winner.read_text().partition("version")[2]
    row = next(r for r in found["test"]["rows"] if r["name"] == best["name"])
    assert (row["digest"], row["search"]) == (best["digest"], best["scores"])
    assert {r["name"] for r in found["test"]["rows"]} >= {*names, best["name"]}
    random = [r["name"] for r in found["test"]["rows"] if r["part"] == "random"]
    assert set(found["test"]["against"]) == {best["name"], *random}
    assert {t["task"] for t in found["test"]["comparison"]["tasks"]} == {"pick", "say"}

    again = call("search", "recipes/test.yaml", "-o", "best.yaml")
    assert "6 candidates" in again.stdout
    assert (world.path / "best.yaml").read_bytes() == winner.read_bytes()
    assert len(document("search", "recipes/test.yaml", "--trials", "8")["trials"]) == 10, "a search can go on"


def test_the_base_is_put_back(world: Project) -> None:
    """After 30 candidates, bit by bit; each method of the space is a control too."""
    space = "{mix.lambda: [0.2, 5], mix.merge: [ties, dare, task_arithmetic]}"
    search = search_of(world, space, ", trials: 30, sampler: random")
    before = {name: p.detach().clone() for name, p in search.bench.model.named_parameters()}
    digest = search.bench.digest()
    run(search)
    assert len(trials_of(search)) == 30
    assert {"test", "test-dare", "test-task_arithmetic"} <= {c.name for c in search.controls}
    after = dict(search.bench.model.named_parameters())
    assert search.bench.digest() == digest
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert len(search.bench.memo) > 0, "what does not depend on weights was kept"


def test_memory_and_disk_agree(world: Project) -> None:
    """Every candidate has the digest of the checkpoint that its recipe writes, also where the memo was used."""
    search = search_of(world, rest=", trials: 5, sampler: random, controls: false")
    run(search)
    for trial in trials_of(search):
        recipe = search.space.recipe_of(trial["values"], f"alone-{trial['number']}")
        resolved = resolve(recipe)
        (resolved.cache / "configurations" / f"{resolved.key}.json").unlink()
        assert execute(resolved, world.path / "runs", Work(CPU)).configuration == trial["digest"]


def test_one_seed_one_sequence(world: Project) -> None:
    first = search_of(world, rest=", trials: 5, sampler: tpe")
    run(first)
    second = replace(first, folder=world.path / "runs" / "search" / "again", controls=[])
    run(second)
    assert trials_of(first) == trials_of(second)
    other = search_of(world, rest=", trials: 5, sampler: tpe}\nseed: 7  # {", name="other.yaml")
    run(other)
    assert [t["values"] for t in trials_of(other)] != [t["values"] for t in trials_of(first)]


def test_items_are_split_once(world: Project) -> None:
    """No item and no cluster is both searched and tested on, stages do not overlap, and the split depends on labels alone."""
    search = search_of(world)
    seen = [ids(plan, "pick") for stage in search.stages.search for plan in stage]
    test = ids(search.stages.test[0], "pick")
    assert [len(s) for s in seen] == [8, 8]
    assert len(test) == 20
    assert len(set().union(*seen, test)) == 36
    halves = search.stages.halves("words", "pick")
    assert {i.cluster for i in halves["search"]} & {i.cluster for i in halves["test"]} == set()
    assert len({i.cluster for i in halves["test"]}) == 10
    rest = search_of(world, rest=", test: 0.25", name="more.yaml").stages
    assert ids(rest.test[0], "pick") < test
    assert sum(len(ids(plan, "pick")) for stage in rest.search for plan in stage) == 16
    assert len(ids(rest.test[0], "pick")) == 10


def ids(plan: ScorePlan, task: str) -> set[str]:
    return {item.id for item in plan.items[task]}


def test_luck_is_no_verdict(world: Project) -> None:
    """Right answers are random: whatever looked best on search items is not better on others."""
    search = search_of(world, rest=", trials: 10, sampler: random")
    run(search)
    found = conclude(search).to_dict()
    ((line,),) = found["test"]["against"].values()
    assert line["verdict"] == "cannot tell"
    assert line["optimism"] == pytest.approx(line["search"]["diff"] - line["test"]["diff"], abs=2e-6)
    assert line["test"]["low"] < 0 < line["test"]["high"]
    assert line["test"]["p"] > 0.05
    assert line["reason"] == "the interval includes 0"


def test_several_objectives(world: Project) -> None:
    search = search_of(world, rest=", trials: 8, sampler: nsga2, objective: [words/pick, say]")
    run(search)
    found = conclude(search).to_dict()
    assert [o["name"] for o in found["objectives"]] == ["words/pick", "say"]
    assert found["winner"] is None
    points = {t["name"]: t["scores"] for t in found["trials"] if not t["stopped"]}
    expected = [n for n, p in points.items() if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points.values())]
    assert {tuple(points[n]) for n in found["front"]} == {tuple(points[n]) for n in expected}
    assert len(found["hypervolume"]) == 8
    assert found["hypervolume"] == sorted(found["hypervolume"])
    assert set(found["recipes"]) == set(found["front"])


def kept(world: Project) -> Path:
    return folder_of(world)


DYING = """
import os, signal, sys
from pathlib import Path
from optuna.storages.journal import JournalFileBackend
from workbench.cli.app import main

last, late = int(sys.argv.pop(1)), sys.argv.pop(1) == "after"
seen = 0

def counted(real):
    def write(*args, **kwargs):
        global seen
        seen += 1
        if seen == last and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **kwargs)
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return write

JournalFileBackend.append_logs = counted(JournalFileBackend.append_logs)
Path.replace = counted(Path.replace)
sys.argv[0] = "workbench"
main()
"""


def dying(world: Project, path: Path, last: int, when: str) -> None:
    """Search in a process that kills itself before or after its `last` write to the journal or to another file of the project."""
    command = [sys.executable, "-c", DYING, str(last), when, "search", str(path), "-q"]
    ended = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=world.path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, f"the search ended before write {last}: {ended.stderr}"


@pytest.mark.slow
def test_a_killed_search_goes_on(world: Project) -> None:
    """Kills at three writes, the first ones of a search among them: in the end the candidates are those of an uninterrupted search, each once."""
    path = world.write(searched(SPACE, ", trials: 12, sampler: tpe, controls: false"))
    for last, when in ((2, "before"), (9, "after"), (80, "before")):
        dying(world, path, last, when)
    recipe = load_recipe(path)
    search = prepare(recipe, world.path / "runs", Scoring("cpu"))
    assert 2 <= len(trials_of(search)) < 12, "the kills fall into the search"
    run(search)
    after = trials_of(search)
    assert [t["number"] for t in after] == list(range(12))
    plain = replace(prepare(recipe, world.path / "runs", Scoring("cpu")), folder=world.path / "runs" / "search" / "plain")
    run(plain)
    assert trials_of(plain) == after


@pytest.mark.slow
def test_two_processes_share_a_search(world: Project) -> None:
    path = world.write(searched(SPACE, ", trials: 9, sampler: random"))
    workers = [subprocess.Popen([sys.executable, "-m", "workbench", "search", str(path), "-q"], cwd=world.path, stderr=subprocess.PIPE,
                                stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]  # fmt: skip
    try:
        for worker in workers:
            _, text = worker.communicate()
            assert worker.returncode == 0, text.decode()
    finally:
        for worker in workers:
            worker.kill()
    found = json.loads((kept(world) / "search.json").read_text())
    assert [t["number"] for t in found["trials"]] == list(range(9))
    assert all(t["scores"] for t in found["trials"])


def test_the_random_arm_has_its_turn(world: Project) -> None:
    """Where time alone ends a search, candidates of the sampler never end."""
    search = search_of(world, rest=", budget: 1h, random: 2, controls: false")
    assert arms(search) == [("random", 2), ("search", None)]
    assert arms(replace(search, trials=5)) == [("search", 5), ("random", 2)]


def test_the_command_repeats_the_search(world: Project) -> None:
    """With what `--set` and `--limit` changed."""
    world.write(searched(SPACE, ", trials: 2, sampler: random, controls: false"))
    found = document("search", "recipes/test.yaml", "--set", "mix.density=0.7", "--limit", "30")
    assert found["command"] == "workbench search recipes/test.yaml --set mix.density=0.7 --limit 30"
    assert document(*found["command"].split()[1:])["trials"] == found["trials"]


REFUSED = {
    "no search": (None, "has no `search`"),
    "objective not in the suite": (", objective: wurds", r"test.yaml:\d+:\d+ search.objective: `eval` scores no suite or task 'wurds'. Did you mean 'words'"),
    "no such metric": (", objective: words/pick/bleu", "task 'pick' has no metric 'bleu'"),
    "no such task": (", objective: words/pock", "suite 'words' has no task 'pock'. Did you mean 'pick'"),
    "twice": (", objective: [words/pick, pick]", "two objectives are the same"),
    "cmaes on words": (", sampler: cmaes, objective: [words/pick, say]", "cmaes supports only one objective"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_a_model_is_loaded(name: str, world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("no model is loaded")

    monkeypatch.setattr("workbench.run.materialize.materialize", never)
    rest, message = REFUSED[name]
    text = searched(SPACE, rest) if rest is not None else searched(SPACE).partition("search:")[0]
    world.write(text)
    with pytest.raises(WorkbenchError, match=message):
        call("search", "recipes/test.yaml")


def test_a_candidate_that_overflows_is_one_failure(world: Project) -> None:
    search = search_of(world, "{mix.lambda: {choices: [1.0, 9.0e+29]}}", ", trials: 4, sampler: random, controls: false")
    run(search)
    study = open_study(search)
    done = study.finished("search")
    assert len(done) == 4
    assert {t.failed for t in done} == {t.values["mix.lambda"] > 1 for t in done} == {True, False}
    assert all(t.error for t in done if t.failed)
    assert len(finished(search, study)) == sum(t.complete for t in done)
    study.close()
