"""Conversion of published editing benchmarks to facts: CounterFact, zsRE, KnowEdit, MQuAKE, WikiBigEdit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.facts.facts import SLOT, Fact, fact_of, folded
from workbench.facts.rows import FactRow, read_rows

NAMES = "CounterFact, zsRE, KnowEdit, MQuAKE-CF and WikiBigEdit"
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Skip:
    """A skipped row or part of a row: its place (file:line, or the number of the row) and the reason."""

    place: str
    reason: str


@dataclass(frozen=True)
class Published:
    """The content of a facts file.

    Attributes:
        facts: The facts in the file's order; rows with the same prompt and target are one fact with the test prompts of all.
        skipped: Rows and parts of rows that were skipped.
        format: counterfact, zsre, knowedit, mquake or wikibigedit; "facts" for the project's own format.
    """

    facts: list[Fact]
    skipped: list[Skip]
    format: str


@dataclass(frozen=True)
class _Draft:
    """A fact as a published row states it, with unchecked values, before its subject is located in the prompt."""

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


def read_published(path: Path, label: str) -> Published:
    """Read the facts of a published file.

    Args:
        path: A JSON list of objects, or one object per line.
        label: The file's name in messages and places.

    Raises:
        WorkbenchError: If the file is invalid (see `read_rows`) or its format is unknown.
    """
    rows = read_rows(path, label, "A JSON list of objects.")
    name = format_of(rows)
    if name is None:
        keys = next((", ".join(map(str, row.data)) for row in rows if isinstance(row.data, Mapping)), "no objects")
        raise WorkbenchError(f"{label}: no published format has these keys: {keys}", f"Known: {NAMES}.")
    return convert(rows, name)


def format_of(rows: Iterable[FactRow]) -> str | None:
    """Return the published format of the rows, by the keys of the first row that fits one; None if no row does."""
    return next((name for row in rows if isinstance(row.data, Mapping) and (name := _format_of_row(row.data))), None)


def _format_of_row(row: Mapping[Any, Any]) -> str | None:
    """Return the name of the published format of a row; None for the project's own format, or an unknown one."""
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
    """Convert the rows of one published format to facts."""
    drafts = _DRAFTS.get(name, _flat)
    facts: dict[tuple[str, str], Fact] = {}
    skipped: list[Skip] = []
    for row in rows:
        if not isinstance(row.data, Mapping):
            skipped.append(Skip(row.place, f"expected a mapping, found {type(row.data).__name__}"))
            continue
        try:
            stated = list(drafts(row.data))
        except (KeyError, TypeError, AttributeError) as error:
            skipped.append(Skip(row.place, f"not a {name} row: {error}"))
            continue
        if not stated:
            skipped.append(Skip(row.place, "the row has no rewrite"))
        for draft in stated:
            fact = _fact(draft, row.place)
            if isinstance(fact, str):
                skipped.append(Skip(row.place, fact))
                continue
            if count := sum(_text(prompt) is not None and _text(answer) is None for prompt, answer in draft.portability):
                skipped.append(Skip(row.place, f"{count} portability prompts without an answer were skipped; the fact is kept"))
            key = fact.text, fact.target
            facts[key] = merged(facts[key], fact) if key in facts else fact
    return Published(_with_own_ids(facts.values()), skipped, name)


def _fact(draft: _Draft, place: str) -> Fact | str:
    """Return the fact, or the reason for skipping it."""
    prompt, subject, target = _text(draft.prompt), _text(draft.subject), _text(draft.target)
    if prompt is None or target is None:
        return "no prompt" if prompt is None else "no target"
    if subject is None:
        return "no subject"
    subject = subject.strip()
    if prompt.count("{}") == 1:
        template = prompt.replace("{}", SLOT)
    elif isinstance(span := _locate_subject(subject, prompt), str):
        return span
    else:
        template, subject = prompt[: span[0]] + SLOT + prompt[span[1] :], prompt[span[0] : span[1]]
    if template.count(SLOT) != 1:
        return f"the prompt already has {SLOT}"
    row = {
        "prompt": template,
        "subject": subject,
        "target": target.strip(),
        "target_true": _text(draft.true),
        "relation": _text(draft.relation),
        "id": draft.id,
        "paraphrases": [text.replace("{}", subject) for p in draft.paraphrases if (text := _text(p))],
        "neighbours": _probes(draft.neighbours, without_target=True),
        "portability": _probes(draft.portability, without_target=False),
        "aliases": _aliases(draft),
    }
    return fact_of({key: value for key, value in row.items() if value is not None}, place)


def _locate_subject(subject: str, prompt: str) -> tuple[int, int] | str:
    """Locate the subject in the prompt, or return the reason for skipping the fact.

    Whole words are preferred to parts of words, and the subject's own case to another one.
    """
    literal = re.escape(subject)
    whole_word = rf"(?<!\w){literal}(?!\w)"
    for pattern, flags in ((whole_word, 0), (whole_word, re.IGNORECASE), (literal, 0), (literal, re.IGNORECASE)):
        spans = [match.span() for match in re.finditer(pattern, prompt, flags)]
        if len(spans) == 1:
            return spans[0]
        if spans:
            return f"the subject {subject!r} occurs {len(spans)} times in the prompt"
    return f"the subject {subject!r} is not in the prompt"


def _text(value: Any) -> str | None:
    """Return the text of a nested value: a text, a number, {"str": …}, or the first text of a list."""
    if isinstance(value, Mapping):
        return _text(value.get("str", value.get("value")))
    if isinstance(value, (list, tuple)):
        return next((text for entry in value if (text := _text(entry)) is not None), None)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def _aliases(draft: _Draft) -> list[str]:
    """Return the target's other wordings: further texts of a list of targets, and the row's aliases; not the true answer's wordings."""
    others = draft.target if isinstance(draft.target, (list, tuple)) else ()
    true = {folded(text) for entry in _list(draft.true) if (text := _text(entry))}
    texts = [text.strip() for entry in (*others, *draft.aliases) if (text := _text(entry))]
    return [text for text in texts if folded(text) not in true]


def _probes(pairs: Iterable[Pair], without_target: bool) -> list[dict[str, str]]:
    """Return prompts with their answers; prompts without an answer are kept only with `without_target`."""
    probes = []
    for prompt, target in pairs:
        text, answer = _text(prompt), _text(target)
        if text is not None and (answer is not None or without_target):
            probes.append({"prompt": text, **({"target": answer.strip()} if answer is not None else {})})
    return probes


def merged(first: Fact, repeated: Fact) -> Fact:
    """Return one fact with the test prompts of two rows that state it."""

    def union(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys((*a, *b)))

    return replace(
        first,
        target_true=first.target_true or repeated.target_true,
        paraphrases=union(first.paraphrases, repeated.paraphrases),
        neighbours=union(first.neighbours, repeated.neighbours),
        portability=union(first.portability, repeated.portability),
        aliases=union(first.aliases, repeated.aliases),
    )


def _with_own_ids(facts: Iterable[Fact]) -> list[Fact]:
    """Make ids unique by adding a number to those that another fact has."""
    by_id: dict[str, Fact] = {}
    for fact in facts:
        name, number = fact.id, 2
        while name in by_id:
            name, number = f"{fact.id}-{number}", number + 1
        by_id[name] = fact if name == fact.id else replace(fact, id=name)
    return list(by_id.values())


def _id(row: Mapping[str, Any]) -> str | None:
    return _text(row.get("case_id"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _counterfact(row: Mapping[str, Any]) -> Iterator[_Draft]:
    """Convert a row of kmeng01/rome. Its neighbourhood prompts are about other subjects with the same true object, which is the answer."""
    rewrite = row["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        rewrite = row
    true_object = rewrite.get("target_true")
    yield _Draft(
        rewrite["prompt"],
        rewrite.get("subject"),
        rewrite["target_new"],
        true_object,
        rewrite.get("relation_id"),
        _id(row),
        [_prompt_and_answer(p)[0] for p in _list(row.get("paraphrase_prompts"))],
        [
            (prompt, answer if answer is not None else true_object)
            for prompt, answer in map(_prompt_and_answer, _list(row.get("neighborhood_prompts")))
        ],
    )


def _prompt_and_answer(entry: Any) -> Pair:
    """Return (prompt, answer or None) from a text or a mapping."""
    if not isinstance(entry, Mapping):
        return entry, None
    return entry.get("prompt"), next((entry[k] for k in ("ground_truth", "target", "answer", "targets") if k in entry), None)


def _flat(row: Mapping[str, Any]) -> Iterator[_Draft]:
    """Convert a row of EasyEdit, LocFT or KnowEdit: a prompt, a rephrased prompt, locality and portability."""
    if "text" in row and "labels" in row:  # KnowEdit's WikiBio: the sentence that follows a passage
        row = {**row, "prompt": row["text"], "target_new": row["labels"], "subject": row.get("concept")}
    neighbours = [(row.get("locality_prompt"), row.get("locality_ground_truth")), *_grouped(row.get("locality"))]
    if isinstance(row.get("locality_prompt"), list):
        neighbours[:1] = zip(row["locality_prompt"], _list(row.get("locality_ground_truth")), strict=False)
    portability = [*_grouped(row.get("portability")), *_multi_hop(row)]
    yield _Draft(
        row["prompt"],
        row.get("subject"),
        row["target_new"],
        row.get("ground_truth"),
        None,
        _id(row),
        [*_list(row.get("rephrase_prompt")), *_list(row.get("rephrase")), *_list(row.get("personas"))],
        neighbours,
        portability,
    )


def _grouped(value: Any) -> Iterator[Pair]:
    """Yield pairs from KnowEdit's groups, {"Reasoning": [{"prompt", "ground_truth"}], …}, or EasyEdit's separate lists of prompts and answers."""
    if isinstance(value, list):
        yield from map(_prompt_and_answer, value)
    for group in value.values() if isinstance(value, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("prompt"), list):
            yield from zip(group["prompt"], _list(group.get("ground_truth")), strict=False)
        else:
            yield from map(_prompt_and_answer, _list(group))


def _multi_hop(row: Mapping[str, Any]) -> Iterator[Pair]:
    """Yield WikiBigEdit's question that needs the fact and another one."""
    if row.get("mhop") is not None:
        yield row["mhop"], row.get("mhop_ans", row.get("mhop_answer"))


def _zsre(row: Mapping[str, Any]) -> Iterator[_Draft]:
    """Convert a row of MEND's zsRE: `alt` is the target, `answers` the truth, `loc` an unrelated question."""
    yield _Draft(
        row["src"],
        row.get("subject"),
        row["alt"],
        row.get("answers"),
        None,
        _id(row),
        [*_list(row.get("rephrase")), *_list(row.get("personas"))],
        [(row.get("loc"), row.get("loc_ans"))],
        list(_multi_hop(row)),
    )


def _wikibigedit(row: Mapping[str, Any]) -> Iterator[_Draft]:
    """Convert a row of WikiBigEdit with its own column names, MEND's or LocFT's."""
    if "src" in row:
        return _zsre(row)
    if "update" not in row:
        return _flat(row)
    neighbours = [(row.get("loc"), row.get("loc_ans"))]
    return iter(
        [
            _Draft(
                row["update"],
                row.get("subject"),
                row["ans"],
                None,
                None,
                _id(row),
                [*_list(row.get("rephrase")), *_list(row.get("personas"))],
                neighbours,
                list(_multi_hop(row)),
            )
        ]
    )


def _mquake(row: Mapping[str, Any]) -> Iterator[_Draft]:
    """Convert a case of MQuAKE-CF: every rewrite is a fact.

    The case's questions are portability prompts of each fact. Hops that no rewrite changes are neighbours, with the published answer.
    """
    rewrites = [rewrite for rewrite in row["requested_rewrite"] if isinstance(rewrite, Mapping)]
    edited_questions = {rewrite.get("question") for rewrite in rewrites}
    edited_questions |= {str(rewrite.get("prompt")).replace("{}", str(rewrite.get("subject"))) for rewrite in rewrites}
    hops = [hop for hop in _list(row.get("new_single_hops")) if isinstance(hop, Mapping)]
    unchanged = [
        (hop.get("cloze") or hop.get("question"), hop.get("answer"))
        for hop in hops
        if hop.get("question") not in edited_questions and hop.get("cloze") not in edited_questions
    ]
    case = _id(row)
    for number, rewrite in enumerate(rewrites, 1):
        name = case if case is None or len(rewrites) == 1 else f"{case}-{number}"
        new = rewrite.get("target_new")
        yield _Draft(
            rewrite.get("prompt"),
            rewrite.get("subject"),
            new,
            rewrite.get("target_true"),
            rewrite.get("relation_id"),
            name,
            _list(rewrite.get("question")),
            unchanged,
            [(question, row.get("new_answer")) for question in _list(row.get("questions"))],
            [
                alias
                for hop in hops
                if hop.get("question") == rewrite.get("question") and folded(str(hop.get("answer"))) == folded(_text(new) or "")
                for alias in _list(hop.get("answer_alias"))
            ],
        )


_DRAFTS: dict[str, Callable[[Mapping[str, Any]], Iterator[_Draft]]] = {
    "counterfact": lambda row: _counterfact(row) if "requested_rewrite" in row else _flat(row),
    "zsre": _zsre,
    "knowedit": _flat,
    "mquake": _mquake,
    "wikibigedit": _wikibigedit,
}
