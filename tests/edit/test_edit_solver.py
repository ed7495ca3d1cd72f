"""The one solver against the formula of each method, written out naively in float64; sequences, dependent keys, factors."""

from __future__ import annotations

import pytest
import torch
from torch.linalg import solve

from worlds.solving import (
    D_IN,
    D_OUT,
    TOLERANCE,
    covariance,
    difference,
    naive,
    preset,
    product,
    random,
    sequence,
    update,
)

from workbench.edit.closed_form.solver import factors_of

CLOSED = ["rome", "memit", "emmet", "alphaedit", "encore", "ultraedit"]
RIDGES = [name for name in CLOSED if name != "rome"]


@pytest.mark.parametrize(
    ("name", "count"), [(name, count) for name in CLOSED for count in (1, 12, 47, 60) if name != "rome" or count <= D_IN]
)
def test_published_formula(name: str, count: int) -> None:
    """One fact, several, more than the projection has inputs (there ROME's constraints cannot all hold: see below)."""
    metric, mu = preset(name)
    keys, changes = random(D_IN, count, seed=2), random(D_OUT, count, seed=3)
    expected = naive(name, keys, changes, keys[:, :0])
    assert difference(product(keys, changes, metric, mu), expected) <= TOLERANCE
    if name == "rome":
        assert difference(expected @ keys, changes) <= TOLERANCE


def test_rome_of_one_fact() -> None:
    """Equation 2 of the paper, with one key in numerator and denominator."""
    metric, mu = preset("rome")
    keys, changes = random(D_IN, 1, seed=2), random(D_OUT, 1, seed=3)
    through = solve(covariance(), keys)
    expected = (changes / (through.T @ keys)) @ through.T
    assert difference(product(keys, changes, metric, mu), expected) <= TOLERANCE


@pytest.mark.parametrize("name", CLOSED)
def test_keys_written_before(name: str) -> None:
    """MEMIT's and AlphaEdit's term for earlier keys, and what it means for the others."""
    metric, mu = preset(name)
    written, keys, changes = random(D_IN, 20, seed=4), random(D_IN, 12, seed=2), random(D_OUT, 12, seed=3)
    expected = naive(name, keys, changes, written)
    found = product(keys, changes, metric.after(written, mu), mu)
    assert difference(found, expected) <= TOLERANCE
    moved = (found @ written).norm() / (product(keys, changes, metric, mu) @ written).norm()
    assert moved < (1e-9 if name == "rome" else 0.9)


@pytest.mark.parametrize("sizes", [[40], [7, 1, 20, 12], [1] * 40])
@pytest.mark.parametrize("name", CLOSED)
def test_sequence_equals_joint_solve(name: str, sizes: list[int]) -> None:
    """For fixed keys and values, with a memory of what is written. Without it, earlier facts are lost."""
    metric, mu = preset(name)
    keys, changes = random(D_IN, 40, seed=2), random(D_OUT, 40, seed=3)
    joint = product(keys, changes, metric, mu)
    assert difference(sequence(keys, changes, metric, mu, sizes, history=True), joint) <= TOLERANCE
    if len(sizes) > 1:
        assert difference(sequence(keys, changes, metric, mu, sizes, history=False), joint) > 1e-2


@pytest.mark.parametrize("name", RIDGES)
def test_long_sequence(name: str) -> None:
    """300 facts one by one, in 48 dimensions, still equal the joint solve."""
    metric, mu = preset(name)
    keys, changes = random(D_IN, 300, seed=2), random(D_OUT, 300, seed=3)
    found = sequence(keys, changes, metric, mu, [1] * 300, history=True)
    assert difference(found, product(keys, changes, metric, mu)) <= TOLERANCE


@pytest.mark.parametrize(("count", "unit"), [(1, 1.0), (12, 1.0), (47, 1.0), (12, 1e-9), (12, 1e9)])
@pytest.mark.parametrize("name", RIDGES)
def test_keys_that_are_taken_out_leave_no_trace(name: str, count: int, unit: float) -> None:
    """The metric without some of its keys is that of the others alone: few keys, more than its groups may have columns, and in other units."""
    metric, mu = preset(name)
    kept, replaced = random(D_IN, 20, seed=4), random(D_IN, count, seed=5)
    keys, changes = random(D_IN, 12, seed=2), random(D_OUT, 12, seed=3)
    expected = naive(name, keys, changes, kept) / unit
    kept, replaced, keys, mu = kept * unit, replaced * unit, keys * unit, mu * unit**2
    written = metric.after(kept[:, :10], mu).after(replaced, mu).after(kept[:, 10:], mu)
    without = written.without_all(iter(replaced.split(5, 1)), mu)
    assert difference(product(keys, changes, without, mu), expected) <= TOLERANCE
    assert difference(product(keys, changes, written, mu), expected) > 1e-3
    summed = without.summed()
    assert difference(product(keys, changes, summed, mu), expected) <= TOLERANCE


@pytest.mark.parametrize("name", RIDGES)
def test_a_long_stream_of_updates(name: str) -> None:
    """Six hundred updates of thirty facts, one by one, equal a factorization of the thirty keys that remain."""
    metric, mu = preset(name)
    keys, changes = random(D_IN, 30, seed=2), random(D_OUT, 5, seed=3)
    written = metric.after(keys, mu)
    draw = torch.Generator().manual_seed(6)
    for _ in range(600):
        number = int(torch.randint(0, 30, (1,), generator=draw))
        key = keys[:, number : number + 1]
        written = written.without_all(iter([key]), mu)
        keys[:, number : number + 1] = torch.randn(D_IN, 1, generator=draw, dtype=torch.float64)
        written = written.after(keys[:, number : number + 1], mu)
    new = random(D_IN, 5, seed=7)
    assert difference(product(new, changes, written, mu), naive(name, new, changes, keys)) <= TOLERANCE
    assert sum(group.keys.shape[1] for group in written.written) <= D_IN, "groups are summed, so that a step costs the same"


@pytest.mark.parametrize("name", CLOSED)
def test_order_of_facts_is_free(name: str) -> None:
    """The factors themselves, not only their product."""
    metric, mu = preset(name)
    keys, changes = random(D_IN, 12, seed=2), random(D_OUT, 12, seed=3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    first = factors_of(*update(keys, changes, metric, mu))
    second = factors_of(*update(keys[:, order], changes[:, order], metric, mu))
    torch.testing.assert_close(second.left, first.left, atol=1e-6, rtol=0)
    torch.testing.assert_close(second.right, first.right, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CLOSED)
def test_equal_keys(name: str) -> None:
    """The same fact twice is one fact where values are written exactly; two changes of one key give their mean."""
    metric, mu = preset(name)
    keys, changes, other = random(D_IN, 6, seed=2), random(D_OUT, 6, seed=3), random(D_OUT, 6, seed=4)
    twice, both = torch.cat([keys, keys], 1), torch.cat([changes, other], 1)
    found = product(twice, both, metric, mu)
    if name == "rome":
        assert difference(found, product(keys, (changes + other) / 2, metric, mu)) <= TOLERANCE
    else:
        assert difference(found, naive(name, twice, both, keys[:, :0])) <= TOLERANCE
        assert difference(found, product(keys, (changes + other) / 2, metric, mu / 2)) <= TOLERANCE
    assert factors_of(*update(twice, both, metric, mu)).rank == 6


def test_constraints_that_depend_on_each_other() -> None:
    """More equalities than inputs, a key that is the sum of two others: the nearest reachable changes, by least squares."""
    metric, mu = preset("rome")
    keys, changes = random(D_IN, 60, seed=2), random(D_OUT, 60, seed=3)
    assert difference(product(keys, changes, metric, mu), torch.linalg.lstsq(keys.T, changes.T).solution.T) <= 1e-8
    keys = torch.cat([keys[:, :5], keys[:, :1] + keys[:, 1:2]], 1)
    changes = torch.cat([changes[:, :5], changes[:, :1] + changes[:, 1:2]], 1)
    assert difference(product(keys, changes, metric, mu) @ keys, changes) <= TOLERANCE


def test_rounding_of_keys_is_not_a_direction() -> None:
    """Two keys that differ by float32 rounding cannot have two outputs, and what is written exactly is not written again."""
    metric, mu = preset("rome")
    keys, changes, other = random(D_IN, 3, seed=2), random(D_OUT, 3, seed=3), random(D_OUT, 3, seed=4)
    again = keys * (1 + 1e-7 * random(D_IN, 3, seed=5))
    both = product(torch.cat([keys, again], 1), torch.cat([changes, other], 1), metric, mu)
    assert difference(both, product(keys, (changes + other) / 2, metric, mu)) < 1e-5
    assert product(again, other, metric.after(keys, mu), mu).norm() < 1e-5 * both.norm()


@pytest.mark.parametrize("count", [2, 60, 600])
@pytest.mark.parametrize("share", [2e-12, 0.5e-9, 2e-9])
def test_rounding_is_a_share_of_the_longest_key(share: float, count: int) -> None:
    """A direction whose keys have 1e-9 of the longest key's kᵀG k, of whichever chunk, is written, and closed once it is; one with less
    is neither. Keys and changes are those of one matrix, so that every change can be written."""
    metric, mu = preset("rome")
    assert metric.basis is not None
    directions, wanted = torch.linalg.qr(random(D_IN, D_IN, seed=8))[0], random(D_OUT, D_IN, seed=3)
    # The longest key comes first, the short one last.
    lengths = torch.tensor([1.0, *[0.5] * (count - 2), share**0.5], dtype=torch.float64)
    places = torch.tensor([*(i % (D_IN - 1) for i in range(count - 1)), D_IN - 1])
    keys = metric.basis @ (metric.diagonal.sqrt()[:, None] * directions[:, places] * lengths)
    short, kept = keys[:, -1:] / share**0.5, float(share > 1e-9)
    found = product(keys, wanted @ keys, metric, mu)
    assert difference(found @ keys[:, :-1], wanted @ keys[:, :-1]) <= 1e-6
    if (
        count < D_IN or share != 0.5e-9
    ):  # a system of inputs has pivots that are longer than the direction, here up to a hundred times
        assert difference(found @ short, wanted @ short) == pytest.approx(1 - kept, abs=1e-4)
    after = metric.after(keys, 0.0)
    for held in (after, after.summed()):
        assert difference(product(short, wanted @ short, held, mu) @ short, wanted @ short) == pytest.approx(kept, abs=1e-4)


@pytest.mark.parametrize("name", RIDGES)
@pytest.mark.parametrize("count", [1, 12, 60])
def test_factors(name: str, count: int) -> None:
    """float32 factors of the update's own rank, at most that of the matrix."""
    metric, mu = preset(name)
    keys, changes = random(D_IN, count, seed=2), random(D_OUT, count, seed=3)
    made = factors_of(*update(keys, changes, metric, mu))
    small = metric.diagonal.numel()
    assert made.rank == min(count, D_OUT, small) == made.left.shape[1] == made.right.shape[0]
    assert made.left.dtype == made.right.dtype == torch.float32
    expected = product(keys, changes, metric, mu)
    assert difference(made.left.double() @ made.right.double(), expected) < 1e-6
    values = torch.linalg.svdvals(expected)[: made.rank]  # each side has half of a singular value, and the left one the sign
    for gram in (made.left.T @ made.left, made.right @ made.right.T):
        torch.testing.assert_close(gram.double(), torch.diag(values), rtol=1e-5, atol=1e-6 * float(values[0]))
    assert (made.left.amax(0) >= made.left.abs().amax(0)).all()


@pytest.mark.parametrize(("share", "rank"), [(0.5e-9, 1), (2e-9, 2)])
def test_factors_of_nothing(share: float, rank: int) -> None:
    """Facts that the model says already need no change: factors of rank 1, all zero. What is 1e-9 of the rest is rounding."""
    left, right = (torch.linalg.qr(random(size, 2, seed=2))[0] for size in (D_OUT, D_IN))
    assert factors_of(left * torch.tensor([1.0, share]), right.T).rank == rank
    made = factors_of(torch.zeros(D_OUT, 3, dtype=torch.float64), random(3, D_IN, seed=2))
    assert made.rank == 1
    assert not made.left.any()
