"""A search from a recipe to its result: controls, candidates, and the test of the winner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from workbench.errors import WorkbenchError
from workbench.evaluate.lineup import LineupEntry
from workbench.evaluate.plans import plans
from workbench.evaluate.resident import GOLD
from workbench.evaluate.suitechoice import suites_of
from workbench.events import Events, no_events
from workbench.files import json_digest
from workbench.project import CACHE
from workbench.recipe.recipe import Recipe
from workbench.recipe.search_fields import seconds
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.scores.plan import ScorePlan
from workbench.scores.store import ScoreStore
from workbench.search.baselines import LAMBDAS, baselines, cocktail
from workbench.search.bench import Bench
from workbench.search.clock import Clock
from workbench.search.halves import Stages, stages_of, warnings_of
from workbench.search.objective import Answers, Objective, objectives_of
from workbench.search.race import Rival, beaten_by, estimate, front
from workbench.search.samplers import sampler_name
from workbench.search.space import Space, Values
from workbench.search.study import Arm, Study, Trial, check_storage


@dataclass
class Search:
    """A search that is ready to run: everything is checked, nothing is loaded.

    Attributes:
        recipe, space, objectives: What is searched, and what for.
        stages: Items that candidates see, and those of the test.
        sampler: The sampler's name.
        folder: Where the study and the result lie.
        key: Digest of what decides scores and draws.
        bench: Where candidates are scored.
        trials, budget: How long: candidates, seconds.
        limit: Items of a task that the call was given; None: the suites' own.
        warnings: What the test will not be able to say.
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
    storage: Path | None = None
    events: Events = no_events
    controls: list[Rival] = field(default_factory=list)
    entries: dict[str, LineupEntry] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def level(self) -> float:
        """Error rate of the intervals that give a candidate up."""
        return self.space.fields.fidelity.level

    def shown(self, path: Path) -> str:
        """A path as people call it: from the project, where it lies in it."""
        path, project = path.resolve(), self.recipe.project.resolve()
        return str(path.relative_to(project)) if path.is_relative_to(project) else str(path)


def prepare(
    recipe: Recipe, *, runs: Path, device: torch.device, batch_size: int = 32, limit: int | None = None, trials: int | None = None,
    budget: str | None = None, storage: Path | None = None, events: Events = no_events,
) -> Search:  # fmt: skip
    """Check a recipe's search. No model is loaded, unless `eval` asks for facts whose base answers are not known.

    Errors: no search, a dimension, sampler or objective that does not exist, an empty range, steps that cannot be searched, a storage
    of another search, nothing to score, a task of one item.
    """
    space = Space(recipe)
    fields = space.fields
    if recipe.memory or any(step.verb == "grow" for step in recipe.steps):
        raise recipe.error(("search",), "memories and growth make models of other shapes, and candidates take the base's place in memory",
                           "Search the merge in a recipe of its own, and name that under `bricks`.")  # fmt: skip
    resolved = resolve(recipe.without_search())
    if resolved.unties:
        raise recipe.error(("search",), f"{resolved.unties[0]} unties the head, and candidates take the base's place in memory",
                           "Search without that brick, or bake the untied head into the base: `workbench run` writes it.")  # fmt: skip
    entry = LineupEntry(recipe.name, "configuration", resolved)
    made = plans(
        [entry], suites_of([recipe], [], recipe.project), batch_size=batch_size, limit=limit, device=device, events=events
    )
    if written := [p.suite.suite for p in made if p.suite.backend != "hf"]:
        raise recipe.error(
            ("eval",),
            f"suite '{written[0]}' scores written checkpoints, a search scores in memory",
            "Use a suite with `backend: hf`.",
        )
    objectives = objectives_of(recipe, made)
    sampler = sampler_name(space, len(objectives))
    stages = replace(
        stages_of(_asked(made, objectives), fields.test, fields.fidelity.items),
        test=stages_of(made, fields.test, fields.fidelity.items).test,
    )
    _check_halves(recipe, stages, objectives)
    key = _key(space, resolved, objectives, stages, sampler)
    folder = runs / "search" / f"{recipe.name}-{key[:8]}"
    if storage is not None:
        check_storage(storage, key)
    store = ScoreStore(recipe.project / CACHE / "search")
    bench = Bench(recipe, stages, store, device, events, fields.fidelity.gold)
    given = trials if trials is not None else fields.number if budget is None else fields.trials
    limit_s = budget if budget is not None else fields.budget
    return Search(
        recipe,
        space,
        objectives,
        stages,
        sampler,
        folder,
        key,
        bench,
        given,
        _duration(limit_s),
        limit,
        storage,
        events,
        warnings=warnings_of(stages, objectives),
    )


def _check_halves(recipe: Recipe, stages: Stages, objectives: Sequence[Objective]) -> None:
    """Raises WorkbenchError where a task of an objective has too few items for two halves."""
    for key in dict.fromkeys(term.key for objective in objectives for term in objective.terms):
        halves = stages.halves(*key)
        if not all(halves.values()):
            number = sum(map(len, halves.values()))
            raise recipe.error(
                ("search", "objective"),
                f"task '{key[1]}' has {number} item{'' if number == 1 else 's'}, and a search needs one to search and one to test",
                "Score more items, or name another objective.",
            )


def _duration(text: str | None) -> float | None:
    try:
        return None if text is None else seconds(text)
    except ValueError as error:
        raise WorkbenchError(f"--budget {text}: {error}", "--budget 30m", 2) from None


def _asked(made: Sequence[ScorePlan], objectives: Sequence[Objective]) -> list[ScorePlan]:
    """The plans' tasks that some objective looks at."""
    keys = {term.key for objective in objectives for term in objective.terms}
    found = []
    for plan in made:
        tasks = tuple(task for task in plan.suite.tasks if (plan.suite.suite, task) in keys)
        if tasks:
            suite = plan.suite.model_copy(update={"tasks": tasks, "contrasts": {}})
            found.append(replace(plan, suite=suite, items={task: plan.items[task] for task in tasks}))
    return found


def _key(space: Space, resolved: Resolved, objectives: Sequence[Objective], stages: Stages, sampler: str) -> str:
    """Not of how many candidates there are: a search can go on for longer."""
    fields = space.fields.model_dump(mode="json", exclude={"trials", "budget", "random", "sampler"})
    return json_digest([2, resolved.key, space.recipe.fields.seed, fields, sampler, [o.name for o in objectives], stages.key])


def run(search: Search) -> None:
    """Score controls and candidates, one after the other, until there are enough or the time is used up."""
    study = open_study(search)
    try:
        with Clock(search.folder, search.budget) as clock:
            with FileLock(search.folder / "controls.lock"):  # a second process finds them scored
                score_controls(search)
            clock.begin()
            for arm, most in arms(search):
                while not clock.over() and (trial := study.claim(arm, most)) is not None:
                    started = time.perf_counter()
                    attempt = attempted(search, candidate(search, trial.name, trial.values), rivals(search, study))
                    keep(search, study, clock, trial, attempt, time.perf_counter() - started)
    finally:
        study.close()


def open_study(search: Search) -> Study:
    """The study of a search, on disk."""
    return Study(search.folder, search.space, sampler=search.sampler, objectives=len(search.objectives), seed=search.recipe.fields.seed,
                 key=search.key, storage=search.storage, lambdas=LAMBDAS)  # fmt: skip


def arms(search: Search) -> list[tuple[Arm, int | None]]:
    """What is drawn how often: by the sampler, then at random; the random arm first where the sampler's ends with the time alone."""
    found: list[tuple[Arm, int | None]] = [("search", search.trials), ("random", search.space.fields.random)]
    return found if search.trials else found[::-1]


def score_controls(search: Search) -> None:
    """Score what needs no search on all search items; what the store has is not scored again."""
    wanted = controls(search)
    for number, entry in enumerate(wanted, 1):
        search.events({"stage": "search", "text": f"control {number}/{len(wanted)}: {entry.name}"})
        add_control(search, entry, search.bench.score(entry).answers)
    if mixed := mixture(search):
        add_control(search, mixed, search.bench.score(mixed).answers)


def controls(search: Search) -> list[LineupEntry]:
    """The controls of a search but for the one that is made from others' scores; the base alone where none are wanted."""
    found = baselines(search.space)
    return found if search.space.fields.controls else found[:1]


def mixture(search: Search) -> LineupEntry | None:
    """The mean of the bricks weighted by what the controls have scored; None where controls are not wanted or nothing tells."""
    seen = {rival.name: rival.answers for rival in search.controls}
    return cocktail(search.recipe, seen, search.objectives, GOLD) if search.space.fields.controls else None


def add_control(search: Search, entry: LineupEntry, answers: Answers) -> None:
    """Keep a control that has seen all search items."""
    search.entries[entry.name] = entry
    search.controls.append(Rival.of(entry.name, answers, search.objectives))


@dataclass(frozen=True)
class Attempt:
    """What became of a candidate: its scores (None: it could not be scored), what is kept of it, and its answers where it has seen all items."""

    scores: list[float] | None
    result: dict[str, Any]
    answers: Answers | None = None


def attempted(search: Search, entry: LineupEntry, known: Sequence[Rival]) -> Attempt:
    """Score a candidate until it falls behind one of the rivals or has seen all search items."""
    beaten: list[Rival] = []

    def stop(stage: int, answers: Answers) -> bool:
        gold = search.bench.gold and stage == 0
        found = beaten_by(answers, known, search.objectives, search.level, gold)
        beaten[:] = [found] if found else []
        return found is not None

    try:
        seen = search.bench.score(entry, stop)
    except WorkbenchError as error:
        return Attempt(None, {"error": error.message, "stopped": False, "seconds": {}})
    result = {
        "digest": seen.digest, "stage": seen.stage, "stopped": seen.stopped, "items": seen.answers.items,
        "beaten_by": beaten[0].name if seen.stopped else None, "seconds": {k: round(v, 3) for k, v in seen.seconds.items()},
    }  # fmt: skip
    if seen.stopped:
        return Attempt(estimate(seen.answers, beaten[0], search.objectives), result)
    return Attempt([seen.answers.value(objective) for objective in search.objectives], result, seen.answers)


def rivals(search: Search, study: Study) -> list[Rival]:
    """What a new candidate has to keep up with."""
    return front([*search.controls, *finished(search, study)])


def keep(search: Search, study: Study, clock: Clock, trial: Trial, attempt: Attempt, seconds: float) -> None:
    """Put a candidate's scores into the study, and tell how it stands."""
    attempt.result["seconds"]["all"] = round(seconds, 3)
    study.finish(trial, attempt.scores, attempt.result)
    clock.tick()
    tell(search, study, clock)


def candidate(search: Search, name: str, values: Values) -> LineupEntry:
    """A candidate as a configuration."""
    recipe = search.space.recipe_of(values, f"{search.recipe.name}-{name}")
    return LineupEntry(recipe.name, "configuration", resolve(recipe))


def finished(search: Search, study: Study, *arms: Arm) -> list[Rival]:
    """Candidates that have seen all search items."""
    found = []
    for record in study.finished(*arms):
        if record["scores"] is not None and not record["stopped"] and (answers := search.bench.answers(record["digest"])):
            found.append(Rival(record["name"], answers, tuple(record["scores"])))
    return found


def tell(search: Search, study: Study, clock: Clock) -> None:
    """An event: how many candidates are done, the best so far, the time left."""
    done = study.finished()
    total = None if search.trials is None else search.trials + search.space.fields.random
    last = done[-1]
    shown = (
        "failed"
        if last["scores"] is None
        else ", ".join(f"{o.shown(v):.3f}" for o, v in zip(search.objectives, last["scores"], strict=True))
    )
    head = f"{last['name']}: {shown}{' (given up)' if last.get('stopped') else ''}"
    best = front([*search.controls, *finished(search, study)])
    text = f"{head}; best {_best(search, best)}"
    if left := clock.left(len(done), total):
        text += f"; {left} left"
    event: dict[str, Any] = {"stage": "search", "text": text}
    search.events({**event, "done": len(done), "total": total} if total else event)


def _best(search: Search, best: Sequence[Rival]) -> str:
    if len(search.objectives) > 1:
        return f"front of {len(best)}"
    (first,) = best[:1]
    return f"{search.objectives[0].shown(first.scores[0]):.3f} ({first.name})"
