"""Progress of a whole evaluation: shares by items, the time left from the pace so far, and how the terminal shows both."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from workbench.console.output import Terminal
from workbench.evaluate import cluster
from workbench.evaluate.cluster import Unit
from workbench.evaluate.progress import Overall, SideBySide
from workbench.ground.errors import WorkbenchError


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def whole(time: Time) -> Overall:
    """Two configurations on a plan of 100 and one of 10 items; all scores of a third one are stored."""
    return Overall({"stored": {"p": 0, "q": 0}, "a": {"p": 100, "q": 10}, "b": {"p": 100, "q": 10}}, time)


def test_the_time_left_comes_from_the_pace_of_each_plan(whole: Overall, time: Time) -> None:
    assert whole.told() == {"share": 0.0, "left": None, "finished": 1, "of": 3}
    whole.begin("a")
    time.now += 5  # composing
    assert whole.told()["left"] is None
    whole.begin("a", "p")
    time.now += 10
    whole.at(0.5)
    told = whole.told()
    assert told["share"] == pytest.approx(50 / 220)
    # 50 more items of p now and 100 later at 0.2 s each, 20 of q at the same pace, and 5 s of composing b
    assert told["left"] == pytest.approx(150 * 0.2 + 20 * 0.2 + 5)
    time.now += 10
    whole.at(1.0)
    whole.begin("a", "q")
    time.now += 10
    whole.at(1.0)
    whole.finish()
    told = whole.told()
    assert (told["share"], told["finished"]) == (pytest.approx(0.5), 2)
    assert told["left"] == pytest.approx(100 * 0.2 + 10 * 1.0 + 5)  # q takes a second an item
    for plan in ("", "p", "q"):
        whole.begin("b", plan)
        whole.at(1.0)
    whole.finish()
    assert whole.told() == {"share": 1.0, "left": 0.0, "finished": 3, "of": 3}


def test_scores_that_turn_out_to_be_stored_do_not_change_the_pace(whole: Overall, time: Time) -> None:
    whole.begin("a", "p")
    time.now += 20
    whole.at(1.0)
    whole.begin("a", "q")  # is stored: no part of it is ever told
    whole.finish()
    assert whole.told()["left"] == pytest.approx(110 * 0.2)


def test_nothing_to_score_is_done(time: Time) -> None:
    assert Overall({"a": {"p": 0}}, time).told() == {"share": 1.0, "left": None, "finished": 1, "of": 1}


def events(whole: Overall, time: Time) -> list[dict[str, Any]]:
    made = []
    for number, name in enumerate(("a", "b"), 1):
        head = {"stage": "score", "configuration": name, "number": number, "of": 2}
        whole.begin(name)
        made.append({**head, "text": "composing", "overall": whole.told()})
        for plan, items in (("p", 100), ("q", 10)):
            whole.begin(name, plan)
            for part in (0.5, 1.0):
                time.now += 10
                whole.at(part)
                done = {"done": round(items * part), "total": items, "text": f"{plan}: task"}
                made.append({**head, **done, "overall": whole.told()})
            whole.finish()
            made.append({**head, "scored": plan, "overall": whole.told()})
    return made


def shown(terminal: bool, made: list[dict[str, Any]]) -> str:
    out, text = Terminal(), io.StringIO()
    out.talk = Console(file=text, force_terminal=terminal, width=100, highlight=False, soft_wrap=True, color_system=None)
    for event in made:
        out.event(event)
        if terminal and out._bar is not None:
            out._bar.refresh()
    out.stop()
    return text.getvalue()


def test_a_terminal_has_one_line_for_all_configurations(time: Time) -> None:
    whole = Overall({"a": {"p": 100, "q": 10}, "b": {"p": 100, "q": 10}}, time)
    text = shown(True, events(whole, time))
    assert text.endswith("\r\x1b[1A\x1b[2Kscore   2/2 configurations are scored\n")  # the line of the bar is removed before
    assert text.count("\n") == 2
    assert "score   1/2 a  p: task" in text
    assert "23 %, about 34 s left" in text


def test_a_pipe_has_plain_lines_with_the_time_left(time: Time) -> None:
    whole = Overall({"a": {"p": 100, "q": 10}, "b": {"p": 100, "q": 10}}, time)
    assert shown(False, events(whole, time)).splitlines() == [
        "score   a (1/2)  composing",
        "score   a (1/2)  p: task  (45 % of 2 configurations, about 24 s left)",
        "score   a (1/2)  q: task  (50 % of 2 configurations, about 40 s left)",
        "score   b (2/2)  composing",
        "score   b (2/2)  p: task  (95 % of 2 configurations, about 20 s left)",
        "score   b (2/2)  q: task  (100 % of 2 configurations)",
    ]


UNITS = [
    Unit(name, plan, suite, items) for plan, suite, items in (("p", "words", 100), ("q", "facts", 20)) for name in ("a", "b")
]
TAKES = {("a", "p"): 20.0, ("b", "p"): 20.0, ("a", "q"): 2.0, ("b", "q"): 2.0}


class Workers:
    """A pool of two workers that need a known time for each unit; the clock moves while the command waits for one of them."""

    def __init__(self, time: Time, lost: tuple[Unit, ...] = ()) -> None:
        self.time, self.lost, self.working = time, list(lost), dict[Unit, float]()

    idle = property(lambda self: len(self.working) < 2)
    busy = property(lambda self: bool(self.working))

    def submit(self, ticket: Unit, _: Unit) -> None:
        self.working[ticket] = self.time.now + TAKES.get((ticket.name, ticket.plan or ""), 5.0)

    def next(self) -> tuple[Unit, None, bool]:
        unit = min(self.working, key=lambda one: self.working[one])
        self.time.now = self.working.pop(unit)
        return unit, None, unit in self.lost and not self.lost.remove(unit)


@pytest.fixture
def on_workers(time: Time, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs units on two workers and returns the events."""
    monkeypatch.setattr(cluster, "SideBySide", lambda names, parts: SideBySide(names, parts, time))

    def run(units: list[Unit], lost: tuple[Unit, ...] = ()) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        cluster._run(Workers(time, lost), units, cluster._Line(["stored", "a", "b"], units, made.append))  # type: ignore[arg-type]
        return made

    return run


def test_parts_on_two_workers_have_the_same_line(on_workers: Any) -> None:
    """Both workers score p for 20 s, then q for 2 s."""
    composed, scored = on_workers([Unit("a"), Unit("b")]), on_workers(UNITS)
    assert shown(False, composed + scored).splitlines() == [
        "score   a (2/3)  composing",
        "score   b (3/3)  composing",
        "score   a (2/3)  words: 100 items  (42 % of 3 configurations, about 4 s left)",
        "score   b (3/3)  words: 100 items  (83 % of 3 configurations, about 4 s left)",
        "score   a (2/3)  facts: 20 items  (92 % of 3 configurations)",
        "score   b (3/3)  facts: 20 items  (100 % of 3 configurations)",
    ]
    assert [event["overall"]["finished"] for event in scored if "scored" in event] == [1, 1, 2, 3]
    text = shown(True, scored)
    assert "score   2/3 a  words: 100 items" in text
    assert "42 %, about 4 s left" in text
    assert text.endswith("score   3/3 configurations are scored\n")


def test_a_part_whose_worker_was_lost_starts_again(on_workers: Any) -> None:
    made = on_workers(UNITS[:2], lost=(UNITS[1],))
    assert shown(False, made).splitlines() == [
        "score   a (2/3)  words: 100 items  (50 % of 3 configurations)",  # b has run for as long as a took
        "score   b: words: its worker was lost, scoring again",
        "score   b (3/3)  words: 100 items  (100 % of 3 configurations)",
    ]
    again = made[[event.get("text", "").endswith("scoring again") for event in made].index(True) + 1]
    assert (again["configuration"], again["overall"]["left"]) == ("b", pytest.approx(20))


def test_a_part_that_loses_three_workers_fails(on_workers: Any) -> None:
    """Three parts that lose one or two each do not."""
    assert len([e for e in on_workers(UNITS[:2], lost=(*UNITS[:2], UNITS[1])) if "scored" in e]) == 2
    with pytest.raises(WorkbenchError, match="b: words: 3 workers of the cluster were lost over it"):
        on_workers(UNITS[:2], lost=(UNITS[1],) * 3)


def test_the_time_left_on_workers_counts_the_running_parts(time: Time) -> None:
    whole = SideBySide(["a", "b", "c", "d"], {(name, plan): 10 for name in "abcd" for plan in "pq"}, time)
    whole.begin(("a", "p"))
    whole.begin(("b", "p"))
    assert whole.told() == {"share": 0.0, "left": None, "finished": 0, "of": 4}
    time.now += 8
    whole.finish(("a", "p"))
    whole.begin(("c", "p"))
    time.now += 2
    whole.finish(("b", "p"))
    # 20 items of p took 18 s of work: 9 s for each part of p or, by the same pace, of q; c has run for 2 s; two workers share the rest
    told = whole.told()
    assert told["left"] == pytest.approx((2 * 9 - 2 + 4 * 9) / 2)
    assert told["share"] == pytest.approx(2 / 8)
    for name in "cd":
        whole.begin((name, "q"))
        time.now += 3
        whole.finish((name, "q"))
    # q takes 3 s; c's part of p has run for 8 s
    assert whole.told()["left"] == pytest.approx((1 + 9 + 2 * 3) / 2)
    assert SideBySide(["a"], {}, time).told() == {"share": 1.0, "left": None, "finished": 1, "of": 1}
