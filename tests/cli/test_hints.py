"""Recipes by their names, and printed commands that can be typed as they are."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from worlds.commands import call, document
from worlds.project import Project
from worlds.search_world import lay_out, searched
from worlds.suites import clustered_suite

from workbench.cli.app import app
from workbench.ground.errors import TAKE_RUNS, WorkbenchError
from workbench.recipe.recipe import load_recipe

TWO = "bricks: {one: bricks/one, two: bricks/two}\n"
COMMANDS = {
    "plan": ["plan", "mena"],
    "run": ["run", "mena"],
    "search": ["search", "mena"],
    "eval": ["eval", "mena"],
    "compare": ["compare", "mena"],
    "report": ["report", "mena"],
    "recipe check": ["recipe", "check", "mena"],
    "recipe diff": ["recipe", "diff", "mean", "mena"],
    "chat": ["chat", "mena"],
    "experts": ["experts", "mena", "--texts", "facts.jsonl"],
    "edit rebase": ["edit", "rebase", "bricks/one", "--onto", "mena", "-o", "bricks/new"],
    "facts check --recipe": ["facts", "check", "facts.jsonl", "--recipe", "mena"],
    "facts check --model": ["facts", "check", "facts.jsonl", "--model", "mena"],
    "push": ["push", "mena", "org/name", "--dry-run"],
    "export": ["export", "mena", "--for", "vllm", "--served-base", "org/base", "-o", "out"],
    "route explain": ["route", "explain", "mena", "w1"],
    "memory ls": ["memory", "ls", "mena"],
    "analyze": ["analyze", "mena", "--facts", "facts.jsonl"],
}
REFUSED = {
    "no such name": ("mena", "Did you mean 'mean'?"),
    "no such point": ("mean[foo,lambda=7]", "No step has the method 'foo'"),
    "two things": ("twice", "'twice' is a model (./twice) and a recipe (recipes/twice.yaml)"),
}


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    project.write(TWO + "steps: [{merge: average}]\n", "mean.yaml")
    (project.path / "facts.jsonl").write_text('{"prompt": "w1 w2", "target": "w3"}\n')
    return project


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_means_nothing_or_two_things_is_refused(command: str, case: str, world: Project) -> None:
    """By every command that takes a name, before any work."""
    (world.path / "twice").symlink_to((world.path / "base").resolve())
    world.write(TWO + "steps: [{merge: average}]\n", "twice.yaml")
    name, expected = REFUSED[case]
    result = CliRunner().invoke(app, [name if word == "mena" else word for word in COMMANDS[command]])
    error = result.exception
    said = error.message if isinstance(error, WorkbenchError) else result.stderr
    assert name in said
    assert expected in said
    assert (error.exit_code if isinstance(error, WorkbenchError) else result.exit_code) == 2


def test_commands_take_a_recipe_s_name(world: Project) -> None:
    lay_out(world)
    world.write(searched("{mix.lambda: [0.2, 1.6]}", ", trials: 2, sampler: random, controls: false"), "find.yaml")
    (world.path / "recipes" / "short.yml").write_text((world.path / "recipes" / "mean.yaml").read_text())
    found = document("search", "find")
    assert found["name"] == "find"
    assert found["command"] == "workbench search recipes/find.yaml"
    assert document("plan", "short")["problems"] == []
    assert document("run", "short")["status"] == "done"
    assert "find: ok, 1 step" in call("recipe", "check", "find").stdout


# -- what is printed after `run`


def printed(stderr: str, label: str) -> list[str]:
    """The words of a printed command, as a shell splits them."""
    (line,) = (line for line in stderr.splitlines() if line.startswith(label))
    return shlex.split(line.removeprefix(label))


def test_the_score_line_works(world: Project, tmp_path: Path) -> None:
    """In a project whose path has spaces, and with what `--set` changed: the printed command scores what was written.

    The edit before the merge is scored too, under a name from that of the file.
    """
    place = tmp_path / "my project's folder"
    shutil.copytree(world.path, place, symlinks=True)
    project = Project(place)
    clustered_suite(project)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        edit = "{edit: finetune, facts: facts.jsonl, epochs: 1, min_efficacy: 0}"
        project.write(TWO + f"steps: [{edit}, {{id: mix, merge: linear}}]\neval: [mini]\n", "My merge.yaml")
        ran = call("run", "recipes/My merge.yaml", "--set", "mix.bricks={one: 2, two: 1}")
        words = printed(ran.stderr, "score:  ")
        assert words == ["workbench", "eval", "recipes/My merge.yaml", "--set", "mix.bricks={one: 2, two: 1}"]
        assert "My merge-edited" in call(*words[1:]).stdout
        model = next((place / "runs").glob("My merge-*/model"))
        assert printed(ran.stderr, "serve:  ") == ["vllm", "serve", str(model.relative_to(place))]
        words = printed(ran.stderr, "        lm_eval")
        assert words[words.index("--include_path") + 1] == "evals/tasks"
        assert words[words.index("--model_args") + 1].split(",")[0] == f"pretrained={model.relative_to(place)}"
        command = call("compare", "recipes/My merge.yaml", "--set", "mix.bricks={one: 2, two: 1}", "--json", code=0)
        assert "left_out" not in command.stdout


def test_there_is_no_score_line_where_nothing_can_be_scored(world: Project) -> None:
    """Without a suite in recipe or project, `eval` would refuse; with one in the project, the line names it."""
    said = call("run", "mean").stderr
    assert "load:" in said
    assert "score:" not in said
    assert "lm_eval" not in said
    clustered_suite(world)
    said = call("run", "mean").stderr
    assert printed(said, "score:  ") == ["workbench", "eval", "mean", "--suite", "mini"]
    call(*printed(said, "score:  ")[1:])
    assert "TASK" not in said
    assert "lm_eval" not in said


def test_there_is_no_score_line_for_what_is_no_language_model(world: Project) -> None:
    """`eval` refuses an encoder; a recipe without steps and merges by tensor name write one all the same."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    clustered_suite(world)
    sizes = {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    DistilBertForMaskedLM(DistilBertConfig(**sizes)).save_pretrained(world.path / "encoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(world.path / "base" / name, world.path / "encoder" / name)
    world.write("base: encoder\nsteps: []\neval: [mini]\n", "encoder.yaml")
    said = call("run", "recipes/encoder.yaml").stderr
    assert "load:" in said
    assert "score:" not in said
    with pytest.raises(WorkbenchError, match="not a decoder-only language model"):
        call("eval", "recipes/encoder.yaml")


def test_printed_commands_repeat_the_folder_of_runs(world: Project) -> None:
    """It is repeated where it was typed; the next command of this process is without it."""
    clustered_suite(world)
    place = ("--runs-dir", "other runs")
    said = call("run", "mean", *place, "--set", "seed=1").stderr
    assert printed(said, "score:  ") == ["workbench", "eval", "mean", "--set", "seed=1", "--suite", "mini", *place]
    said = call(*printed(said, "score:  ")[1:]).stderr
    assert printed(said, "page: ") == ["workbench", "report", "mean", "--suite", "mini", "--set", "seed=1", *place]
    (run,) = (world.path / "other runs").glob("mean-*")
    asked = CliRunner().invoke(app, ["runs", "rm", run.name, *place], input="")
    assert isinstance(asked.exception, WorkbenchError)
    assert (asked.exception.hint, run.is_dir()) == ("Add --yes to the command.", True)
    assert printed(call("run", "mean").stderr, "score:  ") == ["workbench", "eval", "mean", "--suite", "mini"]
    for command in TAKE_RUNS:
        assert "--runs-dir" in call(command, *{"runs": ["ls"], "export": ["mean"]}.get(command, []), "--help").stdout


def test_hints_quote_paths(world: Project) -> None:
    clustered_suite(world)
    world.write(TWO + "steps: [{merge: average}]\neval: [mini]\n", "a b.yaml")
    with pytest.raises(WorkbenchError) as caught:
        call("compare", "recipes/a b.yaml", "--suite", "mini")
    assert shlex.split(caught.value.hint or "") == ["workbench", "eval", "recipes/a b.yaml", "--suite", "mini"]
    said = call("recipe", "new", "recipes/x y.yaml").stderr
    assert "check: workbench recipe check 'recipes/x y.yaml'" in said
    assert Path("recipes/x y.yaml").read_text().startswith("# workbench run 'recipes/x y.yaml'\n")


def test_a_new_recipe_names_its_tasks(cwd: Path) -> None:
    call(
        "recipe",
        "new",
        "mine",
        "--project",
        "p",
        "--brick",
        "one=org/one",
        "--suite",
        "smoke",
        "--task",
        "gsm8k",
        "--task",
        "arc_easy",
    )
    fields = load_recipe("p/recipes/mine.yaml").fields
    assert fields.eval[0] == "smoke"
    assert fields.eval[1].model_dump()["tasks"] == ("gsm8k", "arc_easy")
