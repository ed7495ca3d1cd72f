"""`suite ls|show|check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli._options import JsonOpt
from workbench.cli._output import out
from workbench.errors import WorkbenchError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show and check suites.")
NameArg = Annotated[str, typer.Argument(help="A suite of evals/suites, or its file.", show_default=False)]
BaseOpt = Annotated[
    str | None,
    typer.Option("--base", help="Directory or hub id whose tokenizer counts; default: the starter base, where it is there."),
]


@app.command("ls")
def list_(json: JsonOpt = False) -> None:
    """List the suites of evals/suites."""
    from workbench.evaluate.suitecheck import list_suites

    found = list(list_suites(_project()))
    if json:
        out.json(found)
    elif found:
        out.table(
            ["suite", "tasks", "description"],
            [[s["suite"], str(len(s["tasks"])), s["error"] or s["description"]] for s in found],
            right=(1,),
        )
    else:
        out.say("no evals/suites/*.yaml here; `workbench recipe new NAME --project DIR` lays out a project")


@app.command()
def show(name: NameArg, base: BaseOpt = None, json: JsonOpt = False) -> None:
    """Show a suite: tasks, metrics, items, clusters and its plan. Loads no model."""
    from workbench.evaluate.suitecheck import show_suite

    out.quiet = json
    document = show_suite(name, _project(), base)
    if json:
        out.json(document)
        return
    suite = document["suite"]
    out.line(f"{suite['suite']}: {suite['description']}" if suite["description"] else suite["suite"])
    rows = []
    for task, facts in document["tasks"].items():
        others = ", ".join(m for m in facts["metrics"] if m != facts["primary"])
        rows.append(
            [
                task,
                facts["kind"],
                str(facts["n"]),
                f"{facts['clusters']} by {facts['cluster']}",
                facts["primary"],
                others,
                _chance(facts),
                facts["role"],
                facts["owner"] or "",
            ]
        )
    out.table(["task", "kind", "items", "clusters", "primary", "also", "chance", "role", "owner"], rows, right=(2, 6))
    for name, contrast in suite["contrasts"].items():
        out.line(f"contrast {name}: {contrast['of']} minus {contrast['minus']}, item by item")
    effect = suite["min_effect"]
    shown = ", ".join(f"{task} {value:g}" for task, value in effect.items()) if isinstance(effect, dict) else f"{effect:g}"
    out.line(
        f"baseline {suite['baseline']}, alpha {suite['alpha']:g}, smallest effect {shown}, "
        f"{'chat template' if suite['chat_template'] else 'plain prompts'}, "
        f"few-shot examples: {suite['num_fewshot'] if suite['num_fewshot'] is not None else 'as each task says'}"
    )
    if document["plan"]:
        out.line(
            f"plan {document['plan'][:12]}: batch size {document['batch_size']}, {document['dtype']}, tokenizer {document['tokenizer'][:12]}, scorer {document['scorer']}"
        )
    else:
        out.say("plan not known: --base DIR names the tokenizer")


def _chance(facts: Mapping[str, Any]) -> str:
    """Score of guessing, or what it is taken from; a dash where it is not known."""
    from workbench.facts.kinds import ACCURACIES
    from workbench.scores.suite import metric_of

    if facts["chance"] is not None:
        return f"{facts['chance']:g}"
    return "1/choices" if metric_of(facts["primary"]) in ACCURACIES else "–"


@app.command()
def check(
    name: NameArg,
    base: BaseOpt = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Check so many items a task; clusters are counted over all.")
    ] = None,
    json: JsonOpt = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print three prompts of each task.")] = False,
) -> None:
    """Check a suite's data and prompts, and that right answers get full marks. Exit 3 if a check fails."""
    from workbench.evaluate.suitecheck import check_suite

    report = check_suite(name, _project(), base, limit)
    if json:
        out.json(report.document())
    else:
        marks = {"ok": "ok", "warning": "warning", "failed": "FAILED"}
        out.table(["task", "check", "", "found"], [[c.task, c.check, marks[c.status], c.found] for c in report.checks])
        for warning in (c for c in report.checks if c.status == "warning"):
            out.warn(f"{warning.task}, {warning.check}: {warning.hint}")
        for task, examples in report.examples.items() if verbose else ():
            for example in examples:
                out.line(f"--- {task} {example['id']}\n{example['prompt']}")
                out.line(f"choices: {example['choices']}" if example["choices"] is not None else f"target: {example['target']!r}")
    if report.failed:
        first = report.failed[0]
        more = f" (and {len(report.failed) - 1} more)" if len(report.failed) > 1 else ""
        raise WorkbenchError(f"suite {report.suite}: {first.task}, {first.check}: {first.found}{more}", first.hint, 3)


def _project() -> Path:
    from workbench.project import find_project

    return find_project(Path.cwd() / "here")
