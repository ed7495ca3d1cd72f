"""RippleEdits (Cohen et al. 2023, arXiv 2307.12976): an edit as a sentence, and groups of questions about what it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from workbench.facts.benchmarks import Draft, Pair, SkippedRowError, list_of, mappings_of, text_of
from workbench.facts.facts import folded

FOLLOWS = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")
STAYS = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")  # the second is the spelling of the set's README
_ALIASING = "Subject_Aliasing"
# The set states an edit as one sentence, and no subject. These are the sentences that differ from "The (name of the) RELATION of {} is".
_SENTENCES = {
    "SIBLING": "The names of the siblings of {} are",
    "NUMBER_OF_CHILDREN": "The number of children {} has is",
    "SEX_OR_GENDER": "The gender of {} is",
    "COUNTRY": "The name of the country which {} is associated with is",
    "POSITION_HELD": "The name of the position held by {} is",
    "MEMBER_OF_SPORTS_TEAM": "The name of the sports team which {} is a member of is",
    "LEAGUE": "The name of the league which {} plays in is",
    "NATIVE_LANGUAGE": "The mother tongue of {} is",
    "AWARD_RECEIVED": "The name of the award {} won is",
    "FOLLOWS": "{} follows",
    "FOLLOWED_BY": "{} is followed by",
    "ETHNIC_GROUP": "The name of the ethnic group which {} is associated with is",
    "RELIGION": "The name of the religion which {} is associated with is",
    "IS_ALIVE": "Is {} still alive?",
    "CONTINENT": "The name of the continent which {} is part of is",
    "CAPITAL": "The name of the capital city of {} is",
    "CURRENCY": "The name of the currency in {} is",
    "LIKELY_ANTHEM": "The name of the anthem that is most likely to be performed in {} is",
    "CAPITAL_OF": "The name of the country which {} is the capital of is",
    "CAST_MEMBER": "The names of the cast members of {} are",
}


def is_ripple(row: Mapping[Any, Any]) -> bool:
    """Return True if a row has the keys of RippleEdits."""
    return isinstance(row.get("edit"), Mapping) and bool(row.keys() & {*FOLLOWS, *STAYS})


def ripple(row: Mapping[str, Any]) -> Iterator[Draft]:
    """Convert a row of RippleEdits.

    Specificity and forgetfulness test what stays, so they are neighbours; the other groups test what follows, so they are portability.
    Every test query counts on its own, also where the set accepts one right answer of several (`test_condition` OR). The queries
    that must be known before the edit (`condition_queries`) are ignored.
    """
    edit = row["edit"]
    if not isinstance(edit, Mapping):
        raise SkippedRowError(f"expected a mapping in 'edit', found {edit!r}")
    prompt, subject, target, true = _sentence(row, edit)
    notes: list[str] = []
    neighbours, portability = _questions(row, STAYS, notes), _questions(row, FOLLOWS, notes)
    asked = folded(prompt.replace("{}", subject))
    asking = [pair for pair in (*neighbours, *portability) if folded(text_of(pair[0]) or "") == asked]
    if asking:
        notes.append(f"{len(asking)} test queries ask for the edited fact itself and were skipped; the fact is kept")
    yield Draft(
        prompt,
        subject,
        target,
        true,
        _name(edit),
        neighbours=[pair for pair in neighbours if pair not in asking],
        portability=[pair for pair in portability if pair not in asking],
        aliases=_target_aliases(row, target),
        notes=notes,
    )


def _sentence(row: Mapping[str, Any], edit: Mapping[str, Any]) -> tuple[str, str, str, str | None]:
    """Return the edit's prompt with `{}`, its subject, its target and the former target, if the row has one."""
    sentence = text_of(edit.get("prompt"))
    if sentence is None:
        raise SkippedRowError("no prompt")
    readings = [
        (template, rest[:end], rest[end + len(after) + 1 :].strip().removesuffix("."))
        for template in _templates(edit)
        for before, after in [template.split("{}")]
        if sentence.startswith(before)
        for rest in [sentence.removeprefix(before)]
        for end in range(1, len(rest))
        if rest.startswith(f"{after} ", end)
    ]
    if not readings:
        raise SkippedRowError(f"the prompt {sentence!r} is no sentence of the relation {_name(edit)!r}")
    if len(readings) > 1:
        names = set(_subject_names(row, edit))
        readings = [reading for reading in readings if reading[1] in names]
    if len(readings) != 1:
        raise SkippedRowError(f"the subject cannot be told from the target in {sentence!r}")
    template, subject, target = readings[0]
    if not target:
        raise SkippedRowError("no target")
    former = edit.get("original_fact") or edit.get("previous_fact")
    former_sentence = text_of(former.get("prompt")) if isinstance(former, Mapping) else None
    start = template.replace("{}", subject) + " "
    true = former_sentence.removeprefix(start).strip().removesuffix(".") if (former_sentence or "").startswith(start) else None  # type: ignore[union-attr]
    return template, subject, target, true or None


def _templates(edit: Mapping[str, Any]) -> list[str]:
    """Return the sentences of a relation up to the target, with `{}` for the subject."""
    name, noun = text_of(edit.get("relation")) or "", _name(edit)
    if "{" in name:
        return []
    return [_SENTENCES[name]] if name in _SENTENCES else [f"The name of the {noun} of {{}} is", f"The {noun} of {{}} is"]


def _name(edit: Mapping[str, Any]) -> str:
    """Return the relation as words, "country of citizenship"."""
    return (text_of(edit.get("relation")) or "").lower().replace("_", " ")


def _subject_names(row: Mapping[str, Any], edit: Mapping[str, Any]) -> Iterator[str]:
    """Yield the subject as other questions of the row name it."""
    for group in (*STAYS, *FOLLOWS):
        for test in mappings_of(row.get(group)):
            for query in (*mappings_of(test.get("test_queries")), *mappings_of(test.get("condition_queries"))):
                prompt = text_of(query.get("prompt"))
                if prompt is None or query.get("subject_id") != edit.get("subject_id") or query.get("query_type") == "two_hop":
                    continue
                for template in _templates(query):
                    before, after = template.split("{}")
                    if prompt.startswith(before) and prompt.endswith(after):
                        yield prompt[len(before) : len(prompt) - len(after)]


def _questions(row: Mapping[str, Any], groups: tuple[str, ...], notes: list[str]) -> list[Pair]:
    """Return the test queries of some groups with their answers, each once; `notes` gets the number of invalid tests."""
    pairs: dict[str, Pair] = {}
    invalid = 0
    for group in groups:
        for test in list_of(row.get(group)):
            queries = test.get("test_queries") if isinstance(test, Mapping) else None
            for query in queries if isinstance(queries, list) and queries else [None]:
                document = query if isinstance(query, Mapping) else {}
                prompt = text_of(document.get("prompt", document.get("phrase")))
                if prompt is None:
                    invalid += 1
                else:
                    pairs.setdefault(prompt, (prompt, document.get("answers")))
    if invalid:
        notes.append(f"{invalid} tests of {', '.join(g for g in groups if g in row)} have no query; the fact is kept")
    return list(pairs.values())


def _target_aliases(row: Mapping[str, Any], target: str) -> list[Any]:
    """Return other names of the target, which the questions with another name of the subject list."""
    return [
        alias
        for test in mappings_of(row.get(_ALIASING))
        for query in mappings_of(test.get("test_queries"))
        for answer in mappings_of(query.get("answers"))
        if folded(text_of(answer) or "") == folded(target)
        for alias in list_of(answer.get("aliases"))
    ]
