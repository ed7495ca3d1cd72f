"""`push`: the result of a finished run as the files of a hub repository, with its card and its license."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import jsondoc, yamldoc
from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.bricks.upload import HUB_ID
from workbench.errors import UsageError, WorkbenchError
from workbench.files import read_json
from workbench.manifest import files_of
from workbench.models.identity import identity, tokenizer_digest
from workbench.project import cache_of, find_project
from workbench.resolve.findings import is_restricted, is_unknown
from workbench.results import Part, Result
from workbench.run.directory import RECORD, RunDirectory
from workbench.run.execute import verify_run
from workbench.run.materialize import known_digest
from workbench.run.opened import CONFIGURATION, MODEL
from workbench.run.record import RunRecord
from workbench.scores.documents import read_document
from workbench.scores.store import Scores

CARD = "README.md"
# Identifiers of licenses that the hub knows and that models often have; other names go into `license_name`.
_HUB_LICENCES = frozenset({
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl",
    "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "isc", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "lppl-1.3c", "ms-pl",
    "apple-ascl", "mpl-2.0", "odc-by", "odbl", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl",
    "other",
})  # fmt: skip


class PushedFile(Part):
    """A file that `push` sends."""

    path: str
    """Path in the repository."""
    bytes: int
    """Size in bytes."""


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
    def refers_to_base(self) -> bool:
        """True if the files load only beside the base, whose weights they do not hold."""
        return self.form == "adapter" or (self.form == "configuration" and not (self.run.configuration / MODEL).is_dir())

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
    """Return the files to send. Files that name a directory of this machine are sent without it.

    Args:
        packed: The verified files.
        card: Text of README.md.
        licence: License that its header states.
        base: Hub id of the base, for files that name a directory; None keeps the directory's name.

    Returns:
        Path in the repository -> file, or its content where it differs from the file.

    Raises:
        UsageError: If `base` is not a hub id.
    """
    if base is not None and not HUB_ID.fullmatch(base.partition("@")[0]):
        raise UsageError(f"--base {base}: expected the hub id of the base, ORG/NAME")
    sent: dict[str, Path | bytes] = dict(packed.files)
    named: dict[str, object] = {"license": "other", "license_name": licence}
    if licence.lower() in _HUB_LICENCES:
        named = {"license": licence.lower(), "license_name": None}
    sent[CARD] = with_header(card, {**_relations(packed.record, base), **named}).encode()
    local = packed.local_base
    for path, file in packed.files.items():
        if Path(path).name == ADAPTER_CONFIG and base is not None and local is not None:
            sent[path] = _changed(file, base_model_name_or_path=base)
        elif path == CONFIGURATION:
            record = jsondoc.read_object(file)
            known = record["base"]
            name = base if base is not None and local is not None else known["id"]
            # `path` is a directory of this machine; a name in its place is looked up on the hub.
            sent[path] = _changed(file, base={**known, "id": name, "path": name})
    return sent


def _changed(file: Path, **fields: Any) -> bytes:
    return (json.dumps({**jsondoc.read_object(file), **fields}, indent=2, ensure_ascii=False) + "\n").encode()


def _relations(record: RunRecord, base: str | None) -> dict[str, object]:
    """Return `base_model` of the card: the hub ids among the inputs, because the hub refuses other names; None without any."""
    known = record.inputs.base
    refs = (record.recipe or {}).get("bricks")
    ids = [known.id if known.revision else base]
    ids += [
        _target(refs.get(name) if isinstance(refs, Mapping) else None)
        for name, brick in (record.inputs.bricks or {}).items()
        if brick.revision
    ]
    hub = [name.partition("@")[0] for name in ids if name]
    return {"base_model": list(dict.fromkeys(hub)) or None, **({} if hub else {"base_model_relation": None})}


def _target(ref: Any) -> str | None:
    """Return the directory or hub id that a recipe's brick names."""
    if isinstance(ref, Mapping):
        return next((str(ref[key]) for key in ("adapter", "checkpoint", "brick", "path") if ref.get(key)), None)
    return str(ref) if ref else None


def with_header(text: str, fields: Mapping[str, object]) -> str:
    """Return a card with fields of its YAML header set, or left out where the value is None; the rest is unchanged."""
    match = re.match(r"---[ \t]*\n(.*?\n)---[ \t]*\n", text, re.DOTALL)
    header, rest = (match[1], text[match.end() :]) if match else ("", text)
    for name, value in fields.items():
        header = re.sub(rf"^{re.escape(name)}:.*\n(?:[ \t-].*\n|\n)*", "", header, flags=re.MULTILINE)
        if value is not None:
            header += yamldoc.dump({name: value})
    return f"---\n{header}---\n{rest}"


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
