"""Rows of CounterFact, zsRE, KnowEdit, WikiBigEdit and MQuAKE-CF as drafts of facts, and access to their nested values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.facts.facts import folded

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


def mappings_of(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings of a list, without its other entries."""
    return [entry for entry in list_of(value) if isinstance(entry, Mapping)]


def prompt_and_answer(entry: Any) -> Pair:
    """Return (prompt, answer or None) from a text or a mapping."""
    if not isinstance(entry, Mapping):
        return entry, None
    return entry.get("prompt", entry.get("loc")), next((entry[key] for key in ANSWERS if key in entry), None)


def counterfact(row: Mapping[str, Any]) -> Iterator[Draft]:
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


def flat(row: Mapping[str, Any]) -> Iterator[Draft]:
    """Convert a row of EasyEdit, LocFT or KnowEdit: a prompt, a rephrased prompt, locality and portability."""
    if "text" in row and "labels" in row:  # KnowEdit's WikiBio: the sentence that follows a passage
        row = {**row, "prompt": row["text"], "target_new": row["labels"], "subject": row.get("concept")}
    neighbours = [(row.get("locality_prompt"), row.get("locality_ground_truth")), *_grouped(row.get("locality"))]
    if isinstance(row.get("locality_prompt"), list):
        neighbours[:1] = zip(row["locality_prompt"], list_of(row.get("locality_ground_truth")), strict=False)
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


def _multi_hop(row: Mapping[str, Any]) -> Iterator[Pair]:
    """Yield WikiBigEdit's question that needs the fact and another one."""
    if row.get("mhop") is not None:
        yield row["mhop"], row.get("mhop_ans", row.get("mhop_answer"))


def zsre(row: Mapping[str, Any]) -> Iterator[Draft]:
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


def wikibigedit(row: Mapping[str, Any]) -> Iterator[Draft]:
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


def mquake(row: Mapping[str, Any]) -> Iterator[Draft]:
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


def _filled(rewrite: Mapping[str, Any]) -> str:
    """Return the rewrite's prompt with its subject, normalized."""
    return folded(str(rewrite.get("prompt")).replace("{}", str(rewrite.get("subject"))))


def _asks_for(hop: Mapping[str, Any], rewrite: Mapping[str, Any]) -> bool:
    """Return True if a hop has the question or the prompt of a rewrite."""
    texts = {folded(text) for key in ("question", "cloze") if (text := text_of(hop.get(key)))}
    return not texts.isdisjoint({folded(text_of(rewrite.get("question")) or ""), _filled(rewrite)})


def _states(hop: Mapping[str, Any], rewrite: Mapping[str, Any]) -> bool:
    """Return True if an edited hop is about the rewrite's subject and has its new answer."""
    texts = folded(f"{text_of(hop.get('question')) or ''} {text_of(hop.get('cloze')) or ''}")
    answer, new = text_of(hop.get("answer")) or "", text_of(rewrite.get("target_new")) or ""
    is_about = _asks_for(hop, rewrite) or folded(str(rewrite.get("subject"))) in texts
    return is_about and folded(answer) == folded(new)


def _edited_triples(row: Mapping[str, Any], hops: list[Mapping[str, Any]]) -> set[int]:
    """Return the numbers of the hops whose triple (subject, relation, object) is an edited one, if the case lists triples."""
    orig = row.get("orig")
    source = orig if isinstance(orig, Mapping) else row
    triples, edits = list_of(source.get("new_triples")), list_of(source.get("edit_triples"))
    return {number for number, triple in enumerate(triples) if triple in edits} if len(triples) == len(hops) else set()
