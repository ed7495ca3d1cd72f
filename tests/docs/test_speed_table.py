"""The page on speed: every ratio is the peer's seconds over ours, and every figure has a source."""

from __future__ import annotations

from types import ModuleType

import pytest

from worlds.places import PROJECT


def test_ratios_are_the_peers_seconds_over_ours(build: ModuleType) -> None:
    figures, sources = (part.splitlines()[2:] for part in build.BLOCKS["speed"](PROJECT).split("\n\n"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in figures]
    timed = [row for row in rows if row[3]]
    assert len(timed) > 15
    for work, _, theirs, ours, ratio, *_ in timed:
        assert float(ratio) == pytest.approx(float(theirs) / float(ours), rel=0.05), work
    assert {row[-1] for row in rows} == {line.split("]")[0].removeprefix("| [") for line in sources}
