"""Calibration prompts of the bricks and requests that no brick is for, with their copies, folds and features.

Copies are prompts as users might write them: in lower case, behind a greeting, mistyped, with thanks, in other languages, after a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from importlib.resources import files
from typing import TYPE_CHECKING

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.route.deciding.templates import FOLDS, folds
from workbench.steps.route import Prompts

if TYPE_CHECKING:
    from torch import Tensor


GREETINGS = (
    "Hello! ",
    "Hi there. ",
    "Good morning, I have a request. ",
    "Hey, can you help me with something? ",
    "Thank you for your last answer, that was useful. ",
    "I am working on a list and need one more thing. ",
)
"""Texts in front of a prompt. A greeting may be as long as the prompt."""
THANKS = (
    " Thanks!",
    " Thank you in advance.",
    " Thanks a lot for your help!",
    " Please be quick, I am in a hurry.",
    " Let me know if anything is unclear. Best regards",
    " That is all for now, thank you.",
)
"""Texts behind a prompt."""
PARAGRAPHS = (
    "The market opens at seven in the morning, and by noon most of the stalls are empty. Farmers from the valley bring cheese, honey and "
    "vegetables, while people from the coast sell fish that they caught during the night. Visitors like to sit on the steps of the town hall "
    "with a cup of coffee and to watch how the square slowly fills and empties again.\n\n",
    "When the company moved to the new building, nobody knew where anything was. Boxes stood in the corridors for weeks, the telephones rang "
    "in the wrong rooms, and the coffee machine could not be found until the second Monday. By now everyone has a desk, the plants have "
    "grown to the ceiling, and hardly anyone remembers how small the old office had been.\n\n",
    "Mountains shape the weather of the land around them. Air that is pushed up their slopes cools, clouds form, and rain falls on the side "
    "that faces the wind. Behind the ridge the air sinks and becomes warm and dry, so that a valley there may have vineyards although snow "
    "lies on the peaks for most of the year. Travelers notice the change within an hour.\n\n",
    "My grandmother kept a notebook in which she wrote down what she had cooked, who had come to visit and what they had talked about. It "
    "has no recipes, and still one learns from it how people lived in her street. On some days there is only one line, on others she "
    "filled two pages. The last entry tells of a long walk along the canal in the first warm week of spring.\n\n",
)
"""Texts of some sixty words in front of a prompt that have nothing to do with it."""
LANGUAGES = ("de", "fr", "es")
_TABLE = """
the der le el; a ein un un; an ein un un; and und et y; or oder ou o; of von de de; in in dans en; to zu à a; is ist est es; are sind sont son;
what was que qué; which welche quel cuál; who wer qui quién; how wie comment cómo; where wo où dónde; when wann quand cuándo; why warum pourquoi por-qué;
this dies ceci esto; these diese ces estos; that das cela eso; it es il ello; its sein son su; they sie ils ellos; you du tu tú; i ich je yo;
my mein mon mi; me mir moi me; please bitte s'il-te-plaît por-favor; answer Antwort réponse respuesta; question Frage question pregunta;
task Aufgabe tâche tarea; result Ergebnis résultat resultado; exercise Übung exercice ejercicio; solution Lösung solution solución;
write schreibe écris escribe; read lies lis lee; give gib donne da; tell sag dis di; can kann peux puedes; do tun fais haz; does macht fait hace;
now jetzt maintenant ahora; here hier ici aquí; with mit avec con; for für pour para; from von de de; only nur seulement solo; by durch par por;
two zwei deux dos; one eins un uno; number Zahl nombre número; numbers Zahlen nombres números; word Wort mot palabra; words Wörter mots palabras;
letters Buchstaben lettres letras; list Liste liste lista; make mach fais haz; find finde trouve encuentra; work arbeite travaille trabaja; get bekommst obtiens obtienes;
"""
# word -> the word in German, French and Spanish; a hyphen stands for a space
_WORDS = {
    first: [other.replace("-", " ") for other in others]
    for first, *others in (entry.split() for entry in _TABLE.replace("\n", " ").split(";") if entry.strip())
}
COPIES = ("plain", "lower", "greeting", "typos", "behind", "language", "paragraph")
"""Kinds of copies."""


def copy(prompt: str, kind: str, number: int) -> str:
    """Return a prompt in one kind of copy."""
    match kind:
        case "lower":
            return prompt.lower()
        case "greeting":
            return GREETINGS[number % len(GREETINGS)] + prompt
        case "typos":
            return _mistyped(prompt, number)
        case "behind":
            return prompt + THANKS[number // 2 % len(THANKS)]
        case "language":
            return _in_words_of(prompt, number // 2 % len(LANGUAGES))
        case "paragraph":
            return PARAGRAPHS[number // 4 % len(PARAGRAPHS)] + prompt
    return prompt


def copies(prompt: str, number: int) -> dict[str, str]:
    """Return a prompt of a brick by kind of copy: rarer kinds are those of every second or fourth prompt."""
    kinds = ["plain", "lower", "greeting", *(("language",) if number % 2 else ("typos", "behind"))]
    return {kind: copy(prompt, kind, number) for kind in [*kinds, *["paragraph"] * (number % 4 == 0)]}


def negative_copies(prompt: str, number: int) -> dict[str, str]:
    """Return a prompt that no brick is for by kind of copy, so that greetings, thanks and paragraphs say nothing about the bricks."""
    kinds = ["plain", "behind" if number % 2 else "greeting", *{0: ["typos"], 1: ["paragraph"]}.get(number // 2 % 4, [])]
    return {kind: copy(prompt, kind, number) for kind in kinds}


def _mistyped(prompt: str, number: int) -> str:
    """Swap two letters inside every third longer word, or drop one of them in turn. Digits and single letters stay."""
    words = prompt.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for turn, i in enumerate(places[number % 2 :: 3] or places[:1]):
        word = words[i]
        at = 1 + (number + turn) % (len(word) - 2)
        words[i] = word[:at] + word[at + 1 : at + 2] + ("" if (number // 2 + turn) % 2 else word[at]) + word[at + 2 :]
    return " ".join(words)


def _in_words_of(prompt: str, language: int) -> str:
    """Put common words into another language, one by one; what the prompt is about stays as it is."""

    def other(found: re.Match[str]) -> str:
        word = _WORDS.get(found[0].lower(), [found[0]] * len(LANGUAGES))[language]
        return word[:1].upper() + word[1:] if found[0][0].isupper() else word

    return re.sub(r"[A-Za-z]{2,}|\bI\b", other, prompt)


NEGATIVES = 700
"""Texts of the built-in requests that no brick is for, with their copies."""
FEWEST_PROMPTS, FEWEST_TEMPLATES = 16, 6
"""With fewer of a brick, the threshold is erratic."""
OUTSIDE, OWN = -1, -2
"""Labels of the built-in requests that no brick is for, and of the step's own."""

_Row = tuple[str, tuple[int, int, int, int]]
"""A text with its columns."""


@dataclass(frozen=True)
class Samples:
    """Calibration prompts of all bricks and requests that no brick is for, each as it is and in copies.

    Attributes:
        bricks: The bricks.
        texts: [sample], all copies of all prompts; empty texts if the samples were read from a file.
        columns: [sample, 4], the number of the brick (`OUTSIDE`, `OWN`), that of the kind of copy in `COPIES` (0 is the prompt as it is), the
            fold of the prompt's template (of a built-in request, that of its task), and a fold that does not depend on the template.
        templates: Brick -> number of its templates.
        hidden: [sample, window, hidden size], see `Prompts`.
        measured: [sample, brick] or [sample, size], see `Prompts`.
    """

    bricks: tuple[str, ...]
    texts: list[str]
    columns: Tensor
    templates: dict[str, int] = field(default_factory=dict)
    hidden: Tensor | None = None
    measured: Tensor | None = None

    @classmethod
    def of(cls, calibration: Mapping[str, Sequence[str]], negatives: Sequence[str] = ()) -> Samples:
        """Return the prompts with their copies and folds, without features; the built-in requests join `negatives`."""
        bricks = tuple(calibration)
        if len(bricks) < 2:
            raise WorkbenchError(f"route: expected two or more bricks, found {len(bricks)}", "Add bricks to the step.")
        for name, prompts in calibration.items():
            if not prompts:
                raise WorkbenchError(
                    f"route: brick '{name}' has no calibration prompts", f"Write {name}: {{calibration: FILE}} under `bricks`."
                )
            if both := sorted(set(prompts) & set(negatives)):
                raise WorkbenchError(
                    f"route: the prompt {both[0]!r} is one of brick '{name}' and one of `negatives`", "Remove it from one file."
                )
        parts = [cls.of_brick(name, prompts) for name, prompts in calibration.items()]
        rows = built_in()
        tasks = list(dict.fromkeys(task for task, _ in rows))
        others = _rows(OUTSIDE, [prompt for _, prompt in rows], [tasks.index(task) % FOLDS for task, _ in rows])
        if negatives:
            others += _rows(OWN, negatives, folds(negatives)[1].tolist())
        return reduce(cls.added, parts, cls._made((), others, {}))

    @classmethod
    def of_brick(cls, name: str, prompts: Sequence[str]) -> Samples:
        """Return the prompts of one brick with their copies and folds, without features."""
        group_of, fold_of = folds(prompts)
        return cls._made((name,), _rows(0, prompts, fold_of.tolist()), {name: int(group_of.max()) + 1})

    @classmethod
    def _made(cls, bricks: tuple[str, ...], rows: Sequence[_Row], counts: dict[str, int]) -> Samples:
        return cls(bricks, [text for text, _ in rows], torch.tensor([columns for _, columns in rows]), counts)

    def added(self, brick: Samples) -> Samples:
        """Return the samples with those of one more brick, where `of` has them: behind those of the other bricks."""
        place, columns = int(self.inside.sum()), brick.columns.clone()
        columns[:, 0] = len(self.bricks)

        def joined(own: Tensor | None, new: Tensor | None) -> Tensor | None:
            return None if own is None or new is None else torch.cat([own[:place], new, own[place:]])

        return Samples(
            (*self.bricks, *brick.bricks),
            [*self.texts[:place], *brick.texts, *self.texts[place:]],
            torch.cat([self.columns[:place], columns, self.columns[place:]]),
            {**self.templates, **brick.templates},
            joined(self.hidden, brick.hidden),
            joined(self.measured, brick.measured),
        )

    def removed(self, brick: str) -> Samples:
        """Return the samples without those of a brick."""
        number = self.bricks.index(brick)
        rows = (self.labels != number).nonzero()[:, 0]
        columns = self.columns[rows]
        columns[:, 0] -= (columns[:, 0] > number).long()
        templates = {name: count for name, count in self.templates.items() if name != brick}
        seen = self.prompts(rows)
        return Samples(tuple(templates), list(seen.texts), columns, templates, seen.hidden, seen.measured)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a router is fitted again from, as tensors for a file: features with their columns, and no texts."""
        assert self.hidden is not None
        templates = torch.tensor(list(self.templates.values()))
        found = {"states": self.hidden.contiguous(), "columns": self.columns, "templates": templates}
        return found if self.measured is None else {**found, "encoded": self.measured.contiguous()}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], bricks: tuple[str, ...]) -> Samples:
        """Return the samples from the tensors of a file; see `tensors`."""
        templates = dict(zip(bricks, tensors["templates"].tolist(), strict=True))
        return cls(
            bricks, [""] * len(tensors["columns"]), tensors["columns"], templates, tensors["states"], tensors.get("encoded")
        )

    @property
    def labels(self) -> Tensor:
        """[sample], the number of the brick, `OUTSIDE` or `OWN`."""
        return self.columns[:, 0]

    @property
    def by_template(self) -> Tensor:
        """[sample], the fold of the prompt's template."""
        return self.columns[:, 2]

    @property
    def at_random(self) -> Tensor:
        """[sample], the fold that does not depend on the template."""
        return self.columns[:, 3]

    def with_features(self, hidden: Tensor | None, measured: Tensor | None = None) -> Samples:
        """Return the samples with their features."""
        return replace(self, hidden=hidden, measured=measured)

    def prompts(self, rows: Tensor) -> Prompts:
        """Return what a router sees of some samples."""
        hidden = None if self.hidden is None else self.hidden[rows]
        measured = None if self.measured is None else self.measured[rows]
        return Prompts([self.texts[i] for i in rows.tolist()], hidden, measured)

    def kind(self, name: str) -> Tensor:
        """Return a mask of the bricks' samples of one kind of copy."""
        return self.inside & (self.columns[:, 1] == COPIES.index(name))

    @property
    def inside(self) -> Tensor:
        """A mask of the samples that a brick is for."""
        return self.labels >= 0

    def warnings(self) -> list[str]:
        """Return a sentence for each brick whose prompts are too few, or too much alike, for a steady threshold."""
        found = []
        for label, name in enumerate(self.bricks):
            prompts = int((self.kind("plain") & (self.labels == label)).sum())
            if prompts < FEWEST_PROMPTS or self.templates[name] < FEWEST_TEMPLATES:
                found.append(
                    f"brick '{name}' has {prompts} calibration prompts in {self.templates[name]} template{'s'[: self.templates[name] != 1]}; with fewer than "
                    f"{FEWEST_PROMPTS} prompts or {FEWEST_TEMPLATES} templates the threshold is erratic"
                )
        return found


def _rows(label: int, prompts: Sequence[str], fold_of: Sequence[int]) -> list[_Row]:
    """Return the copies of prompts, each with label, kind and the two folds."""
    make = copies if label >= 0 else negative_copies
    return [
        (text, (label, COPIES.index(kind), fold_of[number], number % FOLDS))
        for number, prompt in enumerate(prompts)
        for kind, text in make(prompt, number).items()
    ]


def built_in() -> list[tuple[str, str]]:
    """Return (task, prompt) of the built-in requests that no brick is for."""
    lines = files("workbench.route.deciding").joinpath("negatives.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["task"], row["prompt"]) for row in rows]
