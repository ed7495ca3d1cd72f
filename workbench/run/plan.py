"""Plans of runs: steps, bytes, memory, time and problems, predicted from file headers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workbench.bricks.header_folders import space_problems
from workbench.resolve.licences import licence_warnings
from workbench.resolve.resolved import Resolved
from workbench.run.costs import TRANSFORMERS, Needs, disk_problems, factor_bytes, tokens_bytes
from workbench.run.device import runs_without_torch
from workbench.run.directory import run_of
from workbench.run.forms import form_of
from workbench.run.kind import kind_of
from workbench.run.peaks import buffer_bytes, device_buffer_bytes
from workbench.weights.device import default_threads

# Resident memory of Python with torch and the workbench, before any tensor: measured 0.25 GB on Linux.
_INTERPRETER = 250_000_000
# The same without torch: measured 0.06 GB.
_WITHOUT_TORCH = 63_000_000
# Speed of streaming merges on one core, in bytes read plus bytes written: measured 1.7e9 for task arithmetic and 1.4e9 for TIES.
_BYTES_PER_SECOND = 1.5e9


@dataclass(frozen=True)
class RunPlan:
    """Prediction of a run. `workbench plan --json` prints `document()`."""

    recipe: str
    key: str | None
    """The recipe's key; None until `run` or `eval` has read the inputs once."""
    run: str | None
    """Name of the run directory, which has a part of the key; None as long as the key is."""
    steps: list[dict[str, Any]]
    read_bytes: int
    write_bytes: int
    peak_bytes: int
    seconds: float
    cached: list[str]
    problems: list[str]
    warnings: list[str] = field(default_factory=list)
    download_bytes: int = 0
    """Bytes to download from the hub first; `seconds` does not include the download."""
    downloads: list[dict[str, Any]] = field(default_factory=list)
    """The downloads by repository: repository, commit, files and bytes."""
    checked_at_run: list[str] = field(default_factory=list)
    """Checks that need more than headers. `run` makes them before the first step, and warns or stops if one fails."""
    device_bytes: int = 0
    """Peak memory of the CUDA device, if the run is planned for one; `peak_bytes` is then the host's memory."""

    def document(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self)


def plan(resolved: Resolved, runs: Path, threads: int | None = None, *, cuda: bool = False) -> RunPlan:
    """Predict steps, bytes, memory and time of a run from file headers. Edits need not be solved for this.

    Args:
        resolved: The recipe.
        runs: Folder of run directories.
        threads: Number of tensors computed at the same time; if None, the default of `run`.
        cuda: Plan a run on a CUDA device, which then holds buffers, whole tensors and live models; the host holds staged blocks.
    """
    run = run_of(resolved, runs)
    threads = threads or default_threads()
    needs = Needs(sum(s.nbytes for s in resolved.base.weights.specs.values()), threads)
    model = resolved.base
    steps: list[dict[str, Any]] = []
    for i, (step, step_id) in enumerate(zip(resolved.recipe.steps, resolved.recipe.step_ids, strict=True)):
        row: dict[str, Any] = {"id": step_id, step.verb: step.name}
        made, model = kind_of(step).plan_row(step, resolved, i, model, needs)
        row |= made
        steps.append(row)
    form = form_of(resolved)
    form.add_needs(resolved, needs)
    write = form.size(resolved)
    known = run.record.get("output", {}) if run.done else {}
    if run.done and not run.harm():
        needs.cached.append("run")
    library = 0 if needs.live is None else TRANSFORMERS
    tensors = max(needs.live or 0, needs.whole, resolved.vocabulary.memory() if resolved.vocabulary else 0)
    tokens = tokens_bytes(resolved)
    factors = threads * sum(factor_bytes(adapter, resolved.base) for adapter in resolved.adapters.values())
    host = buffer_bytes(model.weights.specs, needs.width, threads) + factors + library + tensors
    host += tokens if resolved.vocabulary else 0
    on_device = 0
    if cuda:
        on_device, host = device_buffer_bytes(model.weights.specs, needs.width, threads)
        on_device += factors + tensors
        host += factors + library
    downloads = resolved.downloads
    problems = [*space_problems(downloads, runs, write), *disk_problems(runs, write, run)]
    return RunPlan(
        resolved.recipe.name,
        resolved.key if resolved.known else None,
        run.name if resolved.known else None,
        steps,
        needs.read,
        write,
        max((_WITHOUT_TORCH if not cuda and runs_without_torch(resolved) else _INTERPRETER) + host, _WITHOUT_TORCH + tokens),
        round(needs.seconds + (needs.read + write) / _BYTES_PER_SECOND, 1),
        needs.cached,
        problems,
        [*resolved.warnings, *licence_warnings(resolved), *form.warnings(known)],
        sum(d.bytes for d in downloads),
        [asdict(d) for d in downloads],
        list(resolved.deferred),
        on_device,
    )
