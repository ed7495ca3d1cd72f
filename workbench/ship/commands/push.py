"""Command `push`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.api.naming import run_named
from workbench.console.options import JsonOpt, QuietOpt, RunsOpt
from workbench.console.output import out
from workbench.ground.errors import shell, size

if TYPE_CHECKING:
    from workbench.ship.push import Package, Pushed, PushedFile


def push(
    run: Annotated[
        str,
        typer.Argument(
            help="Finished run: its name, the start of its name, or its directory; or a recipe or point of a sweep that has been run.",
            show_default=False,
        ),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="Repository of the hub; created if missing.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Branch to send to; created if missing. Default: main.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="ORG/NAME", help="Hub id of the base, if the recipe names the base by a directory."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", "--licence", metavar="NAME", help="License of the result. Default: that of all inputs."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Also send a result whose inputs have unknown, restricted or different licenses.")
    ] = False,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Delete model files of the repository that the run does not have, in the same commit."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the card, the files and what is changed; send nothing.")
    ] = False,
    runs_dir: RunsOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Send the result of a finished run to the Hugging Face hub.

    Sends a model, adapter or configuration with its card, as one commit. First the files are compared with the run's record, and the
    licenses of the inputs are checked. After an interruption the same command sends only what is missing.
    """
    from workbench.ship.outward import CARD, content_of
    from workbench.ship.push import Pushed, contents, licence_of, package
    from workbench.ship.upload import Target, check_reachable, upload

    out.quiet = json or quiet
    target = Target(repository, None if revision == "main" else revision, private, replace)
    if not dry_run:
        check_reachable()
    found = run_named(run, runs_dir)
    packed = package(found)
    stated = licence_of(packed.record, licence, yes)
    files = contents(packed, _card(packed, runs_dir), stated, base)
    for line in _lacking(packed, files, base):
        out.warn(line)
    sent = None
    if not dry_run:
        sent = upload(files, target, f"{packed.record.name or found.name}, made with brick-workbench", out.event)
        for line in sent.warnings:
            out.warn(line)
    pushed = Pushed(
        run=found.name,
        repository=repository,
        revision=target.revision,
        private=private,
        license=stated,
        base=base if packed.local_base else packed.record.inputs.base.id.partition("@")[0],
        card=content_of(files[CARD]).decode(),
        files=_files(packed, files, dry_run),
        bytes=sum(map(_bytes, files.values())),
        sent=sent is not None,
        url=sent.url if sent else None,
        commit=sent.commit if sent else None,
        changed=sent.changed if sent else None,
        deleted=list(sent.deleted) if sent else [],
    )
    out.result(lambda: pushed, lambda: _print(pushed), json=json)
    if not dry_run:
        out.say(_loading(packed, repository, target.revision))


def _lacking(packed: Package, files: Mapping[str, Path | bytes], base: str | None) -> Iterator[str]:
    """Yield warnings on what others need, and what is not sent."""
    from workbench.ground import jsondoc
    from workbench.run.memories import RECORD as MEMORY
    from workbench.ship.outward import content_of

    if packed.local_base and base is None:
        yield (
            f"the recipe names the base by the directory {packed.local_base}, which others do not have, so that what is sent names no base: "
            "add --base ORG/NAME if the base is on the hub"
        )
    for path in (path for path in files if Path(path).name == MEMORY):
        if encoder := jsondoc.parse(content_of(files[path]), path)["settings"].get("encoder"):
            yield f"the memory's sentence encoder is not sent: others need it as the folder {encoder} where they load the memory"


def _card(packed: Package, runs_dir: Path | None) -> str:
    """Return the text of the run's card, with scores of the store if `eval` has not written any into it."""
    from workbench.report.scorecard import BEGIN, with_scores
    from workbench.ship.outward import CARD
    from workbench.ship.push import stored_scores

    text = packed.files[CARD].read_text("utf-8")
    scores = stored_scores(packed.run, (runs_dir or packed.run.path.parent) / "scores")
    return text if BEGIN in text or not scores else with_scores(text, packed.record.name or packed.run.name, scores, None)


def _files(packed: Package, sent: Mapping[str, Path | bytes], dry_run: bool) -> list[PushedFile]:
    """Return the record of each file; with `--dry-run`, also how it differs from the run's."""
    from workbench.ship.outward import difference
    from workbench.ship.push import PushedFile

    diffs = {path: difference(path, packed.files[path], content) for path, content in sent.items() if dry_run}
    return [PushedFile(path=path, bytes=_bytes(content), diff=diffs.get(path)) for path, content in sent.items()]


def _bytes(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _print(pushed: Pushed) -> None:
    """Print the files with their sizes, and what was done with them; for a dry run, first what is sent in place of the run's files."""
    if not pushed.sent:
        for file in pushed.files:
            if file.diff:
                out.line(f"{file.diff}\n")
        out.line(f"README.md:\n\n{pushed.card}")
    out.table(["file", "size"], [[file.path, size(file.bytes)] for file in pushed.files], right=(1,))
    place = pushed.repository + (f", branch {pushed.revision}" if pushed.revision else "")
    total = f"{len(pushed.files)} files, {size(pushed.bytes)}, license {pushed.license}"
    if not pushed.sent:
        visible = ", private if it is new" if pushed.private else ""
        out.line(f"would go to {place}{visible}: {total}; nothing was sent")
        return
    for path in pushed.deleted:
        out.line(f"deleted {path}")
    done = "sent to" if pushed.changed else "unchanged, all files are in"
    out.line(f"{done} {place}: {total}")
    out.line(f"{pushed.url}  commit {pushed.commit}")


def _loading(packed: Package, repository: str, revision: str | None) -> str:
    """Return a line with the command or call that loads the pushed result."""
    at = f', revision="{revision}"' if revision else ""
    if packed.form == "configuration":
        options = ["--revision", revision] if revision else []
        folder = repository.partition("/")[2]
        return f'load:   {shell("hf", "download", repository, *options, "--local-dir", folder)}, then workbench.load("{folder}")'
    if packed.form == "adapter":
        return f'load:   PeftModel.from_pretrained(base, "{repository}"{at}); as a brick: `{repository}{f"@{revision}" if revision else ""}`'
    return f'load:   AutoModelForCausalLM.from_pretrained("{repository}"{at})'
