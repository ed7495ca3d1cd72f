"""Plans of runs: steps, bytes, memory, time and problems, predicted from file headers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.bricks.header_folders import Download, space_problems
from workbench.ground.results import Number, Result, absent
from workbench.resolve.findings import licence_warnings
from workbench.resolve.resolved import Resolved
from workbench.run.costs import (
    TRANSFORMERS,
    Needs,
    UnsolvedStep,
    buffer_bytes,
    device_buffer_bytes,
    disk_problems,
    factor_bytes,
    tokens_bytes,
)
from workbench.run.device import runs_without_torch
from workbench.run.directory import run_of
from workbench.run.forms import form_of
from workbench.run.kind import kind_of
from workbench.run.record import StepVerb
from workbench.weights.device import default_threads

# Resident memory of Python with torch and the workbench, before any tensor: measured 0.25 GB on Linux.
_INTERPRETER = 250_000_000
# The same without torch: measured 0.06 GB.
_WITHOUT_TORCH = 63_000_000
# Speed of streaming merges on one core, in bytes read plus bytes written: measured 1.7e9 for task arithmetic and 1.4e9 for TIES.
_BYTES_PER_SECOND = 1.5e9


class PlannedStep(StepVerb):
    """A step of a plan, with further entries that depend on the method."""

    bricks: dict[str, str] | None = absent()
    """Brick name -> adapter, checkpoint or recipe."""
    passes: int | None = absent()
    """Number of times that a merge step reads every delta."""
    edits: list[UnsolvedStep] | None = absent()
    """Steps of recipes used as bricks that are not cached, with their cost."""
    needs: str | None = absent()
    """Inputs that a merge step reads besides tensors: "texts" or "model"."""
    inputs: list[str] | None = absent()
    """Files that the step reads, relative to the project."""
    trains_on: str | None = absent()
    """File or data set that the step trains on."""
    check: str | None = absent()
    """Check of a grow step: "tensors" or "full"."""
    blocks: list[dict[str, object]] | None = absent()
    """Source of each range of layers of a `grow: stack` step: a brick with its layers, or a merge."""
    cost: Mapping[str, Any] | None = absent()
    """Work of a step whose result is not cached: numbers of facts, tokens and optimizer steps."""
    seconds: Number | None = absent()
    """Estimated time of this work on one core, in seconds."""


class RunPlan(Result):
    """Prediction of a run, from file headers."""

    recipe: str
    """Name of the recipe."""
    key: str | None
    """Key of the configuration; null until `run` or `eval` has read the inputs once."""
    run: str | None
    """Name of the run directory, which has a part of the key; null as long as the key is."""
    steps: list[PlannedStep]
    """The steps, in order."""
    read_bytes: int
    """Bytes that the run reads."""
    write_bytes: int
    """Size of the result in bytes."""
    peak_bytes: int
    """Peak memory of the process in bytes; on a CUDA device, the host's part."""
    seconds: Number
    """Estimated time in seconds, without downloads."""
    cached: list[str]
    """Ids of steps whose result is cached, and "run" if the run is finished."""
    problems: list[str]
    """Problems that stop the run, such as a full disk. With a problem, the exit code is 1."""
    warnings: list[str]
    """Warnings about the inputs and their licenses."""
    download_bytes: int
    """Size of all downloads in bytes."""
    downloads: list[Download]
    """Downloads that the run makes first."""
    checked_at_run: list[str]
    """Checks that need more than file headers, which the run makes before the first step."""
    device_bytes: int
    """Peak memory of the CUDA device in bytes; 0 for a run on the CPU."""
    config: dict[str, Any] | None = absent()
    """Fields of config.json that the recipe's `output` overrides."""
    format: str | None = absent()
    """Format of the base that the result is packed in."""


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
    steps: list[PlannedStep] = []
    for i, (step, step_id) in enumerate(zip(resolved.recipe.steps, resolved.recipe.step_ids, strict=True)):
        row, model = kind_of(step).plan_row(step, resolved, i, model, needs)
        steps.append(PlannedStep.model_validate({"id": step_id, step.verb: step.name, **row}))
    if resolved.recipe.fields.output.config:
        from workbench.run.configured import configured

        configured(resolved, model)
    form = form_of(resolved)
    form.add_needs(resolved, needs)
    write = form.size(resolved)
    known = run.read_record().output if run.done else None
    if run.done and not run.harm():
        needs.cached.append("run")
    library = 0 if needs.live is None else TRANSFORMERS
    tensors = max(needs.live or 0, needs.whole, resolved.vocabulary.memory() if resolved.vocabulary else 0)
    tokens = tokens_bytes(resolved)
    factors = threads * sum(factor_bytes(resolved, name) for name in resolved.adapters)
    host = buffer_bytes(model.weights.specs, needs.width, threads) + factors + library + tensors
    host += tokens if resolved.vocabulary else 0
    on_device = 0
    if cuda:
        on_device, host = device_buffer_bytes(model.weights.specs, needs.width, threads)
        on_device += factors + tensors
        host += factors + library
    downloads = resolved.downloads
    problems = [*space_problems(downloads, runs, write), *disk_problems(runs, write, run)]
    without_torch = not cuda and runs_without_torch(resolved)
    return RunPlan(
        recipe=resolved.recipe.name,
        key=resolved.key if resolved.known else None,
        run=run.name if resolved.known else None,
        steps=steps,
        read_bytes=needs.read,
        write_bytes=write,
        peak_bytes=max((_WITHOUT_TORCH if without_torch else _INTERPRETER) + host, _WITHOUT_TORCH + tokens),
        seconds=round(needs.seconds + (needs.read + write) / _BYTES_PER_SECOND, 1),
        cached=needs.cached,
        problems=problems,
        warnings=[*resolved.warnings, *licence_warnings(resolved), *(form.warnings(known) if known else ())],
        download_bytes=sum(d.bytes for d in downloads),
        downloads=list(downloads),
        checked_at_run=list(resolved.deferred),
        device_bytes=on_device,
        config=resolved.recipe.fields.output.config,
        format=resolved.recipe.fields.output.format,
    )
