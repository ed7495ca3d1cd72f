"""Advice on merging some bricks: how much they overlap, whether one of them should be left out, how long their deltas are, and what to try."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench import yamldoc
from workbench.advice.evidence import (
    LEAST_ITEMS,
    Accuracy,
    Candidate,
    Change,
    Fall,
    Runner,
    ScoredBefore,
    Trial,
    decide,
    falls,
    on_bricks,
    prompts_of,
    scored_before,
    weak,
)
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
from workbench.merge.measuring.delta_sums import Measures
from workbench.merge.measuring.deltas import measure
from workbench.merge.measuring.matrices import Overlap
from workbench.merge.streaming.deltas import Deltas, StepBricks
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.project import find_project
from workbench.recipe.methods import method
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.results import Number, Part, Result
from workbench.run.compose import step_context
from workbench.run.device import Work
from workbench.scores.statistics import Floats
from workbench.scores.store import ScoreStore
from workbench.steps import MergeMethod

if TYPE_CHECKING:
    from workbench.bricks.brick import Brick


class AdvisedBrick(Part):
    """A brick."""

    name: str
    """Name of its directory."""
    path: str
    """Its directory."""
    kind: Literal["adapter", "checkpoint"]
    """The kind of brick."""
    relative_norm: Number
    """Norm of its delta over that of the base's same tensors."""
    weight: Number
    """1 / Σ RV, the weight that `weights: auto` gives it."""


class LeftOut(Part):
    """A brick that the recommended step leaves out."""

    name: str
    """The brick."""
    because: str
    """Why, as the rest of a sentence that starts with the name."""


class Advice(Result):
    """Advice on merging bricks."""

    base: str
    """The base."""
    bricks: list[AdvisedBrick]
    """The bricks, as named."""
    pairs: list[Pair]
    """All pairs of bricks."""
    regime: Regime
    """The relation of the bricks to each other."""
    says: str
    """The regime as a sentence."""
    step: dict[str, object] | None
    """The recommended step; null if no merge is recommended."""
    reasons: list[str]
    """Reasons for the step, or what to do instead of a merge."""
    unknown: list[str]
    """Sentences on what the advice does not cover, and how to find out."""
    left_out: list[LeftOut]
    """Bricks that the step leaves out: copies, bricks that point against another one, and bricks that change nothing."""
    warnings: list[str]
    """Properties of these bricks that can spoil any merge of them."""
    sweep: list[Number]
    """Values of lambda that the written recipe compares; empty if it has one configuration."""
    trial: Trial | None
    """The models that were run; null without --measure."""
    scored_before: list[ScoredBefore]
    """The best stored configurations of the same bricks."""
    recipe: str | None
    """The file that was written with --write."""

    def recipe_text(self, path: Path) -> str:
        """Return the recommended recipe as YAML for a file, with the reasons as comments."""
        command = shell("workbench", "eval" if self.sweep else "run", path)
        left_out = [f"left out: {brick.name} {brick.because}" for brick in self.left_out]
        lines = (command, self.says, *left_out, *self.warnings, *self.reasons)
        return "".join(f"# {line}\n" for line in lines) + yamldoc.dump(self._recipe(find_project(path)), width=120)

    def _recipe(self, project: Path) -> dict[str, object]:
        """Return the recommended recipe as plain data. Directories outside the project become absolute paths."""
        assert self.step is not None

        def place(name: str) -> str:
            path = Path(name).resolve()
            if not path.is_dir():
                return name
            return path.relative_to(project).as_posix() if path.is_relative_to(project) else str(path)

        dropped = {brick.name for brick in self.left_out}
        bricks = {brick.name: place(brick.path) for brick in self.bricks if brick.name not in dropped}
        step = {key: value for key, value in self.step.items() if not (key == "bricks" and isinstance(value, list))}
        sweep = {"sweep": {"mix.lambda": list(self.sweep)}} if self.sweep else {}
        adapters = all(brick.kind == "adapter" for brick in self.bricks)
        output = {"output": {"form": "adapter"}} if adapters else {}
        return {"version": 1, "base": place(self.base), "bricks": bricks, "steps": [{"id": "mix", **step}], **sweep, **output}


@dataclass(frozen=True)
class _Proposal:
    """The advice that follows from the measurements. Its fields are those of `Advice`, with the reason of each brick that is left out."""

    regime: Regime
    says: str
    reasons: list[str]
    left_out: dict[str, str]
    warnings: list[str]
    step: Mapping[str, object] | None = None
    sweep: tuple[float, ...] = ()


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
    """Measure bricks on their base and recommend how to merge them.

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
    texts = own_texts(resolved.on_disk, files)
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
    weakest = weak(asked_base, alone) if asked_base else {}
    proposal, trial = _proposed(norms, pairs, alone, weakest, set(texts), bricks, base), None
    if runner and asked_base:
        proposal, trial = _tried(proposal, asked_base, alone, weakest, runner)
    return Advice(
        base=base,
        bricks=[
            AdvisedBrick(
                name=name, path=path, kind=resolved.on_disk[name].kind, relative_norm=norms[name], weight=overlap.weights[name]
            )
            for name, path in bricks.items()
        ],
        pairs=pairs,
        regime=proposal.regime,
        says=proposal.says,
        step=None if proposal.step is None else dict(proposal.step),
        reasons=proposal.reasons,
        unknown=_unknown(resolved.on_disk, texts, shared, measured),
        left_out=[LeftOut(name=name, because=why) for name, why in proposal.left_out.items()],
        warnings=proposal.warnings,
        sweep=list(proposal.sweep),
        trial=trial,
        scored_before=scored_before(store, {name: resolved.on_disk[name].stored_bytes for name in bricks}) if store else [],
        recipe=None,
    )


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


def _proposed(
    norms: Mapping[str, float],
    pairs: Sequence[Pair],
    alone: Mapping[str, Floats],
    weakest: Collection[str],
    with_texts: Collection[str],
    bricks: Mapping[str, str],
    base: str,
) -> _Proposal:
    """Return the bricks to leave out, the regime of the others, the step and the warnings."""
    dropped, warnings = left_out(norms, pairs, alone)
    used = [name for name in norms if name not in dropped]
    if len(used) < 2:
        regime, says = regime_of(norms, pairs)
        if regime not in INSTEAD:  # all bricks but one change nothing
            regime, says = "single", f"Nothing to merge: {'; '.join(f'{name} {why}' for name, why in dropped.items())}."
        return _Proposal(regime, says, instead(regime, pairs, bricks), dropped, warnings)
    norms = {name: norms[name] for name in used}
    pairs = [pair for pair in pairs if pair.one in norms and pair.two in norms]
    regime, says = regime_of(norms, pairs)
    step, reasons = recommended(regime, {name: bricks[name] for name in used}, pairs, base)
    if max(norms.values()) > UNEQUAL * min(norms.values()):
        weights = equal_weights(norms, [name for name in used if alone and name not in weakest])
        warnings.append(unequal(norms, weights))
        if step is not None:
            step = equalized(step, weights)
    elif step is not None and dropped:
        step = {**step, "bricks": used}
    if step is not None and set(used) <= set(with_texts):
        reasons.append(_FITTED)
    sweep = () if step is None else lambdas(step)
    return _Proposal(regime, says, reasons, dropped, warnings, step, sweep)


def _tried(
    proposal: _Proposal, base: Candidate, alone: Mapping[str, Floats], weakest: Mapping[str, Change], runner: Runner
) -> tuple[_Proposal, Trial]:
    """Run the recommended step with each value of lambda, and the average, and propose the best if the difference is clear."""
    used = [name for name in alone if name not in proposal.left_out]
    warnings = [
        f"{name} alone answers {Accuracy.of(alone[name])} % of its own prompts, not shown better than the base ({change}): "
        "check its scale, its sign and its texts."
        for name, change in weakest.items()
        if name in used
    ]
    proposal = replace(proposal, warnings=[*proposal.warnings, *warnings])
    tsv = {"merge": "tsv", "weights": "auto", "bricks": used}
    step = tsv if proposal.regime == "far" and proposal.step is None else proposal.step  # far bricks: to see what a merge keeps
    candidates, verdict, found = list[Candidate](), None, dict[str, Change]()
    if step is not None:
        steps: dict[str, Mapping[str, object]] = {f"{step['merge']}, lambda {v:g}": {**step, "lambda": v} for v in lambdas(step)}
        suggested = next((name for name in steps if name.endswith("lambda 1")), "average")
        steps |= {"average": {"merge": "average", "bricks": used}} if steps else {"average": step, "tsv": tsv}
        candidates = [runner.run(name, tried, used) for name, tried in steps.items()]
        verdict = decide(candidates, suggested)
        best = next(c for c in candidates if c.name == verdict.name)
        found = falls(alone, best)
        says = [
            verdict.says,
            *(f"{name} falls in this merge: {change} against the brick alone." for name, change in found.items()),
        ]
        proposal = replace(proposal, reasons=[*says, *proposal.reasons])
        if proposal.step is not None and verdict.clear and best.step is not None:
            chosen = {key: value for key, value in best.step.items() if key != "bricks" or value != list(alone)}
            proposal = replace(proposal, step=chosen, sweep=())
    trial = Trial(
        items=runner.items,
        base=base.tried(),
        alone=on_bricks(alone),
        candidates=[candidate.tried() for candidate in candidates],
        advised=verdict.name if verdict and proposal.step is not None else None,
        clear=verdict is not None and verdict.clear,
        says=verdict.says if verdict else None,
        falls=[Fall(brick=name, change=change) for name, change in found.items()],
    )
    return proposal, trial


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


_FITTED = (
    "Every brick has texts of its own, so score `merge: featcal` beside it, with `calibration` for each brick: on most pools of a small "
    "language model and of tiny ones it kept more of the skills than TSV (docs/merging-methods.md)."
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
