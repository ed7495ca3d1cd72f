"""Tables of pages as CSV and LaTeX: packed into the page for its buttons, and as files, which replace only files of an earlier call."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.files import bytes_digest, file_digest, gunzip, read_json, write_bytes, write_json
from workbench.ground.tables import Table

PLACE = '<script type="text/plain" id="download-data"></script>'
"""Element of the templates that takes the packed tables."""
LONGEST = 80
RECORD = ".workbench-report.json"
"""File in a folder of tables that has the digests of the files written there."""


def check_folders(folders: Mapping[str, Path | None]) -> None:
    """Refuse folders that cannot be written, before any work.

    Args:
        folders: Option -> its folder, None if the option is not given.

    Raises:
        UsageError: If one is a file, lies below a file, or may not be written.
    """
    for option, folder in folders.items():
        if folder is None:
            continue
        exists = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not exists.is_dir():
            raise UsageError(
                f"{option} {folder}: expected a folder, but {exists} is a file", f"Name another folder: {option} DIR"
            )
        if not os.access(exists, os.W_OK | os.X_OK):
            raise UsageError(f"{option} {folder}: {exists} is not writable", f"Name another folder: {option} DIR")


def with_tables(text: str, tables: Iterable[Table]) -> str:
    """Return a page with packed tables: its buttons save those whose names its table elements have as `data-name` or id."""
    packed: dict[str, dict[str, str]] = {}
    for table in tables:
        name = slug(table.name)
        while name in packed:
            name += "-2"
        packed[name] = {"csv": table.csv(), "tex": table.latex()}
    data = gzip.compress(json.dumps(packed, ensure_ascii=False, separators=(",", ":")).encode(), 9, mtime=0)
    return text.replace(PLACE, PLACE.replace("></", f">{base64.b64encode(data).decode('ascii')}</")) if packed else text


def packed_in(text: str) -> dict[str, dict[str, str]]:
    """Return the tables that are packed into a page: name -> suffix (csv, tex) -> content."""
    found = re.search(PLACE.replace("></", r">([\w+/=]+)</"), text)
    tables: dict[str, dict[str, str]] = json.loads(gunzip(base64.b64decode(found.group(1)), "the page")) if found else {}
    return tables


def slug(text: str) -> str:
    """Return a text as the name of a file: small letters, digits and hyphens, at most 80 letters."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:LONGEST].strip("-") or "unnamed"


def save(pages: Sequence[Path], folders: Mapping[str, Path | None]) -> list[Path]:
    """Write the tables of pages into folders, and return the files.

    The first page's files have plain names, those of the other pages begin with the page's name.

    Args:
        pages: HTML files that `render` wrote.
        folders: Suffix (csv, tex) -> its folder, None for none.

    Raises:
        WorkbenchError: If a file exists that no earlier call wrote, or that was changed since. Nothing is written then.
    """
    wanted: dict[Path, bytes] = {}
    for i, page in enumerate(pages):
        for name, files in packed_in(page.read_text("utf-8")).items():
            for suffix, folder in folders.items():
                if folder is not None:
                    wanted[folder / f"{f'{page.stem}-' if i else ''}{name}.{suffix}"] = files[suffix].encode()
    records = {folder: _record(folder) for folder in {path.parent for path in wanted}}
    foreign = [p for p, data in wanted.items() if p.exists() and not _own(p, data, records[p.parent])]
    if foreign:
        shown = ", ".join(str(p) for p in foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise WorkbenchError(
            f"{shown}: the file exists, and was not written by this command or was changed since; nothing was overwritten",
            "Move the files away, or name another folder.",
        )
    for path, data in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
        records[path.parent][path.name] = bytes_digest(data)
        write_json(path.parent / RECORD, {"files": records[path.parent]}, indent=1)
    return list(wanted)


def _record(folder: Path) -> dict[str, str]:
    """Return the digests of the files that earlier calls wrote, by name; none if the record is missing or damaged."""
    found = (read_json(folder / RECORD, files=dict) or {}).get("files", {})
    return {name: digest for name, digest in found.items() if isinstance(digest, str)}


def _own(path: Path, data: bytes, record: Mapping[str, str]) -> bool:
    """Return True if a file may be replaced: an earlier call wrote it as it is, or its content stays."""
    if not path.is_file():
        return False
    digest = file_digest(path)
    return digest in (record.get(path.name), bytes_digest(data))
