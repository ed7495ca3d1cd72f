"""Published sets of questions and answers: QAEdit, UnKEBench and AnyEdit's EditEverything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from workbench.facts.drafts import Draft, list_of, prompt_and_answer, text_of


def question_set_of(row: Mapping[Any, Any]) -> str | None:
    """Return "qaedit", "unke" or "editeverything" for a row with the keys of one, else None."""
    if {"prompt", "target", "rephrase", "locality"} <= row.keys():
        return "qaedit"
    if not {"question", "answer"} <= row.keys():
        return None
    if row.keys() & {"para_question", "sub_question"}:
        return "unke"
    return "editeverything" if "category" in row else None


def qaedit(row: Mapping[str, Any]) -> Iterator[Draft]:
    """Convert a row of QAEdit (Yang et al. 2025, arXiv 2502.11177): a question, its answer, and unrelated questions."""
    yield Draft(
        row["prompt"],
        row.get("subject"),
        row["target"],
        id=text_of(row.get("id")),
        paraphrases=list_of(row.get("rephrase")),
        neighbours=[prompt_and_answer(entry) for entry in list_of(row.get("locality"))],
    )


def unstructured(row: Mapping[str, Any]) -> Iterator[Draft]:
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
