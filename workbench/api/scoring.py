"""Score and compare from Python, by the code that the commands run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from workbench.api.answers import ONLY, Choice, ItemsBeside, Only, compared_items
from workbench.api.naming import Variation
from workbench.api.results import ComparedScores, StoredScores, find_scores
from workbench.api.subjects import Listener, Request, open_subjects
from workbench.ground.errors import UsageError, nearest
from workbench.ground.events import Events, no_events

Names = str | Path | Sequence[str | Path]


class Options(TypedDict, total=False):
    """Options that `evaluate` and `compare` share; each has the name, meaning and default of the command's option.

    Attributes:
        settings: Overrides of recipe fields, such as "mix.density=0.3".
        sweep: Sweeps of recipe fields, such as "mix.lambda=0.5,1".
        max_points: Largest number of configurations of a sweep.
        controls: Also score the base, each brick alone and their average.
        batch_size: Requests per forward pass.
        limit: Largest number of items per task.
        runs: Directory of runs and scores.
    """

    settings: Names
    sweep: Names
    max_points: int
    controls: bool
    batch_size: int
    limit: int
    runs: str | Path


def evaluate(
    names: Names,
    suite: Names = (),
    *,
    device: str = "auto",
    baseline: str | None = None,
    events: Events = no_events,
    **options: Unpack[Options],
) -> ComparedScores:
    """Score recipes and models with their controls, as `workbench eval` does, and compare them. Nothing is scored twice.

    Args:
        names: Recipes and models: files, names of recipes in recipes/, model directories or hub ids.
        suite: Suites in the place of the recipes' `eval`: names in evals/suites/, or files.
        device: auto, cpu, cuda or cuda:N.
        baseline: Name of the configuration to compare with; default: the suite's, or the first model.
        events: Receives progress.
        options: Further options.

    Raises:
        WorkbenchError: If a recipe, suite or model is missing or invalid.
    """
    from workbench.models.identity import pick_device

    request = request_of(names, suite, options)
    opened = open_subjects(request, _listener(events), fetch=True, device=pick_device(device))
    against = opened.baseline(baseline)
    known = [entry.name for entry in opened.entries]
    if baseline and against not in known:
        raise UsageError(f"baseline {baseline!r}: not one of the scored configurations", nearest(baseline, known))
    if against is None and not any(entry.role == "base" for entry in opened.entries):
        against = known[0]
    scores = opened.scored(device, None, events)
    named = [entry.name for entry in opened.entries if entry.role == "configuration"]
    pair = None if baseline or opened.left_out else opened.pair(request.names)
    found = StoredScores(scores, opened.store, opened.project, named, against, opened.left_out, pair, opened.sweeps)
    return _compared(found, request)


def compare(names: Names, suite: Names = (), *, baseline: str | None = None, **options: Unpack[Options]) -> ComparedScores:
    """Compare stored scores, as `workbench compare` does. Configurations that are invalid or not scored are left out, with a warning.

    Args:
        names: Recipes, models, or runs imported under the suite. If these are exactly two and no baseline is named, the rows compare the
            second with the first.
        suite: Suites in the place of the recipes' `eval`.
        baseline: Name of the configuration to compare with; default: the suite's, or the first model.
        options: Further options.

    Raises:
        WorkbenchError: If the baseline, or every configuration, is not scored.
    """
    request = request_of(names, suite, options)
    return _compared(find_scores(request, baseline, _listener(no_events)), request)


def items(
    names: Names,
    suite: Names = (),
    *,
    task: Names = (),
    only: Only = "changed",
    text: str | None = None,
    **options: Unpack[Options],
) -> ItemsBeside:
    """Return the items that two configurations answer differently, from the score store, as `workbench scores items` shows them.

    Args:
        names: Two recipes, models, or runs imported under the suite; one is shown beside the suite's baseline.
        suite: Suites in the place of the recipes' `eval`.
        task: Items of these tasks only.
        only: "changed" for items with another score or answer, "won" or "lost" by the second configuration, or "all".
        text: Items with this text in the prompt, the right answer or an answer only.
        options: `settings`, `batch_size`, `limit` and `runs`.

    Raises:
        WorkbenchError: If a configuration is not scored, or a value is invalid.
    """
    refuse(options, "items", ("sweep", "max_points", "controls"))
    if only not in ONLY:
        raise UsageError(f"only {only!r}: no such kind of items", nearest(str(only), ONLY))
    return compared_items(request_of(names, suite, options), Choice(_texts(task), only, text), _listener(no_events))


def refuse(options: Options, function: str, names: Sequence[str]) -> None:
    """Raise UsageError if a function is given an option that it does not have."""
    if unknown := [name for name in names if name in options]:
        known = [name for name in Options.__annotations__ if name not in names]
        raise UsageError(f"{function} has no option {unknown[0]!r}", f"Options: {', '.join(known)}.")


def request_of(names: Names, suite: Names, options: Options) -> Request:
    """Return the request of arguments that are one name or several."""
    known = list(Options.__annotations__)
    if unknown := [name for name in options if name not in known]:
        raise UsageError(f"unknown option {unknown[0]!r}", f"{nearest(unknown[0], known)} Options: {', '.join(known)}.")
    vary = Variation(_texts(options.get("settings", ())), _texts(options.get("sweep", ())), options.get("max_points"))
    runs = options.get("runs")
    return Request(
        _texts(names),
        vary,
        _texts(suite),
        Path(runs) if runs else None,
        options.get("controls", True),
        options.get("batch_size", 32),
        options.get("limit"),
    )


def _texts(names: Names) -> tuple[str, ...]:
    return (str(names),) if isinstance(names, (str, Path)) else tuple(str(name) for name in names)


def warn(text: str) -> None:
    """Warn at the line outside of this package that asked."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith("workbench."):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)


def _listener(events: Events) -> Listener:
    return Listener(events, warn, warn)


def _compared(found: StoredScores, request: Request) -> ComparedScores:
    """Compare scores, and the second one of a pair with the first one."""
    command = request.eval_command.replace("workbench eval", "workbench report", 1)
    whole = found.compared(command)
    two = found.paired(whole, command)
    rows = [row for row in two.rows if found.pair and row.configuration == found.pair[1]]
    return ComparedScores(whole, found.scores, tuple(found.left_out), found.pair, rows)
