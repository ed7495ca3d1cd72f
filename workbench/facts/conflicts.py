"""Conflicts between facts, found from their texts without a model, and published facts without those that contradict others."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from workbench.facts.facts import SLOT, Fact, Probe, folded, name_key
from workbench.facts.published import Published, Skip, read_all
from workbench.facts.questions import (
    Conflict,
    changing,
    distinct,
    edited_prompts,
    inverses,
    keys_of,
    place_of,
    probe_conflicts,
    single_keys_of,
    statement,
    wordings,
)
from workbench.ground.errors import WorkbenchError
from workbench.ground.results import JsonObject

LONG = 200
"""Characters of a target up to which one value a fact is taken to be enough. AnyEdit (Jiang et al. 2025, arXiv 2502.05628) finds it too
little for long answers, and edits them in pieces of 50 tokens, which are about 200 characters of English."""


LONG_REPAIR = "Teach it with `edit: finetune`, or keep it beside the model with `edit: memory`; no method shortens it."


def conflicts(facts: Sequence[Fact]) -> list[Conflict]:
    """Return all conflicts, kind by kind."""
    return [
        *contradictions(facts),
        *duplicates(facts),
        *reverse_conflicts(facts),
        *composite_conflicts(facts),
        *probe_conflicts(facts),
    ]


def require_consistent(facts: Sequence[Fact]) -> None:
    """Check that no two facts contradict each other.

    Raises:
        WorkbenchError: If there are contradictions; the message shows the first three.
    """
    if pairs := contradictions(facts):
        remainder = f" (and {len(pairs) - 3} more)" if len(pairs) > 3 else ""
        raise WorkbenchError(
            "\n".join(f"{c.place}: {c.what}" for c in pairs[:3]) + remainder,
            f"{pairs[0].repair} `workbench facts check` lists all.",
        )


def contradictions(facts: Iterable[Fact]) -> list[Conflict]:
    """Return each fact that asks the same question as an earlier one but has another target.

    Two facts ask the same question if their prompts with the subject filled in are equal, if the prompt of one is a paraphrase of the
    other, or if subject and relation are equal. Relations with a single value are recognized in several wordings (see `relations`).
    Case, white space, final punctuation and a leading "the" of subjects and targets are ignored.
    """
    return [
        Conflict(
            "contradiction",
            "failed",
            fact,
            first,
            f"answers {question or fact.text!r} with {fact.target!r}, and {place_of(first, fact)}"
            + ("" if question else f" {first.text!r}")
            + f" with {first.target!r}",
            f"Keep one: delete this line or {place_of(first, fact)}. If both are right, add the target of the one to `aliases` of the other.",
        )
        for fact, first, same_target, question in _repeated(facts)
        if not same_target
    ]


def duplicates(facts: Iterable[Fact]) -> list[Conflict]:
    """Return each fact that asks the same question as an earlier one and has the same target."""
    return [
        Conflict(
            "duplicate",
            "warning",
            fact,
            first,
            f"answers {fact.text!r} with {fact.target!r}, as {place_of(first, fact)} does"
            + ("" if question else " in other words"),
            "Delete this line." if question else "Delete this line, and add its prompt to the other fact's paraphrases.",
        )
        for fact, first, same_target, question in _repeated(facts)
        if same_target
    ]


def _repeated(facts: Iterable[Fact]) -> Iterator[tuple[Fact, Fact, bool, str | None]]:
    """Yield (fact, earlier fact with the same question, whether their targets are equal, the prompt that both have, if any).

    There is at most one pair with equal targets and one with different targets for each fact.
    """
    texts: dict[str, dict[str, Fact]] = defaultdict(dict)
    paraphrases: dict[str, dict[str, Fact]] = defaultdict(dict)
    relations: dict[tuple[str, str], dict[str, Fact]] = defaultdict(dict)
    for fact in facts:
        target = name_key(fact.target)
        relation_keys = [] if fact.subject is None else [(name_key(fact.subject), key) for key in single_keys_of(fact)]
        earlier: list[tuple[str | None, tuple[str, Fact]]] = [
            (fact.text, entry) for index in (texts, paraphrases) for entry in index.get(folded(fact.text), {}).items()
        ]
        earlier += [(text, entry) for text in fact.paraphrases for entry in texts.get(folded(text), {}).items()]
        earlier += [(None, entry) for key in relation_keys for entry in relations.get(key, {}).items()]
        for same_target in (True, False):
            pairs = [(fact, first, same_target, text) for text, (answer, first) in earlier if (answer == target) is same_target]
            yield from pairs[:1]
        texts[folded(fact.text)].setdefault(target, fact)
        for text in fact.paraphrases:
            paraphrases[folded(text)].setdefault(target, fact)
        for key in relation_keys:
            relations[key].setdefault(target, fact)


def reverse_conflicts(facts: Sequence[Fact]) -> list[Conflict]:
    """Return pairs of facts A -r→ B and B -inverse of r→ C in which C is not A.

    Inverse relations come from the table in `relations` and from the facts themselves: two relations are inverse if at least two pairs
    of facts agree with that, and more agree than disagree. A pair is only a warning if the inverse may have several values.
    """
    inverse_relations, by_subject, order = _inverses_of(facts), _by_subject(facts), _file_order(facts)
    pairs = []
    for fact in facts:
        if fact.subject is None:
            continue
        is_certain = {inverse: certain for key in keys_of(fact) for inverse, certain in inverse_relations.get(key, {}).items()}
        answers = [
            (reverse, [is_certain[key] for key in keys_of(reverse) if key in is_certain])
            for reverse in by_subject.get(name_key(fact.target), ())
        ]
        answers = [(reverse, certain) for reverse, certain in answers if certain and reverse is not fact]
        if any(name_key(reverse.target) == name_key(fact.subject) for reverse, _ in answers):
            continue
        for reverse, certain in answers:
            first, later = sorted((fact, reverse), key=order)
            pairs.append(
                Conflict(
                    "reverse",
                    "failed" if any(certain) else "warning",
                    later,
                    first,
                    f"{statement(later)} and {place_of(first, later)} {statement(first)} do not agree: their relations are inverse to each other",
                    f"Give {place_of(reverse, later)} the target {fact.subject!r}, or delete one of the two"
                    + ("." if any(certain) else ", unless both hold."),
                )
            )
    return pairs


def _inverses_of(facts: Sequence[Fact]) -> dict[str, dict[str, bool]]:
    """Map each relation to its inverses, from the table and from the facts, and to whether an inverse has only one value."""
    relations, by_subject = inverses(), _by_subject(facts)
    agreeing: Counter[tuple[str, str]] = Counter()
    disagreeing: Counter[tuple[str, str]] = Counter()
    shared: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in facts:
        if fact.subject is None:
            continue
        relation = keys_of(fact)[0]
        shared[relation, name_key(fact.target)].add(name_key(fact.subject))
        for next_fact in by_subject.get(name_key(fact.target), ()):
            agree = name_key(next_fact.target) == name_key(fact.subject)
            (agreeing if agree else disagreeing)[relation, keys_of(next_fact)[0]] += next_fact is not fact
    several = Counter(relation for (relation, _), subjects in shared.items() if len(subjects) > 1)
    for (relation, inverse), count in agreeing.items():
        pairs = count // 2 if relation == inverse else count  # each pair of a symmetric relation is counted twice
        if pairs >= 2 and count > disagreeing[relation, inverse]:
            relations.setdefault(relation, {}).setdefault(inverse, several[relation] < 2)
    return relations


def composite_conflicts(facts: Sequence[Fact]) -> list[Conflict]:
    """Return facts and portability prompts that contradict what follows from two facts A -r→ B and B -s→ C.

    A prompt asks for s of r of A if it is a wording of s whose slot holds a description that names A ("The capital of the country that A
    is from is"). A relation t is s of r if the facts show it: at least three agree with that, and twice as many as disagree.
    """
    by_subject, prompts, compositions, order = _by_subject(facts), wordings(facts), _compositions(facts), _file_order(facts)
    result: list[Conflict] = []
    for first in facts:
        if first.subject is None:
            continue
        subject, words = name_key(first.subject), _words(first)
        chain = [
            (fact, [text for key in keys_of(fact) for text in prompts.get(key, ())])
            for fact in by_subject.get(name_key(first.target), ())
            if fact is not first
        ]
        for probe in first.portability if chain else ():
            seconds = [second for second, texts in chain if _description_in(folded(probe.prompt), subject, texts)]
            result += _composites(order, first, seconds, first, probe.prompt, probe.target or "")
        for third in by_subject[subject] if chain else ():
            seconds = []
            for second, texts in chain:
                description = _description_in(folded(third.text), subject, texts) or ""
                ruled = (keys_of(first)[0], keys_of(second)[0], keys_of(third)[0]) in compositions
                seconds += [second] if ruled or words & _stems(description) else []
            result += _composites(order, first, seconds, third, third.text, third.target) if third is not first else []
    return distinct(result)


def _composites(
    order: Callable[[Fact], int], first: Fact, seconds: Sequence[Fact], third: Fact, prompt: str, target: str
) -> Iterator[Conflict]:
    """Yield the conflict of an answer with what follows from `first` and `seconds`, unless one of them agrees with the answer."""
    if any(folded(second.target) == folded(target) for second in seconds):
        return
    answer_place = "a portability prompt here" if third is first else "this fact"
    for second in seconds[:1]:
        premises = sorted({id(fact): fact for fact in (first, second) if fact is not third}.values(), key=order)
        premise_text = " and ".join(f"{place_of(fact, third)} {statement(fact)}" for fact in premises)
        yield Conflict(
            "composite",
            "failed",
            third,
            second,
            f"{answer_place} answers {prompt!r} with {target!r}; from {premise_text} follows {second.target!r}",
            f"Give it the answer {second.target!r}, or change {place_of(second, third)}.",
        )


def _compositions(facts: Sequence[Fact]) -> set[tuple[str, str, str]]:
    """Return the triples (r, s, t) for which the facts show that t is s of r."""
    by_subject = _by_subject(facts)
    agreeing: Counter[tuple[str, str, str]] = Counter()
    disagreeing: Counter[tuple[str, str, str]] = Counter()
    for first in facts:
        if first.subject is None:
            continue
        for second in by_subject.get(name_key(first.target), ()):
            for third in by_subject[name_key(first.subject)]:
                if first is not second and third is not first and third is not second:
                    rule = keys_of(first)[0], keys_of(second)[0], keys_of(third)[0]
                    if rule[2] not in rule[:2]:
                        (agreeing if name_key(third.target) == name_key(second.target) else disagreeing)[rule] += 1
    return {rule for rule, count in agreeing.items() if count >= 3 and count >= 2 * disagreeing[rule]}


def _description_in(text: str, subject: str, prompts: Sequence[str]) -> str | None:
    """Return the content of a wording's slot in a text if it is a description that names the subject, but not the subject itself."""
    subject_pattern = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)")
    if any(text == wording.replace(SLOT, subject) for wording in prompts):
        return None
    for wording in prompts:
        before, _, after = wording.partition(SLOT)
        description = text.removeprefix(before).removesuffix(after)
        if len(text) == len(before) + len(description) + len(after) and subject_pattern.search(description):
            return description
    return None


def _by_subject(facts: Iterable[Fact]) -> dict[str, list[Fact]]:
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        if fact.subject is not None:
            groups[name_key(fact.subject)].append(fact)
    return groups


def _file_order(facts: Sequence[Fact]) -> Callable[[Fact], int]:
    """Return a function from a fact to its position in the file."""
    number = {id(fact): i for i, fact in enumerate(facts)}
    return lambda fact: number[id(fact)]


_SMALL = frozenset({"the", "a", "an", "of", "is", "in", "at", "by", "to", "that", "which", "who", "what", "whose", "was", "are", "and", "for", "name"})  # fmt: skip


def _words(fact: Fact) -> set[str]:
    """Return the stems of the words in a fact's prompts, without its subject."""
    subject = folded(fact.subject or "")
    return {stem for text in (fact.text, *fact.paraphrases, fact.relation) for stem in _stems(folded(text).replace(subject, " "))}


def _stems(text: str) -> set[str]:
    """Return the first five letters of each word except small words, so that "citizen" and "citizenship" are equal."""
    return {word[:5] for word in re.findall(r"\w+", text) if word not in _SMALL}


class ImportedFacts(JsonObject):
    """Conversion of a published facts dataset."""

    format: str
    """Format of the file."""
    facts: int
    """Number of facts."""
    out: str | None
    """File that was written; null without `--out`."""
    skipped: list[Skip]
    """Rows that were skipped."""


def import_facts(path: Path, label: str, limit: int | None = None, neighbours: int = 0) -> Published:
    """Read the facts of a file; a fact that contradicts an earlier one is skipped.

    Args:
        path: A published file, or one in the project's own format.
        label: The file's name in messages.
        limit: Largest number of facts, from the start of the file.
        neighbours: Number of neighbours to reach by adding some from the file's other facts; see `rebuild_neighbours`.

    Raises:
        WorkbenchError: If the file is invalid; see `read_all`.
    """
    read = read_all(path, label)
    # As in `read_facts`, the first of the facts with one prompt and target counts.
    distinct = list({(fact.text, fact.target): fact for fact in reversed(read.facts)}.values())[::-1]
    facts, skipped = consistent(distinct)
    if limit is not None and limit < len(facts):
        facts, skipped = consistent(distinct[: distinct.index(facts[limit - 1]) + 1])
    if neighbours:
        facts = rebuild_neighbours(facts, read.facts, neighbours)
    facts, changed = without_edited_neighbours(facts)
    return Published(facts, [*read.skipped, *skipped, *changed], read.format)


def consistent(facts: Sequence[Fact]) -> tuple[list[Fact], list[Skip]]:
    """Split facts into those without a contradiction to an earlier remaining fact, and the skipped ones."""
    remaining, skipped = list(facts), []
    while pairs := contradictions(remaining):
        # Skip a fact only if the earlier fact of its pair remains; the other pairs are checked again in the next round.
        later = {id(conflict.fact) for conflict in pairs}
        final = [conflict for conflict in pairs if id(conflict.other) not in later]
        skipped += [Skip(place=conflict.place, reason=f"contradiction: {conflict.what}") for conflict in final]
        remaining = [fact for fact in remaining if id(fact) not in {id(conflict.fact) for conflict in final}]
    return remaining, skipped


def without_edited_neighbours(facts: Sequence[Fact]) -> tuple[list[Fact], list[Skip]]:
    """Remove prompts whose answers must not change, but one of the facts changes them: they would count as damage.

    Returns:
        The facts, and a skipped part for each removed prompt.
    """
    edits, kept, skipped = edited_prompts(facts), [], []
    for fact in facts:
        removed = {probe: edit for probe in (*fact.neighbours, *fact.same_subject) for edit in changing(probe, edits)[:1]}
        neighbours, others = (tuple(p for p in probes if p not in removed) for probes in (fact.neighbours, fact.same_subject))
        kept.append(replace(fact, neighbours=neighbours, same_subject=others) if removed else fact)
        skipped += [Skip(place=fact.place, reason=_edited(probe, edit, fact)) for probe, edit in removed.items()]
    return kept, skipped


def _edited(probe: Probe, edit: Fact, fact: Fact) -> str:
    """Return the reason for removing a neighbour; the answers of several hops may rely on it."""
    reason = f"the neighbour {probe.prompt!r} was skipped, because {place_of(edit, fact)} edits its answer to {edit.target!r}"
    return (
        f"{reason}; portability prompts may rely on the answer {probe.target!r}" if fact.portability and probe.target else reason
    )


def rebuild_neighbours(facts: Sequence[Fact], source: Iterable[Fact], count: int) -> list[Fact]:
    """Add neighbours as in CounterFact: prompts for the same relation of other subjects with the same true answer.

    Meng et al. 2022 (ROME, arXiv 2202.05262, section 3.4) define these neighbourhood prompts. Here they come from other rows of the file
    instead of Wikidata.

    Args:
        facts: The facts that will be edited.
        source: Facts that provide the other subjects. Subjects that `facts` edit in the same relation are not used.
        count: Number of neighbours of a fact up to which some are added; own neighbours are never removed.
    """
    edited = {(fact.relation, fact.subject) for fact in facts}
    candidates: dict[tuple[str, str | None], list[Probe]] = {}
    for fact in source:
        if fact.target_true is not None and fact.subject is not None and (fact.relation, fact.subject) not in edited:
            candidates.setdefault((fact.relation, fact.target_true), []).append(Probe(fact.text, fact.target_true))
    extended = []
    for fact in facts:
        matching = candidates.get((fact.relation, fact.target_true), [])
        probes = tuple(dict.fromkeys((*fact.neighbours, *matching)))
        extended.append(replace(fact, neighbours=probes[: max(count, len(fact.neighbours))]))
    return extended
