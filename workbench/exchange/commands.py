"""Commands `scores import`, `scores pull` and `recipe import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.api.naming import runs_folder
from workbench.console.options import JsonOpt, QuietOpt, RunsOpt
from workbench.console.output import out
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.project import relative

_STATUS = {"pulled": "taken", "same": "here already", "named": "here already, names added"}


def import_(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Sample files of lm-eval (samples_TASK_DATE.jsonl), folders of them, or the DIR of lm_eval's --output_path.",
            show_default=False,
        ),
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name of the configuration; default: the folder's name.")] = None,
    suite: Annotated[
        str,
        typer.Option(
            "--suite",
            help="Suite name to store the scores under; a suite of the project gives its roles, tolerances and clusters.",
        ),
    ] = "imported",
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            help="Field of the documents that names an item's cluster; default: `cluster` if all have it, else one cluster per item.",
        ),
    ] = None,
    lower: Annotated[
        list[str] | None,
        typer.Option("--lower", metavar="METRIC", help="Lower values of this metric are better; may be repeated."),
    ] = None,
    higher: Annotated[
        list[str] | None,
        typer.Option("--higher", metavar="METRIC", help="Higher values of this metric are better; may be repeated."),
    ] = None,
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Import what `lm_eval --log_samples` wrote, to compare runs item by item.

    Each folder of sample files is one configuration. Each metric is compared with lm-eval's results file beside the samples.
    """
    from workbench.exchange.imports import import_samples
    from workbench.ground.project import find_project
    from workbench.scores.groups import ImportedScores
    from workbench.scores.store import ScoreStore

    out.quiet = quiet or json
    store = ScoreStore(runs_folder(runs_dir) / "scores")
    better = dict.fromkeys(lower or (), False) | dict.fromkeys(higher or (), True)
    imported = import_samples(files, store, name=name, suite=suite, cluster=cluster, higher=better, project=find_project())

    def text() -> None:
        for one in imported:
            for note in one.notes:
                out.warn(note)
            tasks = ", ".join(f"{task} (n={t.n})" for task, t in one.scores.tasks.items())
            out.line(
                f"{one.scores.configuration.name}: {tasks}, suite {suite}, plan {one.scores.plan[:12]}"
                + ("" if one.new else ", already imported")
            )
        names = [s.configuration.name for s in store.list(imported[-1].plan)]
        if len(names) > 1:
            out.say(f"compare: {shell('workbench', 'compare', *names, '--suite', suite)}")
        else:
            out.say("to compare, import another run on the same documents and prompts")

    out.result(lambda: [ImportedScores.by(one.scores, one.new, one.notes) for one in imported], text, json=json)


def pull(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Another project, its runs folder, or a score store.", show_default=False)
    ],
    runs_dir: RunsOpt = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compare only; write nothing.")] = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Add the scores of another project or machine to this one's, and overwrite nothing.

    Takes what this store lacks, recognized by the digests of plans and configurations. Other scores under the same digests
    and damaged, unfinished or older files are listed and not taken; then the command exits with 1.
    """
    from workbench.exchange.pull import pull_scores, store_in
    from workbench.scores.store import ScoreStore

    out.quiet = quiet or json
    store = ScoreStore(runs_folder(runs_dir) / "scores")
    pulled = pull_scores(store_in(folder), store, dry_run=dry_run)

    def text() -> None:
        rows = [[d.suite, d.plan[:12], d.name, d.key[:12], _STATUS[d.status]] for d in pulled.documents]
        if rows:
            out.table(["suite", "plan", "configuration", "key", "dry run" if dry_run else "done"], rows)
        for note in pulled.notes:
            out.say(note)
        counts = [f"{pulled.count(status)} {word}" for status, word in _STATUS.items() if pulled.count(status)]
        out.say(
            f"{', '.join(counts) or 'nothing'}{f', {len(pulled.plans)} new plans' if pulled.plans else ''}: {relative(store.root)}"
        )

    out.result(lambda: pulled, text, json=json)
    if pulled.refused:
        lines = "\n".join(f"{one.file}: {one.reason}" for one in pulled.refused)
        raise WorkbenchError(f"not taken from {pulled.source}:\n{lines}", "Everything else was taken." if not dry_run else None)


def import_recipe(
    file: Annotated[Path, typer.Argument(help="YAML file for mergekit-yaml.", show_default=False)],
    to: Annotated[Path | None, typer.Option("-o", "--out", help="Recipe file to write; default: print the recipe.")] = None,
) -> None:
    """Convert a mergekit YAML into a recipe with the same result.

    If the file uses something that recipes do not have, lists it and writes nothing.
    """
    from workbench.exchange import mergekit

    imported = mergekit.import_recipe(file, to)
    if to is None:
        out.line(imported.text.rstrip("\n"))
    else:
        mergekit.write_imported(imported, to)
        for path in (to, *imported.extra):
            out.line(str(path))
    for note in imported.notes:
        out.say(f"note: {note}")
    if to is not None:
        out.say(f"next: workbench plan {shell(to)}")
