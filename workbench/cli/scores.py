"""Commands `scores ls|items`."""

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
from workbench.console.options import BatchOpt, JsonOpt, LimitOpt, RunsOpt, SetOpt, SuiteOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import size
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


def _store(runs_dir: Path | None) -> ScoreStore:
    from workbench.scores.store import ScoreStore

    return ScoreStore(runs_folder(runs_dir) / "scores")
