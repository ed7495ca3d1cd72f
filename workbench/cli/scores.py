"""Commands `scores ls|export|items`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.api.answers import SHOWN, WAYS, Choice, Only, compared_items, cut, right_answer, scored_answer
from workbench.api.naming import Variation, runs_folder
from workbench.api.subjects import Request, refuse_left_out
from workbench.cli._recipes import printing
from workbench.console.options import BatchOpt, DeviceOpt, JsonOpt, LimitOpt, RunsOpt, SetOpt, SuiteOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import UsageError, shell, size
from workbench.ground.project import relative

if TYPE_CHECKING:
    from workbench.compare.answers import Item
    from workbench.scores.store import ScoreStore, StoredPlan


_STYLES = {"won": "green", "lost": "red", "same": ""}


def items(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Two recipes, models, or runs imported under --suite; if only one is named, it is shown beside the suite's baseline.",
            metavar="FIRST SECOND",
            show_default=False,
        ),
    ],
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="TASK", help="Show items of this task only. Repeatable.")
    ] = None,
    only: Annotated[
        Only,
        typer.Option("--only", help="Items to show: with another score or answer, won or lost by the second, or all."),
    ] = "changed",
    text: Annotated[
        str | None, typer.Option("--text", help="Show items with this text in the prompt, the right answer or an answer only.")
    ] = None,
    first: Annotated[
        int | None, typer.Option("--first", min=1, metavar="N", help="Show at most N items; default: 20, or all with --json.")
    ] = None,
    settings: SetOpt = None,
    suite: SuiteOpt = None,
    batch_size: BatchOpt = 32,
    limit: LimitOpt = None,
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
) -> None:
    """Show stored answers of two configurations side by side, item by item, with generated texts."""
    request = Request(names, Variation.of(settings, None, None), suite or (), runs_dir, True, batch_size, limit)
    found = compared_items(request, Choice(task or (), only, text), printing())
    chosen = found.rows
    shown = chosen[: first or (len(chosen) if json else SHOWN)]

    def printed() -> None:
        out.heading(f"{found.second} beside {found.first}")
        out.line(found.sentence)
        for item in shown:
            _print_item(item, found.first, found.second)
        if len(shown) < len(chosen):
            out.say(f"{len(chosen) - len(shown)} more items: --first {len(chosen)}")
        elif not chosen:
            out.say("no such item" + ("" if only == "all" else "; --only all shows those without a difference too"))

    out.result(lambda: found.document.model_copy(update={"shown": shown}), printed, json=json)
    refuse_left_out(list(found.left_out))


def _print_item(item: Item, before: str, after: str) -> None:
    """Print one item: how it changed, the prompt, the right answer and both answers."""
    word, style = WAYS[item.change], _STYLES[item.change]
    out.line("")
    out.colored([(word, style), (f"  {item.task}  {item.id}  {item.metric}", "bold")])
    width = max(len("right answer"), len(before), len(after))
    _field("prompt", item.prompt or "", width)
    _field("right answer", right_answer(item), width)
    for name, answer in ((before, item.first), (after, item.second)):
        _field(name, scored_answer(item, answer), width)


def _field(name: str, text: str, width: int) -> None:
    """Print a text beside its name, in lines of the terminal's width."""
    room = max(20, min(out.width, 120) - width - 4)
    lines = [line for part in cut(text).splitlines() or [""] for line in wrap(part, room, drop_whitespace=False) or [""]]
    for number, line in enumerate(lines):
        out.line(f"  {name if number == 0 else '':<{width}}  {line}".rstrip())


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List and read stored scores, import lm-eval's, merge those of other machines, and export tasks.",
)
app.command("items")(reads_recipes(items))


@app.command("ls")
def list_(runs_dir: RunsOpt = None, json: JsonOpt = False) -> None:
    """List stored scores, one line per suite and plan."""
    from workbench.scores.store import stored_plans

    store = _store(runs_dir)
    plans = stored_plans(store)

    def text() -> None:
        if plans:
            _print(plans)
        else:
            out.say(
                f"no scores in {relative(store.root)}; `workbench eval RECIPE` scores a recipe, `workbench scores import FILE...` imports lm-eval's"
            )

    out.result(lambda: plans, text, json=json)


def _print(plans: Sequence[StoredPlan]) -> None:
    """Print one row per suite and plan."""
    rows = []
    for plan in plans:
        names = [c.name for c in plan.configurations]
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        marks = [
            *(["outdated"] if plan.outdated else []),
            *(["partial"] if plan.partial else []),
            *(["imported"] if plan.imported else []),
            *([f"{plan.unfinished} unfinished"] if plan.unfinished else []),
        ]
        rows.append(
            [
                plan.suite,
                plan.plan[:12],
                shown or "none",
                plan.created[:10],
                plan.scorer,
                ", ".join(marks),
                size(plan.bytes),
            ]
        )
    out.table(["suite", "plan", "configurations", "date", "scorer", "marks", "size"], rows, right=(6,))
    for plan in plans:
        if plan.outdated:
            out.say(f"outdated: {plan.suite} {plan.plan[:12]}: {plan.outdated}; `workbench eval` scores its recipes again")


@app.command()
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


def _store(runs_dir: Path | None) -> ScoreStore:
    from workbench.scores.store import ScoreStore

    return ScoreStore(runs_folder(runs_dir) / "scores")
