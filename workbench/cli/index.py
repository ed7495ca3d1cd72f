"""Every command by what is typed for it: those of the core, and those that parts register.

The index fixes the order of `--help`. A command of a part that is not in the index comes last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import typer

from workbench.ground.parts import imported, missing, parts

COMMANDS = {
    "plan": "cli.run.plan",
    "run": "cli.run.run",
    "eval": "cli.evals.evaluate",
    "compare": "cli.evals.compare",
    "report": "cli.evals.report",
    "search": "search",
    "view": "view",
    "ship": "cli.ship.ship",
    "chat": "cli.chat.chat",
    "push": "ship",
    "open": "cli.open.open_",
    "doctor": "upkeep",
    "trust": "cli.trust.trust",
    "experts": "cli.experts.experts",
    "methods": "cli.recipe.methods",
    "analyze": "neurons",
    "recipe": "cli.recipe.app",
    "recipe new": "cli.recipe",
    "recipe check": "cli.recipe",
    "recipe diff": "upkeep",
    "recipe schema": "cli.recipe",
    "recipe import": "exchange",
    "recipe soup": "averaging",
    "brick": "cli.brick.app",
    "brick ls": "cli.brick",
    "brick show": "upkeep",
    "brick fetch": "upkeep",
    "brick train": "upkeep",
    "brick extract": "upkeep",
    "brick bake": "upkeep",
    "brick advise": "advice",
    "brick barrier": "advice",
    "brick transplant": "transplant",
    "brick verify": "upkeep",
    "suite": "suites",
    "scores": "cli.scores.app",
    "scores items": "cli.scores",
    "scores ls": "cli.scores",
    "scores import": "exchange",
    "scores pull": "exchange",
    "scores export": "suites",
    "facts": "cli.facts.app",
    "facts check": "advice",
    "facts import": "cli.facts",
    "edit": "cli.edit.app",
    "edit rebase": "upkeep",
    "edit trace": "neurons",
    "runs": "cli.runs.app",
    "export": "ship",
    "memory": "cli.memory.app",
    "route": "cli.route.app",
    "serve": "serve",
}
"""Command -> the part that has it, or its place in the core. A command of a group is listed where the group has commands of parts."""


@cache
def command(name: str) -> Any:
    """Import a command, or a group of commands, and return typer's object for it.

    Args:
        name: What is typed for it, such as "plan" or "brick advise".

    Raises:
        WorkbenchError: If it is a command of a part that is missing.
        KeyError: If there is no such command.
    """
    place = COMMANDS.get(name, "")
    if "." not in place:
        if place and place not in parts():
            raise missing(place, f"`workbench {name}`")
        place = _of_parts()[name]
    found = imported(place)
    if isinstance(found, typer.Typer):
        group = typer.main.get_group(found)
        group.name = name
        group.commands = Commands(f"{name} ", group.commands)  # type: ignore[assignment]
        return group
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name.rpartition(" ")[2])(found)
    return typer.main.get_command(alone)


class Commands(Mapping[str, Any]):
    """Commands by name, imported when they are asked for. Building all of them takes longer than most of them run.

    Args:
        group: What is typed before the name, such as "brick "; "" for the program itself.
        own: Commands of the group's own file.
    """

    def __init__(self, group: str = "", own: Mapping[str, Any] | None = None) -> None:
        self._group, self._own = group, own or {}

    def __getitem__(self, name: str) -> Any:
        return self._own[name] if name in self._own else command(self._group + name)

    def __iter__(self) -> Iterator[str]:
        known = [name for name in (*COMMANDS, *_of_parts()) if name.startswith(self._group)]
        names = dict.fromkeys([*(name.removeprefix(self._group) for name in known), *self._own])
        return (name for name in names if " " not in name and (name in self._own or _is_here(self._group + name)))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def groups() -> list[str]:
    """Return the commands that have subcommands."""
    return [name for name, place in {**COMMANDS, **_of_parts()}.items() if place.endswith(".app")]


def _is_here(name: str) -> bool:
    """Return False for a command whose part is missing, and for a group that has no other commands."""
    below = [one for one in COMMANDS if one.startswith(f"{name} ")]
    return any(map(_is_here, below)) if below else "." in COMMANDS.get(name, "") or name in _of_parts()


@cache
def _of_parts() -> Mapping[str, str]:
    """Return the commands of parts -> place."""
    return {name: place for part in parts().values() for name, place in part.commands.items()}
