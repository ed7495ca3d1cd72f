"""The table of unlearned functions: both rises are read where the own loss has risen enough."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


def test_rises_are_read_between_strengths(build: ModuleType) -> None:
    tables = sys.modules["neuron_set_tables"]
    before = {"math": 1.0, "code": 2.0, "ethics": 3.0}
    losses = {
        "-1.0": {"math": 9.0, "code": 9.0, "ethics": 9.0},  # added: no strength of unlearning
        "10.0": {"math": 1.8, "code": 2.5, "ethics": 3.3},
        "2.0": {"math": 1.4, "code": 2.1, "ethics": 3.1},
    }
    row = {"function": "math", "losses": {"way": losses, "weak": {"2.0": losses["2.0"]}}}
    assert tables.unlearning(before, row, "way") == pytest.approx(0.1 + (0.4 - 0.1) * (0.5 - 0.4) / (0.8 - 0.4))
    with pytest.raises(ValueError, match="weak: no strength raises the loss of 'math'"):
        tables.unlearning(before, row, "weak")


def test_two_sets_are_beside_the_sum_of_each(build: ModuleType) -> None:
    before = {"a": 1.0, "b": 1.0}
    alone = [
        {"function": name, "losses": {"scaled": {"1.0": of}}}
        for name, of in (("a", {"a": 3.0, "b": 1.5}), ("b", {"a": 2.0, "b": 2.0}))
    ]
    found = {"before": before, "functions": alone, "pairs": [{"functions": ["a", "b"], "losses": {"a": 4.5, "b": 2.0}}]}
    both, each, (gap, low, high) = sys.modules["neuron_set_tables"].together(found)
    assert (both, each, gap) == pytest.approx(((3.5 + 1.0) / 2, (3.0 + 1.5) / 2, 0.0))
    assert low < 0 < high
