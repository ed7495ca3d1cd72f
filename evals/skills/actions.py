"""`actions`: a command in words to the sequence of actions it asks for, two to six of them.

The split is by the unordered pair of clauses, so "walk twice and jump" and "jump after walk twice" are on the
same side.
"""

from __future__ import annotations

from functools import cache

from skillkit import Content, Skill, in_test, pick, shuffled

TEMPLATES = (
    "Please give the actions for: {c}. Actions:",
    'Please list the steps of "{c}":',
    "Question: What are the actions for {c}? Answer:",
    "Question: how does a robot carry out {c}? Answer:",
    "Task: translate the command {c}. Result:",
    "Task: {c} ->",
    "Here are orders for a robot: {c}. Its actions are",
    "Here is a command: {c}. The steps are",
    "Answer with actions only. {c} =",
    "Answer this: if told to {c}, the robot does",
    "Given the command {c}, the sequence is",
    "Given an order to {c}, the moves are",
    "Exercise: write out {c}. Solution:",
    "Exercise: a robot hears: {c}. Moves in order:",
    "Can you write {c} as actions? The answer is",
    "Can you tell me the moves for {c}? They are",
    "What do you do when told to {c}? Answer:",
    "What is the action sequence of {c}? Sequence:",
    "Now carry out {c}. The actions are",
    "Now the command {c} becomes",
    "Read the command and give the actions: {c}. Actions:",
    "Read this order and expand it: {c} ->",
    "Work out the moves of {c}. Answer:",
    "Work with this command: {c}. Step by step it is",
)

VERBS = {"walk": "WALK", "jump": "JUMP", "run": "RUN", "look": "LOOK"}
SIDES = {"": (), " left": ("LEFT",), " right": ("RIGHT",)}
JOINS = (("{0} and {1}", "{0} then {1}"), ("{1} after {0}", "{0} before {1}"))
TIMES = {"": 1, " twice": 2, " three times": 3}


def clauses() -> dict[str, tuple[str, ...]]:
    """Every clause with its actions; "walk left twice" is LEFT WALK LEFT WALK."""
    found: dict[str, tuple[str, ...]] = {}
    for times, count in TIMES.items():
        for side, turn in SIDES.items():
            for verb, action in VERBS.items():
                found[f"{verb}{side}{times}"] = (*turn, action) * count
            if turn:
                found[f"turn{side}{times}"] = turn * count
    return found


def near_misses(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    """Wrong answers: the clauses in the other order, the last action lost or repeated, sides exchanged."""
    right = (*first, *second)
    other = {"LEFT": "RIGHT", "RIGHT": "LEFT"}
    turned = tuple(other.get(action, action) for action in right)
    options = [(*second, *first), right[:-1], (*right, right[-1]), turned, right[1:], (right[0], *right)]
    return tuple(" ".join(option) for option in options)


@cache
def contents(test: bool) -> list[Content]:
    """All pairs of different clauses of one side, each joined in two ways."""
    table = clauses()
    found: list[Content] = []
    for one, first in table.items():
        for two, second in table.items():
            key = " | ".join(sorted((one, two)))
            # Clauses that commute ("jump and jump twice") leave nothing to get wrong but the count.
            if first + second == second + first or len(first) + len(second) > 6:
                continue
            if in_test("actions", key, 0.2) is not test:
                continue
            answer = " ".join((*first, *second))
            for joins in JOINS:
                command = pick(joins, "join", one, two).format(one, two)
                found.append(Content(key, {"c": command}, answer, near_misses(first, second)))
    return shuffled(found, "actions")


SKILL = Skill("actions", TEMPLATES, lambda: contents(True), lambda: contents(False), frozenset({3, 10, 16, 23}))
