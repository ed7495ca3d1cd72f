"""The recommendation of a comparison: which configuration to ship and why, or why none and what would help.

The rule is fixed before any score is seen:

1. A candidate is every configuration that was scored on all skill tasks: named configurations, and the base, bricks and averages that were
   scored as controls. A brick alone may be what is best to ship.
2. It can be recommended if it is better than the baseline on the mean over skills and safe on every guarded task. The baseline itself is a
   candidate without these two conditions, unless it is the base.
3. Of those that can be recommended, the one with the highest mean is recommended; if others are equivalent to it and cost less, the
   cheapest of these.
4. If there is none, the cause and what would help are given, and `closest` names the candidate that misses least.

"Better" comes from the family of all candidates against the baseline and "equivalent" from the family of their pairs (`leaders`); "safe" and
"worse" on guarded tasks come from the rows of the comparison. All families include what was scored before on the same items (`looked`), so
that it does no harm that the configurations, and the one among them, are chosen by the same scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from workbench.compare.advice import (
    BASELINE,
    CANDIDATES,
    UNGUARDED,
    Candidate,
    CandidateRole,
    Cause,
    Decision,
    Guarded,
    details,
    headline,
    helped,
    merge_loses,
)
from workbench.compare.differences import Difference
from workbench.compare.families import GUARDED
from workbench.compare.kept import Kept
from workbench.compare.leaders import MOST_MEMBERS, MeanDifference, MeanPairs, mean_over
from workbench.compare.making import commands
from workbench.compare.tables import Table
from workbench.ground.results import JsonObject, Number, absent
from workbench.scores.store import Configuration, Scores


class PairFamily(JsonObject):
    """The families of pairs that the recommendation rests on: pairs with the baseline, and all others."""

    members: int
    """Number of members: the candidates, the baseline, and what was scored before on the same items."""
    looked_at: int = 0
    """Number of members that were scored before on the same items and are not in the comparison."""
    pairs: int
    """Number of pairs."""
    alpha: Number
    """Error rate of the family."""
    text: str
    """Description."""


class Recommendation(JsonObject):
    """The configuration to ship with the reason, or why none can be recommended and what would help."""

    configuration: str | None
    """Name of the recommended configuration; null if none can be recommended."""
    closest: str | None
    """Name of the candidate that misses least; null if one is recommended, or if none was tested."""
    cause: Cause | None
    """Why none is recommended; null if one is."""
    baseline: str
    """Name of the configuration that a recommended one has to be better than, and safe against."""
    text: str
    """The recommendation in one sentence."""
    details: list[str]
    """Sentences on the configurations beside it."""
    help: list[str]
    """Sentences on what would help if none is recommended."""
    leaders: list[str]
    """The candidate with the highest mean and all that are not shown to be worse than it, the highest mean first."""
    candidates: list[Candidate]
    """All candidates, the highest mean first; empty if none was tested."""
    pairs: list[MeanDifference]
    """Differences from the recommended, or closest, candidate of the other leaders and of all that are not shown to be worse than it."""
    family: PairFamily
    """The families of pairs."""
    command: list[str] = []
    """Command lines that make it and use the result: `run`, `chat`, `push`, `export`; empty if none is recommended or only its scores are known."""

    @property
    def about(self) -> str | None:
        """Name of the recommended candidate, or of the one that misses least."""
        return self.configuration or self.closest


class ShippedConfiguration(JsonObject):
    """The recommended configuration, why, and the commands that make and use it; or why none is recommended, and what would help."""

    recommendation: Recommendation | None = absent()
    """The recommendation, with its commands. It is absent if only controls are compared."""
    kept: Kept | None = absent()
    """Share of its best parents' skills that it keeps, with a 95 % interval. It is absent if that is not known."""
    made: str | None
    """Directory of the model that `--yes` made; null if nothing was run."""


def recommendation_of(
    tasks: Sequence[Table],
    base: Configuration,
    entries: Sequence[Sequence[Scores]],
    rows: Sequence[Difference],
    alpha: float,
    kept: Mapping[str, Kept | None],
    looked: Sequence[Configuration] = (),
) -> Recommendation | None:
    """Return the recommendation; None if only controls are compared.

    Args:
        tasks: Tables of all tasks, with the scores of `looked`.
        base: The baseline.
        entries: Scores of each configuration over all suites, equal weights once.
        rows: Rows of the comparison.
        alpha: Error rate of the family of pairs.
        kept: Configuration -> share of the skills of its bricks that it keeps; None if not known.
        looked: Configurations that were scored before on the same items; they are tested and not shown.
    """
    configurations = [entry[0].configuration for entry in entries]
    if not any(c.role == "configuration" for c in configurations):
        return None
    decision = _decided(tasks, base, configurations, rows, alpha, looked)
    chosen = next((c for c in configurations if decision.chosen and c.name == decision.chosen.configuration), None)
    command = commands(chosen) if chosen else []
    elsewhere = (
        [f"{chosen.name} cannot be made here: its scores were imported, without a recipe."] if chosen and not command else []
    )
    others = ", and every two of the others" if decision.members <= MOST_MEMBERS else ""
    return Recommendation(
        configuration=decision.chosen.configuration if decision.chosen else None,
        closest=decision.closest.configuration if decision.closest else None,
        cause=decision.cause,
        baseline=decision.baseline,
        text=headline(decision),
        details=[*details(decision), *_lossy(decision, configurations, kept), *elsewhere],
        help=helped(decision),
        leaders=list(decision.leaders),
        candidates=list(decision.ranked),
        pairs=list(decision.beside),
        family=PairFamily(
            members=decision.members,
            pairs=decision.pairs,
            alpha=alpha,
            looked_at=decision.looked_at,
            text=f"mean over skills of {decision.members} configurations: each against {base.name}{others}",
        ),
        command=command,
    )


def _decided(
    tasks: Sequence[Table],
    base: Configuration,
    configurations: Sequence[Configuration],
    rows: Sequence[Difference],
    alpha: float,
    looked: Sequence[Configuration],
) -> Decision:
    """Apply the rule to the candidates among the configurations."""
    skills = [t for t in tasks if t.skill]
    scored = [c for c in configurations if all(c.digest in t.values for t in skills)]
    if not skills:
        return Decision(base.name, cause="no mean")
    # The baseline may have another name of equal weights; the base is what is there before anything is shipped.
    candidates = [base if c.digest == base.digest else c for c in scored if c.role in CANDIDATES]
    candidates = [c for c in dict.fromkeys(candidates) if c.digest != base.digest or base.role != "base"]
    named = [c for c in configurations if c.role == "configuration"]
    if not any(c.role == "configuration" for c in candidates) and all(c.digest == base.digest for c in named):
        return Decision(base.name, cause="same weights")
    if not any(c.role == "configuration" for c in scored):
        return Decision(base.name, cause="not scored")
    counted = [c for c in looked if all(c.digest in t.values for t in skills)]
    pairs = MeanPairs(skills, [*candidates, *counted], alpha, base)
    names = sorted((c.name for c in candidates), key=lambda name: -pairs.means[name])
    by_name = {c.name: c for c in candidates}
    own = {name: [row for row in rows if row.configuration == name] for name in names}
    outside = {t.name for t in tasks if t.suite.role_of(t.task) == "skill" and not t.skill}
    decision = Decision(
        base.name,
        ranked=tuple(
            _candidate(by_name[name], base, names[0], pairs, _harm(by_name[name], base, tasks, own[name])) for name in names
        ),
        alpha=alpha,
        leaders=tuple(pairs.leaders(names)),
        unsafe={name: _unsafe(own[name]) for name in names},
        lost={name: [row.task for row in own[name] if not row.guarded and row.verdict == "worse"] for name in names},
        outside={name: [row for row in own[name] if row.verdict == "worse" and row.task in outside] for name in names},
        harmful=_harmful(rows),
        guarded=tuple(t.name for t in tasks if t.guarded),
        skills=tuple(t.name for t in skills),
        items=sum(len(t.items) for t in skills),
        clusters=sum(t.clusters for t in skills),
        controls={c.name: mean_over(skills, c) for c in scored if c.role not in CANDIDATES},
        members=pairs.members,
        pairs=pairs.size,
        looked_at=len(counted),
    )
    return _chosen(decision, pairs)


def _lossy(decision: Decision, configurations: Sequence[Configuration], kept: Mapping[str, Kept | None]) -> list[str]:
    """Return a sentence if the chosen, or closest, configuration is a merge that loses much of its bricks' skills."""
    about = decision.chosen or decision.closest
    own = next((c for c in configurations if about and c.name == about.configuration), None)
    share = kept.get(own.name) if own else None
    if own is None or own.recipe is None or own.form == "configuration" or len(own.parents) < 2:
        return []
    return merge_loses(own.name, own.recipe, share) if share else []


def _chosen(decision: Decision, pairs: MeanPairs) -> Decision:
    """Add the recommended candidate, or the closest one and the cause."""
    able = [s for s in decision.ranked if s.recommendable]
    if able:
        best = able[0]
        equal = [s for s in able[1:] if pairs.between(s.configuration, best.configuration).verdict == "equivalent"]
        cheaper = [s for s in equal if s.cheaper(best)]
        about = min(cheaper, key=lambda s: (s.bytes or 0, s.bricks), default=best)
        decision = replace(decision, chosen=about, equal_to=best.configuration if cheaper else None)
    else:
        about, cause = _closest(decision.ranked)
        decision = replace(decision, closest=about, cause=cause)
    if decision.members > MOST_MEMBERS:  # then nothing is known about pairs
        return decision
    others = [(s.configuration, pairs.between(s.configuration, about.configuration)) for s in decision.ranked if s is not about]
    return replace(decision, beside=tuple(d for name, d in others if name in decision.leaders or d.verdict != "worse"))


def _closest(ranked: Sequence[Candidate]) -> tuple[Candidate, Cause]:
    """Return the candidate that misses least, and what it misses."""
    better = [s for s in ranked if s.better]
    if unshown := [s for s in better if s.guarded == "not shown safe"]:
        return unshown[0], "not shown safe"
    if better:
        return better[0], "unsafe"
    best = next((s for s in ranked if s.guarded != "worse"), ranked[0])
    against = best.against_baseline
    few = (
        against is not None and against.reason is not None and (against.diff > 0 or against.reason.startswith("too few clusters"))
    )
    return best, "too few clusters" if few else "not better"


def _unsafe(own: Sequence[Difference]) -> list[Difference]:
    """Return a candidate's rows of guarded tasks on which it is worse or not shown safe."""
    return [row for row in own if row.guarded and row.verdict in ("worse", "not shown safe")]


def _harm(c: Configuration, base: Configuration, tasks: Sequence[Table], own: Sequence[Difference]) -> Guarded:
    """Return a candidate's worst verdict over all guarded tasks; a guarded task without scores shows no safety."""
    to_guard = sum(t.guarded for t in tasks)
    if c.digest == base.digest:
        return BASELINE
    if not to_guard:
        return UNGUARDED
    unsafe = _unsafe(own)
    if any(row.verdict == "worse" for row in unsafe):
        return "worse"
    return "not shown safe" if unsafe or sum(row.guarded for row in own) < to_guard else "safe"


def _candidate(c: Configuration, base: Configuration, best: str, pairs: MeanPairs, guarded: Guarded) -> Candidate:
    """Return a candidate with its differences from the baseline and from the candidate with the highest mean."""
    return Candidate(
        configuration=c.name,
        role=cast("CandidateRole", c.role),
        mean=pairs.means[c.name],
        guarded=guarded,
        against_baseline=None if c.digest == base.digest else pairs.between(c.name, base.name),
        against_best=None if c.name == best else pairs.between(c.name, best),
        form=c.form,
        bytes=_bytes(c),
        bricks=len(c.parents),
    )


def _bytes(c: Configuration) -> int | None:
    """Return the bytes that a candidate takes: a brick has files already, a configuration is written by `run`."""
    if c.role == "brick" and c.bricks:
        return sum(c.bricks.values())
    return c.bytes if c.written is None else c.written


def _harmful(rows: Iterable[Difference]) -> dict[str, list[str]]:
    """Return for each guarded task the bricks that are worse on it alone."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.role == "brick" and row.family == GUARDED and row.verdict == "worse":
            found.setdefault(row.task, []).append(row.configuration)
    return found
