"""Folders in which content is made before it is moved to its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.files import scratch_beside


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
