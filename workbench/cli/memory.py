"""`memory ls|add|update|rm|feedback|log`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli._options import DeviceOpt, JsonOpt, QuietOpt, RunsOpt
from workbench.cli._output import out
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.run.memories import SavedMemory
    from workbench.steps import MethodContext

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at and change the facts of a memory; every change is a version."
)
DirArg = Annotated[str, typer.Argument(metavar="DIR", help="A configuration, a run, or a memory directory.", show_default=False)]
FactArg = Annotated[str, typer.Argument(metavar="ID", help="A fact's id: see `memory ls`.", show_default=False)]
VersionOpt = Annotated[int | None, typer.Option("--version", min=1, help="The memory at this version; the newest if omitted.")]


@app.command("ls")
def list_(place: DirArg, version: VersionOpt = None, runs_dir: RunsOpt = None, json: JsonOpt = False) -> None:
    """List facts: what they say, since when, and how far they are believed."""
    memory, _ = _open(place, runs_dir)
    rows: list[dict[str, Any]] = [
        {"id": r.fact.id, "prompt": r.fact.text, "target": r.fact.target, "version": r.credibility.stated,
         "source": "recipe" if r.credibility.recipe else "added", "feedback": len(r.credibility.uses),
         "credibility": round(r.credibility.score(1.0), 3), "used": r.credibility.kept}
        for r in memory.kept(version).facts
    ]  # fmt: skip
    if json:
        out.json({"version": version or memory.log.version, "method": memory.record["method"], "facts": rows})
        return
    out.table(
        ["fact", "prompt", "target", "version", "source", "credibility", ""],
        [[r["id"], r["prompt"], r["target"], str(r["version"]), r["source"], f"{r['credibility']:.2f}", "" if r["used"] else "not used"]
         for r in rows], right=(3, 5))  # fmt: skip
    out.say(f"{memory.record['method']}, version {version or memory.log.version} of {memory.log.version}, {len(rows)} facts")


@app.command()
def add(
    place: DirArg, facts: Annotated[Path, typer.Argument(metavar="FACTS", help="A jsonl or YAML of facts.", show_default=False)],
    device: DeviceOpt = "auto", runs_dir: RunsOpt = None, quiet: QuietOpt = False,
) -> None:  # fmt: skip
    """Learn the facts of a file, as a new version."""
    from workbench.facts import read_facts

    out.quiet = quiet
    found = read_facts(facts, str(facts))
    memory, configuration = _open(place, runs_dir)
    with _learning(configuration, place, device) as context:
        version = memory.add(found, context, _now())
    _say(memory, version, f"{len(found)} facts added")


@app.command()
def update(
    place: DirArg, fact: FactArg, target: Annotated[str, typer.Option("--target", help="The new answer.", show_default=False)],
    device: DeviceOpt = "auto", runs_dir: RunsOpt = None, quiet: QuietOpt = False,
) -> None:  # fmt: skip
    """Give a fact another answer, as a new version."""
    out.quiet = quiet
    memory, configuration = _open(place, runs_dir)
    memory.log.one(fact)
    with _learning(configuration, place, device) as context:
        version = memory.update(fact, target, context, _now())
    _say(memory, version, f"'{fact}' changed")


@app.command()
def rm(
    place: DirArg, facts: Annotated[list[str], typer.Argument(metavar="ID", help="Facts to take out.", show_default=False)],
    runs_dir: RunsOpt = None,
) -> None:  # fmt: skip
    """Take facts out, as a new version; older versions keep them."""
    memory, _ = _open(place, runs_dir)
    _say(memory, memory.remove(facts, _now()), f"{len(facts)} facts taken out")


@app.command()
def feedback(
    place: DirArg, fact: FactArg,
    reward: Annotated[float, typer.Option("--reward", min=0, max=1, help="1: the fact was right in a use, 0: wrong.", show_default=False)],
    similarity: Annotated[float, typer.Option("--similarity", min=0, max=1, help="How like the fact the prompt was.")] = 1.0,
    runs_dir: RunsOpt = None,
) -> None:  # fmt: skip
    """Note whether a use of a fact was right, as a new version; what is wrong too often is no longer used."""
    memory, _ = _open(place, runs_dir)
    version = memory.feedback(fact, reward, similarity, _now())
    found = next(r for r in type(memory)(memory.path).kept().facts if r.fact.id == fact).credibility
    _say(memory, version, f"'{fact}' has credibility {found.score(1.0):.2f}" + ("" if found.kept else " and is not used"))


@app.command()
def log(place: DirArg, runs_dir: RunsOpt = None, json: JsonOpt = False) -> None:
    """Show every change, oldest first."""
    memory, _ = _open(place, runs_dir)
    if json:
        out.json(list(memory.log.lines))
        return
    rows = [
        [
            str(line["version"]),
            line["time"] or "",
            line["action"],
            line["id"],
            line["fact"]["target"] if "fact" in line else f"{line.get('reward', '')}",
        ]
        for line in memory.log.lines
    ]
    out.table(["version", "time", "action", "fact", "target or reward"], rows, right=(0,))


def _open(place: str, runs_dir: Path | None) -> tuple[SavedMemory, Path | None]:
    """A memory and the configuration directory around it, where there is one. Errors: neither."""
    from workbench.run.directory import find_run
    from workbench.run.memories import RECORD, SavedMemory
    from workbench.run.saved import MEMORY, is_configuration

    path = Path(place)
    if not path.is_dir() or (path / "run.json").is_file():
        path = find_run(runs_dir or Path("runs"), place).path
    path = path / "configuration" if is_configuration(path / "configuration") else path
    if is_configuration(path):
        return SavedMemory(path / MEMORY), path
    if not (path / RECORD).is_file():
        raise WorkbenchError(
            f"{place}: holds no memory", "`workbench run` of a recipe that ends in a memory writes a configuration with one."
        )
    return SavedMemory(path), path.resolve().parent if is_configuration(path.resolve().parent) else None


@contextmanager
def _learning(configuration: Path | None, place: str, device: str) -> Iterator[MethodContext]:
    """Load the model that facts are learned on, and compute in exact float32 meanwhile. Errors: a memory directory that stands alone."""
    from workbench.models.device import pick_device
    from workbench.run.saved import open_configuration
    from workbench.run.session import live_session
    from workbench.weights.device import exact

    if configuration is None:
        raise WorkbenchError(
            f"{place}: a memory without its configuration, so without a model to learn facts on",
            "Name the configuration directory.",
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
