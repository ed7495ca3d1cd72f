"""Sign flips and step-down max-T: by hand, by brute force, and against each other."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from workbench.scores import signflips
from workbench.scores.signflips import PATTERNS, flipped, step_down, tails


def every_pattern(k: int) -> Any:
    return np.array(list(itertools.product((1.0, -1.0), repeat=k)))


def mid_p(drawn: Any, seen: float) -> float:
    """Share above what was seen, and half of the share that equals it."""
    close = 1e-9 * (1 + abs(seen))
    return float(((drawn > seen + close).mean() + (drawn >= seen - close).mean()) / 2)


def test_all_patterns_of_few_clusters() -> None:
    sums = np.array([[3.0], [1.0], [-2.0], [0.5]])
    found = flipped(sums)[:, 0]
    assert found[0] == 2.5  # nothing flipped
    assert sorted(np.abs(found)) == sorted(np.abs(every_pattern(4) @ sums[:, 0])[:8])  # the first sign is fixed
    assert flipped(np.ones((14, 1))).shape == (2**13, 1)
    assert flipped(np.ones((15, 1))).shape == (PATTERNS, 1)
    assert flipped(np.ones((3000, 1)))[0] == 3000


def test_p_by_hand() -> None:
    # |3+1+1| = 5 by 2 of 8 patterns: nothing lies above, half of 1/4.
    # 3+1-1 = 3: 5 twice lies above, 3 four times equals it.
    sums = np.array([[3.0, 3.0, 0.0], [1.0, 1.0, 0.0], [1.0, -1.0, 0.0]])
    assert tails(sums) == pytest.approx([1 / 8, 1 / 4 + 1 / 4, 1.0])


@pytest.mark.parametrize("k", [8, 12])
def test_p_by_brute_force(k: int) -> None:
    sums = np.random.default_rng(k).normal(0.4, 1, (k, 5))
    expected = [mid_p(np.abs(every_pattern(k) @ row), abs(row.sum())) for row in sums.T]
    assert tails(sums) == pytest.approx(expected)


def test_random_patterns_agree_with_all() -> None:
    """40 clusters of which 12 changed: all patterns of the twelve give the exact p."""
    sums = np.zeros((40, 1))
    sums[:12, 0] = np.random.default_rng(0).integers(-1, 3, 12)
    exact = mid_p(np.abs(every_pattern(12) @ sums[:12, 0]), abs(sums.sum()))
    assert tails(sums)[0] == pytest.approx(exact, abs=4 * (exact / PATTERNS) ** 0.5)
    assert tails(sums) == tails(sums)  # seeded


def test_patterns_of_many_clusters_are_drawn_once_and_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    new = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Drawing(new(seed)))
    monkeypatch.setattr(signflips, "_PACKED", {})
    monkeypatch.setattr(signflips, "PATTERNS", 1000)
    monkeypatch.setattr(signflips, "_CHUNK", 1 << 21)
    monkeypatch.setattr(signflips, "_PACKED_UP_TO", 1000 * 5100 // 8)
    monkeypatch.setattr(Drawing, "calls", [])
    sums = {k: new(k).normal(size=(k, 2)) for k in (2049, 3001, 6000)}

    def fresh(k: int) -> Any:
        """The numbers without a memory, chunk by chunk as they were always drawn."""
        rng, rows, table = new(k), (1 << 21) // k, sums[k].astype(np.float32)
        signs = [1 - 2 * rng.integers(0, 2, (min(rows, 1000 - start), k), np.int8) for start in range(0, 1000, rows)]
        signs[0][0] = 1
        return np.concatenate([part.astype(np.float32) @ table for part in signs])

    for k in (2049, 3001, 2049, 6000, 3001, 6000):
        assert np.array_equal(flipped(sums[k]), fresh(k)), k
    assert Drawing.calls == [2049, 3001, 3001, 6000, 6000, 6000, 6000, 6000, 6000], "6000 are more than may stay"
    assert sum(bits.nbytes for chunks in signflips._PACKED.values() for bits in chunks) <= signflips._PACKED_UP_TO
    flipped(new(0).normal(size=(4000, 1)))
    assert list(signflips._PACKED) == [4000], "the latest one stays"


class Drawing:
    """A generator whose draws are counted."""

    calls: list[int] = []

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def integers(self, low: int, high: int, size: tuple[int, int], kind: Any) -> Any:
        self.calls.append(size[1])
        return self.rng.integers(low, high, size, kind)


def brute_step_down(tasks: Any) -> list[list[float]]:
    """Westfall and Young's procedure within tasks, Sidak's number of tasks across, over every pattern; by the definition of closed tests:
    a row's p is the largest over all sets of rows that hold it."""
    drawn = [np.abs(every_pattern(len(sums)) @ sums) / scales for sums, scales in tasks]
    seen = [np.abs(sums.sum(0)) / scales for sums, scales in tasks]
    rows = [(t, r) for t, z in enumerate(seen) for r in range(len(z))]
    found = dict.fromkeys(rows, 0.0)
    for size in range(1, len(rows) + 1):
        for some in itertools.combinations(rows, size):
            by_task = {t: [r for task, r in some if task == t] for t, _ in some}
            least = min(mid_p(drawn[t][:, r].max(1), seen[t][r].max()) for t, r in by_task.items())
            for row in some:
                found[row] = max(found[row], 1 - (1 - least) ** len(by_task))
    return [[found[t, r] for r in range(len(z))] for t, z in enumerate(seen)]


def test_step_down_is_westfall_and_youngs() -> None:
    """Rows of a task are flipped together, tasks apart."""
    rng = np.random.default_rng(3)
    tasks = []
    for k, rows, gain in ((6, 3, 0.9), (5, 2, 0.2)):
        sums = rng.normal(0, 1, (k, 1)) + rng.normal(gain, 0.7, (k, rows))
        tasks.append((sums, np.sqrt((sums**2).sum(0))))
    steps = step_down(tasks, 0.2)
    found = [step for task in steps for step in task]
    assert [step.p for step in found] == pytest.approx([p for task in brute_step_down(tasks) for p in task], abs=1e-6)
    assert 0 < sum(step.p <= 0.2 for step in found) < len(found)
    for step, z in zip(found, np.concatenate([np.abs(s.sum(0)) / c for s, c in tasks]), strict=True):
        assert (z >= step.critical - 1e-4) == (step.p <= 0.2)
    for task in steps:
        kept = {step.critical for step in task if step.p > 0.2}
        assert len(kept) <= 1  # rejections relax nothing for the others
        assert not kept or min(kept) >= max((step.critical for step in task if step.p <= 0.2), default=0.0)


def test_equal_rows_cost_nothing() -> None:
    sums = np.random.default_rng(5).normal(0.5, 1, (10, 1))
    scale = np.sqrt((sums**2).sum(0))
    ((alone,),) = step_down([(sums, scale)], 0.05)
    (many,) = step_down([(np.repeat(sums, 50, 1), np.repeat(scale, 50))], 0.05)
    assert [step.p for step in many] == pytest.approx([alone.p] * 50)
    assert alone.p == pytest.approx(float(tails(sums)[0]))


def test_least_is_the_p_of_clusters_on_one_side() -> None:
    sums = np.array([[2.0], [-1.0], [1.0], [1.0], [0.0]])
    ((step,),) = step_down([(sums, np.sqrt((sums**2).sum(0)))], 0.05)
    assert step.least == pytest.approx(1 / 16)  # +-5 of 16 patterns of four signs, half of it
    assert step.critical == np.inf  # so that nothing is rejected at 5 %
    assert step.p > 0.05


def test_between_two_values_the_upper_one_is_critical() -> None:
    """Six losses and no win: |z| is 6, 4, 2 or 0 over sqrt(6); 4 leaves 1/8 above it, 6 leaves 1/64."""
    sums = np.ones((6, 1))
    ((step,),) = step_down([(sums, np.sqrt([6.0]))], 0.05)
    assert step.critical == pytest.approx(np.sqrt(6))


def test_an_empty_family() -> None:
    assert step_down([], 0.05) == []
