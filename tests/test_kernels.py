"""The compiled loops and their torch form: the same bits, in every dtype, for odd sizes and odd values."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.weights import kernels
from workbench.weights.kernels import ALL_TIES, magnitude_bits

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


@pytest.mark.parametrize("size", SIZES)
def test_same_bits_of_selection(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = (some(size, 1) * 4).round() / 4  # many equal magnitudes
    threshold = int(magnitude_bits(torch.tensor(0.75)))

    def count() -> tuple[int, Tensor]:
        counts = torch.zeros(1 << 21, dtype=torch.int32)
        return kernels.window(values, threshold - 1000, counts), counts

    (above, counts), other = both(count, monkeypatch)
    equal((above, counts), other)
    assert above + int(counts.sum()) == int((values.abs() >= 0.75).sum())
    for ties in (0, 1, 3, ALL_TIES):
        equal(*both(lambda t=ties: (lambda v: (kernels.trim(v, threshold, t), v))(values.clone()), monkeypatch))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("index", [0, 1, 77, 2**33 + 1])
def test_same_masks(size: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = 0xFEDCBA9876543210
    equal(*both(lambda: (lambda v: (kernels.drop(v, key, index, 0.3, 1 / 0.3), v))(torch.ones(size)), monkeypatch))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("frequency", [False, True])
@pytest.mark.parametrize("count", [False, True])
def test_same_elections(before: bool, frequency: bool, count: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [some(3000, seed) for seed in range(4)]
    weights = [1.0, -0.5, 0.0, 2.0]
    options = {"before": before, "frequency": frequency, "count": count}
    equal(*both(lambda: (kernels.elect([d.clone() for d in deltas], weights, 0.7, **options),), monkeypatch))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_is_seen(value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = some(2000, 1, dtype)
    x[1999] = value
    room = torch.empty(2000)
    for found in (
        both(lambda: kernels.widen(x, room), monkeypatch),
        both(lambda: kernels.difference(x, torch.zeros(2000), room), monkeypatch),
        both(lambda: kernels.combine(x, 1.0, [x], [0.0], room), monkeypatch),
        both(lambda: kernels.narrow(x.float(), torch.empty(2000, dtype=dtype)), monkeypatch),
    ):
        assert found == (False, False)
    assert both(lambda: kernels.narrow(torch.full((9,), 1e5), torch.empty(9, dtype=torch.float16)), monkeypatch) == (
        False,
        False,
    )
    assert both(lambda: kernels.narrow(torch.full((9,), 1e5), torch.empty(9, dtype=torch.bfloat16)), monkeypatch) == (True, True)


def test_masks_do_not_depend_on_blocks_and_keep_their_share() -> None:
    whole = torch.ones(100_000)
    kernels.drop(whole, 5, 0, 0.2, 5.0)
    parts = torch.ones(100_000)
    for start, stop in ((0, 1), (1, 4098), (4098, 100_000)):
        kernels.drop(parts[start:stop], 5, start, 0.2, 5.0)
    assert torch.equal(whole, parts)
    assert set(whole.tolist()) == {0.0, 5.0}
    assert abs(float(whole.mean()) - 1) < 5 * math.sqrt(4 / 100_000)  # mean 1, variance (1 - p)/p = 4
    other = torch.ones(100_000)
    kernels.drop(other, 6, 0, 0.2, 5.0)
    both_kept = float(((whole > 0) & (other > 0)).float().mean())
    assert abs(both_kept - 0.04) < 5 * math.sqrt(0.04 * 0.96 / 100_000), "masks of two keys are independent"
    pairs = (whole[:-1] > 0) & (whole[1:] > 0)
    assert abs(float(pairs.float().mean()) - 0.04) < 5 * math.sqrt(0.04 * 0.96 / 100_000), "so are neighbours"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._library.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not kernels.compiled()
    monkeypatch.delenv("CC")
    kernels._library.cache_clear()
    monkeypatch.setenv("WORKBENCH_KERNELS", "torch")
    assert not kernels.compiled()
    monkeypatch.delenv("WORKBENCH_KERNELS")
    kernels._library.cache_clear()
    assert kernels.compiled()
