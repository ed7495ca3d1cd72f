"""The compiled loops and their torch form: the same bits, in every dtype, for odd sizes and odd values."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from workbench.weights import kernels
from workbench.weights.kernels import INFINITE, backend, magnitude_bits
from workbench.weights.sparse import ALL_TIES, Drop, Rows, Selection, Trim, Vote, drop_sums, find, select, window

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 15, 16, 1024, 1025, 5000]


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if not shutil.which("cc"):
        pytest.skip("no C compiler: the torch form is the only one")
    assert kernels.compiled()


def both(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What a call gives in C and in torch."""
    with monkeypatch.context() as patch:
        one = work()
        patch.setattr(kernels, "_library", lambda: None)
        return one, work()


def equal(one: Any, two: Any) -> None:
    for a, b in zip(one, two, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # bits: -0.0 is not 0.0
        else:
            assert a == b


def some(size: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    values[:: max(1, size // 7)] = 0.0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_same_bits(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, z = (some(size, seed, dtype, scale) for seed, scale in ((1, 1.0), (2, 1e-3), (3, 30.0)))
    base = some(size, 4)

    def out(work: Callable[[Tensor], Any], kind: torch.dtype = torch.float32) -> Callable[[], Any]:
        def call() -> Any:
            room = torch.full((size,), 7.0, dtype=kind)
            return work(room), room

        return call

    equal(*both(out(lambda room: kernels.widen(x, room)), monkeypatch))
    equal(*both(out(lambda room: kernels.difference(x, base, room)), monkeypatch))
    equal(*both(out(lambda room: kernels.narrow(base, room), dtype), monkeypatch))
    for scale in (1.0, 0.0, 1.3):
        equal(*both(out(lambda room, s=scale: kernels.combine(x, s, [y, z], [0.3, -1.7], room)), monkeypatch))
    equal(*both(out(lambda room: kernels.combine(x, 1.0, [], [], room)), monkeypatch))
    equal(*both(lambda: kernels.dots(x, z, [0.0, 1.0, 2.0]), monkeypatch))


def rows_of(size: int, dtype: torch.dtype, coarse: bool = False) -> Rows:
    """A base, two models in a dtype, a delta, a brick that does not touch the tensor."""
    base = some(size, 1, dtype)
    models = [(base.float() + some(size, seed, scale=0.5)).to(dtype) for seed in (2, 3)]
    delta = some(size, 4)
    if coarse:  # many equal magnitudes
        models, delta = (
            [(base.float() + ((m.float() - base.float()) * 4).round() / 4).to(dtype) for m in models],
            (delta * 4).round() / 4,
        )
    return Rows(base, [*models, delta, None], [False, False, True, False])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_same_windows_and_sums(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(size, dtype, coarse=True)
    threshold = int(magnitude_bits(torch.tensor(0.75)))

    def count(brick: int) -> tuple[int, Tensor]:
        counts = torch.zeros(1 << 21, dtype=torch.int32)
        return window(rows, brick, threshold - 1000, counts), counts

    for brick in range(3):
        (above, counts), other = both(lambda b=brick: count(b), monkeypatch)
        equal((above, counts), other)
        total = int(counts.sum())
        for rank in {1, 2, max(1, total // 2), max(1, total), total + 1}:
            found, other_found = both(lambda c=counts, r=rank: find(c, r), monkeypatch)
            assert found == other_found
            assert (found is None) == (rank > total)
            if found:
                assert int(counts[found[0] + 1 :].sum()) == found[1] < rank <= found[1] + int(counts[found[0]])
        delta = rows.delta(brick, torch.empty(size))
        assert above + int(counts.sum()) == int((magnitude_bits(delta) >= threshold - 1000).sum())
        one, two = both(lambda b=brick: drop_sums(rows, b, Drop(5, 0.4), 3, [1.0, 2.0]), monkeypatch)
        assert one == two
        assert one[0] == pytest.approx(1 + float(delta.abs().sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_same_selections(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(size, dtype, coarse=True)
    threshold = int(magnitude_bits(torch.tensor(0.5)))
    key = 0xFEDCBA9876543210
    thins = [[Trim(threshold, ties) for ties in (0, 1, 3, ALL_TIES)], [Drop(key, 0.3, 1 / 0.3)] * 4, [Trim(0)] * 4,
             [Trim(threshold, 2), Drop(key, 0.9), Trim(INFINITE), Trim(0)]]  # fmt: skip
    votes = [None, *(Vote(b, f, c) for b, f, c in product([False, True], repeat=3))]
    for thin, vote, add_base in product(thins, votes, (False, True)):
        selection = Selection(thin, [1.0, -0.5, 2.0, 1.0], 0.7, vote)

        def run(chosen: Selection = selection, add: bool = add_base) -> Any:
            out, left = torch.full((size,), 7.0), [t.ties if isinstance(t, Trim) else 0 for t in chosen.thin]
            return select(rows, chosen, left, 2**33 + 1, add, out), out, *left

        equal(*both(run, monkeypatch))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_is_seen(value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = some(2000, 1, dtype)
    x[1999] = value
    room = torch.empty(2000)
    for found in (
        both(lambda: kernels.widen(x, room), monkeypatch),
        both(lambda: kernels.difference(x, torch.zeros(2000), room), monkeypatch),
        both(lambda: select(Rows(None, [x], [True]), Selection([Trim(0)], [1.0], 1.0), [0], 0, False, room), monkeypatch),
        both(lambda: kernels.combine(x, 1.0, [x], [0.0], room), monkeypatch),
        both(lambda: kernels.narrow(x.float(), torch.empty(2000, dtype=dtype)), monkeypatch),
    ):
        assert found == (False, False)
    assert both(lambda: kernels.narrow(torch.full((9,), 1e5), torch.empty(9, dtype=torch.float16)), monkeypatch) == (False, False)
    assert both(lambda: kernels.narrow(torch.full((9,), 1e5), torch.empty(9, dtype=torch.bfloat16)), monkeypatch) == (True, True)


def kept(key: int, start: int, stop: int) -> Tensor:
    """1 dropped with probability 0.8, what is kept times 5."""
    out = torch.empty(stop - start)
    select(Rows(None, [torch.ones(stop - start)], [True]), Selection([Drop(key, 0.2, 5.0)], [1.0], 1.0), [0], start, False, out)
    return out


def test_masks_do_not_depend_on_blocks_and_keep_their_share() -> None:
    whole = kept(5, 0, 100_000)
    assert torch.equal(whole, torch.cat([kept(5, 0, 1), kept(5, 1, 4098), kept(5, 4098, 100_000)]))
    assert set(whole.tolist()) == {0.0, 5.0}
    assert abs(float(whole.mean()) - 1) < 5 * math.sqrt(4 / 100_000)  # mean 1, variance (1 - p)/p = 4
    other = kept(6, 0, 100_000)
    common = float(((whole > 0) & (other > 0)).float().mean())
    assert abs(common - 0.04) < 5 * math.sqrt(0.04 * 0.96 / 100_000), "masks of two keys are independent"
    pairs = (whole[:-1] > 0) & (whole[1:] > 0)
    assert abs(float(pairs.float().mean()) - 0.04) < 5 * math.sqrt(0.04 * 0.96 / 100_000), "so are neighbours"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not kernels.compiled()
    monkeypatch.delenv("CC")
    backend.cache_clear()
    monkeypatch.setenv("WORKBENCH_KERNELS", "torch")
    assert not kernels.compiled()
    monkeypatch.delenv("WORKBENCH_KERNELS")
    backend.cache_clear()
    assert kernels.compiled()


def _factors(rows: int, rank: int, cols: int, kind: str) -> list[Tensor]:
    """Two factors and a matrix that the product is added to, with odd values of one kind."""
    generator = torch.Generator().manual_seed(rows * 1000 + rank)
    drawn = [torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, cols), (rows, cols))]
    if kind == "zeros of both signs":
        return [x * (torch.rand(x.shape, generator=generator) < 0.2) for x in drawn]
    if kind == "numbers below the smallest normal one":
        return [drawn[0] * 1e-22, drawn[1] * 1e-22, drawn[2] * 1e-44]
    return [drawn[0] * 1e20, drawn[1] * 1e19, drawn[2]] if kind == "infinite sums" else drawn


KINDS_OF_FACTORS = ["usual numbers", "zeros of both signs", "numbers below the smallest normal one", "infinite sums"]
SHAPES = [
    *product((1, 2, 3, 4, 5, 6, 7, 11, 64), (0, 1, 2, 3, 8, 16, 48, 191, 193, 300), (1, 15, 16, 17, 48, 64, 80, 256)),
    (16384, 16, 16),
    (292, 48, 896),
    (73, 16, 3584),
    (13, 64, 18944),
]


def _stated(left: Tensor, right: Tensor) -> Tensor:
    """The stated order, number by number: a sum from 0 in the order of the rank, whose terms and sums are float32."""
    out = torch.zeros(len(left), right.shape[1])
    for i, j in product(range(len(left)), range(right.shape[1])):
        total = np.float32(0)
        for a, b in zip(left[i].numpy(), right[:, j].numpy(), strict=True):
            total = total + a * b
        out[i, j] = float(total)
    return out


def _multiplied(left: Tensor, right: Tensor, start: Tensor, add: bool) -> Tensor:
    out = start.clone()
    kernels.multiply(left, right, out, add)
    return out


@pytest.mark.parametrize("kind", KINDS_OF_FACTORS)
def test_products_have_one_order_of_sums(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of low rank, as results and as additions, for all remainders of the loop's tiles, compiled and not."""
    for rows, rank, cols in SHAPES:
        left, right, start = _factors(rows, rank, cols, kind)
        for add in (False, True):
            one, two = both(lambda f=(left, right, start, add): _multiplied(*f).view(torch.int32), monkeypatch)
            assert torch.equal(one, two), (rows, rank, cols, add)


@pytest.mark.parametrize("kind", KINDS_OF_FACTORS[:3])
def test_products_are_sums_in_the_order_of_the_rank(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of a computation with single numbers; the values of float64; the same for any cut into blocks of rows."""
    left, right, start = _factors(9, 33, 21, kind)
    stated = _stated(left, right)
    for result in both(lambda: _multiplied(left, right, start, False), monkeypatch):
        assert torch.equal(result.view(torch.int32), stated.view(torch.int32))
    for result in both(lambda: _multiplied(left, right, start, True), monkeypatch):
        assert torch.equal(result.view(torch.int32), (start + stated).view(torch.int32))
    torch.testing.assert_close(stated.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)
    blocks = [_multiplied(left[i:j], right, start[i:j], True) for i, j in ((0, 1), (1, 4), (4, 9))]
    assert torch.equal(torch.cat(blocks), _multiplied(left, right, start, True))


def test_products_of_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors and results whose rows do not lie one after the other, and factors of other dtypes."""
    left, right, start = _factors(7, 20, 40, "usual numbers")
    want = _multiplied(left, right, start, True)
    room = torch.zeros(7, 50)
    room[:, 3:43] = start
    kernels.multiply(left.T.contiguous().T, right, room[:, 3:43], add=True)
    assert torch.equal(room[:, 3:43], want)
    assert not room[:, :3].any()
    assert not room[:, 43:].any()
    halves = left.bfloat16(), right.bfloat16()
    for result in both(lambda: kernels.product(*halves), monkeypatch):
        assert torch.equal(result, _stated(halves[0].float(), halves[1].float()))
