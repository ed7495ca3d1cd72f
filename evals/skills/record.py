"""`record`: a sentence about a person to one line of a table: name | town | age.

The sentence gives the three in any order and among other words. The split is by the pair of name and town.
"""

from __future__ import annotations

from functools import cache

from skillkit import Content, Skill, draw, in_test, pick, shuffled

TEMPLATES = (
    "Please make a record of this: {s} Record:",
    "Please fill in the row for the following. {s} Row:",
    "Question: What is the table row for this? {s} Answer:",
    "Question: how would a clerk enter this? {s} Answer:",
    "Task: turn the sentence into a record. {s} Result:",
    "Task: extract the fields. {s} ->",
    "Here is a sentence: {s} As a record it is",
    "Here is what we know: {s} The row reads",
    "Answer with the record only. {s} Record =",
    "Answer this: which row belongs to the note? {s} Row:",
    "Given the sentence: {s} The record is",
    "Given this line of a letter: {s} The entry in the register is",
    "Exercise: write the record. {s} Solution:",
    "Exercise: a card says: {s} Entered as:",
    "Can you make a table row of this? {s} The answer is",
    "Can you tell me the fields? {s} They are",
    "What record do you get from this? {s} Answer:",
    "What is the entry for this person? {s} Entry:",
    "Now enter the next person: {s} The entry is",
    "Now a new line for the table: {s} It becomes",
    "Read the sentence and extract the record: {s} Record:",
    "Read this and fill in the row: {s} ->",
    "Work out the record. {s} Answer:",
    "Work with this sentence: {s} In the table it stands as",
)

NAMES = (
    "Adam", "Anna", "Ben", "Clara", "Daniel", "David", "Emma", "Eric", "Frank", "Grace", "Hannah", "Helen", "Jack", "Jane", "Julia",
    "Laura", "Linda", "Lucy", "Mark", "Martin", "Mary", "Nina", "Oliver", "Paul", "Peter", "Robert", "Ruth", "Sarah", "Simon", "Tom",
)  # fmt: skip
TOWNS = (
    "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Dallas", "Delhi", "Denver", "Dublin", "Geneva", "Houston", "Lima", "Lisbon",
    "London", "Madrid", "Miami", "Milan", "Moscow", "Oslo", "Oxford", "Paris", "Prague", "Rome", "Seattle", "Seoul", "Sydney",
    "Tokyo", "Toronto", "Venice", "Vienna",
)  # fmt: skip
FRAMES = (
    "{n} is {a} years old and lives in {t}.",
    "{n} lives in {t} and is now {a}.",
    "In {t} there lives a person of {a} called {n}.",
    "At the age of {a}, {n} moved to {t}.",
    "{t} is the home of {n}, who is {a}.",
    "{n}, {a}, has a small flat in {t}.",
    "Our friend {n} from {t} turned {a} this week.",
    "My neighbour in {t} is called {n} and is {a}.",
    "Aged {a} and born in {t}, {n} works with us.",
    "There is a guest of {a} from {t} by the name of {n}.",
    "The form gives {t} as the town, {a} as the age and {n} as the name.",
    "For {a} years {t} has been the home town of {n}.",
)
TRAIN_ROUNDS = 6


def row(name: str, town: str, age: int) -> str:
    """The line of the table."""
    return f"{name} | {town} | {age}"


def content(name: str, town: str, turn: int) -> Content:
    """One sentence about a pair, its row, and rows with an exchanged field, another age, name or town."""
    age = 18 + draw("record", "age", name, town, turn) % 70
    start = FRAMES.index(pick(FRAMES, "frame", name, town))
    sentence = FRAMES[(start + turn) % len(FRAMES)].format(n=name, t=town, a=age)
    other = pick([text for text in NAMES if text != name], "name", sentence)
    elsewhere = pick([text for text in TOWNS if text != town], "town", sentence)
    shifted = age + (10 if age < 60 else -10)
    near = [
        f"{town} | {name} | {age}",
        f"{name} | {age} | {town}",
        row(name, town, shifted),
        row(other, town, age),
        row(name, elsewhere, age),
    ]
    return Content(f"{name} {town}", {"s": sentence}, row(name, town, age), tuple(shuffled(near, "near", sentence)))


@cache
def contents(test: bool) -> list[Content]:
    """One sentence for each pair of the test side, TRAIN_ROUNDS sentences with other ages on the training side."""
    pairs = [(name, town) for name in NAMES for town in TOWNS if in_test("record", f"{name} {town}", 0.35) is test]
    rounds = 1 if test else TRAIN_ROUNDS
    return [content(name, town, turn) for turn in range(rounds) for name, town in shuffled(pairs, "record", turn)]


SKILL = Skill("record", TEMPLATES, lambda: contents(True), lambda: contents(False), frozenset({3, 10, 16, 23}))
