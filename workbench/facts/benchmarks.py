"""Conversion of the rows of CounterFact, zsRE, KnowEdit and WikiBigEdit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from workbench.facts.drafts import Draft, Pair, list_of, prompt_and_answer, text_of


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
