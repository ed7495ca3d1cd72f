"""Verification of a finished run: its files are those that run.json records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench import jsondoc
from workbench.adapters.read import CONFIG as ADAPTER_CONFIG
from workbench.adapters.read import WEIGHTS as ADAPTER_WEIGHTS
from workbench.errors import GateFailedError, WorkbenchError, shell
from workbench.files import json_digest
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import tensor_digests, weights_digest
from workbench.weights.header import read_header

if TYPE_CHECKING:
    from workbench.run.directory import RunDirectory
    from workbench.weights.header import Entry


@dataclass(frozen=True)
class Verified:
    """What was compared with a run's record.

    Attributes:
        tensors: Number of tensors.
        beside: "memory" or "router", if the result has one; it was compared too.
    """

    tensors: int
    beside: str | None


def require_done(run: RunDirectory) -> None:
    """Check that a run has finished.

    Raises:
        WorkbenchError: If it has not, or its record lists no tensors.
    """
    if not run.done:
        raise WorkbenchError(
            f"{run.name}: status {run.record.get('status', 'damaged')}, nothing to verify", "Run its recipe again to resume it."
        )
    if _expected(run) is None:
        raise WorkbenchError(f"{run.name}: its record lists no tensors, so nothing can be verified", "Run its recipe again.")


def verify_run(run: RunDirectory) -> Verified:
    """Compare the configuration and every tensor of a run's result, its memory and its router with the record.

    Raises:
        WorkbenchError: If the run is not finished, or a file cannot be read.
        GateFailedError: If something differs.
    """
    require_done(run)
    again = f"workbench runs rm {shell(run.name)}, then run the recipe again."
    output, expected = run.record["output"], _expected(run) or {}
    entries, config = _entries(run, expected)
    actual = tensor_digests(entries)
    if output.get("memory"):
        _verify_memory(run, output["memory"], again)
    if output.get("router"):
        _verify_router(run, output["router"], again)
    bad = [n for n in expected if actual.get(n) != expected[n]] + [n for n in actual if n not in expected]
    if bad:
        raise GateFailedError(f"{run.name}: {len(bad)} of {len(expected)} tensors differ from the record, first {bad[0]}", again)
    if config is not None and _digest(run, entries, actual, config) != output["digest"]:
        name = ADAPTER_CONFIG if run.adapter.is_dir() else "config.json"
        raise GateFailedError(f"{run.name}: {name} differs from the record", again)
    return Verified(len(expected), next((kind for kind in ("memory", "router") if output.get(kind)), None))


def _expected(run: RunDirectory) -> dict[str, Any] | None:
    """Return tensor -> digest in a run's record; None if the record has none."""
    return (run.record.get("output") or {}).get("digests" if run.adapter.is_dir() else "tensors")


def _entries(run: RunDirectory, expected: Mapping[str, Any]) -> tuple[Mapping[str, Entry], dict[str, Any] | None]:
    """Return the tensors of a run's files, and the configuration beside them; none if the result refers to its base."""
    if run.adapter.is_dir():
        return read_header(run.adapter / ADAPTER_WEIGHTS), dict(jsondoc.read_object(run.adapter / ADAPTER_CONFIG))
    if not expected:  # a memory or a router on the base as it is holds no tensors
        return {}, None
    checkpoint = Checkpoint(run.configuration / "model" if run.configuration.is_dir() else run.model, run.name)
    return checkpoint.entries, checkpoint.config


def _digest(run: RunDirectory, entries: Mapping[str, Entry], actual: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Return the digest of a result's files as the record has it."""
    if run.adapter.is_dir():
        return json_digest([dict(actual), {**config, "base_model_name_or_path": ""}])
    digest = weights_digest({name: entry.spec for name, entry in entries.items()}, dict(actual), dict(config))
    output = run.record["output"]
    beside = [output[kind] for kind in ("memory", "router") if output.get(kind)]
    return json_digest([digest, *beside]) if beside else digest


def _verify_memory(run: RunDirectory, digest: str, again: str) -> None:
    """Compare the memory, at the version that the run wrote, with the record."""
    from workbench.run.memories import SavedMemory

    if SavedMemory(run.configuration / "memory").digest(1) != digest:
        raise GateFailedError(f"{run.name}: the memory's first version differs from the record", again)


def _verify_router(run: RunDirectory, digest: str, again: str) -> None:
    """Compare the router and its bricks with the record."""
    from workbench.run.routers import SavedRouter

    try:
        saved = SavedRouter(run.configuration)
        actual = saved.router and saved.at().digest
    except WorkbenchError as error:
        raise GateFailedError(f"{run.name}: {error.message}", again) from None
    if actual != digest:
        raise GateFailedError(f"{run.name}: the router differs from the record", again)
