"""`scores export`: lm-eval tasks with their documents as local files that build the same requests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call, refused
from worlds.jsonl import write_jsonl
from worlds.local_tasks import CHOICE, documents, suite
from worlds.places import TASKS

from workbench.evaluate import build_plan
from workbench.ground.errors import WorkbenchError
from workbench.suites.export import LOCALDATA as WRITTEN
from workbench.suites.export import export_task


def requests_of(task: Any) -> list[Any]:
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests()
    return [(i.doc_id, i.idx, i.request_type, i.args) for i in task.instances]


def load(folder: Path, name: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False).load([name])["tasks"][name]


@pytest.fixture
def bundled(tmp_path: Path) -> Path:
    """A definition like those that lm-eval brings: a data set by path, documents made by a function, examples from another split."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    docs = [
        {"query": f"What is {i} plus {i}?", "label": i % 3, "options": [str(2 * i), str(i), "none"][:: -1 if i % 2 else 1]}
        for i in range(12)
    ]
    for split, part in (("train", docs[:5]), ("test", docs[5:])):
        write_jsonl(folder / f"{split}.json", part)
    (folder / "theirs.py").write_text(
        "def shorter(docs):\n    return docs.map(lambda d: {'query': d['query'].upper()}).select(range(len(docs) - 1))\n"
    )
    (folder / "sums.yaml").write_text(f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.json, test: {folder}/test.json}}}}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
num_fewshot: 2
process_docs: !function theirs.shorter
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: options
doc_to_target: label
description: "Sums.\\n\\n"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2.0}}
""")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_export_of_a_data_set_task(bundled: Path, project: Path, tokenizer: Any) -> None:
    done = export_task("sums", project / "evals" / "tasks", include_path=bundled)
    assert (done.documents, done.requests, done.shots, done.clusters) == (6, 18, 4, False)
    assert requests_of(load(project / "evals" / "tasks", "sums")) == requests_of(load(bundled, "sums"))
    shutil.rmtree(bundled)
    task = load(project / "evals" / "tasks", "sums")
    assert requests_of(task)[0][3][0].startswith("Sums.\n\nWHAT IS ")
    assert (task.config.num_fewshot, task.VERSION or task.config.metadata["version"]) == (2, 2.0)
    plan = build_plan(
        suite(tasks=["sums"], chance={}, cluster="id"), tokenizer, tasks_dir=project / "evals" / "tasks", dtype="float32"
    )
    assert len(plan.items["sums"]) == 6
    assert plan.bundled == frozenset()
    kept = [json.loads(x) for x in (project / "evals" / "tasks" / "data" / "sums.jsonl").read_text("utf-8").splitlines()]
    assert [d["id"] for d in kept] == [i.id for i in plan.items["sums"]]
    assert set(kept[0]) == {"id", "query", "label", "options"}


def test_export_of_a_local_task_by_the_command_line(tasks: Path, project: Path) -> None:
    said = call("scores", "export", "copy", "pick", "-o", "kept", "--include-path", str(tasks))
    assert said.stdout.split() == [
        "kept/copy.yaml",
        "kept/data/copy.jsonl",
        "kept/localdata.py",
        "kept/data/pick.jsonl",
        "kept/pick.yaml",
    ]
    assert "copy: 24 documents, 24 requests as in the original" in said.stderr
    for name in ("copy", "pick"):
        old, new = load(tasks, name), load(Path("kept"), name)
        assert requests_of(new) == requests_of(old)
        assert [f.name for f in new._filters] == [f.name for f in old._filters]
    assert [json.loads(x) for x in Path("kept/data/copy.jsonl").read_text("utf-8").splitlines()] == documents()
    assert call("scores", "export", "copy", "-o", "kept", "--include-path", str(tasks)).exit_code == 0  # the same files again
    Path("kept/copy.yaml").write_text("task: mine\n", "utf-8")
    error = refused("scores", "export", "copy", "-o", "kept", "--include-path", str(tasks))
    assert "kept/copy.yaml already exists, with other content" in error.message
    assert (TASKS / "localdata.py").read_text("utf-8") == WRITTEN


def test_export_of_examples_from_the_test_split(tasks: Path, project: Path) -> None:
    text = CHOICE.replace("metadata", "fewshot_split: test\nnum_fewshot: 3\nmetadata")
    folder = project / "own"
    shutil.copytree(tasks, folder)
    (folder / "pick.yaml").write_text(text)
    done = export_task("pick", project / "kept", include_path=folder)
    assert done.shots == 0
    new = load(project / "kept", "pick")
    assert new.config.fewshot_split == "test", "an item is not its own example"
    assert requests_of(new) == requests_of(load(folder, "pick"))
    export_task("pick", project / "plain", include_path=folder, num_fewshot=0)
    assert load(project / "plain", "pick").config.num_fewshot == 0


def test_a_copy_runs_the_models_code_only_with_leave(tasks: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project / "own"
    shutil.copytree(tasks, folder)
    (folder / "copy.yaml").write_text((folder / "copy.yaml").read_text("utf-8") + "\nunsafe_code: true\n", "utf-8")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    export_task("copy", project / "kept", include_path=folder)
    assert load(project / "kept", "copy").config.unsafe_code is True
    export_task("pick", project / "other", include_path=folder)
    assert load(project / "other", "pick").config.unsafe_code is False


def test_functions_are_kept_where_they_can_be_imported(bundled: Path, project: Path) -> None:
    text = (bundled / "sums.yaml").read_text("utf-8")
    (bundled / "sums.yaml").write_text(text.replace("doc_to_target: label", "doc_to_target: !function theirs.label"))
    (bundled / "theirs.py").write_text(
        (bundled / "theirs.py").read_text("utf-8") + "\n\ndef label(doc):\n    return doc['label']\n"
    )
    with pytest.raises(
        WorkbenchError, match=r"task 'sums': doc_to_target is the function theirs.label, which no installed package has"
    ):
        export_task("sums", project / "kept", include_path=bundled)
    assert not (project / "kept").exists()
    (bundled / "sums.yaml").write_text(
        text.replace("{metric: acc, aggregation: mean", "{metric: acc, aggregation: !function lm_eval.api.metrics.mean")
    )
    export_task("sums", project / "kept", include_path=bundled)
    assert "aggregation: !function 'lm_eval.api.metrics.mean'" in (project / "kept" / "sums.yaml").read_text("utf-8")


def test_export_says_what_is_out_of_reach(project: Path, tasks: Path) -> None:
    error = refused("scores", "export", "arc_easy")
    assert "task 'arc_easy' could not be loaded" in error.message
    assert "The hub is offline: unset HF_HUB_OFFLINE" in str(error.hint)
    assert "export the task on a machine that can load its data, and copy evals/tasks here" in str(error.hint)
    assert "the folder does not exist" in refused("scores", "export", "copy", "--include-path", "nowhere").message
    assert not (project / "evals").exists()
