"""How the command line changes recipes: overrides of `--set`, and sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.cli._recipes import load_named
from workbench.errors import UsageError

if TYPE_CHECKING:
    from workbench.compare.sweeps import Sweep
    from workbench.recipe.recipe import Recipe


@dataclass(frozen=True)
class Variation:
    """How the command line changes the recipes that it names.

    Attributes:
        settings: Values of `--set`.
        sweep: Values of `--sweep`.
        most: Value of `--max-points`.
    """

    settings: Sequence[str] = ()
    sweep: Sequence[str] = ()
    most: int | None = None

    @classmethod
    def of(cls, settings: list[str] | None, sweep: list[str] | None, most: int | None) -> Variation:
        """Return the variation of a command's options."""
        return cls(tuple(settings or ()), tuple(sweep or ()), most)

    @property
    def options(self) -> list[str]:
        """The options as words of a command line."""
        words = [word for setting in self.settings for word in ("--set", setting)]
        words += [word for one in self.sweep for word in ("--sweep", one)]
        return words + (["--max-points", str(self.most)] if self.most is not None else [])

    def check_used(self, recipes: bool) -> None:
        """Raise UsageError if an option changes recipes, but only models are named."""
        if not recipes and (self.settings or self.sweep):
            option = "--set overrides" if self.settings else "--sweep varies"
            name = option.partition(" ")[0]
            raise UsageError(f"{option} recipe fields, but only models are named", f"Remove {name}, or name a recipe.")

    def recipes(self, path: str | Path) -> tuple[list[Recipe], Sweep | None]:
        """Return the configurations of a recipe, and its sweep if it has one.

        Args:
            path: The recipe as named on the command line, or a point of its sweep.

        Raises:
            WorkbenchError: If the recipe or its sweep is invalid, or the sweep has too many points.
        """
        from workbench.search.sweep import expand

        expanded = expand(load_named(str(path), self.settings), self.sweep, self.most)
        return list(expanded.recipes), expanded.sweep
