"""Facts as documents of tasks: one list per kind; each document has an `id` and a `cluster` (the fact)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from workbench.facts import Fact, joined
from workbench.facts.kinds import FACT_KINDS, FactKind

Doc = dict[str, Any]
Count = Callable[[str, str], int]
"""Returns the number of tokens of a continuation after a prompt, as lm-eval splits the two."""


def documents(
    facts: Sequence[Fact],
    answers: Mapping[FactKind, Mapping[str, str]],
    passages: Sequence[str],
    count: Count,
    *,
    chat: bool,
) -> dict[FactKind, list[Doc]]:
    """Return the documents of every kind that the facts have prompts for.

    Args:
        facts: The facts.
        answers: Kind -> neighbor's prompt -> the base's continuation, with its leading space. Prompts without an answer are left out.
        passages: Texts of the perplexity task.
        count: Counts tokens of continuations.
        chat: Prompts will be put into a chat template, so that answers begin without a space.
    """

    def after(prompt: str, answer: str) -> str:
        return answer if chat else joined(prompt, answer)

    def teacher_forced(rows: Iterable[tuple[str, str, str, str]]) -> list[Doc]:
        return [
            {"id": name, "cluster": fact, "prompt": prompt, "answer": after(prompt, answer)}
            for name, fact, prompt, answer in rows
        ]

    def preferences(rows: Iterable[tuple[str, str, str, str, str]]) -> list[Doc]:
        docs = []
        for name, fact, prompt, first, second in rows:
            choices = [after(prompt, first), after(prompt, second)]
            tokens = [count(prompt, choice) for choice in choices]
            docs.append({"id": name, "cluster": fact, "prompt": prompt, "choices": choices, "gold": 0, "tokens": tokens})
        return docs

    def generation(rows: Iterable[tuple[Fact, str, str]]) -> list[Doc]:
        return [
            {"id": f.id, "cluster": f.id, "prompt": prompt, "answer": answer}
            | ({"aliases": list(f.aliases)} if answer and f.aliases else {})
            for f, prompt, answer in rows
        ]

    def unchanged(kind: FactKind) -> list[Doc]:
        known = answers.get(kind, {})
        return [
            {"id": name, "cluster": f.id, "prompt": p.prompt, "answer": known[p.prompt]}
            for name, f, p in neighbours
            if p.prompt in known
        ]

    paraphrases = [(f"{f.id}.{i}", f, text) for f in facts for i, text in enumerate(f.paraphrases, 1)]
    neighbours = [(f"{f.id}.{i}", f, probe) for f in facts for i, probe in enumerate(f.neighbours, 1)]
    docs_of: dict[FactKind, list[Doc]] = {
        "efficacy": teacher_forced((f.id, f.id, f.text, f.target) for f in facts),
        "preferred": preferences((f.id, f.id, f.text, f.target, f.target_true) for f in facts if f.target_true),
        "paraphrase": teacher_forced((name, f.id, text, f.target) for name, f, text in paraphrases),
        "preferred-paraphrase": preferences(
            (name, f.id, text, f.target, f.target_true) for name, f, text in paraphrases if f.target_true
        ),
        "neighbours": unchanged("neighbours"),
        "neighbours-right": teacher_forced((name, f.id, p.prompt, p.target) for name, f, p in neighbours if p.target),
        "neighbours-strict": unchanged("neighbours-strict"),
        "preferred-neighbours": preferences((name, f.id, p.prompt, p.target, f.target) for name, f, p in neighbours if p.target),
        "portability": teacher_forced(
            (f"{f.id}.{i}", f.id, p.prompt, p.target) for f in facts for i, p in enumerate(f.portability, 1) if p.target
        ),
        "generated": generation((f, f.text, f.target) for f in facts),
        "generated-paraphrase": generation((f, f.paraphrases[0], f.target) for f in facts if f.paraphrases),
        "entropy": generation((f, f.text, "") for f in facts),
        "text": [{"id": f"{i:04d}", "cluster": f"{i:04d}", "text": text} for i, text in enumerate(passages, 1)],
    }
    return {kind: docs_of[kind] for kind in FACT_KINDS if docs_of[kind]}


def neighbour_prompts(facts: Iterable[Fact]) -> list[str]:
    """Return the prompts whose answers must not change, without duplicates."""
    return list(dict.fromkeys(probe.prompt for fact in facts for probe in fact.neighbours))


def targets(facts: Iterable[Fact]) -> Iterator[tuple[str, str]]:
    """Yield (prompt, target or alias) of the texts that models generate."""
    for fact in facts:
        for answer in (fact.target, *fact.aliases):
            yield fact.text, answer
            if fact.paraphrases:
                yield fact.paraphrases[0], answer
