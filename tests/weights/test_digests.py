"""Digests that are remembered under a file's times, times that do not tell of another content, and norm epsilons in digests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.project import Project
from worlds.tiny import edit_json

from workbench.bricks.brick import checkpoint_digest
from workbench.ground.identity import FileIdentity
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
    monkeypatch.setattr("workbench.ground.identity.time.time_ns", lambda: NOW)
    assert FileIdentity(1, 2, 3, 4, 5, 6, read_only=False)._replace(**times).is_telling == tells


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
    monkeypatch.setattr("workbench.ground.identity.check_unchanged", lambda *_: None)
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


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_growth_scales_a_large_epsilon_with_the_width(family: str, project: Project, dense_of: Callable[[str], Path]) -> None:
    """With an epsilon like the norms' own squares a wrong share of it is no rounding: queries and keys that are normed included."""
    from transformers import AutoModelForCausalLM

    base = project.path / "large"
    shutil.copytree(dense_of(family), base)
    edit_json(base / "config.json", rms_norm_eps=0.5)
    document = project.run(f"base: {base}\nsteps: [{{grow: width, hidden: 40, check: off}}]\noutput: {{dtype: float32}}\n")
    before, after = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (base, document["model"]))
    assert after.config.hidden_size == 40 != before.config.hidden_size == 32
    assert after.config.rms_norm_eps == pytest.approx(0.5 * 32 / 40, rel=1e-12)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        old, new = before(tokens).logits, after(tokens).logits
    assert float((old - new).abs().max()) < 1e-4 * float(old.abs().max())


@pytest.mark.parametrize("field", ["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"])
def test_a_brick_with_another_epsilon_is_named(field: str, project: Project) -> None:
    """Equal weights compute something else with it, under each of its names."""
    base, brick = project.path / "own", project.path / "other"
    for place, value in ((base, 1e-6), (brick, 1e-3)):
        shutil.copytree((project.path / "base").resolve(), place)
        edit_json(place / "config.json", **{field: value})
    text = "base: {}\nbricks: {{other: {}}}\nsteps: [{{merge: average}}]\n"
    message = f"brick 'other': config.json differs from the base's in {field}; the result has the base's values"
    assert message in project.resolve(text.format(base, brick)).warnings
    assert not [w for w in project.resolve(text.format(base, base)).warnings if "config.json differs" in w]
