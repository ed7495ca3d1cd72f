"""The commands under a recommendation: run in a shell, the first line makes exactly the configuration that was scored."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from worlds.commands import call, document
from worlds.json_commands import write_project
from worlds.project import CPU, Project
from worlds.search_world import RECIPE, searched

from workbench.api.naming import Variation, open_named
from workbench.api.scoring import compare
from workbench.api.subjects import Request, open_subjects
from workbench.cli.app import app
from workbench.compare.advice import CANDIDATES
from workbench.compare.making import commands
from workbench.evaluate.lineup import LineupEntry
from workbench.ground.errors import WorkbenchError
from workbench.models.live import compute
from workbench.run.compose import compose
from workbench.run.materialize import configuration_digest
from workbench.scores.store import Configuration

SWEPT = RECIPE + "sweep: {mix.lambda: [0.5, 1.0], mix.merge: [ties, task_arithmetic]}\n"
OWN = "name: own\ndescription: d\n" + RECIPE.replace("dtype: float32", "dtype: bfloat16, shard_size: 1MB")
LORA = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter, rank: exact}\n"
NESTED = "bricks: {both: {recipe: recipes/mix.yaml}, two: bricks/two}\nsteps: [{merge: linear}]\noutput: {dtype: float32}\n"
ROUTED = "bricks: {one: bricks/one, two: bricks/two}\noutput: {form: configuration}\nsteps: [{route: ridge, calibration: 'calibration/{brick}.jsonl'}]\n"
EDITED = (
    "bricks: {one: bricks/one}\nsteps:\n"
    "- {id: facts, edit: memit, facts: facts.jsonl, statistics: texts.jsonl, tokens_per_input: 20, contexts: 0, lambda: 0.001, "
    "layers: [1], position: prompt_last, min_efficacy: 0}\n- {id: mix, merge: task_arithmetic}\n"
)
CASES: dict[str, tuple[list[str], Variation]] = {
    "recipe": (["mix"], Variation()),
    "file of another name": (["recipes/own file.yaml"], Variation()),
    "override": (["mix"], Variation(("mix.density=0.3", "0.bricks={one: 1, two: 0.5}", "output.dtype=bfloat16"))),
    "point of a sweep": (["swept[lambda=0.5,ties]"], Variation()),
    "sweep": (["swept"], Variation()),
    "sweep of a call": (["mix"], Variation(("mix.density=0.3", "output.dtype=bfloat16"), ("mix.merge=ties,tsv", "mix.lambda=0.5,1"))),
    "seeds": (["mix"], Variation(("mix.merge=dare",), ("seed=0,1",))),
    "recipe with a search": (["sought"], Variation()),
    "recipe as a brick": (["nested"], Variation()),
    "routed": (["routed"], Variation()),
    "edited": (["edited-then-merged"], Variation()),
    "memory": (["memory"], Variation()),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, llama: Path, bricks: Path) -> Project:
    """One project for all cases: what a run reads again is what it has written."""
    path = tmp_path_factory.mktemp("making")
    (path / "recipes").mkdir()
    (path / "base").symlink_to(llama)
    (path / "bricks").symlink_to(bricks)
    project = Project(path)
    write_project(project)
    texts = {
        "swept": SWEPT,
        "own file": OWN,
        "lora": LORA,
        "nested": NESTED,
        "routed": ROUTED,
        "edited-then-merged": EDITED,
        "mix": RECIPE,
    }
    texts["sought"] = searched(
        "{mix.lambda: [0.2, 1.6], mix.merge: [ties, tsv], mix.density: [0.2, 0.8]}", ", trials: 4, sampler: random"
    )
    for name, text in texts.items():
        project.write(text, f"{name}.yaml")
    return project


@pytest.fixture(autouse=True)
def here(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.path)


def digest_of(entry: LineupEntry) -> str:
    return configuration_digest(entry.resolved, CPU)[0]


def made(lines: list[str]) -> LineupEntry:
    """The model in the run that the first of a configuration's commands makes."""
    first, *then = map(shlex.split, lines)
    assert first[:2] == ["workbench", "run"]
    run = Path(document(*first[1:], "--device", "cpu")["run"])
    assert [words[1] for words in then][:2] == ["chat", "push"]
    assert all(run.name in words for words in then), "the other commands name the result"
    return LineupEntry(run.name, "configuration", open_named(run.name).resolved)


@pytest.mark.parametrize("case", CASES)
def test_the_line_makes_what_was_scored(case: str) -> None:
    roles = set()
    for entry in open_subjects(Request(*CASES[case], ("words",))).entries:
        if entry.role not in CANDIDATES:
            continue  # never recommended
        roles.add(entry.role)
        scored = entry.configuration(digest_of(entry))
        run = made(commands(scored))
        again = run.configuration(digest_of(run))
        assert (again.of_weights, again.digest) == (scored.of_weights, scored.digest), f"{case}: {entry.name}"
    assert roles >= {"configuration", "base"}


def test_the_line_makes_an_adapter() -> None:
    """Its factors are multiplied where it is loaded, so that its weights are the scored ones up to a rounding."""
    (entry,) = (e for e in open_subjects(Request(["lora"], suites=("words",))).entries if e.role == "configuration")
    scored, run = (
        compute(compose(entry.resolved, CPU).model, torch.float32, CPU),
        made(commands(entry.configuration(digest_of(entry)))),
    )
    written = compute(compose(run.resolved, CPU).model, torch.float32, CPU)
    assert written.keys() == scored.keys()
    for name, tensor in scored.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.part("search")
def test_the_line_makes_each_candidate_of_a_search() -> None:
    from workbench.search.python import search

    found = search("sought", device="cpu").found
    tested = [c for c in found.test.comparison.configurations if c.role in CANDIDATES]
    assert {f"sought-{row.name}" for row in found.test.rows if row.part == "found"} <= {c.name for c in tested}
    for c in tested:
        run = made(c.command)
        assert run.configuration(digest_of(run)).digest == c.digest, c.name


def test_what_is_there_or_elsewhere_is_not_made() -> None:
    """A model is used as it is; of imported scores nothing is known but the numbers."""
    entry = next(e for e in open_subjects(Request(["bricks/full"], suites=("words",))).entries if e.role == "configuration")
    export = "workbench export bricks/full --for vllm -o served"
    assert commands(entry.configuration(digest_of(entry))) == ["workbench chat bricks/full", export]
    assert commands(Configuration("1" * 32, "outside")) == []
    memory = Configuration("1" * 32, "m", form="configuration", edits=("2" * 32,), made=("m",), target="m-1")
    assert [line.split()[1] for line in commands(memory)] == ["run", "chat", "push"]
    routed = Configuration("1" * 32, "a b", form="configuration", made=("a b",), target="a b-1")
    assert commands(routed)[0] == "workbench run 'a b'"
    assert commands(routed)[-1] == "workbench export 'a b-1' --for vllm --served-base ORG/BASE -o served"


def test_ship_runs_the_recommended_one() -> None:
    """It is what `run` of the printed line does; without a recommendation it ends with 3, and without a yes it does nothing."""
    limit = ("--limit", "4", "--device", "cpu")
    call("eval", "mix", *limit)
    assert "No configuration can be recommended" in call("ship", *limit, code=3).stdout
    for answer in ("n\n", ""):
        asked = CliRunner().invoke(app, ["ship", "--baseline", "mix", *limit], input=answer)
        assert asked.exit_code == 1, "a no, and an input that has ended"
        assert isinstance(asked.exception, WorkbenchError)
        assert "score:" not in asked.output
    told = document("ship", "--baseline", "mix", *limit)
    assert told["made"] is None
    elsewhere = call("ship", "--baseline", "mix", "--yes", *limit, "--runs-dir", "runs").stdout
    assert "  workbench run recipes/mix.yaml --runs-dir runs\n" in elsewhere
    done = call("ship", "--baseline", "mix", "--yes", *limit)
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("  workbench ")]
    assert made(lines).name in done.stdout
    assert done.stderr.splitlines()[1 - len(lines) :] == lines[1:]
    compared = json.loads(CliRunner().invoke(app, ["compare", "mix", "--baseline", "mix", "--limit", "4", "--json"]).stdout)
    found = compare("mix", baseline="mix", limit=4).recommendation
    assert found is not None
    assert compared["recommendation"]["command"] == found.command == ["workbench run mix", *lines[1:]]
    assert lines[0] == "workbench run recipes/mix.yaml"
    shipped = document("ship", "--baseline", "mix", "--yes", *limit)
    assert shipped == {**told, "made": document("run", "mix", "--device", "cpu")["model"]}
    assert (told["recommendation"]["configuration"], told["recommendation"]["command"]) == ("mix", lines)
    assert " ".join(told["recommendation"]["text"].split()) in " ".join(done.stdout.split())
    rows = {c.name: c for c in compare("mix", baseline="mix", limit=4).comparison.configurations}
    assert told.get("kept") == (rows["mix"].kept_mean.to_dict() if rows["mix"].kept_mean else None)
    none = json.loads(call("ship", *limit, "--json", code=3).stdout)
    assert (none["made"], none["recommendation"]["command"], none["recommendation"]["configuration"]) == (None, [], None)
