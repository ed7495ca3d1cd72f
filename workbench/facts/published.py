"""Facts files: the project's own format and published editing benchmarks; question sets here, the others by `benchmarks`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.facts.benchmarks import (
    Draft,
    Pair,
    SkippedRowError,
    counterfact,
    flat,
    list_of,
    mquake,
    prompt_and_answer,
    ripple,
    text_of,
    wikibigedit,
    zsre,
)
from workbench.facts.facts import ACTION, EXPECTED, SLOT, Fact, FactRow, fact_of, folded, has_action, read_rows
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.foreign_names import benchmark_of
from workbench.ground.recognize import expecting
from workbench.ground.results import JsonObject


def qaedit(row: Mapping[str, object]) -> Iterator[Draft]:
    """Convert a row of QAEdit (Yang et al. 2025, arXiv 2502.11177): a question, its answer, and unrelated questions."""
    yield Draft(
        row["prompt"],
        row.get("subject"),
        row["target"],
        id=text_of(row.get("id")),
        paraphrases=list_of(row.get("rephrase")),
        neighbours=[prompt_and_answer(entry) for entry in list_of(row.get("locality"))],
    )


def unstructured(row: Mapping[str, object]) -> Iterator[Draft]:
    """Convert a row of UnKEBench (Deng et al. 2024, arXiv 2405.15349) or EditEverything (Jiang et al. 2025, arXiv 2502.05628).

    The answer is a text of several sentences, and the question names no subject apart. UnKEBench's questions on parts of the answer
    are portability prompts.
    """
    questions, answers = list_of(row.get("sub_question")), list_of(row.get("sub_answer"))
    missing = len(questions) - len(answers)
    yield Draft(
        row["question"],
        None,
        row["answer"],
        id=text_of(row.get("id")),
        paraphrases=list_of(row.get("para_question")),
        portability=[] if missing else list(zip(questions, answers, strict=True)),
        names_subject=False,
        notes=[f"{len(questions)} sub-questions have {len(answers)} answers, so they were skipped; the fact is kept"]
        if missing
        else [],
    )


class Skip(JsonObject):
    """A row, or a part of one, that was not converted."""

    place: str
    """Location of the row, as file:line."""
    reason: str
    """Reason for skipping it."""


@dataclass(frozen=True)
class Published:
    """The content of a facts file.

    Attributes:
        facts: The facts in the file's order; rows with the same prompt and target are one fact with the test prompts of all.
        skipped: Rows and parts of rows that were skipped.
        format: counterfact, zsre, knowedit, mquake, wikibigedit, rippleedits, qaedit, unke or editeverything; "facts" for the
            project's own format.
    """

    facts: list[Fact]
    skipped: list[Skip]
    format: str


def format_of(rows: Iterable[FactRow]) -> str | None:
    """Return the published format of the rows, by the keys of the first row that fits one; None if no row does."""
    return next((name for row in rows if isinstance(row.data, Mapping) and (name := benchmark_of(row.data))), None)


def convert(rows: Iterable[FactRow], name: str) -> Published:
    """Convert the rows of one published format to facts."""
    drafts = _DRAFTS.get(name, flat)
    facts: dict[tuple[str, str], Fact] = {}
    skipped: list[Skip] = []
    for row in rows:
        if not isinstance(row.data, Mapping):
            skipped.append(Skip(place=row.place, reason=f"expected a mapping, found {type(row.data).__name__}"))
            continue
        try:
            stated = list(drafts(row.data))
        except SkippedRowError as error:
            skipped.append(Skip(place=row.place, reason=str(error)))
            continue
        except (KeyError, TypeError, AttributeError) as error:
            skipped.append(Skip(place=row.place, reason=f"not a {name} row: {error}"))
            continue
        if not stated:
            skipped.append(Skip(place=row.place, reason="the row has no rewrite"))
        for draft in stated:
            fact = _fact(draft, row.place)
            if isinstance(fact, str):
                skipped.append(Skip(place=row.place, reason=fact))
                continue
            if count := sum(text_of(prompt) is not None and text_of(answer) is None for prompt, answer in draft.portability):
                skipped.append(
                    Skip(place=row.place, reason=f"{count} portability prompts without an answer were skipped; the fact is kept")
                )
            skipped += [Skip(place=row.place, reason=note) for note in draft.notes]
            key = fact.text, fact.target
            facts[key] = merged(facts[key], fact) if key in facts else fact
    return Published(_with_own_ids(facts.values()), skipped, name)


def _fact(draft: Draft, place: str) -> Fact | str:
    """Return the fact, or the reason for skipping it."""
    prompt, subject, target = text_of(draft.prompt), text_of(draft.subject), text_of(draft.target)
    if prompt is None or target is None:
        return "no prompt" if prompt is None else "no target"
    if subject is None and draft.names_subject:
        return "no subject"
    if subject is None:
        has_slot = any(SLOT in (text_of(text) or "") for text in (prompt, *draft.paraphrases))
        return f"a question has {SLOT}, but there is no subject" if has_slot else _checked(draft, prompt, None, target, place)
    subject = subject.strip()
    if prompt.count("{}") == 1:
        template = prompt.replace("{}", SLOT)
    elif isinstance(span := _locate_subject(subject, prompt), str):
        return span
    else:
        template, subject = prompt[: span[0]] + SLOT + prompt[span[1] :], prompt[span[0] : span[1]]
    if template.count(SLOT) != 1:
        return f"the prompt already has {SLOT}"
    return _checked(draft, template, subject, target, place)


def _checked(draft: Draft, template: str, subject: str | None, target: str, place: str) -> Fact:
    """Return the fact with its test prompts; every text is checked as in the project's own format."""
    row = {
        "prompt": template,
        "subject": subject,
        "target": target.strip(),
        "target_true": text_of(draft.true),
        "relation": text_of(draft.relation),
        "id": draft.id,
        "paraphrases": [text.replace("{}", subject or "{}") for p in draft.paraphrases if (text := text_of(p))],
        "neighbours": _probes(draft.neighbours, without_target=True),
        "same_subject": _probes(draft.same_subject, without_target=True),
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


def _aliases(draft: Draft) -> list[str]:
    """Return the target's other wordings: further texts of a list of targets, and the row's aliases; not the true answer's wordings."""
    others = draft.target if isinstance(draft.target, (list, tuple)) else ()
    true = {folded(text) for entry in list_of(draft.true) if (text := text_of(entry))}
    texts = [text.strip() for entry in (*others, *draft.aliases) if (text := text_of(entry))]
    return [text for text in texts if folded(text) not in true]


def _probes(pairs: Iterable[Pair], without_target: bool) -> list[dict[str, str]]:
    """Return prompts with their answers; prompts without an answer are kept only with `without_target`."""
    probes = []
    for prompt, target in pairs:
        text, answer = text_of(prompt), text_of(target)
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
        same_subject=union(first.same_subject, repeated.same_subject),
        translations=union(first.translations, repeated.translations),
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


_DRAFTS: dict[str, Callable[[Mapping[str, object]], Iterator[Draft]]] = {
    "counterfact": lambda row: counterfact(row) if "requested_rewrite" in row else flat(row),
    "zsre": zsre,
    "knowedit": flat,
    "mquake": mquake,
    "wikibigedit": wikibigedit,
    "rippleedits": ripple,
    "qaedit": qaedit,
    "unke": unstructured,
    "editeverything": unstructured,
}


def read_facts(path: Path, label: str) -> list[Fact]:
    """Read the facts of a file, in order; a repeated fact counts once.

    Args:
        path: A file with one JSON object per line, a YAML list of mappings, or a published benchmark (see `published`). Rows of a
            benchmark without a usable fact are skipped.
        label: The file's name in messages.

    Raises:
        WorkbenchError: If the file is missing or not JSON or YAML; if a field is missing, empty or (in the project's own format)
            unknown; if a subject is not in its prompt exactly once; if a prompt has two targets; if two facts have the same id; or if
            there are no facts. The message names file and line.
    """
    read = read_all(path, label)
    facts: dict[str, Fact] = {}
    ids: dict[str, Fact] = {}
    for fact in read.facts:
        first = facts.get(fact.text)
        if first is not None and first.target != fact.target:
            is_published = read.format != "facts"
            raise WorkbenchError(
                f"{fact.place}: same prompt as {first.place}, but another target ({fact.target!r} instead of {first.target!r})",
                f"`workbench facts import {shell(label)} -o FILE.jsonl` skips the later row."
                if is_published
                else "Keep one target per prompt, or edit with `mode: {sequential: {batch: N}}`, where a later row updates the fact.",
            )
        if first is not None:
            continue
        if fact.id in ids:
            raise WorkbenchError(f"{fact.place}: same id '{fact.id}' as {ids[fact.id].place}", "Give every fact its own id.")
        ids[fact.id] = facts[fact.text] = fact
    return list(facts.values())


def read_all(path: Path, label: str) -> Published:
    """Read every fact of a file, including those that contradict or repeat another one, for checks and conversion.

    Args:
        path: The file; see `read_facts`.
        label: The file's name in messages.

    Raises:
        WorkbenchError: As in `read_facts`, except for errors that concern two facts.
    """
    read = _read(path, label)
    if read.facts:
        return read
    if read.skipped:
        first = read.skipped[0]
        raise WorkbenchError(
            f"{label}: no facts; {len(read.skipped)} rows skipped, first {first.place}: {first.reason}",
            f"Its rows were read as {read.format}: `workbench facts import {shell(label)} -o FILE.jsonl` lists every reason.",
        )
    raise WorkbenchError(
        f"{label}: no facts", 'Add lines such as {"prompt": "The capital of Atlantis is", "target": "Poseidonis"}'
    )


def _read(path: Path, label: str) -> Published:
    """Read every fact of a file in the project's own format or a published one."""
    with expecting(path, "a file of facts", "facts", "benchmark", *(["array"] if path.suffix == ".json" else [])):
        return _converted(read_rows(path, label, EXPECTED))


def _converted(rows: list[FactRow]) -> Published:
    """Return the facts of rows in the project's own format or a published one."""
    name = format_of(rows)
    for row in rows:
        if has_action(row) and not name:
            raise WorkbenchError(
                f"{row.place}: '{ACTION}' changes an earlier fact, but this file is not read in order here",
                "Edit steps with `mode: {sequential: {batch: N}}` and `workbench facts check --stream` read a file in order.",
            )
    return convert(rows, name) if name else Published([fact_of(row.data, row.place) for row in rows], [], "facts")
