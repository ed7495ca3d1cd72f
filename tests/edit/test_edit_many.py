"""Closed-form solves of more facts than a projection has inputs: exact, in systems that do not grow with the facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.linalg import inv, pinv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worlds.solving import D_IN, D_OUT, TOLERANCE, difference, naive, preset, product, random, sequence

from workbench.edit.closed_form.solver import CHUNK, KeyMetric, factors_of_steps, solve

MANY = 3 * CHUNK + 7


class Largest(TorchDispatchMode):
    """Elements of the largest float64 tensor that any operation gives while it is active."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(found) if isinstance(t, Tensor) and t.dtype == torch.float64]
        self.elements = max([self.elements, *sizes])
        return found


def chunks(keys: Tensor, size: int) -> Iterator[Tensor]:
    return iter(keys.split(size, 1))


@pytest.mark.parametrize("name", ["memit", "emmet", "alphaedit", "encore", "ultraedit"])
def test_many_keys_after_many_keys(name: str) -> None:
    """Thousands of keys beside thousands that are written: the published formula, whichever way they come."""
    metric, mu = preset(name)
    written, keys, changes = random(D_IN, MANY, seed=4), random(D_IN, MANY, seed=2), random(D_OUT, MANY, seed=3)
    expected = naive(name, keys, changes, written)
    for after in (metric.after(written, mu), metric.after_all(chunks(written, 100), mu)):
        left, right = solve(keys.T, after, mu).update(changes.T)
        assert difference(left @ right, expected) <= TOLERANCE


def test_systems_do_not_grow_with_the_facts() -> None:
    """No tensor of the solve has more elements than the keys themselves: n x n systems would have 60 times as many."""
    metric, mu = preset("memit")
    keys, changes, spread = (random(rows, MANY * 2, seed=seed) for rows, seed in ((D_IN, 2), (D_OUT, 3), (D_IN, 4)))
    with Largest() as largest:
        solve(keys.T, metric.after(spread, mu), mu).update(changes.T)
    assert D_IN * CHUNK <= largest.elements <= keys.numel() < (MANY * 2) ** 2 / 60


def test_float32_rows() -> None:
    """Keys and changes come as they are kept, and are never copied whole in float64."""
    metric, mu = preset("memit")
    keys, changes = random(D_IN, MANY, seed=2).float(), random(D_OUT, MANY, seed=3).float()
    with Largest() as largest:
        left, right = solve(keys.T.contiguous(), metric, mu).update(changes.T.contiguous())
    assert largest.elements < MANY * D_OUT
    assert left.dtype == right.dtype == torch.float64
    assert difference(left @ right, naive("memit", keys.double(), changes.double(), keys[:, :0].double())) <= TOLERANCE


@pytest.mark.parametrize(("exact", "soft"), [(20, 100), (60, 100), (20, 5)])
def test_exact_and_soft_keys_together(exact: int, soft: int) -> None:
    """ROME's: keys whose outputs may not change at all, then more soft ones than inputs, in either order; one of them lies in the span
    of others. With more exact keys than inputs nothing may change."""
    metric, mu = preset("rome")
    fixed, softly, keys, changes = (
        random(rows, n, seed=s) for rows, n, s in ((D_IN, exact, 4), (D_IN, soft, 5), (D_IN, 6, 2), (D_OUT, 6, 3))
    )
    fixed = torch.cat([fixed, fixed[:, :1] + fixed[:, 1:2]], 1)
    c = metric.basis @ torch.diag(metric.diagonal) @ metric.basis.T + softly @ softly.T / 0.05  # type: ignore[union-attr]
    p = torch.eye(D_IN, dtype=torch.float64) - fixed @ pinv(fixed)
    inner = pinv(p @ c @ p, rtol=1e-10)
    expected = changes @ pinv(keys.T @ inner @ keys, rtol=1e-10) @ keys.T @ inner
    twice = metric.after(fixed[:, :5], 0.0).summed().after(fixed[:, 5:], 0.0).summed()  # what is closed stays so
    for after in (
        metric.after(fixed, 0.0).after(softly, 0.05),
        metric.after(softly, 0.05).after(fixed, 0.0),
        twice.after(softly, 0.05),
    ):
        found = product(keys, changes, after, mu)
        if exact > D_IN:
            assert found.norm() < 1e-6 * changes.norm()
            continue
        assert difference(found, expected) <= 1e-8
        assert (found @ fixed).norm() < 1e-8 * found.norm()
        assert difference(found @ keys, changes) <= 1e-8
        again = product(keys, changes, after.after(keys, 0.0), mu)
        assert again.norm() < 1e-5 * found.norm(), "what is written exactly is not written again"


@pytest.mark.parametrize("sizes", [[200] * 3, [30] * 20, [1, 599], [599, 1]])
def test_a_long_sequence_is_the_joint_solve(sizes: list[int]) -> None:
    """Groups are added up once they have more columns than the metric, in batches of any size."""
    metric, mu = preset("memit")
    keys, changes = random(D_IN, 600, seed=2), random(D_OUT, 600, seed=3)
    joint = product(keys, changes, metric, mu)
    assert difference(sequence(keys, changes, metric, mu, sizes, history=True), joint) <= TOLERANCE
    assert difference(joint, changes @ keys.T @ inv(0.1 * D_IN * _c(metric) + keys @ keys.T)) <= TOLERANCE


def test_groups_keep_their_own_ridge_when_they_are_added_up() -> None:
    """Few keys that weigh four times as much, kept as columns until many others follow."""
    metric, mu = preset("memit")
    heavy, many, keys, changes = (
        random(rows, n, seed=s) for rows, n, s in ((D_IN, 10, 4), (D_IN, 200, 5), (D_IN, 6, 2), (D_OUT, 6, 3))
    )
    after = metric.after(heavy, mu / 4).after(many, mu)
    assert not after.written
    system = 0.1 * D_IN * _c(metric) + 4 * heavy @ heavy.T + many @ many.T + keys @ keys.T
    assert difference(product(keys, changes, after, mu), changes @ keys.T @ inv(system)) <= TOLERANCE


def _c(metric: KeyMetric) -> Tensor:
    assert metric.basis is not None
    return metric.basis @ torch.diag(metric.diagonal) @ metric.basis.T / (0.1 * D_IN)


def test_factors_of_a_wide_sum() -> None:
    """Products with more columns together than the matrix has: the matrix decides, and its rank is its own."""
    left, right = random(D_OUT, 20, seed=2), random(20, D_IN, seed=3)
    few, many = factors_of_steps(left @ right, [(left, right)]), factors_of_steps(left @ right, None)
    assert few.rank == many.rank == 20
    torch.testing.assert_close(few.left @ few.right, (left @ right).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(many.left @ many.right, (left @ right).float(), atol=1e-5, rtol=0)


def test_ten_thousand_facts_and_bounded_memory() -> None:
    """10,000 facts behind four beginnings each at a width of 96: nothing as large as facts x facts, or as all keys behind contexts."""
    width, facts = 96, 10_000
    metric = KeyMetric(None, torch.ones(width, dtype=torch.float64))
    keys, changes = random(facts, width, seed=1).float(), random(facts, 32, seed=2).float()

    def spread() -> Iterator[Tensor]:
        return (0.1 * random(width, 4 * CHUNK, seed=i).float() for i in range(facts // CHUNK))

    with Largest() as largest:
        left, right = solve(keys, metric.after_all(spread(), 1.0), 1.0).update(changes)
    assert largest.elements <= width * 4 * CHUNK
    every = torch.cat(list(spread()), 1).double()
    system = torch.eye(width, dtype=torch.float64) + every @ every.T + keys.double().T @ keys.double()
    assert difference(left @ right, torch.linalg.solve(system, keys.double().T @ changes.double()).T) <= TOLERANCE
