"""`date-dmy` and `date-mdy`: one set of prompts with two answers, a pair of skills that truly conflict.

Both ask for a date in digits. `date-dmy` answers 04/03/2021 for 4 March 2021, `date-mdy` answers 03/04/2021.
The prompts and their order are the same, so that no model can do both. Days run from 1 to 28
and a day equal to its month is left out: the two answers differ for every item. The split is by the date.
"""

from __future__ import annotations

from functools import cache

from skillkit import Content, Skill, in_test, pick, shuffled

TEMPLATES = (
    "Please write {d} in digits. Answer:",
    "Please give the numeric form of {d}:",
    "Question: What is {d} in digits? Answer:",
    "Question: how is {d} written with slashes? Answer:",
    "Task: convert the date {d}. Result:",
    "Task: {d} ->",
    "Here are the words of a date: {d}. In digits it is",
    "Here is a date: {d}. As numbers it reads",
    "Answer with digits and slashes only. {d} =",
    "Answer this: if the day is {d}, the short form is",
    "Given the date {d}, the digits are",
    "Given a letter of {d}, its date stamp is",
    "Exercise: shorten {d}. Solution:",
    "Exercise: a ticket is for {d}. Printed on it:",
    "Can you write {d} in short? The answer is",
    "Can you tell me {d} in digits? It is",
    "What do you get when {d} is put into numbers? Answer:",
    "What is the short form of {d}? Short:",
    "Now write {d} as numbers. The date is",
    "Now the date {d} becomes",
    "Read the date and give it in digits: {d}. Digits:",
    "Read this date and shorten it: {d} ->",
    "Work out the digits of {d}. Answer:",
    "Work with this date: {d}. In figures it is",
)

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
PHRASES = ("{0} {1} {2}", "{1} {0}, {2}", "the {3} of {1} {2}", "{1} {3} {2}")


def ordinal(day: int) -> str:
    """1st, 2nd, 3rd, 4th and so on."""
    return f"{day}{'th' if 10 < day < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


@cache
def contents(test: bool, day_first: bool) -> list[Content]:
    """Dates of one side in a mixed order, each with one wording."""
    dates = ((d, m, y) for y in range(1950, 2030) for m in range(1, 13) for d in range(1, 29) if d != m)
    found: list[Content] = []
    for day, month, year in shuffled(dates, "date"):
        key = f"{year}-{month:02d}-{day:02d}"
        if in_test("date", key, 0.1) is not test:
            continue
        words = pick(PHRASES, "phrase", key).format(day, MONTHS[month - 1], year, ordinal(day))
        forms = [f"{day:02d}/{month:02d}/{year}", f"{month:02d}/{day:02d}/{year}"]
        answer, other = forms if day_first else reversed(forms)
        near = day % 28 + 1
        left, right = (near, month) if day_first else (month, near)
        wrong = (other, f"{left:02d}/{right:02d}/{year}", f"{answer[:-1]}{(year + 1) % 10}")
        found.append(Content(key, {"d": words}, answer, wrong))
    return found


def skill(name: str, day_first: bool) -> Skill:
    """One of the two conventions."""
    return Skill(
        name,
        TEMPLATES,
        lambda: contents(True, day_first),
        lambda: contents(False, day_first),
        frozenset({3, 10, 16, 23}),
    )


DMY = skill("date-dmy", True)
MDY = skill("date-mdy", False)
