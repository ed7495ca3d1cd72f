"""Local directories for hub ids: cached snapshots, downloads, or header folders for `plan`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from workbench.bricks.header_folders import (
    Download,
    Repository,
    header_folder,
    known_header_folder,
    small_file,
    snapshot_with,
    space_problems,
)
from workbench.ground import jsondoc, yamldoc
from workbench.ground.errors import WorkbenchError, size
from workbench.ground.events import Events, no_events
from workbench.ground.files import read_json
from workbench.ground.foreign_names import ADAPTER, ADAPTER_WEIGHTS, CARD, INDEX, MODULES, SINGLE, convert_command
from workbench.models.sentences import modules_in

# Files to download besides the weights. Large extras (pickles, GGUF, ONNX, original/, consolidated*) match none of these.
_SMALL = (
    "config.json", "generation_config.json", ADAPTER, INDEX, "edit.json", "facts.jsonl", CARD, "README.md", "tokenizer*", "vocab*", "merges.txt",
    "modules.json", "*sentence_*.json", "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*", "*.jinja", "*preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_SMALL_SUFFIXES = frozenset({".json", ".jsonl", ".yaml", ".md", ".txt", ".model", ".jinja"})
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Hub:
    """Resolver of hub ids to local directories."""

    headers_only: bool = False
    events: Events = no_events

    def directory(self, name: str, revision: str | None, what: str, project: Path) -> tuple[Path, str]:
        """Return a directory with the files of a repository, and its commit.

        A snapshot in the hub's cache is reused if it has every file or, when the hub cannot be reached, if it has the weights.

        Args:
            name: Repository id, "org/name".
            revision: Branch, tag or commit; None is the default branch.
            what: Name of the model in error messages, such as "base" or "brick 'math'".
            project: Project whose cache holds header folders.

        Raises:
            WorkbenchError: If the repository is gated or missing, has no such revision or no safetensors files, or if the hub
                cannot be reached and the repository is not cached.
        """
        with _readable_errors(name, revision, what):
            try:
                repository = _query(name, revision)
            except transport() as error:
                if type(error).__name__ == "RevisionNotFoundError":
                    raise
                if (cached := _cached(name, revision)) is not None:
                    return cached, cached.name
                if self.headers_only and (existing := known_header_folder(name, revision, project)) is not None:
                    return existing, existing.name.rpartition("@")[2]
                raise
            small, weights = _required_files(repository, what)
            snapshot = snapshot_with(name, repository.commit, weights[0])
            if snapshot is not None and all((snapshot / file).is_file() for file in (*small, *weights)):
                return snapshot, repository.commit
            if self.headers_only:
                return header_folder(repository, revision, small, weights, project), repository.commit
            return self._download(repository, revision, small, weights)

    def _download(self, repository: Repository, revision: str | None, small: list[str], weights: list[str]) -> tuple[Path, str]:
        from huggingface_hub import hf_hub_download, snapshot_download

        total, done = sum(repository.sizes[file] for file in weights), 0
        text = f"{repository.name}@{repository.commit[:10]}, {size(total)}"
        self.events({"stage": "fetch", "text": text})
        for file in weights:
            hf_hub_download(repository.name, file, revision=repository.commit)
            done += repository.sizes[file]
            self.events({"stage": "fetch", "text": text, "done": done, "total": total})
        # Downloads the other files and records the revision's commit in the cache, so that the revision is found offline.
        path = Path(snapshot_download(repository.name, revision=revision, allow_patterns=[*small, *weights]))
        if path.name != repository.commit:
            raise WorkbenchError(
                f"{repository.name}: {revision or 'its default branch'} changed during the download",
                f"Run the command again, or pin a commit: {repository.name}@{repository.commit}.",
            )
        return path, repository.commit

    def check_space(self, downloads: Iterable[Download]) -> None:
        """Check that the disk of the hub's cache has room for downloads."""
        if problems := space_problems(downloads):
            raise WorkbenchError(
                problems[0], "Free space there (`hf cache ls`, `hf cache rm`), or set HF_HOME to a folder on another disk."
            )


FETCH = Hub()
HEADERS = Hub(headers_only=True)


_repositories: dict[tuple[str, str, str | None], Repository] = {}


def _query(name: str, revision: str | None) -> Repository:
    """Query the commit and files of a repository, once per process so that all configurations use the same commit."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url

    key = (constants.ENDPOINT, name, revision)
    if key not in _repositories:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        commit = str(info.sha)
        if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
            raise WorkbenchError(f"{name}: expected a commit hash from the hub, got {commit[:64]!r}", None)
        sizes = {}
        for file in info.siblings or ():
            if _plain(file.rfilename) and (file.size is not None or file.rfilename.endswith((".safetensors", *_SMALL_SUFFIXES))):
                size = (
                    file.size
                    if file.size is not None
                    else get_hf_file_metadata(hf_hub_url(name, file.rfilename, revision=commit)).size
                )
                sizes[file.rfilename] = size or 0
        _repositories[key] = Repository(name, commit, sizes)
    return _repositories[key]


def _plain(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts


def _required_files(repository: Repository, what: str) -> tuple[list[str], list[str]]:
    """Return the small files and the weights to download; raise WorkbenchError if there are no safetensors files."""
    folder = ""
    if CARD in repository.sizes:
        files = str(_data(yamldoc.load(small_file(repository, CARD))).get("files", "."))
        if not _plain(files):
            raise WorkbenchError(f"{what}: {CARD} of {repository.name} points outside its repository (files: {files})", None)
        folder = "" if PurePosixPath(files) == PurePosixPath(".") else f"{PurePosixPath(files)}/"
    modules = [inner for _, inner in modules_in(small_file(repository, MODULES).parent)] if MODULES in repository.sizes else []
    folder = f"{modules[0]}/" if modules and modules[0] else folder
    beside = tuple(f"{inner}/" for inner in modules[1:] if inner)
    small = [f for f in repository.sizes if _is_small(f, "") or (folder and _is_small(f, folder)) or f.startswith(beside)]
    weights = [folder + ADAPTER_WEIGHTS] if folder + ADAPTER in repository.sizes else []
    if folder + SINGLE in repository.sizes:  # preferred over shards, as in transformers
        weights.append(folder + SINGLE)
    elif folder + INDEX in repository.sizes:
        shards = jsondoc.optional(small_file(repository, folder + INDEX), what).get("weight_map")
        weights += sorted({folder + str(f) for f in shards.values()}) if isinstance(shards, dict) else []
    weights = [file for file in weights if file in repository.sizes]
    if not weights:
        raise _no_weights(repository, folder, what)
    return small, weights


def _data(document: yamldoc.Document) -> dict[str, object]:
    return document.data if isinstance(document.data, dict) else {}


def _is_small(file: str, folder: str) -> bool:
    name = file.removeprefix(folder)
    return (
        file.startswith(folder)
        and "/" not in name
        and PurePosixPath(name).suffix in _SMALL_SUFFIXES
        and any(fnmatch(name, pattern) for pattern in _SMALL)
    )


def _no_weights(repository: Repository, folder: str, what: str) -> WorkbenchError:
    files = [file.removeprefix(folder) for file in repository.sizes if file.startswith(folder)]
    pickles = sorted(file for file in files if any(fnmatch(file, pattern) for pattern in _PICKLES))
    adapter = ADAPTER in files
    expected = ADAPTER_WEIGHTS if adapter else SINGLE
    if INDEX in files:
        return WorkbenchError(
            f"{what}: {INDEX} of {repository.name} lists no file that the repository holds",
            "Use another revision: NAME@REVISION.",
        )
    if pickles:
        convert = (
            "Save it again with PEFT, model.save_pretrained(DIR, safe_serialization=True), and use DIR."
            if adapter
            else f"Use a revision with safetensors ({repository.name}@refs/pr/N, if there is such a pull request), or convert it: "
            f"{convert_command(Path(repository.name))}  "
            "(this opens the pickle: only do so for files that you trust)"
        )
        return WorkbenchError(
            f"{what}: {repository.name} has pickle files only ({', '.join(pickles[:3])}), which are never opened; expected {expected}",
            convert,
        )
    if packed := sorted(file for file in files if file.endswith(".gguf")):
        return WorkbenchError(
            f"{what}: {repository.name} has GGUF files only ({', '.join(packed[:3])}), which are read from local files",
            f"hf download {repository.name} {folder}{packed[0]} --local-dir DIR, and use DIR/{folder}{packed[0]}.",
        )
    listed = ", ".join(sorted(files)[:5]) or "nothing"
    return WorkbenchError(
        f"{what}: {repository.name} holds neither {ADAPTER_WEIGHTS} nor a checkpoint ({SINGLE}, {INDEX}); it holds {listed}",
        "Expected a PEFT adapter or a Hugging Face checkpoint in safetensors.",
    )


def _cached(name: str, revision: str | None) -> Path | None:
    """Return a cached snapshot that has its weights, or that has only pickles, which the reader then reports."""
    snapshot = next(filter(None, (snapshot_with(name, revision, f) for f in ("config.json", ADAPTER, CARD))), None)
    if snapshot is None:
        return None
    folder = snapshot
    if (snapshot / CARD).is_file():
        folder = snapshot / str(_data(yamldoc.load(snapshot / CARD)).get("files", "."))
    index = None if (folder / SINGLE).is_file() else read_json(folder / INDEX)
    if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
        return snapshot if all((folder / str(file)).is_file() for file in index["weight_map"].values()) else None
    has_weights = any((folder / file).is_file() for file in (SINGLE, ADAPTER_WEIGHTS))
    return snapshot if has_weights or any(list(folder.glob(pattern)) for pattern in _PICKLES) else None


def revisions(name: str, what: str) -> list[tuple[str, str]]:
    """Return names of a repository's revisions and what selects each: branches, tags, and commits by their first line.

    Where the hub cannot be reached, these are the revisions in its cache.

    Args:
        name: Repository id.
        what: Name of the model in error messages.

    Raises:
        WorkbenchError: As `Hub.directory`.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    with _readable_errors(name, None, what):
        try:
            refs = HfApi().list_repo_refs(name)
            commits = [(commit.title, commit.commit_id) for commit in HfApi().list_repo_commits(name)]
            return [*((ref.name, ref.name) for ref in (*refs.branches, *refs.tags)), *commits]
        except transport():
            kept = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "refs"
            cached = [file.relative_to(kept).as_posix() for file in kept.rglob("*") if file.is_file()]
            if not cached:
                raise
            return [(one, one) for one in cached]


def transport() -> tuple[type[BaseException], ...]:
    """Return the exceptions of requests and downloads; the HTTP client's base error depends on huggingface_hub's version."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


@contextmanager
def _readable_errors(name: str, revision: str | None, what: str) -> Iterator[None]:
    """Convert errors of the hub to WorkbenchError with a hint, without their texts, which hold addresses and identifiers."""
    from huggingface_hub import constants, errors

    shown = f"{name}@{revision}" if revision else name
    try:
        yield
    except errors.GatedRepoError:
        raise WorkbenchError(
            f"{what}: {name} is gated", f"Accept its license at {constants.ENDPOINT}/{name}, then run `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        short = "Use all 40 digits of a commit. " if re.fullmatch(r"[0-9a-f]{4,39}", revision or "") else ""
        raise WorkbenchError(
            f"{what}: {name} has no revision '{revision}'",
            f"{short}See {constants.ENDPOINT}/{name}/commits/main for branches, tags and commits.",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise WorkbenchError(
            f"{what}: no such directory or hub repository: {name}",
            "Check the spelling. For a private repository, run `hf auth login`.",
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise WorkbenchError(f"{what}: {shown} lacks a file that it lists", "Use another revision: NAME@REVISION.") from None
    except transport() as error:
        from workbench.ground.http import DISK

        if isinstance(error, OSError) and error.errno in DISK:
            raise WorkbenchError(
                f"{what}: {shown} cannot be stored: {error.strerror}", "Set HF_HOME to a folder on another disk."
            ) from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise WorkbenchError(
            f"{what}: {shown} is neither a local directory nor complete in the hub cache, and the hub cannot be reached "
            f"({type(error).__name__}{f', status {status}' if status else ''})",
            "Use a local directory, or run the command once with network access and without HF_HUB_OFFLINE.",
        ) from None
