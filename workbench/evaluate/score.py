"""Scores configurations under plans, with one scorer for all that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.evaluate import evaluate
from workbench.evaluate.lineup import LineupEntry
from workbench.events import Events, no_events
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Scores, ScoreStore


def score_all(
    entries: Sequence[LineupEntry], plans: Sequence[ScorePlan], store: ScoreStore, *, device: Any, events: Events = no_events,
    runs: Path | None = None, server: str | None = None,
) -> list[Scores]:  # fmt: skip
    """Scores of every configuration under every plan; what the store has is not computed again.

    Where a scorer does not agree with lm-eval's on one configuration, all of this call are scored by hflm. Calls without that configuration
    go on with the plan's own scorer.

    Args:
        runs: Where checkpoints are written for the backends vllm and server; beside the store if omitted.
        server: Address of the server that serves configurations by name.
    """
    from workbench.evaluate.check import RefusedError

    while True:
        digests = [entry.digest() for entry in entries]
        settled = [store.settled(plan, [e.key(plan, d) for e, d in zip(entries, digests, strict=True)]) for plan in plans]
        try:
            return _score(entries, settled, store, device, events, runs or store.root.parent, server)
        except RefusedError as error:
            events(
                {
                    "stage": "score",
                    "text": f"checked against lm-eval's own loop: {error}. All configurations of this call are scored by hflm",
                }
            )


def _score(
    entries: Sequence[LineupEntry],
    plans: Sequence[ScorePlan],
    store: ScoreStore,
    device: Any,
    events: Events,
    runs: Path,
    server: str | None,
) -> list[Scores]:
    from workbench.run.materialize import configuration_digest

    found: list[Scores] = []
    for number, entry in enumerate(entries, 1):
        head = {"stage": "score", "configuration": entry.name, "number": number, "of": len(entries)}
        known = entry.digest()
        before = known and all(store.has(plan, str(entry.key(plan, known))) for plan in plans)
        events({**head, "text": "scored before" if before else "composing"})
        digest, tensors = configuration_digest(entry.resolved, device, events)
        model = _model(entry, device, tensors, events, runs, server)
        for plan in plans:
            found.append(evaluate(plan, store, entry.configuration(digest), partial(model, plan),
                                  device=str(device), progress=_progress(events, head, plan)))  # fmt: skip
    return found


def _model(
    entry: LineupEntry, device: Any, tensors: Any, events: Events, runs: Path, server: str | None
) -> Callable[[ScorePlan], Any]:
    """The live model, composed once for all plans; for a backend that reads checkpoints the written one."""
    live: list[Any] = []

    def model(plan: ScorePlan) -> Any:
        if plan.suite.backend != "hf":
            from workbench.evaluate.backends import WrittenCheckpoint

            return WrittenCheckpoint(_checkpoint(entry, runs, device, events), entry.name, server)
        if not live:
            from workbench.run.materialize import materialize

            live.append(materialize(entry.resolved, device, tensors, events))
        return live[0]

    return model


def _checkpoint(entry: LineupEntry, runs: Path, device: Any, events: Events) -> Path:
    """Directory of the configuration's checkpoint: the base's own where nothing was done to it, else a run's.

    Errors: a memory, which acts on the live model and which no server of checkpoints knows.
    """
    from workbench.run.execute import execute

    resolved = entry.resolved
    if resolved.recipe.memory or resolved.memory:
        raise WorkbenchError(
            f"{entry.name}: a memory acts on the live model, and the suite's backend serves checkpoints",
            "Score it on a suite with `backend: hf`.",
        )
    if not resolved.recipe.steps and resolved.dtype is None and resolved.vocabulary is None:
        return Path(resolved.base_path)
    return Path(execute(resolved, runs, device=device, events=events)["model"])


def stored(
    entries: Sequence[LineupEntry], plans: Sequence[ScorePlan], store: ScoreStore, baseline: str | None = None
) -> tuple[list[Scores], list[str]]:
    """Scores that the store has, and the names of the configurations that it has none of under some plan.

    A plan under which the baseline, the base if omitted, was not scored is left out: nothing could be compared with it. Where a scorer was
    refused for some configuration, the plan with that scorer and the plan with hflm are both looked at, and the one that has more of the
    configurations counts: a refused one hides no others.
    """
    digests = {entry.name: entry.digest() for entry in entries}
    bases = [entry.name for entry in entries if (entry.name == baseline if baseline else entry.role == "base")]
    usable: list[tuple[ScorePlan, dict[str, str]]] = []
    for plan in plans:
        settled = store.settled(plan, [entry.key(plan, digests[entry.name]) for entry in entries])
        ways = [plan.by(scorer) for scorer in dict.fromkeys((settled.scorer, plan.scorer))]
        have = [(way, _keys(entries, digests, way, store)) for way in ways]
        way, names = max(have, key=lambda pair: (all(base in pair[1] for base in bases), len(pair[1])))
        if all(base in names for base in bases):
            usable.append((way, names))
    found: list[Scores] = []
    missing: list[str] = []
    for entry in entries:
        have_it = [(plan, names[entry.name]) for plan, names in usable if entry.name in names]
        found += [store.read(plan, key).called(entry.configuration(str(digests[entry.name]))) for plan, key in have_it]
        if not have_it or len(have_it) < len(usable):
            missing.append(entry.name)
    return found, missing


def _keys(
    entries: Sequence[LineupEntry], digests: Mapping[str, str | None], plan: ScorePlan, store: ScoreStore
) -> dict[str, str]:
    """Names of the configurations that have scores under a plan, with what these are stored by."""
    keys = {entry.name: entry.key(plan, digests[entry.name]) for entry in entries}
    return {name: key for name, key in keys.items() if key and store.has(plan, key)}


def _progress(events: Events, head: dict[str, Any], plan: ScorePlan) -> Callable[[str, int, int], None]:
    def report(task: str, done: int, total: int) -> None:
        items = sum(len(found) for found in plan.items.values())
        text = f"{plan.suite.suite}: {task}" if task else f"{plan.suite.suite}: {items} items"
        events({**head, "done": done, "total": total, "text": text})

    return report
