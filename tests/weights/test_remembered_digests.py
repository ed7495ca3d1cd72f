"""Digests that are remembered under a file's times, and times that do not tell of another content."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from workbench.bricks.brick import checkpoint_digest
from workbench.identity import FileIdentity
from workbench.weights.checkpoint import Checkpoint

SECOND = 1_000_000_000
NOW = 1_700_000_000 * SECOND


@pytest.mark.parametrize(
    ("times", "tells"),
    [
        ({"ctime_ns": NOW - 3 * SECOND + 7}, True),
        ({"ctime_ns": NOW - 3 * SECOND}, False),  # a file system with seconds only
        ({"ctime_ns": NOW - 7}, False),  # written just now
        ({"ctime_ns": NOW - 3 * SECOND + 7, "mtime_ns": NOW - 3 * SECOND + 7}, True),  # written once
        (
            {"ctime_ns": NOW - 3 * SECOND + 7, "mtime_ns": NOW - 3 * SECOND + 7, "read_only": True},
            False,
        ),  # an image that has no ctime
        ({"ctime_ns": NOW - 3 * SECOND + 7, "read_only": True}, True),
    ],
)
def test_when_times_tell_of_another_content(times: dict[str, Any], tells: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.identity.time.time_ns", lambda: NOW)
    assert FileIdentity(1, 2, 3, 4, 5)._replace(**times).is_telling == tells


@pytest.mark.parametrize("forgotten", ["coarse times", "--rehash"])
def test_other_bytes_with_the_same_times_have_another_digest(
    forgotten: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read again where times do not tell, as of two images that are mounted in turn at one path, and where the user asks."""
    from workbench.weights import digests

    base = shutil.copytree(llama, tmp_path / "base")
    file = base / "model.safetensors"
    first = Checkpoint(base, "base")
    identity = next(iter(first.entries.values())).identity
    assert identity is not None
    fixed = identity._replace(ctime_ns=NOW + 7 * (forgotten == "--rehash"), mtime_ns=NOW)
    monkeypatch.setattr("workbench.weights.header.settled_identity", lambda descriptor: fixed)
    monkeypatch.setattr("workbench.weights.digests.check_unchanged", lambda *_: None)
    monkeypatch.setattr("workbench.identity.check_unchanged", lambda *_: None)
    before = checkpoint_digest(Checkpoint(base, "base"), tmp_path / "cache")
    with file.open("r+b") as stream:
        stream.seek(-64, 2)
        stream.write(bytes(64))
    if forgotten == "--rehash":
        assert checkpoint_digest(Checkpoint(base, "base"), tmp_path / "cache") == before, "times that tell are trusted"
        monkeypatch.setattr(digests, "_rehashes", False)
        digests.rehash()
    else:
        digests._READ.clear()
    assert checkpoint_digest(Checkpoint(base, "base"), tmp_path / "cache") != before
    digests._READ.clear()
