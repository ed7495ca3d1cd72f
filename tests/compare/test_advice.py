"""The sentences of a recommendation, from decisions that are made up: each branch with the exact text that users read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from workbench.compare.advice import (
    Candidate,
    CandidateRole,
    Decision,
    Guarded,
    counted,
    details,
    headline,
    helped,
    merge_loses,
)
from workbench.compare.differences import Difference
from workbench.compare.kept import Kept
from workbench.compare.leaders import MOST_MEMBERS, MeanDifference

MINUS = "\N{MINUS SIGN}"
NO = "No configuration can be recommended: "


def row(task: str = "facts", **changes: Any) -> Difference:
    """A guarded task on which a configuration is not shown safe: it loses 2 points of 80, and 5 more are possible."""
    fields = {
        "configuration": "a", "role": "configuration", "task": task, "metric": "acc", "value": 0.78, "baseline_value": 0.8, "diff": -0.02,
        "low": -0.06, "high": 0.02, "low_adj": -0.07, "high_adj": 0.03, "p": 0.2, "p_adj": 0.4, "n": 100, "clusters": 20, "mde": 0.05,
        "needs": 712, "verdict": "not shown safe", "reason": "the interval is wide", "wins": 1, "losses": 3, "tolerance": 0.0125,
    }  # fmt: skip
    return Difference.model_validate({**fields, **changes})


def mean(name: str, against: str = "base", **changes: Any) -> MeanDifference:
    fields = {"configuration": name, "against": against, "diff": 0.1, "low": 0.05, "high": 0.15, "p": 0.01, "verdict": "better"}
    return MeanDifference.model_validate({**fields, **changes})


def candidate(
    name: str, level: float, guarded: Guarded = "safe", role: CandidateRole = "configuration", **gain: Any
) -> Candidate:
    """A candidate with its difference from the baseline."""
    against = None if guarded == "baseline" else mean(name, **gain)
    return Candidate(
        configuration=name, role=role, mean=level, guarded=guarded, against_baseline=against, against_best=None, form=None, bytes=None,
        bricks=2,
    )  # fmt: skip


WIKI = row("wiki", metric="bits_per_byte", value=2.204, baseline_value=1.1, verdict="worse", lower=True)
A, B, C, D, E, F = (candidate(name, 0.5 - i / 100) for i, name in enumerate("abcdef"))


def chosen(*ranked: Candidate, of: int = 0, **fields: Any) -> Decision:
    given = {name: dict.fromkeys((c.configuration for c in ranked), ()) | fields.pop(name, {}) for name in ("lost", "unsafe")}
    return Decision("base", chosen=ranked[of], ranked=ranked, **given, **fields)


def none(
    cause: Any, about: Candidate | None = None, *ranked: Candidate, rows: Mapping[str, Any] | None = None, **fields: Any
) -> Decision:
    unsafe = rows if rows is not None else {about.configuration: ()} if about else {}
    lost: dict[str, Any] = {c.configuration: () for c in [*ranked, *([about] if about else [])]} | fields.pop("lost", {})
    return Decision(
        "base", closest=about, cause=cause, ranked=ranked or ((about,) if about else ()), unsafe=unsafe, lost=lost, **fields
    )


SMALL = C.model_copy(update={"bricks": 1})
GAP = "+10.0 [+5.0, +15.0] points"
HEADS: list[tuple[Decision, str]] = [
    (chosen(A, guarded=("x",)), f"Ship a: mean over skills 50.0; {GAP} against base; safe on x."),
    (chosen(A, B, guarded=("x", "y", "z")), f"Ship a: highest mean over skills, 50.0; {GAP} against base; safe on x, y and z."),
    (
        chosen(A, B, of=1, guarded=("w", "x", "y", "z")),
        f"Ship b: highest mean over skills of those that can be recommended, 49.0; {GAP} against base; safe on every guarded task.",
    ),
    (chosen(candidate("a", -0.0125, "no guarded task")), f"Ship a: mean over skills {MINUS}1.2; {GAP} against base; no guarded task tests for harm."),
    (
        chosen(A, guarded=("x",), outside={"a": (WIKI,)}),
        f"Ship a: mean over skills 50.0; {GAP} against base; safe on x; but worse on what this mean leaves out: "
        "wiki (bits_per_byte 1.1 \N{RIGHTWARDS ARROW} 2.2).",
    ),
    (chosen(candidate("a", 0.5, "baseline")), "Ship a: mean over skills 50.0; it is the baseline."),
    (
        chosen(candidate("a", 0.5, diff=-0.0004, low=None, high=None), guarded=("x",)),
        f"Ship a: mean over skills 50.0; 0.0 [{MINUS}inf, +inf] points against base; safe on x.",
    ),
    (
        chosen(A, SMALL, of=1, equal_to="a", guarded=("x",)),
        f"Ship c: equivalent to a, which has the highest mean, and made from fewer bricks (1 against 2); {GAP} against base; safe on x.",
    ),
    (none("unsafe", A, A, B, rows={"a": (row(verdict="worse"),)}), f"{NO}a has the highest mean, 50.0, but is worse than base on facts ({MINUS}2.0 points)."),
    (none("no mean"), f"{NO}the suite has no skill task whose scores can be averaged."),
    (none("not scored"), f"{NO}none has scores on all skill tasks."),
    (none("same weights"), f"{NO}all have the weights of base."),
    (
        none("not shown safe", candidate("b", 0.49, "not shown safe"), A, B, rows={"b": (row(), row("odd", tolerance=None), row("wide", low_adj=None), row("still", low_adj=0.0, reason="no item changed, but 4 items say little"))}),
        f"{NO}b is the best of those that are better than base, 49.0, but is not shown safe on facts (a loss of up to 7.0 points is possible, "
        "the tolerance is 1.2 points), odd, wide and still (no item changed, but 4 items say little).",
    ),
    (none("not shown safe", candidate("a", 0.5, "not shown safe")), f"{NO}a has the highest mean, 50.0, but was not scored on every guarded task."),
    (
        none("unsafe", A, rows={"a": (row(verdict="worse"), row("text", verdict="worse", lower=True, diff=0.25), row("odd"))}),
        f"{NO}a has the highest mean, 50.0, but is worse than base on facts ({MINUS}2.0 points) and text (+0.25).",
    ),
    (
        none("too few clusters", candidate("a", 0.5, reason="too few clusters: sums has 5, at least 8 needed")),
        f"{NO}these items cannot show whether a is better than base (too few clusters: sums has 5, at least 8 needed).",
    ),
    (none("not better", A), f"{NO}none is shown to be better than base; a comes closest, {GAP}."),
    (
        none("not better", candidate("a", 0.5, diff=0.0, low=-0.05, high=0.05)),
        f"{NO}none has a higher mean over skills than base; a comes closest, 0.0 [{MINUS}5.0, +5.0] points.",
    ),
    (
        none("not better", candidate("a", 0.5, diff=0.0, verdict="no item changed")),
        f"{NO}none has a higher mean over skills than base; a comes closest.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("decision", "text"), HEADS)
def test_headline(decision: Decision, text: str) -> None:
    assert headline(decision) == text


HELP: list[tuple[Decision, list[str]]] = [
    (chosen(A), []),
    (none("no mean"), ["Give the suite a task with the role `skill` whose scores lie between 0 and 1."]),
    (none("not scored"), ["Score the configurations on every suite: `workbench eval`."]),
    (none("same weights"), ["Check that the steps of the recipes use the bricks and that no weight is 0."]),
    (none("not shown safe", A), ["Score it on every guarded task."]),
    (
        none(
            "not shown safe",
            A,
            rows={"a": (row(), row(tolerance=None), row(reason="too few clusters: 5", clusters=5), row(needs=100), row(reason=None, needs=101))},
        ),
        [
            "About 720 items of facts would show that a loss as large as the observed one is safe.",
            "Give facts a tolerance in the suite, in the metric's units; decide it before you look at more scores.",
            "On facts, items from more templates or passages: 5 clusters are too few for a verdict.",
            "The observed loss on facts is as large as its tolerance: more items would hardly show it to be safe.",
            "About 110 items of facts would show that a loss as large as the observed one is safe.",
        ],
    ),
    (
        none("unsafe", A, rows={"a": (row("odd"), row("text", verdict="worse"))}, harmful={"odd": ("one",), "text": ("two", "one")}),
        ["Alone, two and one are worse on text too: lower their weights or leave them out."],
    ),
    (
        none("unsafe", A, rows={"a": (row(verdict="worse"),)}, harmful={"facts": ()}),
        ["Lower the weights (lambda) of its merge, or leave out bricks one at a time to find the one that harms."],
    ),
    (none("too few clusters", A), ["Items in more clusters, such as from more templates or passages; more items of the same clusters do not help."]),
    (
        none("not better", candidate("a", 0.5, diff=0.0, needs=99)),
        ["More items would hardly change this: try other methods, weights or bricks, for example with `workbench search`."],
    ),
    (
        none("not better", candidate("a", 0.5, needs=7154)),
        ["About 7\N{NARROW NO-BREAK SPACE}200 items over the skill tasks would show a difference as large as +10.0 points."],
    ),
    (none("not better", A), ["More items, from more templates or passages."]),
]  # fmt: skip


@pytest.mark.parametrize(("decision", "texts"), HELP)
def test_what_would_help(decision: Decision, texts: list[str]) -> None:
    assert helped(decision) == texts


def near(name: str, verdict: str = "cannot tell", **changes: Any) -> MeanDifference:
    return mean(name, "a", verdict=verdict, diff=-0.005, low=-0.02, high=0.01, **changes)


NEAR = f"({MINUS}0.5 [{MINUS}2.0, +1.0] points)"
ELSE = "Every other configuration with a lower mean is shown to be worse than a."
CONTROL = "name a recipe that makes the same weights to have it tested."
UNSAFE, UNSURE = candidate("b", 0.49, "worse"), candidate("b", 0.51, reason="the changes are skewed: one could turn")
UNSURE_IS = "is not shown to be better than base (the changes are skewed)"
DETAILS: list[tuple[Decision, list[str]]] = [
    (none("no mean"), []),
    (chosen(A), []),
    (chosen(A, B), [ELSE]),
    (none("not better", A, A, B), []),
    (chosen(candidate("a", 0.5, role="base")), ["a is the base: nothing has to be written."]),
    (chosen(A, lost={"a": ("x", "y")}), ["a is worse than base on x and y, although its mean is higher."]),
    (none("unsafe", candidate("a", 0.5, role="brick")), []),
    (
        chosen(UNSURE, A, of=1),
        [f"b has a higher mean, 51.0, but {UNSURE_IS}."],  # nothing has a lower one
    ),
    (chosen(UNSURE, A, C, of=1), [f"b has a higher mean, 51.0, but {UNSURE_IS}.", ELSE]),
    (chosen(UNSURE, A, of=1, equal_to="b", beside=()), []),
    (none("unsafe", B, UNSURE, B, rows={"b": ()}, lost={"b": ("x",)}, controls={"tuned": 0.9}), [f"b has a higher mean, 51.0, but {UNSURE_IS}."]),
    (chosen(UNSURE, A, of=1, beside=(near("b"),)), [f"b has a higher mean, 51.0, but {UNSURE_IS}."]),
    (chosen(A, B, C, D, E, of=4), [f"{name} has a higher mean, {level}, but is not shown to be better than base." for name, level in (("a", "50.0"), ("b", "49.0"), ("c", "48.0"))]),
    (chosen(A, B, beside=(near("b", needs=1234),)), [f"b is not distinguishable from it ({MINUS}0.5 [{MINUS}2.0, +1.0] points; about 1\N{NARROW NO-BREAK SPACE}300 items would tell)."]),
    (chosen(A, B, beside=(near("b", "equivalent", needs=9),)), [f"b is equivalent to it {NEAR}."]),
    (chosen(A, B, beside=(near("b", "no item changed"),)), ["b answers every item alike."]),
    (chosen(A, B, beside=(near("b", "worse"),)), [ELSE]),
    (chosen(A, SMALL, beside=(near("c"),)), [f"c is not distinguishable from it {NEAR} and is made from fewer bricks (1 against 2)."]),
    (
        chosen(A, UNSAFE, beside=(near("b"),), unsafe={"b": (row(verdict="worse"),)}),
        [f"b is not distinguishable from it {NEAR}, but is worse than base on facts ({MINUS}2.0 points)."],
    ),
    (
        chosen(A, B, C, D, E, beside=tuple(near(name) for name in "bcde")),
        [*(f"{name} is not distinguishable from it {NEAR}." for name in "bcd"), "e is not shown to be worse than a either."],
    ),
    (
        chosen(A, B, C, D, E, F, beside=tuple(near(name) for name in "bcdef")),
        [*(f"{name} is not distinguishable from it {NEAR}." for name in "bcd"), "2 more are not shown to be worse than a either."],
    ),
    (chosen(A, controls={"tuned": 0.505, "low": 0.5}), [f"The control tuned (50.5) has a higher mean. It is no candidate: {CONTROL}"]),
    (
        chosen(A, controls={"tuned": 0.6, "low": 0.4, "facts": 0.7}),
        [f"The controls tuned (60.0) and facts (70.0) have higher means. They are no candidates: {CONTROL}"],
    ),
    (chosen(A, B, members=MOST_MEMBERS), [ELSE]),
    (
        chosen(A, B, members=MOST_MEMBERS + 1),
        ["The 81 configurations are not tested against each other, which is done for 80 at most: others may be as good."],
    ),
    (chosen(A, B, looked_at=3), [ELSE, counted(3, 2)]),
    (chosen(A, B, leaders=("a", "b")), [ELSE]),
    (chosen(A, B, leaders=("a", "b", "c", "d"), alpha=0.1), [ELSE, "The best of all is one of 4, at 90 %: a, b, c and 1 more."]),
    (chosen(A, skills=("x",), items=1234, clusters=1), ["This is shown for items like the 1\N{NARROW NO-BREAK SPACE}234 of x, in 1 cluster."]),
    (
        chosen(candidate("a", 0.5, stands_up_to=0.6249), skills=("w", "x", "y", "z"), items=80, clusters=20),
        ["This is shown for items like the 80 of 4 tasks, in 20 clusters, unless one that was not drawn falls by 62.5 points or more."],
    ),
    (chosen(A, lost={"a": ("x", "wiki")}, outside={"a": (WIKI,)}), ["a is worse than base on x, although its mean is higher."]),
]  # fmt: skip


@pytest.mark.parametrize(("decision", "texts"), DETAILS)
def test_configurations_beside_it(decision: Decision, texts: list[str]) -> None:
    assert details(decision) == texts


def test_who_can_be_recommended() -> None:
    kinds: list[Guarded] = ["safe", "no guarded task", "baseline", "worse", "not shown safe"]
    assert [candidate("a", 0.5, kind).recommendable for kind in kinds] == [True, True, True, False, False]
    assert not candidate("a", 0.5, verdict="cannot tell").recommendable
    assert A.model_copy(update={"bricks": 0}).cheaper(B) == "", "a result without bricks is not made from fewer"


def test_what_a_row_says_of_itself() -> None:
    kinds = [(family, role) for family in ("compared", "guarded", "controls") for role in ("configuration", "brick")]
    rows = [row(family=family, role=role) for family, role in kinds]
    assert [r.guarded for r in rows] == [False, False, True, True, False, False]
    assert [r.apart for r in rows] == [False, False, False, True, True, True]
    assert [row(needs=needs).needed for needs in (None, 0, 99, 100, 101)] == [None, None, None, None, 101]
    ends = [(-0.07, 0.03, False), (-0.07, 0.03, True), (0.01, 0.03, False), (None, 0.03, False), (-0.07, None, True)]
    assert [row(low_adj=low, high_adj=high, lower=lower).worst for low, high, lower in ends] == [0.07, 0.03, -0.01, None, None]


def test_what_was_looked_at_before_counts() -> None:
    assert counted(1, 2) == (
        "1 other configuration was scored on these items and counts in the tests, because the best of 3 looks better by chance "
        "(`workbench scores ls` lists them)."
    )
    assert counted(2, 1).startswith("2 others were scored on these items and count in the tests, because the best of 3 looks")


def test_a_merge_that_keeps_less_than_its_bricks() -> None:
    (text,) = merge_loses("ties", "recipes/ties.yaml", Kept(value=0.81, low=0.71, high=0.9499))
    assert text == (
        "ties keeps 81 [71, 95] % of what its bricks score alone: `workbench brick advise recipes/ties.yaml` tells whether they overlap or "
        "contradict each other."
    )
    for kept in (
        Kept(value=0.8, low=0.7, high=0.95),
        Kept(value=None, low=0.5, high=0.6),
        Kept(value=0.8, low=None, high=0.9),
        Kept(value=0.8, low=0.7, high=None),
    ):
        assert merge_loses("ties", "recipes/ties.yaml", kept) == []
