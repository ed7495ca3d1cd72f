"""Folders in which content is made before it is moved to its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workbench.ground.files import scratch_beside, write_text


def test_a_scratch_folder_goes_and_takes_what_killed_processes_left(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "made"
    left = place.with_name(".making-killed")
    (left / "half").mkdir(parents=True)
    with scratch_beside(place) as outer:
        assert not left.exists()
        (outer / "content").write_text("kept while in use", "utf-8")
        with scratch_beside(place) as inner:
            assert inner.parent == outer.parent == place.parent
            assert (outer / "content").is_file()
        assert not inner.exists()
        (outer / "content").rename(place)
    assert [path.name for path in place.parent.iterdir()] == ["made"]
    with pytest.raises(RuntimeError), scratch_beside(place) as failed:
        raise RuntimeError
    assert not failed.exists()


def test_what_a_killed_write_left_goes_with_the_next_write_of_that_file(tmp_path: Path) -> None:
    for name in (".x.123", ".x.124", ".notes.2024", ".tmpAbC123"):
        (tmp_path / name).touch()
        if name != ".x.124":  # which may be written now
            os.utime(tmp_path / name, (1e9, 1e9))
    write_text(tmp_path / "x", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"x", ".x.124", ".notes.2024", ".tmpAbC123"}
