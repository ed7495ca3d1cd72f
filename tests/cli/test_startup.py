"""Start-up: the large libraries that each command imports."""

from __future__ import annotations

import json
from pathlib import Path

from worlds.processes import in_one_process, workbench
from worlds.project import Project
from worlds.search_world import RECIPE, SPACE, lay_out, searched

from workbench.cli.index import COMMANDS as COMMAND_PLACES
from workbench.ground.parts import parts
from workbench.weights.kernels import backend

HEAVY = {"torch", "transformers", "peft", "accelerate", "mergekit", "lm_eval", "datasets", "optuna", "ray", "scipy", "matplotlib"}
HEAVY |= {"mlflow", "wandb"}
TASKS = {"transformers", "lm_eval", "datasets"}
SCORED = {*TASKS, "torch", "accelerate", "scipy"}
# Commands by processes, each in the order in which it runs, and what the process has imported of HEAVY when a command has ended.
# A command that computes nothing imports none of it.
PROCESSES: list[list[tuple[str, set[str]]]] = [
    [
        ("--help", set()),
        ("--version", set()),
        ("methods", set()),
        ("recipe new recipes/new.yaml --base base --brick one=bricks/one", set()),
        ("recipe check mix", set()),
        ("recipe diff mix edited", set()),
        ("recipe schema", set()),
        ("plan mix", set()),
        ("plan edited", set()),
        ("run mix --device cpu", set() if backend().library else {"torch"}),
        ("plan mix --json", set()),
        ("runs ls", set()),
        ("runs show mix", set()),
        ("brick ls", set()),
        ("brick show bricks/one --card", set()),
        ("suite ls", set()),
        ("open bricks/one", set()),
        ("open mergekit.yaml", set()),
        ("trust .", set()),
        ("view --help", set()),
    ],
    [("run spectral --device cpu", {"torch"}), ("recipe import mergekit.yaml", {"mergekit", "torch"})],
    [
        ("suite show words --base base", TASKS),
        ("eval mix --device cpu --limit 4", SCORED),
        ("search tuned --device cpu --trials 2", {*SCORED, "optuna"}),
    ],
    [
        ("suite show words --base base --json", set()),
        ("scores ls", set()),
        ("compare mix --limit 4", set()),
        ("report mix --limit 4", set()),
        ("ship --baseline mix --limit 4 --yes --device cpu", set()),
    ],
]


def lay_out_commands(project: Project) -> Project:
    """Add what the commands name: recipes of a merge, an edit and a search, a suite, and a mergekit file."""
    lay_out(project, items=8, clusters=4)
    project.write(RECIPE, "mix.yaml")
    project.write(RECIPE.replace("merge: ties, density: 0.5,", "merge: tsv,"), "spectral.yaml")
    project.write(searched(SPACE, ", sampler: random, controls: false").replace("[8, 16]", "[4]"), "tuned.yaml")
    fact = {"prompt": "{subject} is", "subject": "w3", "target": "w4"}
    (project.path / "facts.jsonl").write_text(json.dumps(fact) + "\n", "utf-8")
    project.write("bricks: {}\nsteps: [{edit: memit, facts: facts.jsonl}]\n", "edited.yaml")
    (project.path / "mergekit.yaml").write_text(
        "merge_method: linear\nmodels: [{model: base, parameters: {weight: 0.5}}, {model: bricks/full, parameters: {weight: 0.5}}]\n"
        "dtype: float32\n"
    )
    return project


def test_commands_import_only_the_libraries_that_they_use(project: Project) -> None:
    """Both ways: a library that is not listed, and one that is listed but not imported."""
    world, wrong = lay_out_commands(project), []
    for commands in PROCESSES:
        ended = in_one_process([command.split() for command, _ in commands], world.path, watched=HEAVY)
        for (command, expected), (done, imported) in zip(commands, ended, strict=True):
            assert done.returncode == 0, f"workbench {command}\n{done.stdout}{done.stderr}"
            if imported != expected:
                wrong.append(f"workbench {command}: imports {sorted(imported)}, listed {sorted(expected)}")
    assert not wrong, "\n".join(wrong)


def test_help_builds_no_class_of_a_step(tmp_path: Path) -> None:
    """Pydantic and numpy alone would take three quarters of the time of `--help`."""
    done, imported = workbench("--help", cwd=tmp_path, watched=("pydantic", "numpy", "workbench.steps"))
    assert (done.returncode, imported) == (0, set())


def test_a_command_imports_no_other_command(tmp_path: Path) -> None:
    places = [*COMMAND_PLACES.values(), *(place for part in parts().values() for place in part.commands.values())]
    others = {f"workbench.{place.rpartition('.')[0]}" for place in places if place.count(".") > 1}
    folders = (f"workbench.{part}" for part in parts())
    done, imported = workbench("runs", "ls", cwd=tmp_path, watched=(*others, *folders, "workbench.evaluate", "numpy"))
    assert (done.returncode, imported) == (0, {"workbench.cli.runs"})
