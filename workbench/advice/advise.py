"""Advice on merging some bricks: how much they overlap, whether one of them should be left out, how long their deltas are, and what to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.advice.evidence import (
    LEAST_ITEMS,
    Accuracy,
    Runner,
    Trial,
    decide,
    falls,
    prompts_of,
)
from workbench.advice.outputs import output_cosines
from workbench.advice.pools import (
    INSTEAD,
    UNEQUAL,
    Pair,
    Regime,
    Shared,
    equal_weights,
    equalized,
    instead,
    lambdas,
    left_out,
    own_texts,
    recommended,
    regime_of,
    shared_prompts,
    unequal,
)
from workbench.errors import UsageError, shell
from workbench.events import progress
from workbench.merge.measuring.deltas import Measures, measure
from workbench.merge.measuring.overlap import Overlap
from workbench.merge.streaming.bricks import StepBricks
from workbench.merge.streaming.deltas import Deltas
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.recipe.methods import method
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.compose import step_context
from workbench.run.kinds.merge import measuring_context
from workbench.run.work import Work
from workbench.steps import MergeMethod

if TYPE_CHECKING:
    from workbench.bricks.brick import Brick


@dataclass(frozen=True)
class Advice:
    """Advice on merging bricks.

    Attributes:
        base: Directory or hub id of the base.
        bricks: Brick -> its directory.
        norms: Brick -> norm of its delta relative to the base's tensors.
        overlap: RV coefficients and the weights that follow.
        pairs: All pairs.
        regime: The relation of the bricks to each other.
        says: The regime as a sentence.
        step: The recommended step; None if no merge is recommended.
        reasons: Reasons for the step.
        unknown: Sentences on what the advice does not cover, and how to find out.
        dropped: Brick that the step leaves out -> why.
        warnings: What can spoil any merge of these bricks.
        sweep: Values of lambda to compare; empty if the step has none, or a measurement has chosen one.
        trial: What was run; None if nothing was.
    """

    base: str
    bricks: Mapping[str, str]
    norms: Mapping[str, float]
    overlap: Overlap
    pairs: Sequence[Pair]
    regime: Regime
    says: str
    step: Mapping[str, Any] | None
    reasons: Sequence[str]
    unknown: Sequence[str] = field(default_factory=list)
    dropped: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = field(default_factory=list)
    sweep: Sequence[float] = ()
    trial: Trial | None = None

    def recipe(self, adapter: bool, project: Path) -> dict[str, Any]:
        """Return the recommended recipe as plain data.

        Args:
            adapter: Let the result be an adapter; only for bricks that are adapters.
            project: Folder that the recipe's paths start from. Directories outside it become absolute paths.
        """
        assert self.step is not None

        def place(name: str) -> str:
            path = Path(name).resolve()
            if not path.is_dir():
                return name
            return path.relative_to(project).as_posix() if path.is_relative_to(project) else str(path)

        output = {"output": {"form": "adapter"}} if adapter else {}
        bricks = {name: place(brick) for name, brick in self.bricks.items() if name not in self.dropped}
        step = {key: value for key, value in self.step.items() if not (key == "bricks" and isinstance(value, list))}
        sweep = {"sweep": {"mix.lambda": list(self.sweep)}} if self.sweep else {}
        return {"version": 1, "base": place(self.base), "bricks": bricks, "steps": [{"id": "mix", **step}], **sweep, **output}


def advise(
    bricks: Mapping[str, str],
    base: str,
    files: Mapping[str, Path],
    *,
    project: Path,
    work: Work,
    outputs: bool = False,
    measured: bool = False,
) -> Advice:
    """Measure bricks on their base and recommend how to merge them.

    Args:
        bricks: Name -> directory or hub id.
        base: Directory or hub id of the base.
        files: Brick -> jsonl file of its own prompts and answers, where its card names none.
        project: Folder that relative paths start from.
        work: Where to compute.
        outputs: Run the base on the bricks' texts, and measure the cosine of what each pair adds there.
        measured: Run the bricks alone and a few merges on some of the bricks' prompts.

    Raises:
        WorkbenchError: If a brick does not fit the base, a file of texts is invalid, or texts that a measurement needs are missing.
    """
    step = {"merge": "task_arithmetic", "weights": "auto"}
    resolved = resolve(
        from_data({"version": 1, "name": "advise", "base": base, "bricks": dict(bricks), "steps": [step]}, project)
    )
    texts = own_texts(resolved.on_disk, files)
    prompts = {name: prompts_of(rows, resolved.base.config) for name, rows in texts.items()}
    if outputs and len(texts) < 2:
        raise _missing("--outputs", next(name for name in bricks if name not in texts), 0)
    if measured and (few := [name for name in bricks if len(prompts.get(name, ())) < LEAST_ITEMS]):
        raise _missing("--measure", few[0], len(prompts.get(few[0], ())))
    shared = shared_prompts(texts)
    context = step_context(resolved, 0, work.device, work.events)
    deltas = {name: context.deltas(name) for name in bricks}
    added = output_cosines(measuring_context(context, StepBricks(deltas)), deltas, texts) if outputs else {}
    made = method(MergeMethod, "task_arithmetic").model_validate(step)
    merged = MergedWeights(resolved.base, resolved.base, made, StepBricks(deltas))
    overlap = merged.overlap(work.device)
    assert overlap is not None
    measures = _measures(resolved.base, deltas, work)
    pairs = [
        replace(_pair(one, two, overlap, measures[one], shared), output=added.get((one, two)))
        for one, two in combinations(bricks, 2)
    ]
    norms = {name: float(m.total.document()["relative"] or 0.0) for name, m in measures.items()}
    runner = Runner(bricks, base, prompts, project, work) if measured else None
    advice = Advice(
        base, bricks, norms, overlap, pairs, "single", "", None, [], _unknown(resolved.on_disk, texts, shared, measured)
    )
    advice = _advised(replace(advice, trial=_alone(runner, bricks) if runner else None), set(texts))
    return _tried(advice, runner) if runner else advice


def _missing(option: str, name: str, count: int) -> UsageError:
    """Return the error that a brick has too few texts for a measurement."""
    need = f"; expected {LEAST_ITEMS} short prompts with answers or more" if option == "--measure" else ""
    return UsageError(
        f"{option} compares bricks on their own texts, and {shell(name)} has {count or 'none'}{need}",
        f"Name them: --texts {shell(name)}=FILE.jsonl",
    )


def _measures(base: Model, deltas: Mapping[str, Deltas], work: Work) -> dict[str, Measures]:
    """Measure each brick, and compare it with the later ones."""
    found = {}
    for number, name in enumerate(deltas):
        others = {other: deltas[other] for other in list(deltas)[number + 1 :]}
        report = _counted(progress(work.events, "measure", name))
        found[name] = measure(base, deltas[name], others, device=work.device, threads=work.threads, progress=report)
    return found


def _alone(runner: Runner, bricks: Iterable[str]) -> Trial:
    """Run the base, and each brick alone on its own prompts."""
    steps = {name: {"merge": "task_arithmetic", "bricks": [name]} for name in bricks}
    alone = {name: runner.run(name, step, [name]).right[name] for name, step in steps.items()}
    return Trial(runner.items, runner.run("base", None), alone)


def _advised(advice: Advice, with_texts: Collection[str]) -> Advice:
    """Return the advice with the bricks that it leaves out, its regime, its step and its warnings."""
    norms, pairs, trial = advice.norms, advice.pairs, advice.trial
    dropped, warnings = left_out(norms, pairs, {} if trial is None else trial.alone)
    kept = [name for name in norms if name not in dropped]
    if len(kept) < 2:
        regime, says = regime_of(norms, pairs)
        if regime not in INSTEAD:  # all bricks but one change nothing
            regime, says = "single", f"Nothing to merge: {'; '.join(f'{name} {why}' for name, why in dropped.items())}."
        return replace(
            advice, regime=regime, says=says, reasons=instead(regime, pairs, list(norms)), dropped=dropped, warnings=warnings
        )
    norms = {name: norms[name] for name in kept}
    pairs = [pair for pair in pairs if pair.one in norms and pair.two in norms]
    regime, says = regime_of(norms, pairs)
    step, reasons = recommended(regime, kept, pairs)
    if max(norms.values()) > UNEQUAL * min(norms.values()):
        weights = equal_weights(norms, [name for name in kept if trial is not None and name not in trial.weak])
        warnings.append(unequal(norms, weights))
        if step is not None:
            step = equalized(step, weights)
    elif step is not None and dropped:
        step = {**step, "bricks": kept}
    if step is not None and set(kept) <= set(with_texts):
        reasons.append(_FITTED)
    sweep = () if step is None else lambdas(step)
    return replace(advice, regime=regime, says=says, step=step, reasons=reasons, dropped=dropped, warnings=warnings, sweep=sweep)


def _tried(advice: Advice, runner: Runner) -> Advice:
    """Run the recommended step with each value of lambda, and the average, and advise the best if the difference is clear."""
    assert advice.trial is not None
    trial = advice.trial
    weak = [
        f"{name} alone answers {Accuracy.of(trial.alone[name])} % of its own prompts, not shown better than the base ({change}): "
        "check its scale, its sign and its texts."
        for name, change in trial.weak.items()
        if name not in advice.dropped
    ]
    advice = replace(advice, warnings=[*advice.warnings, *weak])
    kept = [name for name in advice.bricks if name not in advice.dropped]
    tsv = {"merge": "tsv", "weights": "auto", "bricks": kept}
    tried = tsv if advice.regime == "far" and advice.step is None else advice.step  # far bricks: to see what a merge keeps
    if tried is None:
        return advice
    steps: dict[str, Mapping[str, Any]] = {f"{tried['merge']}, lambda {v:g}": {**tried, "lambda": v} for v in lambdas(tried)}
    suggested = next((name for name in steps if name.endswith("lambda 1")), "average")
    steps |= {"average": {"merge": "average", "bricks": kept}} if steps else {"average": tried, "tsv": tsv}
    candidates = [runner.run(name, step, kept) for name, step in steps.items()]
    verdict = decide(candidates, suggested)
    advised = next(c for c in candidates if c.name == verdict.name)
    found = falls(trial.alone, advised)
    step, sweep = advice.step, advice.sweep
    if step is not None and verdict.clear and advised.step is not None:
        step, sweep = {k: v for k, v in advised.step.items() if k != "bricks" or v != list(advice.bricks)}, ()
    says = [verdict.says, *(f"{name} falls in this merge: {change} against the brick alone." for name, change in found.items())]
    return replace(
        advice,
        step=step,
        sweep=sweep,
        reasons=[*says, *advice.reasons],
        trial=replace(trial, candidates=candidates, verdict=verdict, falls=found),
    )


def _counted(report: Callable[[int, int, str], None]) -> Callable[[int, int], None]:
    """Return the callback of `measure`, which counts tensors."""
    return lambda done, total: report(done, total, f"{total} tensors")


def _pair(one: str, two: str, overlap: Overlap, measured: Measures, shared: Mapping[tuple[str, str], Shared]) -> Pair:
    i, j = overlap.bricks.index(one), overlap.bricks.index(two)
    changed = {n for n, sums in measured.layers.items() if n is not None and (sums.square or sums.meetings[two].square)}
    by_layer = [pairs[i][j] for layer, pairs in overlap.layers.items() if layer in changed]
    other = measured.total.document()["others"][two]
    own = measured.total.square
    square = measured.total.meetings[two].square
    return Pair(
        one,
        two,
        overlap.pairs[i][j],
        min(by_layer, default=None),
        max(by_layer, default=None),
        other["cosine"],
        other["conflict"],
        math.sqrt(own / square) if square else None,
        shared.get((one, two)) or shared.get((two, one)),
    )


_FITTED = (
    "Every brick has texts of its own, so score `merge: featcal` beside it, with `calibration` for each brick: on most pools of a small "
    "language model and of tiny ones it kept more of the skills than TSV (docs/merging-methods.md)."
)


def _unknown(bricks: Mapping[str, Brick], texts: Mapping[str, Any], shared: Mapping[Any, Shared], measured: bool) -> list[str]:
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
