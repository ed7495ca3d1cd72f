"""A search from a recipe to its result: controls, candidates, and the test of the winner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from filelock import FileLock

from workbench.evaluate.lineup import LineupEntry
from workbench.evaluate.models import GOLD
from workbench.evaluate.plans import plans, suites_of
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Event, Events, no_events
from workbench.ground.files import json_digest
from workbench.ground.identity import installed
from workbench.ground.project import cache_of
from workbench.models.identity import computed_on, pick_device
from workbench.recipe.recipe import Recipe
from workbench.recipe.space import Values
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.scores.store import ScoreStore
from workbench.search.bench import LAMBDAS, Bench, baselines, cocktail
from workbench.search.clock import Clock, budget_seconds, until_all_end
from workbench.search.halves import Stages, check_halves, guard_of, stages_of, warnings_of
from workbench.search.objective import (
    LEVEL,
    Answers,
    Objective,
    Rival,
    beaten_by,
    estimate,
    front,
    objectives_of,
    only_objectives,
)
from workbench.search.samplers import sampler_name
from workbench.search.space import Space
from workbench.search.study import Arm, Study, Trial, TrialResult


@dataclass(frozen=True)
class Scoring:
    """How candidates are scored.

    Attributes:
        device: auto, cpu, cuda or cuda:N.
        batch_size: Number of requests per batch.
        limit: Maximum number of items per task; None for the suites' own.
    """

    device: str = "auto"
    batch_size: int = 32
    limit: int | None = None


@dataclass
class Search:
    """A search that is checked and ready to run; no model is loaded.

    Attributes:
        recipe: The recipe.
        space: Dimensions of the search.
        objectives: Objectives of the search.
        stages: Search items and test items.
        sampler: Name of the sampler.
        folder: Folder of the study and the result.
        key: Digest of everything that decides scores and draws.
        bench: Scorer of candidates.
        trials: Number of candidates, or None.
        budget: Time limit in seconds, or None.
        limit: Limit of items per task from the command line; None for the suites' own.
        events: Receiver of progress events.
        controls: Scored controls.
        entries: Configurations of the controls by name.
        harmful: Names of the controls that lose too much on a guarded task; they stop no candidate.
        warnings: Warnings on tasks with too few clusters for the test.
    """

    recipe: Recipe
    space: Space
    objectives: list[Objective]
    stages: Stages
    sampler: str
    folder: Path
    key: str
    bench: Bench
    trials: int | None
    budget: float | None
    limit: int | None = None
    events: Events = no_events
    controls: list[Rival] = field(default_factory=list)
    entries: dict[str, LineupEntry] = field(default_factory=dict)
    harmful: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def shown(self, path: Path) -> str:
        """Return a path for display, relative to the project if it is inside."""
        path, project = path.resolve(), self.recipe.project.resolve()
        return str(path.relative_to(project)) if path.is_relative_to(project) else str(path)


def prepare(
    recipe: Recipe,
    runs: Path,
    scoring: Scoring,
    *,
    trials: int | None = None,
    budget: str | None = None,
    events: Events = no_events,
) -> Search:
    """Check a recipe's search and prepare it.

    No model is loaded, except if `eval` scores edited facts and the base's answers are not known yet.

    Args:
        recipe: The recipe.
        runs: Folder of the runs.
        scoring: How candidates are scored.
        trials: Number of candidates; default: the recipe's.
        budget: Time limit such as "30m"; default: the recipe's.
        events: Receiver of progress events.

    Raises:
        WorkbenchError: If the recipe has no search, its search is invalid or cannot run in memory, there is nothing to score, a task has only
            one item.
    """
    device = pick_device(scoring.device)
    space = Space(recipe)
    fields = space.fields
    resolved = _in_memory(recipe)
    entry = LineupEntry(recipe.name, "configuration", resolved)
    score_plans = plans(
        [entry],
        suites_of([recipe], [], recipe.project),
        batch_size=scoring.batch_size,
        limit=scoring.limit,
        device=device,
        events=events,
    )
    if unsupported := [p.suite.suite for p in score_plans if p.suite.backend != "hf"]:
        raise recipe.error(
            ("eval",),
            f"suite '{unsupported[0]}' scores written checkpoints, but a search scores models in memory",
            "Use a suite with `backend: hf`.",
        )
    objectives = objectives_of(recipe, score_plans)
    sampler = sampler_name(space, len(objectives))
    stages = replace(
        stages_of(only_objectives(score_plans, objectives), fields.test, fields.fidelity.items),
        test=stages_of(score_plans, fields.test, fields.fidelity.items).test,
        guard=guard_of(score_plans, fields.test, objectives),
    )
    check_halves(recipe, stages, objectives)
    key = _key(space, resolved, objectives, stages, [sampler, computed_on(device), installed("optuna", "cmaes")])
    folder = runs / "search" / f"{recipe.name}-{key[:8]}"
    store = ScoreStore(cache_of(recipe.project) / "search")
    bench = Bench(recipe, stages, store, device, events)
    candidates = trials if trials is not None else fields.number if budget is None else fields.trials
    time_limit = budget if budget is not None else fields.budget
    return Search(
        recipe,
        space,
        objectives,
        stages,
        sampler,
        folder,
        key,
        bench,
        candidates,
        budget_seconds(time_limit),
        scoring.limit,
        events,
        warnings=warnings_of(stages, objectives),
    )


def _in_memory(recipe: Recipe) -> Resolved:
    """Resolve the recipe as written; raise WorkbenchError if a search cannot build its candidates in memory."""
    if recipe.memory or recipe.router or any(step.verb == "grow" for step in recipe.steps):
        raise recipe.error(
            ("search",),
            "a search replaces the base's weights in memory, but memories, routers and grow steps do more than that",
            "Put the merge with its search into a separate recipe, and use that recipe under `bricks`.",
        )
    resolved = resolve(recipe.without_search())
    if resolved.unties:
        raise recipe.error(
            ("search",),
            f"a search replaces the base's weights in memory, and {resolved.unties[0]} unties the head",
            "Search without that brick, or write a base with an untied head first: `workbench run`.",
        )
    return resolved


def _key(space: Space, resolved: Resolved, objectives: Sequence[Objective], stages: Stages, made_by: list[object]) -> str:
    """Return the digest of a search, which excludes the number of candidates so that a search can be continued."""
    fields = space.fields.model_dump(mode="json", exclude={"trials", "budget", "random", "sampler"})
    fields["fidelity"] |= {"gold": True, "level": LEVEL}  # were fields: keys of earlier searches stay
    return json_digest([3, resolved.key, space.recipe.fields.seed, fields, made_by, [o.name for o in objectives], stages.key])


def run(search: Search) -> None:
    """Score controls and candidates one after another until there are enough or the time is used up.

    Candidates that other processes still score then are waited for.
    """
    study = open_study(search)
    try:
        with Clock(search.folder, search.budget) as clock:
            with FileLock(search.folder / "controls.lock"):  # a second process waits and finds them in the store
                score_controls(search)
            begin(search, study, clock)
            until_all_end(study, clock, search.events, partial(_score_arms, search, study, clock))
    finally:
        study.close()


def _score_arms(search: Search, study: Study, clock: Clock) -> None:
    """Score candidates until none is left to start or the time is used up."""
    for arm, most in arms(search):
        while not clock.over() and (trial := study.claim(arm, most)) is not None:
            started = time.perf_counter()
            attempt = attempted(search, candidate(search, trial.name, trial.values), rivals(search, study))
            keep(search, study, clock, trial, attempt, time.perf_counter() - started)


def open_study(search: Search) -> Study:
    """Open the study of a search on disk."""
    study = Study(
        search.folder,
        search.space,
        sampler=search.sampler,
        objectives=len(search.objectives),
        key=search.key,
        lambdas=LAMBDAS,
    )
    study.guarded = bool(search.stages.guard)
    return study


def begin(search: Search, study: Study, clock: Clock) -> None:
    """Mark the start of the first candidate, and tell how many candidates of earlier calls count."""
    clock.begin()
    if earlier := len(study.finished()):
        search.events({"stage": "search", "text": f"candidates that earlier calls finished: {earlier}"})


def number_of_candidates(search: Search) -> int | None:
    """Return the number of candidates of both arms; None if only the time limits them."""
    return None if search.trials is None else search.trials + search.space.fields.random


def arms(search: Search) -> list[tuple[Arm, int | None]]:
    """Return the arms with their numbers of candidates; the random arm comes first if only the time limits the sampler's."""
    order: list[tuple[Arm, int | None]] = [("search", search.trials), ("random", search.space.fields.random)]
    return order if search.trials else order[::-1]


def score_controls(search: Search) -> None:
    """Score the controls on all search items; stored scores are reused."""
    entries = controls(search)
    for number, entry in enumerate(entries, 1):
        search.events({"stage": "search", "text": f"control {number}/{len(entries)}: {entry.name}"})
        add_control(search, entry, search.bench.score(entry).answers)
    if mixed := mixture(search):
        add_control(search, mixed, search.bench.score(mixed).answers)


def controls(search: Search) -> list[LineupEntry]:
    """Return the controls except `mixture`; only the base if the recipe disables controls."""
    entries = baselines(search.space)
    return entries if search.space.fields.controls else entries[:1]


def mixture(search: Search) -> LineupEntry | None:
    """Return the control whose weights come from the bricks' scores; None if controls are disabled or the scores are missing."""
    answers = {rival.name: rival.answers for rival in search.controls}
    return cocktail(search.recipe, answers, search.objectives, GOLD) if search.space.fields.controls else None


def add_control(search: Search, entry: LineupEntry, answers: Answers) -> None:
    """Add a control that was scored on all search items."""
    search.entries[entry.name] = entry
    search.controls.append(Rival.of(entry.name, answers, search.objectives))
    if any(loss.harmful for loss in search.bench.losses(answers)):
        search.harmful.add(entry.name)


@dataclass(frozen=True)
class Attempt:
    """The outcome of a candidate: scores (None if it failed), its record, and its answers if it was scored on all search items."""

    scores: list[float] | None
    result: TrialResult
    answers: Answers | None = None


def attempted(search: Search, entry: LineupEntry, known: Sequence[Rival]) -> Attempt:
    """Score a candidate until a rival beats it or it is scored on all search items."""
    beaten: list[Rival] = []

    def stop(stage: int, answers: Answers) -> bool:
        rival = beaten_by(answers, known, search.objectives, gold=stage == 0)
        beaten[:] = [rival] if rival else []
        return rival is not None

    try:
        outcome = search.bench.score(entry, stop)
    except WorkbenchError as error:
        return Attempt(None, {"error": error.message, "stopped": False, "seconds": {}})
    result: TrialResult = {
        "digest": outcome.digest,
        "stage": outcome.stage,
        "stopped": outcome.stopped,
        "items": outcome.answers.items,
        "beaten_by": beaten[0].name if outcome.stopped else None,
        "seconds": {k: round(v, 3) for k, v in outcome.seconds.items()},
    }
    if outcome.stopped:
        return Attempt(estimate(outcome.answers, beaten[0], search.objectives), result)
    if found := search.bench.losses(outcome.answers):
        result["guarded"] = [loss.to_dict() for loss in found]
    return Attempt([outcome.answers.value(objective) for objective in search.objectives], result, outcome.answers)


def rivals(search: Search, study: Study) -> list[Rival]:
    """Return the configurations that can stop a new candidate: the Pareto front of controls and complete candidates, without harmful ones."""
    return front([*(c for c in search.controls if c.name not in search.harmful), *finished(search, study)])


def keep(search: Search, study: Study, clock: Clock, trial: Trial, attempt: Attempt, seconds: float) -> None:
    """Record a candidate's scores in the study and send a progress event."""
    attempt.result["seconds"]["all"] = round(seconds, 3)
    study.finish(trial, attempt.scores, attempt.result)
    clock.tick()
    tell(search, study, clock)


def candidate(search: Search, name: str, values: Values) -> LineupEntry:
    """Return a candidate as a configuration."""
    recipe = search.space.recipe_of(values, f"{search.recipe.name}-{name}")
    return LineupEntry(recipe.name, "configuration", resolve(recipe))


def finished(search: Search, study: Study, *arms: Arm) -> list[Rival]:
    """Return the candidates that were scored on all search items and lose no more than the tolerance on each guarded task."""
    complete = []
    for record in study.finished(*arms):
        if record.scores is None or record.digest is None or record.stopped or record.harmful:
            continue
        if answers := search.bench.answers(record.digest):
            complete.append(Rival(record.name, answers, tuple(record.scores)))
    return complete


def tell(search: Search, study: Study, clock: Clock) -> None:
    """Send an event with the last candidate, the best one so far, the remaining time and the number of finished candidates."""
    done = study.finished()
    total = number_of_candidates(search)
    last = done[-1]
    scores = (
        "failed"
        if last.scores is None
        else ", ".join(f"{o.shown(v):.3f}" for o, v in zip(search.objectives, last.scores, strict=True))
    )
    marks = " (stopped early)" if last.stopped else " (loses too much on a guarded task)" if last.harmful else ""
    best = front([*search.controls, *finished(search, study)])
    text = f"{last.name}: {scores}{marks}; best {_best(search, best)}"
    if left := clock.left(len(done), total):
        text += f"; {left} left"
    event: Event = {"stage": "search", "text": text}
    search.events({**event, "done": len(done), "total": total} if total else event)


def _best(search: Search, best: Sequence[Rival]) -> str:
    if len(search.objectives) > 1:
        return f"front of {len(best)}"
    (first,) = best[:1]
    return f"{search.objectives[0].shown(first.scores[0]):.3f} ({first.name})"
