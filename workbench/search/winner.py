"""The document of a search, which `search --json` prints and reports show."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from workbench.compare.compare import compare
from workbench.compare.comparison import Comparison
from workbench.evaluate.lineup import LineupEntry
from workbench.ground import yamldoc
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.files import write_bytes
from workbench.recipe.space import Values
from workbench.scores.store import Configuration
from workbench.search.objective import Answers, Gap, Objective, Rival, front, gap
from workbench.search.result import (
    RESULT,
    CandidateVerdict,
    ControlRow,
    GrowingSearch,
    ObjectiveRow,
    SearchProgress,
    SearchResult,
    SearchState,
    SearchTest,
    ShownGap,
    TestedPart,
    TestedRow,
    TrialRow,
    Unbeaten,
)
from workbench.search.run import Search, candidate, finished, number_of_candidates, open_study
from workbench.search.study import Study


def document(search: Search, study: Study, tested: Sequence[Tested], recipes: Mapping[str, str]) -> SearchResult:
    """Return the result of a finished search.

    Args:
        search: The search.
        study: Its candidates.
        tested: Configurations that were scored on test items; controls first.
        recipes: File of the recipe by candidate, relative to the project.
    """
    winners = [t.name for t in tested if t.part == "found"]
    best = _best_control(search)
    several = len(search.objectives) > 1
    ended = {
        "winner": winners[0] if winners and not several else None,
        "recipes": dict(recipes),
        "unbeaten": None if winners else _unbeaten(search, tested),
        "front": winners if several else None,
        "guarded": list(_harm(search, study, tested)) if search.stages.guard else None,
        "test": _test(search, tested, best.name),
    }
    return SearchResult.model_validate({**dict(_state(search, study)), **ended})


def growing(search: Search, study: Study) -> GrowingSearch:
    """Return a search in progress, of which at least one control is scored."""
    progress = SearchProgress(done=len(study.finished()), total=number_of_candidates(search))
    return GrowingSearch.model_validate({**dict(_state(search, study)), "progress": progress})


def _best_control(search: Search) -> Rival:
    """Return the control that is best on search items; no test item is used."""
    return max(search.controls, key=lambda rival: sum(rival.scores))


def _state(search: Search, study: Study) -> SearchState:
    """Return what does not need test items: the search itself, its controls and its candidates."""
    best = _best_control(search)
    several = len(search.objectives) > 1
    return SearchState(
        version=1,
        name=search.recipe.name,
        key=search.key,
        directory=search.shown(search.folder),
        command=_command(search),
        sampler=search.sampler,
        seed=search.recipe.fields.seed,
        objectives=[
            ObjectiveRow(name=o.name, lower=o.lower, terms=[[*t.key, t.metric] for t in o.terms], **search.stages.counts(o))
            for o in search.objectives
        ],
        space={name: search.space.fields.space[name] for name in search.space.names},
        items=search.stages.items,
        stages=[sum(len(items) for plan in stage for items in plan.items.values()) for stage in search.stages.search],
        controls=[
            ControlRow(
                name=rival.name,
                role=search.entries[rival.name].role,
                scores=_shown(search.objectives, rival.scores),
                intervals=_intervals(search, best, rival.answers),
            )
            for rival in search.controls
        ],
        trials=[_trial(search, best, record) for record in study.finished()],
        importances=dict(zip([o.name for o in search.objectives], study.importances(), strict=True)),
        winner=None,
        recipes={},
        best_control=best.name,
        front=[] if several else None,
        hypervolume=hypervolumes(search, study) if several else None,
        warnings=list(search.warnings),
    )


def _harm(search: Search, study: Study, tested: Sequence[Tested]) -> Iterator[str]:
    """Yield what the search and the test found on guarded tasks: excluded candidates and controls, then each winner's verdicts."""
    excluded = [*sorted(search.harmful), *(record.name for record in study.finished() if record.harmful)]
    if excluded:
        names = ", ".join(excluded)
        yield f"Lose more than the tolerance on a guarded task, on search items, and cannot win: {names}."
    winners = [t for t in tested if t.part == "found"]
    if not winners:
        return
    for row in _compared(search, [next(t for t in tested if t.name == "base"), *winners], "base").rows:
        if row.guarded and row.verdict not in ("safe", "no item changed"):
            limit = "" if row.tolerance is None else f", tolerance {row.tolerance:g}"
            yield (
                f"{row.configuration} is {row.verdict} on the guarded task '{row.task}', on test items against the base "
                f"({row.diff:+.3g}{limit})."
            )


def _unbeaten(search: Search, tested: Sequence[Tested]) -> list[Unbeaten]:
    """Return the best control or random candidate, or their Pareto front, for a search without a winner."""
    by_name = {t.rival.name: t for t in tested}
    return [
        Unbeaten(
            name=rival.name,
            role=search.entries[rival.name].role if by_name[rival.name].part == "control" else "random",
            search=_shown(search.objectives, rival.scores),
            test=_shown(search.objectives, [by_name[rival.name].answers.value(o) for o in search.objectives]),
        )
        for rival in front(t.rival for t in tested)
    ]


def _command(search: Search) -> str | None:
    """Return the command line that runs this search again, or None for a recipe without a file."""
    recipe = search.recipe
    if recipe.path is None:
        return None
    limit = [] if search.limit is None else ["--limit", str(search.limit)]
    settings = [part for setting in recipe.settings for part in ("--set", setting)]
    return shlex.join(["workbench", "search", search.shown(recipe.path), *settings, *limit])


def _trial(search: Search, best: Rival, record: TrialRow) -> TrialRow:
    """Return a candidate's record with scores in the direction of their metrics, and with intervals if it is scored on all items."""
    if record.scores is None:
        return record
    shown: dict[str, object] = {"scores": _shown(search.objectives, record.scores)}
    if record.complete and record.digest and (answers := search.bench.answers(record.digest)):
        shown["intervals"] = _intervals(search, best, answers)
    return record.model_copy(update=shown)


def _intervals(search: Search, best: Rival, answers: Answers) -> list[list[float] | None]:
    """Return for every objective the best control's score plus the 95 % interval of the paired difference from it.

    It is the interval of a configuration's score if the best control's score is taken as known. It is None without an error estimate.
    """
    intervals: list[list[float] | None] = []
    for objective, score in zip(search.objectives, best.scores, strict=True):
        ends = [objective.shown(score + end) for end in gap(best.answers, answers, objective).interval()]
        intervals.append([round(end, 6) for end in sorted(ends)] if all(map(math.isfinite, ends)) else None)
    return intervals


def _shown(objectives: Sequence[Objective], scores: Sequence[float]) -> list[float]:
    return [round(o.shown(s), 6) for o, s in zip(objectives, scores, strict=True)]


def _test(search: Search, tested: Sequence[Tested], best: str) -> SearchTest:
    """Return the scores on search and test items, the differences from the best control, and the comparison by task."""
    control = next(t for t in tested if t.name == best)
    return SearchTest(
        baseline=best,
        rows=[_row(search.objectives, t, control, _twin(t, control, tested)) for t in tested],
        against={t.name: _against(search.objectives, control, t) for t in tested if t.part != "control"},
        comparison=_compared(search, tested, control.configuration.name),
    )


def _twin(tested: Tested, best: Tested, others: Sequence[Tested]) -> str | None:
    """Return the control with the same weights as a candidate, the best control if it is one of several, or None."""
    if tested.part == "control":
        return None
    digest = tested.configuration.of_weights
    controls = [best, *(t for t in others if t.part == "control")]
    return next((t.name for t in controls if t.configuration.of_weights == digest), None)


def _row(objectives: Sequence[Objective], tested: Tested, control: Tested, twin: str | None) -> TestedRow:
    """Return the scores on both halves; the `optimism` of other controls, which were not selected, shows the effect of the split alone."""
    return TestedRow(
        name=tested.name,
        part=tested.part,
        digest=tested.configuration.of_weights,
        search=_shown(objectives, tested.rival.scores),
        test=_shown(objectives, [tested.answers.value(objective) for objective in objectives]),
        optimism=[verdict.optimism for verdict in _against(objectives, control, tested)],
        same_as=twin,
    )


def _against(objectives: Sequence[Objective], control: Tested, tested: Tested) -> list[CandidateVerdict]:
    """Return for every objective the paired difference from the best control on test items, and the optimism of the search items.

    A candidate that was selected among many on search items looks better on them than it is; the control on the same items does not. Optimism
    is therefore the difference on search items minus the difference on test items: the difficulty of the two halves cancels out.
    """
    verdicts = []
    for objective in objectives:
        test = gap(control.answers, tested.answers, objective)
        search = gap(control.rival.answers, tested.rival.answers, objective)
        verdicts.append(
            CandidateVerdict(
                objective=objective.name,
                test=_gap(test),
                search=_gap(search),
                verdict=test.verdict(),
                reason=test.reason(),
                optimism=round(search.diff - test.diff, 6),
            )
        )
    return verdicts


def _gap(difference: Gap) -> ShownGap:
    low, high = (round(end, 6) if math.isfinite(end) else None for end in difference.interval())
    return ShownGap(diff=round(difference.diff, 6), low=low, high=high, p=round(difference.p, 6), clusters=difference.clusters)


def _compared(search: Search, tested: Sequence[Tested], baseline: str) -> Comparison:
    """Return the comparison of tested configurations with one of them on test items."""
    store = search.bench.store
    plans = [store.settled(plan) for plan in search.stages.test]
    scores = [store.read(plan, t.configuration.key(plan)).called(t.configuration) for t in tested for plan in plans]
    return compare(store, scores, baseline=baseline, project=search.recipe.project)


def hypervolumes(search: Search, study: Study) -> list[float]:
    """Return the area that the Pareto front covers after each complete candidate, above the worst scores; for two objectives only."""
    if len(search.objectives) != 2:
        return []
    rivals = {rival.name: rival for rival in finished(search, study, "search")}
    points = [rival.scores for rival in search.controls]
    floor = [min(p[i] for p in [*points, *(r.scores for r in rivals.values())]) for i in range(2)]
    areas = []
    for record in study.finished("search"):
        if record.name in rivals:
            points.append(rivals[record.name].scores)
        areas.append(round(area(points, floor), 6))
    return areas


def area(points: Sequence[Sequence[float]], floor: Sequence[float]) -> float:
    """Return the area that is above the floor and below at least one point in both coordinates."""
    total, height = 0.0, floor[1]
    for x, y in sorted(points, key=lambda p: (-p[0], -p[1])):
        if y > height:
            total += (x - floor[0]) * (y - height)
            height = y
    return total


@dataclass(frozen=True)
class Tested:
    """A configuration that was scored on both halves of the items.

    Attributes:
        rival: Its answers and scores on search items.
        configuration: The configuration.
        answers: Answers on test items.
        part: "control", "found" (the winner or a member of the Pareto front) or "random".
        values: Value by dimension, for candidates.
    """

    rival: Rival
    configuration: Configuration
    answers: Answers
    part: TestedPart
    values: Values | None = None

    @property
    def name(self) -> str:
        """Displayed name."""
        return self.rival.name


SHOWN = 8
"""Maximum number of members of a Pareto front that are tested."""


def conclude(search: Search, out: Path | None = None) -> SearchResult:
    """Test the best candidates and all controls, and write the best candidates' recipes and the search's document.

    If every candidate was stopped early, scores below a control or loses too much on a guarded task, the document names the configurations that
    no candidate beats, and no recipe is written.

    Args:
        search: The search, with its controls scored.
        out: Additional path for the winner's recipe, or for that of the first member of the Pareto front.

    Returns:
        The result.

    Raises:
        WorkbenchError: If no candidate was scored, or the cache has lost the scores of the study's candidates.
    """
    study = open_study(search)
    try:
        # The process that writes last has read the study last: an older result never replaces a newer one.
        with FileLock(search.folder / "result.lock"):
            tested = _tested(search, study)
            recipes = {t.name: _write(search, t) for t in tested if t.part == "found"}
            result = document(search, study, tested, {name: search.shown(path) for name, path in recipes.items()})
            if out is not None and recipes:
                write_bytes(out, next(iter(recipes.values())).read_bytes())
            result.write(search.folder / RESULT)
            return result
    finally:
        study.close()


def _tested(search: Search, study: Study) -> list[Tested]:
    """Score the controls, the winner or the Pareto front, and the best random candidate on test items, in this order."""
    configurations: list[tuple[Rival, LineupEntry, TestedPart, Values | None]] = [
        (rival, search.entries[rival.name], "control", None) for rival in search.controls
    ]
    values: dict[str, Values] = {record.name: record.values for record in study.finished()}
    for rival, part in _best(search, study):
        configurations.append((rival, candidate(search, rival.name, values[rival.name]), part, values[rival.name]))
    tested = []
    for number, (rival, entry, part, candidate_values) in enumerate(configurations, 1):
        search.events({"stage": "search", "text": f"test {number}/{len(configurations)}: {rival.name}"})
        tested.append(Tested(rival, *search.bench.test(entry), part, candidate_values))
    return tested


def _best(search: Search, study: Study) -> list[tuple[Rival, TestedPart]]:
    """Return the winner or the Pareto front, then the best random candidate.

    There is no winner if every candidate was stopped early, scores below a control or loses too much on a guarded task.
    """
    done = study.finished("search")
    if not any(record.scores for record in done):
        raise _nothing(search, done)
    complete = finished(search, study, "search")
    controls = [control for control in search.controls if control.name not in search.harmful]
    unbeaten = [
        rival.scores for rival in front([*controls, *complete])
    ]  # a control comes first: an equal candidate has its scores
    best = [rival for rival in front(complete) if rival.scores in unbeaten][:SHOWN]
    if not complete and not all(record.stopped or record.harmful for record in done if record.scores):
        raise WorkbenchError(
            f"{search.recipe.name}: the cache no longer has the scores of candidates in the study {search.shown(search.folder)}",
            "Move that folder away and run the search again.",
        )
    random: list[tuple[Rival, TestedPart]] = [(rival, "random") for rival in front(finished(search, study, "random"))[:1]]
    return [*((rival, "found") for rival in best), *random]


def _nothing(search: Search, done: Sequence[TrialRow]) -> WorkbenchError:
    """Return the error for a search without any scored candidate."""
    if not done:
        return WorkbenchError(
            f"{search.recipe.name}: no candidate was scored before the search ended",
            "Increase `trials` or `budget` of the search.",
        )
    return WorkbenchError(
        f"{search.recipe.name}: all {len(done)} candidates failed; {done[0].name}: {done[0].error}",
        "Restrict the search's `space` to values with which the merge works.",
    )


def _write(search: Search, tested: Tested) -> Path:
    """Write a candidate's recipe into the folder of the search and return its path."""
    assert tested.values is not None
    path = search.folder / ("winner.yaml" if len(search.objectives) == 1 else f"{tested.name}.yaml")
    data = search.space.document(tested.values, f"{search.recipe.name}-{tested.name}")
    values = ", ".join(f"{key} {value}" for key, value in tested.values.items())
    source = search.recipe.path.name if search.recipe.path else search.recipe.name
    header = f"# workbench run {shell(search.shown(path))}\n# {tested.name} of the search in {source}: {values}\n"
    write_bytes(path, (header + yamldoc.dump(data)).encode())
    return path
