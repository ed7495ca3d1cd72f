"""Verification of a finished run: its files are those that it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.adapters.read import WEIGHTS as ADAPTER_WEIGHTS
from workbench.errors import GateFailedError, WorkbenchError, shell
from workbench.events import no_events
from workbench.manifest import manifest_of
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import tensor_digests
from workbench.weights.header import read_header

if TYPE_CHECKING:
    from workbench.run.directory import RunDirectory


@dataclass(frozen=True)
class Verified:
    """What was compared.

    Attributes:
        sha256: File -> its SHA-256, for a run with a manifest; all were compared.
        tensors: Number of tensors that were compared with run.json, for a run without one.
        open: Files that may change, which were not compared.
    """

    sha256: dict[str, str]
    tensors: int = 0
    open: tuple[str, ...] = ()


def verify_run(run: RunDirectory) -> Verified:
    """Compare every file of a run with its manifest; of a run that an earlier version wrote, the tensors with run.json.

    Raises:
        WorkbenchError: If the run is not finished, or nothing can be compared.
        GateFailedError: If something differs.
    """
    run.require_whole(no_events, digests=True)
    if run.sealed:
        manifest = manifest_of(run.path)
        return Verified({name: digest for name, (_, digest) in manifest.files.items()}, open=tuple(manifest.open))
    expected = run.record["output"].get("digests" if run.adapter.is_dir() else "tensors")
    if not expected:
        raise WorkbenchError(f"{run.name}: it has no manifest and its record lists no tensors", "Run its recipe again.")
    place = run.configuration / "model" if run.configuration.is_dir() else run.result
    entries = read_header(place / ADAPTER_WEIGHTS) if run.adapter.is_dir() else Checkpoint(place, run.name).entries
    actual = tensor_digests(entries)
    if bad := [n for n in expected if actual.get(n) != expected[n]] + [n for n in actual if n not in expected]:
        raise GateFailedError(
            f"{run.name}: {len(bad)} of {len(expected)} tensors differ from the record, first {bad[0]}",
            f"workbench runs rm {shell(run.name)}, then run the recipe again.",
        )
    return Verified({}, len(expected))
