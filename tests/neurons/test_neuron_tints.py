"""Gray cells on the pages of neurons: overlaps of sets and recovered shares that chance explains."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from workbench.edit.places.knowledge import Trace as FactTrace
from workbench.edit.places.knowledge import TracedAnswer
from workbench.neurons.pages.page import random_overlap
from workbench.neurons.pages.tracemap import render_trace
from workbench.neurons.trace import table_of


def test_the_overlap_of_random_sets_of_neurons() -> None:
    sizes = [(20, 400), (30, 600)]
    spread = sum(stats.hypergeom(n, k, k).var() for k, n in sizes) ** 0.5
    mean = sum(stats.hypergeom(n, k, k).mean() for k, n in sizes)
    assert random_overlap(0.05, [400, 600]) == (0.0, pytest.approx((mean + 1.96 * spread) / 50))


@given(st.floats(0.01, 1), st.lists(st.integers(1, 60), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_overlap_of_random_sets(share: float, layers: list[int]) -> None:
    """Mean and variance of scipy's hypergeometric distribution, summed over layers."""
    sizes = [max(1, round(share * n)) for n in layers]
    drawn = [stats.hypergeom(n, k, k) for n, k in zip(layers, sizes, strict=True)]
    mean, variance = (
        np.nansum([getattr(d, name)() for d in drawn]) for name in ("mean", "var")
    )  # of a layer of one, scipy's is NaN
    assert random_overlap(share, layers) == pytest.approx(
        (0, (mean + 1.96 * math.sqrt(max(variance, 0.0))) / sum(sizes)), abs=1e-6
    )


def test_recovered_shares_that_may_be_zero_are_gray(tmp_path: Path) -> None:
    restored = [{0: {"subject": s, "subject_last": 0.9, "last": 0.1 + s / 10}} for s in (0.05, 0.3, -0.1, 0.25)]
    rows = tuple(TracedAnswer(str(i), 7, 0.9, 0.1, r) for i, r in enumerate(restored))
    shares = {0: {p: float(np.mean([(r[0][p] - 0.1) / 0.8 for r in restored])) for p in ("subject", "subject_last", "last")}}
    traced = FactTrace(4, 0.9, 0.1, shares, rows)
    table = table_of("m", "facts.jsonl", {"block": traced, "feed_forward": traced}, {str(i): "a" for i in range(4)})
    page = render_trace(table, tmp_path / "trace.html").read_text("utf-8")
    looks = re.findall(r"<title>layer 0, ([^:]*): [^<]*</title><rect class=\"(\w+)\"", page)
    assert [kind for _, kind in looks] == ["null", "up", "null"] * 2, looks
    assert "its 95 % interval over facts includes 0" in page
