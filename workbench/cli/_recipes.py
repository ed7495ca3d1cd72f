"""Recipes and models named on the command line: resolve them, compare their scores, and name the commands that score a result."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.api.naming import load_named
from workbench.console.output import out
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.project import relative

if TYPE_CHECKING:
    from workbench.api.subjects import Listener
    from workbench.compare.compare import Comparison
    from workbench.compare.swept import Sweep
    from workbench.resolve.resolved import Resolved
    from workbench.scores.store import Scores, ScoreStore


def score_lines(resolved: Resolved, recipe: str, settings: Sequence[str] | None, checkpoint: Path | None = None) -> list[str]:
    """Return the commands that score a recipe's result; an empty list if `eval` would refuse the recipe.

    Args:
        resolved: The recipe.
        recipe: The recipe as named on the command line.
        settings: Values of `--set`.
        checkpoint: The written checkpoint, if plain lm-eval can load it.
    """
    from workbench.models.architecture import is_usual_decoder

    project = resolved.recipe.project
    options = [part for setting in settings or () for part in ("--set", setting)]
    if not is_usual_decoder(resolved.base.config):
        from workbench.models.skeleton import check_decoder

        try:
            check_decoder(resolved.base.config)
        except WorkbenchError:
            return []
    if not resolved.recipe.fields.eval:
        named = next(iter(sorted(f.stem for f in (project / "evals/suites").glob("*.yaml"))), "")
        return [f"score:  {shell('workbench', 'eval', recipe, *options, '--suite', named)}"] if named else []
    from workbench.scores.suite import Suite, load_suite

    named_suites = [item for item in resolved.recipe.fields.eval if isinstance(item, str) and item != "edits"]
    try:
        if len(named_suites) == len(resolved.recipe.fields.eval):
            suites: Sequence[object] = [load_suite(item, project) for item in named_suites]
        else:
            # Only here, because importing the evaluation takes as long as a small merge.
            from workbench.evaluate.plans import suites_of

            suites = suites_of([resolved.recipe], [], project)
    except WorkbenchError:
        return []
    lines = [f"score:  {shell('workbench', 'eval', recipe, *options)}"]
    tasks = next((",".join(suite.tasks) for suite in suites if isinstance(suite, Suite)), None)
    if checkpoint is not None and tasks is not None:
        own = project / "evals" / "tasks"
        place = ["--include_path", os.path.relpath(own)] if own.is_dir() else []
        model = f"pretrained={checkpoint},logits_cache=False,softmax_dtype=float32"
        command = ["lm_eval", "--model", "hf", "--model_args", model, "--batch_size", "32", *place, "--tasks", tasks]
        lines.append(f"        {shell(*command)}")
    return lines


def load(recipe: str, settings: list[str] | None, runs_dir: Path | None, headers_only: bool = False) -> tuple[Resolved, Path]:
    """Load a recipe and resolve its inputs.

    Args:
        recipe: The recipe as named on the command line.
        settings: Values of `--set`.
        runs_dir: Directory of runs; default: runs/ in the project.
        headers_only: Read only headers of hub files, and download nothing.

    Returns:
        The resolved recipe, and the directory of runs.
    """
    from workbench.bricks.hub import Hub
    from workbench.ground.project import runs_of
    from workbench.resolve.resolve import resolve

    loaded = load_named(recipe, settings or (), out.say, runs_dir)
    return resolve(loaded, Hub(headers_only=headers_only, events=out.event)), runs_dir or relative(
        runs_of(loaded.project, writing=True)
    )


def printing() -> Listener:
    """Return the listener that prints on the terminal."""
    from workbench.api.subjects import Listener

    return Listener(out.event, out.say, out.warn)


def command_line() -> str:
    """Return the command line of this process."""
    return shell("workbench", *sys.argv[1:])


def compare_scores(
    store: ScoreStore, scores: list[Scores], baseline: str | None, project: Path, sweeps: Sequence[Sweep] = ()
) -> Comparison:
    """Compare scores, and record the command line that makes the comparison."""
    from workbench.compare.compare import compare

    return compare(store, scores, baseline=baseline, project=project, command=command_line(), sweeps=sweeps)
