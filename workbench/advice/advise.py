"""Advice on some bricks: how much they overlap, whether one should be left out, how long their deltas are, and whether to merge or to route."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.advice.evidence import LEAST_ITEMS, prompts_of, scored_before, weak
from workbench.advice.pools import Pair, Shared, own_files, shared_prompts
from workbench.advice.proposal import Pool, many, proposed, tried
from workbench.advice.result import Advice, AdvisedBrick, LeftOut
from workbench.advice.runner import Runner
from workbench.ground.errors import UsageError, shell
from workbench.ground.events import progress
from workbench.merge.measuring.delta_sums import Measures
from workbench.merge.measuring.deltas import measure
from workbench.merge.measuring.matrices import Overlap
from workbench.merge.streaming.deltas import Deltas, StepBricks
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.models.texts import read_texts
from workbench.recipe.methods import method
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.compose import step_context
from workbench.run.device import Work
from workbench.scores.statistics import Floats
from workbench.scores.store import ScoreStore
from workbench.steps import MergeMethod

if TYPE_CHECKING:
    from workbench.bricks.brick import Brick


def advise(
    bricks: Mapping[str, str],
    base: str,
    files: Mapping[str, Path],
    *,
    project: Path,
    work: Work,
    measured: bool = False,
    store: ScoreStore | None = None,
) -> Advice:
    """Measure bricks on their base and recommend how to merge them, or to route between them.

    Args:
        bricks: Name -> directory or hub id.
        base: Directory or hub id of the base.
        files: Brick -> jsonl file of its own prompts and answers, where its card names none.
        project: Folder that relative paths start from.
        work: Where to compute.
        measured: Run the bricks alone and a few merges on some of the bricks' prompts.
        store: Scores of earlier recipes; None leaves `scored_before` empty.

    Raises:
        WorkbenchError: If a brick does not fit the base, a file of texts is invalid, or texts that a measurement needs are missing.
    """
    step = {"merge": "task_arithmetic", "weights": "auto"}
    resolved = resolve(
        from_data({"version": 1, "name": "advise", "base": base, "bricks": dict(bricks), "steps": [step]}, project)
    )
    own = own_files(resolved.on_disk, files)
    texts = {name: read_texts(found.file, found.label) for name, found in own.items()}
    prompts = {name: prompts_of(rows, resolved.base.config) for name, rows in texts.items()}
    if measured and (few := [name for name in bricks if len(prompts.get(name, ())) < LEAST_ITEMS]):
        raise UsageError(
            f"--measure compares bricks on their own texts, and {shell(few[0])} has {len(prompts.get(few[0], ())) or 'none'}; "
            f"expected {LEAST_ITEMS} short prompts with answers or more",
            f"Name them: --texts {shell(few[0])}=FILE.jsonl",
        )
    shared = shared_prompts(texts)
    context = step_context(resolved, 0, work.device, work.events)
    deltas = {name: context.deltas(name) for name in bricks}
    made = method(MergeMethod, "task_arithmetic").model_validate(step)
    overlap = MergedWeights(resolved.base, resolved.base, made, StepBricks(deltas)).overlap(work.device)
    assert overlap is not None
    measures = _measures(resolved.base, deltas, work)
    pairs = [_pair(one, two, overlap, measures[one], shared) for one, two in combinations(bricks, 2)]
    norms = {name: m.total.relative or 0.0 for name, m in measures.items()}
    runner = Runner(bricks, base, prompts, project, work) if measured else None
    alone = _alone(runner, bricks) if runner else {}
    asked_base = runner.run("base", None) if runner else None
    kinds = {name: resolved.on_disk[name].kind for name in bricks}
    pool = Pool(base, bricks, kinds, own, norms, pairs, alone, weak(asked_base, alone) if asked_base else {})
    proposal, trial = proposed(pool), None
    if runner and asked_base:
        proposal, trial = tried(proposal, asked_base, pool, runner)
    else:
        proposal = many(proposal, pool)
    return Advice(
        base=base,
        bricks=_rows(pool, overlap),
        pairs=pairs,
        regime=proposal.regime,
        says=proposal.says,
        step=None if proposal.step is None else dict(proposal.step),
        groups=proposal.groups,
        reasons=proposal.reasons,
        unknown=_unknown(resolved.on_disk, texts, shared, measured),
        left_out=[LeftOut(name=name, because=why) for name, why in proposal.left_out.items()],
        warnings=proposal.warnings,
        sweep=list(proposal.sweep),
        trial=trial,
        scored_before=scored_before(store, {name: resolved.on_disk[name].stored_bytes for name in bricks}) if store else [],
        recipe=None,
    )


def _rows(pool: Pool, overlap: Overlap) -> list[AdvisedBrick]:
    """Return the bricks as they stand in the result."""
    return [
        AdvisedBrick(
            name=name,
            path=path,
            kind=pool.kinds[name],
            relative_norm=pool.norms[name],
            weight=overlap.weights[name],
            texts=str(pool.files[name].file) if name in pool.files else None,
        )
        for name, path in pool.bricks.items()
    ]


def _measures(base: Model, deltas: Mapping[str, Deltas], work: Work) -> dict[str, Measures]:
    """Measure each brick, and compare it with the later ones."""
    found = {}
    for number, name in enumerate(deltas):
        others = {other: deltas[other] for other in list(deltas)[number + 1 :]}
        report = _counted(progress(work.events, "measure", name))
        found[name] = measure(base, deltas[name], others, device=work.device, threads=work.threads, progress=report)
    return found


def _alone(runner: Runner, bricks: Iterable[str]) -> dict[str, Floats]:
    """Run each brick alone on its own prompts."""
    steps = {name: {"merge": "task_arithmetic", "bricks": [name]} for name in bricks}
    return {name: runner.run(name, step, [name]).right[name] for name, step in steps.items()}


def _counted(report: Callable[[int, int, str], None]) -> Callable[[int, int], None]:
    """Return the callback of `measure`, which counts tensors."""
    return lambda done, total: report(done, total, f"{total} tensors")


def _pair(one: str, two: str, overlap: Overlap, measured: Measures, shared: Mapping[tuple[str, str], Shared]) -> Pair:
    i, j = overlap.bricks.index(one), overlap.bricks.index(two)
    changed = {n for n, sums in measured.layers.items() if n is not None and (sums.square or sums.meetings[two].square)}
    by_layer = [pairs[i][j] for layer, pairs in overlap.layers.items() if layer in changed]
    return Pair(
        one=one,
        two=two,
        rv=overlap.pairs[i][j],
        rv_lowest_layer=min(by_layer, default=None),
        rv_highest_layer=max(by_layer, default=None),
        cosine=measured.total.cosine(two),
        sign_conflict=measured.total.meetings[two].conflict,
        shared=shared.get((one, two)) or shared.get((two, one)),
    )


def _unknown(bricks: Mapping[str, Brick], texts: Mapping[str, object], shared: Mapping[Any, Shared], measured: bool) -> list[str]:
    """Return what the advice does not know."""
    lines = ["The score: nothing here has run the merged model. `workbench eval` compares the recipe with its controls."]
    if measured:
        lines = [
            "The score on other prompts: bricks have learned their training texts. Name prompts that they have not seen with --texts; "
            "`workbench eval` compares the recipe with its controls."
        ]
    if missing := [name for name in bricks if name not in texts]:
        lines.append(
            f"Contradictions of {', '.join(missing)}: no texts of their own were found. Name them: --texts {shell(missing[0])}=FILE.jsonl"
        )
    if shared and not any(s.prompts for s in shared.values()):
        lines.append("Contradictions on prompts that are worded differently: the bricks' texts share no prompt word for word.")
    return lines
