"""`push`: the result of a finished run as the files of a hub repository, with its card and its license."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.files import read_json
from workbench.ground.manifest import files_of
from workbench.ground.project import cache_of, find_project
from workbench.ground.results import JsonObject, Result
from workbench.models.identity import identity, tokenizer_digest
from workbench.resolve.findings import is_restricted, is_unknown
from workbench.run.card import hub_ids, licence_fields, with_header
from workbench.run.directory import RECORD, RunDirectory
from workbench.run.execute import verify_run
from workbench.run.materialize import known_digest
from workbench.run.record import RunRecord
from workbench.scores.documents import read_document
from workbench.scores.store import Scores
from workbench.ship.outward import CARD, Outward
from workbench.ship.upload import HUB_ID


class PushedFile(JsonObject):
    """A file that `push` sends."""

    path: str
    """Path in the repository."""
    bytes: int
    """Size in bytes."""
    diff: str | None = None
    """Difference to the run's file, with `--dry-run`; null if the file is sent as it is."""


class Pushed(Result):
    """The files of a run that were sent to the hub, or would be sent."""

    run: str
    """Name of the run directory."""
    repository: str
    """Id of the repository."""
    revision: str | None
    """Branch; null for the default branch."""
    private: bool
    """This is true if a private repository was asked for."""
    license: str
    """License that the card states."""
    base: str | None
    """Hub id of the base in the card; null if the files name a directory."""
    card: str
    """Text of README.md."""
    files: list[PushedFile]
    """The files."""
    bytes: int
    """Size of all files in bytes."""
    sent: bool
    """False with `--dry-run`: nothing was sent."""
    url: str | None
    """Address of the repository; null with `--dry-run`."""
    commit: str | None
    """Commit that holds the files; null with `--dry-run`."""
    changed: bool | None
    """This is true if the repository changed, false if it had all files before, and null with `--dry-run`."""
    deleted: list[str]
    """Files that the commit deleted (`--replace`)."""


@dataclass(frozen=True)
class Package:
    """The verified files of a finished run."""

    run: RunDirectory
    form: str
    files: Mapping[str, Path]

    @property
    def record(self) -> RunRecord:
        """The run's record."""
        return self.run.read_record()

    @property
    def local_base(self) -> str | None:
        """The base, if the recipe names it by a directory; None if it comes from the hub."""
        base = self.record.inputs.base
        return None if base.revision else base.id


def package(run: RunDirectory) -> Package:
    """Verify a run against its manifest, and list the files of its result.

    Raises:
        WorkbenchError: If the run is not finished, or has no card.
        GateFailedError: If a file is not as the run wrote it.
    """
    verify_run(run)
    result = run.result
    files = {name: result / name for name in files_of(result, parts=True)}
    if CARD not in files:
        raise WorkbenchError(
            f"{run.name}: the result has no {CARD}", "Run its recipe again: the card is written with the result."
        )
    return Package(run, result.name, files)


def licence_of(record: RunRecord, stated: str | None, accepted: bool) -> str:
    """Return the license that the uploaded card states.

    Args:
        record: The run's record.
        stated: License that the user names; None if the inputs decide.
        accepted: Whether the user accepts licenses that are unknown, restricted or differ. The card then states "other".

    Raises:
        WorkbenchError: If the inputs do not decide, and the user neither names a license nor accepts theirs.
    """
    if stated is not None:
        if not re.fullmatch(r"[\w.+ -]{1,80}", stated):
            raise UsageError(f"--license {stated!r}: expected the name of a license, such as apache-2.0")
        return stated
    problems = licence_problems(record)
    if problems and not accepted:
        raise WorkbenchError(
            "; ".join(problems),
            "Name the license of the result with --license NAME, or use --yes to send it with the license 'other'; the card lists the "
            "license of every input.",
        )
    licences = set((record.licences or {}).values())
    return licences.pop() if not problems and len(licences) == 1 else "other"


def licence_problems(record: RunRecord) -> list[str]:
    """Return why the licenses of a run's inputs do not decide that of its result; empty if they do."""
    licences = record.licences
    if not licences:
        return ["the run's record states no licenses of its inputs: an earlier version wrote it"]
    named = {name if name == "base" else f"brick '{name}'": licence for name, licence in licences.items()}
    data = {f"brick '{brick}', data {name}": licence for brick, name, licence in record.data_licences or ()}
    problems = [f"{who}: unknown license ({licence})" for who, licence in {**named, **data}.items() if is_unknown(licence)]
    if problems:
        return problems
    if len(set(licences.values())) > 1:
        problems = ["the licenses of the inputs differ: " + ", ".join(f"{who} {licence}" for who, licence in named.items())]
    problems += [f"{who}: the license allows no derivatives ({licence})" for who, licence in named.items() if "-nd" in licence]
    problems += [f"{who}: restricted license ({licence})" for who, licence in data.items() if is_restricted(licence)]
    return problems


def contents(packed: Package, card: str, licence: str, base: str | None) -> dict[str, Path | bytes]:
    """Return the files to send, in which no directory of this machine is named.

    Args:
        packed: The verified files.
        card: Text of README.md.
        licence: License that its header states.
        base: Hub id of the base, if the recipe names it by a directory.

    Returns:
        Path in the repository -> file, or its content where it differs from the file.

    Raises:
        UsageError: If `base` is not a hub id.
    """
    if base is not None and not HUB_ID.fullmatch(base.partition("@")[0]):
        raise UsageError(f"--base {base}: expected the hub id of the base, ORG/NAME")
    record, project = packed.record, find_project(packed.run.path / RECORD)
    known = record.inputs.base.id.partition("@")[0] if packed.local_base is None else base
    outward = Outward(project, record.recipe or {}, packed.local_base, known)
    sent = {path: outward.sent(path, file) for path, file in packed.files.items()}
    revisions = {name: brick.revision for name, brick in (record.inputs.bricks or {}).items()}
    bases = hub_ids(known, (record.recipe or {}).get("bricks"), revisions)
    relations: dict[str, object] = {"base_model": bases} if bases else {"base_model": None, "base_model_relation": None}
    sent[CARD] = outward.text(with_header(card, {**relations, **licence_fields(licence)})).encode()
    return sent


def stored_scores(run: RunDirectory, scores: Path) -> list[Scores]:
    """Return the complete scores of a run's configuration in the score store, the newest of each suite."""
    record = run.read_record()
    weights = record.output.digest if record.output else None
    if run.adapter.is_dir():  # its record has the digest of the adapter's files; scoring has remembered that of the configuration
        weights = known_digest(cache_of(find_project(run.path / RECORD)), str(record.key))
    if weights is None:
        return []
    found: dict[str, Scores] = {}
    own = tokenizer_digest(run.model) if run.model.is_dir() else None  # other forms have the base's, which is not in the run
    for file in sorted(scores.glob("*/*.json")):
        configuration = (read_json(file, configuration=dict) or {}).get("configuration", {})
        if weights not in (configuration.get("weights"), configuration.get("digest")):
            continue
        document = read_document(file)
        tokenizer, newest = document.configuration.tokenizer or "", found.get(document.suite)
        contents = (weights, identity(weights, record.generation or {}, tokenizer))
        same = document.key in {identity(content, {}, tokenizer) for content in contents} and own in (None, tokenizer)
        if same and not document.partial and (newest is None or newest.created < document.created):
            found[document.suite] = document
    return [found[suite] for suite in sorted(found)]
