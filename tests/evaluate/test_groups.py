"""Groups of tasks and Brier scores, against lm-eval's own numbers on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call
from worlds.jsonl import write_jsonl
from worlds.local_tasks import CHOICE, GENERATE, A, documents, suite, tiny
from worlds.suites import checks

from workbench.compare.compare import compare
from workbench.evaluate import build_plan, evaluate
from workbench.evaluate.check import rows_at_once
from workbench.evaluate.gold import sentence_for
from workbench.evaluate.packed import Bounds
from workbench.ground.errors import WorkbenchError
from workbench.scores.groups import aggregated
from workbench.scores.store import Configuration, ScoreStore
from workbench.scores.suite import Suite

METRICS = "\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}\n"
INNER = """
group: choices
group_alias: All choices
task: [picks, {task: pick_small}]
aggregate_metric_list:
  - {metric: acc}
  - {metric: brier_score, weight_by_size: false, filter_list: none}
"""
OUTER = """
group: whole
task: [choices, both]
aggregate_metric_list:
  - {metric: acc, weight_by_size: false}
  - {metric: exact_match, weight_by_size: true, filter_list: [plain, strip]}
  - {metric: acc_norm}
"""


@pytest.fixture
def grouped(tasks_dir: Path) -> Path:
    """An mmlu-like folder: a group of a tag and a task, inside a group with a task of two filters; tasks of three sizes."""
    head = CHOICE.partition("metric_list:")[0]
    for name, count in (("large", 24), ("middle", 11), ("pick_small", 5)):
        tag = "" if name == "pick_small" else "tag: picks\n"
        docs = [{**doc, "gold": (i + count) % 3} for i, doc in enumerate(documents(count))]
        write_jsonl(tasks_dir / "data" / f"{name}.jsonl", docs)
        text = head.replace("task: pick\n", f"task: {name}\n").replace("data/copy.jsonl", f"data/{name}.jsonl")
        (tasks_dir / f"{name}.yaml").write_text(f"{text}{tag}metric_list:{METRICS}")
    both = GENERATE.replace("task: copy\n", "task: both\n").replace(
        "filter_list: [", "filter_list: [{name: plain, filter: [{function: take_first}]}, "
    )
    (tasks_dir / "both.yaml").write_text(both)
    (tasks_dir / "_choices.yaml").write_text(INNER)
    (tasks_dir / "whole.yaml").write_text(OUTER)
    return tasks_dir


def theirs(folder: Path, tokenizer: Any, model: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, logits_cache=False)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return dict(lm_eval.simple_evaluate(lm, tasks=["whole"], task_manager=manager, bootstrap_iters=0)["results"])


def test_aggregates_are_lm_evals(grouped: Path, tokenizer: Any, tmp_path: Path) -> None:
    made = Suite(suite="toy", tasks=("whole",), scorer="hflm")
    plan = build_plan(made, tokenizer, tasks_dir=grouped, dtype="float32", batch_size=4)
    assert sorted(plan.suite.tasks) == ["both", "large", "middle", "pick_small"]
    store = ScoreStore(tmp_path / "scores")
    scores = evaluate(plan, store, A, tiny)
    expected = theirs(grouped, tokenizer, tiny())
    found = [group.to_dict() for group in aggregated(store.record(scores), scores)]
    assert {(g["group"], g["metric"], g["filter"]) for g in found} == {
        ("whole", "acc", "none"), ("whole", "exact_match", "plain"), ("whole", "exact_match", "strip"),
        ("choices", "acc", "none"), ("choices", "brier_score", "none"),
    }  # fmt: skip
    for g in found:
        assert g["value"] == pytest.approx(expected[g["group"]][f"{g['metric']},{g['filter']}"], abs=1e-12), g
    values = {(g["group"], g["metric"]): g for g in found}
    weighted, plain = values["choices", "acc"], values["whole", "acc"]
    assert weighted["n"] == plain["n"] == 40
    assert (weighted["weighted"], plain["weighted"]) == (True, False)
    assert weighted["value"] != plain["value"]  # the same tasks, other weights
    assert weighted["alias"] == "All choices"
    for task in ("large", "middle", "pick_small"):
        assert scores.tasks[task].metrics["brier_score"].value == pytest.approx(expected[task]["brier_score,none"], abs=1e-6)


def test_a_brier_score_is_compared_item_by_item(grouped: Path, tokenizer: Any, tmp_path: Path) -> None:
    made = Suite(suite="toy", tasks=("choices",), primary={"choices": "brier_score"}, baseline="a")
    plan = build_plan(made, tokenizer, tasks_dir=grouped, dtype="float32", batch_size=4)
    assert plan.lower["large"] == ("brier_score",)
    store, other = ScoreStore(tmp_path / "scores"), Configuration("b" * 32, "b")
    scores = [evaluate(plan, store, c, lambda seed=seed: tiny(seed)) for c, seed in ((A, 0), (other, 1))]
    document = compare(store, scores).to_dict()
    assert {(row["task"], row["metric"]) for row in document["rows"]} == {
        (t, "brier_score") for t in ("large", "middle", "pick_small")
    }
    assert all(task["lower"] for task in document["tasks"])
    shown = {(g["configuration"], g["metric"]): g["value"] for g in document["groups"]}
    assert shown.keys() == {(c, m) for c in ("a", "b") for m in ("acc", "brier_score")}
    means = [s.tasks[t].metrics["brier_score"].value for s in scores[1:] for t in ("large", "middle", "pick_small")]
    assert shown["b", "brier_score"] == pytest.approx(sum(means) / 3, abs=1e-12)


def test_settings_of_a_group_hold_for_its_tasks(grouped: Path, tokenizer: Any) -> None:
    fields = {
        "tasks": ["copy", "choices"],
        "chance": {"choices": 1 / 3, "copy": 0.1},
        "limit": {"choices": 4},
        "cluster": {"choices": "id"},
    }
    plan = build_plan(suite(**fields), tokenizer, tasks_dir=grouped)
    assert plan.suite.chance == {"copy": 0.1, **dict.fromkeys(("large", "middle", "pick_small"), 1 / 3)}
    assert {task: len(items) for task, items in plan.items.items()} == {"copy": 24, "large": 4, "middle": 4, "pick_small": 4}
    assert plan.suite.cluster_of("large") == "id"
    assert build_plan(suite(tasks=["large", "choices"], chance={}), tokenizer, tasks_dir=grouped).suite.tasks == (
        "large",
        "middle",
        "pick_small",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group: g\ntask: [lage]\n", "group 'g': unknown task 'lage'"),
        ("group: g\ntask: [g]\n", "group 'g' contains itself"),
        ("group: g\ntask: [{task: large, num_fewshot: 2}]\n", "group 'g': expected names of tasks and groups"),
        ("group: g\ntask: [large]\naggregate_metric_list: [{metrik: acc}]\n", "aggregate_metric_list: expected"),
        ("group: g\ntask: [large]\naggregate_metric_list: [{metric: acc, aggregation: median}]\n", "lm-eval supports only mean"),
    ],
)
def test_bad_groups(text: str, message: str, grouped: Path, tokenizer: Any) -> None:
    (grouped / "g.yaml").write_text(text)
    with pytest.raises(WorkbenchError, match=message) as error:
        build_plan(suite(tasks=["g"], chance={}), tokenizer, tasks_dir=grouped)
    assert "g.yaml" in error.value.message


@pytest.mark.part("suites")
def test_eval_shows_groups(place: Path) -> None:
    (place / "evals/tasks/all.yaml").write_text("group: all\ntask: [pick]\naggregate_metric_list: [{metric: acc}]\n")
    (place / "evals/suites/all.yaml").write_text("suite: all\ntasks: [all]\ncluster: id\n")
    (document,) = json.loads(call("eval", "base", "--suite", "all", "--json").stdout)["configurations"]
    (group,) = document["groups"]
    assert (group["group"], group["metric"], group["n"], group["tasks"]) == ("all", "acc", 24, 1)
    assert group["value"] == document["tasks"]["pick"]["acc"]["value"]
    assert f"{group['value']:.4f}" in call("eval", "base", "--suite", "all").stdout
    checked = json.loads(call("suite", "check", "all", "--base", "base", "--json").stdout)
    assert {check["task"] for check in checked["checks"]} == {"pick"}


# Suite check: filters that look for the answer in a sentence


@pytest.mark.parametrize(
    ("pattern", "answer", "expected"),
    [
        (r"(?i)the answer is:? \(?([A-D])\)?", "B", "the answer is B"),
        (r"#### (\-?[0-9\.\,]+)", "72", "#### 72"),
        (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "72", "72"),
        (r"((?<=The answer is )(.*)(?=.)|(?<=answer is )(.*)(?=.))", "so", "The answer is so."),
        (r"\bis ([\w\s]+?)(?:\.|$)", "the cat", "is the cat."),
        (r"(?<=is )\w+", "cat", "is cat"),
        (r"answer: (no|yes)", "yes", "answer: yes"),
        (r"answer is ([A-D])", "E", None),
        (r"(unclosed", "x", None),
        (r"(\w) \1", "x", None),
    ],
)
def test_a_sentence_for_an_answer(pattern: str, answer: str, expected: str | None) -> None:
    assert sentence_for(pattern, answer) == expected


def sentence(answers: str) -> str:
    by = f"{{name: strict, filter: [{{function: regex, regex_pattern: 'The answer is ({answers})\\.'}}, {{function: take_first}}]}}"
    return GENERATE.replace(
        "filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]", f"filter_list: [{by}]"
    )


@pytest.mark.part("suites")
def test_filters_that_look_for_a_sentence_pass(place: Path) -> None:
    (place / "evals/tasks/copy.yaml").write_text(sentence(r"\w+"))
    assert checks(place)["copy", "gold answers"].status == "ok"
    (place / "evals/tasks/copy.yaml").write_text(sentence(r"[0-9]+"))  # no answer fits: right answers can never count
    found = checks(place)["copy", "gold answers"]
    assert found.status == "failed"
    assert "exact_match of the gold answer is not 1 in 24 items" in found.found


def test_the_check_of_a_scorer_holds_few_logits() -> None:
    """HFLM keeps logits of all positions of a batch: 400 tokens x 49,152 words x 32 rows would be 2.5 GB in float32."""
    bounds = Bounds(max_length=2048, batch_size=32, vocabulary=49_152)
    assert rows_at_once(bounds, 400) == 3
    assert rows_at_once(bounds, 20) == 32
    assert rows_at_once(bounds, 10**6) == 1  # cut to the model's length
