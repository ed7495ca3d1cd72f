"""Commands `memory ls|add|update|rm|feedback|log`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.api.naming import configuration_named
from workbench.console.options import DeviceOpt, JsonOpt, QuietOpt, RunsOpt
from workbench.console.output import out
from workbench.console.trust import reads_recipes
from workbench.ground.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.run.memories import SavedMemory
    from workbench.steps import MethodContext

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show and change the facts of a memory.")
DirArg = Annotated[
    str, typer.Argument(metavar="DIR", help="Configuration directory, run, or memory directory.", show_default=False)
]
FactArg = Annotated[str, typer.Argument(metavar="ID", help="Id of a fact, as `memory ls` shows it.", show_default=False)]
VersionOpt = Annotated[int | None, typer.Option("--version", min=1, help="Version of the memory; default: the newest.")]


@app.command("ls")
@reads_recipes
def list_(place: DirArg, version: VersionOpt = None, runs_dir: RunsOpt = None, json: JsonOpt = False) -> None:
    """List facts with their versions and credibility."""
    from workbench.facts.log import MemoryFact, MemoryFacts

    memory, _ = _open(place, runs_dir)
    rows = [
        MemoryFact(
            id=r.fact.id,
            prompt=r.fact.text,
            target=r.fact.target,
            version=r.credibility.stated,
            source="recipe" if r.credibility.recipe else "added",
            feedback=len(r.credibility.uses),
            credibility=round(r.credibility.score(1.0), 3),
            used=r.credibility.kept,
        )
        for r in memory.kept(version).facts
    ]
    shown = MemoryFacts(version=version or memory.log.version, method=memory.record.method, facts=rows)

    def text() -> None:
        cells = [
            [r.id, r.prompt, r.target, str(r.version), r.source, f"{r.credibility:.2f}", "" if r.used else "not used"]
            for r in rows
        ]
        out.table(["fact", "prompt", "target", "version", "source", "credibility", ""], cells, right=(3, 5))
        out.say(f"{shown.method}, version {shown.version} of {memory.log.version}, {len(rows)} facts")

    out.result(lambda: shown, text, json=json)


@app.command()
@reads_recipes
def add(
    place: DirArg,
    facts: Annotated[Path, typer.Argument(metavar="FACTS", help="JSONL or YAML file of facts.", show_default=False)],
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Add the facts of a file, as a new version."""
    from workbench.facts.published import read_facts

    out.quiet = quiet
    new_facts = read_facts(facts, str(facts))
    memory, configuration = _open(place, runs_dir)
    with _learning(configuration, place, device) as context:
        version = memory.add(new_facts, context, _now())
    _say(memory, version, f"{len(new_facts)} facts added")


@app.command()
@reads_recipes
def update(
    place: DirArg,
    fact: FactArg,
    target: Annotated[str, typer.Option("--target", help="The new answer.", show_default=False)],
    device: DeviceOpt = "auto",
    runs_dir: RunsOpt = None,
    quiet: QuietOpt = False,
) -> None:
    """Change a fact's answer, as a new version."""
    out.quiet = quiet
    memory, configuration = _open(place, runs_dir)
    memory.log.one(fact)
    with _learning(configuration, place, device) as context:
        version = memory.update(fact, target, context, _now())
    _say(memory, version, f"'{fact}' changed")


@app.command()
@reads_recipes
def rm(
    place: DirArg,
    facts: Annotated[list[str], typer.Argument(metavar="ID", help="Ids of the facts to remove.", show_default=False)],
    runs_dir: RunsOpt = None,
) -> None:
    """Remove facts, as a new version; older versions keep them."""
    memory, _ = _open(place, runs_dir)
    _say(memory, memory.remove(facts, _now()), f"{len(facts)} facts removed")


@app.command()
@reads_recipes
def feedback(
    place: DirArg,
    fact: FactArg,
    reward: Annotated[
        float,
        typer.Option("--reward", min=0, max=1, help="1 if the fact was right in a use, 0 if it was wrong.", show_default=False),
    ],
    similarity: Annotated[
        float, typer.Option("--similarity", min=0, max=1, help="Similarity of the prompt to the fact, from 0 to 1.")
    ] = 1.0,
    runs_dir: RunsOpt = None,
) -> None:
    """Record whether a use of a fact was right, as a new version.

    A fact that is wrong too often is no longer used.
    """
    memory, _ = _open(place, runs_dir)
    version = memory.feedback(fact, reward, similarity, _now())
    credibility = next(r for r in type(memory)(memory.path).kept().facts if r.fact.id == fact).credibility
    _say(
        memory,
        version,
        f"'{fact}' has credibility {credibility.score(1.0):.2f}" + ("" if credibility.kept else " and is no longer used"),
    )


@app.command()
def log(place: DirArg, runs_dir: RunsOpt = None, json: JsonOpt = False) -> None:
    """Show all changes of a memory, oldest first."""
    memory, _ = _open(place, runs_dir)

    def text() -> None:
        rows = [
            [
                str(change.version),
                change.time or "",
                change.action,
                change.id,
                str(change.fact["target"]) if change.fact else "" if change.reward is None else str(change.reward),
            ]
            for change in memory.log.lines
        ]
        out.table(["version", "time", "action", "fact", "target or reward"], rows, right=(0,))

    out.result(lambda: memory.log.lines, text, json=json)


def _open(place: str, runs_dir: Path | None) -> tuple[SavedMemory, Path | None]:
    """Open a memory, and find the configuration directory that it belongs to (None if it stands alone)."""
    from workbench.run.memories import RECORD, SavedMemory
    from workbench.run.opened import MEMORY, is_configuration

    path = Path(place) if (Path(place) / RECORD).is_file() else configuration_named(place, runs_dir)
    if is_configuration(path):
        return SavedMemory(path / MEMORY), path
    if not (path / RECORD).is_file():
        raise WorkbenchError(
            f"{place}: no memory found", "`workbench run` on a recipe that ends in a memory step writes a configuration with one."
        )
    return SavedMemory(path), path.resolve().parent if is_configuration(path.resolve().parent) else None


@contextmanager
def _learning(configuration: Path | None, place: str, device: str) -> Iterator[MethodContext]:
    """Load the model that facts are learned on, and compute in exact float32 inside the context."""
    from workbench.models.identity import pick_device
    from workbench.run.opened import open_configuration
    from workbench.run.teaching import live_session
    from workbench.weights.device import exact

    if configuration is None:
        raise WorkbenchError(
            f"{place}: the memory has no configuration directory, so there is no model to learn facts on",
            "Name the configuration directory that holds the memory.",
        )
    resolved = open_configuration(configuration)

    def progress(done: int, total: int, text: str) -> None:
        out.event({"stage": "edit", "done": done, "total": total, "text": text})

    on = pick_device(device)
    with exact(on):
        steps = len(resolved.recipe.steps)
        yield live_session(resolved, steps, resolved.base, on, progress, rounded_to=resolved.dtype).context


def _say(memory: SavedMemory, version: int, text: str) -> None:
    out.say(f"{text}; version {version} of {memory.path}")


def _now() -> Any:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
