"""Edited facts: their tasks, free generation beside teacher forcing, and the facts of an edit that survive in other configurations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from workbench.compare.configurations import roles_of
from workbench.compare.routing import Share
from workbench.compare.tables import Table
from workbench.facts.facts import FactKind
from workbench.ground.results import JsonObject, Measured, Number
from workbench.scores.paired import paired
from workbench.scores.statistics import Floats, codes, score_interval
from workbench.scores.store import Configuration, Scores
from workbench.scores.suite import FactTasks, Suite

# Kinds with right (1) or wrong (0) answers, where the edit's target is the right answer.
SURVIVING: tuple[FactKind, ...] = ("efficacy", "paraphrase", "generated", "generated-paraphrase", "portability")
# Roles of controls that teach the same facts in another way than the edit.
OTHER_WAYS = ("memory", "finetune", "adapter")
# Kinds that are reported after the first n facts.
FOLLOWED: tuple[FactKind, ...] = ("efficacy", "paraphrase", "generated", "neighbours", "portability")


class KeptFacts(JsonObject):
    """Right answers among the facts or prompts that the edit alone answers right."""

    kept: int
    """Number of right answers."""
    of: int
    """Number of facts or prompts that the edit alone answers right."""
    value: Number | None
    """Share of right answers; null if the edit alone answers none right."""
    low: Number | None
    """Lower end of its 95 % interval over facts."""
    high: Number | None
    """Upper end of the interval."""


class EditSurvival(JsonObject):
    """Survival of one edit in other configurations."""

    alone: str
    """The configuration that has the edit and nothing else."""
    rows: dict[str, dict[str, KeptFacts]]
    """Configuration -> kind of task -> right answers."""
    without: list[str] = []
    """The configurations among them that do not have the edit."""


class ShareOfPrompts(Share):
    """A share of prompts with its 95 % interval over facts."""

    n: int
    """Number of prompts."""


class AfterFacts(JsonObject):
    """Scores after the first facts of a file."""

    configuration: str
    """Name of the configuration."""
    facts: int
    """Number of facts; 0 for the base."""
    cohorts: dict[str, dict[str, ShareOfPrompts]]
    """first, last or sample -> kind of task -> share of right answers."""


class WrittenAnswers(JsonObject):
    """Generated answers of one configuration that is edited for the facts, beside teacher-forced ones."""

    configuration: str
    """Name of the configuration."""
    n: int
    """Number of facts."""
    exact: Share
    """Share of the generated texts that are the target and stop by themselves."""
    begins: Share | None
    """Share of the generated texts that begin with the target; null if it is not stored."""
    forced: Share
    """Teacher-forced efficacy on the same facts."""
    gap: Gap
    """Paired difference of `exact` from `forced`."""


class Gap(JsonObject):
    """A difference with its 95 % interval."""

    diff: Number
    """The difference."""
    low: Measured
    """Lower end of the interval."""
    high: Measured
    """Upper end of the interval."""


class EditedFacts(JsonObject):
    """Scores of one facts file in a comparison."""

    suite: str
    """Name of the suite."""
    source: str
    """The facts file."""
    facts: int
    """Number of facts."""
    tasks: dict[str, str]
    """Kind of task -> task."""
    control_missing: bool = False
    """Whether an edit was scored only as part of other configurations, not alone."""
    survival: list[EditSurvival] = []
    """One entry for each configuration that has the edit alone."""
    sequence: list[AfterFacts] = []
    """Scores after the first n facts."""
    generation: list[WrittenAnswers] = []
    """Generated answers beside teacher-forced ones."""


def facts_of(tasks: Sequence[Table], suites: Mapping[str, Suite], entries: Sequence[Sequence[Scores]]) -> list[EditedFacts]:
    """Return one entry per suite that scores edited facts.

    Args:
        tasks: Tables of all tasks.
        suites: Suites by name.
        entries: Scores of each configuration over all suites, as returned by `configurations_of`.
    """
    documents = []
    for name, suite in suites.items():
        if suite.facts is None:
            continue
        tables = {kind: t for kind, task in suite.facts.tasks.items() for t in tasks if (t.task, t.suite.suite) == (task, name)}
        clusters = {item["cluster"] for kind, t in tables.items() if kind in SURVIVING for item in t.items}
        alone = _all_alone(entries, suite.facts)
        has_edit = any(_edited(entry[0].configuration, suite.facts) for entry in entries)
        documents.append(
            EditedFacts(
                suite=name,
                source=suite.facts.source,
                facts=len(clusters),
                tasks=dict(suite.facts.tasks),
                control_missing=has_edit and not alone,
                survival=list(_survivals(tables, suite.facts, entries, alone)),
                sequence=list(_sequence(tables, suite.facts, entries)),
                generation=list(_generation(tables, suite.facts, entries)),
            )
        )
    return documents


def _survivals(
    tables: Mapping[FactKind, Table], facts: FactTasks, entries: Sequence[Sequence[Scores]], alone: Sequence[Sequence[Scores]]
) -> Iterator[EditSurvival]:
    """Yield one entry per configuration that has the edit alone: the right answers of configurations with this edit, and without any."""
    for reference in alone:
        rows = {
            entry[0].configuration.name: survivors
            for entry in entries
            if entry is not reference
            and entry[0].configuration.role not in OTHER_WAYS
            and _belongs(entry, reference, alone, facts)
            and (survivors := _survivors(tables, reference[0].configuration, entry[0].configuration))
        }
        without = [
            e[0].configuration.name for e in entries if not _edited(e[0].configuration, facts) and e[0].configuration.name in rows
        ]
        if len(without) < len(rows):  # at least one other configuration has the edit
            yield EditSurvival(alone=reference[0].configuration.name, rows=rows, without=without)


def _all_alone(entries: Sequence[Sequence[Scores]], facts: FactTasks) -> list[Sequence[Scores]]:
    """Return the configurations that have the edit alone, with all its facts and the fewest other edits."""
    alone = [entry for entry in entries if _alone(entry, facts)]
    most = max((_facts_used(entry[0].configuration) for entry in alone), default=0)
    alone = [entry for entry in alone if _facts_used(entry[0].configuration) == most]  # skip checkpoints of the same edit
    fewest = min((len(entry[0].configuration.edits) for entry in alone), default=0)
    return [entry for entry in alone if len(entry[0].configuration.edits) == fewest]


def _sequence(tables: Mapping[FactKind, Table], facts: FactTasks, entries: Sequence[Sequence[Scores]]) -> Iterator[AfterFacts]:
    """Yield scores on the first facts, the latest facts and a sample, for the base and after each number of facts."""
    total = max(facts.cohorts, default=0)
    for entry in entries:
        c = entry[0].configuration
        n = c.first or total
        if c.role not in OTHER_WAYS and (c.role == "base" or _edited(c, facts)) and n in facts.cohorts:
            cohorts = {name: _scores_on(tables, c, set(ids)) for name, ids in facts.cohorts[n].items()}
            yield AfterFacts(configuration=c.name, facts=0 if c.role == "base" else n, cohorts=cohorts)


def _generation(
    tables: Mapping[FactKind, Table], facts: FactTasks, entries: Sequence[Sequence[Scores]]
) -> Iterator[WrittenAnswers]:
    """Yield one entry per configuration that is edited for the facts: its generated answers, and teacher-forced efficacy beside them."""
    written, forced = tables.get("generated"), tables.get("efficacy")
    if written is None or forced is None or written.metric != "exact_match" or forced.metric != "acc":
        return
    row_of = {item["id"]: i for i, item in enumerate(forced.items)}
    numbers = [i for i, item in enumerate(written.items) if item["id"] in row_of]
    partners = [row_of[written.items[i]["id"]] for i in numbers]
    for entry in entries:
        c = entry[0].configuration
        if not numbers or not _edited(c, facts) or not (c.digest in written.values and c.digest in forced.values):
            continue
        cluster = written.cluster[numbers]
        exact, known = written.values[c.digest][numbers], forced.values[c.digest][partners]
        starts = [written.rows[c.digest][i]["metrics"].get("starts_with") for i in numbers]
        begins = None if None in starts else np.array(starts, np.float64)
        difference = paired(known, exact, cluster)
        low, high = difference.interval(0.05)
        yield WrittenAnswers(
            configuration=c.name,
            n=len(numbers),
            exact=_share(exact, cluster),
            begins=None if begins is None else _share(begins, cluster),
            forced=_share(known, cluster),
            gap=Gap(diff=difference.diff, low=low, high=high),
        )


def _share(values: Floats, cluster: NDArray[np.intp]) -> Share:
    low, high = score_interval(values, codes(cluster))
    return Share(value=float(values.mean()), low=low, high=high)


def _scores_on(tables: Mapping[FactKind, Table], c: Configuration, ids: set[str]) -> dict[str, ShareOfPrompts]:
    """Return a configuration's scores by kind on the items of some facts."""
    scores: dict[str, ShareOfPrompts] = {}
    for kind in FOLLOWED:
        table = tables.get(kind)
        rows = [i for i, item in enumerate(table.items) if item["cluster"] in ids] if table else []
        if table is not None and rows and c.digest in table.values:
            share = _share(table.values[c.digest][rows], table.cluster[rows])
            scores[kind] = ShareOfPrompts(value=share.value, low=share.low, high=share.high, n=len(rows))
    return scores


def _alone(entry: Sequence[Scores], facts: FactTasks) -> bool:
    """Return True if a configuration is only an edit of these facts: an edit brick on the base, or edits without a merge."""
    c = entry[0].configuration
    return _edited(c, facts) and c.role not in ("average", *OTHER_WAYS) and ("brick" in roles_of(entry) or not c.parents)


def _facts_used(c: Configuration) -> float:
    """Return the number of facts that the edit uses from the file; infinite if it uses all."""
    return c.first or math.inf


def _edited(c: Configuration, facts: FactTasks) -> bool:
    return facts.digest in c.edits if facts.digest else bool(c.edits)


def _belongs(entry: Sequence[Scores], reference: Sequence[Scores], alone: Sequence[Sequence[Scores]], facts: FactTasks) -> bool:
    """Return True if a configuration includes the reference's edit, or no edit at all (a control)."""
    c = entry[0].configuration
    if not _edited(c, facts):
        return True
    if any(entry is other for other in alone) or _facts_used(c) < _facts_used(reference[0].configuration):
        return False
    own_edits = [other for other in alone if _names(other) & {*c.parents, *(f"{name}-edited" for name in _names(entry))}]
    return any(other is reference for other in own_edits) if own_edits else len(alone) == 1


def _names(entry: Sequence[Scores]) -> set[str]:
    return {name for scores in entry for name in scores.names}


def _survivors(tables: Mapping[FactKind, Table], alone: Configuration, c: Configuration) -> dict[str, KeptFacts]:
    """Return by kind the number and share of the items answered right by `alone` that `c` answers right, with Wilson's interval."""
    survivors: dict[str, KeptFacts] = {}
    for kind in SURVIVING:
        table = tables.get(kind)
        if table is None or not {alone.digest, c.digest} <= set(table.values):
            continue
        right = np.flatnonzero(table.values[alone.digest] == 1)
        values = table.values[c.digest][right]
        share = _share(values, table.cluster[right]) if right.size else None
        survivors[kind] = KeptFacts(
            kept=int(values.sum()),
            of=int(right.size),
            value=share.value if share else None,
            low=share.low if share else None,
            high=share.high if share else None,
        )
    return survivors
