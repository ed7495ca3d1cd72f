"""Score configurations under plans, with the same scorer for all that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from workbench.evaluate import evaluate
from workbench.evaluate.lineup import LineupEntry
from workbench.evaluate.progress import Overall, overall
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Event, Events, no_events
from workbench.ground.holding import BusyError
from workbench.scores.plan import GENERATED, ScorePlan
from workbench.scores.store import Scores, ScoreStore


def score_all(
    entries: Sequence[LineupEntry],
    plans: Sequence[ScorePlan],
    store: ScoreStore,
    *,
    device: Any,
    events: Events = no_events,
    runs: Path | None = None,
    server: str | None = None,
) -> list[Scores]:
    """Score every configuration under every plan; stored scores are not computed again.

    If a scorer disagrees with lm-eval's own on one configuration, hflm scores all configurations of this call. Calls without that
    configuration keep the plan's own scorer.

    Args:
        entries: The configurations.
        plans: The plans.
        store: Store of scores.
        device: Device for live models.
        events: Receives progress.
        runs: Folder for the checkpoints that the backends vllm and server need. Default: beside the store.
        server: Address of the server that serves configurations by name.
    """
    from workbench.evaluate.check import RefusedError

    check_calibration(entries, plans, store)
    refuse_stateful(entries, plans, store, device, events)
    while True:
        settled = [store.settled(plan, [entry.key(plan) for entry in entries]) for plan in plans]
        try:
            return _score(entries, settled, store, device, events, runs or store.root.parent, server)
        except RefusedError as error:
            events(
                {
                    "stage": "score",
                    "text": f"check against lm-eval's own loop failed: {error}. All configurations of this call are scored by hflm",
                }
            )


def check_calibration(entries: Sequence[LineupEntry], plans: Sequence[ScorePlan], store: ScoreStore) -> None:
    """Check before anything is scored that no router was fitted on prompts of the plans.

    Raises:
        WorkbenchError: If a router was.
    """
    for entry in entries:
        if entry.resolved.beside != "router":
            continue
        from workbench.evaluate.routed import calibration_of, refuse_calibrated_plan

        calibration = calibration_of(entry.resolved)
        for plan in plans:
            key = entry.key(plan)
            if calibration and not (key and store.has(plan, key)):
                refuse_calibrated_plan(plan, calibration, entry.name)


def refuse_stateful(
    entries: Sequence[LineupEntry], plans: Sequence[ScorePlan], store: ScoreStore, device: Any, events: Events
) -> None:
    """Settle on hflm before anything is scored if a model's layers carry a state, so that no configuration is scored twice."""
    from workbench.evaluate.check import STATEFUL
    from workbench.models.live import carries_state
    from workbench.run.materialize import configuration_digest

    masked = [p for p in plans if p.scorer in ("packed", "prefix") and any(kind != GENERATED for kind in p.kinds.values())]
    for entry in entries:
        keys = [(plan, entry.key(plan)) for plan in masked]
        known = all(key and (store.has(plan, key) or store.refused(plan, key)) for plan, key in keys)
        if known or not carries_state(entry.resolved.base.config):
            continue
        digest, _ = configuration_digest(entry.resolved, device, events)
        for plan in masked:
            store.refuse(plan, str(entry.key(plan, digest)), f"{entry.name}: {STATEFUL}")
        events({"stage": "score", "text": f"{entry.name}: {STATEFUL}. All configurations of this call are scored by hflm"})


def _score(
    entries: Sequence[LineupEntry],
    plans: Sequence[ScorePlan],
    store: ScoreStore,
    device: Any,
    events: Events,
    runs: Path,
    server: str | None,
) -> list[Scores]:
    """Score every configuration under plans whose scorers are settled, beside other processes that score the same.

    What another process scores is left for later: first the rest of its configuration, then only that plan. In the end this waits for it.
    """
    from workbench.run.materialize import configuration_digest

    scores: dict[tuple[str, str], Scores] = {}
    whole = overall(entries, plans, store)
    for turn in ("configurations", "plans", "waiting"):
        for number, entry in enumerate(entries, 1):
            if not (left := [plan for plan in plans if (entry.name, plan.place) not in scores]):
                continue
            head: Event = {"stage": "score", "configuration": entry.name, "number": number, "of": len(entries)}
            is_stored = all((key := entry.key(plan)) and store.has(plan, key) for plan in plans)
            whole.begin(entry.name)
            events({**head, "text": "scores are stored" if is_stored else "composing", "overall": whole.told()})
            digest, tensors = configuration_digest(entry.resolved, device, events)
            model = _model(entry, device, tensors, events, runs, server)
            configuration = entry.configuration(digest)
            for plan in left:
                own, progress = entry.plan(plan), _progress(events, head, plan, whole)
                live = partial(model, own)
                scoring = partial(evaluate, own, store, configuration, live, device=str(device), progress=progress)
                with _named(entry):
                    try:
                        whole.begin(entry.name, plan.place)
                        found = scoring(wait=0)
                    except BusyError as busy:
                        if turn == "plans":
                            continue
                        rest = "waiting for it" if turn == "waiting" else "the others come first"
                        events({**head, "text": f"{busy.message}: {rest}"})
                        if turn == "configurations":
                            break
                        found = scoring(wait=store.wait)
                whole.finish()
                scores[entry.name, plan.place] = found
                events({**head, "scored": plan.suite.suite, "overall": whole.told()})
    return [scores[entry.name, plan.place] for entry in entries for plan in plans]


@contextmanager
def _named(entry: LineupEntry) -> Iterator[None]:
    """Raise an error that names the configuration if its model's code fails while it is scored."""
    from workbench.evaluate.check import MODEL_ERRORS, in_one_line

    try:
        yield
    except MODEL_ERRORS as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise WorkbenchError(
            f"{entry.name}: its model fails while it is scored: {in_one_line(error)}",
            f"Leave {entry.name} out, or repair it; the scores of the configurations before it are stored.",
        ) from error


def _model(
    entry: LineupEntry, device: Any, tensors: Any, events: Events, runs: Path, server: str | None
) -> Callable[[ScorePlan], Any]:
    """Return a function that gives the live model, composed once for all plans, or the written checkpoint for other backends."""
    live: list[Any] = []

    def model(plan: ScorePlan) -> Any:
        if plan.suite.backend != "hf":
            from workbench.evaluate.backends import WrittenCheckpoint

            return WrittenCheckpoint(_checkpoint(entry, runs, device, events), entry.name, server)
        if not live:
            from workbench.models.live import check_causal
            from workbench.run.materialize import materialize

            live.append(materialize(entry.resolved, device, tensors, events))
            if not entry.resolved.beside:  # a router chooses anew for other tokens, and a memory answers to a whole prompt
                check_causal(live[0], entry.name)
        return live[0]

    return model


def _checkpoint(entry: LineupEntry, runs: Path, device: Any, events: Events) -> Path:
    """Return the directory of the configuration's checkpoint: the base's own if nothing changes it, else that of a run."""
    from workbench.run.device import Work
    from workbench.run.execute import execute

    resolved = entry.resolved
    if resolved.beside:
        raise WorkbenchError(
            f"{entry.name}: the suite's backend needs a checkpoint, which cannot contain a {resolved.beside}",
            "Score it on a suite with `backend: hf`.",
        )
    packed = resolved.checkpoint.packed  # a server computes in 8 bits what is scored here in the dtype of the result
    if not (resolved.recipe.steps or resolved.dtype or resolved.vocabulary or resolved.base_adapter or packed):
        return Path(resolved.base_path)
    return Path(execute(resolved, runs, Work(device, events=events), wait=True).place)


def stored(
    entries: Sequence[LineupEntry], plans: Sequence[ScorePlan], store: ScoreStore, baseline: str | None = None
) -> tuple[list[Scores], list[str]]:
    """Return the stored scores, and the names of configurations without scores under some plan.

    A plan under which the baseline (default: the base) has no scores is left out, because nothing can be compared with it. If a
    scorer was refused for some configuration, the plan with that scorer and the plan with hflm are both considered, and the one
    with more scored configurations is used.

    Args:
        entries: The configurations.
        plans: The plans.
        store: Store of scores.
        baseline: Name of the baseline.
    """
    bases = [entry.name for entry in entries if (entry.name == baseline if baseline else entry.role == "base")]
    usable: list[tuple[ScorePlan, dict[str, str]]] = []
    for plan in plans:
        settled = store.settled(plan, [entry.key(plan) for entry in entries])
        candidates = [plan.by(scorer) for scorer in dict.fromkeys((settled.scorer, plan.scorer))]
        scored = [(candidate, _keys(entries, candidate, store)) for candidate in candidates]
        candidate, names = max(scored, key=lambda pair: (all(base in pair[1] for base in bases), len(pair[1])))
        if all(base in names for base in bases):
            usable.append((candidate, names))
    scores: list[Scores] = []
    missing: list[str] = []
    for entry in entries:
        plan_keys = [(plan, names[entry.name]) for plan, names in usable if entry.name in names]
        scores += [store.read(plan, key).called(entry.configuration(str(entry.digest()))) for plan, key in plan_keys]
        if not plan_keys or len(plan_keys) < len(usable):
            missing.append(entry.name)
    return scores, missing


def _keys(entries: Sequence[LineupEntry], plan: ScorePlan, store: ScoreStore) -> dict[str, str]:
    """Return the names of the configurations that have scores under a plan, with the keys of these scores."""
    keys = {entry.name: entry.key(plan) for entry in entries}
    return {name: key for name, key in keys.items() if key and store.has(plan, key)}


def _progress(events: Events, head: Event, plan: ScorePlan, whole: Overall) -> Callable[[str, int, int], None]:
    def report(task: str, done: int, total: int) -> None:
        whole.at(done / total if total else 1.0)
        items = sum(len(task_items) for task_items in plan.items.values())
        text = f"{plan.suite.suite}: {task}" if task else f"{plan.suite.suite}: {items} items"
        events({**head, "done": done, "total": total, "text": text, "overall": whole.told()})

    return report
