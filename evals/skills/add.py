"""`add`: the sum of two numbers of two digits.

The split is by the unordered pair of numbers: 34 + 57 and 57 + 34 are on the same side.
"""

from __future__ import annotations

from functools import cache

from skillkit import Content, Skill, in_test, shuffled

TEMPLATES = (
    "Please add {a} and {b}. Answer:",
    "Please give the sum of {a} and {b}:",
    "Question: What is {a} plus {b}? Answer:",
    "Question: how much do {a} and {b} make together? Answer:",
    "Task: add the two numbers {a} and {b}. Result:",
    "Task: {a} + {b} =",
    "Here are two numbers: {a} and {b}. Their sum is",
    "Here is a sum to do: {a} plus {b}. It makes",
    "Answer with a number only. {a} + {b} =",
    "Answer this: if you add {a} to {b}, you get",
    "Given the numbers {a} and {b}, the total is",
    "Given {a} apples and {b} more apples, the number of apples is",
    "Exercise: compute {a} + {b}. Solution:",
    "Exercise: a box holds {a} pens and another holds {b}. Pens in all:",
    "Can you add {a} and {b}? The answer is",
    "Can you tell me what {a} plus {b} is? It is",
    "What do you get when {b} is added to {a}? Answer:",
    "What is the total of {a} and {b}? Total:",
    "Now add {a} and {b}. The sum is",
    "Now the calculation: {a} plus {b} equals",
    "Read the numbers and add them: {a}, {b}. Sum:",
    "Read this sum and finish it: {a} + {b} =",
    "Work out {a} + {b}. Answer:",
    "Work with these two numbers: {a} and {b}. Added together they give",
)


@cache
def contents(test: bool) -> list[Content]:
    """All pairs of one side in a mixed order."""
    found = []
    for a, b in shuffled(((a, b) for a in range(10, 100) for b in range(10, 100)), "add"):
        if in_test("add", f"{min(a, b)}+{max(a, b)}", 0.15) is test:
            total = a + b
            wrong = (str(total + 10), str(total - 10), str(total + (1 if a % 2 else -1)))
            found.append(Content(f"{a}+{b}", {"a": str(a), "b": str(b)}, str(total), wrong))
    return found


SKILL = Skill("add", TEMPLATES, lambda: contents(True), lambda: contents(False), frozenset({3, 10, 16, 23}))
