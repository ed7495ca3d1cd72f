"""Execution of recipes: run a resolved recipe, write its result into a run directory, and verify the files of a finished run."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from workbench.ground import yamldoc
from workbench.ground.errors import GateFailedError, WorkbenchError, shell
from workbench.ground.events import Event, Events, no_events
from workbench.ground.files import check_new, new_directory, publish, write_text
from workbench.ground.foreign_names import ADAPTER_WEIGHTS
from workbench.ground.identity import installed
from workbench.ground.lazy import torch
from workbench.ground.manifest import manifest_of, seal
from workbench.resolve.resolved import RecipeBrick, Resolved
from workbench.run.card import model_card
from workbench.run.compose import Composition, compose, step_context
from workbench.run.costs import disk_problems
from workbench.run.device import Work
from workbench.run.directory import UNSEALED, RunDirectory, hold, move_run, run_for, run_of
from workbench.run.forms import FORMS, OutputForm, WriteContext, form_of
from workbench.run.kind import kind_of
from workbench.run.materialize import remember_digest
from workbench.run.record import EfficacyError, FactsSaid, RunOutput, RunResult
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.device import exact, peak_bytes
from workbench.weights.digests import tensor_digests
from workbench.weights.header import read_header
from workbench.weights.kernels import backend


def execute(
    resolved: Resolved,
    runs: Path,
    work: Work,
    *,
    out: Path | None = None,
    wait: bool = False,
) -> RunResult:
    """Run a recipe and write the result to its run directory. A finished run is reused, an interrupted run is resumed.

    Args:
        resolved: The recipe.
        runs: Folder of run directories.
        work: Where it computes, and who hears of its progress.
        out: A new or empty directory that gets a copy of the result.
        wait: If another process writes the same run, wait for it instead of raising an error, then reuse or resume its run.

    Returns:
        The result, which `workbench run --json` prints.

    Raises:
        WorkbenchError: If the disk is too full, an input has changed, or a check of the result fails.
    """
    started = time.monotonic()
    form = form_of(resolved)
    form.refuse(resolved)
    if out is not None:
        check_new(out)
    with hold(lambda: run_of(resolved, runs), wait, work.events) as run, exact(work.device):
        if run.done:
            run.set_aside(work.events)
        if not run.done:
            if problems := disk_problems(runs, form.size(resolved), run):
                raise WorkbenchError(problems[0], "`workbench runs ls` shows what could go: `workbench runs rm NAME`.")
            _write_run(resolved, run, work, started)
        else:
            unknown = "" if run.sealed else f"; {UNSEALED}"
            work.events({"stage": "run", "text": f"finished before: nothing to do{unknown}{_relicensed(resolved, run)}"})
        run = move_run(run, run_for(runs, resolved.recipe.name, resolved.run_key), work.events)
    if out is not None:  # files are not linked: changing the copy must not change the run
        with new_directory(out) as copy:
            shutil.copytree(run.result, copy, dirs_exist_ok=True)
    record = run.read_record()
    assert record.output is not None, "a run that has finished has a result"
    return RunResult(
        run=str(run.path),
        key=resolved.key,
        status="done",
        **{other.key: str(out or run.result) if other is form else None for other in FORMS.values()},
        configuration=form.configuration(record.output),
        steps=record.steps or [],
        said=record.said or {},
        packing=record.output.packing,
        warnings=list(dict.fromkeys([*resolved.warnings, *(record.warnings or ())])),
        seconds=round(time.monotonic() - started, 2),
        peak_bytes=peak_bytes(),
    )


def _relicensed(resolved: Resolved, run: RunDirectory) -> str:
    """Return what to say if the inputs' licenses, which are in no key, are no longer those of a run's card; else ""."""
    record = run.read_record()
    before = {**(record.licences or {}), **{f"{brick}: {data}": licence for brick, data, licence in record.data_licences or ()}}
    now = {**resolved.licences, **{f"{brick}: {data}": licence for brick, data, licence in resolved.data_licences}}
    changed = [f"{name} {licence}" for name, licence in now.items() if before.get(name) != licence]
    if not before or (not changed and before.keys() == now.keys()):
        return ""
    return f"; licenses have changed ({', '.join(changed)}): for a card that states them, `workbench runs rm {run.name}` and run again"


def _write_run(resolved: Resolved, run: RunDirectory, work: Work, started: float) -> None:
    device, record = work.device, _start(resolved, run, work.device)

    def log(event: Event) -> None:
        if "done" not in event or event["done"] == event.get("total"):
            run.log(event)
        work.events(event)

    if backend().name == "torch" and not backend().asked and device.type == "cpu":
        log({"stage": "run", "text": f"without compiled kernels, which is slower: {backend().reason}; see `workbench doctor`"})
    try:
        checks = dict[str, dict[str, object]]()  # step -> what was measured
        for number, (step, step_id) in enumerate(zip(resolved.recipe.steps, resolved.recipe.step_ids, strict=True)):
            measured = kind_of(step).check(step, step_context(resolved, number, device, log))
            checks |= {} if measured is None else {step_id: measured}
        composition = compose(resolved, device, log)
        said = dict[str, FactsSaid]()
        if resolved.gates:
            from workbench.run.teaching import check_efficacy

            said = check_efficacy(resolved, composition, device, log)
        log({"stage": "write", "text": f"{len(composition.model.weights.specs)} tensors"})
        form = form_of(resolved)
        context = WriteContext(resolved, composition, run.partial, replace(work, events=log))
        output = form.write(context)
        for step_id, found in _check_written(form, resolved, run, composition, device, log).items():
            checks[step_id] = {**checks.get(step_id, {}), **found}
    except WorkbenchError as error:
        counted = {"said": _counts(error.said)} if isinstance(error, EfficacyError) else {}
        run.write({**record, "status": "failed", "error": error.message, **counted})
        raise
    try:
        resolved.check_inputs()
        record |= {"inputs": _inputs(resolved, digests=True), "key": resolved.key}
    except WorkbenchError as error:
        run.write({**record, "status": "failed", "error": error.message})
        raise
    rows = composition.records()
    for row, key, step in zip(rows, resolved.keys, resolved.recipe.steps, strict=True):
        row |= {"plugin": step.plugin.to_dict()} if step.plugin else {}
        row |= {"key": key} | ({"check": checks[step_id]} if (step_id := str(row["id"])) in checks else {})
    record |= {"steps": rows, "said": _counts(said), "output": output}
    stated = RunOutput.model_validate(output)
    record["warnings"] = [*resolved.warnings, *form.warnings(stated)]
    if resolved.vocabulary is not None:
        record["tokenizer"] = resolved.vocabulary.describe()  # again: rows are made when they are read
        if carried := resolved.vocabulary.carried():
            log({"stage": "rows", "text": carried})
    _finish(context, run, record, said)
    if digest := form.configuration(stated):
        remember_digest(resolved, digest, device)
    run.finish({**record, "status": "done", "seconds": round(time.monotonic() - started, 2), "peak_bytes": peak_bytes()})
    log({"stage": "run", "text": "done"})


def _check_written(
    form: OutputForm, resolved: Resolved, run: RunDirectory, composition: Composition, device: torch.device, events: Events
) -> dict[str, dict[str, object]]:
    """Check the promises of grow steps on the written files, before they are published. Remove the files if a check fails."""
    checkpoint = form.checkpoint(run.partial)
    if checkpoint is None or not composition.grown:
        return {}
    from workbench.run.check_growth import check_written

    try:
        return check_written(resolved, composition.grown, composition.model, checkpoint, device, events)
    except WorkbenchError:
        shutil.rmtree(run.partial, ignore_errors=True)
        raise


def _inputs(resolved: Resolved, *, digests: bool) -> dict[str, object]:
    """Return base and bricks. With `digests`, tensors that the run has not read are read."""
    base = {"id": resolved.recipe.fields.base_name, "revision": resolved.base_revision}
    bricks = _sources(resolved)
    if digests:
        base["digest"] = resolved.base_digest
        bricks = {name: {**brick, "digest": resolved.digests[name]} for name, brick in bricks.items()}
    return {"base": base, "bricks": bricks}


def _sources(resolved: Resolved) -> dict[str, dict[str, object]]:
    """Return kind and commit of each brick, and of the bricks of those that are recipes."""
    bricks: dict[str, dict[str, object]] = {n: {"kind": b.kind, "revision": b.revision} for n, b in resolved.bricks.items()}
    inner = {name: {"bricks": _sources(b.resolved)} for name, b in resolved.bricks.items() if isinstance(b, RecipeBrick)}
    return {name: brick | inner.get(name, {}) for name, brick in bricks.items()}


def _start(resolved: Resolved, run: RunDirectory, device: torch.device) -> dict[str, object]:
    recipe = resolved.recipe
    text = recipe_text(resolved)
    run.path.mkdir(parents=True, exist_ok=True)
    write_text(run.path / "recipe.yaml", text)
    record: dict[str, object] = {
        "version": 1,
        "status": "started",
        "name": recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.fields.model_dump(mode="json", by_alias=True),
        "seed": recipe.fields.seed,
        "inputs": _inputs(resolved, digests=False),
        "tokenizer": resolved.vocabulary.describe() if resolved.vocabulary else None,
        "generation": resolved.generation,
        "warnings": resolved.warnings,
        "licences": resolved.licences,
        "data_licences": [list(row) for row in resolved.data_licences],
        "device": str(device),
        "tf32": False,
        "backend": backend().record(),
        "versions": versions(),
    }
    run.write(record)
    return record


def _counts(said: Mapping[str, FactsSaid]) -> dict[str, dict[str, object]]:
    """Return the counts of facts as they stand in run.json."""
    return {name: row.to_dict() for name, row in said.items()}


def _finish(context: WriteContext, run: RunDirectory, record: dict[str, object], said: Mapping[str, FactsSaid]) -> None:
    """Write all other files, seal the result, then publish it by renaming its directory."""
    resolved = context.resolved
    for step, result in zip(resolved.recipe.steps, context.composition.results, strict=True):
        kind_of(step).keep(result, run.path, said.get(result.id))
    write_text(run.partial / "README.md", model_card(resolved, record, recipe_text(resolved)))
    seal(run.partial, known=context.sums)
    publish(run.partial, run.path / form_of(resolved).folder)


def recipe_text(resolved: Resolved) -> str:
    """Return the text of the recipe file, or a text with all overrides if `--set` changed the recipe."""
    recipe = resolved.recipe
    if recipe.path and recipe.path.is_file() and not recipe.settings:
        return recipe.path.read_text("utf-8")

    head = (
        f"# {recipe.path.name} with "
        + shell(*(part for s in recipe.settings for part in ("--set", " ".join(s.splitlines()))))
        + "\n"
        if recipe.path
        else ""
    )
    fields = recipe.fields.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    fields["bricks"] = {name: ref.data() for name, ref in recipe.fields.bricks.items()}
    return head + yamldoc.dump({"version": 1, **fields})


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that determine results."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **installed("brick-workbench", "torch", "transformers", "peft", "safetensors", "lm_eval")}


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
    output = run.read_record().output
    expected = (output.digests if run.adapter.is_dir() else output.tensors) if output else None
    if not expected:
        raise WorkbenchError(f"{run.name}: it has no manifest and its record lists no tensors", "Run its recipe again.")
    place = run.configuration / "model" if run.configuration.is_dir() else run.result
    entries = read_header(place / ADAPTER_WEIGHTS) if run.adapter.is_dir() else Checkpoint(place, run.name).entries
    actual = tensor_digests(entries)
    if bad := [n for n in expected if actual.get(n) != expected[n]] + [n for n in actual if n not in expected]:
        raise GateFailedError(
            f"{run.name}: {len(bad)} of {len(expected)} tensors differ from the record, first {bad[0]}",
            f"{shell('workbench', 'runs', 'rm', run.name)}, then run the recipe again.",
        )
    return Verified({}, len(expected))
