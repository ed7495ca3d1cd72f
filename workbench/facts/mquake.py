"""MQuAKE (Zhong et al. 2023, arXiv 2305.14795): chains of facts, of which some are edited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from workbench.facts.drafts import Draft, Pair, list_of, mappings_of, text_of
from workbench.facts.facts import folded


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
