"""Progress of a whole evaluation: shares by items, the time left from the pace so far, and how the terminal shows both."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from workbench.cli._output import Terminal
from workbench.evaluate.progress import Overall


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
