"""Propose what follows from the measurements: bricks to leave out, one merge of the others, or a route between groups of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from workbench.advice.evidence import (
    Accuracy,
    Candidate,
    Change,
    Fall,
    RoutePrice,
    Trial,
    Verdict,
    decide,
    falls,
    on_bricks,
)
from workbench.advice.groups import MOST, Group, grouped
from workbench.advice.pools import (
    INSTEAD,
    UNEQUAL,
    Pair,
    Regime,
    equal_weights,
    equalized,
    instead,
    lambdas,
    left_out,
    recommended,
    regime_of,
    unequal,
)
from workbench.advice.runner import ROUTE, Runner
from workbench.ground.errors import shell
from workbench.run.route_statistics import Measuring
from workbench.scores.statistics import Floats

_STEP: Mapping[str, object] = {"route": "ridge"}
_FITTED = (
    "Every brick has texts of its own, so score `merge: featcal` beside it, with `calibration` for each brick: on most pools of a small "
    "language model and of tiny ones it kept more of the skills than TSV (docs/merging-methods.md)."
)


@dataclass(frozen=True)
class Pool:
    """Bricks with what is known of them.

    Attributes:
        base: The base.
        bricks: Brick -> directory or hub id.
        kinds: Brick -> its kind.
        files: Brick -> file of its own texts, for bricks that have one.
        norms: Brick -> norm of its delta over that of the base's same tensors.
        pairs: All pairs of bricks.
        alone: Brick -> its answers to its own prompts; empty if nothing is run.
        weakest: Bricks that are not shown better than the base on their own prompts, with the difference.
    """

    base: str
    bricks: Mapping[str, str]
    kinds: Mapping[str, str]
    files: Mapping[str, Measuring]
    norms: Mapping[str, float]
    pairs: Sequence[Pair]
    alone: Mapping[str, Floats]
    weakest: Mapping[str, Change]


@dataclass(frozen=True)
class Proposal:
    """The advice that follows from the measurements. Its fields are those of `Advice`, with the reason of each brick that is left out."""

    regime: Regime
    says: str
    reasons: list[str]
    left_out: dict[str, str]
    warnings: list[str]
    groups: list[Group]
    step: Mapping[str, object] | None = None
    sweep: tuple[float, ...] = ()

    @property
    def used(self) -> list[str]:
        """The bricks that are not left out."""
        return [name for group in self.groups for name in group.bricks]


def proposed(pool: Pool) -> Proposal:
    """Return the bricks to leave out, the regime of the others, their groups, the merge of all of them and the warnings."""
    dropped, warnings = left_out(pool.norms, pool.pairs, pool.alone)
    used = [name for name in pool.norms if name not in dropped]
    if len(used) < 2:
        regime, says = regime_of(pool.norms, pool.pairs)
        if regime not in INSTEAD:  # all bricks but one change nothing
            regime, says = "single", f"Nothing to merge: {'; '.join(f'{name} {why}' for name, why in dropped.items())}."
        return Proposal(
            regime, says, instead(regime, pool.pairs, pool.bricks), dropped, warnings, grouped(dict.fromkeys(used, 1.0), [])
        )
    norms = {name: pool.norms[name] for name in used}
    pairs = [pair for pair in pool.pairs if pair.one in norms and pair.two in norms]
    regime, says = regime_of(norms, pairs)
    step, reasons = recommended(regime, {name: pool.bricks[name] for name in used}, pairs, pool.base)
    if max(norms.values()) > UNEQUAL * min(norms.values()):
        weights = equal_weights(norms, [name for name in used if pool.alone and name not in pool.weakest])
        warnings.append(unequal(norms, weights))
        if step is not None:
            step = equalized(step, weights)
    elif step is not None and dropped:
        step = {**step, "bricks": used}
    if step is not None and set(used) <= set(pool.files):
        reasons.append(_FITTED)
    sweep = () if step is None else lambdas(step)
    return Proposal(regime, says, reasons, dropped, warnings, grouped(norms, pairs), step, sweep)


def _not_routable(proposal: Proposal, pool: Pool, unfit: Collection[str] = ()) -> str | None:
    """Return why no router can choose among the groups, as a sentence; None if one can. `unfit` are bricks with too few prompts."""
    if checkpoint := next((name for name in proposal.used if pool.kinds[name] != "adapter"), None):
        new = shell(
            "workbench", "brick", "extract", pool.bricks[checkpoint], "--base", pool.base, "-o", f"bricks/{checkpoint}-lora"
        )
        return f"A router chooses among adapters, and {checkpoint} is a checkpoint: {new}"
    if missing := next((name for name in proposal.used if name not in pool.files), None):
        return f"A router is fitted on prompts of each brick, and {missing} has none: --texts {shell(missing)}=FILE.jsonl"
    if few := next((name for name in proposal.used if name in unfit), None):
        return f"No route was tried: {few} has too few prompts beside those that are asked."
    return None


def many(proposal: Proposal, pool: Pool) -> Proposal:
    """Recommend a route between the groups if they are too many for one merge."""
    if len(proposal.groups) <= MOST:
        return proposal
    reason = (
        f"{len(proposal.groups)} groups of bricks are many for one merge: of six disjoint skills it kept 81 %, and a route all of them. "
        "--measure tells what each keeps of these bricks, and what a route costs."
    )
    if lacks := _not_routable(proposal, pool):
        return replace(proposal, reasons=[reason, lacks, *proposal.reasons])
    contradicts = proposal.reasons[:1] if proposal.regime == "contradicting" else []
    return replace(proposal, step=_STEP, sweep=(), reasons=[reason, *contradicts])


def tried(proposal: Proposal, base: Candidate, pool: Pool, runner: Runner) -> tuple[Proposal, Trial]:
    """Run merges, and a route if the best of them loses a skill, and propose what the prompts show to be better.

    A merge costs nothing while it runs, so that a route is proposed only if it clearly answers more.
    """
    warnings = [
        f"{name} alone answers {Accuracy.of(pool.alone[name])} % of its own prompts, not shown better than the base ({change}): "
        "check its scale, its sign and its texts."
        for name, change in pool.weakest.items()
        if name in proposal.used
    ]
    proposal = replace(proposal, warnings=[*proposal.warnings, *warnings])
    candidates, verdict, found, price = list[Candidate](), None, dict[str, Change](), None
    if steps := _merges(proposal):
        suggested = next((name for name in steps if name.endswith("lambda 1")), "average")
        candidates = [runner.run(name, step, proposal.used) for name, step in steps.items()]
        verdict = decide(candidates, suggested)
        best = next(c for c in candidates if c.name == verdict.name)
        found = falls(pool.alone, best)
        says = [f"{name} falls in this merge: {change} against the brick alone." for name, change in found.items()]
        proposal = replace(proposal, reasons=[verdict.says, *says, *proposal.reasons])
        if proposal.step is not None and verdict.clear and best.step is not None:
            chosen = {key: value for key, value in best.step.items() if key != "bricks" or value != list(pool.alone)}
            proposal = replace(proposal, step=chosen, sweep=())
    else:
        best = base
    apart = len(proposal.groups) > (2 if proposal.regime == "contradicting" else 1)
    if apart and (found or proposal.step is None):
        if lacks := _not_routable(proposal, pool, runner.unfit):
            proposal = replace(proposal, reasons=[*proposal.reasons, lacks])
        else:
            routed, price, ties = runner.route(proposal.groups)
            candidates.append(routed)
            proposal, better = _beside_route(proposal, best, routed, price, ties)
            verdict = better if better.name == ROUTE or verdict is None else verdict
    trial = Trial(
        items=runner.items,
        base=base.tried(),
        alone=on_bricks(pool.alone),
        candidates=[candidate.tried() for candidate in candidates],
        advised=verdict.name if verdict and proposal.step is not None else None,
        clear=verdict is not None and verdict.clear,
        says=verdict.says if verdict else None,
        falls=[Fall(brick=name, change=change) for name, change in found.items()],
        price=price,
    )
    return proposal, trial


def _merges(proposal: Proposal) -> dict[str, Mapping[str, object]]:
    """Return the merges to run: the proposed step with each value of lambda, and the average; none if bricks exclude each other."""
    tsv = {"merge": "tsv", "weights": "auto", "bricks": proposal.used}
    step = tsv if proposal.regime == "far" and proposal.step is None else proposal.step  # far bricks: to see what a merge keeps
    if step is None:
        return {}
    steps: dict[str, Mapping[str, object]] = {f"{step['merge']}, lambda {v:g}": {**step, "lambda": v} for v in lambdas(step)}
    return steps | ({"average": {"merge": "average", "bricks": proposal.used}} if steps else {"average": step, "tsv": tsv})


def _beside_route(
    proposal: Proposal, best: Candidate, routed: Candidate, price: RoutePrice, ties: Sequence[Sequence[str]]
) -> tuple[Proposal, Verdict]:
    """Return the proposal with the route in it, and what the prompts say of the route and the best merge, or the base."""
    verdict = decide([best.on(routed.right), routed], best.name)
    reasons = [verdict.says, f"Price: {price}."]
    if not (verdict.clear and verdict.name == ROUTE):
        return replace(proposal, reasons=[*proposal.reasons, *reasons]), verdict
    tied = [f"Prompts do not tell {' and '.join(names)} apart: of these a router takes {names[0]}." for names in ties]
    proposal = replace(proposal, warnings=[*proposal.warnings, *tied])
    # Of many bricks, the commands that name all but one of them would fill the screen.
    others = proposal.reasons if len(proposal.groups) <= MOST else proposal.reasons[:1]
    return replace(proposal, step=_STEP, sweep=(), reasons=[*reasons, *others]), verdict
