"""Header folders: directories with the small files of a hub repository and the headers of its weights, for `plan`.

They are stored in the project's cache, `.workbench/hub/<org>/<name>@<commit>/`. Every safetensors file in them is a sparse file
of the full size that contains only the header. Readers get shapes and vocabularies from it as from the real model. Its tensors
have no offset (`weights.header.Entry.offset`), so an attempt to read one raises an error.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from workbench.ground.errors import size
from workbench.ground.files import publish_once, read_json, scratch_beside, write_json
from workbench.ground.foreign_names import HEADERS_ONLY
from workbench.ground.project import cache_of
from workbench.ground.results import JsonObject
from workbench.weights.header import MAX_HEADER

_CONNECTIONS = 8


class Download(JsonObject):
    """A repository of the hub that a run downloads first."""

    repository: str
    """Id of the repository."""
    commit: str
    """Commit of the repository."""
    files: int
    """Number of files to download."""
    bytes: int
    """Size of the download in bytes."""


@dataclass(frozen=True)
class Repository:
    """A repository at a commit: file -> size in bytes."""

    name: str
    commit: str
    sizes: dict[str, int]


def known_header_folder(name: str, revision: str | None, project: Path) -> Path | None:
    """Return the newest header folder for this revision, or None."""
    top = cache_of(project) / "hub"
    records = sorted(top.glob(f"{name}@*/{HEADERS_ONLY}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in records:
        record = read_json(file) or {}
        if revision == record.get("commit") or (revision or "main") in record.get("revisions", ()):
            return file.parent
    return None


def header_folder(
    repository: Repository, revision: str | None, small: Sequence[str], weights: Sequence[str], project: Path
) -> Path:
    """Return the header folder of a repository, creating it atomically if it does not exist.

    Args:
        repository: The repository at a commit.
        revision: Revision to record for the commit; None is the default branch.
        small: Files to download whole.
        weights: Safetensors files, of which only the headers are downloaded.
        project: Project whose cache holds the header folder.
    """
    place = cache_of(project) / "hub" / f"{repository.name}@{repository.commit}"
    record = read_json(place / HEADERS_ONLY, files=dict, revisions=list)
    label = revision or "main"
    if record is not None and all((place / file).is_file() for file in record["files"]):
        if label not in record["revisions"]:
            write_json(place / HEADERS_ONLY, {**record, "revisions": [*record["revisions"], label]})
        return place
    shutil.rmtree(place, ignore_errors=True)
    with scratch_beside(place) as folder:
        partial = folder / "repository"
        for file in (*small, *weights):
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            copies = pool.map(lambda file: shutil.copyfile(small_file(repository, file), partial / file), small)
            headers = pool.map(lambda file: _put_header(repository, file, partial / file), weights)
            _ = [*copies, *headers]
        data = {
            "repository": repository.name,
            "commit": repository.commit,
            "revisions": [label],
            "files": {file: repository.sizes[file] for file in (*small, *weights)},
        }
        for parent in {partial, *((partial / file).parent for file in weights)}:
            write_json(parent / HEADERS_ONLY, data)
        publish_once(partial, place)
    return place


def _put_header(repository: Repository, file: str, to: Path) -> None:
    """Write a sparse file of the full size that starts with the header of the hub's file."""
    from huggingface_hub import hf_hub_url

    url, size = hf_hub_url(repository.name, file, revision=repository.commit), repository.sizes[file]
    head = _range(url, 0, min(8, size))
    length = int.from_bytes(head, "little")
    if length <= min(MAX_HEADER, size - 8):  # the reader of headers reports other lengths
        head += _range(url, 8, 8 + length)
    with to.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)


def _range(url: str, start: int, stop: int) -> bytes:
    """Download bytes start..stop of a hub file, closing the connection if the server sends more than that."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # exported lazily

    if stop <= start:
        return b""
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    content = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else start
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) >= skip + stop - start:
                break
    if len(content) < skip + stop - start:
        raise OSError(f"received {len(content)} of {stop - start} bytes")
    return bytes(content[skip : skip + stop - start])


def download_of(path: Path) -> Download | None:
    """Return the download that a header folder still requires, or None if the directory is not a header folder."""
    record = read_json(path / HEADERS_ONLY, repository=str, commit=str, files=dict)
    if record is None:
        return None
    name, commit = record["repository"], record["commit"]
    missing = [size for file, size in record["files"].items() if snapshot_with(name, commit, file) is None]
    return Download(repository=name, commit=commit, files=len(missing), bytes=sum(missing))


def space_problems(downloads: Iterable[Download], output: Path | None = None, written: int = 0) -> list[str]:
    """Return a message if the disk of the hub's cache cannot hold the downloads, else nothing.

    Args:
        downloads: The downloads.
        output: Directory for further output, which counts if it is on the same disk.
        written: Size of that output in bytes.
    """
    from huggingface_hub import constants

    needed = sum(download.bytes for download in downloads)
    if not needed:
        return []
    cache = Path(constants.HF_HUB_CACHE)
    here = _existing(cache)
    if output is not None and _existing(output).stat().st_dev == here.stat().st_dev:
        needed += written
    free = shutil.disk_usage(here).free
    if needed * 1.05 > free:
        return [f"{cache}: requires {size(needed * 1.05)} including the downloads from the hub, {size(free)} is free"]
    return []


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.resolve().parents) if p.is_dir())


def small_file(repository: Repository, file: str) -> Path:
    """Return a small file in the hub's cache, downloading it if necessary.

    The download goes by commit, so it does not change the commit that the cache records for a branch and uses offline.
    """
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository.name, file, revision=repository.commit))


def snapshot_with(name: str, revision: str | None, file: str) -> Path | None:
    """Return the cached snapshot that holds a file, or None if there is none or the name is not a valid hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(path).parents[len(PurePosixPath(file).parts) - 1] if isinstance(path, str) else None
