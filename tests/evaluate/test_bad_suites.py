"""Suites, tasks and data that cannot be scored, and what the user is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from worlds.local_tasks import CHOICE, GENERATE, A, documents, plan_of, suite, tiny, write_data
from worlds.places import TASKS

from workbench.evaluate import build_plan, evaluate, score
from workbench.evaluate.scorer import Scorer
from workbench.evaluate.tasks import foreign_code, load_tasks
from workbench.ground.errors import WorkbenchError
from workbench.scores.store import Configuration, ScoreStore
from workbench.scores.suite import Suite, load_suite


def test_nan_log_likelihoods_name_configuration_task_and_item(tasks_dir: Path, tokenizer: Any) -> None:
    import torch

    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    scorer = Scorer(plan_of(tasks_dir, tokenizer), Configuration("c" * 32, "broken"), model)
    with pytest.raises(WorkbenchError, match=r"'broken', task 'pick': item 'copy-\d+' has log-likelihoods \[nan"):
        scorer.task("pick")
    with pytest.raises(WorkbenchError, match=r"'broken', task 'copy': NaN logits while generating"):
        scorer.task("copy")


def test_wrong_dtype_is_refused(tasks_dir: Path, tokenizer: Any) -> None:
    plan = build_plan(suite(), tokenizer, tasks_dir=tasks_dir, dtype="bfloat16")
    with pytest.raises(WorkbenchError, match=r"'a' has dtype float32, but the plan scores bfloat16"):
        score(plan, A, tiny())


def edit_docs(tasks_dir: Path, how: str) -> None:
    docs = documents()
    if how == "duplicate":
        docs[3]["id"] = docs[2]["id"]
    elif how == "no cluster":
        del docs[4]["cluster"]
    elif how == "no id":
        del docs[5]["id"]
    write_data(tasks_dir, [] if how == "empty" else docs)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("duplicate", "task 'copy': 1 ids occur more than once, the first is 'copy-002'"),
        ("no cluster", "task 'copy': item 5 has no cluster field 'cluster'"),
        ("no id", "task 'copy': item 6 has no field 'id'"),
        ("empty", "task 'copy' has no items"),
    ],
)
def test_bad_data(tasks_dir: Path, tokenizer: Any, how: str, message: str) -> None:
    edit_docs(tasks_dir, how)
    with pytest.raises(WorkbenchError, match=message):
        plan_of(tasks_dir, tokenizer)


def test_bad_task_files(tasks_dir: Path, tokenizer: Any) -> None:
    def fails(text: str, message: str) -> None:
        (tasks_dir / "copy.yaml").write_text(text)
        with pytest.raises(WorkbenchError, match=message):
            plan_of(tasks_dir, tokenizer)

    fails(GENERATE.replace("data/copy", "data/cpy"), r"copy.yaml: task 'copy': data file .*cpy.jsonl not found")
    fails("task: copy\ndoc_to_text: prompt\n", "task 'copy' has no data")
    fails(GENERATE + "  bad: [", r"copy.yaml:\d+:\d+: not YAML")
    fails(GENERATE.replace("task: copy", "task: pick"), "task 'pick' is also defined in")
    fails(GENERATE + "include: nowhere\n", "included file .*nowhere not found")
    fails("- a\n", "expected a mapping, found list")
    (tasks_dir / "copy.yaml").write_text(GENERATE)
    (tasks_dir / "data" / "copy.jsonl").write_text("{\n")
    with pytest.raises(WorkbenchError, match=r"copy.jsonl:1: task 'copy': not JSON"):
        plan_of(tasks_dir, tokenizer)


def test_bad_metrics(tasks_dir: Path, tokenizer: Any) -> None:
    with pytest.raises(WorkbenchError, match=r"task 'pick' has no metric 'ac'") as error:
        plan_of(tasks_dir, tokenizer, primary={"pick": "ac"})
    assert "'acc'" in str(error.value.hint)
    (tasks_dir / "pick.yaml").write_text(CHOICE.split("metric_list")[0] + "metric_list: [{metric: perplexity}]\n")
    with pytest.raises(WorkbenchError, match=r"has no metric that lm-eval computes for its output type"):
        plan_of(tasks_dir, tokenizer)


def test_unknown_task_names_the_nearest(tasks_dir: Path, tokenizer: Any) -> None:
    with pytest.raises(WorkbenchError, match=r"unknown task 'copyy'") as error:
        build_plan(Suite(suite="toy", tasks=("copyy",)), tokenizer, tasks_dir=tasks_dir)
    assert error.value.hint == "Did you mean 'copy'?"
    with pytest.raises(WorkbenchError, match=r"task 'mmlu' could not be loaded"):  # a group: its tasks are loaded
        build_plan(Suite(suite="toy", tasks=("mmlu",)), tokenizer, tasks_dir=tasks_dir)


def test_bundled_task_without_the_hub(tasks_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WorkbenchError, match=r"task 'arc_easy' could not be loaded") as error:
        build_plan(Suite(suite="toy", tasks=("arc_easy",)), tokenizer, tasks_dir=tasks_dir)
    assert "unset HF_HUB_OFFLINE" in str(error.value.hint)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(WorkbenchError) as error, foreign_code("gsm8k", "loaded"):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")
    assert error.value.hint == (
        "The hub cannot be reached: check the network, or copy the task on a connected machine: workbench scores export gsm8k"
    )


def test_a_task_that_runs_the_models_code_needs_leave(tasks_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks for --confirm_run_unsafe_code; its metric code_eval asks for the variable."""
    (tasks_dir / "copy.yaml").write_text(GENERATE + "unsafe_code: true\n")
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(WorkbenchError, match=r"task 'copy' runs code that the model writes, with your rights") as error:
        plan_of(tasks_dir, tokenizer)
    assert "HF_ALLOW_CODE_EVAL=1" in str(error.value.hint)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    plan = plan_of(tasks_dir, tokenizer)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    with pytest.raises(
        WorkbenchError, match=r"runs code that the model writes"
    ):  # a plan made with leave is not scored without it
        load_tasks(plan)


def test_a_task_with_images_is_refused(tasks_dir: Path, tokenizer: Any) -> None:
    (tasks_dir / "copy.yaml").write_text(GENERATE + "doc_to_image: [prompt]\n")
    with pytest.raises(WorkbenchError, match=r"task 'copy' shows images or sounds, and the scorer reads text alone") as error:
        plan_of(tasks_dir, tokenizer)
    assert "--model hf-multimodal --tasks copy" in str(error.value.hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("suite: x\ntasks: [add]\nprimary: {ad: acc}\n", "primary: 'ad' is not a task of this suite. Did you mean 'add'"),
        ("suite: x\ntasks: [add]\nowners: {sub: add}\n", "owners: 'sub' is not a task of this suite"),
        ("suite: x\ntasks: [add, add]\n", "tasks: 'add' is listed twice"),
        ("suite: x\ntasks: []\n", "tasks: expected"),
        ("suite: x\ntasks: [add]\nchance: {add: 1.0}\n", "chance: add: expected a number of at least 0"),
        ("suite: x\ntasks: [add]\nlimit: 0\n", "limit: expected at least 1 item"),
        ("suite: x\ntasks: [add]\nprimry: {}\n", r"x.yaml:3:1 primry: unknown field. Did you mean 'primary'"),
        ("suite: x\ntasks: [add]\nmin_effect: {ad: 0.1}\n", "min_effect: 'ad' is not a task of this suite. Did you mean 'add'"),
        ("suite: x\ntasks: [add]\nmin_effect: {add: -0.1}\n", r"x.yaml:3:1.* min_effect"),
        ("suite: x\ntasks: [add]\ncorrection: bonferroni\n", r"x.yaml:3:1 correction: expected 'max-t' or 'none'"),
        (
            "suite: x\ntasks: [add, sub]\ncontrasts: {c: {of: add, minus: sbu}}\n",
            "contrasts: c: 'sbu' is not a task of this suite",
        ),
        (
            "suite: x\ntasks: [add, sub]\ncontrasts: {c: {of: add, minus: add}}\n",
            "contrasts: c: `of` and `minus` are the same task 'add'",
        ),
        ("suite: x\ntasks: [add, sub]\ncontrasts: {add: {of: add, minus: sub}}\n", "contrasts: 'add' is the name of a task"),
        ("suite: x\ntasks: [add]\nalpha: yes\n", r"x.yaml:3:1 alpha: expected a valid number, found True"),
        ("suite: x\ntasks: [add]\nmin_effect: {add: .inf}\n", r"x.yaml:3:14 min_effect.add: expected a finite number, found inf"),
        ("suite: x\ntasks: [add]\nchance: {add: 0_7}\n", r"x.yaml:3:15 YAML reads 0_7 as 7 \(octal\)"),
        (
            "suite: x\ntasks: [add]\nroles: {add: skil}\n",
            r"x.yaml:3:9 roles.add: expected 'skill', 'retention', 'guarded' or 'other'",
        ),
    ],
)
def test_bad_suites(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "evals" / "suites").mkdir(parents=True)
    (tmp_path / "evals" / "suites" / "x.yaml").write_text(text)
    with pytest.raises(WorkbenchError, match=message):
        load_suite("x", tmp_path)


def test_numbers_of_a_suite_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("suite: x\ntasks: [add]\nalpha: 1e-2\nchance: {add: 5e-1}\nmin_effect: 2e-2\n")
    suite = load_suite(tmp_path / "x.yaml", tmp_path)
    assert (suite.alpha, suite.chance, suite.min_effect) == (0.01, {"add": 0.5}, 0.02)


def test_unknown_suite_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "evals" / "suites").mkdir(parents=True)
    (tmp_path / "evals" / "suites" / "starter.yaml").write_text("suite: starter\ntasks: [add]\n")
    with pytest.raises(WorkbenchError, match=r"unknown suite 'start'") as error:
        load_suite("start", tmp_path)
    assert error.value.hint == "Did you mean 'starter'?"
    assert load_suite("starter", tmp_path) == load_suite("evals/suites/starter.yaml", tmp_path)


def test_store_refuses_a_colliding_digest(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    plan, store = plan_of(tasks_dir, tokenizer, limit=2), ScoreStore(tmp_path)
    evaluate(plan, store, A, tiny)
    twin = A.key(plan)[:12] + "b" * 20
    with pytest.raises(WorkbenchError, match=rf"expected {twin} under"):
        store.read(plan, twin)
    shutil.rmtree(tmp_path / f"toy-{plan.digest[:12]}")
    with pytest.raises(WorkbenchError, match=r"has no scores on suite 'toy'"):
        store.read(plan, A.key(plan))


def test_a_deeply_nested_document_is_refused_before_the_task_is_built(tmp_path: Path) -> None:
    """`datasets` takes time that doubles with every level: at 40 levels the plan of a suite would never be made."""
    from workbench.scores.tasks import MAX_LEVELS, task_index

    (tmp_path / "deep.yaml").write_text(
        "task: deep\ncustom_dataset: !function localdata.jsonl\ndataset_kwargs: {data_files: {test: deep.jsonl}}\ntest_split: test\n"
    )
    nested = "[" * 40 + "]" * 40
    (tmp_path / "deep.jsonl").write_text('{"prompt": "a"}\n{"prompt": ' + nested + "}\n")
    with pytest.raises(WorkbenchError, match=rf"deep\.jsonl:2: task 'deep': the document has more than {MAX_LEVELS} levels"):
        task_index(tmp_path)["deep"].check("deep")
    (tmp_path / "deep.jsonl").write_text('{"prompt": ' + "[" * (MAX_LEVELS - 1) + "]" * (MAX_LEVELS - 1) + "}\n")
    assert task_index(tmp_path)["deep"].check("deep") == (tmp_path / "deep.jsonl",)


def test_what_a_tasks_code_raises_names_the_task(tmp_path: Path) -> None:
    """Templates and code of a task may raise anything: here lm-eval evaluates a text as Python."""
    from workbench.evaluate.tasks import source_of
    from workbench.scores.tasks import task_index

    shutil.copyfile(TASKS / "localdata.py", tmp_path / "localdata.py")
    (tmp_path / "odd.yaml").write_text(
        "task: odd\ncustom_dataset: !function localdata.jsonl\ndataset_kwargs: {data_files: {test: odd.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choic{\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "gold": 0}\n')
    with pytest.raises(WorkbenchError, match=r"task 'odd' could not be (loaded|built): SyntaxError"):
        source_of("odd", Suite(suite="x", tasks=("odd",)), task_index(tmp_path), tmp_path)
