"""Command `scores items`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Annotated, Any, Literal

import typer

from workbench.api.comparing import find_scores
from workbench.api.subjects import Request
from workbench.api.variation import Variation
from workbench.cli._options import BatchOpt, JsonOpt, LimitOpt, RunsOpt, SetOpt, SuiteOpt
from workbench.cli._output import out
from workbench.cli._subjects import printing, refuse_left_out
from workbench.errors import UsageError, nearest

Item = Mapping[str, Any]
SHOWN = 20
"""Items that are printed by default; `--json` prints all."""
LONGEST = 600
"""Characters of a prompt or answer that are printed; `--json` prints all."""
_WAYS = {"won": ("won", "green"), "lost": ("lost", "red"), "same": ("same score", "")}


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
        Literal["changed", "won", "lost", "all"],
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
    from workbench.cli.documents.items import ItemsDocument
    from workbench.compare.beside import beside, counted

    if len(dict.fromkeys(names)) not in (1, 2) or len(names) > 2:
        raise UsageError(f"expected one or two configurations, found {len(names)}", "workbench scores items FIRST SECOND")
    if len(names) == 2 and names[0] == names[1]:
        raise UsageError(f"{names[0]} is named twice", "Name two configurations, or one to see it beside the baseline.")
    request = Request(names, Variation.of(settings, None, None), suite or (), runs_dir, True, batch_size, limit)
    found = find_scores(request, None, printing())
    if len(names) == 2 and found.pair is None:
        refuse_left_out(found.left_out)
        raise UsageError(f"{names[0]} and {names[1]} are one configuration", "Name two configurations.")
    before, after = found.pair or (found.baseline or found.suite_baseline, found.named[-1])
    every = beside(found.store, found.scores, before, after)
    known = list(dict.fromkeys(item["task"] for item in every))
    for name in task or ():
        if name not in known:
            raise UsageError(f"--task {name}: no items of this task were scored", nearest(name, known))
    asked = [item for item in every if not task or item["task"] in task]
    chosen = [item for item in asked if _wanted(item, only) and _holds(item, text)]
    shown = chosen[: first or (len(chosen) if json else SHOWN)]
    counts = counted(asked)
    head = {"first": before, "second": after, "items": len(asked), **counts}

    def printed() -> None:
        out.heading(f"{after} beside {before}")
        out.line(f"{len(asked)} items: {counts['won']} won, {counts['lost']} lost, {counts['same']} with the same score")
        for item in shown:
            _print(item, before, after)
        if len(shown) < len(chosen):
            out.say(f"{len(chosen) - len(shown)} more items: --first {len(chosen)}")
        elif not chosen:
            out.say("no such item" + ("" if only == "all" else "; --only all shows those without a difference too"))

    out.result(lambda: ItemsDocument.model_validate({**head, "shown": [_row(item) for item in shown]}), printed, json=json)
    refuse_left_out(found.left_out)


def _wanted(item: Item, only: str) -> bool:
    return bool(only == "all" or item["change"] == only or (only == "changed" and item["differs"]))


def _holds(item: Item, text: str | None) -> bool:
    """Return True if a text occurs in an item's prompt, choices, right answer or answers; upper and lower case are the same."""
    if not text:
        return True
    parts = [item["prompt"], item["gold"], *(item["choices"] or ()), item["first"]["response"], item["second"]["response"]]
    return any(text.lower() in str(part).lower() for part in parts if part is not None)


def _row(item: Item) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != "differs"}


def _print(item: Item, before: str, after: str) -> None:
    """Print one item: how it changed, the prompt, the right answer and both answers."""
    word, style = _WAYS[item["change"]]
    out.line("")
    out.colored([(word, style), (f"  {item['task']}  {item['id']}  {item['metric']}", "bold")])
    width = max(len("right answer"), len(before), len(after))
    _field("prompt", str(item["prompt"]), width)
    _field("right answer", _right(item), width)
    for name, answer in ((before, item["first"]), (after, item["second"])):
        _field(name, _said(item, answer), width)


def _field(name: str, text: str, width: int) -> None:
    """Print a text beside its name, in lines of the terminal's width."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"
    room = max(20, min(out.width, 120) - width - 4)
    lines = [line for part in cut.splitlines() or [""] for line in wrap(part, room, drop_whitespace=False) or [""]]
    for number, line in enumerate(lines):
        out.line(f"  {name if number == 0 else '':<{width}}  {line}".rstrip())


def _right(item: Item) -> str:
    """Return the right answer: a text, or the right choices."""
    choices, gold = item["choices"], item["gold"]
    if not choices:
        return str(gold)
    right: Sequence[Any] = gold if isinstance(gold, list) else [gold]
    return " | ".join(str(choices[g]) if isinstance(g, int) and 0 <= g < len(choices) else str(g) for g in right)


def _said(item: Item, answer: Item) -> str:
    """Return an answer with its score: the generated text, the chosen choice, or log-likelihoods."""
    score = answer["score"]
    shown = "–" if score is None else "/".join(f"{x:g}" for x in score) if isinstance(score, list) else f"{score:g}"
    if answer["response"] is not None:
        return f"[{shown}] {answer['response'] or '(empty)'}"
    if answer["picked"] is not None:
        return f"[{shown}] {item['choices'][answer['picked']]}"
    logs = answer["loglikelihoods"]
    return f"[{shown}]" + (f" log-likelihood {', '.join(f'{x:.4g}' for x in logs)}" if logs else "")
