"""`scores ls|import|export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt, RunsOpt
from workbench.cli._output import out
from workbench.cli._recipes import relative
from workbench.errors import WorkbenchError, shell, size

if TYPE_CHECKING:
    from workbench.scores.store import ScoreStore

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Stored scores: list them, import lm-eval's, export tasks.")


@app.command("ls")
def list_(runs_dir: RunsOpt = None, json: JsonOpt = False) -> None:
    """List what is scored: one line a suite and plan."""
    from workbench.scores.imported import stored_plans

    store = _store(runs_dir)
    found = stored_plans(store)
    if json:
        out.json(found)
        return
    if not found:
        out.say(
            f"no scores in {relative(store.root)}; `workbench eval RECIPE` makes some, `workbench scores import FILE...` takes lm-eval's"
        )
        return
    rows = []
    for plan in found:
        names = [c["name"] for c in plan["configurations"]]
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        marks = [
            *(["partial"] if plan["partial"] else []),
            *(["imported"] if plan["imported"] else []),
            *([f"{plan['unfinished']} unfinished"] if plan["unfinished"] else []),
        ]
        rows.append(
            [
                plan["suite"],
                plan["plan"][:12],
                shown or "none",
                plan["created"][:10],
                plan["scorer"],
                ", ".join(marks),
                size(plan["bytes"]),
            ]
        )
    out.table(["suite", "plan", "configurations", "date", "scorer", "marks", "size"], rows, right=(6,))


@app.command("import")
def import_(
    files: Annotated[
        list[Path], typer.Argument(help="lm-eval's samples_TASK_DATE.jsonl files, or folders of them.", show_default=False)
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name of the configuration; default: the folder's.")] = None,
    suite: Annotated[str, typer.Option("--suite", help="Suite to keep the scores under.")] = "imported",
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            help="Field of the documents that says which items belong together; default: `cluster` where all have it, else every item alone.",
        ),
    ] = None,
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Keep what `lm_eval --log_samples` has written, one configuration a folder, so that runs can be compared item by item."""
    from workbench.scores.imported import import_samples

    out.quiet = quiet or json
    store = _store(runs_dir)
    found = import_samples(files, store, name=name, suite=suite, cluster=cluster)
    if json:
        out.json(
            [
                {
                    "suite": f.scores.suite,
                    "plan": f.scores.plan,
                    "name": f.scores.configuration.name,
                    "digest": f.scores.configuration.digest,
                    "new": f.new,
                    "tasks": {t: r.n for t, r in f.scores.tasks.items()},
                }
                for f in found
            ]
        )
        return
    for one in found:
        for note in one.notes:
            out.warn(note)
        tasks = ", ".join(f"{task} (n={t.n})" for task, t in one.scores.tasks.items())
        out.line(
            f"{one.scores.configuration.name}: {tasks}, suite {suite}, plan {one.scores.plan[:12]}"
            + ("" if one.new else ", held already")
        )
    names = [s.configuration.name for s in store.list(found[-1].plan)]
    if len(names) > 1:
        out.say(f"compare: workbench compare {shell(*names, '--suite', suite)}")
    else:
        out.say("nothing to compare it with yet: import another run on the same documents and prompts")


@app.command()
def export(
    tasks: Annotated[
        list[str], typer.Argument(help="Names of lm-eval tasks, or facts:FILE for the tasks of some facts.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("-o", "--out", help="Folder of task files to write into.")] = Path("evals/tasks"),
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with more task definitions, as lm_eval takes it.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", min=0, help="Examples before each prompt, kept with the task; default: the task's own number."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="Of facts: the model whose answers to neighbours' prompts are to be kept, and whose tokenizer counts tokens.",
        ),
    ] = None,
    device: DeviceOpt = "auto",
) -> None:
    """Write tasks with their documents as local files that need no hub: JSON lines and YAML that build the same requests."""
    from workbench.evaluate.export import export_task

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
                f"its documents name no cluster: in a suite write `cluster: {{{task}: id}}`, or add the field that says which items belong together"
            )


def _export_facts(name: str, to: Path, base: str | None, device: str) -> None:
    """The tasks that `eval --suite facts:FILE` scores, for plain lm_eval."""
    from workbench.evaluate.facts import PREFIX, export_facts, wanted
    from workbench.models.device import pick_device
    from workbench.project import find_project
    from workbench.recipe.eval_fields import FactsEval
    from workbench.run.opened import resolve_model

    if base is None:
        raise WorkbenchError(f"{name}: --base is missing", f"workbench scores export {shell(name)} --base DIR -o {shell(to)}", 2)
    project = find_project(Path.cwd() / "here")
    facts = wanted(FactsEval(facts=name.removeprefix(PREFIX)), project)
    _, resolved = resolve_model(base, project)
    for path in export_facts(facts, resolved, to, pick_device(device), out.event):
        out.line(str(path))
    out.say(
        f"score: lm_eval --model hf --model_args pretrained=MODEL,logits_cache=False,softmax_dtype=float32 --include_path {shell(to)} "
        f"--tasks {','.join(sorted(p.stem for p in to.glob(f'{facts.stem}-*.yaml')))}"
    )


def _store(runs_dir: Path | None) -> ScoreStore:
    from workbench.project import find_project
    from workbench.scores.store import ScoreStore

    return ScoreStore((runs_dir or relative(find_project(Path.cwd() / "here") / "runs")) / "scores")
