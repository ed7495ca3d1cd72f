"""Suites say what their tasks are, and `eval` prints scores by suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from worlds.stored_scores import BASE, TIES, right, stored

from workbench.facts.facts import WRITTEN
from workbench.scores.groups import GroupScore, by_suite
from workbench.scores.store import Metric, Scores, ScoreStore, TaskScores
from workbench.scores.suite import Suite

OWN = Suite.model_validate(
    yaml.safe_load("""
{suite: s, tasks: [a, b], cluster: {a: passage}, limit: {a: 7}, min_effect: {a: 0.1}, tolerance: {a: 0.2}, worst: {a: 0.3}, drawn: {a: items},
roles: {a: retention}, chance: {a: 0.5}, owners: {b: brick}, contrasts: {c: {of: a, minus: b}}, facts: {tasks: {efficacy: a}}, gen_kwargs: {a: 1}}
""")
)


def test_settings_of_a_task() -> None:
    """One value for all tasks, which counts for metrics in [0, 1] only where it has a unit, or by task, with a default for the others."""
    one = Suite(suite="s", tasks=("a", "b"), cluster="passage", limit=7, min_effect=0.1, tolerance=0.2, worst=0.3, drawn="items")

    def said(suite: Suite, task: str, share: bool) -> tuple[Any, ...]:
        numbers = (of(task, share=share) for of in (suite.min_effect_of, suite.tolerance_of, suite.worst_of))
        return (suite.cluster_of(task), suite.limit_of(task), *numbers, suite.draws_items(task))

    assert said(one, "a", True) == ("passage", 7, 0.1, 0.2, 0.3, True)
    assert said(one, "a", False) == ("passage", 7, None, None, None, True)
    assert said(OWN, "a", True) == said(OWN, "a", False) == ("passage", 7, 0.1, 0.2, 0.3, True)
    assert said(OWN, "b", True) == ("cluster", None, 0.02, 0.02, None, False)
    assert said(OWN, "b", False) == ("cluster", None, None, None, None, False)
    assert [(OWN.role_of(task), OWN.guards(task)) for task in "abc"] == [("retention", True), ("skill", False), ("other", False)]
    kinds = [
        ("a", "multiple_choice", "acc"),
        ("b", "multiple_choice", "acc"),
        ("b", "multiple_choice", f"{WRITTEN},x"),
        ("b", "text", "acc"),
    ]
    assert [OWN.chance_of(*kind) for kind in kinds] == [0.5, None, 0.0, 0.0]


def test_some_tasks_of_a_suite() -> None:
    assert OWN.only({"b", "a"}) is OWN
    first, second = OWN.only({"a"}), OWN.only({"b"})
    assert (first.tasks, first.contrasts, first.facts, first.limit, first.owners) == (("a",), {}, OWN.facts, {"a": 7}, {})
    assert (second.tasks, second.facts, second.limit, second.owners) == (("b",), None, {}, {"b": "brick"})
    assert first.gen_kwargs == second.gen_kwargs == {"a": 1}, "settings that are no tasks"


def test_defaults_and_bounds_of_a_suite() -> None:
    nothing = ("primary", "chance", "contrasts", "roles", "owners", "gen_kwargs")
    assert Suite(suite="s", tasks=("t",)).model_dump() == {
        "suite": "s",
        "tasks": ("t",),
        "description": "",
        "cluster": "cluster",
        "baseline": "base",
        "alpha": 0.05,
        "correction": "max-t",
        "min_effect": 0.02,
        "looks": 1,
        "drawn": "clusters",
        "chat_template": False,
        "scorer": "prefix",
        "backend": "hf",
        **{k: {} for k in nothing},
        **dict.fromkeys(("limit", "tolerance", "worst", "facts", "num_fewshot", "system_instruction")),
    }
    for part, name in ((OWN, "suite"), (OWN.contrasts["c"], "of"), (OWN.facts, "source")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, "x")
    wrong: list[tuple[str, Any, str]] = [
        ("contrasts", {"c": {"of": "a", "minus": "b", "metrc": "x"}}, "Extra inputs"),
        ("facts", {"tasks": {}, "sorce": "x"}, "Extra inputs"),
        ("system_instruction", "", "at least 1 character"),
        ("num_fewshot", -1, "greater than or equal to 0"),
        *(("alpha", alpha, "than [01]") for alpha in (0.0, 1.0)),
        *((name, {"a": -1e-9}, "greater than or equal to 0") for name in ("min_effect", "tolerance")),
        ("worst", {"a": 0.0}, "greater than 0"),
    ]
    for name, value, message in wrong:
        with pytest.raises(ValidationError, match=message):
            Suite.model_validate({**OWN.model_dump(), name: value})


def test_scores_by_suite_as_eval_prints_them(tmp_path: Path) -> None:
    """One document, or a list where there are several suites; groups stand at the configuration that has them."""

    def made(suite: str) -> list[Scores]:
        about = TaskScores(n=8, metrics={"em": Metric(value=0.5, low=0.25, high=0.75)})
        values = {c: {"t": right(0.5, 8)} for c in (BASE, TIES)}
        return [s.model_copy(update={"tasks": {"t": about}}) for s in stored(ScoreStore(tmp_path), values, suite=suite)]

    one, other = made("one"), made("other")
    group = GroupScore(group="g", alias="G", metric="em", filter="none", value=0.5, weighted=True, tasks=1, n=8)
    scores = {"t": {"n": 8, "em": {"value": 0.5, "low": 0.25, "high": 0.75}}}
    lines = [{"name": c.name, "digest": c.digest, "weights": c.of_weights, "tasks": scores} for c in (BASE, TIES)]
    lines[1]["groups"] = [group.to_dict()]
    assert one[0].plan == other[0].plan, "suites that differ in their analysis alone have one plan"
    found = by_suite(one, {("one", "ties"): [group], ("one", "base"): []}, None)
    assert not isinstance(found, list)
    assert found.to_dict() == {"suite": "one", "plan": one[0].plan, "configurations": lines, "warnings": []}
    both = by_suite([*one, *other], {}, None)
    assert isinstance(both, list)
    assert [(s.suite, s.plan, len(s.configurations)) for s in both] == [("one", one[0].plan, 2), ("other", other[0].plan, 2)]
