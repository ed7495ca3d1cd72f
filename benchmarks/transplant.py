"""Transplants of one skill by masks of single elements: the source of the tables on transplants in docs/neurons-sets.md.

    python benchmarks/transplant.py
    python benchmarks/transplant.py --skills reverse --limit 40    a quick look
    python benchmarks/transplant.py --folder DIR                   keeps scores, so that a later call goes on

For each skill, a brick of the starter base is moved in part: its delta of the attention whole, and of its feed-forward delta 10, 25 and 50 %,
chosen in these ways:

    attention          nothing: the attention's delta alone
    mask               the largest elements (merge: localize_and_stitch)
    random mask        random elements (merge: dare, rescale: none)
    rescaled mask      random elements divided by the share (merge: dare)

and `mask of all` moves the largest elements of the whole delta, attention included. Every configuration is scored by `workbench eval`'s own functions on
all items of the skill's task, and compared item by item with the whole brick, and with the random mask of the same share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from edit_setup import CPU, PROJECT, STARTER, make_project, one_thread, show
from record import parser_of, write_results

from workbench.activations.sets import neuron_axes
from workbench.bricks.locate import resolve_brick
from workbench.compare.tables import Table, tables_of
from workbench.evaluate.lineup import LineupEntry
from workbench.evaluate.plans import plans
from workbench.evaluate.scoring import score_all
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.scores.paired import paired
from workbench.scores.store import ScoreStore
from workbench.scores.suite import Suite, load_suite
from workbench.steps.fields import BrickRef
from workbench.upkeep.bricks import check_fit

SKILLS = ("reverse", "glossary", "record")
SUITE = "words"
SHARES = (0.1, 0.25, 0.5)
FEED_FORWARD = "*.mlp.*"
WAYS = ("attention", "mask", "random mask", "rescaled mask", "mask of all")
# Way to choose -> the way of the same share with which it is compared.
CONTROLS = {
    "mask": "random mask",
    "rescaled mask": "random mask",
}


@dataclass(frozen=True)
class Arm:
    """A configuration of a skill.

    Attributes:
        way: How the moved part was chosen.
        share: Share of the feed-forward delta, or for `mask of all` of the whole delta; None for whole parts.
        moved: Share of the delta's elements that are moved.
        seed: Seed of a random choice.
        steps: Steps of the recipe.
    """

    way: str
    share: float | None
    moved: float
    seed: int
    steps: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the configuration in the score store."""
        words = [self.way, *([] if self.share is None else [f"{100 * self.share:g}"]), str(self.seed)]
        return "-".join(words).replace(" ", "-")


def main() -> None:
    """Choose, move, score, and write the results file after every skill."""
    parser = parser_of(__doc__, "transplant")
    parser.add_argument("--skills", nargs="+", default=list(SKILLS), choices=list(SKILLS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="shares of the feed-forward delta")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="ways to choose what is moved")
    parser.add_argument("--limit", type=int, help="maximum number of items of a task, for a quick look")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="project folder to keep, so that a later call can resume")
    parser.add_argument("--note", default="", help="sentence for the results file, such as what else ran on the machine")
    options = parser.parse_args()
    one_thread()
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        project = make_project((options.folder or Path(scratch)).resolve(), PROJECT / STARTER, [])
        for skill in options.skills:
            arms = arms_of(project, skill, options)
            rows += scored(project, skill, arms, options)
            found = {
                **({"note": options.note} if options.note else {}),
                "skills": sorted({row["skill"] for row in rows}, key=SKILLS.index),
                "shares": options.shares,
                "limit": options.limit,
                "seconds": round(time.perf_counter() - started),
                "rows": rows,
            }
            write_results(options.out, found)


def arms_of(project: Path, skill: str, options: argparse.Namespace) -> list[Arm]:
    """Return all configurations of a skill."""
    part = feed_forward_part(project, skill)
    whole = {"merge": "task_arithmetic", "bricks": {skill: 1.0}}
    attention = {**whole, "where": {"exclude": [FEED_FORWARD]}}
    arms = [Arm("base", None, 0.0, 0, []), Arm("whole", None, 1.0, 0, [whole])]
    if "attention" in options.ways:
        arms.append(Arm("attention", None, 1 - part, 0, [attention]))
    for share in options.shares:
        moved = 1 - part + part * share

        def masked(way: str, step: Mapping[str, Any], share: float = share, moved: float = moved) -> Arm:
            own = {**step, "bricks": {skill: 1.0}, "density": share, "where": {"include": [FEED_FORWARD]}}
            return Arm(way, share, moved, 0, [attention, own])

        largest = {"merge": "localize_and_stitch", "bricks": {skill: 1.0}, "density": share}
        own = [
            masked("mask", {"merge": "localize_and_stitch"}),
            masked("random mask", {"merge": "dare", "rescale": "none"}),
            masked("rescaled mask", {"merge": "dare"}),
            Arm("mask of all", share, share, 0, [largest]),
        ]
        arms += [arm for arm in own if arm.way in options.ways]
    return arms


def feed_forward_part(project: Path, skill: str) -> float:
    """Return the share of the elements of a brick's delta that belong to feed-forward neurons."""
    base = resolve(from_data({"version": 1, "name": "base", "base": "base", "steps": []}, project)).base
    touched = check_fit(resolve_brick(skill, BrickRef(path=f"bricks/{skill}"), project), base)
    sizes = {name: spec.numel for name, spec in base.weights.specs.items() if touched.touches(name)}
    axes = neuron_axes(base)
    return sum(size for name, size in sizes.items() if name in axes) / sum(sizes.values())


def scored(project: Path, skill: str, arms: Sequence[Arm], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Score all configurations of a skill on its task, and return one row for each."""
    common = {"version": 1, "base": "base", "bricks": {skill: f"bricks/{skill}"}}
    entries = []
    for arm in arms:
        data = {**common, "name": arm.name, "steps": arm.steps, "seed": arm.seed}
        role = "base" if arm.way == "base" else "configuration"
        entries.append(LineupEntry(arm.name, role, resolve(from_data(data, project))))
    suite = own_suite(skill)
    score_plans = plans(entries, [suite], batch_size=options.batch_size, limit=options.limit, device=CPU, events=show)
    store = ScoreStore(project / "scores")
    scores = score_all(entries, score_plans, store, device=CPU, events=show)
    (table,) = tables_of(store, scores, {suite.suite: suite})
    digests = {arm.name: score.configuration.digest for arm, score in zip(arms, scores, strict=True)}
    return [row_of(skill, arm, arms, table, digests) for arm in arms]


def own_suite(skill: str) -> Suite:
    """Return the suite's task of a skill as a suite."""
    suite = load_suite(SUITE, PROJECT)
    fields = {"suite": f"{SUITE}-{skill}", "tasks": [skill], "primary": {skill: suite.primary[skill]}, "owners": {skill: skill}}
    return Suite.model_validate({**suite.model_dump(exclude_none=True), **fields})


def row_of(skill: str, arm: Arm, arms: Sequence[Arm], table: Table, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the score of a configuration, and its paired differences to the whole brick and to its random controls."""
    own = digests[arm.name]
    low, high = table.interval(own)
    row: dict[str, Any] = {
        "skill": skill,
        "way": arm.way,
        "share": arm.share,
        "moved": round(arm.moved, 4),
        "seed": arm.seed,
        "n": len(table.items),
        "value": table.value(own),
        "low": low,
        "high": high,
    }
    if arm.way not in ("base", "whole"):
        row["against_whole"] = difference(table, [digests["whole-0"]], own)
    same = [digests[other.name] for other in arms if other.way == CONTROLS.get(arm.way) and other.share == arm.share]
    if same:
        row["against_random"] = difference(table, same, own)
    print(json.dumps(row), flush=True)
    return row


def difference(table: Table, before: Sequence[str], after: str) -> dict[str, Any]:
    """Return the paired difference to a configuration, or to the mean over several, with its 95 % interval."""
    baseline = np.mean([table.values[digest] for digest in before], axis=0)
    pair = paired(baseline, table.values[after], table.cluster.tolist())
    low, high = pair.interval()
    return {"diff": pair.diff, "low": low, "high": high, "p": pair.p}


if __name__ == "__main__":
    main()
