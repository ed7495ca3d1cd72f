"""Commands `runs ls|show|rm|verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.naming import runs_folder
from workbench.console.options import JsonOpt, RunsOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import WorkbenchError, size

if TYPE_CHECKING:
    from workbench.run.directory import RunDirectory
    from workbench.run.record import RunRecord

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, verify and remove runs.")
NameArg = Annotated[str, typer.Argument(help="Run: its name, the start of its name, or its directory.", show_default=False)]


@app.command("ls")
def list_(runs_dir: RunsOpt = None, json: JsonOpt = False) -> None:
    """List runs, newest first."""
    from workbench.ground.manifest import described
    from workbench.run.directory import UNSEALED, list_runs
    from workbench.run.record import RunRow

    listed = list_runs(runs_folder(runs_dir))
    rows = [
        RunRow(
            name=run.name,
            status="broken" if run.broken else run.status,
            created=run.record.created if run.record else "",
            bytes=run.size(),
            configuration=run.digest,
        )
        for run in listed
    ]

    def text() -> None:
        if not rows:
            out.say(f"no runs in {runs_folder(runs_dir)}; start one with `workbench run RECIPE`")
            return
        out.table(
            ["run", "status", "created", "size", "configuration"],
            [[r.name, r.status or "", r.created or "", size(r.bytes), (r.configuration or "")[:12]] for r in rows],
            right=(3,),
        )
        for run in listed:
            if run.broken:
                out.warn(f"{run.name}: {described(run.broken)}")
        if unsealed := [run.name for run in listed if run.seal == "not sealed"]:
            out.say(f"{', '.join(unsealed)}: {UNSEALED}")

    out.result(lambda: rows, text, json=json)


@app.command()
def show(name: NameArg, runs_dir: RunsOpt = None, json: JsonOpt = False) -> None:
    """Show a run's inputs, steps and result."""
    from workbench.run.directory import find_run

    run = find_run(runs_folder(runs_dir), name)
    record = run.read_record()
    routers: list[Any] = [step.router for step in record.steps or () if isinstance(step.router, dict)]
    warnings = [*(warning for router in routers for warning in router.get("warnings") or ()), *(record.warnings or ())]
    out.result(lambda: record, lambda: _print(run, record), json=json, warnings=warnings)
    if record.error and not json:
        raise WorkbenchError(f"{run.name} failed: {record.error}", "Fix the cause and run the recipe again.")


def _print(run: RunDirectory, record: RunRecord) -> None:
    """Print a run's inputs, steps, result and warnings."""
    base, output = record.inputs.base, record.output
    out.line(
        f"{run.name}: {record.status}, {record.created}, on {record.device}"
        + (f", {record.seconds} s" if record.seconds is not None else "")
    )
    out.line(f"base   {base.id}  {(base.digest or '')[:12]}")
    for brick, found in (record.inputs.bricks or {}).items():
        out.line(f"brick  {brick} ({found.kind})  {(found.digest or '')[:12]}")
    for step in (step.to_dict() for step in record.steps or ()):  # with the entries that only some methods have
        shown = {k: v for k, v in step.items() if k not in ("id", "key", "router")}
        out.line(f"step   {step['id']}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
        _print_router(step.get("router"))
    if output and output.digest and output.parameters is not None and output.bytes is not None:
        place = f"{run.result.name:<6} {run.result}"
        out.line(f"{place}  {output.digest[:12]}, {output.parameters / 1e6:.1f} M parameters, {size(output.bytes)}")


def _print_router(measured: Any) -> None:
    """Print the accuracy, the ties and the threshold of a fitted router; nothing for other steps."""
    if not isinstance(measured, dict):
        return
    held_out = (measured.get("accuracy") or {}).get("held_out_templates") or {}
    shares = [f"{kind} {100 * share:.1f} %" for kind, share in held_out.items() if isinstance(share, (int, float))]
    if shares:
        out.line(f"       right on held-out templates: {', '.join(shares)}")
    for tie in measured.get("ties") or []:
        out.line(f"       tied: {', '.join(tie['bricks'])}; {tie['acts']} acts")
    if (abstain := measured.get("abstain")) and isinstance(abstain.get("threshold"), (int, float)):
        out.line(f"       threshold of confidence: {abstain['threshold']:.4g}")


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(help="Runs to remove.", show_default=False)],
    runs_dir: RunsOpt = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Remove run directories; scores stay."""
    from workbench.run.directory import removable, remove_run

    chosen = list({run.path.resolve(): run for name in names for run in [removable(runs_folder(runs_dir), name)]}.values())
    if not yes and not typer.confirm(
        f"Remove {', '.join(run.name for run in chosen)} ({size(sum(run.size() for run in chosen))})?"
    ):
        raise typer.Exit(1)
    for run in chosen:
        out.say(f"removed {run.name}, {size(remove_run(run))} freed")


@app.command()
@reads_recipes
def verify(
    name: NameArg,
    runs_dir: RunsOpt = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            "--accept", metavar="FILE", help="First seal a file as it is now, because you changed it on purpose. Repeatable."
        ),
    ] = None,
) -> None:
    """Verify that a run has exactly the files that it wrote, with the same contents.

    Exits with 3 if a file is missing, changed or was added.
    """
    from workbench.ground.manifest import accept as seal_again
    from workbench.run.directory import UNSEALED, find_run
    from workbench.run.execute import verify_run

    run = find_run(runs_folder(runs_dir), name)
    for file in accept or ():
        seal_again(run.path, file)
    verified = verify_run(run)
    if not run.sealed:
        out.say(f"{run.name}: all {verified.tensors} tensors are as recorded; nothing else could be compared: {UNSEALED}")
        return
    out.say(f"{run.name}: all {len(verified.sha256)} files are as written; not compared: {', '.join(verified.open)}")
