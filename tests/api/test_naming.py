"""Names: whatever a page, a table or a hint prints works in every command, and a name that means two things is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from worlds.commands import call, document, refused
from worlds.project import Project
from worlds.search_world import RECIPE, lay_out

import workbench
from workbench.api.naming import find, load_named
from workbench.cli.app import app
from workbench.ground.errors import WorkbenchError

SWEPT = RECIPE + "sweep: {mix.lambda: [0.5, 1.0], mix.merge: [ties, task_arithmetic]}\n"
ASKED = ("--sweep", "mix.merge=ties,tsv", "--sweep", "mix.lambda=0.5,1")
LIMIT = ("--device", "cpu", "--limit", "4")
COMMANDS = {
    "plan": ["plan", "{}"],
    "run": ["run", "{}", "--device", "cpu", "--threads", "1"],
    "eval": ["eval", "{}", "--suite", "words", *LIMIT],
    "compare": ["compare", "{}", "--suite", "words", "--limit", "4"],
    "chat": ["chat", "{}", "--plain", "--max-new-tokens", "2", "--device", "cpu"],
    "export": ["export", "{}", "--for", "llama.cpp", "--samples", "1", "--tokens", "1", "-o"],
    "push": ["push", "{}", "org/name", "--dry-run", "--license", "mit"],
}


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    lay_out(project)
    project.write(RECIPE, "mine.yaml")
    project.write(SWEPT, "swept.yaml")
    project.write(
        RECIPE.replace("dtype: float32", "form: adapter, rank: exact").replace("ties, density: 0.5", "task_arithmetic"),
        "lora.yaml",
    )
    return project


def printed() -> Iterator[str]:
    """Names that `eval`, `recipe check`, `compare`, `report` and `runs ls` print, and words of their hints."""
    for arguments in (["mine", *ASKED], ["swept"]):
        scored = document("eval", *arguments, *LIMIT)
        names = [c["name"] for c in scored["configurations"] if "[" in c["name"]]
        assert names == [line.strip() for line in call("recipe", "check", *(a for a in arguments)).stdout.splitlines()[1:]]
        compared = CliRunner().invoke(app, ["compare", *arguments, "--limit", "4", "--json"])
        assert {row["configuration"] for row in json.loads(compared.stdout)["rows"]} >= set(names)
        call("report", *arguments, "--limit", "4", "-o", "reports/page.html")
        assert {c["name"] for c in json.loads(Path("reports/page.json").read_text())["configurations"]} >= set(names)
        yield from (names[0], names[-1])
    for name in ("mine", "lora[lambda=2]", "swept[lambda=1,task_arithmetic]"):
        hints = call("run", name, "--device", "cpu").stderr
        yield from re.findall(r"workbench eval '?([^'\s]+)", hints)
    yield from (row["name"] for row in document("runs", "ls"))
    yield from ("base", "recipes/mine.yaml", "recipes/swept.yaml[lambda=0.5,ties]")


def test_every_printed_name_works_in_every_command(world: Project, tmp_path: Path) -> None:
    names = list(dict.fromkeys(printed()))
    assert len(names) == 12
    seen = set()
    for number, name in enumerate(names):
        kind = find(name).kind
        alike = (kind, name.partition("[")[0] if kind == "recipe" else "", "[" in name)
        for command, words in COMMANDS.items():
            if alike in seen and command != "plan":  # another point of the same sweep, another run
                continue
            if command == "push" and name == "base":  # a model that no run has made
                assert "expected a run" in refused(*(word.format(name) for word in words)).message
                continue
            arguments = [word.format(name) for word in words]
            arguments += [str(tmp_path / f"out{number}")] if command == "export" else []
            result = CliRunner().invoke(app, arguments, input="w1 w2\n")
            if command == "compare" and name == "base":
                continue  # one configuration alone
            assert result.exit_code in (0, 3), f"{command} {name}: {result.output}{result.exception}"
        seen.add(alike)


def test_the_same_name_is_the_same_configuration_everywhere(world: Project) -> None:
    """`run` on a printed point writes what `eval` scored, with its name; `push` and `plan` find this run."""
    scored = document("eval", "mine", *ASKED, *LIMIT)
    digests = {c["name"]: c["digest"] for c in scored["configurations"]}
    done = document("run", "mine[tsv,lambda=1]", "--device", "cpu")
    run = Path(done["run"]).name
    assert run.startswith("mine[tsv,lambda=1]-")
    assert document("plan", "mine[tsv,lambda=1]")["run"] == document("plan", run)["run"] == run
    assert document("push", "mine[tsv,lambda=1]", "org/x", "--dry-run", "--license", "mit")["run"] == run
    assert workbench.load_recipe("mine[tsv,lambda=1]").resolved.key == done["key"]
    again = document("eval", run, "--suite", "words", *LIMIT)
    assert digests["mine[tsv,lambda=1]"] in {c["digest"] for c in again["configurations"]}


def test_push_takes_the_run_of_the_recipe_as_it_is(world: Project) -> None:
    """And never one of another recipe whose name begins alike, or of an earlier version."""
    error = refused("push", "mine", "org/x", "--dry-run")
    assert "has not been run as it is now" in error.message
    call("run", "mine", "--set", "mix.lambda=0.5", "--device", "cpu")
    error = refused("push", "mine", "org/x", "--dry-run")
    assert "runs of earlier versions of it: mine-" in error.message
    assert error.hint == "workbench run mine, or name one of its runs."


def test_set_drops_fields_that_another_method_lacks_and_says_so(world: Project) -> None:
    for arguments in (
        ["plan", "mine"],
        ["eval", "mine", *LIMIT],
        ["recipe", "check", "mine"],
        ["run", "mine", "--device", "cpu"],
    ):
        said = call(*arguments, "--set", "mix.merge=tsv").stderr
        assert "--set mix.merge=tsv drops density: tsv has no such field" in said
    with pytest.warns(UserWarning, match="drops density"):
        loaded = workbench.load_recipe("mine", ["mix.lambda=2", "mix.merge=tsv"])
    assert loaded.resolved.key == workbench.load_recipe("mine[tsv,lambda=2]").resolved.key
    assert "sweep.mix.merge" not in call("recipe", "check", "swept", "--set", "mix.merge=ties").stderr
    world.write(RECIPE + "sweep: {mix.density: [0.2, 0.5]}\n", "dense.yaml")
    assert "drops density, sweep.mix.density: tsv" in call("plan", "dense", "--set", "mix.merge=tsv").stderr
    error = refused("plan", "mine", "--set", "mix.density=0.3", "--set", "mix.merge=tsv")
    assert "density" in error.message, "asked for at the same time, so not dropped"
    world.write(RECIPE.replace("density", "densty"), "typo.yaml")
    assert "densty" in refused("plan", "typo", "--set", "mix.merge=tsv").message


def test_two_meanings_are_refused_with_what_to_type(world: Project) -> None:
    (world.path / "mine").write_text((world.path / "recipes" / "mine.yaml").read_text())
    error = refused("plan", "mine")
    assert error.message == "'mine' is a recipe (./mine) and a recipe (recipes/mine.yaml)"
    assert error.hint == "Type ./mine or recipes/mine.yaml."
    assert document("plan", "./mine")["recipe"] == document("plan", "recipes/mine.yaml")["recipe"] == "mine"
    assert "'./mine[lambda=2]' or 'recipes/mine.yaml[lambda=2]'" in str(refused("run", "mine[lambda=2]").hint)
    (world.path / "mine").unlink()
    (world.path / "recipes" / "swept.yml").write_text("")
    assert "recipes/swept.yaml or recipes/swept.yml" in str(refused("eval", "swept").hint)


def test_names_are_found_from_a_folder_of_the_project(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.path / "notebooks").mkdir()
    monkeypatch.chdir(world.path / "notebooks")
    assert load_named("mine[lambda=2]").name == "mine[lambda=2]"
    for name in ("", "mine[lambda=2", "mine]", "[x]", "mine[][", "x" * 200):
        with pytest.raises(WorkbenchError):
            load_named(name)
    assert find("org/name@v1").kind == "model"
    run = Path(document("run", "mine", "--device", "cpu")["run"]).name
    assert [find(name).kind for name in (run, run[:-4], str(world.path / "runs" / run))] == ["run"] * 3
    assert "Did you mean 'mine'" in refused("run", "min").message, "and not the run"
    (world.path / "Model A").symlink_to(world.path / "base")
    assert document("plan", str(world.path / "Model A"))["recipe"] == "model-a"


NEW = {
    "a name": ("fresh", "recipes/fresh.yaml"),
    "a name with a dot": ("v1.2", "recipes/v1.2.yaml"),
    "a file": ("fresh.yaml", "fresh.yaml"),
    "a file here": ("./fresh", "fresh.yaml"),
    "a path": ("sub/fresh", "sub/fresh.yaml"),
}


@pytest.mark.parametrize("case", NEW)
def test_a_new_recipe_is_found_by_its_name(case: str, world: Project) -> None:
    name, file = NEW[case]
    assert call("recipe", "new", name, "--base", "base").stdout.strip() == file
    assert document("plan", name.removeprefix("./") if file.startswith("recipes/") else file)["problems"] == []


@pytest.mark.parametrize("name", ["mine", "recipes/mine.yaml", "base"])
def test_a_new_recipe_never_gets_a_name_that_is_taken(name: str, world: Project) -> None:
    before = sorted(world.path.rglob("*.yaml"))
    assert "already exists" in refused("recipe", "new", name).message
    assert sorted(world.path.rglob("*.yaml")) == before
