"""Header folders: headers without tensors, which nothing can read, and the room that the downloads need."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from worlds.hub_server import header_bytes
from worlds.project import CPU

from workbench.adapters.bind import bind
from workbench.adapters.read import Adapter
from workbench.bricks import header_folders
from workbench.bricks.header_folders import Download, space_problems
from workbench.bricks.hub import HEADERS
from workbench.ground.errors import WorkbenchError
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import entry_digest, fingerprint
from workbench.weights.header import HeadersOnlyError, read_header

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_nothing_reads_tensors_of_a_header_folder(llama: Path, bricks: Path, tmp_path: Path) -> None:
    for source, file in ((llama, "model.safetensors"), (bricks / "one", "adapter_model.safetensors")):
        out = tmp_path / source.name
        shutil.copytree(source, out)
        data = (out / file).read_bytes()
        with (out / file).open("wb") as stream:
            stream.write(data[: header_bytes(source / file)])
            stream.truncate(len(data))
        (out / "headers-only.json").write_text("{}")
        entries = read_header(out / file)
        assert {n: e.spec for n, e in entries.items()} == {n: e.spec for n, e in read_header(source / file).items()}
        for read in (lambda e=entries: fingerprint(e), lambda e=entries: entry_digest(next(iter(e.values())))):
            with pytest.raises(HeadersOnlyError, match="only the header was downloaded"):
                read()
    checkpoint = Checkpoint(tmp_path / llama.name, "base")
    with pytest.raises(HeadersOnlyError):
        checkpoint.open("model.norm.weight", CPU).read(0, 1, torch.empty(1, 1))
    bound = bind(Adapter(tmp_path / "one", "brick 'one'"), checkpoint.specs)
    with pytest.raises(HeadersOnlyError):
        bound.factors(next(iter(bound.places)), CPU)


def test_downloads_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(header_folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 10**9))
    wanted = [
        Download(repository="org/a", commit=COMMIT, files=1, bytes=10**9),
        Download(repository="org/b", commit=COMMIT, files=2, bytes=8 * 10**8),
    ]
    assert space_problems(wanted) == []
    assert space_problems(wanted, tmp_path / "runs", 10**9) == [
        f"{tmp_path / 'hub'}: requires 2.9 GB including the downloads from the hub, 2.0 GB is free"
    ]
    assert space_problems([], tmp_path, 10**12) == []
    HEADERS.check_space(wanted)
    with pytest.raises(WorkbenchError, match=r"requires 2\.9 GB including the downloads"):
        HEADERS.check_space([*wanted, Download(repository="org/c", commit=COMMIT, files=1, bytes=10**9)])
