"""GenKnowSub as a recipe: general adapters are subtracted from a task's adapter, as true updates, before a router uses it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from worlds.project import Project

from workbench.adapters.linear import linear_factors
from workbench.adapters.read import Adapter

RANK = 6
RECIPE = f"""\
bricks: {{one: bricks/one, two: bricks/two, three: bricks/three}}
steps: [{{merge: task_arithmetic, bricks: {{one: 1, two: -0.5, three: -0.5}}}}]
output: {{form: adapter, rank: {RANK}}}
"""


def updates(folder: Path) -> dict[str, np.ndarray]:
    """Return module -> B A in float64."""
    factors = linear_factors(Adapter(folder, folder.name))
    return {name: (b.double() @ a.double()).numpy() for name, (a, b) in factors.items()}


def test_the_mean_of_general_updates_is_subtracted_and_truncated_to_a_rank(project: Project) -> None:
    files = [file for name in ("one", "two", "three") for file in (project.path / "bricks" / name).iterdir()]
    before = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    made = updates(Path(project.run(RECIPE)["adapter"]))
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == before
    one, two, three = (updates(project.path / "bricks" / name) for name in ("one", "two", "three"))
    assert set(made) == set(one) | set(two) | set(three)
    for name, update in made.items():
        parts = [part.get(name, np.zeros_like(update)) for part in (one, two, three)]
        u, s, v = np.linalg.svd(parts[0] - (parts[1] + parts[2]) / 2)
        truncated = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
        assert s[RANK] > 1e-6, "the difference has a higher rank"
        np.testing.assert_allclose(update, truncated, atol=2e-5 * s[0])
