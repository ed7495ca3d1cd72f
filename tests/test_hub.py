"""Hub ids: resolved in the hub's own cache layout, links and all, without network."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from project import Project

from workbench.errors import WorkbenchError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPE = "base: org/tiny@main\nbricks: {one: org/lora}\nsteps: [{merge: task_arithmetic}]\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def put(cache: Path, name: str, source: Path) -> None:
    """A directory as the hub's cache keeps it: blobs, and a snapshot of links."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for i, file in enumerate(sorted(f for f in source.iterdir() if f.is_file())):
        (repo / "blobs" / f"blob{i}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")


def test_recipe_on_hub_ids_gives_the_bytes_of_local_ones(project: Project, hub: Path, llama: Path, bricks: Path) -> None:
    put(hub, "org/tiny", llama)
    put(hub, "org/lora", bricks / "one")
    result = project.run(RECIPE)
    local = project.run("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n", "local.yaml")
    assert result["configuration"] == local["configuration"]
    inputs = json.loads((Path(result["run"]) / "run.json").read_text())["inputs"]
    assert inputs["base"]["revision"] == COMMIT
    assert inputs["bricks"]["one"]["revision"] == COMMIT
    card = (Path(result["model"]) / "README.md").read_text("utf-8")
    assert "- org/tiny" in card
    assert "- org/lora" in card
    assert str(hub) not in card, "no path of this machine"


def test_index_of_a_snapshot_may_link_to_blobs(project: Project, hub: Path, llama: Path, bricks: Path, tmp_path: Path) -> None:
    from workbench.weights.checkpoint import INDEX

    sharded = Path(project.run("steps: []\noutput: {shard_size: 10kB}\n", out=tmp_path / "sharded")["model"])
    assert (sharded / INDEX).is_file()
    put(hub, "org/tiny", sharded)
    put(hub, "org/lora", bricks / "one")
    assert project.resolve(RECIPE).base_digest == project.resolve("steps: []\n").base_digest


def test_what_is_not_cached_says_so(project: Project, hub: Path) -> None:
    with pytest.raises(
        WorkbenchError, match=r"base: org/tiny@?\w* is neither a local directory nor in the hub cache|base: org/tiny is neither"
    ):
        project.resolve(RECIPE)


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (GatedRepoError, "org/tiny is gated", "https://huggingface.co/org/tiny"),
        (RepositoryNotFoundError, "no such directory or hub repository: org/tiny", "hf auth login"),
    ],
)
def test_hub_errors(project: Project, monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str, hint: str) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(WorkbenchError, match=message) as caught:
        project.resolve(RECIPE)
    assert caught.value.hint is not None
    assert hint in caught.value.hint
