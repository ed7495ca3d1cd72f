"""Suites of one small task for a project."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from worlds.jsonl import write_jsonl
from worlds.places import TASKS
from worlds.project import Project
from worlds.tiny import save_finetuned

from workbench.evaluate.taskchecks import SuiteCheck

MEAN = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: average}]\neval: [mini]\n"


def mini_suite(project: Project) -> None:
    """A suite of one task, so that cases reach what comes after it."""
    tasks = project.path / "evals" / "tasks"
    tasks.mkdir(parents=True)
    (project.path / "evals" / "suites").mkdir()
    (project.path / "evals" / "suites" / "mini.yaml").write_text("suite: mini\ntasks: [mini]\ncluster: id\n")
    source = TASKS
    shutil.copy(source / "localdata.py", tasks)
    (tasks / "mini.yaml").write_text(
        (source / "retention.yaml").read_text().replace("task: retention", "task: mini").replace("data/retention", "mini")
    )
    rows = [{"id": f"m{i}", "prompt": "a", "choices": ["b", "c"], "gold": i % 2} for i in range(4)]
    write_jsonl(tasks / "mini.jsonl", rows)


def clustered_suite(project: Project) -> None:
    """The same with 60 items in 20 clusters, so that verdicts can fall."""
    mini_suite(project)
    words = ["a", "b", "c", "d", "e"]
    rows = [
        {"id": f"m{i}", "cluster": f"c{i % 20}", "prompt": " ".join(words[: 1 + i % 4]), "choices": words[:3], "gold": i % 3}
        for i in range(60)
    ]
    write_jsonl(project.path / "evals" / "tasks" / "mini.jsonl", rows)
    (project.path / "evals" / "suites" / "mini.yaml").write_text("suite: mini\ntasks: [mini]\nchance: {mini: 0.3333}\n")


def checks(place: Path, **options: Any) -> dict[tuple[str, str], SuiteCheck]:
    from workbench.suites.check import check_suite

    return {(c.task, c.check): c for c in check_suite("toy", place, "base", **options).checks}


def lay_out_models(project: Project) -> Project:
    """A suite of 60 items in 20 clusters, a recipe, and two models beside it."""
    clustered_suite(project)
    project.write(MEAN, "mean.yaml")
    for name, seed in (("Tuned-A", 4), ("Tuned-B", 5)):
        save_finetuned(project.path / "base", project.path / "models" / name, seed=seed)
        shutil.copy(project.path / "base" / "tokenizer_config.json", project.path / "models" / name)
    return project
