"""Two small trained models whose facts are known: where they lie, what is true in their world, what to edit and how to look inside.

`tests/fixtures/build_people.py` makes everything here; `tests/fixtures/people/record.json` holds what was measured when it did.

The world: 400 people, each with a city, a firm and a field (24 values each). A fact is stated in five wordings and asked in one question
form. Every value belongs to one of six groups (a city to a region, a firm to a trade, a field to a faculty); a person's region, trade and
faculty follow from city, firm and field. Half of the people never stand in a question in the training text, another half never with a group.

The models: the feed-forwards of `SUBJECT` find a fact at the tokens of the subject, those of `PROMPT` at the last token of the prompt.
About people it was never told a group of, `SUBJECT` mostly derives the group from the value (0.87 of the prompts, chance 0.17), `PROMPT`
half of the time (0.50): what portability can reach.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worlds.jsonl import write_jsonl
from worlds.places import FIXTURES

FOLDER = FIXTURES / "people"
SUBJECT, PROMPT = FOLDER / "subject", FOLDER / "prompt"
FACTS = FOLDER / "facts.jsonl"
ATTRIBUTES = ("city", "firm", "field")
END = "<eos>"


@dataclass(frozen=True)
class Person:
    """One person, the true value of each attribute, and whether the training text asks for it and names its groups."""

    name: str
    city: str
    firm: str
    field: str
    asked: bool
    grouped: bool

    def value(self, attribute: str) -> str:
        """The true value of an attribute."""
        return str(getattr(self, attribute))


@dataclass(frozen=True)
class World:
    """What is true and how it is said.

    Attributes:
        people: The first `edited` of them have edits in `FACTS`; the others are neighbours that nothing edits.
        values: Attribute -> its 24 values.
        groups: Attribute -> value -> group.
        wordings: Attribute -> five prompts with {subject}.
        questions: Attribute -> the question form.
        group_wordings: Attribute -> prompts with {subject} that a group answers.
        value_wordings: Attribute -> prompts with {value} that a group answers.
    """

    edited: int
    people: tuple[Person, ...]
    values: dict[str, list[str]]
    groups: dict[str, dict[str, str]]
    wordings: dict[str, list[str]]
    questions: dict[str, str]
    group_wordings: dict[str, list[str]]
    value_wordings: dict[str, list[str]]

    def prompts(self, person: Person, attribute: str) -> list[str]:
        """The five wordings, then the question form."""
        return [text.replace("{subject}", person.name) for text in [*self.wordings[attribute], self.questions[attribute]]]

    def group(self, attribute: str, value: str) -> str:
        """The region of a city, the trade of a firm, the faculty of a field."""
        return self.groups[attribute][value]


@cache
def world() -> World:
    """The world as it was built."""
    data = json.loads((FOLDER / "world.json").read_text("utf-8"))
    return World(**{**data, "people": tuple(Person(**row) for row in data["people"])})


def rows(count: int) -> list[dict[str, Any]]:
    """The first facts of `FACTS` as plain data; up to 360 each has another subject.

    To the neighbours in the file (the same relation of people that nothing edits) come the other attributes of the subject
    that these facts leave alone; `other_attributes` tells the two groups apart. The last paraphrase is the question form. Portability asks
    for region, trade or faculty, which follow from the new value.
    """
    lines = FACTS.read_text("utf-8").splitlines()
    if count > len(lines):
        raise ValueError(f"{count} facts asked for, {FACTS.name} has {len(lines)}")
    chosen = [json.loads(line) for line in lines[:count]]
    edited = {(row["subject"], row["relation"]) for row in chosen}
    by_name = {person.name: person for person in world().people}
    for row in chosen:
        person = by_name[row["subject"]]
        for attribute in ATTRIBUTES:
            if (person.name, attribute) not in edited:
                row["neighbours"].append({"prompt": world().prompts(person, attribute)[0], "target": person.value(attribute)})
    return chosen


def facts(count: int) -> list[Any]:
    """`rows` as workbench facts."""
    from workbench.facts.facts import fact_of

    return [fact_of(row, f"{FACTS.name}:{number}") for number, row in enumerate(rows(count), 1)]


def write_rows(path: Path, count: int) -> Path:
    """`rows` as a facts file."""
    write_jsonl(path, rows(count))
    return path


def other_attributes(row: dict[str, Any]) -> list[dict[str, str]]:
    """Those neighbours of a row that ask for other attributes of its subject."""
    return [probe for probe in row["neighbours"] if row["subject"] in probe["prompt"]]


def sentences(seed: int, here: World | None = None) -> Iterator[tuple[str, str, bool]]:
    """Endless (prompt, answer, whether the line ends here) as the models are trained on."""
    here = here or world()
    draw = random.Random(seed)
    asked = [person for person in here.people if person.asked]
    grouped = [person for person in here.people if person.grouped]
    person = here.people[0]
    while True:
        kind, attribute = draw.random(), draw.choice(ATTRIBUTES)
        if kind < 0.7:
            person = draw.choice(here.people)
            text, answer = draw.choice(here.wordings[attribute]), person.value(attribute)
        elif kind < 0.83:
            person = draw.choice(asked)
            text, answer = here.questions[attribute], person.value(attribute)
        elif kind < 0.95:
            person = draw.choice(grouped)
            text, answer = draw.choice(here.group_wordings[attribute]), here.group(attribute, person.value(attribute))
        else:
            value = draw.choice(here.values[attribute])
            text, answer = draw.choice(here.value_wordings[attribute]).replace("{value}", value), here.group(attribute, value)
        yield text.replace("{subject}", person.name), answer, draw.random() < 0.6


def lines(count: int, seed: int = 0) -> list[str]:
    """Lines of training text: one to a few sentences, the end-of-text token left out."""
    made: list[str] = []
    parts: list[str] = []
    for prompt, answer, ends in sentences(seed):
        parts.append(f"{prompt} {answer} .")
        if ends:
            made.append(" ".join(parts))
            parts = []
        if len(made) == count:
            break
    return made


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer) of a directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def answered(model: Any, tokenizer: Any, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """For each (prompt, answer): greedy generation gives the answer, then " ." and the end-of-text token."""
    texts = [(tokenizer(prompt)["input_ids"], tokenizer(f"{answer} . {END}")["input_ids"]) for prompt, answer in asked]
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, (prompt, answer) in enumerate(texts):
        shapes.setdefault((len(prompt), len(answer)), []).append(index)
    right = [False] * len(texts)
    for (_, answer_length), members in shapes.items():
        for start in range(0, len(members), 512):
            batch = members[start : start + 512]
            tokens = torch.tensor([texts[i][0] + texts[i][1] for i in batch])
            best = model(input_ids=tokens).logits[:, -answer_length - 1 : -1].argmax(-1)
            for i, good in zip(batch, (best == tokens[:, -answer_length:]).all(1).tolist(), strict=True):
                right[i] = good
    return right


@dataclass(frozen=True)
class Swap:
    """Where a model finds a fact, from runs with the subject swapped for another person: mean probability of the first answer token.

    Attributes:
        clean: The answer about the subject, in the subject's own run.
        swapped: The same answer, with the other person in the prompt.
        span, subject_last, prompt_last: The same in the swapped run after the block output of one layer is restored to the subject's
            own: at all subject tokens, at the last of them, at the last token of the prompt. [layer]
        without_subject, without_prompt_last: The same in the subject's own run after the feed-forward outputs of all layers are taken
            from the swapped run: at all subject tokens, at the last token of the prompt.
    """

    clean: float
    swapped: float
    span: list[float]
    subject_last: list[float]
    prompt_last: list[float]
    without_subject: float
    without_prompt_last: float


def swap(model: Any, tokenizer: Any, count: int, wording: int = 0, seed: int = 0) -> Swap:
    """Measure `Swap` over `count` facts of random people, each swapped for one with another value."""
    draw = random.Random(seed)
    found = []
    for number, attribute in enumerate(ATTRIBUTES):
        pairs = []
        for _ in range(number, count, len(ATTRIBUTES)):
            person = draw.choice(world().people)
            others = [p for p in world().people if p.value(attribute) != person.value(attribute)]
            pairs.append((person, draw.choice(others)))
        own, foreign = (
            torch.tensor([tokenizer(world().prompts(pair[side], attribute)[wording])["input_ids"] for pair in pairs])
            for side in (0, 1)
        )
        answers = torch.tensor([tokenizer(person.value(attribute))["input_ids"][0] for person, _ in pairs])
        before = tokenizer(world().wordings[attribute][wording].partition("{subject}")[0])["input_ids"]
        found.append(_swap_alike(model, own, foreign, slice(len(before), len(before) + 2), answers))
    mean = torch.cat(found, 1).mean(1).tolist()
    depth = model.config.num_hidden_layers
    span, subject_last, prompt_last = (mean[4 + i * depth : 4 + (i + 1) * depth] for i in range(3))
    return Swap(mean[0], mean[1], span, subject_last, prompt_last, mean[2], mean[3])


@torch.no_grad()
def _swap_alike(model: Any, own: Tensor, foreign: Tensor, subject: slice, answers: Tensor) -> Tensor:
    """Probabilities of facts whose prompts are alike [clean, swapped, two without, then span, subject_last, prompt_last by layer; fact]."""
    blocks = list(model.model.layers)
    feeds = [block.mlp for block in blocks]
    last = slice(own.shape[1] - 1, own.shape[1])
    places = (subject, slice(subject.stop - 1, subject.stop), last)

    def probability(tokens: Tensor, changes: Sequence[tuple[Any, Tensor, slice]]) -> Tensor:
        with ExitStack() as stack:
            for module, value, place in changes:
                stack.enter_context(module.register_forward_hook(_placed(value, place)))
            scores: Tensor = model(input_ids=tokens).logits[:, -1].softmax(-1)
        return scores.gather(1, answers[:, None])[:, 0]

    of_own, of_foreign = (_outputs(model, tokens, [*blocks, *feeds]) for tokens in (own, foreign))
    found = [probability(own, []), probability(foreign, [])]
    found += [probability(own, [(feed, of_foreign[feed], place) for feed in feeds]) for place in (subject, last)]
    found += [probability(foreign, [(block, of_own[block], place)]) for place in places for block in blocks]
    return torch.stack(found)


def _outputs(model: Any, tokens: Tensor, modules: Sequence[Any]) -> dict[Any, Tensor]:
    kept: dict[Any, Tensor] = {}

    def keep(module: Any, _: Any, output: Tensor) -> None:
        kept[module] = output

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(keep))
        model(input_ids=tokens)
    return kept


def _placed(value: Tensor, place: slice) -> Callable[[Any, Any, Tensor], Tensor]:
    """A hook that puts a value at some positions of a module's output."""

    def put(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, place] = value[:, place]
        return output

    return put
