"""Stand-ins: directories with a hub repository's small files and the headers of its weights, for `plan`.

They lie below the project's cache, `.workbench/hub/<org>/<name>@<commit>/`. Every safetensors file is a sparse one of the full
size whose header alone is real. Shapes and vocabularies are read from it as from the model; its tensors have no place in the
file (`weights.checkpoint.Entry.offset`), so that nothing reads them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from workbench.errors import size
from workbench.files import read_json, write_json
from workbench.project import CACHE
from workbench.weights.checkpoint import MAX_HEADER
from workbench.weights.foreign import STAND_IN

_CONNECTIONS = 8


@dataclass(frozen=True)
class Download:
    """What has to be fetched of a repository before its tensors can be read."""

    repository: str
    commit: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Repository:
    """A repository at a commit: file -> size in bytes."""

    name: str
    commit: str
    sizes: dict[str, int]


def kept_stand_in(name: str, revision: str | None, project: Path) -> Path | None:
    """The newest stand-in that was made for this revision."""
    top = project / CACHE / "hub"
    records = sorted(top.glob(f"{name}@*/{STAND_IN}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in records:
        record = read_json(file) or {}
        if revision == record.get("commit") or (revision or "main") in record.get("revisions", ()):
            return file.parent
    return None


def stand_in(found: Repository, revision: str | None, small: Sequence[str], weights: Sequence[str], project: Path) -> Path:
    """The directory with a repository's small files and headers; made where it is not there yet, whole or not at all."""
    place = project / CACHE / "hub" / f"{found.name}@{found.commit}"
    record = read_json(place / STAND_IN, files=dict, revisions=list)
    asked = revision or "main"
    if record is not None and all((place / file).is_file() for file in record["files"]):
        if asked not in record["revisions"]:
            write_json(place / STAND_IN, {**record, "revisions": [*record["revisions"], asked]})
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".making-") as folder:
        partial = Path(folder) / "repository"
        for file in (*small, *weights):
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            copied = pool.map(lambda file: shutil.copyfile(small_file(found, file), partial / file), small)
            headed = pool.map(lambda file: _put_header(found, file, partial / file), weights)
            _ = [*copied, *headed]
        data = {"repository": found.name, "commit": found.commit, "revisions": [asked],
                "files": {file: found.sizes[file] for file in (*small, *weights)}}  # fmt: skip
        for parent in {partial, *((partial / file).parent for file in weights)}:
            write_json(parent / STAND_IN, data)
        try:
            partial.rename(place)
        except OSError:
            if not place.is_dir():  # else another process has made it
                raise
    return place


def _put_header(found: Repository, file: str, to: Path) -> None:
    """A sparse file of the full size that begins with the header of the hub's."""
    from huggingface_hub import hf_hub_url

    url, size = hf_hub_url(found.name, file, revision=found.commit), found.sizes[file]
    head = _range(url, 0, min(8, size))
    length = int.from_bytes(head, "little")
    if length <= min(MAX_HEADER, size - 8):  # anything else is named by the reader of headers
        head += _range(url, 8, 8 + length)
    with to.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)


def _range(url: str, start: int, stop: int) -> bytes:
    """Bytes start..stop of a file of the hub; the connection is closed where a server sends more than it was asked for."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # exported lazily

    if stop <= start:
        return b""
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    found = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else start
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= skip + stop - start:
                break
    if len(found) < skip + stop - start:
        raise OSError(f"{len(found)} bytes of {stop - start}")
    return bytes(found[skip : skip + stop - start])


def download_of(path: Path) -> Download | None:
    """What a stand-in stands for, less what the hub's cache has by now; None for any other directory."""
    record = read_json(path / STAND_IN, repository=str, commit=str, files=dict)
    if record is None:
        return None
    name, commit = record["repository"], record["commit"]
    missing = [size for file, size in record["files"].items() if snapshot_with(name, commit, file) is None]
    return Download(name, commit, len(missing), sum(missing))


def space_problems(downloads: Iterable[Download], beside: Path | None = None, written: int = 0) -> list[str]:
    """Whether the disk of the hub's cache holds the downloads, and `written` more bytes if `beside` is on the same disk."""
    from huggingface_hub import constants

    needed = sum(download.bytes for download in downloads)
    if not needed:
        return []
    cache = Path(constants.HF_HUB_CACHE)
    here = _existing(cache)
    if beside is not None and _existing(beside).stat().st_dev == here.stat().st_dev:
        needed += written
    free = shutil.disk_usage(here).free
    if needed * 1.05 > free:
        return [f"{cache}: needs {size(needed * 1.05)} with the downloads from the hub, {size(free)} free"]
    return []


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.resolve().parents) if p.is_dir())


def small_file(found: Repository, file: str) -> Path:
    """A small file in the hub's cache; fetched by commit, so that what offline use takes for the branch stays what it was."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(found.name, file, revision=found.commit))


def snapshot_with(name: str, revision: str | None, file: str) -> Path | None:
    """The cached snapshot that holds a file; None where none does, or the name can be no hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(path).parents[len(PurePosixPath(file).parts) - 1] if isinstance(path, str) else None
