"""Tasks whose documents `datasets` reads from local files: what they yield is kept until a file changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.evaluate import build_plan
from workbench.scores.plan import ScorePlan
from workbench.scores.suite import Suite
from workbench.scores.tasks import TaskFile

TASK = """\
task: questions
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write(folder: Path, *answers: str) -> None:
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({"question": f"Question {i}?", "answer": answer}) for i, answer in enumerate(answers)]
    (folder / "questions.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


@pytest.fixture
def planned(cwd: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the plan, and whether lm-eval built the task for it."""
    (cwd / "tasks").mkdir()
    (cwd / "tasks" / "questions.yaml").write_text(TASK, "utf-8")
    from workbench.evaluate import tasks

    built, load = [], tasks.load_task
    monkeypatch.setattr(tasks, "load_task", lambda *given: built.append(1) or load(*given))

    def plan() -> tuple[ScorePlan, bool]:
        built.clear()
        suite = Suite(suite="mine", tasks=("questions",), cluster="id")
        return build_plan(suite, tokenizer, tasks_dir=cwd / "tasks", memo=cwd / "memo"), bool(built)

    return plan


def test_what_it_yields_is_kept_until_the_file_changes(planned: Any, cwd: Path) -> None:
    write(cwd, "a", "b")
    first, built = planned()
    assert built
    again, built = planned()
    assert (again.digest, built) == (first.digest, False)
    write(cwd, "a", "c")
    changed, built = planned()
    assert built
    assert changed.digest != first.digest


def test_another_working_directory_has_other_files(planned: Any, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(cwd, "a", "b")
    write(cwd / "other", "a", "c")
    first, _ = planned()
    monkeypatch.chdir(cwd / "other")
    other, built = planned()
    assert built
    assert other.digest != first.digest


FILES = {"data_files": {"test": "a.jsonl"}}


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),
        ({"dataset_path": "text", "dataset_kwargs": {"data_files": "a.jsonl"}}, True),
        ({"custom_dataset": "own.docs"}, False),  # a function of the task decides what is read
        ({"dataset_path": "someone/data"}, False),
        ({"dataset_kwargs": {**FILES, "field": "rows"}}, False),
        ({"dataset_kwargs": None}, False),
        *[
            ({"dataset_kwargs": {"data_files": files}}, False)
            for files in ({"test": "b.jsonl"}, {"test": ["a.jsonl"]}, {}, ["a.jsonl"])
        ],
    ],
)
def test_which_files_a_reader_takes(changes: dict[str, Any], known: bool, cwd: Path) -> None:
    (cwd / "a.jsonl").touch()
    config = {"dataset_path": "json", "dataset_kwargs": FILES, **changes}
    assert TaskFile(cwd / "tasks" / "a.yaml", config, ()).local_data == ((cwd / "a.jsonl",) if known else None)


def test_tasks_that_read_elsewhere_are_built_each_time(planned: Any, cwd: Path) -> None:
    write(cwd, "a", "b")
    file = cwd / "tasks" / "questions.yaml"
    file.write_text(TASK.replace("{test: questions.jsonl}", "{test: 'quest*.jsonl'}"), "utf-8")
    assert planned()[1]
    assert planned()[1]
