"""Recipes as a user varies them: overrides of fields, and sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.api.naming import load_named
from workbench.errors import UsageError

if TYPE_CHECKING:
    from workbench.compare.sweeps import Sweep
    from workbench.recipe.recipe import Recipe


@dataclass(frozen=True)
class Variation:
    """How a user changes the recipes that they name.

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

    def recipes(self, name: str, say: Callable[[str], None], runs: Path | None = None) -> tuple[list[Recipe], Sweep | None]:
        """Return the configurations of a recipe, and its sweep if it has one.

        Args:
            name: The recipe as named on the command line, or a point of its sweep.
            say: Receives what `--set` changes beyond the fields that it names.
            runs: Directory of runs; default: runs/ in the project.

        Raises:
            WorkbenchError: If the recipe or its sweep is invalid, or the sweep has too many points.
        """
        from workbench.search.sweep import expand

        expanded = expand(load_named(name, self.settings, say, runs), self.sweep, self.most)
        return list(expanded.recipes), expanded.sweep
