"""Compare bricks by the norms, overlaps and cosines of their deltas and by their texts, and choose a merge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Literal

from workbench.bricks.brick import Brick
from workbench.ground.errors import UsageError, nearest, shell
from workbench.ground.results import JsonObject, Number
from workbench.models.texts import Text
from workbench.run.route_statistics import Measuring, card_folder, trained_on
from workbench.scores.statistics import Floats

LEAST_SHARED = 8
"""Fewest shared prompts from which a contradiction is concluded."""
CONTRADICTING = 0.5
"""Share of shared prompts with different answers from which two bricks contradict each other."""


class Shared(JsonObject):
    """Prompts that the texts of two bricks share."""

    prompts: int
    """Number of shared prompts."""
    of: int
    """Number of prompts of the brick that has fewer."""
    different: int
    """Number of shared prompts for which the bricks have no answer in common."""
    example: list[str] | None = None
    """A shared prompt with different answers, and an answer of each brick."""

    @property
    def contradicts(self) -> bool:
        """True if enough prompts are shared and most of them have different answers."""
        return self.prompts >= LEAST_SHARED and self.different > CONTRADICTING * self.prompts

    @property
    def agrees(self) -> bool:
        """True if most prompts are shared, enough of them, and most of these have a common answer."""
        return self.prompts >= max(LEAST_SHARED, CONTRADICTING * self.of) and not self.contradicts


def own_files(bricks: Mapping[str, Brick], files: Mapping[str, Path]) -> dict[str, Measuring]:
    """Return the file of each brick's own texts: the one that the user names, or that of its training.

    A brick whose card names no training file that is here is left out.
    """
    if unknown := [name for name in files if name not in bricks]:
        raise UsageError(f"--texts {unknown[0]}=: no such brick among those named. {nearest(unknown[0], bricks)}")
    found = {}
    for name, brick in bricks.items():
        if name in files:
            found[name] = Measuring(files[name], str(files[name]))
        elif brick.card is not None:
            with suppress(UsageError):
                found[name] = trained_on(card_folder(brick), brick.card)
    return found


def shared_prompts(texts: Mapping[str, list[Text]]) -> dict[tuple[str, str], Shared]:
    """Compare the answers of each pair of bricks to the prompts that both have.

    Prompts and answers are compared without differences in case and white space. Texts without a prompt do not count.

    Returns:
        Pair of bricks, in the given order -> what they share.
    """
    answers = {name: _answers(rows) for name, rows in texts.items()}
    return {(one, two): _shared(answers[one], answers[two]) for one, two in combinations(answers, 2)}


def _shared(one: Mapping[str, set[str]], two: Mapping[str, set[str]]) -> Shared:
    common = [prompt for prompt in one if prompt in two]
    different = [prompt for prompt in common if not one[prompt] & two[prompt]]
    example = [different[0], min(one[different[0]]), min(two[different[0]])] if different else None
    return Shared(prompts=len(common), of=min(len(one), len(two)), different=len(different), example=example)


def _answers(rows: list[Text]) -> dict[str, set[str]]:
    """Return prompt -> its answers, both without differences in case and white space."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if prompt := _plain(row.prompt):
            found.setdefault(prompt, set()).add(_plain(row.answer))
    return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


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
UNEQUAL = 3.0
"""Largest ratio of two norms that counts as one scale. Bricks of one base that were trained alike stay below it, and so do ranks 4 to 16."""

Regime = Literal["single", "same", "contradicting", "far", "opposed", "overlapping", "between", "disjoint"]


class Pair(JsonObject):
    """Two bricks."""

    one: str
    """A brick."""
    two: str
    """Another brick."""
    rv: Number
    """RV coefficient of their deltas, the mean over the layers' matrices."""
    rv_lowest_layer: Number | None
    """Smallest mean of a layer that one of the two changes."""
    rv_highest_layer: Number | None
    """Largest mean of such a layer."""
    cosine: Number | None
    """Cosine of the deltas."""
    sign_conflict: Number | None
    """Share of elements with opposite signs, among those where both are nonzero."""
    shared: Shared | None
    """Prompts that their texts share; null if one of them has no texts."""

    @property
    def names(self) -> str:
        """Both names, for a sentence."""
        return f"{self.one} and {self.two}"

    @property
    def same(self) -> bool:
        """True if the two are one brick, up to the length of their deltas."""
        return self.rv > SAME and self.cosine is not None and self.cosine > SAME

    @property
    def opposed(self) -> bool:
        """True if the deltas point against each other."""
        return self.cosine is not None and self.cosine < OPPOSED

    @property
    def alike(self) -> bool:
        """True if the two have one skill: they overlap, or answer the same prompts in the same way; and they do not clash."""
        return (self.rv > OVERLAPPING or (self.shared is not None and self.shared.agrees)) and not self.clash

    @property
    def clash(self) -> bool:
        """True if the two cannot act in one merge, because their deltas or their answers are opposed."""
        return self.opposed or (self.shared is not None and self.shared.contradicts)


def regime_of(norms: Mapping[str, float], pairs: Sequence[Pair]) -> tuple[Regime, str]:
    """Return what the bricks are to each other, and a sentence that says it. The first regime that applies counts."""
    if not pairs:
        return "single", "One brick: there is nothing to merge it with."
    if contradicting := [p for p in pairs if p.shared is not None and p.shared.contradicts]:
        p = contradicting[0]
        assert p.shared is not None
        return "contradicting", (
            f"{p.names} contradict each other: {p.shared.different} of the {p.shared.prompts} prompts that their texts share have different answers."
        )
    if same := [p for p in pairs if p.same]:
        return "same", f"{same[0].names} are one brick: their deltas are equal up to their length."
    if opposed := [p for p in pairs if p.opposed]:
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


def recommended(
    regime: Regime, bricks: Mapping[str, str], pairs: Sequence[Pair], base: str
) -> tuple[Mapping[str, object] | None, list[str]]:
    """Return the recommended step and the reasons for it; bricks are given by name, with the directory to type."""
    if regime in INSTEAD:
        return None, instead(regime, pairs, bricks)
    if all(pair.alike for pair in pairs):
        return {"merge": "average"}, [
            "All bricks have one skill: a mean keeps what they have in common at its length, and a sum would add it once for each brick."
        ]
    if regime == "far":
        barrier = shell("workbench", "brick", "barrier", *list(bricks.values())[:2], "--base", base, "--text", "TEXTS.jsonl")
        return None, [
            f"Measure first whether a linear merge has a chance: {barrier}. If it has none, route between the bricks.",
            "If one model is needed: merge with `featcal`, and train the merge on the bricks' texts with a `grow: brick` step after it.",
        ]
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


INSTEAD: Mapping[str, list[str]] = {
    "single": ["Name the other bricks: workbench brick advise A B"],
    "same": ["Leave out one of them."],
    "contradicting": [
        "No merge resolves this, because a merged model has one answer to a prompt: choose one of them, or route between them with "
        "prompts that tell them apart."
    ],
    "opposed": ["Leave out one of them, or subtract it on purpose: a negative weight under `task_arithmetic`."],
}


def instead(regime: Regime, pairs: Sequence[Pair], bricks: Mapping[str, str]) -> list[str]:
    """Return what to do instead of a merge; of several bricks of which two contradict each other, the rest can be merged."""
    clash = next((p for p in pairs if p.shared is not None and p.shared.contradicts), None)
    if regime != "contradicting" or clash is None or len(bricks) < 3:
        return list(INSTEAD[regime])
    rest = [shell("workbench", "brick", "advise", *(p for b, p in bricks.items() if b != out)) for out in (clash.two, clash.one)]
    return [*INSTEAD[regime], f"The rest can be merged with one of the two: {rest[0]}, or {rest[1]}"]


def left_out(norms: Mapping[str, float], pairs: Sequence[Pair], alone: Mapping[str, Floats]) -> tuple[dict[str, str], list[str]]:
    """Say which bricks a merge should leave out: those that change nothing, copy another brick, or point against one.

    Of a pair, the brick goes that answers fewer of its own prompts alone, else the one that more bricks point against, else the later one.

    Returns:
        Brick -> why, and a warning for each pair of which nothing tells the wanted one.
    """
    dropped, warnings = {name: "does not change the base" for name, norm in norms.items() if not norm}, []
    against = Counter(name for pair in pairs if pair.opposed for name in (pair.one, pair.two))
    order = list(norms)

    def rank(name: str) -> tuple[float, int]:
        return -float(alone[name].mean()) if name in alone else 0.0, against[name]

    for pair in sorted((p for p in pairs if p.same or p.opposed), key=lambda p: p.opposed):
        if {pair.one, pair.two} & dropped.keys():
            continue
        worse = max((pair.one, pair.two), key=lambda name: (*rank(name), order.index(name)))
        other = pair.two if worse == pair.one else pair.one
        if pair.same:
            dropped[worse] = f"is the same brick as {other}: its delta is {norms[worse] / norms[other]:.3g} times the other one"
            continue
        dropped[worse] = f"points against {other} (cosine {pair.cosine:+.2f}): their sum would cancel both"
        if rank(worse) == rank(other):
            hint = "Other prompts may tell (--texts)" if alone else "--measure asks both of them their own prompts"
            warnings.append(f"Nothing tells whether {other} or {worse} is the wanted one of two opposites. {hint}.")
    return dropped, warnings


def unequal(norms: Mapping[str, float], weights: Mapping[str, float]) -> str:
    """Return the warning that some deltas are much longer than others."""
    longest, shortest = max(norms, key=lambda n: norms[n]), min(norms, key=lambda n: norms[n])
    ratio = norms[longest] / norms[shortest]
    return (
        f"The delta of {longest} is {ratio:.1f} times as long as that of {shortest}, and more than {UNEQUAL:g} times is unusual for bricks of one "
        "base: one of them may be scaled wrongly. In a merge with equal weights the longest drowns the others. Weights that make all "
        f"norms equal: {', '.join(f'{name} {weight:g}' for name, weight in weights.items())}."
    )


def equal_weights(norms: Mapping[str, float], like: Collection[str] = ()) -> dict[str, float]:
    """Return brick -> weight that makes all norms equal, to four digits.

    Args:
        norms: Brick -> norm of its delta, above 0.
        like: Bricks that are known to have the right scale; default: all. The norm is their median, of two the geometric mean.
    """
    middle = math.exp(median(math.log(norms[name]) for name in like or norms))
    return {name: float(f"{middle / norm:.4g}") for name, norm in norms.items()}


def equalized(step: Mapping[str, object], weights: Mapping[str, float]) -> dict[str, object]:
    """Return a step with the weights that make the bricks' norms equal."""
    if step["merge"] == "average":  # which takes no weights
        return {"merge": "task_arithmetic", "bricks": {name: float(f"{w / len(weights):.4g}") for name, w in weights.items()}}
    return {**step, "bricks": dict(weights)}


def lambdas(step: Mapping[str, object]) -> tuple[float, ...]:
    """Return the values of lambda to compare for a step: below 1, and where weights were equalized on both sides of it."""
    if step["merge"] == "average":
        return ()
    return (0.5, 1, 1.5, 2) if isinstance(step.get("bricks"), Mapping) else (0.6, 0.8, 1)
