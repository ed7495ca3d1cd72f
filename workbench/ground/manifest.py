"""The seal of a result: a manifest of every published file with its size and SHA-256, written last.

A sealed folder holds the files of its manifest and no others. Names and sizes are compared each time that the folder is used; the
contents are compared by `runs verify`, `push` and `export`. A folder inside it that has a manifest of its own is a part: the outer
manifest lists it by name, so that a result, an edit or a memory stays sealed where it is copied to.

What may change afterwards, and how:

- run.json is sealed with the bytes that it is about to get, so that "done" is the last thing written.
- log.jsonl of a run is open: events are appended, and nothing reads it back.
- A card (README.md) is text for people. Its edit by hand is found where contents are compared, but stops no other command.
- Facts that are added to a memory, and scores that `eval` writes into a card, are sealed again by the command that changes them
  (`changing`). If that command is killed, these files stay open until the next change. What was broken before stays broken, until
  the user accepts it (`accept`).
- Lock files and unfinished atomic writes of a killed command are no part of a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from workbench.ground.errors import GateFailedError, UsageError
from workbench.ground.files import SCRATCH, UNFINISHED, publish, read_json, write_json
from workbench.ground.foreign_names import MANIFEST as MANIFEST

CARD = "README.md"
ASIDE = "broken"
"""Folder, beside a broken folder, that its files are moved to."""
_LOCKS = (".lock", ".holder")
_SHOWN = 5


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
        files: File, relative to the folder -> its size in bytes and its SHA-256.
        parts: Folders inside that have manifests of their own.
        open: Files that may change.
    """

    files: Mapping[str, tuple[int, str]]
    parts: Sequence[str] = ()
    open: Sequence[str] = ()

    def write(self, folder: Path) -> None:
        """Write the manifest of a folder, atomically."""
        files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(self.files.items())}
        document = {"version": 1, "files": files, "parts": sorted(self.parts), "open": sorted(self.open)}
        write_json(folder / MANIFEST, document, indent=1)


@dataclass(frozen=True)
class Harm:
    """A file that is not as it was sealed."""

    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}"


def is_sealed(folder: Path) -> bool:
    """Return True if a folder has a manifest."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None if it is missing or damaged."""
    content = read_json(folder / MANIFEST, version=int, files=dict, parts=list, open=list)
    if content is None:
        return None
    rows, parts, opened = content["files"], content["parts"], content["open"]
    try:
        files = {name: (int(row["bytes"]), str(row["sha256"])) for name, row in rows.items()}
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    names = [*files, *parts, *opened]
    if not all(isinstance(name, str) and Path(name).parts and not {"..", "/"} & {*Path(name).parts} for name in names):
        return None
    return Manifest(files, parts, opened)


def seal(
    folder: Path, *, known: Mapping[Path, str] | None = None, coming: Mapping[str, bytes] | None = None, open: Iterable[str] = ()
) -> None:
    """Write the manifest of a finished folder.

    Args:
        folder: The folder. Folders inside it that are sealed become its parts.
        known: SHA-256 of files that were hashed while they were written; the others are read once.
        coming: Files that the caller writes next, with their content.
        open: Files that may change afterwards.
    """
    known, coming, names = known or {}, coming or {}, [name for name in files_of(folder) if name not in open]
    files = {
        name: ((folder / name).stat().st_size, known.get(folder / name) or sha256_of(folder / name))
        for name in names
        if name not in coming
    }
    files |= {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in coming.items()}
    Manifest(files, _parts(folder), list(open)).write(folder)


def reusable(folder: Path, record: str, *, digests: bool = False) -> bool:
    """Return True if a cache has a result that is whole.

    Args:
        folder: Directory of the result.
        record: File that a result without a manifest, of an earlier version, has.
        digests: Compare the contents too, for a result of which a copy is made and sealed.
    """
    return (folder / record).is_file() and not harm(folder, digests=digests)


def has_its_files(folder: Path) -> bool:
    """Return True if a folder is sealed and has all files of its manifest, with their sizes. Others, such as compiled code, may be beside them."""
    sealed = read_manifest(folder)
    return sealed is not None and all(_size(folder / name) == f"{size} bytes" for name, (size, _) in sealed.files.items())


def publish_sealed(partial: Path, target: Path) -> None:
    """Seal a finished result and publish it in a cache, unless another process was first. A broken one is moved aside."""
    seal(partial)
    if target.exists() and (not is_sealed(target) or harm(target, digests=True)):
        set_aside(target)
    if not target.exists():
        publish(partial, target)


@contextmanager
def changing(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Change, add or remove files of a sealed folder in a `with` block, and seal them again at its end.

    The files are open while they change, so that a command that is killed leaves no broken folder. A folder without a manifest is
    changed without one.

    Args:
        folder: The folder.
        names: The files that may change.
    """
    sealed = read_manifest(folder)
    if sealed is None:
        yield
        return
    opened = {*sealed.open, *names}
    contents = {name: entry for name, entry in sealed.files.items() if name in opened and name not in sealed.open}
    broken = {n: entry for n, entry in contents.items() if not (folder / n).is_file() or sha256_of(folder / n) != entry[1]}
    replace(sealed, open=sorted(opened)).write(folder)
    try:
        yield
    finally:
        files = {name: entry for name, entry in sealed.files.items() if name not in opened}
        files |= {n: ((folder / n).stat().st_size, sha256_of(folder / n)) for n in opened if (folder / n).is_file()}
        replace(sealed, files={**files, **broken}, open=()).write(folder)


def accept(folder: Path, name: str) -> None:
    """Seal a file of a folder again as it is now, because the user changed or added it on purpose.

    Raises:
        UsageError: If there is no such file, or its folder has no manifest.
    """
    sealed = read_manifest(folder)
    if sealed is None or name not in files_of(folder, parts=True) or name in sealed.open:
        raise UsageError(f"{name}: no such file of {folder}, or no manifest that could list it")
    part = next((part for part in sealed.parts if name.startswith(f"{part}/")), None)
    if part is not None:
        accept(folder / part, name.removeprefix(f"{part}/"))
    else:
        entry = (folder / name).stat().st_size, sha256_of(folder / name)
        replace(sealed, files={**sealed.files, name: entry}).write(folder)


def harm(folder: Path, *, digests: bool = False) -> list[Harm]:
    """Return what differs between a folder and its manifest, with those of its parts; empty if it is whole or was never sealed.

    Args:
        folder: The folder.
        digests: Compare the contents too, which reads every file.
    """
    if not is_sealed(folder):
        outer = read_manifest(folder.parent)
        is_part = outer is not None and folder.name in outer.parts
        return [Harm(MANIFEST, "the manifest of this folder", "nothing")] if is_part else []
    while True:  # a command that changes the folder writes its manifest first and last
        before = (folder / MANIFEST).read_bytes()
        found = _harm(folder, digests)
        if not found or (folder / MANIFEST).read_bytes() == before:
            return found


def _harm(folder: Path, digests: bool) -> list[Harm]:
    sealed = read_manifest(folder)
    if sealed is None:
        return [Harm(MANIFEST, "a manifest", "a damaged file")]
    fixed = {name: entry for name, entry in sealed.files.items() if name not in sealed.open}
    found = []
    for name, (size, _) in fixed.items():
        there = _size(folder / name)
        edited = Path(name).name == CARD and there.endswith("bytes") and not digests
        if there != f"{size} bytes" and not edited:
            found.append(Harm(name, f"{size} bytes", there))
    if digests:
        wrong = {one.file for one in found}
        found += _contents(folder, {name: digest for name, (_, digest) in fixed.items() if name not in wrong})
    for part in sealed.parts:
        if not (folder / part).is_dir():
            found.append(Harm(part, "a folder", "nothing"))
        else:
            found += [replace(one, file=f"{part}/{one.file}") for one in harm(folder / part, digests=digests)]
    allowed = {*sealed.files, *sealed.open}
    for name in (*files_of(folder), *_parts(folder)):
        if name not in allowed and not any(name == part or name.startswith(f"{part}/") for part in sealed.parts):
            found.append(Harm(name, "no such file", "one that is not in the manifest"))
    return found


def _contents(folder: Path, expected: Mapping[str, str]) -> Iterator[Harm]:
    """Yield the files whose SHA-256 is another one."""
    with ThreadPoolExecutor() as pool:
        for name, actual in zip(expected, pool.map(lambda name: sha256_of(folder / name), expected), strict=True):
            if actual != expected[name]:
                yield Harm(name, f"SHA-256 {expected[name][:12]}", actual[:12])


def _size(path: Path) -> str:
    """Describe what is at a path: the size of a file, or that there is none."""
    if path.is_file():
        return f"{path.stat().st_size} bytes"
    return "nothing" if not path.exists() else "something that is not a file"


def require_whole(folder: Path, *, digests: bool = False) -> None:
    """Check a folder against its manifest, with the contents if `digests`; a folder that was never sealed passes.

    Raises:
        GateFailedError: If a file is missing, changed or was added. The message names it, and what was expected and found.
    """
    if found := harm(folder, digests=digests):
        raise GateFailedError(
            f"{folder}: {described(found)}",
            f"{made_again(sizes_differ=bool(harm(folder)))} To use the folder as it is, unsealed, remove its {MANIFEST}.",
        )


def made_again(*, sizes_differ: bool) -> str:
    """Say how a broken run is made again; `run` notices names and sizes alone."""
    if sizes_differ:
        return "Run its recipe again: the broken run is moved aside, and made again."
    return "Remove the run with `workbench runs rm NAME`, then run its recipe again."


def described(found: Sequence[Harm]) -> str:
    """Describe files that are not as they were sealed, in one line."""
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    files = "1 file is" if len(found) == 1 else f"{len(found)} files are"
    return f"{files} not as written: {'; '.join(map(str, found[:_SHOWN]))}{more}"


def manifest_of(folder: Path) -> Manifest:
    """Return the manifest of a sealed folder with the files of its parts.

    Raises:
        GateFailedError: If a manifest is missing or damaged.
    """
    whole = read_manifest(folder)
    if whole is None:
        raise GateFailedError(f"{folder / MANIFEST}: expected a manifest, found none that can be read")
    for part in whole.parts:
        inner = manifest_of(folder / part)
        files = {f"{part}/{name}": entry for name, entry in inner.files.items()}
        whole = Manifest({**whole.files, **files}, whole.parts, [*whole.open, *(f"{part}/{name}" for name in inner.open)])
    return whole


def set_aside(folder: Path, last: str = "") -> Path:
    """Move the files of a broken folder to `broken/` beside it, and return the new place. Nothing is lost, and locks stay.

    Args:
        folder: The folder, which goes unless another process or this one holds its lock.
        last: Name of the file that marks the folder as finished, which is moved last.
    """
    places = (folder.parent / ASIDE / f"{folder.name}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 10_000))))
    place = next(place for place in places if not place.exists())
    place.mkdir(parents=True)
    for child in sorted(folder.iterdir(), key=lambda child: (child.name == last, child.name)):
        if child.name not in _LOCKS:
            with contextlib.suppress(FileNotFoundError):
                child.rename(place / child.name)
    with contextlib.suppress(OSError):
        folder.rmdir()
    return place


def files_of(folder: Path, *, parts: bool = False) -> list[str]:
    """Return the files of a folder, relative to it, without manifests, locks and unfinished writes.

    Args:
        folder: The folder.
        parts: With the files of its parts.
    """
    names = []
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = [
            name
            for name in folders
            if name not in links and not name.startswith(SCRATCH) and (parts or not is_sealed(Path(place) / name))
        ]
        for name in (*files, *links):
            if name not in (MANIFEST, *_LOCKS) and not UNFINISHED.fullmatch(name):
                names.append((inside / name).as_posix())
    return sorted(names)


def _parts(folder: Path) -> list[str]:
    """Return the outermost folders inside a folder that have manifests of their own."""
    parts = []
    for place, folders, _ in os.walk(folder):
        found = [name for name in folders if is_sealed(Path(place) / name)]
        folders[:] = [name for name in folders if name not in found]
        parts += [(Path(place) / name).relative_to(folder).as_posix() for name in found]
    return sorted(parts)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
