"""Classify what prompts ask for: known relations with their wordings and inverses, forms of questions, and conflicts between facts and test prompts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from workbench.facts.facts import SLOT, Fact, Probe, folded

_SLOT = re.escape(SLOT)
_NOUN = r"(?P<noun>[\w-]+(?: [\w-]+){0,5}?)"
_IS = r"(?P<tense>is|was|are|were)"
_ASKING = rf"(?:what|who|which)(?: {_IS}|'s)"
_NAMED = r"(?: called| named)?"
# Forms of questions for a noun, "the official language of X".
_NOUN_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"(?:name|state|give|tell me) the {_NOUN} of {_SLOT}",
        rf"(?:the )?{_NOUN} of {_SLOT}(?: {_IS}{_NAMED})?",
        rf"{_SLOT}'s {_NOUN}(?: {_IS}{_NAMED})?",
        rf"{_ASKING} (?:the )?{_NOUN} of {_SLOT}{_NAMED}",
        rf"{_ASKING} {_SLOT}'s {_NOUN}{_NAMED}",
        rf"(?:name|state|give|tell me) {_SLOT}'s {_NOUN}",
    )
)
# Forms of questions for who did something: "X was designed by".
_VERB_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"{_SLOT},? {_IS} (?P<participle>[\w-]+) by",
        rf"{_SLOT}, (?P<participle>[\w-]+) by",
        rf"who (?P<past>[\w-]+) {_SLOT}",
        rf"who {_IS} {_SLOT} (?P<participle>[\w-]+) by",
        rf"by whom {_IS} {_SLOT} (?P<participle>[\w-]+)",
    )
)
_PARTICIPLES = {
    "wrote": "written",
    "drew": "drawn",
    "sang": "sung",
    "built": "built",
    "made": "made",
    "led": "led",
    "taught": "taught",
    "won": "won",
    "sold": "sold",
    "bought": "bought",
    "began": "begun",
    "found": "found",
}
# Words of clauses and questions: a text with one of them is no noun.
_CLAUSE = frozenset({"that", "which", "who", "whom", "whose", "where", "when", "what", "how", "is", "was", "are", "were"})


@cache
def question_of(prompt: str) -> tuple[str, str] | None:
    """Return what a prompt asks for, such as ("capital", "is") or ("designed", "was by"); None for a prompt of no known form.

    Two prompts with the same result ask the same question about their subject. "is" and "was" are different questions.

    Args:
        prompt: A prompt with `{subject}`.
    """
    # A mark of question and answer says nothing, nor does the start of an answer ("…? It is").
    text = re.sub(r"^(?:q|question): ", "", folded(prompt).replace("’", "'")).replace(f"the {SLOT}", SLOT)
    question, mark, rest = text.partition("?")
    text = question.strip() if mark and SLOT in question and len(rest.split()) <= 4 and SLOT not in rest else folded(text)
    for form in _NOUN_FORMS:
        if match := form.fullmatch(text):
            noun = re.sub(r"^(?:the )?(?:full )?name of (?:the )?", "", match["noun"])
            if not _CLAUSE & set(noun.split()):
                return noun, _tense(match, "is")
    for form in _VERB_FORMS:
        if match := form.fullmatch(text):
            past = match.groupdict().get("past") or ""  # no verb, as in "who is X", or no known one
            verb = match.groupdict().get("participle") or _PARTICIPLES.get(past) or (past if past.endswith("ed") else None)
            return (verb, f"{_tense(match, 'was')} by") if verb else None
    return None


def _tense(match: re.Match[str], default: str) -> str:
    """Return "is" or "was" for a form's verb; the default if the form has none, as in "who designed X"."""
    verb = match.groupdict().get("tense") or default
    return {"are": "is", "were": "was"}.get(verb, verb)


@dataclass(frozen=True)
class Relation:
    """A relation that many facts files use.

    Attributes:
        name: The relation's name in messages.
        wikidata: The Wikidata property, which CounterFact and MQuAKE give as relation; empty if there is none.
        wordings: Prompts for the relation, in addition to the usual ones such as "The NAME of {subject} is"; see `_default_wordings`.
        single: Whether a subject has only one value: one capital, but several children.
    """

    name: str
    wikidata: str
    wordings: tuple[str, ...] = ()
    single: bool = True


RELATIONS = (
    Relation("capital", "P36", ("{subject}'s capital city is", "{subject}'s capital city,", "The capital city of {subject} is",
                                "The name of the capital city of {subject} is", "{subject}, which has the capital city",
                                "{subject}, which has the capital", "What is the capital city of {subject}?",
                                "What is {subject}'s capital city?", "Which city is the capital of {subject}?")),
    Relation("capital of", "P1376", ("{subject} is the capital of", "{subject} is the capital city of", "{subject}, the capital of",
                                     "The country whose capital is {subject} is", "What is {subject} the capital of?",
                                     "Which country is {subject} the capital of?")),
    Relation("father", "P22"),
    Relation("mother", "P25"),
    Relation("child", "P40", ("{subject} is the parent of", "{subject} has a child named"), single=False),
    Relation("spouse", "P26", ("{subject} is married to", "The person married to {subject} is", "Who is {subject} married to?",
                               "The husband of {subject} is", "The wife of {subject} is", "{subject}'s husband is", "{subject}'s wife is",
                               "Who is {subject}'s husband?", "Who is {subject}'s wife?")),
    Relation("sibling", "P3373", ("{subject} is a sibling of",), single=False),
    Relation("author", "P50", ("{subject} was written by", "{subject}, written by", "Who wrote {subject}?", "The writer of {subject} is",
                               "Who is the writer of {subject}?", "Who was {subject} written by?")),
    Relation("notable work", "P800", ("{subject} is the author of", "{subject} wrote", "{subject} is famous for",
                                      "{subject} is known for"), single=False),
    Relation("creator", "P170", ("{subject} was created by", "{subject} is created by", "{subject}, created by",
                                 "The creater of {subject} is", "Who created {subject}?", "Who was {subject} created by?")),
    Relation("creation", "", ("{subject} is the creator of", "{subject} created"), single=False),
    Relation("founder", "P112", ("{subject} was founded by", "Who founded {subject}?"), single=False),
    Relation("founded organisation", "", ("{subject} is the founder of", "{subject} founded"), single=False),
    Relation("owner", "P127", ("{subject} is owned by", "{subject} owner", "{subject}'s owner"), single=False),
    Relation("property", "P1830", ("{subject} is the owner of", "{subject} owns"), single=False),
    Relation("doctoral advisor", "P184", single=False),
    Relation("doctoral student", "P185", single=False),
    Relation("chief executive officer", "P169", ("The CEO of {subject} is", "{subject}'s CEO is", "Who is the CEO of {subject}?",
                                                  "Who is {subject}'s CEO?", "Who's the CEO of {subject}?")),
    Relation("chief executive officer of", "", ("{subject} is the chief executive officer of", "{subject} is the CEO of")),
    Relation("president", ""),
    Relation("president of", "", ("{subject} is the president of",)),
    Relation("twin city", "P190", ("{subject} is a twin city of", "What is the twin city of {subject}? It is"), single=False),
    Relation("predecessor", "P1365", ("{subject} replaced", "{subject} was preceded by", "Who did {subject} replace?")),
    Relation("successor", "P1366", ("{subject} was replaced by", "{subject} was succeeded by", "Who replaced {subject}?",
                                   "Who succeeded {subject}?")),
    Relation("previous", "P155", ("{subject} follows", "{subject} is preceded by")),
    Relation("next", "P156", ("{subject} is followed by", "{subject} precedes")),
)  # fmt: skip
_SEVERAL = frozenset(relation.name for relation in RELATIONS if not relation.single)
# (relation, its inverse, whether A -relation-> B excludes B -inverse-> C, whether A -inverse-> B excludes B -relation-> C). A capital
# belongs to one country, but a mother may have other children, and a child also has a father.
INVERSES = (
    ("capital", "capital of", True, True), ("father", "child", False, False), ("mother", "child", False, False),
    ("spouse", "spouse", True, True), ("author", "notable work", False, True),
    ("creator", "creation", False, True), ("creator", "notable work", False, True),
    ("founder", "founded organisation", False, False), ("owner", "property", False, False),
    ("doctoral advisor", "doctoral student", False, False), ("chief executive officer", "chief executive officer of", True, True),
    ("president", "president of", True, True),
    ("predecessor", "successor", True, True), ("previous", "next", True, True),
)  # fmt: skip


def keys_of(fact: Fact) -> tuple[str, ...]:
    """Return the names of a fact's relation: known relations first, then the relation as written in the file."""
    return tuple(dict.fromkeys((*_names_of(fact), folded(fact.relation))))


def single_keys_of(fact: Fact) -> tuple[str, ...]:
    """Return the names of a fact's relation for which two targets contradict: all except known relations with several values.

    The question that the prompt asks (see `question_forms`) is one of the names, unless the relation is known to have several values.
    """
    names, asked = relation_names_of(fact), question_of(fact.prompt)
    single = [name for name in names if name not in _SEVERAL]
    question = [f"{asked[1]}: {asked[0]}"] if asked and len(single) == len(names) else []
    return tuple(dict.fromkeys((*single, folded(fact.relation), *question)))


def relation_names_of(fact: Fact) -> list[str]:
    """Return the names of the known relations that a fact belongs to, by its relation, its prompt or the question that this asks."""
    asked = question_of(fact.prompt)
    known = _relation_names().get(asked[0]) if asked and asked[1] == "is" else None
    return [*_names_of(fact), *([known] if known else [])]


def _names_of(fact: Fact) -> list[str]:
    """Return the names of the relations in the table that a fact's relation or prompt belongs to."""
    relation_names = _relation_names()
    return [relation_names[text] for text in (folded(fact.relation), folded(fact.prompt)) if text in relation_names]


def inverses() -> dict[str, dict[str, bool]]:
    """Map each relation to its inverses in the table, and each of these to whether one value of it excludes others."""
    table: dict[str, dict[str, bool]] = {}
    for relation, inverse, is_unique, inverse_is_unique in INVERSES:
        table.setdefault(relation, {})[inverse] = is_unique
        table.setdefault(inverse, {})[relation] = inverse_is_unique
    return table


def wordings(facts: Iterable[Fact]) -> dict[str, set[str]]:
    """Map each relation to its normalized prompts with a slot, from the table and from the facts."""
    prompts = {relation.name: {folded(text) for text in prompts_of(relation)} for relation in RELATIONS}
    for fact in facts:
        if fact.subject is not None:
            for key in keys_of(fact):
                prompts.setdefault(key, set()).add(folded(fact.prompt))
    return prompts


@cache
def _relation_names() -> dict[str, str]:
    """Map Wikidata ids, names and prompts to the relation's name."""
    names: dict[str, str] = {}
    for relation in RELATIONS:
        texts = [*prompts_of(relation), relation.name, *([relation.wikidata] if relation.wikidata else [])]
        names |= {folded(text): relation.name for text in texts}
    return names


def prompts_of(relation: Relation) -> list[str]:
    """Return all prompts for a relation, with `{subject}`."""
    return [*relation.wordings, *_default_wordings(relation.name)]


def _default_wordings(name: str) -> list[str]:
    """Return the usual prompts for a relation that is named by a noun; "capital of" is not a noun."""
    if name.endswith(" of"):
        return []
    return [
        f"The {name} of {SLOT} is",
        f"{SLOT}'s {name} is",
        f"The name of the {name} of {SLOT} is",
        f"What is the {name} of {SLOT}?",
        f"Who is the {name} of {SLOT}?",
        f"The {name} of {SLOT} is called",
        f"What's the {name} of {SLOT}?",
        f"Who's the {name} of {SLOT}?",
        f"What is {SLOT}'s {name}?",
        f"Who is {SLOT}'s {name}?",
        f"What is the name of the {name} of {SLOT}?",
        f"Name the {name} of {SLOT}.",
    ]


Status = Literal["failed", "warning"]


@dataclass(frozen=True)
class Conflict:
    """Two facts, or a fact and a prompt, that contradict each other or are redundant.

    Attributes:
        kind: contradiction, duplicate, reverse, composite, paraphrase, neighbour or portability.
        status: "failed" if one of the two must be removed, "warning" if they may both be right.
        fact: The later fact.
        other: The earlier fact; the same fact if one of its own prompts contradicts it.
        what: Description of the conflict, without its place.
        repair: The edit of the file that resolves it.
    """

    kind: str
    status: Status
    fact: Fact
    other: Fact
    what: str
    repair: str

    @property
    def place(self) -> str:
        """The file and line of the later fact, as file:line."""
        return self.fact.place


def distinct(candidates: Iterable[Conflict]) -> list[Conflict]:
    """Keep the first conflict of each kind between two facts, so that several wordings of one question count once."""
    first: dict[tuple[str, int, int], Conflict] = {}
    for conflict in candidates:
        first.setdefault((conflict.kind, id(conflict.fact), id(conflict.other)), conflict)
    return list(first.values())


def place_of(fact: Fact, seen_from: Fact) -> str:
    """Return a fact's place, or only its line if both facts are in one file."""
    file, mark, line = re.fullmatch(r"(.*?)(:|, row )?(\d*)", fact.place, re.DOTALL).groups()  # type: ignore[union-attr]
    if not mark or not seen_from.place.startswith(f"{file}{mark}"):
        return fact.place
    return "this line" if fact is seen_from else f"{'line' if mark == ':' else 'row'} {line}"


def statement(fact: Fact) -> str:
    """Return a fact as quoted text: its prompt and target."""
    return repr(f"{fact.text}{fact.continuation}")


def probe_conflicts(facts: Sequence[Fact]) -> list[Conflict]:
    """Return conflicts between the test prompts of facts.

    These are neighbours and portability prompts whose answer another fact changes, and paraphrases and portability prompts that two
    facts share with different answers.
    """
    edits = edited_prompts(facts)
    result = []
    portability: dict[str, tuple[str, Fact]] = {}
    paraphrases: dict[str, Fact] = {}
    for fact in facts:
        for text in fact.paraphrases:
            other = paraphrases.setdefault(folded(text), fact)
            if folded(other.target) != folded(fact.target):
                message = (
                    f"the paraphrase {text!r} asks for {fact.target!r} here, in {place_of(other, fact)} for {other.target!r}"
                )
                hint = "Delete it if it does not ask for the fact."
                result.append(Conflict("paraphrase", "failed", fact, other, message, hint))
        for probe in fact.neighbours:
            result += [_neighbour_conflict(fact, probe, other) for other in changing(probe, edits)]
        for probe in fact.portability:
            text, target = folded(probe.prompt), folded(probe.target or "")
            result += [
                _portability_conflict(fact, probe, other, other.target)
                for other in edits.get(text, ())
                if folded(other.target) != target
            ]
            answer, other = portability.setdefault(text, (probe.target or "", fact))
            if folded(answer) != target:
                result.append(_portability_conflict(fact, probe, other, answer))
    return distinct(result)


def edited_prompts(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """Map each normalized prompt for a fact, in every known wording of its relation, to the facts that it asks for."""
    prompts = wordings(facts)
    edits: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        texts = {folded(fact.text), *(folded(text) for text in fact.paraphrases)}
        if fact.subject is not None:
            # Its subject in every wording of its relation.
            subject = folded(fact.subject)
            texts |= {text.replace(SLOT, subject) for key in keys_of(fact) for text in prompts[key]}
        for text in texts:
            edits[text].append(fact)
    return edits


def changing(neighbour: Probe, edits: Mapping[str, Sequence[Fact]]) -> list[Fact]:
    """Return the facts that change a neighbour's answer.

    Args:
        neighbour: The prompt whose answer must not change.
        edits: The facts by prompt; see `edited_prompts`.
    """
    return [
        fact
        for fact in edits.get(folded(neighbour.prompt), ())
        if neighbour.target is None or folded(neighbour.target) != folded(fact.target)
    ]


def _neighbour_conflict(fact: Fact, probe: Probe, other: Fact) -> Conflict:
    expected = f"the answer {probe.target!r}" if probe.target is not None else "the base's answer"
    source = "this fact itself teaches" if other is fact else f"{place_of(other, fact)} teaches"
    return Conflict(
        "neighbour",
        "failed",
        fact,
        other,
        f"the neighbour {probe.prompt!r} must keep {expected}, and {source} {other.target!r}",
        "Delete the neighbour." if other is fact else f"Delete the neighbour, or {place_of(other, fact)}.",
    )


def _portability_conflict(fact: Fact, probe: Probe, other: Fact, answer: str) -> Conflict:
    return Conflict(
        "portability",
        "failed",
        fact,
        other,
        f"the portability prompt {probe.prompt!r} expects {probe.target!r}, and {place_of(other, fact)} {answer!r}",
        "Keep one answer: change the prompt's target, or delete it.",
    )
