"""`abilities`: seven functions with four tasks each, labelled texts for `workbench analyze`.

Two tasks of a function choose its neurons, two judge them, so that a neuron of one task's wording is told from one of the function. Every task has
two templates. All texts are made here and may be used without conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from abilities_data import ETHICS, FACTS, LANGUAGES, STORIES, WORDS

COUNT = 10
"""Items of a task."""
Pairs = list[tuple[str, str]]


def rows() -> list[dict[str, Any]]:
    """Return all rows: id, function, task, split, template, prompt, response."""
    result = []
    for function, tasks in TASKS.items():
        for number, (task, make) in enumerate(tasks.items()):
            for i, (prompt, response) in enumerate(make()[:COUNT]):
                row = {"id": f"{function}-{task}-{i:02}", "function": function, "task": task}
                row |= {"split": ("train", "heldout")[number % 2], "template": i % 2, "prompt": prompt, "response": response}
                result.append(row)
    return result


def _two(first: str, second: str, contents: Iterator[tuple[tuple[Any, ...], str]]) -> Pairs:
    """Fill two templates in turn; an empty one leaves only the content."""
    return [((first, second)[i % 2].format(*content), response) for i, (content, response) in enumerate(contents)]


# coding


def _python() -> Pairs:
    bodies = (
        ("double", "x", "twice the number", "x * 2"), ("is_even", "n", "True if n is even", "n % 2 == 0"),
        ("first", "items", "the first element", "items[0]"), ("square", "x", "the square of x", "x ** 2"),
        ("last", "items", "the last element", "items[-1]"), ("negate", "x", "minus x", "-x"),
        ("size", "items", "the number of elements", "len(items)"), ("upper", "text", "the text in capitals", "text.upper()"),
        ("total", "numbers", "the sum of the numbers", "sum(numbers)"), ("largest", "numbers", "the largest number", "max(numbers)"),
    )  # fmt: skip
    made = (((name, arg, doc), f"return {body}") for name, arg, doc, body in bodies)
    return _two('def {0}({1}):\n    """Return {2}."""\n    ', "# Python: return {2}\ndef {0}({1}):\n    ", made)


def _javascript() -> Pairs:
    bodies = (
        ("add", "a, b", "a + b"), ("isEmpty", "list", "list.length === 0"), ("last", "list", "list[list.length - 1]"),
        ("greet", "name", "`Hello ${name}`"), ("half", "x", "x / 2"), ("isOdd", "n", "n % 2 === 1"), ("max", "a, b", "a > b ? a : b"),
        ("keys", "object", "Object.keys(object)"), ("shout", "text", "text.toUpperCase()"), ("copy", "list", "[...list]"),
    )  # fmt: skip
    made = (((name, args), f"return {body};") for name, args, body in bodies)
    return _two("function {0}({1}) {{\n  ", "const {0} = ({1}) => {{\n  ", made)


def _sql() -> Pairs:
    tables = ("users", "orders", "books", "cities", "songs", "cars", "teams", "rooms", "plants", "movies")
    columns = ("name", "price", "title", "country", "year", "color", "city", "size", "height", "rating")
    made = (((c, t), f"SELECT {c} FROM {t};") for c, t in zip(columns, tables, strict=True))
    return _two("SQL query that selects the column {0} from the table {1}:\n", "-- all values of {0} in {1}\n", made)


def _shell() -> Pairs:
    commands = (
        ("list the files here", "ls"), ("print the current directory", "pwd"), ("make the directory data", "mkdir data"),
        ("remove the file a.txt", "rm a.txt"), ("count the lines of log.txt", "wc -l log.txt"), ("show the first lines of b.csv", "head b.csv"),
        ("copy a.txt to b.txt", "cp a.txt b.txt"), ("find lines with error in log.txt", "grep error log.txt"),
        ("move x.png to images", "mv x.png images/"), ("sort the lines of names.txt", "sort names.txt"),
    )  # fmt: skip
    made = (((what,), command) for what, command in commands)
    return _two("Bash command to {0}:\n$ ", "#!/bin/bash\n# {0}\n", made)


# math


def _sums() -> Pairs:
    made = (((13 + 7 * i, 5 + 11 * i), str(18 + 18 * i)) for i in range(COUNT))
    return _two("{0} + {1} =", "Calculate {0} plus {1}. Result:", made)


def _products() -> Pairs:
    made = (((3 + i, 12 - i), str((3 + i) * (12 - i))) for i in range(COUNT))
    return _two("{0} * {1} =", "Multiply {0} by {1}. The product is", made)


def _word_problems() -> Pairs:
    names = ("Anna", "Ben", "Carla", "David", "Eva", "Felix", "Gina", "Hugo", "Ida", "Jonas")
    things = ("apples", "pens", "coins", "books", "cards", "eggs", "nuts", "stamps", "shells", "balls")
    made = (
        ((name, 9 + i, thing, 2 + i // 2), str(9 + i - 2 - i // 2))
        for i, (name, thing) in enumerate(zip(names, things, strict=True))
    )
    return _two(
        "{0} has {1} {2} and gives {3} away. How many {2} are left? Answer:",
        "There are {1} {2} in a box. {0} takes {3} out. Number of {2} in the box now:",
        made,
    )


def _equations() -> Pairs:
    made = (((4 + i, 10 + 3 * i), str(6 + 2 * i)) for i in range(COUNT))
    return _two("Solve for x: x + {0} = {1}. x =", "If x + {0} = {1}, then x equals", made)


# linguistic


def _plurals() -> Pairs:
    return _two("The plural of {0} is", "One {0}, two", (((w["noun"],), w["plural"]) for w in WORDS))


def _past() -> Pairs:
    return _two("The past tense of {0} is", "Today we {0}, yesterday we", (((w["verb"],), w["past"]) for w in WORDS))


def _opposites() -> Pairs:
    return _two("The opposite of {0} is", "Not {0} but", (((w["adjective"],), w["opposite"]) for w in WORDS))


def _parts() -> Pairs:
    made = (((w["adjective"], w["noun"]), ("noun", "adjective")[i % 2]) for i, w in enumerate(WORDS))
    return _two('In "the {0} {1}", the word "{1}" is a', 'In "the {0} {1}", the word "{0}" is an', made)


# knowledge


def _knowledge(kind: str, first: str, second: str) -> Callable[[], Pairs]:
    return lambda: _two(first, second, (((name,), answer) for name, answer in FACTS[kind]))


# translation


def _translation(language: str, back: bool = False) -> Callable[[], Pairs]:
    def make() -> Pairs:
        pairs = LANGUAGES[language]
        if back:
            return _two(
                f"{language}: {{0}}\nEnglish:", f"Translate from {language} to English: {{0}} =", (((b,), a) for a, b in pairs)
            )
        return _two(f"English: {{0}}\n{language}:", f"Translate into {language}: {{0}} =", (((a,), b) for a, b in pairs))

    return make


# ethics


def _ethics(kind: str, first: str, second: str) -> Callable[[], Pairs]:
    return lambda: _two(first, second, (((what,), answer) for what, answer in ETHICS[kind]))


# writing


def _writing(kind: str, first: str, second: str) -> Callable[[], Pairs]:
    return lambda: _two(first, second, (((what,), text) for what, text in STORIES[kind]))


TASKS: dict[str, dict[str, Callable[[], Pairs]]] = {
    "coding": {"python": _python, "javascript": _javascript, "sql": _sql, "shell": _shell},
    "math": {"sums": _sums, "products": _products, "word-problems": _word_problems, "equations": _equations},
    "linguistic": {"plurals": _plurals, "past-tense": _past, "opposites": _opposites, "parts-of-speech": _parts},
    "knowledge": {
        "capitals": _knowledge("capitals", "The capital of {0} is", "Question: which city is the capital of {0}? Answer:"),
        "animals": _knowledge("animals", "A baby {0} is called a", "Question: what is the young of a {0} called? Answer:"),
        "science": _knowledge(
            "science", "The chemical symbol of {0} is", "Question: what is the symbol of the element {0}? Answer:"
        ),
        "inventions": _knowledge("inventions", "A {0} is used to", "Question: what is a {0} for? Answer: to"),
    },
    "translation": {
        "german": _translation("German"),
        "french": _translation("French"),
        "spanish": _translation("Spanish"),
        "from-german": _translation("German", back=True),
    },
    "ethics": {
        "right-or-wrong": _ethics(
            "acts", "Is it right or wrong to {0}? It is", "Moral judgement: someone chooses to {0}. This is"
        ),
        "duties": _ethics("duties", "What ought a person do who {0}? They ought to", "Someone {0}. The honest thing to do is to"),
        "fairness": _ethics("fairness", "Is this fair? {0} Answer:", "{0} Would you call that just or unjust? Answer:"),
        "requests": _ethics(
            "requests", "Should an assistant help with this request: {0}? Answer:", "Request: {0}. May I help? Answer:"
        ),
    },
    "writing": {
        "stories": _writing("stories", "Write a short story about {0}.\n", "Once upon a time there was {0}.\n"),
        "poems": _writing("poems", "Write a poem about {0}.\n", "A verse on {0}:\n"),
        "letters": _writing("letters", "Write a letter: {0}.\n", "Draft a short note: {0}.\n"),
        "descriptions": _writing("descriptions", "Describe {0} in vivid words.\n", "A description of {0} for a novel:\n"),
    },
}
