"""Commands `suite ls|show|check|new` and `scores export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.console.options import DeviceOpt, JsonOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import GateFailedError, UsageError, nearest, shell

if TYPE_CHECKING:
    from workbench.suites.check import ShownSuite, ShownTask, SuiteReport

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, check and create suites of evaluation tasks.")
NameArg = Annotated[str, typer.Argument(help="Suite: NAME for evals/suites/NAME.yaml, or a file.", show_default=False)]
BaseOpt = Annotated[
    str | None,
    typer.Option("--base", help="Model (directory or hub id) whose tokenizer is used; default: the starter base, if it exists."),
]


@app.command("ls")
def list_(json: JsonOpt = False) -> None:
    """List the suites in evals/suites."""
    from workbench.suites.check import list_suites

    suites = list(list_suites(_project()))

    def text() -> None:
        if not suites:
            out.say("no suites in evals/suites; `workbench recipe new NAME --project DIR` creates a project folder")
            return
        out.table(
            ["suite", "tasks", "description"],
            [[s.suite, str(len(s.tasks)), s.error or s.description] for s in suites],
            right=(1,),
        )

    out.result(lambda: suites, text, json=json)


@app.command()
@reads_recipes
def show(name: NameArg, base: BaseOpt = None, json: JsonOpt = False) -> None:
    """Show a suite's tasks, metrics, items, clusters and plan.

    Loads no model.
    """
    from workbench.suites.check import show_suite

    out.quiet = json
    shown = show_suite(name, _project(), base)
    out.result(lambda: shown, lambda: _print(shown), json=json)


def _print(shown: ShownSuite) -> None:
    """Print a suite: its tasks as a table, its contrasts, its settings and its plan."""
    from workbench.scores.suite import Suite

    suite = Suite.model_validate(shown.suite)
    out.line(f"{suite.suite}: {suite.description}" if suite.description else suite.suite)
    rows = []
    for task, facts in shown.tasks.items():
        others = ", ".join(m for m in facts.metrics if m != facts.primary)
        rows.append(
            [
                task,
                facts.kind,
                str(facts.n),
                f"{facts.clusters} by {facts.cluster}",
                facts.primary,
                others,
                _chance(facts),
                facts.role,
                facts.owner or "",
            ]
        )
    out.table(["task", "kind", "items", "clusters", "primary", "also", "chance", "role", "owner"], rows, right=(2, 6))
    for name, contrast in suite.contrasts.items():
        out.line(f"contrast {name}: {contrast.of} minus {contrast.minus}, item by item")
    effect = suite.min_effect
    effects = ", ".join(f"{task} {value:g}" for task, value in effect.items()) if isinstance(effect, dict) else f"{effect:g}"
    out.line(
        f"baseline {suite.baseline}, alpha {suite.alpha:g}, smallest effect {effects}, "
        f"{'chat template' if suite.chat_template else 'plain prompts'}, "
        f"few-shot examples: {suite.num_fewshot if suite.num_fewshot is not None else 'as each task says'}"
    )
    if suite.system_instruction:
        out.line(f"system instruction: {suite.system_instruction}")
    if suite.gen_kwargs:
        out.line("generation: " + ", ".join(f"{name} {value}" for name, value in suite.gen_kwargs.items()))
    if shown.plan:
        out.line(
            f"plan {shown.plan[:12]}: batch size {shown.batch_size}, {shown.dtype}, scorer {shown.scorer}"
            + (f", tokenizer {shown.tokenizer[:12]}" if shown.tokenizer else "")
        )
    else:
        out.say("plan unknown: name the model whose tokenizer is used with --base DIR")


def _chance(facts: ShownTask) -> str:
    """Return the score of guessing as text, or a dash if it is unknown."""
    from workbench.facts.facts import ACCURACIES
    from workbench.scores.suite import metric_of

    if facts.chance is not None:
        return f"{facts.chance:g}"
    return "1/choices" if metric_of(facts.primary) in ACCURACIES else "–"


@app.command()
@reads_recipes
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
    from workbench.suites.check import check_suite

    report = check_suite(name, _project(), base, limit)

    def text() -> None:
        _print_checks(report)
        for task, examples in report.examples.items() if verbose else ():
            for example in examples:
                out.line(f"--- {task} {example.id}\n{example.prompt}")
                out.line(f"choices: {example.choices}" if example.choices is not None else f"target: {example.target!r}")

    out.result(lambda: report, text, json=json, warnings=report.warned)
    _refuse_failed(report)


def _print_checks(report: SuiteReport) -> None:
    """Print the checks of a suite as a table."""
    marks = {"ok": "ok", "warning": "warning", "failed": "FAILED"}
    out.table(["task", "check", "", "found"], [[c.task, c.check, marks[c.status], c.found] for c in report.checks])


def _refuse_failed(report: SuiteReport) -> None:
    """Raise GateFailedError if a check of a suite failed."""
    if report.failed:
        first = report.failed[0]
        more = f" (and {len(report.failed) - 1} more)" if len(report.failed) > 1 else ""
        raise GateFailedError(f"suite {report.suite}: {first.task}, {first.check}: {first.found}{more}", first.hint)


@app.command()
@reads_recipes
def new(
    name: Annotated[str, typer.Argument(help="Name of the suite and of its task.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", help="File of items, one JSON object a line.", show_default=False)],
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="choice: `choices` and the right one as `answer`; exact: `answer` as the model has to write it; "
            "text: `text` to be predicted, without questions.",
            show_default=False,
        ),
    ],
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="FIELD",
            help="Field that says which items belong together (template, passage); default: `cluster`, if the rows have it.",
        ),
    ] = None,
    role: Annotated[str, typer.Option("--role", help="skill; retention or guarded: must not get worse; other.")] = "skill",
    base: BaseOpt = None,
    drop: Annotated[bool, typer.Option("--drop-duplicates", help="Keep the first row of those with the same question.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of a suite of this name.")] = False,
    json: JsonOpt = False,
) -> None:
    """Create a suite from a file of items, and check it.

    Writes evals/suites/NAME.yaml, evals/tasks/NAME.yaml and evals/tasks/data/NAME.jsonl. A row has `prompt`, or `question`, which
    becomes "Question: …" and "Answer:". Bad rows are named with file and line before anything is written. Exits with 3 if a check of
    the new suite fails.
    """
    from workbench.ground.project import relative
    from workbench.suites.check import check_suite, find_base
    from workbench.suites.new import KINDS, ROLES, CreatedSuite, new_suite, next_steps

    if kind not in KINDS:
        raise UsageError(f"--kind {kind}: expected {', '.join(KINDS)}. {nearest(kind, KINDS)}")
    if role not in ROLES:
        raise UsageError(f"--role {role}: expected {', '.join(ROLES)}. {nearest(role, ROLES)}")
    project = _project()
    find_base(base, project)  # the check needs one, so without it nothing is written
    flags = ["force"] * force + ["drop"] * drop
    made = new_suite(name, data, kind, project, cluster=cluster, role=role, flags=flags)  # type: ignore[arg-type]
    report = check_suite(name, project, base)
    files = [str(relative(Path(file))) for file in made.files]

    def text() -> None:
        for file in files:
            out.line(file)
        chance = "" if made.chance is None else f", chance {made.chance:.3g}"
        dropped = f", {made.dropped} duplicates dropped" if made.dropped else ""
        out.say(f"{made.items} items in {made.clusters} clusters by '{made.cluster}'{chance}{dropped}")
        _print_checks(report)
        for line in next_steps(made):
            out.say(line)

    out.result(lambda: CreatedSuite(**{**dict(made), "files": files, "check": report}), text, json=json, warnings=report.warned)
    _refuse_failed(report)


def _project() -> Path:
    from workbench.ground.project import find_project

    return find_project()


@reads_recipes
def export(
    tasks: Annotated[
        list[str], typer.Argument(help="Names of lm-eval tasks, or facts:FILE for the tasks of a facts file.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("-o", "--out", help="Folder to write task files to.")] = Path("evals/tasks"),
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with more task definitions, as for lm_eval.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", min=0, help="Few-shot examples per prompt, stored with the task; default: the task's own number."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="For facts: model whose answers to neighbours' prompts should stay the same, and whose tokenizer counts tokens.",
        ),
    ] = None,
    device: DeviceOpt = "auto",
) -> None:
    """Export tasks with their documents as local files.

    The JSONL and YAML files build the same requests without the hub.
    """
    from workbench.suites.export import export_task

    for task in tasks:
        if task.startswith("facts:"):
            _export_facts(task, to, base, device)
            continue
        done = export_task(task, to, include_path=include_path, num_fewshot=num_fewshot)
        for path in done.files:
            out.line(str(path))
        out.say(
            f"{task}: {done.documents} documents, {done.requests} requests as in the original"
            + (f"; few-shot pool of {done.shots}" if done.shots else "")
        )
        if not done.clusters:
            out.say(
                f"its documents have no cluster field: write `cluster: {{{task}: id}}` in the suite, or add a field that names each item's cluster"
            )


def _export_facts(name: str, to: Path, base: str | None, device: str) -> None:
    """Export the tasks that `eval --suite facts:FILE` scores, for plain lm_eval."""
    from workbench.evaluate.facts.suite import export_facts
    from workbench.evaluate.facts.wanted import PREFIX, wanted
    from workbench.ground.project import find_project
    from workbench.models.identity import pick_device
    from workbench.recipe.fields import FactsEval
    from workbench.run.opened import resolve_model

    if base is None:
        raise UsageError(f"{name}: --base is missing", f"workbench scores export {shell(name)} --base DIR -o {shell(to)}")
    project = find_project()
    facts = wanted(FactsEval(facts=name.removeprefix(PREFIX)), project)
    resolved = resolve_model(base, project).resolved
    for path in export_facts(facts, resolved, to, pick_device(device), out.event):
        out.line(str(path))
    out.say(
        f"score: lm_eval --model hf --model_args pretrained=MODEL,logits_cache=False,softmax_dtype=float32 --include_path {shell(to)} "
        f"--tasks {','.join(sorted(p.stem for p in to.glob(f'{facts.stem}-*.yaml')))}"
    )
