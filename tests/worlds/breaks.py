"""Identities that are broken on purpose, each in one function of the package: what `run/test_identity_under_change.py` must find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from workbench.adapters.flavours import meaning
from workbench.evaluate.lineup import LineupEntry
from workbench.ground.files import read_json, read_memo
from workbench.ground.identity import FileIdentity
from workbench.models.identity import identity
from workbench.scores import task_code
from workbench.scores.plan import ScorePlan
from workbench.scores.store import ScoreStore
from workbench.weights.digests import meaning_of
from workbench.weights.header import Entry


def _nothing(*_: object, **__: object) -> None:
    """No digest at all."""


def _without(field: str) -> Any:
    """The meaning of an adapter's configuration without one field."""
    return lambda config: {key: value for key, value in meaning(config).items() if key != field}


def _of_link(group: Mapping[str, Entry]) -> list[Any]:
    """The identity of a file as that of the link that leads to it."""
    file = next(iter(group.values())).file
    found = file.lstat()
    return [str(file), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, sorted(group)]


def _without_links(
    path: Path, source: Any, code: Any, reads: task_code.Reads, files: Any, remember: Any = task_code.remember
) -> None:
    """A memo of a task that knows files, and not the links to them."""
    remember(path, source, code, replace(reads, links=frozenset()), files)


def _unchecked(path: Path) -> dict[str, Any] | None:
    """A memo whatever its digest says."""
    memo = read_json(path)
    return memo and {key: value for key, value in memo.items() if key != "xxh3"}


def _of_any_version(path: Path) -> dict[str, Any] | None:
    """A memo whose version is always the newest."""
    memo = read_memo(path)
    return memo and {**memo, "format": task_code.FORMAT}


def _of_any_libraries(cache: Path, key: str, device: torch.device | None = None) -> str | None:
    """The digest of a configuration whatever computed it."""
    rows = [row for row in (read_json(cache / "configurations" / f"{key}.json") or {}).values() if isinstance(row, dict)]
    return str(rows[0]["digest"]) if rows and "digest" in rows[0] else None


def _of_any_format(store: ScoreStore, plan: ScorePlan, key: str) -> bool:
    """Whether there are scores, of any version."""
    return (store.folder(plan.suite.suite, plan.digest) / f"{key[:12]}.json").is_file()


def _without_generation(entry: LineupEntry, digest: str) -> str:
    """The identity of a configuration without the settings of generated texts."""
    return identity(digest, {}, entry.tokenizer)


def _times(found: FileIdentity) -> list[int]:
    """The identity of a file without ctime, which nobody can set."""
    return [found.system, found.inode, found.size, found.mtime_ns]


def _is_there(folder: Path, record: str, **_: object) -> bool:
    """Whether a cached result has its record."""
    return (folder / record).is_file()


def _classless(config: Mapping[str, object]) -> dict[str, object]:
    """What a model computes without its class."""
    return {key: value for key, value in meaning_of(config).items() if key not in ("architectures", "auto_map")}


BREAKS: dict[str, tuple[str, Any]] = {
    "a file's mtime stands for its content": ("workbench.ground.identity.FileIdentity.storable", property(_times)),
    "a seal is not compared": ("workbench.ground.manifest._harm", lambda folder, digests: []),
    "the key of a step has no tokenizer": ("workbench.resolve.keys.StepKey.tokens", _nothing),
    "the key of a step has no facts": ("workbench.resolve.keys.StepKey.files", lambda key, names: []),
    "a small file's size stands for its content": ("workbench.resolve.resolved.bytes_digest", lambda data: str(len(data))),
    "a tensor's size stands for its content": ("workbench.weights.digests._bytes_digest", lambda entry: str(entry.nbytes)),
    "the key of a run has no files that are copied": (
        "workbench.resolve.resolved.Resolved._beside_weights",
        property(lambda resolved: []),
    ),
    "the digest of a model has no config": ("workbench.weights.digests.meaning_of", lambda config: {}),
    "the digest of an adapter has no meaning": ("workbench.adapters.read.meaning", lambda config: {}),
    "the version of scores is ignored": ("workbench.scores.store.ScoreStore.has", _of_any_format),
    "the libraries of a digest are ignored": ("workbench.run.materialize.known_digest", _of_any_libraries),
    "the version of a memo is ignored": ("workbench.scores.task_code.read_memo", _of_any_version),
    "the key of scores has no tokenizer": ("workbench.evaluate.lineup.LineupEntry.tokenizer", property(lambda entry: "")),
    "the digest of a model has no class": ("workbench.weights.digests.meaning_of", _classless),
    "the name of a run that was stopped has no inputs": (
        "workbench.resolve.resolved.Resolved.stamp",
        property(lambda resolved: resolved.recipe.name),
    ),
    "the key of a suite of facts has no base": ("workbench.evaluate.facts.suite._identity", lambda base: []),
    "the key of scores has no generation settings": ("workbench.evaluate.lineup.LineupEntry._identity", _without_generation),
    "the digest of an adapter has no alpha_pattern": ("workbench.adapters.read.meaning", _without("alpha_pattern")),
    "the key of scores has no chat template": ("workbench.models.identity.template_digest", _nothing),
    "links of a task are not followed": ("workbench.evaluate.tasks.remember", _without_links),
    "a link stands for its target": ("workbench.weights.digests._identity", _of_link),
    "the key of a step has no chat template": ("workbench.resolve.keys.template_digest", _nothing),
    "the digest of an adapter has no lora_alpha": ("workbench.adapters.read.meaning", _without("lora_alpha")),
    "the digest of an adapter has no use_rslora": ("workbench.adapters.read.meaning", _without("use_rslora")),
    "the seal of a cached edit is not compared": ("workbench.run.kinds.edit.reusable", _is_there),
    "the digest of a memo is ignored": ("workbench.weights.digests.read_memo", _unchecked),
    "the key of a task has no code": ("workbench.evaluate.tasks.content", lambda files: []),
}
"""What is broken -> the function, and what stands in its place."""
