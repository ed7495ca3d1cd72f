"""Made-up situations of a comparison: a clear winner, two that cannot be told apart, the best one unsafe, and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from worlds.stored_scores import BASE, stored

from workbench.compare.compare import Comparison, compare
from workbench.scores.store import Configuration, ScoreStore

N = 480
CLUSTERS = 48
MB = 1_000_000
Shares = tuple[float, float, float]


def made(name: str, index: int, *bricks: str, form: str = "checkpoint", written: int = 400 * MB) -> Configuration:
    """A named configuration of some bricks, with the bytes that a run writes."""
    return Configuration(
        f"{index:012x}{0:020x}",
        name,
        "configuration",
        bricks or ("add", "sort"),
        f"recipes/{name}.yaml",
        bytes=400 * MB,
        form=form,
        written=written,
        made=(name,),
        target=f"{name}-0123456789",
    )


def items(share: float, seed: int, n: int = N) -> list[float]:
    """Items right at a share of all places; a share of their order is common to all seeds, as configurations resemble each other."""
    shared, own = np.random.default_rng(0).random(n), np.random.default_rng(seed + 1).random(n)
    order = np.argsort(np.argsort(0.85 * shared + 0.15 * own))
    right: list[float] = (order < round(share * n)).astype(float).tolist()
    return right


def compared(
    folder: Path,
    shares: Mapping[Configuration, Sequence[float]],
    *,
    n: int = N,
    clusters: int = CLUSTERS,
    tasks: Sequence[str] = ("add", "sort", "facts"),
    **suite: Any,
) -> Comparison:
    """Store scores on skill tasks and a retention task, and compare them.

    Args:
        folder: Where the score store is written.
        shares: Configuration -> shares of items right on each task.
        n: Items of each task.
        clusters: Clusters of each task.
        tasks: Names of the tasks; `facts` is the retention task.
        suite: Fields of the suite.
    """
    store = ScoreStore(folder)
    values = {
        c: {t: items(share, 97 * int(c.digest[:12], 16) + 7 * i, n) for i, (t, share) in enumerate(zip(tasks, line, strict=True))}
        for c, line in shares.items()
    }
    settings = {
        "roles": {"facts": "retention"},
        "owners": {"add": "add", "sort": "sort"},
        "tolerance": 0.05,
        "drawn": "items",
        **suite,
    }
    return compare(store, stored(store, values, clusters=clusters, **settings))


BRICKS = {
    Configuration(f"{0xB0 + i:012x}{0:020x}", name, "brick", (name,), made=("mine", "--set", f"name={name}")): shares
    for i, (name, shares) in enumerate({"add": (0.7, 0.3, 0.8), "sort": (0.3, 0.7, 0.8)}.items())
}
AVERAGE = Configuration(f"{0xBF:012x}{0:020x}", "average", "average", ("add", "sort"))
CONTROLS: dict[Configuration, Shares] = {BASE: (0.3, 0.3, 0.8), **BRICKS, AVERAGE: (0.45, 0.45, 0.8)}
WEAK: dict[Configuration, Shares] = dict.fromkeys([*BRICKS, AVERAGE], (0.3, 0.3, 0.8))
"""Controls that no one would ship."""
BRICK = next(iter(BRICKS))
SITUATIONS: dict[str, dict[Configuration, Shares]] = {
    "winner": {made("ties", 1): (0.75, 0.7, 0.8), made("dare", 2): (0.5, 0.5, 0.79), made("linear", 3): (0.4, 0.42, 0.8)},
    "alike": {
        made("wide", 1, "add", "sort", "more"): (0.7, 0.68, 0.8),
        made("lean", 2, form="adapter", written=12 * MB): (0.69, 0.68, 0.8),
        made("linear", 3): (0.4, 0.42, 0.8),
    },
    "brick": {**WEAK, BRICK: (0.8, 0.5, 0.8), made("mine", 1): (0.5, 0.45, 0.8)},
    "unsafe": {**WEAK, made("greedy", 1): (0.8, 0.75, 0.6), made("linear", 3): (0.31, 0.3, 0.8)},
    "second": {made("greedy", 1): (0.8, 0.75, 0.6), made("ties", 2): (0.6, 0.6, 0.8), made("linear", 3): (0.31, 0.3, 0.8)},
    "nothing": {**WEAK, made("ties", 1): (0.31, 0.31, 0.8), made("linear", 3): (0.3, 0.29, 0.8)},
}


@cache
def situation(name: str) -> Comparison:
    """Compare one of the situations with its controls; the comparison is made once a session."""
    with TemporaryDirectory() as folder:
        return compared(Path(folder), {**CONTROLS, **SITUATIONS[name]})


@cache
def many(number: int = 24, more: tuple[str, ...] = ()) -> Comparison:
    """Compare this number of configurations of five bricks: means from low to high, some of which forget. Made once a session.

    Args:
        number: Number of configurations.
        more: Names of further skill tasks.
    """
    rng = np.random.default_rng(number)
    bricks = ("add", "sort", "dates", "triage", "units")
    methods = ("ties", "dare", "linear", "slerp", "average", "wudi")
    shares: dict[Configuration, tuple[float, ...]] = {}
    for i in range(number):
        used = [b for b in bricks if rng.random() < 0.6] or ["add", "sort"]
        level = 0.35 + 0.4 * (i + 1) / number
        name = f"{methods[i % len(methods)]}-{len(used)}-{i:02d}"
        shares[
            made(name, i + 1, *used, written=(12 if i % 3 == 0 else 400) * MB, form="adapter" if i % 3 == 0 else "checkpoint")
        ] = (
            level,
            level + 0.05 * rng.normal(),
            *(level + 0.02 * rng.normal() for _ in more),
            0.8 - (0.15 if i % 5 == 4 else 0.0),
        )
    controls = {c: (line[0], line[1], *[line[0]] * len(more), line[2]) for c, line in CONTROLS.items()}
    with TemporaryDirectory() as folder:
        return compared(Path(folder), {**controls, **shares}, tasks=("add", "sort", *more, "facts"))
