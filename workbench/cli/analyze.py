"""Commands `analyze functions|…`: where a model's abilities sit. A command is one module in `analyses/` and one line here."""

from __future__ import annotations

import typer

from workbench.cli._trust import reads_recipes
from workbench.cli.analyses import ablate, decompose, everything, files, functions, locate, partition, sparsity

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Find the neurons that serve a function, prove it by switching them off, and save them as bricks.",
)
app.command("functions")(reads_recipes(functions.functions))
app.command("sparsity")(reads_recipes(sparsity.sparsity))
app.command("ablate")(reads_recipes(ablate.ablate))
app.command("partition")(reads_recipes(partition.partition))
app.command("locate")(reads_recipes(locate.locate))
app.command("decompose")(reads_recipes(decompose.decompose))
app.command("import")(files.import_)
app.command("export")(files.export)
app.command("all")(reads_recipes(everything.everything))
