"""`suite ls|show|check`: each check on data that fail it and on data that pass, and the project's own suites."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import run
from worlds.jsonl import write_jsonl
from worlds.local_tasks import CHOICE, GENERATE, LOCALDATA, documents, write_data
from worlds.places import EVALS, PROJECT
from worlds.suites import checks

from workbench.ground.errors import WorkbenchError
from workbench.scores.paired import paired
from workbench.scores.plan import Item, subset
from workbench.scores.suite import load_suite
from workbench.suites.check import check_suite, list_suites, show_suite


def edit(place: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    docs = documents()
    change(docs)
    write_data(place / "evals" / "tasks", docs)


def test_a_sound_suite_passes(place: Path) -> None:
    found = checks(place)
    assert {c.status for c in found.values()} == {"ok"}
    names = ["data", "clusters", "choices", "gold answers", "length", "few-shot", "blanks", "duplicates"]
    assert [check for task, check in found if task == "pick"] == names
    assert [check for task, check in found if task == "copy"] == [n for n in names if n != "choices"]
    # A byte a token: the longest prompt is "Say k0... again again again ->" of 28 bytes, and 4 tokens are generated.
    longest = max(len(d["prompt"].encode()) for d in documents())
    assert f"longest input {longest + 4} of 256 tokens" in found["copy", "length"].found
    ending = max(len(f"{d['prompt']} {c}".encode()) for d in documents() for c in d["choices"])
    assert f"longest input {ending - 1} of 256 tokens" in found["pick", "length"].found


def empty(docs: list[dict[str, Any]]) -> None:
    docs.clear()


def same_id(docs: list[dict[str, Any]]) -> None:
    docs[3]["id"] = docs[2]["id"]


def gold_outside(docs: list[dict[str, Any]]) -> None:
    docs[4]["gold"] = 3


def gold_negative(docs: list[dict[str, Any]]) -> None:
    docs[4]["gold"] = -1


def equal_choices(docs: list[dict[str, Any]]) -> None:
    docs[5]["choices"][2] = docs[5]["choices"][1]


def long_prompt(docs: list[dict[str, Any]]) -> None:
    docs[6]["prompt"] = "x" * 253


def cut_answer(docs: list[dict[str, Any]]) -> None:
    docs[7]["answer"] = "two words "  # the filter strips the blank, the target keeps it


def blank(docs: list[dict[str, Any]]) -> None:
    docs[8]["prompt"] += " "


def twice(docs: list[dict[str, Any]]) -> None:
    docs[10].update({k: docs[9][k] for k in ("prompt", "choices")})


@pytest.mark.parametrize(
    ("change", "task", "check", "status", "found"),
    [
        (empty, "copy", "data", "failed", "task 'copy' has no items"),
        (same_id, "pick", "data", "failed", "1 ids occur more than once, the first is 'copy-002'"),
        (gold_outside, "pick", "choices", "failed", "the gold answer is none of the choices in 1 item (copy-004)"),
        (gold_negative, "pick", "choices", "failed", "the gold answer is none of the choices in 1 item (copy-004)"),
        (equal_choices, "pick", "choices", "failed", "two choices are equal in 1 item (copy-005)"),
        (long_prompt, "copy", "length", "failed", "longest input 257 of 256 tokens (4 of them generated): 1 item (copy-006) would be cut"),
        (cut_answer, "copy", "gold answers", "failed", "exact_match of the gold answer is not 1 in 1 item (copy-007): target 'two words ' scores 0"),
        (blank, "pick", "blanks", "warning", "contexts end in a space in 1 item (copy-008)"),
        (twice, "copy", "duplicates", "warning", "the same prompt and choices in 2 items (copy-009, copy-010)"),
    ],
)  # fmt: skip
def test_each_check_fails_on_what_it_is_for(
    place: Path, change: Callable[..., None], task: str, check: str, status: str, found: str
) -> None:
    edit(place, change)
    one = checks(place)[task, check]
    assert one.status == status
    assert found in one.found
    assert one.hint


def test_a_prompt_that_just_fits(place: Path) -> None:
    edit(place, lambda docs: docs[6].update(prompt="x" * 252))
    assert checks(place)["copy", "length"].status == "ok"


@pytest.mark.parametrize(("k", "status"), [(7, "failed"), (8, "warning"), (19, "warning"), (20, "ok")])
def test_clusters(place: Path, k: int, status: str) -> None:
    edit(place, lambda docs: [d.update(cluster=f"t{i % k}") for i, d in enumerate(docs)])  # type: ignore[func-returns-value]
    (place / "evals" / "suites" / "toy.yaml").write_text("suite: toy\ntasks: [copy, pick]\n")
    assert checks(place)["copy", "clusters"].status == status
    assert checks(place, limit=4)["copy", "clusters"].status == status, "a limit is for the other checks"


@pytest.mark.parametrize(
    ("settings", "still", "moved", "status"),
    [
        # Log(.025) / log(1 - tolerance / worst) clusters or items without a change exclude a loss. With one rise and one fall in two of 8 clusters,
        # the error of the mean is sqrt(8 / 7 * 2) / 24, and 24 ((t + z) error / tolerance)^2 items have 80 % power; 60 make 20 clusters.
        ("tolerance: 0.5\ndrawn: items", 6, 60, "ok"),
        ("tolerance: 0.5", 16, 60, "ok"),  # 5.3 clusters of 3 items
        ("tolerance: 0.02\ndrawn: items", 183, 2448, "warning"),
        ("tolerance: 0.02\nworst: 0.3\ndrawn: items", 54, 2448, "warning"),
        ("tolerance: 0.2\ndrawn: items", 17, 60, "ok"),
    ],
)
def test_items_that_a_tolerance_needs(place: Path, settings: str, still: int, moved: int, status: str) -> None:
    (place / "evals" / "suites" / "toy.yaml").write_text(
        f"suite: toy\ntasks: [copy, pick]\nroles: {{pick: retention}}\n{settings}\n"
    )
    found = checks(place)
    assert ("copy", "tolerance") not in found, "a skill has no tolerance"
    one = found["pick", "tolerance"]
    assert (one.status, bool(one.hint)) == (status, status == "warning")
    assert one.found.startswith("24 items; a loss of ")
    assert f"from about {still} items on if none changes, from {moved} on if 4 % change" in one.found
    # The verdict is that of reports: this many items without a change are safe, one fewer are not.
    suite = load_suite("toy", place)
    tolerance, worst = suite.tolerance_of("pick", share=True), suite.worst_of("pick", share=True)
    assert tolerance is not None
    if suite.draws_items("pick"):
        same = [paired([1.0] * items, [1.0] * items, worst=worst or 1.0) for items in (still - 1, still)]
        assert [pair.excludes(tolerance, -1, 0.025) for pair in same] == [False, True]


def test_examples_among_the_test_documents(place: Path) -> None:
    task = place / "evals" / "tasks" / "copy.yaml"
    shots = [{"prompt": f"Say z{i}->", "answer": f"z{i}"} for i in range(5)]
    write_jsonl(place / "evals" / "tasks" / "data" / "shots.jsonl", shots)
    text = (
        GENERATE.replace("{test: data/copy.jsonl}", "{test: data/copy.jsonl, fewshot: data/shots.jsonl}")
        + "num_fewshot: 2\nfewshot_split: fewshot\n"
    )
    task.write_text(text)
    assert checks(place)["copy", "few-shot"].found == "2 examples from 5 documents, none of them a test document"
    docs = documents()
    shots.append({k: docs[3][k] for k in ("prompt", "answer")})  # without its id
    write_jsonl(place / "evals" / "tasks" / "data" / "shots.jsonl", shots)
    one = checks(place)["copy", "few-shot"]
    assert one.status == "failed"
    assert "1 test documents are in the pool of 6 examples" in one.found


def test_lower_is_better_wants_0_and_other_metrics_only_warn(place: Path) -> None:
    tasks = place / "evals" / "tasks"
    code = "\n\ndef off(doc, results):\n    return {'match': float(results[0] == doc['answer']), 'error': float(results[0] != doc['answer']), 'half': 0.5}\n"
    (tasks / "localdata.py").write_text(LOCALDATA + code)
    metrics = ("process_results: !function localdata.off\nmetric_list:\n  - {metric: match, aggregation: mean, higher_is_better: true}\n"
               "  - {metric: error, aggregation: mean, higher_is_better: false}\n")  # fmt: skip
    (tasks / "copy.yaml").write_text(GENERATE.split("metric_list")[0] + metrics)
    assert checks(place)["copy", "gold answers"].found == "perfect score in match, error"
    (tasks / "copy.yaml").write_text(
        GENERATE.split("metric_list")[0] + metrics + "  - {metric: half, aggregation: mean, higher_is_better: true}\n"
    )
    one = checks(place)["copy", "gold answers"]
    assert (one.status, one.found) == ("warning", "match ok; no perfect score: half in 24 items")
    written = (tasks / "localdata.py").stat()
    (tasks / "localdata.py").write_text(
        LOCALDATA + code.replace("'error': float(results[0] != ", "'error': float(results[0] == ")
    )
    os.utime(tasks / "localdata.py", ns=(written.st_atime_ns, written.st_mtime_ns))  # Python's compiled file looks fresh
    (tasks / "copy.yaml").write_text(GENERATE.split("metric_list")[0] + metrics)
    assert checks(place)["copy", "gold answers"].found == "match ok; no perfect score: error in 24 items"


def test_several_right_choices_and_mutual_information(place: Path) -> None:
    edit(place, lambda docs: [d.update(gold=[0, 2]) for d in docs])  # type: ignore[func-returns-value]
    text = CHOICE.replace("metadata", "  - {metric: acc_mutual_info, aggregation: mean, higher_is_better: true}\nmetadata")
    (place / "evals" / "tasks" / "pick.yaml").write_text(CHOICE)
    assert checks(place)["pick", "gold answers"].status == "ok"
    write_data(place / "evals" / "tasks", documents())
    (place / "evals" / "tasks" / "pick.yaml").write_text(text)
    assert checks(place)["pick", "gold answers"].found == "perfect score in acc, acc_norm, acc_mutual_info"


def test_a_definition_that_fails_on_a_document_is_a_finding(place: Path) -> None:
    (place / "evals" / "tasks" / "pick.yaml").write_text(
        CHOICE.replace("doc_to_choice: choices", 'doc_to_choice: "{{missing.x}}"')
    )
    found = checks(place)
    assert found["pick", "data"].status == "failed"
    assert "pick" in found["pick", "data"].found
    assert found["copy", "gold answers"].status == "ok", "the other task is checked all the same"


def test_contrasts_pair_by_id(place: Path) -> None:
    suite = place / "evals" / "suites" / "toy.yaml"
    text = "suite: toy\ntasks: [copy, pick]\ncluster: id\nmin_effect: {copy: 0.1}\ncontrasts: {gain: {of: pick, minus: copy, metric: exact_match}}\n"
    suite.write_text(text)
    one = checks(place)["toy", "suite"]
    assert (one.status, one.found) == ("failed", "suite 'toy', contrast 'gain': task 'pick' has no metric 'exact_match'")
    both = CHOICE.replace("metadata", "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\nmetadata")
    (place / "evals" / "tasks" / "pick.yaml").write_text(both)
    assert checks(place)["gain", "contrast"].found == "24 items of pick and copy have the same id"
    shown = run("suite", "show", "toy").stdout
    assert "contrast gain: pick minus copy" in shown
    assert "smallest effect copy 0.1" in shown
    suite.write_text(text + "limit: {copy: 6}\n")
    one = checks(place)["gain", "contrast"]
    assert (one.status, one.found.partition(";")[0]) == ("warning", "6 items of pick and copy have the same id")
    docs = [{**d, "id": f"other-{d['id']}"} for d in documents()]
    write_jsonl(place / "evals" / "tasks" / "data" / "other.jsonl", docs)
    (place / "evals" / "tasks" / "pick.yaml").write_text(both.replace("data/copy", "data/other"))
    assert checks(place)["gain", "contrast"].status == "failed"


def test_command_line(place: Path) -> None:
    result = run("suite", "check", "toy", "--base", "base", "--verbose")
    assert "perfect score in exact_match" in result.stdout
    assert result.stdout.count("--- copy ") == 3
    assert documents()[0]["prompt"] in result.stdout
    document = json.loads(run("suite", "check", "toy", "--base", "base", "--json", "--limit", "5").stdout)
    assert document["ok"] is True
    assert {c["task"] for c in document["checks"]} == {"copy", "pick"}
    assert "5 of 24 items" in document["checks"][0]["found"]
    assert [len(e) for e in document["examples"].values()] == [3, 3]
    edit(place, gold_outside)
    error = run("suite", "check", "toy", "--base", "base", code=3).exception
    assert isinstance(error, WorkbenchError)
    assert "suite toy: pick, choices: the gold answer is none of the choices" in error.message
    assert "Correct these items" in str(error.hint)
    error = run("suite", "check", "toy", code=2).exception
    assert "--base DIR" in str(getattr(error, "hint", ""))
    error = run("suite", "check", "tyo", "--base", "base", code=1).exception
    assert getattr(error, "hint", "") == "Did you mean 'toy'?"


def test_a_limited_check_names_the_item_that_is_wrong(place: Path) -> None:
    chosen = subset([Item(doc["id"], "") for doc in documents()], 6)[-1].id

    def break_it(docs: list[dict[str, Any]]) -> None:
        next(doc for doc in docs if doc["id"] == chosen)["gold"] = 7

    edit(place, break_it)
    found = checks(place, limit=6)["pick", "choices"]
    assert found.status == "failed"
    assert f"({chosen})" in found.found


def test_ls_and_show(place: Path) -> None:
    (place / "evals" / "suites" / "bad.yaml").write_text("suite: bad\ntasks: []\n")
    listed = list(list_suites(place))
    assert [(s.suite, s.tasks) for s in listed] == [("bad", []), ("toy", ["copy", "pick"])]
    assert "tasks" in str(listed[0].error)
    assert "Two small tasks" in run("suite", "ls").stdout
    shown = json.loads(run("suite", "show", "toy", "--json").stdout)
    assert shown["plan"] is None
    assert (shown["tasks"]["copy"]["n"], shown["tasks"]["copy"]["clusters"], shown["tasks"]["copy"]["primary"]) == (
        24,
        24,
        "exact_match",
    )
    with_base = show_suite("toy", place, "base").to_dict()
    assert len(with_base["plan"]) == 32
    assert with_base["dtype"] == "float32"
    assert with_base["tasks"] == shown["tasks"]
    assert "plan unknown" in run("suite", "show", "toy").stderr
    assert f"plan {with_base['plan'][:12]}" in run("suite", "show", "toy", "--base", "base").stdout
    assert {task: facts["chance"] for task, facts in shown["tasks"].items()} == {"copy": 0.0, "pick": None}
    assert "1/choices" in run("suite", "show", "toy").stdout


@pytest.mark.starter
@pytest.mark.nightly
@pytest.mark.parametrize("suite", sorted(p.stem for p in (EVALS / "suites").glob("*.yaml")))
def test_suites_of_this_project_pass(suite: str) -> None:
    assert load_suite(suite, PROJECT).description
    assert check_suite(suite, PROJECT).failed == []
