"""Rows of CounterFact, zsRE, KnowEdit, WikiBigEdit, MQuAKE-CF and RippleEdits as drafts of facts, and access to their nested values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.facts.facts import folded
from workbench.ground.foreign_names import FOLLOWS, STAYS

Pair = tuple[Any, Any]
# Keys of the answer to a test prompt, in the order in which they are looked up.
ANSWERS = ("ground_truth", "target", "answer", "targets", "answers", "loc_ans")


class SkippedRowError(ValueError):
    """The reason for skipping a row."""


@dataclass(frozen=True)
class Draft:
    """A fact as a published row states it, with unchecked values, before its subject is located in the prompt.

    Attributes:
        prompt: The prompt; `{}` stands for the subject, which may also be written out.
        subject: The subject, or None.
        target: The new answer, or a list of its wordings.
        true: The true answer, or a list of its wordings.
        relation: Name of the relation.
        id: The fact's name.
        paraphrases: Other wordings of the prompt.
        neighbours: Prompts whose answers must not change, and their answers.
        portability: Prompts whose answers follow from the fact, and their answers.
        same_subject: Prompts that ask something else about the subject, and their answers.
        aliases: Further wordings of the target.
        names_subject: False for sets whose questions name no subject: a missing subject is then no reason to skip the row.
        notes: Reasons for which parts of the row were skipped.
    """

    prompt: Any
    subject: Any
    target: Any
    true: Any = None
    relation: Any = None
    id: str | None = None
    paraphrases: Iterable[Any] = ()
    neighbours: Iterable[Pair] = ()
    portability: Sequence[Pair] = ()
    aliases: Iterable[Any] = ()
    names_subject: bool = True
    notes: Sequence[str] = ()
    same_subject: Sequence[Pair] = ()


def text_of(value: Any) -> str | None:
    """Return the text of a nested value: a text, a number, {"str": …}, or the first text of a list."""
    if isinstance(value, Mapping):
        return text_of(value.get("str", value.get("value")))
    if isinstance(value, (list, tuple)):
        return next((text for entry in value if (text := text_of(entry)) is not None), None)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def list_of(value: Any) -> list[Any]:
    """Return a list as it is, None as an empty list, and any other value as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def mappings_of(value: Any) -> list[Mapping[str, object]]:
    """Return the mappings of a list, without its other entries."""
    return [entry for entry in list_of(value) if isinstance(entry, Mapping)]


def prompt_and_answer(entry: Any) -> Pair:
    """Return (prompt, answer or None) from a text or a mapping."""
    if not isinstance(entry, Mapping):
        return entry, None
    return entry.get("prompt", entry.get("loc")), next((entry[key] for key in ANSWERS if key in entry), None)


def counterfact(row: Mapping[str, object]) -> Iterator[Draft]:
    """Convert a row of kmeng01/rome. Its neighbourhood prompts are about other subjects with the same true object, which is the answer."""
    rewrite = row["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        rewrite = row
    true_object = rewrite.get("target_true")
    yield Draft(
        rewrite["prompt"],
        rewrite.get("subject"),
        rewrite["target_new"],
        true_object,
        rewrite.get("relation_id"),
        text_of(row.get("case_id")),
        [prompt_and_answer(p)[0] for p in list_of(row.get("paraphrase_prompts"))],
        [
            (prompt, answer if answer is not None else true_object)
            for prompt, answer in map(prompt_and_answer, list_of(row.get("neighborhood_prompts")))
        ],
    )


def flat(row: Mapping[str, object]) -> Iterator[Draft]:
    """Convert a row of EasyEdit, LocFT or KnowEdit: a prompt, a rephrased prompt, locality and portability."""
    if "text" in row and "labels" in row:  # KnowEdit's WikiBio: the sentence that follows a passage
        row = {**row, "prompt": row["text"], "target_new": row["labels"], "subject": row.get("concept")}
    neighbours = [(row.get("locality_prompt"), row.get("locality_ground_truth")), *_grouped(row.get("locality"))]
    if isinstance(prompts := row.get("locality_prompt"), list):
        neighbours[:1] = zip(prompts, list_of(row.get("locality_ground_truth")), strict=False)
    portability = [*_grouped(row.get("portability")), *_multi_hop(row)]
    yield Draft(
        row["prompt"],
        row.get("subject"),
        row["target_new"],
        row.get("ground_truth"),
        None,
        text_of(row.get("case_id")),
        [*list_of(row.get("rephrase_prompt")), *list_of(row.get("rephrase")), *list_of(row.get("personas"))],
        neighbours,
        portability,
    )


def _grouped(value: Any) -> Iterator[Pair]:
    """Yield pairs from KnowEdit's groups, {"Reasoning": [{"prompt", "ground_truth"}], …}, or EasyEdit's separate lists of prompts and answers."""
    if isinstance(value, list):
        yield from map(prompt_and_answer, value)
    for group in value.values() if isinstance(value, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("prompt"), list):
            yield from zip(group["prompt"], list_of(group.get("ground_truth")), strict=False)
        else:
            yield from map(prompt_and_answer, list_of(group))


def _multi_hop(row: Mapping[str, object]) -> Iterator[Pair]:
    """Yield WikiBigEdit's question that needs the fact and another one."""
    if row.get("mhop") is not None:
        yield row["mhop"], row.get("mhop_ans", row.get("mhop_answer"))


def zsre(row: Mapping[str, object]) -> Iterator[Draft]:
    """Convert a row of MEND's zsRE: `alt` is the target, `answers` the truth, `loc` an unrelated question."""
    yield Draft(
        row["src"],
        row.get("subject"),
        row["alt"],
        row.get("answers"),
        None,
        text_of(row.get("case_id")),
        [*list_of(row.get("rephrase")), *list_of(row.get("personas"))],
        [(row.get("loc"), row.get("loc_ans"))],
        list(_multi_hop(row)),
    )


def wikibigedit(row: Mapping[str, object]) -> Iterator[Draft]:
    """Convert a row of WikiBigEdit with its own column names, MEND's or LocFT's."""
    if "src" in row:
        return zsre(row)
    if "update" not in row:
        return flat(row)
    neighbours = [(row.get("loc"), row.get("loc_ans"))]
    return iter(
        [
            Draft(
                row["update"],
                row.get("subject"),
                row["ans"],
                None,
                None,
                text_of(row.get("case_id")),
                [*list_of(row.get("rephrase")), *list_of(row.get("personas"))],
                neighbours,
                list(_multi_hop(row)),
            )
        ]
    )


def mquake(row: Mapping[str, object]) -> Iterator[Draft]:
    """Convert a case of MQuAKE-CF: every rewrite is a fact.

    The case's multi-hop questions are portability prompts of each fact. Each hop of the new chain is a question of its own: the
    question of a hop that a rewrite changes is a paraphrase of that fact, and the other hops are neighbours, as cloze and as
    question, with the published answer.
    """
    rewrites = mappings_of(row["requested_rewrite"])
    hops = mappings_of(row.get("new_single_hops"))
    edited = [number in _edited_triples(row, hops) or any(_asks_for(hop, r) for r in rewrites) for number, hop in enumerate(hops)]
    unchanged: list[Pair] = [
        (text, hop.get("answer"))
        for hop, is_edited in zip(hops, edited, strict=True)
        if not is_edited
        for text in dict.fromkeys(text_of(hop.get(key)) for key in ("cloze", "question"))
        if text is not None
    ]
    case = text_of(row.get("case_id"))
    for number, rewrite in enumerate(rewrites, 1):
        own = [hop for hop, is_edited in zip(hops, edited, strict=True) if is_edited and _states(hop, rewrite)]
        prompt = _filled(rewrite)
        wordings = [*list_of(rewrite.get("question")), *(hop.get(key) for hop in own for key in ("question", "cloze"))]
        yield Draft(
            rewrite.get("prompt"),
            rewrite.get("subject"),
            rewrite.get("target_new"),
            rewrite.get("target_true"),
            rewrite.get("relation_id"),
            case if case is None or len(rewrites) == 1 else f"{case}-{number}",
            [text for text in dict.fromkeys(filter(None, map(text_of, wordings))) if folded(text) != prompt],
            unchanged,
            [(question, row.get("new_answer")) for question in list_of(row.get("questions"))],
            [alias for hop in own for alias in list_of(hop.get("answer_alias"))],
        )


def _filled(rewrite: Mapping[str, object]) -> str:
    """Return the rewrite's prompt with its subject, normalized."""
    return folded(str(rewrite.get("prompt")).replace("{}", str(rewrite.get("subject"))))


def _asks_for(hop: Mapping[str, object], rewrite: Mapping[str, object]) -> bool:
    """Return True if a hop has the question or the prompt of a rewrite."""
    texts = {folded(text) for key in ("question", "cloze") if (text := text_of(hop.get(key)))}
    return not texts.isdisjoint({folded(text_of(rewrite.get("question")) or ""), _filled(rewrite)})


def _states(hop: Mapping[str, object], rewrite: Mapping[str, object]) -> bool:
    """Return True if an edited hop is about the rewrite's subject and has its new answer."""
    texts = folded(f"{text_of(hop.get('question')) or ''} {text_of(hop.get('cloze')) or ''}")
    answer, new = text_of(hop.get("answer")) or "", text_of(rewrite.get("target_new")) or ""
    is_about = _asks_for(hop, rewrite) or folded(str(rewrite.get("subject"))) in texts
    return is_about and folded(answer) == folded(new)


def _edited_triples(row: Mapping[str, object], hops: list[Mapping[str, object]]) -> set[int]:
    """Return the numbers of the hops whose triple (subject, relation, object) is an edited one, if the case lists triples."""
    orig = row.get("orig")
    source = orig if isinstance(orig, Mapping) else row
    triples, edits = list_of(source.get("new_triples")), list_of(source.get("edit_triples"))
    return {number for number, triple in enumerate(triples) if triple in edits} if len(triples) == len(hops) else set()


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


def ripple(row: Mapping[str, object]) -> Iterator[Draft]:
    """Convert a row of RippleEdits.

    Specificity asks for other relations of the subject; forgetfulness for other objects of the relation, which are neighbours; the other
    groups test what follows, so they are portability.
    Every test query counts on its own, also where the set accepts one right answer of several (`test_condition` OR). The queries
    that must be known before the edit (`condition_queries`) are ignored.
    """
    edit = row["edit"]
    if not isinstance(edit, Mapping):
        raise SkippedRowError(f"expected a mapping in 'edit', found {edit!r}")
    prompt, subject, target, true = _sentence(row, edit)
    notes: list[str] = []
    neighbours, portability = _questions(row, STAYS[-1:], notes), _questions(row, FOLLOWS, notes)
    others = _questions(row, STAYS[:-1], notes)
    asked = folded(prompt.replace("{}", subject))
    asking = [pair for pair in (*neighbours, *others, *portability) if folded(text_of(pair[0]) or "") == asked]
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
        same_subject=[pair for pair in others if pair not in asking],
    )


def _sentence(row: Mapping[str, object], edit: Mapping[str, object]) -> tuple[str, str, str, str | None]:
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


def _templates(edit: Mapping[str, object]) -> list[str]:
    """Return the sentences of a relation up to the target, with `{}` for the subject."""
    name, noun = text_of(edit.get("relation")) or "", _name(edit)
    if "{" in name:
        return []
    return [_SENTENCES[name]] if name in _SENTENCES else [f"The name of the {noun} of {{}} is", f"The {noun} of {{}} is"]


def _name(edit: Mapping[str, object]) -> str:
    """Return the relation as words, "country of citizenship"."""
    return (text_of(edit.get("relation")) or "").lower().replace("_", " ")


def _subject_names(row: Mapping[str, object], edit: Mapping[str, object]) -> Iterator[str]:
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


def _questions(row: Mapping[str, object], groups: tuple[str, ...], notes: list[str]) -> list[Pair]:
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


def _target_aliases(row: Mapping[str, object], target: str) -> list[Any]:
    """Return other names of the target, which the questions with another name of the subject list."""
    return [
        alias
        for test in mappings_of(row.get(_ALIASING))
        for query in mappings_of(test.get("test_queries"))
        for answer in mappings_of(query.get("answers"))
        if folded(text_of(answer) or "") == folded(target)
        for alias in list_of(answer.get("aliases"))
    ]
