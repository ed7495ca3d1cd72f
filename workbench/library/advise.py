"""Advice on merging some bricks, from their weights alone: how much they overlap, whether they contradict each other, and what to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.errors import UsageError, shell
from workbench.events import progress
from workbench.library.contradictions import Shared, own_texts, shared_prompts
from workbench.library.measure import Measures, measure
from workbench.library.outputs import output_cosines
from workbench.merge.measuring.overlap import Overlap
from workbench.merge.streaming.bricks import StepBricks
from workbench.merge.streaming.merged import MergedWeights
from workbench.recipe.methods import method
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.compose import step_context
from workbench.run.kinds.merge import measuring_context
from workbench.run.work import Work
from workbench.steps import MergeMethod

if TYPE_CHECKING:
    from workbench.bricks.brick import Brick

DISJOINT = 0.15
"""Largest RV coefficient of a pair that counts as disjoint."""
OVERLAPPING = 0.45
"""Smallest RV coefficient of a pair that counts as overlapping. Fine-tunes of different skills reach it where they are far from a small base
(benchmarks/merge_pools.py); between adapters of a language model it is below 0.1."""
SAME = 0.999
"""Smallest RV coefficient and cosine of two bricks that count as one."""
OPPOSED = -0.3
"""Largest cosine of two deltas that count as opposed, such as a brick and its negation."""
FAR = 0.15
"""Norm of a delta, relative to the base's tensors, from which sums of different skills are in doubt; it is about 1.4 for unrelated
models and below 0.02 for adapters of language models. Above it no merge of different skills kept much (benchmarks/merge_pools.py)."""

Regime = Literal["single", "same", "contradicting", "far", "opposed", "overlapping", "between", "disjoint"]


@dataclass(frozen=True)
class Pair:
    """Two bricks.

    Attributes:
        one: A brick.
        two: Another brick.
        rv: Mean RV coefficient of their deltas.
        low: Smallest mean of a layer that one of them changes; None if neither changes a layer.
        high: Largest mean of such a layer.
        cosine: Cosine of the deltas; None if one of them is 0.
        conflict: Share of elements with opposite signs, among those where both are nonzero.
        ratio: Norm of the first delta over that of the second.
        shared: Prompts that their texts share; None if one of them has no texts.
        output: Mean cosine of what they add to the outputs of linear layers on their texts; None if it was not measured.
    """

    one: str
    two: str
    rv: float
    low: float | None
    high: float | None
    cosine: float | None
    conflict: float | None
    ratio: float | None
    shared: Shared | None
    output: float | None = None

    @property
    def names(self) -> str:
        """Both names, for a sentence."""
        return f"{self.one} and {self.two}"


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
        bricks = {name: place(brick) for name, brick in self.bricks.items()}
        return {"version": 1, "base": place(self.base), "bricks": bricks, "steps": [{"id": "mix", **self.step}], **output}


def advise(
    bricks: Mapping[str, str],
    base: str,
    files: Mapping[str, Path],
    *,
    project: Path,
    work: Work,
    outputs: bool = False,
) -> Advice:
    """Measure bricks on their base and recommend how to merge them.

    Args:
        bricks: Name -> directory or hub id.
        base: Directory or hub id of the base.
        files: Brick -> jsonl file of its own prompts and answers, where its card names none.
        project: Folder that relative paths start from.
        work: Where to compute.
        outputs: Run the base on the bricks' texts, and measure the cosine of what each pair adds there.

    Raises:
        WorkbenchError: If a brick does not fit the base, a file of texts is invalid, or `outputs` is asked for and fewer than two bricks
            have texts.
    """
    step = {"merge": "task_arithmetic", "weights": "auto"}
    resolved = resolve(
        from_data({"version": 1, "name": "advise", "base": base, "bricks": dict(bricks), "steps": [step]}, project)
    )
    texts = own_texts(resolved.on_disk, files)
    if outputs and len(texts) < 2:
        missing = next(name for name in bricks if name not in texts)
        raise UsageError(
            f"--outputs compares bricks on their own texts, and {shell(missing)} has none",
            f"Name them: --texts {shell(missing)}=FILE.jsonl",
        )
    shared = shared_prompts(texts)
    context = step_context(resolved, 0, work.device, work.events)
    deltas = {name: context.deltas(name) for name in bricks}
    added = output_cosines(measuring_context(context, StepBricks(deltas)), deltas, texts) if outputs else {}
    made = method(MergeMethod, "task_arithmetic").model_validate(step)
    merged = MergedWeights(resolved.base, resolved.base, made, StepBricks(deltas))
    overlap = merged.overlap(work.device)
    assert overlap is not None
    measures: dict[str, Measures] = {}
    for number, name in enumerate(bricks):
        others = {other: deltas[other] for other in list(bricks)[number + 1 :]}
        measures[name] = measure(
            resolved.base,
            deltas[name],
            others,
            device=work.device,
            threads=work.threads,
            progress=_counted(progress(work.events, "measure", name)),
        )
    pairs = [
        replace(_pair(one, two, overlap, measures[one], shared), output=added.get((one, two)))
        for one, two in combinations(bricks, 2)
    ]
    norms = {name: float(measured.total.document()["relative"] or 0.0) for name, measured in measures.items()}
    regime, says = _regime(norms, pairs)
    recommended, reasons = _recommended(regime, list(bricks), pairs)
    if recommended is not None and set(bricks) <= set(texts):
        reasons.append(_FITTED)
    return Advice(
        base, bricks, norms, overlap, pairs, regime, says, recommended, reasons, _unknown(resolved.on_disk, texts, shared)
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


def _regime(norms: Mapping[str, float], pairs: Sequence[Pair]) -> tuple[Regime, str]:
    """Return what the bricks are to each other, and a sentence that says it. The first regime that applies counts."""
    if not pairs:
        return "single", "One brick: there is nothing to merge it with."
    if contradicting := [p for p in pairs if p.shared is not None and p.shared.contradicts]:
        p = contradicting[0]
        assert p.shared is not None
        return "contradicting", (
            f"{p.names} contradict each other: {p.shared.different} of the {p.shared.prompts} prompts that their texts share have different answers."
        )
    if same := [p for p in pairs if p.rv > SAME and p.cosine is not None and p.cosine > SAME]:
        return "same", f"{same[0].names} are one brick: their deltas are equal up to their length."
    if opposed := [p for p in pairs if p.cosine is not None and p.cosine < OPPOSED]:
        p = min(opposed, key=lambda p: p.cosine or 0.0)
        return (
            "opposed",
            f"The deltas of {p.names} point against each other (cosine {p.cosine:+.2f}), so that their sum cancels both.",
        )
    if far := [name for name, norm in norms.items() if norm > FAR]:
        return (
            "far",
            f"{far[0]} is far from the base: the norm of its delta is {norms[far[0]]:.2f} of that of the base's tensors.",
        )
    top = max(pairs, key=lambda p: p.rv)
    if top.rv > OVERLAPPING:
        return (
            "overlapping",
            f"Overlapping fine-tunes: RV {top.rv:.2f} for {top.names}; above {OVERLAPPING:g} they write to the same outputs.",
        )
    if top.rv < DISJOINT:
        return (
            "disjoint",
            f"Disjoint skills: the largest RV is {top.rv:.2f}, of {top.names}; below {DISJOINT:g} they write to different outputs.",
        )
    return "between", (
        f"Between disjoint and overlapping: the largest RV is {top.rv:.2f}, of {top.names}; disjoint is below {DISJOINT:g}, overlapping above {OVERLAPPING:g}."
    )


def _recommended(regime: Regime, bricks: Sequence[str], pairs: Sequence[Pair]) -> tuple[Mapping[str, Any] | None, list[str]]:
    """Return the recommended step and the reasons for it."""
    if regime in ("single", "same", "contradicting", "opposed"):
        return None, _INSTEAD[regime]
    if all(pair.rv > OVERLAPPING for pair in pairs):
        return {"merge": "average"}, [
            "All bricks overlap with each other: a mean keeps what they have in common at its length, and a sum would add it once for each brick."
        ]
    if regime == "far":
        barrier = shell("workbench", "brick", "barrier", *bricks[:2], "--base", "BASE", "--text", "TEXTS.jsonl")
        return None, [f"Measure first whether a linear merge has a chance: {barrier}. If it has none, route between the bricks."]
    reasons = [
        "TSV keeps the leading directions of each brick and decorrelates them, so that no brick is divided by the number of bricks."
    ]
    if regime == "overlapping":
        reasons.append("Each weight is 1 / Σ RV: what several bricks have in common is added once, and not once for each brick.")
    elif regime == "between":
        reasons.append(
            "It is not certain that the bricks should share weights here: score the recipe with and without `weights: auto`."
        )
    else:
        reasons.append("The weights stay near 1, because no two bricks share their outputs.")
    return {"merge": "tsv", "weights": "auto"}, reasons


_FITTED = (
    "Every brick has texts of its own, so score `merge: featcal` beside it, with `calibration` for each brick: on most pools of a small "
    "language model and of tiny ones it kept more of the skills than TSV (docs/merging-methods.md)."
)

_INSTEAD = {
    "single": ["Name the other bricks: workbench brick advise A B"],
    "same": ["Leave out one of them."],
    "contradicting": [
        "No merge resolves this, because a merged model has one answer to a prompt: choose one of them, or route between them with "
        "prompts that tell them apart."
    ],
    "opposed": ["Leave out one of them, or subtract it on purpose: a negative weight under `task_arithmetic`."],
}


def _unknown(bricks: Mapping[str, Brick], texts: Mapping[str, Any], shared: Mapping[Any, Shared]) -> list[str]:
    """Return what the advice does not know."""
    lines = ["The score: nothing here has run the merged model. `workbench eval` compares the recipe with its controls."]
    if missing := [name for name in bricks if name not in texts]:
        lines.append(
            f"Contradictions of {', '.join(missing)}: no texts of their own were found. Name them: --texts {shell(missing[0])}=FILE.jsonl"
        )
    if shared and not any(s.prompts for s in shared.values()):
        lines.append("Contradictions on prompts that are worded differently: the bricks' texts share no prompt word for word.")
    return lines
