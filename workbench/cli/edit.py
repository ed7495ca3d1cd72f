"""The group `edit`, whose commands are of parts."""

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Solve edits again on other weights, and trace facts.")
