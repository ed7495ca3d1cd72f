"""plan(recipe) says what would happen; execute(recipe) makes it happen; materialize(recipe) gives a live model."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench import yamldoc
from workbench.adapter_output import adapt, write_result
from workbench.bricks import Brick
from workbench.card import model_card
from workbench.compose import Composition, compose
from workbench.errors import WorkbenchError
from workbench.fields import parse_size
from workbench.growthcheck import check_growth, check_written
from workbench.livemodels import Events, compute, live_model, no_events
from workbench.memories import attach_memory
from workbench.planning import disk_problems, kind_name, plan, run_of
from workbench.resolve import Resolved
from workbench.runs import Run, move_run, run_for
from workbench.saved import MEMORY, MODEL, refers_to_base, write_record
from workbench.solving import copy_edit
from workbench.trained import copy_brick
from workbench.versions import installed
from workbench.vocabulary.tokens import FILES as TOKENIZER_FILES
from workbench.weights.digests import json_digest, read_json, tensor_digest, weights_digest, write_json
from workbench.weights.parallel import default_threads
from workbench.weights.writer import output_specs, write_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, then cpu. Errors: a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise WorkbenchError(f"--device {name}: expected auto, cpu, cuda or cuda:N", None, 2) from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise WorkbenchError(f"--device {name}: found {torch.cuda.device_count()} CUDA devices", "--device cpu")
    if device.type not in ("cpu", "cuda"):
        raise WorkbenchError(f"--device {name}: expected auto, cpu, cuda or cuda:N", None, 2)
    return device


@contextmanager
def exact() -> Iterator[None]:
    """Full float32: no TF32 while tensors are computed."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def execute(
    resolved: Resolved,
    runs: Path,
    *,
    device: torch.device,
    threads: int | None = None,
    out: Path | None = None,
    events: Events = no_events,
) -> dict[str, Any]:
    """Run a recipe into its run directory; a finished run is kept, an interrupted one resumed.

    Args:
        resolved: The recipe.
        runs: Where run directories stand.
        device: Where tensors are computed.
        threads: Tensors computed at a time; omitted: one a core, at most 8.
        out: Also leave a copy of the model's files here.
        events: Told what happens.

    Returns:
        The `run --json` document.
    """
    started = time.time()
    run = run_of(resolved, runs)
    form = resolved.recipe.fields.output.form
    if out is not None:
        _check_out(out)
    with run.lock(), exact():
        if not run.done:
            if problems := disk_problems(runs, plan(resolved, runs).write_bytes, run):
                raise WorkbenchError(problems[0], "`workbench runs ls` shows what could go: `workbench runs rm NAME`.")
            _write_run(resolved, run, device, threads or default_threads(), events, started)
        else:
            events({"stage": "run", "text": "finished before: nothing to do"})
    run = move_run(run, run_for(runs, resolved.recipe.name, resolved.run_key))
    if out is not None:
        _leave(run.result, out)
    record, place = run.record, str(out or run.result)
    return {"run": str(run.path), "key": resolved.key, "status": record["status"], "model": place if form == "checkpoint" else None,
            "adapter": place if form == "adapter" else None, "directory": place if form == "configuration" else None,
            "configuration": None if form == "adapter" else record["output"]["digest"], "steps": record["steps"], "seconds": round(time.time() - started, 2),
            "peak_bytes": peak_bytes()}  # fmt: skip


def _write_run(resolved: Resolved, run: Run, device: torch.device, threads: int, events: Events, started: float) -> None:
    record = _start(resolved, run, device)

    def log(event: dict[str, Any]) -> None:
        if "done" not in event or event["done"] == event.get("total"):
            run.log(event)
        events(event)

    try:
        checks = check_growth(resolved, device, log)
        composition = compose(resolved, device, log)
        log({"stage": "write", "text": f"{len(composition.model.weights.specs)} tensors"})
        form = resolved.recipe.fields.output.form
        write = {"adapter": _write_adapter, "checkpoint": _write_model, "configuration": _write_configuration}[form]
        output = write(resolved, run, composition, device, threads, log)
        if form != "adapter":
            for step_id, found in _check_written(resolved, run, composition, device, log).items():
                checks[step_id] = {**checks.get(step_id, {}), **found}
    except WorkbenchError as error:
        run.write({**record, "status": "failed", "error": error.message})
        raise
    _record_inputs(resolved, record)
    record |= {"steps": _steps(resolved, composition, checks), "output": output}
    _finish(resolved, run, composition, record, {"adapter": run.adapter, "checkpoint": run.model}.get(form, run.configuration))
    if form != "adapter":
        remember_digest(resolved, output["digest"])
    run.write({**record, "status": "done", "seconds": round(time.time() - started, 2), "peak_bytes": peak_bytes()})
    log({"stage": "run", "text": "done"})


def _check_written(
    resolved: Resolved, run: Run, composition: Composition, device: torch.device, events: Events
) -> dict[str, dict[str, Any]]:
    """What grow steps promise of the files, which still have their temporary name; they are removed where it does not hold."""
    place = run.partial if resolved.recipe.fields.output.form == "checkpoint" else run.partial / MODEL
    try:
        return check_written(resolved, composition.grown, composition.model, place, device, events)
    except WorkbenchError:
        shutil.rmtree(run.partial, ignore_errors=True)
        raise


def _steps(resolved: Resolved, composition: Composition, checks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps' records with their keys, and what was measured of a growth step."""
    return [
        {**s, "key": key, **({"check": checks[s["id"]]} if s["id"] in checks else {})}
        for s, key in zip(composition.records(), resolved.keys, strict=True)
    ]


def _record_inputs(resolved: Resolved, record: dict[str, Any]) -> None:
    """Digests of the inputs, which are known once they have been read; reads what the merge has not."""
    record["key"] = resolved.key
    record["inputs"]["base"]["digest"] = resolved.base_digest
    for name, brick in record["inputs"]["bricks"].items():
        brick["digest"] = resolved.digests[name]


def _write_model(
    resolved: Resolved,
    run: Run,
    composition: Composition,
    device: torch.device,
    threads: int,
    events: Events,
    out: Path | None = None,
) -> dict[str, Any]:
    """The result as a checkpoint that transformers loads; returns the record's "output"."""
    out = out or run.partial
    digests = write_checkpoint(
        composition.model.weights, out, dtype=resolved.dtype,
        shard_size=parse_size(resolved.recipe.fields.output.shard_size), device=device, threads=threads,
        progress=lambda done, total: events({"stage": "write", "done": done, "total": total}))  # fmt: skip
    write_config(composition.model.config, resolved, out)
    specs = output_specs(composition.model.weights.specs, resolved.dtype)
    return {"digest": weights_digest(specs, digests, composition.model.config), "tensors": digests,
            "parameters": sum(s.numel for s in specs.values()), "bytes": sum(s.nbytes for s in specs.values())}  # fmt: skip


def _write_configuration(
    resolved: Resolved, run: Run, composition: Composition, device: torch.device, threads: int, events: Events
) -> dict[str, Any]:
    """The memory, and the checkpoint unless that is the base as it is; returns the record's "output"."""
    assert composition.memory is not None
    specs = output_specs(composition.model.weights.specs, resolved.dtype)
    output: dict[str, Any] = {
        "digest": resolved.base_digest,
        "tensors": {},
        "parameters": sum(s.numel for s in specs.values()),
        "bytes": 0,
    }
    if not refers_to_base(resolved):
        output = _write_model(resolved, run, composition, device, threads, events, run.partial / MODEL)
    shutil.rmtree(run.partial / MEMORY, ignore_errors=True)
    shutil.copytree(composition.memory.path, run.partial / MEMORY)
    output["digest"] = with_memory(output["digest"], composition)
    output["memory"] = composition.memory.digest
    write_record(run.partial, resolved, output["digest"])
    return output


def with_memory(digest: str, composition: Composition) -> str:
    """A configuration's digest: its weights', and its memory's where it has one."""
    return json_digest([digest, composition.memory.digest]) if composition.memory else digest


def _write_adapter(
    resolved: Resolved, run: Run, composition: Composition, device: torch.device, threads: int, events: Events
) -> dict[str, Any]:
    """The result as a PEFT adapter of the base; returns the record's "output"."""
    shutil.rmtree(run.partial, ignore_errors=True)
    output = resolved.recipe.fields.output
    return write_result(
        adapt(composition.model, resolved.base, output), run.partial, resolved.recipe.fields.base,
        device=device, threads=threads, dtype=getattr(torch, output.dtype) if output.dtype else None,
        progress=lambda done, total: events({"stage": "write", "done": done, "total": total}))  # fmt: skip


def _start(resolved: Resolved, run: Run, device: torch.device) -> dict[str, Any]:
    recipe = resolved.recipe
    text = recipe_text(resolved)
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "recipe.yaml").write_text(text, "utf-8")
    record: dict[str, Any] = {
        "version": 1, "status": "started", "name": recipe.name, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.fields.model_dump(mode="json", by_alias=True), "seed": recipe.fields.seed,
        "inputs": {"base": {"id": recipe.fields.base, "revision": resolved.base_revision},
                   "bricks": {n: {"kind": kind_name(b), "revision": b.revision if isinstance(b, Brick) else None}
                              for n, b in resolved.bricks.items()}},
        "tokenizer": resolved.vocabulary.describe() if resolved.vocabulary else None,
        "warnings": resolved.warnings, "device": str(device), "tf32": False, "versions": versions(),
    }  # fmt: skip
    run.write(record)
    return record


def _finish(resolved: Resolved, run: Run, composition: Composition, record: dict[str, Any], target: Path) -> None:
    """Everything beside the model, then the rename that makes the model or adapter visible."""
    for step_id, place in composition.edits.items():
        copy_edit(place, run.path / "edits" / step_id)
    for step_id, place in composition.trained.items():
        copy_brick(place, run.path / "bricks" / step_id)
    (run.partial / "README.md").write_text(model_card(resolved, record, recipe_text(resolved)), "utf-8")
    shutil.rmtree(target, ignore_errors=True)
    run.partial.rename(target)


def write_config(config: dict[str, Any], resolved: Resolved, out: Path) -> None:
    """config.json, generation config, tokenizer and chat template, so that the directory loads in transformers."""
    shown = {k: v for k, v in config.items() if k not in ("_name_or_path", "torch_dtype")}
    if resolved.dtype:
        shown["dtype"] = str(resolved.dtype).removeprefix("torch.")
    elif "torch_dtype" in config:
        shown["dtype"] = config["torch_dtype"]
    write_json(out / "config.json", shown, indent=2)
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (resolved.tokenizer_path / name).is_file():
            shutil.copyfile(resolved.tokenizer_path / name, out / name)


def configuration_digest(
    resolved: Resolved, device: torch.device, events: Events = no_events
) -> tuple[str, dict[str, torch.Tensor] | None]:
    """Digest of the configuration that a recipe produces, and its tensors where they had to be computed for it.

    Computed once a recipe key: in memory, with the bytes that a run would write.
    """
    known = read_json(resolved.cache / "configurations" / f"{resolved.key}.json", digest=str)
    if known:
        return str(known["digest"]), None
    with exact():
        composition = compose(resolved, device, events)
        model = composition.model
        tensors = compute(model, resolved.dtype, device)
    digests = {name: tensor_digest(t) for name, t in tensors.items()}
    digest = with_memory(weights_digest(output_specs(model.weights.specs, resolved.dtype), digests, model.config), composition)
    remember_digest(resolved, digest)
    return digest, tensors


def remember_digest(resolved: Resolved, digest: str) -> None:
    """Keep which configuration a recipe key produces."""
    write_json(resolved.cache / "configurations" / f"{resolved.key}.json", {"digest": digest})


def materialize(
    resolved: Resolved, device: torch.device, tensors: dict[str, torch.Tensor] | None = None, events: Events = no_events
) -> PreTrainedModel:
    """The configuration as a live transformers model in the dtype that would be written, its memory attached, without touching the disk."""
    with exact():
        composition = compose(resolved, device, events)
        model, memory = composition.model, composition.memory
        live = live_model(model.config, tensors or compute(model, resolved.dtype, device), resolved.tokenizer_path, device)
    return attach_memory(live, memory.path, resolved.tokenizer_path, memory.version) if memory else live


@contextmanager
def swap(model: PreTrainedModel, resolved: Resolved, tensors: dict[str, torch.Tensor] | None = None) -> Iterator[PreTrainedModel]:
    """Turn a live model into another configuration in place, for a `with` block; then it has its own weights again, bit for bit.

    Args:
        model: From `materialize`: a configuration whose parameters have the same names and shapes.
        resolved: The other configuration; computed in its output dtype, held in the model's, on the model's device.
        tensors: Of the other configuration, where they are computed already.

    Errors: other parameters, as after a grow step; a memory.
    """
    if resolved.recipe.memory or resolved.memory:
        raise WorkbenchError(
            f"recipe {resolved.recipe.name}: its memory is no set of weights that could be exchanged", "Use `materialize`."
        )
    other = materialize(resolved, next(model.parameters()).device, tensors).to(model.dtype)
    mine, theirs = (dict(m.named_parameters()) for m in (model, other))
    if differing := sorted(
        {n for n in mine.keys() | theirs.keys() if n not in mine or n not in theirs or mine[n].shape != theirs[n].shape}
    ):
        raise WorkbenchError(
            f"recipe {resolved.recipe.name}: its parameters are not the live model's ({differing[0]} and {len(differing) - 1} more differ)",
            "A configuration that grows or unties the base is another model: use `materialize`.",
        )

    def exchange() -> None:
        for name, parameter in mine.items():
            parameter.data, theirs[name].data = theirs[name].data, parameter.data

    exchange()
    try:
        yield model
    finally:
        exchange()


def recipe_text(resolved: Resolved) -> str:
    """The recipe as a file shows it."""
    recipe = resolved.recipe
    if recipe.path and recipe.path.is_file() and not recipe.settings:
        return recipe.path.read_text("utf-8")

    head = (
        f"# {recipe.path.name} with " + " ".join(f"--set {' '.join(s.splitlines())}" for s in recipe.settings) + "\n"
        if recipe.path
        else ""
    )
    fields = recipe.fields.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    fields["bricks"] = {name: {ref.kind: ref.target} for name, ref in recipe.fields.bricks.items()}
    return head + yamldoc.dump({"version": 1, **fields})


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **installed("brick-workbench", "torch", "transformers", "peft", "safetensors", "lm_eval")}


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WorkbenchError(f"-o {out}: exists and is not an empty directory", "Name a new directory: nothing is overwritten.")


def _leave(model: Path, out: Path) -> None:
    """A copy of the model's files in `out`, whole or not at all. No links: changing the copy must not change the run."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial)
    if out.is_dir():
        out.rmdir()
    partial.rename(out)
