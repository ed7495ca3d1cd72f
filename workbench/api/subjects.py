"""Open what is scored or compared: recipes, models and imported runs, with controls, suites and plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.api.naming import Named, Variation, find, open_named
from workbench.ground.errors import LeftOut, UsageError, WorkbenchError, shell
from workbench.ground.events import Events, no_events

if TYPE_CHECKING:
    import torch

    from workbench.compare.swept import Sweep
    from workbench.evaluate.cluster import Subjects
    from workbench.evaluate.lineup import LineupEntry
    from workbench.recipe.recipe import Recipe
    from workbench.scores.plan import ScorePlan
    from workbench.scores.store import Scores, ScoreStore
    from workbench.scores.suite import Suite


@dataclass(frozen=True)
class Request:
    """The recipes and models that a user asks to score or to compare, and how.

    Attributes:
        names: Recipes, models or imported runs.
        vary: Overrides and sweeps of the recipes.
        suites: Suites, by name or file, in the place of the recipes' `eval`.
        runs: Directory of runs; default: runs/ in the project.
        controls: Add the base, each brick alone, their average, and an edit's facts in the prompt.
        batch_size: Requests per forward pass; part of the plan.
        limit: Items per task; part of the plan.
        wait: Seconds to wait for another process that scores the same; None: until it ends.
    """

    names: Sequence[str]
    vary: Variation = field(default_factory=Variation)
    suites: Sequence[str] = ()
    runs: Path | None = None
    controls: bool = True
    batch_size: int = 32
    limit: int | None = None
    wait: float | None = None

    @property
    def eval_command(self) -> str:
        """The `workbench eval` command that makes these scores."""
        options = [part for suite in self.suites for part in ("--suite", suite)] + self.vary.options
        options += ["--limit", str(self.limit)] if self.limit else []
        options += ["--batch-size", str(self.batch_size)] if self.batch_size != 32 else []
        return shell("workbench", "eval", *(dict.fromkeys(self.names) or ["RECIPE"]), *options)


def _silent(_text: str) -> None:
    pass


@dataclass(frozen=True)
class Listener:
    """Who is told what happens.

    Attributes:
        events: Receives progress.
        say: Receives messages.
        warn: Receives warnings.
    """

    events: Events = no_events
    say: Callable[[str], None] = _silent
    warn: Callable[[str], None] = _silent


@dataclass(frozen=True)
class Opened:
    """Configurations to score or compare, and everything that this needs.

    Attributes:
        entries: Configurations, controls first.
        plans: One plan per suite.
        store: The score store.
        project: Project whose recipes, suites and tasks are used.
        runs: Directory of runs.
        aliases: A model as the user names it -> its name.
        left_out: Configurations that are skipped, with reasons.
        sweeps: Sweeps whose points are among the configurations.
    """

    entries: list[LineupEntry]
    plans: list[ScorePlan]
    store: ScoreStore
    project: Path
    runs: Path
    aliases: dict[str, str]
    left_out: list[LeftOut]
    sweeps: tuple[Sweep, ...] = ()

    def baseline(self, asked: str | None) -> str | None:
        """Return the baseline's name: the given one, None if the suite decides (a base is scored), else the first model's.

        Args:
            asked: Value of `--baseline`.
        """
        if asked:
            return self.aliases.get(asked, asked)
        return None if any(entry.role == "base" for entry in self.entries) else self.entries[0].name

    def scored(self, device: str, server: str | None, events: Events = no_events) -> list[Scores]:
        """Score all configurations in this process; `device` and `server` are the values of the options."""
        from workbench.evaluate.scoring import score_all
        from workbench.models.identity import pick_device

        target = pick_device(device)
        return score_all(self.entries, self.plans, self.store, device=target, events=events, runs=self.runs, server=server)

    def scored_on_cluster(
        self, request: Request, device: str, server: str | None, workers: int | None, events: Events = no_events
    ) -> list[Scores]:
        """Score all configurations on a Ray cluster, whose workers open the same request."""
        from workbench.evaluate.cluster import score_on_cluster

        return score_on_cluster(partial(_on_worker, request, device, server), self.on(device, server), workers, events)

    def on(self, device: str, server: str | None) -> Subjects:
        """Return what a worker of a cluster needs, with the values of `--device` and `--server`."""
        from workbench.evaluate.cluster import Subjects

        return Subjects(self.entries, self.plans, self.store, self.runs, device, server)

    def pair(self, names: Sequence[str]) -> tuple[str, str] | None:
        """Return the names of the two configurations that a command names, in its order; None if these are not exactly two.

        Args:
            names: Recipes and models as the user names them.
        """
        named = [entry.name for entry in self.entries if entry.role == "configuration"]
        recipes = iter([name for name in named if name not in self.aliases.values()])
        arguments = list(dict.fromkeys(names))
        if len(named) != 2 or len(arguments) != 2:
            return None
        first, second = (self.aliases[name] if name in self.aliases else next(recipes) for name in arguments)
        return first, second


def open_subjects(
    request: Request,
    listener: Listener = Listener(),
    *,
    lenient: bool = False,
    fetch: bool = False,
    device: torch.device | None = None,
    skip: bool = False,
) -> Opened:
    """Open recipes and models, their controls, the plans of their suites and the score store.

    Args:
        request: What is asked for.
        listener: Who is told what happens.
        lenient: Skip recipes whose inputs are missing, or whose base or dtype differs from that of most recipes with suites.
        fetch: Download inputs from the hub; not needed to look up stored scores.
        device: Device on which the base may answer prompts; not needed to look up stored scores.
        skip: Skip invalid recipes and, unless `lenient` is set, recipes whose inputs are missing.

    Raises:
        WorkbenchError: If an argument is neither a recipe nor a model, or if no recipe remains.
    """
    from workbench.bricks.hub import Hub
    from workbench.evaluate.facts.wanted import Wanted
    from workbench.evaluate.lineup import lineup
    from workbench.evaluate.plans import plans, recorded_plans, suites_of
    from workbench.ground.project import find_project, runs_of
    from workbench.scores.store import ScoreStore
    from workbench.scores.suite import Suite

    names, vary = request.names, request.vary
    found = [_found(name, request) for name in dict.fromkeys(names)]
    references = [one.name for one in found if one.kind != "recipe"]
    left_out: list[LeftOut] = []
    wanted = [one for one in found if one.kind == "recipe"]
    loaded, sweeps = _loaded(wanted, vary, listener, left_out if skip else None)
    if skip and not lenient:
        loaded = _with_inputs(loaded, left_out)
    if left_out and not loaded and not references:
        raise _none_left(left_out)
    if lenient:
        loaded = _comparable(loaded, listener)
    vary.check_used(bool(loaded))
    project = loaded[0].project if loaded else find_project()
    hub = Hub(headers_only=not fetch, events=listener.events)
    models = {reference: open_named(reference, runs=request.runs, project=project, hub=hub) for reference in references}
    chosen = suites_of(loaded, list(request.suites), project)
    entries = lineup(
        loaded,
        request.controls,
        hub,
        models.values(),
        sequences=not request.suites,
        left_out=left_out,
        facts=[suite for suite in chosen if isinstance(suite, Wanted)],
    )
    for one in left_out:
        listener.warn(f"left out: {one.name} ({one.reason})")
    entries = _writable(entries, [suite for suite in chosen if isinstance(suite, Suite)], listener)
    runs = request.runs or runs_of(project)
    aliases = {reference: model.name for reference, model in models.items()}
    store = ScoreStore(runs / "scores", request.wait)
    if not fetch and find_spec("lm_eval") is None:
        listener.warn("lm-eval is not installed: whether the tasks and data of the suites have changed since is not known")
        score_plans = recorded_plans(entries, chosen, request.limit, store)
    else:
        planned = partial(plans, entries, chosen, batch_size=request.batch_size, limit=request.limit)
        score_plans = planned(device=device, events=listener.events, lenient=lenient)
    return Opened(entries, score_plans, store, project, runs, aliases, left_out, tuple(sweeps))


def refuse_left_out(left_out: list[LeftOut]) -> None:
    """Raise an error if configurations were skipped.

    Raises:
        WorkbenchError: If `left_out` is not empty.
    """
    if left_out:
        names = ", ".join(dict.fromkeys(one.name for one in left_out))
        hints = dict.fromkeys(one.hint for one in left_out if one.hint)
        raise WorkbenchError(f"left out: {names}", "; ".join(hints) or None)


def _writable(entries: list[LineupEntry], suites: Sequence[Suite], listener: Listener) -> list[LineupEntry]:
    """Return the configurations without the control `memory` if a suite needs written checkpoints, which cannot hold a memory."""
    backend = next((suite for suite in suites if suite.backend != "hf"), None)
    names = [entry.name for entry in entries if entry.role == "memory"]
    if backend is None or not names:
        return entries
    listener.say(
        f"not scored: {', '.join(names)} (suite {backend.suite} has `backend: {backend.backend}`, which needs a checkpoint)"
    )
    return [entry for entry in entries if entry.role != "memory"]


def _on_worker(request: Request, device: str, server: str | None) -> Subjects:
    from workbench.models.identity import pick_device

    return open_subjects(request, fetch=True, device=pick_device(device)).on(device, server)


def _found(name: str, request: Request) -> Named:
    """Return what a name means."""
    try:
        return find(name, request.runs)
    except UsageError as error:
        imported = "Imported runs need their suite too: --suite NAME. `workbench scores ls` lists stored scores."
        raise error.reworded(error.message, f"{error.hint} {imported}") from None


def _loaded(
    names: Sequence[Named], vary: Variation, listener: Listener, left_out: list[LeftOut] | None
) -> tuple[list[Recipe], list[Sweep]]:
    """Load recipes and expand their sweeps."""
    recipes: list[Recipe] = []
    sweeps = []
    for named in names:
        path = named.path or Path(named.name)
        try:
            expanded, sweep = vary.recipes(named.name, listener.say)
        except WorkbenchError as error:
            if left_out is None or not path.is_file():
                raise
            left_out.append(LeftOut(path.stem, error.message.splitlines()[0], f"workbench recipe check {shell(path)}", error))
            continue
        recipes += expanded
        sweeps += [sweep] if sweep else []
    return recipes, sweeps


def _with_inputs(recipes: list[Recipe], left_out: list[LeftOut]) -> list[Recipe]:
    """Return the recipes whose inputs exist, and add the others to `left_out`."""
    from workbench.bricks.hub import HEADERS
    from workbench.resolve.resolve import resolve

    complete = []
    for recipe in recipes:
        try:
            resolve(recipe, HEADERS)
            complete.append(recipe)
        except WorkbenchError as error:
            left_out.append(LeftOut(recipe.name, error.message.splitlines()[0], error.hint, error))
    return complete


def _none_left(left_out: list[LeftOut]) -> WorkbenchError:
    """Return the error of a command whose recipes are all skipped: the error of the first one."""
    first = left_out[0].error or WorkbenchError(f"{left_out[0].name}: {left_out[0].reason}", left_out[0].hint)
    more = f"\nevery recipe is left out: {', '.join(one.name for one in left_out)}" if len(left_out) > 1 else ""
    return first.reworded(first.message + more, first.hint)


def _comparable(recipes: list[Recipe], listener: Listener) -> list[Recipe]:
    """Return the recipes whose inputs exist, of the base and dtype that most recipes with suites have; tell which are left out, and why."""
    from workbench.bricks.hub import HEADERS
    from workbench.evaluate.plans import scored_dtype
    from workbench.resolve.resolve import resolve

    kept: dict[tuple[str, str], list[Recipe]] = {}
    for recipe in recipes:
        try:
            resolved = resolve(recipe, HEADERS)
            kept.setdefault((resolved.base_digest, scored_dtype(resolved)), []).append(recipe)
        except WorkbenchError as error:
            listener.say(f"left out: {recipe.name} ({error.message.splitlines()[0]})")
    first, *others = sorted(kept.values(), key=lambda group: -sum(bool(recipe.fields.eval) for recipe in group)) or [[]]
    for recipe in (recipe for group in others for recipe in group):
        listener.say(f"left out: {recipe.name} (another base or output dtype than {first[0].name})")
    if not first:
        raise WorkbenchError("no recipe has all its inputs", "`workbench plan RECIPE` says what is missing.")
    return first


def imported_scores(request: Request) -> tuple[list[Scores], ScoreStore, Path] | None:
    """Return scores that `scores import` stored under the suite that is asked for, the score store and the project.

    Args:
        request: Names of imported configurations, the first one first, or none for all that were imported with the newest one; and
            their suite.

    Returns:
        None if no suite of the request holds imported scores.

    Raises:
        WorkbenchError: If it names several suites.
    """
    from workbench.ground.project import find_project, runs_of
    from workbench.scores.imported import find_imported, imported_suites
    from workbench.scores.store import ScoreStore

    suite = request.suites
    project = find_project()
    store = ScoreStore((request.runs or runs_of(project)) / "scores")
    known = imported_suites(store)
    if not suite or not any(name in known for name in suite):
        return None
    if len(suite) > 1:
        raise UsageError(
            f"--suite {' --suite '.join(suite)}: imported runs can be compared on one suite at a time", "Name one suite."
        )
    return find_imported(store, suite[0], list(request.names)), store, project
