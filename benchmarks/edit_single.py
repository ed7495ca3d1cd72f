"""Parts of `edit_methods.py` that edit a live model: each fact alone, and efficacy against unchanged neighbors over strengths."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edit_answers import Questions, share
from edit_setup import edited, live_context

from workbench.errors import WorkbenchError
from workbench.facts.facts import Fact, write_facts
from workbench.files import json_digest, read_json, write_json
from workbench.recipe.methods import method
from workbench.steps import Edit, EditMethod, MethodContext

LAMBDAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
KINDS = ("efficacy", "paraphrase", "neighbours")


def singles(
    project: Path,
    facts: Sequence[Fact],
    steps: Mapping[str, Mapping[str, Any]],
    chosen: Iterable[str],
    places: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the scores of facts that are each edited alone on the base, at the layers of the row's joint edit.

    What is done is kept in single.json: no fact is solved twice by one step.
    """
    context = live_context(project)
    questions = Questions(context, facts)
    file = project / "single.json"
    done: dict[str, Any] = read_json(file) or {}
    rows: dict[str, Any] = {}
    for row in (name for name in steps if name in set(chosen)):
        step = {**steps[row], "facts": "single.jsonl", **_place(places, row)}
        step_digest = json_digest([step, sorted(context.digests.items())])
        keys = [json_digest([step_digest, fact.document()]) for fact in facts]
        for number, key in enumerate(keys):
            if key not in done:
                done[key] = _alone(questions.of(range(number, number + 1)), step)
                write_json(file, done)
            if number % 10 == 9:
                print(f"  {row}, each fact alone: {number + 1}/{len(keys)}", flush=True)
        rows[row] = {"step": step, "facts": len(facts), "seconds": round(sum(done[key]["seconds"] for key in keys), 1)}
        rows[row]["scores"] = dict(_over(questions, [done[key] for key in keys]))
        rows[row]["failed"] = sum("error" in done[key] for key in keys)
        print(f"  {row}, each alone: {rows[row]['scores']}", flush=True)
    return {"rows": rows, "before": questions.shares(questions.answers())}


def _place(places: Sequence[Mapping[str, Any]], row: str) -> dict[str, Any]:
    """Return the layers of a row of the joint run, and its position if there is only one."""
    row_of = next((p for p in places if p["row"] == row and "error" not in p), {})
    fields: dict[str, Any] = {"layers": row_of["layers"]} if "layers" in row_of else {}
    positions = set(row_of.get("positions", {}).values())
    return {**fields, **({"position": positions.pop()} if len(positions) == 1 else {})}


def _alone(questions: Questions, step: Mapping[str, Any]) -> dict[str, Any]:
    """Solve one fact, score it and undo the edit."""
    started = time.process_time()
    context = questions.context
    write_facts(context.project / "single.jsonl", questions.facts)
    try:
        edit = solve(context, step)
    except WorkbenchError as error:
        return {"error": error.message, "seconds": time.process_time() - started, **questions.answers(KINDS)}
    seconds = time.process_time() - started
    with edited(context, questions.parts, edit):
        return {"seconds": seconds, **questions.answers(KINDS)}


def solve(context: MethodContext, step: Mapping[str, Any]) -> Edit:
    """Solve an edit step that is given as plain data."""
    edit_step = method(EditMethod, str(step["edit"])).model_validate(step)
    return edit_step.solve(context)


def _over(questions: Questions, single: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, float]]]:
    for kind in KINDS:
        right = [(number, bool(good)) for number, one in enumerate(single) for good in one.get(kind, ())]
        if right:
            yield kind, share([good for _, good in right], [number for number, _ in right])


def curve(
    project: Path, facts: Sequence[Fact], others: Sequence[Fact], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Score the facts and their neighbors over MEMIT's λ, and with prompts of other facts preserved, by MEMIT and ROME.

    Without refining, so that every point has the same values: one linear solve each. A point is one solve for all facts.
    """
    context = live_context(project)
    questions = Questions(context, facts)
    write_facts(project / "curve.jsonl", list(facts))
    (project / "preserve.jsonl").write_text("".join(_prompt(fact) for fact in others), "utf-8")
    points: list[tuple[str, dict[str, Any]]] = [("memit", {"lambda": lam}) for lam in LAMBDAS]
    points += [("memit", {"preserve": "preserve.jsonl"}), ("rome", {}), ("rome", {"preserve": "preserve.jsonl"})]
    results: list[dict[str, Any]] = [{"row": "base", "fields": {}, "scores": questions.shares(questions.answers(KINDS))}]
    for row, fields in points:
        place = _place(rows, row)
        if "layers" not in place:
            continue
        step = {"edit": row, "facts": "curve.jsonl", "unconverged": "skip", "refine": 0, **place, **fields}
        with edited(context, questions.parts, solve(context, step)):
            results.append(
                {
                    "row": row,
                    "fields": fields,
                    "preserved": len(others) if "preserve" in fields else 0,
                    "scores": questions.shares(questions.answers(KINDS)),
                }
            )
        print(f"  {row} {fields}: {results[-1]['scores']}", flush=True)
    return results


def _prompt(fact: Fact) -> str:
    return json.dumps({"prompt": fact.prompt, "subject": fact.subject}, ensure_ascii=False) + "\n"


def held_out(facts: Sequence[Fact], everything: Iterable[Fact], count: int) -> list[Fact]:
    """Return facts of other subjects that are no neighbor prompts: prompts to preserve that are not scored."""
    subjects = {fact.subject for fact in facts}
    scored = {probe.prompt for fact in facts for probe in fact.neighbours}
    return [f for f in everything if f.subject not in subjects and f.text not in scored][:count]
