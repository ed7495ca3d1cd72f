"""What a reader should know beside the rows: what else was scored on the same items, and warnings.

Who scores twenty equal configurations and then names the best one finds it "better" in one of four cases. A family is therefore what was
looked at, not what was named: the differences of all that the score store holds under the plans of a comparison are tested together with
those that it shows. They are read, never scored. Equal or similar ones cost little power (max-T).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from workbench.compare.advice import CANDIDATES
from workbench.compare.comparison import Family
from workbench.compare.configurations import roles_of
from workbench.compare.tables import Table, tables_of
from workbench.facts.facts import ACCURACIES
from workbench.ground.errors import WorkbenchError, nearest
from workbench.ground.numbers import count
from workbench.scores.documents import read_document
from workbench.scores.imported import differing_versions
from workbench.scores.statistics import FEW_CLUSTERS, MANY_CLUSTERS, Floats, effective_clusters
from workbench.scores.store import Configuration, Scores, ScoreStore, plan_record
from workbench.scores.suite import Suite, metric_of


@dataclass(frozen=True)
class LookedAt:
    """What was scored on the same items beside a comparison.

    Attributes:
        tables: Tables of the comparison with the scores of these configurations added.
        configurations: The configurations. Each is named by its digest, because an edited recipe keeps its name.
        warnings: Earlier looks at fewer items; why scores of a configuration cannot be read and do not count.
    """

    tables: Sequence[Table]
    configurations: Sequence[Configuration] = ()
    warnings: Sequence[str] = ()


def looked_at(store: ScoreStore, scores: Sequence[Scores], tasks: Sequence[Table], suites: Mapping[str, Suite]) -> LookedAt:
    """Return the other candidates that the store holds under the plans of some scores.

    Scores of another plan do not count, because their items, settings or scorer are others, and neither do controls that nobody would ship.

    Args:
        store: The store.
        scores: Scores of the comparison.
        tasks: Tables of these scores.
        suites: Suites by name, with the settings of the comparison.
    """
    shown = {s.key for s in scores} | {s.configuration.digest for s in scores}
    found: dict[str, list[Scores]] = {}
    unread: list[str] = []
    for suite, plan in dict.fromkeys((s.suite, s.plan) for s in scores):
        for path in sorted(store.folder(suite, plan).glob("*.json")):
            if path.name == "plan.json":
                continue
            try:
                other = read_document(path)
            except WorkbenchError as error:
                unread.append(str(error))
                continue
            c, roles = other.configuration, {other.configuration.role, *(alias.role for alias in other.aliases)}
            if other.plan == plan and other.rows and roles & {*CANDIDATES} and not {other.key, c.digest} & shown:
                found.setdefault(c.digest, []).append(other)
    added: dict[tuple[str, str], dict[str, Floats]] = {(t.suite.suite, t.task): {} for t in tasks}
    for read in _read(store, list(found.values()), suites, unread):
        for t in tasks:
            same = read.get((t.suite.suite, t.task), t)
            if t.weights is None or (same.weights is not None and np.array_equal(t.weights, same.weights)):
                values = {d: x for d, x in same.values.items() if d not in t.values and (not t.share or _within(x, t))}
                added[t.suite.suite, t.task].update(values)
    tables = [replace(t, values={**t.values, **added[t.suite.suite, t.task]}) for t in tasks]
    counted = {digest for values in added.values() for digest in values}
    return LookedAt(
        tables,
        [replace(own[0].configuration, name=digest) for digest, own in found.items() if digest in counted],
        [
            *looks_before(store, scores, suites),
            *(f"Not counted, although it may have been looked at: {reason}" for reason in unread),
        ],
    )


def _read(
    store: ScoreStore, found: Sequence[list[Scores]], suites: Mapping[str, Suite], unread: list[str]
) -> Iterator[dict[tuple[str, str], Table]]:
    """Yield the tables of some configurations by suite and name: of all together, or one by one if some cannot be read."""
    if not found:
        return
    scores = [s for own in found for s in own]
    try:
        tables = tables_of(store, scores, {s.suite: suites[s.suite] for s in scores})
    except WorkbenchError as error:
        if len(found) == 1:
            unread.append(str(error))
        else:
            for own in found:
                yield from _read(store, [own], suites, unread)
    else:
        yield {(t.suite.suite, t.task): t for t in tables}


def _within(values: Floats, t: Table) -> bool:
    """Return True if scores lie in the range of the task's shown scores, in whose units all differences are."""
    return bool(values.min() >= (-1 if t.contrast else 0) and values.max() <= 1)


def looks_before(store: ScoreStore, scores: Sequence[Scores], suites: Mapping[str, Suite]) -> Iterator[str]:
    """Yield a warning if a configuration was scored before on fewer items of a suite, more often than its `looks` says.

    A limit keeps the items of every smaller one, so that these scores are earlier looks at the same comparison.
    """
    for name, suite in suites.items():
        own = [s for s in scores if s.suite == name and s.configuration.role == "configuration"]
        if not own:
            continue
        here, now = store.folder(name, own[0].plan), {task: about.n for task, about in store.record(own[0]).tasks.items()}
        before = set()
        for folder in {path.parent for path in store.root.glob(f"{name}-*/plan.json")} - {here}:
            if not any((folder / f"{s.key[:12]}.json").is_file() for s in own):
                continue
            with suppress(WorkbenchError):  # a damaged plan of other scores says nothing about these
                record = plan_record(folder)
                then = {task: about.n for task, about in record.tasks.items()}
                fewer = then != now and then.keys() == now.keys() and all(then[task] <= now[task] for task in now)
                if record.name == name and fewer:
                    before.add(sum(then.values()))
        if len(before) >= suite.looks:
            looks = len(before) + 1
            yield (
                f"{name}: this is look {looks} at these configurations, which were scored before on {', '.join(map(count, sorted(before)))} of "
                f"{count(sum(now.values()))} items: {looks} looks at {suite.alpha / suite.looks:.2g} each err in up to "
                f"{looks * suite.alpha / suite.looks:.2g}. Set `looks: {looks}` in the suite to keep {suite.alpha:g} over all of them."
            )


_SMALL = 100  # tasks with fewer items get a warning
_MANY_TASKS = 20  # with more tasks in one family, each one costs the others much power


def warnings_of(
    scores: Sequence[Scores],
    suites: Mapping[str, Suite],
    tasks: Sequence[Table],
    entries: Sequence[Sequence[Scores]],
    names: Sequence[str],
    family: Family,
) -> Iterable[str]:
    """Yield warnings on partial scores, tasks, suites, devices, the correction and missing controls."""
    if any(s.partial for s in scores):
        yield "Partial: --limit cut the number of items; use these scores for a quick look only."
    few: dict[int, list[str]] = {}
    for t in tasks:
        yield from _clusters(t)
        if t.guarded and t.suite.draws_items(t.task):
            yield f'{t.name}: "safe" is about further items of its {t.clusters} clusters only (`drawn: items` in the suite).'
        if len(t.items) < _SMALL and t.share and not t.contrast:
            few.setdefault(len(t.items), []).append(t.name)
        if t.chance is None and t.suite.role_of(t.task) != "other":
            known = metric_of(t.metric) in ACCURACIES
            why = "its items do not determine a chance score" if known else f"no chance score is known for '{t.metric}'"
            yield f"{t.name}: not corrected for chance: {why}, and the suite does not set `chance` for it."
        if t.contrast:
            most = max(
                len(other.items) for other in tasks if other.suite is t.suite and other.task in (t.contrast.of, t.contrast.minus)
            )
            if len(t.items) < most:
                yield f"{t.name}: {len(t.items)} of {most} items have a matching item in the other task; the others are ignored."
    for n, of in few.items():
        points = f"{90 / math.sqrt(n):.0f} points"
        yield f"{', '.join(of)}: only {n} items; if one item in ten changes, a difference below about {points} is easily missed."
    if len(suites) > 1:
        yield f"{len(suites)} suites are compared together: the correction for multiple comparisons covers all of them."
    yield from tokenizer_warnings(scores)
    yield from differing_versions(scores)
    if len({s.device for s in scores}) > 1:
        yield "The scores come from different devices: small differences may be due to rounding."
    if family.correction == "none" and family.size > 1:
        yield (
            f"{family.size} comparisons are tested at {family.alpha:g} each, without correction: if no configuration differs, about "
            f"{family.size * family.alpha:.2g} false verdicts of better or worse are expected."
        )
    elif len(compared := [t for t in tasks if not t.guarded]) > _MANY_TASKS and family.size:
        yield (
            f"{len(compared)} tasks and contrasts are in one family, and each of them lowers the power of the others: remove tasks that you do "
            "not need. More configurations on the same items cost little power."
        )
    scored = {n for e in entries for s in e for n in s.names}
    roles = {role for entry in entries for role in roles_of(entry)}
    parents = dict.fromkeys(p for e in entries if e[0].configuration.role == "configuration" for p in e[0].configuration.parents)
    missing = [p for p in parents if p not in scored]
    configurations = (e[0].configuration for e in entries if e[0].configuration.role == "configuration")
    if "base" not in roles and any(
        c.recipe or c.parents for c in configurations
    ):  # models and imported runs have no base of their own
        missing.insert(0, "base")
    if len(parents) > 1 and "average" not in roles:
        missing.append("average")
    if missing:
        yield f"Missing controls: {', '.join(missing)}. Score the base, each parent and their average to judge a merge."
    for t in tasks:
        owner = t.suite.owners.get(t.task)
        if owner is not None and owner not in scored and parents:
            yield f"{t.name}: its owner '{owner}' is not among the scored configurations. {nearest(owner, names)}"
        absent = [e[0].configuration.name for e in entries if e[0].configuration.digest not in t.values]
        if absent:
            yield f"{t.name}: no scores of {', '.join(absent)}."


def tokenizer_warnings(scores: Sequence[Scores]) -> Iterable[str]:
    """Yield a warning if configurations with different tokenizers are compared, each of which was scored with its own."""
    names: dict[str, str] = {}
    for s in scores:
        if s.configuration.tokenizer:
            names.setdefault(s.configuration.tokenizer, s.configuration.name)
    if len(names) > 1:
        yield (
            f"{', '.join(names.values())} have different tokenizers, and each is scored with its own: accuracies and perplexities by word or "
            "byte can be compared, numbers by token cannot."
        )


def _clusters(t: Table) -> Iterable[str]:
    """Yield a warning if a task has few clusters, or clusters of very unequal size."""
    sizes = np.bincount(t.cluster)
    k, effective = sizes.size, effective_clusters(sizes)
    if k < FEW_CLUSTERS:
        yield f"{t.name}: only {k} clusters; differences get a verdict only with at least {FEW_CLUSTERS}."
    elif effective < FEW_CLUSTERS:
        yield (
            f"{t.name}: its {k} clusters of unequal size are worth only {effective:.1f} clusters of equal size (the largest has "
            f"{sizes.max() / sizes.sum():.0%} of the items); the largest clusters dominate the result."
        )
    elif k < MANY_CLUSTERS:
        yield f"{t.name}: only {k} clusters; the test detects only large differences, and fewer of them with each further task of the family."
