"""Uploads to the hub: the files of a result as one commit of a repository, through huggingface_hub.

Large files are sent before the commit, one after the other. The hub keeps what has arrived, so a second call after an interruption
sends only what is missing.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from workbench.bricks.hub import transport
from workbench.ground.errors import UsageError, WorkbenchError, printable, size
from workbench.ground.events import Events, no_events

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_NO_BRANCH = re.compile(r"^[-/.]|[\x00-\x20~^:?*\[\\\x7f]|\.\.|@\{|//|[/.]$|\.lock$|^$")  # as `git check-ref-format --branch`
# Files that loaders look for. One of another model that stays in the repository could be loaded in the place of the new ones.
_LOADED = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*config.json",
    "configuration.json", "routing.json", "tokenizer*", "chat_template*", "special_tokens_map.json", "vocab.*", "merges.txt",
)  # fmt: skip
_ALONE = 1 << 15  # bytes from which a file is sent by itself, with progress
_AGAIN = "Run the same command again: files that have arrived are not sent again."
_LOGIN = "Run `hf auth login` with a token that may write (https://huggingface.co/settings/tokens), or set HF_TOKEN."


@dataclass(frozen=True)
class Target:
    """The repository that files are sent to.

    Attributes:
        repository: Its id, "org/name".
        revision: Branch, which is created if it does not exist; None is the default branch.
        private: Create the repository as a private one.
        replace: Delete model files of the repository that are not sent, in the same commit.
    """

    repository: str
    revision: str | None = None
    private: bool = False
    replace: bool = False

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        if self.revision is not None and _NO_BRANCH.search(self.revision):
            raise UsageError(f"--revision {self.revision!r}: expected the name of a branch", "Example: --revision trial-2")
        try:
            validate_repo_id(self.repository)
            valid = HUB_ID.fullmatch(self.repository) is not None
        except HFValidationError:
            valid = False
        if not valid:
            raise UsageError(
                f"'{self.repository}': expected the id of a repository, ORG/NAME",
                "ORG is your user name on the hub or one of your organizations; NAME has letters, digits, '-', '_' and '.'.",
            )


@dataclass(frozen=True)
class Sent:
    """The result of an upload.

    Attributes:
        url: Address of the repository.
        commit: The commit that holds the files.
        changed: False if the repository had all files before.
        deleted: Files that the commit deletes.
        warnings: Warnings of the hub about the metadata of README.md.
    """

    url: str
    commit: str
    changed: bool
    deleted: tuple[str, ...]
    warnings: tuple[str, ...]


def check_reachable() -> None:
    """Check, without a request, that uploads are possible.

    Raises:
        WorkbenchError: If HF_HUB_OFFLINE is set, or there is no token.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise WorkbenchError(
            "HF_HUB_OFFLINE is set, so nothing can be sent to the hub",
            "Unset it (HF_HUB_OFFLINE=0 workbench push …), or use --dry-run to see what would be sent.",
        )
    if get_token() is None:
        raise WorkbenchError("there is no token of the hub, so nothing can be sent", _LOGIN)


def upload(files: Mapping[str, Path | bytes], target: Target, message: str, events: Events = no_events) -> Sent:
    """Send files to a repository as one commit, and check that the commit holds them.

    Raises:
        WorkbenchError: If the hub cannot be reached, refuses the token, the repository or the metadata of README.md, if an existing
            repository is public although a private one is asked for, or if it has model files that are not replaced.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    check_reachable()
    api, name = HfApi(), target.repository
    with _readable_errors(target), _quiet():
        _check_token(api)
        url = str(api.create_repo(name, private=target.private or None, exist_ok=True))
        info = api.model_info(name)
        if target.private and info.private is False:
            raise WorkbenchError(
                f"{name} exists and is public, but --private asks for a private repository; nothing was sent",
                f"Make it private in its settings ({url}/settings), or name another repository.",
            )
        if target.revision:
            api.create_branch(name, branch=target.revision, exist_ok=True)
            info = api.model_info(name, revision=target.revision)
        stale = _stale([sibling.rfilename for sibling in info.siblings or ()], files, target)
        operations = _send(api, files, target, events)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            commit = api.create_commit(
                name,
                [*operations, *(CommitOperationDelete(path) for path in stale)],
                commit_message=message,
                revision=target.revision,
            )
        _check_commit(api, name, commit.oid, operations)
    return Sent(url, commit.oid, commit.oid != info.sha, tuple(stale), tuple(printable(str(one.message)) for one in warned))


def _check_token(api: Any) -> None:
    """Check the token with one request, because other requests answer a wrong token as if the repository were missing."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise WorkbenchError("the hub refuses the token: it is wrong, expired or revoked", _LOGIN) from None
        raise
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise WorkbenchError("the token may only read", _LOGIN)


def _stale(present: list[str], files: Mapping[str, Path | bytes], target: Target) -> list[str]:
    """Return the model files of the repository that are not sent, which the commit deletes."""
    stale = [path for path in present if path not in files and any(fnmatch(Path(path).name, pattern) for pattern in _LOADED)]
    if stale and not target.replace:
        shown = ", ".join(stale[:4]) + (f" and {len(stale) - 4} more" if len(stale) > 4 else "")
        raise WorkbenchError(
            f"{target.repository} has files of another model: {shown}; nothing was sent",
            "Loaders could mix them with the new ones. Use --replace to delete them in the same commit, --revision NAME for a branch of "
            "its own, or another repository.",
        )
    return stale


def _send(api: Any, files: Mapping[str, Path | bytes], target: Target, events: Events) -> list[Any]:
    """Send large files, the largest first, and return the operations of the commit for all files."""
    from huggingface_hub import CommitOperationAdd

    operations = {
        path: CommitOperationAdd(path, content if isinstance(content, bytes) else str(content)) for path, content in files.items()
    }
    large = [path for path in files if operations[path].upload_info.size >= _ALONE]
    total, done = sum(operations[path].upload_info.size for path in large), 0
    for path in sorted(large, key=lambda path: -operations[path].upload_info.size):
        text = f"{target.repository}, {size(total)}"
        events({"stage": "push", "text": text, "done": done, "total": total})
        api.preupload_lfs_files(target.repository, [operations[path]], revision=target.revision, free_memory=False, num_threads=1)
        done += operations[path].upload_info.size
        events({"stage": "push", "text": text, "done": done, "total": total})
    return list(operations.values())


def _check_commit(api: Any, name: str, commit: str, operations: list[Any]) -> None:
    """Check that a commit holds every file with its size, and with its SHA-256 where both sides know it."""
    info = api.model_info(name, revision=commit, files_metadata=True)
    held = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    for operation in operations:
        path, sent = operation.path_in_repo, operation.upload_info
        sibling = held.get(path)
        digest = sibling.lfs.sha256 if sibling is not None and sibling.lfs is not None else None
        same = sibling is not None and sibling.size in (None, sent.size)
        if not same or (digest and sent.is_hashed and digest != sent.sha256.hex()):
            raise WorkbenchError(
                f"{name}: commit {commit[:10]} {'holds another' if sibling else 'lacks the'} {path}",
                "Look at the .gitignore of the repository and at other commits of the last minutes, and run the command again.",
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log of huggingface_hub, whose warnings name its own functions."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


@contextmanager
def _readable_errors(target: Target) -> Iterator[None]:
    """Convert errors of the hub to WorkbenchError with a hint, without their texts, which hold signed addresses."""
    from huggingface_hub import errors

    name = target.repository
    try:
        yield
    except errors.OfflineModeIsEnabled:
        check_reachable()
        raise
    except errors.RevisionNotFoundError:
        raise WorkbenchError(
            f"{name} has no revision '{target.revision}'", "Name a branch; tags and commits are fixed."
        ) from None
    except errors.RepositoryNotFoundError:
        raise WorkbenchError(
            f"{name}: the hub does not show this repository to the owner of the token",
            f"Check the spelling, and that the token may write to '{name.partition('/')[0]}'.",
        ) from None
    except transport() as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise WorkbenchError(
                f"{name}: the hub does not let the owner of the token write there (status {status})",
                f"Use your own user name or an organization that you may write to. {_LOGIN}",
            ) from None
        if isinstance(error, errors.BadRequestError):
            raise WorkbenchError(
                f"{name}: the hub refuses the request (status 400)", "Check the names of repository and branch."
            ) from None
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise _interrupted(name, error) from None
    except RuntimeError as error:  # raised from the error of a large file
        raise _interrupted(name, error.__cause__ or error) from None
    except ValueError as error:  # raised for README.md by `create_commit`, and for answers that are not of the protocol
        raise WorkbenchError(
            f"{name}: {printable(str(error))[:500]}", "Correct the YAML header of the run's README.md, and run the command again."
        ) from None


def _interrupted(name: str, error: BaseException) -> WorkbenchError:
    """Return the error for an upload that ended early."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"{type(error).__name__}, status {status}" if status else type(error).__name__
    return WorkbenchError(f"{name}: sending to {constants.ENDPOINT} was interrupted ({reason})", _AGAIN)
