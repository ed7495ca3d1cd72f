"""Made-up scores of sweeps: lambda with methods, with seeds, by the number of bricks, and seeds alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from worlds.decided import CLUSTERS, CONTROLS, N, items, made
from worlds.stored_scores import stored

from workbench.compare.compare import Comparison, compare
from workbench.compare.swept import Sweep, SweepDimension, SweepPoint, Value
from workbench.scores.store import Configuration, ScoreStore

LAMBDA = SweepDimension("mix.lambda", "lambda", (0.25, 0.5, 1, 1.5))
METHOD = SweepDimension("mix.merge", "", ("ties", "dare", "task_arithmetic"))
SEED = SweepDimension("seed", "seed", (0, 1))
BRICKS = SweepDimension("mix.bricks", "bricks", (("add", "sort"), ("add", "sort", "dates"), ("add", "sort", "dates", "units")))
BEST = {"ties": 1.0, "dare": 0.7, "task_arithmetic": 0.5}
"""Method -> lambda at which its skills are highest."""


@cache
def swept(*dimensions: SweepDimension, without: tuple[str, ...] = ()) -> Comparison:
    """Compare the points of a sweep called "mine" and the controls; the comparison is made once a session.

    Args:
        dimensions: The dimensions.
        without: Names of points that are not scored.
    """
    points, values = [], {}
    for i, line in enumerate(product(*(d.values for d in dimensions)), 1):
        at = dict(zip((d.name for d in dimensions), line, strict=True))
        name = f"mine[{','.join(_word(d, v) for d, v in zip(dimensions, line, strict=True))}]"
        points.append(SweepPoint(name, at, f"# the recipe of {name}\n"))
        if name not in without:
            values[made(name, i)] = _scores(at)
    for c, shares in CONTROLS.items():
        values[c] = {t: items(s, 97 * int(c.digest[:12], 16) + 7 * j) for j, (t, s) in enumerate(zip(TASKS, shares, strict=True))}
    settings: dict[str, Any] = {
        "roles": {"facts": "retention"},
        "owners": {"add": "add", "sort": "sort"},
        "tolerance": 0.05,
        "drawn": "items",
    }
    with TemporaryDirectory() as folder:
        store = ScoreStore(Path(folder))
        scores = stored(store, values, clusters=CLUSTERS, **settings)
        return compare(store, scores, sweeps=[Sweep("mine", tuple(dimensions), tuple(points))])


TASKS = ("add", "sort", "facts")


def _word(dimension: SweepDimension, value: Value) -> str:
    word = str(len(value)) if isinstance(value, tuple) else str(value)
    return f"{dimension.label}={word}" if dimension.label else word


def _scores(at: Mapping[str, Value]) -> dict[str, list[float]]:
    """Skills rise to the method's best lambda and fall after it; retention falls with lambda; a seed moves both by a little."""
    lam = float(at.get("mix.lambda", 1))  # type: ignore[arg-type]
    bricks, seed = at.get("mix.bricks", ()), int(at.get("seed", 0))  # type: ignore[call-overload]
    best = BEST[str(at.get("mix.merge", "ties"))]
    skill = 0.75 - 0.25 * math.log2(lam / best) ** 2 / 2 - 0.03 * len(bricks) + 0.01 * seed  # type: ignore[arg-type]
    shares = (max(skill, 0.3), max(skill - 0.03, 0.28), 0.8 - 0.06 * max(lam - best, 0.0))
    return {t: items(s, 31 * seed + 7 * j + round(100 * lam), N) for j, (t, s) in enumerate(zip(TASKS, shares, strict=True))}


def configuration(comparison: Comparison, name: str) -> dict[str, Any]:
    """Return a configuration of the document."""
    found: dict[str, Any] = next(c for c in comparison.to_dict()["configurations"] if c["name"] == name)
    return found


__all__ = ["BRICKS", "LAMBDA", "METHOD", "SEED", "Configuration", "configuration", "swept"]
