"""Commands `brick ls` and, of parts, `brick show|fetch|train|extract|bake|advise|barrier|transplant|verify`."""

from __future__ import annotations

from pathlib import Path

import typer

from workbench.console.options import JsonOpt
from workbench.console.output import out

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Manage bricks: adapters, fine-tuned checkpoints, edits and sets of neurons.",
)


@app.command("ls")
def list_(json: JsonOpt = False) -> None:
    """List the bricks in bricks/."""
    from workbench.bricks.card import ShownCard, card_document, level, library

    cards = library(Path.cwd())

    def text() -> None:
        if not cards:
            out.say("no bricks in bricks/ (bricks/*/brick.yaml); `workbench brick fetch starter` gets a base to start with")
            return
        rows = [
            [
                name,
                card.kind,
                card.skill,
                *(
                    [level(s, s.value, 0), level(s, s.base_value, 0), s.task]
                    if (s := next(iter(card.scores), None))
                    else [""] * 3
                ),
            ]
            for name, card in cards
        ]
        out.table(["brick", "kind", "skill", "score", "base", "task"], rows, right=(3, 4))

    out.result(lambda: [ShownCard.model_validate(card_document(card)) for _, card in cards], text, json=json)
