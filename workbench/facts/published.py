"""Rows of published editing benchmarks as facts: CounterFact, zsRE, KnowEdit, MQuAKE, WikiBigEdit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.facts.facts import SLOT, Fact, fact_of
from workbench.facts.rows import FactRow, read_rows

NAMES = "CounterFact, zsRE, KnowEdit, MQuAKE-CF and WikiBigEdit"
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Skip:
    """A row, or a part of one, that became no fact: its place (file:line, or the number of the row) and the reason."""

    place: str
    reason: str


@dataclass(frozen=True)
class Published:
    """What a file gave.

    Attributes:
        facts: In the file's order; rows that ask the same for the same target are one fact with the prompts of all.
        skipped: What was left out.
        format: counterfact, zsre, knowedit, mquake or wikibigedit; "facts" for the project's own format.
    """

    facts: list[Fact]
    skipped: list[Skip]
    format: str


@dataclass(frozen=True)
class _Draft:
    """A fact as a published row states it, before its subject is found. Values are as they lie in the file."""

    prompt: Any
    subject: Any
    target: Any
    true: Any = None
    relation: Any = None
    id: str | None = None
    paraphrases: Iterable[Any] = ()
    neighbours: Iterable[Pair] = ()
    portability: Sequence[Pair] = ()


def read_published(path: Path, shown: str) -> Published:
    """The facts of a published file, and what of it became no fact.

    Args:
        path: A JSON list of objects, or one object a line.
        shown: How errors and places call it.

    Errors: as `read_rows`; rows of no format that is known.
    """
    rows = read_rows(path, shown, "A JSON list of objects.")
    name = format_of(rows)
    if name is None:
        keys = next((", ".join(map(str, row.data)) for row in rows if isinstance(row.data, Mapping)), "no objects")
        raise WorkbenchError(f"{shown}: no published format has these keys: {keys}", f"Known: {NAMES}.")
    return convert(rows, name)


def format_of(rows: Iterable[FactRow]) -> str | None:
    """The format of the first row that has the keys of one; None where none has, as in the project's own."""
    return next((name for row in rows if isinstance(row.data, Mapping) and (name := _format(row.data))), None)


def _format(row: Mapping[Any, Any]) -> str | None:
    if "target" in row and "target_new" not in row:
        return None
    if "requested_rewrite" in row:
        return "mquake" if isinstance(row["requested_rewrite"], list) else "counterfact"
    if {"src", "alt"} <= row.keys():
        return "wikibigedit" if {"personas", "mhop"} & row.keys() else "zsre"
    if {"update", "ans"} <= row.keys():
        return "wikibigedit"
    if {"text", "labels", "concept"} <= row.keys():
        return "knowedit"
    if not {"prompt", "target_new"} <= row.keys():
        return None
    if isinstance(row.get("portability"), Mapping) or isinstance(row.get("locality"), Mapping):
        return "knowedit"
    return "counterfact" if "ground_truth" in row or "case_id" in row else "wikibigedit"


def convert(rows: Iterable[FactRow], name: str) -> Published:
    """Facts of the rows of one format."""
    drafts = _DRAFTS.get(name, _flat)
    facts: dict[tuple[str, str], Fact] = {}
    skipped: list[Skip] = []
    for row in rows:
        if not isinstance(row.data, Mapping):
            skipped.append(Skip(row.place, f"not a mapping but {type(row.data).__name__}"))
            continue
        try:
            stated = list(drafts(row.data))
        except (KeyError, TypeError, AttributeError) as error:
            skipped.append(Skip(row.place, f"not a {name} row: {error}"))
            continue
        if not stated:
            skipped.append(Skip(row.place, "no rewrite in it"))
        for draft in stated:
            fact = _fact(draft, row.place)
            if isinstance(fact, str):
                skipped.append(Skip(row.place, fact))
                continue
            if lost := sum(_text(prompt) is not None and _text(answer) is None for prompt, answer in draft.portability):
                skipped.append(Skip(row.place, f"{lost} portability prompts without an answer; the fact is kept"))
            key = fact.text, fact.target
            facts[key] = _joined(facts[key], fact) if key in facts else fact
    return Published(_with_own_ids(facts.values()), skipped, name)


def _fact(draft: _Draft, place: str) -> Fact | str:
    """The fact, or why it is none."""
    prompt, subject, target = _text(draft.prompt), _text(draft.subject), _text(draft.target)
    if prompt is None or target is None:
        return "no prompt" if prompt is None else "no target"
    if subject is None:
        return "no subject"
    subject = subject.strip()
    if prompt.count("{}") == 1:
        template = prompt.replace("{}", SLOT)
    elif isinstance(found := _find(subject, prompt), str):
        return found
    else:
        template, subject = prompt[: found[0]] + SLOT + prompt[found[1] :], prompt[found[0] : found[1]]
    if template.count(SLOT) != 1:
        return f"the prompt has {SLOT} of its own"
    row = {
        "prompt": template, "subject": subject, "target": target.strip(), "target_true": _text(draft.true), "relation": _text(draft.relation),
        "id": draft.id, "paraphrases": [text.replace("{}", subject) for p in draft.paraphrases if (text := _text(p))],
        "neighbours": _probes(draft.neighbours, without_target=True), "portability": _probes(draft.portability, without_target=False),
    }  # fmt: skip
    return fact_of({key: value for key, value in row.items() if value is not None}, place)


def _find(subject: str, prompt: str) -> tuple[int, int] | str:
    """Where the subject stands in the prompt: whole words before parts of words, in its own capitals before others."""
    literal = re.escape(subject)
    whole = rf"(?<!\w){literal}(?!\w)"
    for pattern, flags in ((whole, 0), (whole, re.IGNORECASE), (literal, 0), (literal, re.IGNORECASE)):
        found = [match.span() for match in re.finditer(pattern, prompt, flags)]
        if len(found) == 1:
            return found[0]
        if found:
            return f"the subject {subject!r} stands {len(found)} times in the prompt"
    return f"the subject {subject!r} is not in the prompt"


def _text(value: Any) -> str | None:
    """The text of a value as benchmarks nest it: a text, a number, {"str": …}, or the first of a list that has one."""
    if isinstance(value, Mapping):
        return _text(value.get("str", value.get("value")))
    if isinstance(value, (list, tuple)):
        return next((text for entry in value if (text := _text(entry)) is not None), None)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def _probes(pairs: Iterable[Pair], without_target: bool) -> list[dict[str, str]]:
    """Prompts with their answers; those without an answer stay where `without_target` allows it."""
    found = []
    for prompt, target in pairs:
        text, answer = _text(prompt), _text(target)
        if text is not None and (answer is not None or without_target):
            found.append({"prompt": text, **({"target": answer.strip()} if answer is not None else {})})
    return found


def _joined(first: Fact, again: Fact) -> Fact:
    """One fact with the prompts of two rows that state it."""

    def both(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys((*a, *b)))

    return replace(
        first, target_true=first.target_true or again.target_true, paraphrases=both(first.paraphrases, again.paraphrases),
        neighbours=both(first.neighbours, again.neighbours), portability=both(first.portability, again.portability))  # fmt: skip


def _with_own_ids(facts: Iterable[Fact]) -> list[Fact]:
    """The facts, with a number behind an id that another one has."""
    found: dict[str, Fact] = {}
    for fact in facts:
        name, number = fact.id, 2
        while name in found:
            name, number = f"{fact.id}-{number}", number + 1
        found[name] = fact if name == fact.id else replace(fact, id=name)
    return list(found.values())


def _id(row: Mapping[str, Any]) -> str | None:
    return _text(row.get("case_id"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _counterfact(row: Mapping[str, Any]) -> Iterator[_Draft]:
    """kmeng01/rome: neighbourhood prompts are about other subjects of the same true object, which is their answer."""
    rewrite = row["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        rewrite = row
    true = rewrite.get("target_true")
    yield _Draft(
        rewrite["prompt"], rewrite.get("subject"), rewrite["target_new"], true, rewrite.get("relation_id"), _id(row),
        [_asked(p)[0] for p in _list(row.get("paraphrase_prompts"))],
        [(prompt, answer if answer is not None else true) for prompt, answer in map(_asked, _list(row.get("neighborhood_prompts")))])  # fmt: skip


def _asked(entry: Any) -> Pair:
    """(prompt, answer or None) of a text or a mapping."""
    if not isinstance(entry, Mapping):
        return entry, None
    return entry.get("prompt"), next((entry[k] for k in ("ground_truth", "target", "answer", "targets") if k in entry), None)


def _flat(row: Mapping[str, Any]) -> Iterator[_Draft]:
    """EasyEdit's rows, which LocFT, KnowEdit and its users follow: one prompt, a rephrased one, locality and portability."""
    if "text" in row and "labels" in row:  # KnowEdit's WikiBio: the sentence that follows a passage
        row = {**row, "prompt": row["text"], "target_new": row["labels"], "subject": row.get("concept")}
    neighbours = [(row.get("locality_prompt"), row.get("locality_ground_truth")), *_grouped(row.get("locality"))]
    if isinstance(row.get("locality_prompt"), list):
        neighbours[:1] = zip(row["locality_prompt"], _list(row.get("locality_ground_truth")), strict=False)
    portability = [*_grouped(row.get("portability")), *_multi_hop(row)]
    yield _Draft(
        row["prompt"], row.get("subject"), row["target_new"], row.get("ground_truth"), None, _id(row),
        [*_list(row.get("rephrase_prompt")), *_list(row.get("rephrase")), *_list(row.get("personas"))], neighbours, portability)  # fmt: skip


def _grouped(value: Any) -> Iterator[Pair]:
    """KnowEdit: {"Reasoning": [{"prompt", "ground_truth"}], …}; EasyEdit also keeps lists of prompts beside lists of answers."""
    if isinstance(value, list):
        yield from map(_asked, value)
    for group in value.values() if isinstance(value, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("prompt"), list):
            yield from zip(group["prompt"], _list(group.get("ground_truth")), strict=False)
        else:
            yield from map(_asked, _list(group))


def _multi_hop(row: Mapping[str, Any]) -> Iterator[Pair]:
    """WikiBigEdit: a question that needs the fact and another one."""
    if row.get("mhop") is not None:
        yield row["mhop"], row.get("mhop_ans", row.get("mhop_answer"))


def _zsre(row: Mapping[str, Any]) -> Iterator[_Draft]:
    """MEND's zsRE: `alt` is the target, `answers` what is true, `loc` an unrelated question; all texts as published."""
    yield _Draft(
        row["src"], row.get("subject"), row["alt"], row.get("answers"), None, _id(row),
        [*_list(row.get("rephrase")), *_list(row.get("personas"))], [(row.get("loc"), row.get("loc_ans"))], list(_multi_hop(row)))  # fmt: skip


def _wikibigedit(row: Mapping[str, Any]) -> Iterator[_Draft]:
    """WikiBigEdit with its own column names, MEND's, or LocFT's."""
    if "src" in row:
        return _zsre(row)
    if "update" not in row:
        return _flat(row)
    neighbours = [(row.get("loc"), row.get("loc_ans"))]
    return iter([_Draft(
        row["update"], row.get("subject"), row["ans"], None, None, _id(row),
        [*_list(row.get("rephrase")), *_list(row.get("personas"))], neighbours, list(_multi_hop(row)))])  # fmt: skip


def _mquake(row: Mapping[str, Any]) -> Iterator[_Draft]:
    """MQuAKE-CF: every rewrite of a case is a fact. The case's questions are portability of each; hops that no rewrite changes
    are their neighbours, with the published answer."""
    rewrites = [rewrite for rewrite in row["requested_rewrite"] if isinstance(rewrite, Mapping)]
    asked = {rewrite.get("question") for rewrite in rewrites}
    asked |= {str(rewrite.get("prompt")).replace("{}", str(rewrite.get("subject"))) for rewrite in rewrites}
    hops = [hop for hop in _list(row.get("new_single_hops")) if isinstance(hop, Mapping)]
    kept = [(hop.get("cloze") or hop.get("question"), hop.get("answer")) for hop in hops
            if hop.get("question") not in asked and hop.get("cloze") not in asked]  # fmt: skip
    case = _id(row)
    for number, rewrite in enumerate(rewrites, 1):
        name = case if case is None or len(rewrites) == 1 else f"{case}-{number}"
        yield _Draft(
            rewrite.get("prompt"), rewrite.get("subject"), rewrite.get("target_new"), rewrite.get("target_true"),
            rewrite.get("relation_id"), name, _list(rewrite.get("question")), kept,
            [(question, row.get("new_answer")) for question in _list(row.get("questions"))])  # fmt: skip


_DRAFTS: dict[str, Callable[[Mapping[str, Any]], Iterator[_Draft]]] = {
    "counterfact": lambda row: _counterfact(row) if "requested_rewrite" in row else _flat(row),
    "zsre": _zsre,
    "knowedit": _flat,
    "mquake": _mquake,
    "wikibigedit": _wikibigedit,
}
