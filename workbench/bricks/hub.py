"""Hub ids as directories: snapshots in the hub's cache, stand-ins with headers only for `plan`, downloads for the rest."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from workbench import jsondoc, yamldoc
from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.adapters.read import WEIGHTS as ADAPTER_WEIGHTS
from workbench.bricks.standins import Download, Repository, kept_stand_in, small_file, snapshot_with, space_problems, stand_in
from workbench.errors import WorkbenchError, size
from workbench.files import read_json
from workbench.weights.checkpoint import INDEX, SINGLE
from workbench.weights.foreign import convert_command

CARD = "brick.yaml"
# What is fetched beside the weights, by name; large extras (pickles, GGUF, ONNX, original/, consolidated*) match nothing here.
_SMALL = (
    "config.json", "generation_config.json", ADAPTER_CONFIG, INDEX, "edit.json", "facts.jsonl", CARD, "README.md", "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*", "*.jinja",
)  # fmt: skip
_SMALL_SUFFIXES = frozenset({".json", ".jsonl", ".yaml", ".md", ".txt", ".model", ".jinja"})
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
Events = Callable[[dict[str, Any]], None]


def _no_events(_event: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Hub:
    """How hub ids become directories.

    Attributes:
        headers_only: Be content with a stand-in where the files are not in the hub's cache: no tensor data is transferred.
        events: Told of downloads.
    """

    headers_only: bool = False
    events: Events = _no_events

    def directory(self, name: str, revision: str | None, what: str, project: Path) -> tuple[Path, str]:
        """A directory with the files of a repository, and its commit.

        A snapshot in the hub's cache that has every file is used as it is; without network, one that has its weights.

        Args:
            name: org/name.
            revision: Branch, tag or commit; None: the default branch.
            what: How errors call it: "base", "brick 'math'".
            project: Whose cache holds stand-ins.

        Errors: gated, missing, unknown revision, no safetensors, hub out of reach with nothing cached.
        """
        with _explained(name, revision, what):
            try:
                found = _ask(name, revision)
            except _transport() as error:
                if type(error).__name__ == "RevisionNotFoundError":
                    raise
                if (cached := _cached(name, revision)) is not None:
                    return cached, cached.name
                if self.headers_only and (kept := kept_stand_in(name, revision, project)) is not None:
                    return kept, kept.name.rpartition("@")[2]
                raise
            small, weights = _wanted(found, what)
            snapshot = snapshot_with(name, found.commit, weights[0])
            if snapshot is not None and all((snapshot / file).is_file() for file in (*small, *weights)):
                return snapshot, found.commit
            if self.headers_only:
                return stand_in(found, revision, small, weights, project), found.commit
            return self._fetch(found, revision, small, weights)

    def _fetch(self, found: Repository, revision: str | None, small: list[str], weights: list[str]) -> tuple[Path, str]:
        from huggingface_hub import hf_hub_download, snapshot_download

        total, done = sum(found.sizes[file] for file in weights), 0
        text = f"{found.name}@{found.commit[:10]}, {size(total)}"
        self.events({"stage": "fetch", "text": text})
        for file in weights:
            hf_hub_download(found.name, file, revision=found.commit)
            done += found.sizes[file]
            self.events({"stage": "fetch", "text": text, "done": done, "total": total})
        # Fetches what is left, and notes which commit the revision is: offline it is then found.
        path = Path(snapshot_download(found.name, revision=revision, allow_patterns=[*small, *weights]))
        if path.name != found.commit:
            raise WorkbenchError(
                f"{found.name}: {revision or 'its default branch'} changed while it was fetched",
                f"Run again, or pin a commit: {found.name}@{found.commit}.",
            )
        return path, found.commit

    def check_space(self, downloads: Iterable[Download]) -> None:
        """Refuse downloads that the disk of the hub's cache cannot hold."""
        if problems := space_problems(downloads):
            raise WorkbenchError(
                problems[0], "Free space there (`hf cache ls`, `hf cache rm`), or set HF_HOME to a folder on another disk."
            )


FETCH = Hub()
HEADERS = Hub(headers_only=True)


_asked: dict[tuple[str, str, str | None], Repository] = {}


def _ask(name: str, revision: str | None) -> Repository:
    """Commit and files of a repository. Asked once a process, so that all its configurations have one commit."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url

    key = (constants.ENDPOINT, name, revision)
    if key not in _asked:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        commit = str(info.sha)
        if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
            raise WorkbenchError(f"{name}: the hub names no commit ({commit[:64]!r})", None)
        sizes = {}
        for file in info.siblings or ():
            if _plain(file.rfilename) and (file.size is not None or file.rfilename.endswith((".safetensors", *_SMALL_SUFFIXES))):
                size = (
                    file.size
                    if file.size is not None
                    else get_hf_file_metadata(hf_hub_url(name, file.rfilename, revision=commit)).size
                )
                sizes[file.rfilename] = size or 0
        _asked[key] = Repository(name, commit, sizes)
    return _asked[key]


def _plain(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts


def _wanted(found: Repository, what: str) -> tuple[list[str], list[str]]:
    """Small files and weights that a configuration needs. Errors: no safetensors, a card that points outside its repository."""
    folder = ""
    if CARD in found.sizes:
        files = str(_data(yamldoc.load(small_file(found, CARD))).get("files", "."))
        if not _plain(files):
            raise WorkbenchError(f"{what}: {CARD} of {found.name} points outside its repository (files: {files})", None)
        folder = "" if PurePosixPath(files) == PurePosixPath(".") else f"{PurePosixPath(files)}/"
    small = [f for f in found.sizes if _is_small(f, "") or (folder and _is_small(f, folder))]
    weights = [folder + ADAPTER_WEIGHTS] if folder + ADAPTER_CONFIG in found.sizes else []
    if folder + SINGLE in found.sizes:  # as transformers and the reader prefer it
        weights.append(folder + SINGLE)
    elif folder + INDEX in found.sizes:
        shards = jsondoc.optional(small_file(found, folder + INDEX), what).get("weight_map")
        weights += sorted({folder + str(f) for f in shards.values()}) if isinstance(shards, dict) else []
    weights = [file for file in weights if file in found.sizes]
    if not weights:
        raise _no_weights(found, folder, what)
    return small, weights


def _data(document: yamldoc.Document) -> dict[str, Any]:
    return document.data if isinstance(document.data, dict) else {}


def _is_small(file: str, folder: str) -> bool:
    name = file.removeprefix(folder)
    return (
        file.startswith(folder)
        and "/" not in name
        and PurePosixPath(name).suffix in _SMALL_SUFFIXES
        and any(fnmatch(name, pattern) for pattern in _SMALL)
    )


def _no_weights(found: Repository, folder: str, what: str) -> WorkbenchError:
    here = [file.removeprefix(folder) for file in found.sizes if file.startswith(folder)]
    pickles = sorted(file for file in here if any(fnmatch(file, pattern) for pattern in _PICKLES))
    adapter = ADAPTER_CONFIG in here
    expected = ADAPTER_WEIGHTS if adapter else SINGLE
    if INDEX in here:
        return WorkbenchError(
            f"{what}: {INDEX} of {found.name} names no file that the repository holds", "Name another revision: NAME@REVISION."
        )
    if pickles:
        convert = (
            "Save it again with PEFT: model.save_pretrained(DIR, safe_serialization=True); then name DIR."
            if adapter
            else f"Take a revision with safetensors ({found.name}@refs/pr/N, if there is such a pull request), or convert it: "
            f"{convert_command(Path(found.name))}  "
            "(opens the pickle: only for files that you trust)"
        )
        return WorkbenchError(
            f"{what}: {found.name} holds pickles only ({', '.join(pickles[:3])}), which are never opened; expected {expected}",
            convert,
        )
    listed = ", ".join(sorted(here)[:5]) or "nothing"
    return WorkbenchError(
        f"{what}: {found.name} holds neither {ADAPTER_WEIGHTS} nor a checkpoint ({SINGLE}, {INDEX}); it holds {listed}",
        "Expected a PEFT adapter or a Hugging Face checkpoint in safetensors.",
    )


def _cached(name: str, revision: str | None) -> Path | None:
    """A cached snapshot that has its weights; one that never will (pickles) too, whose reader then says so."""
    snapshot = next(filter(None, (snapshot_with(name, revision, f) for f in ("config.json", ADAPTER_CONFIG, CARD))), None)
    if snapshot is None:
        return None
    folder = snapshot
    if (snapshot / CARD).is_file():
        folder = snapshot / str(_data(yamldoc.load(snapshot / CARD)).get("files", "."))
    index = None if (folder / SINGLE).is_file() else read_json(folder / INDEX)
    if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
        return snapshot if all((folder / str(file)).is_file() for file in index["weight_map"].values()) else None
    held = any((folder / file).is_file() for file in (SINGLE, ADAPTER_WEIGHTS))
    return snapshot if held or any(list(folder.glob(pattern)) for pattern in _PICKLES) else None


def _transport() -> tuple[type[BaseException], ...]:
    """What a request or a download raises; the HTTP client's own base error differs between versions of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


@contextmanager
def _explained(name: str, revision: str | None, what: str) -> Iterator[None]:
    """Errors of the hub as what a user can do about them. Their own texts are left out: they hold addresses and identifiers."""
    from huggingface_hub import constants, errors

    shown = f"{name}@{revision}" if revision else name
    try:
        yield
    except errors.GatedRepoError:
        raise WorkbenchError(
            f"{what}: {name} is gated", f"Accept its licence at {constants.ENDPOINT}/{name}, then `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        short = "A commit is named with all of its 40 digits. " if re.fullmatch(r"[0-9a-f]{4,39}", revision or "") else ""
        raise WorkbenchError(
            f"{what}: {name} has no revision '{revision}'",
            f"{short}Branches, tags and commits: {constants.ENDPOINT}/{name}/commits/main",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise WorkbenchError(
            f"{what}: no such directory or hub repository: {name}",
            "Check the spelling; for a private repository `hf auth login`.",
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise WorkbenchError(f"{what}: {shown} lacks a file that it lists", "Name another revision.") from None
    except _transport() as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise WorkbenchError(
                f"{what}: {shown} cannot be stored: {error.strerror}", "Set HF_HOME to a folder on another disk."
            ) from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise WorkbenchError(
            f"{what}: {shown} is neither a local directory nor whole in the hub cache, and the hub cannot be reached "
            f"({type(error).__name__}{f', status {status}' if status else ''})",
            "Name a local directory, or run once with network access and without HF_HUB_OFFLINE.",
        ) from None
