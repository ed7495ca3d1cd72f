"""Search from Python, by the code that the command runs; `workbench.api` has these names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Unpack

from workbench.api.naming import load_named
from workbench.api.results import Result
from workbench.api.scoring import Options, refuse, request_of, warn
from workbench.ground.events import Events, no_events
from workbench.ground.project import runs_of
from workbench.search.result import SearchResult


@dataclass(frozen=True, repr=False)
class FoundValues(Result):
    """The result of a search, whose document is that of `workbench search --json`.

    Attributes:
        found: The result.
        project: The project, from which the paths in the result start.
    """

    found: SearchResult
    project: Path

    @property
    def winner(self) -> str | None:
        """Name of the best candidate; None if none beats the controls, or there are several objectives."""
        return self.found.winner

    @property
    def recipes(self) -> dict[str, Path]:
        """The written recipes by candidate."""
        return {name: self.project / path for name, path in self.found.recipes.items()}

    def tables(self) -> dict[str, list[dict[str, object]]]:
        """Return flat tables: `trials`, one row per candidate with its values and scores, and `test`, the scores on test items."""
        names = [objective.name for objective in self.found.objectives]
        trials = []
        for trial in self.found.trials:
            scores: Sequence[float | None] = trial.scores if trial.scores else [None] * len(names)
            plain = {key: getattr(trial, key) for key in ("name", "number", "stopped", "error")}
            trials.append({**plain, **trial.values, **dict(zip(names, scores, strict=True))})
        return {"trials": trials, "test": [row.to_dict() for row in self.found.test.rows]}

    def __repr__(self) -> str:
        return f"<search {self.found.name}: {len(self.found.trials)} candidates, winner {self.winner}>"

    def _shown(self) -> SearchResult:
        return self.found

    def _pages(self) -> ModuleType:
        from workbench.search import pages

        return pages


def search(
    recipe: str | Path,
    *,
    trials: int | None = None,
    device: str = "auto",
    events: Events = no_events,
    **options: Unpack[Options],
) -> FoundValues:
    """Search for the best values of a recipe's fields in this process, as `workbench search` does. An earlier search goes on.

    Args:
        recipe: Recipe with a `search` field: a file, or the name of one in recipes/.
        trials: Total number of candidates, including those of earlier calls; default: the recipe's.
        device: auto, cpu, cuda or cuda:N.
        events: Receives progress.
        options: `settings`, `batch_size`, `limit` and `runs`.

    Raises:
        WorkbenchError: If the recipe has no `search`, or a value is invalid.
    """
    from workbench.search.run import Scoring, prepare, run
    from workbench.search.winner import conclude

    refuse(options, "search", ("sweep", "max_points", "controls"))
    request = request_of(recipe, (), options)
    loaded = load_named(str(recipe), request.vary.settings, warn, request.runs)
    scoring = Scoring(device, request.batch_size, request.limit)
    prepared = prepare(loaded, request.runs or runs_of(loaded.project), scoring, trials=trials, events=events)
    for warning in prepared.warnings:
        warn(warning)
    run(prepared)
    return FoundValues(conclude(prepared), loaded.project)
