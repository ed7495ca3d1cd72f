"""Commands `suite ls|show|check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli._options import JsonOpt
from workbench.cli._output import out
from workbench.errors import GateFailedError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show and check suites of evaluation tasks.")
NameArg = Annotated[str, typer.Argument(help="Suite: NAME for evals/suites/NAME.yaml, or a file.", show_default=False)]
BaseOpt = Annotated[
    str | None,
    typer.Option("--base", help="Model (directory or hub id) whose tokenizer is used; default: the starter base, if it exists."),
]


@app.command("ls")
def list_(json: JsonOpt = False) -> None:
    """List the suites in evals/suites."""
    from workbench.cli.documents.suites import SuiteRow
    from workbench.evaluate.suitecheck import list_suites

    suites = list(list_suites(_project()))

    def text() -> None:
        if not suites:
            out.say("no suites in evals/suites; `workbench recipe new NAME --project DIR` creates a project folder")
            return
        out.table(
            ["suite", "tasks", "description"],
            [[s["suite"], str(len(s["tasks"])), s["error"] or s["description"]] for s in suites],
            right=(1,),
        )

    out.result(lambda: [SuiteRow.model_validate(suite) for suite in suites], text, json=json)


@app.command()
def show(name: NameArg, base: BaseOpt = None, json: JsonOpt = False) -> None:
    """Show a suite's tasks, metrics, items, clusters and plan.

    Loads no model.
    """
    from workbench.cli.documents.suites import SuiteDocument
    from workbench.evaluate.suitecheck import show_suite

    out.quiet = json
    document = show_suite(name, _project(), base)
    out.result(lambda: SuiteDocument.model_validate(document), lambda: _print(document), json=json)


def _print(document: Mapping[str, Any]) -> None:
    """Print a suite: its tasks as a table, its contrasts, its settings and its plan."""
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
        out.say("plan unknown: name the model whose tokenizer is used with --base DIR")


def _chance(facts: Mapping[str, Any]) -> str:
    """Return the score of guessing as text, or a dash if it is unknown."""
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
        int | None, typer.Option("--limit", min=1, help="Check at most N items per task; clusters are counted over all items.")
    ] = None,
    json: JsonOpt = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print three prompts of each task.")] = False,
) -> None:
    """Check a suite's data, prompts and scoring.

    Correct answers must get the full score. Exits with 3 if a check fails.
    """
    from workbench.cli.documents.suites import SuiteCheckDocument
    from workbench.evaluate.suitecheck import check_suite

    report = check_suite(name, _project(), base, limit)

    def text() -> None:
        marks = {"ok": "ok", "warning": "warning", "failed": "FAILED"}
        out.table(["task", "check", "", "found"], [[c.task, c.check, marks[c.status], c.found] for c in report.checks])
        for warning in (c for c in report.checks if c.status == "warning"):
            out.warn(f"{warning.task}, {warning.check}: {warning.hint}")
        for task, examples in report.examples.items() if verbose else ():
            for example in examples:
                out.line(f"--- {task} {example['id']}\n{example['prompt']}")
                out.line(f"choices: {example['choices']}" if example["choices"] is not None else f"target: {example['target']!r}")

    out.result(lambda: SuiteCheckDocument.model_validate(report.document()), text, json=json)
    if report.failed:
        first = report.failed[0]
        more = f" (and {len(report.failed) - 1} more)" if len(report.failed) > 1 else ""
        raise GateFailedError(f"suite {report.suite}: {first.task}, {first.check}: {first.found}{more}", first.hint)


def _project() -> Path:
    from workbench.project import find_project

    return find_project(Path.cwd() / "here")
