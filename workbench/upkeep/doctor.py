"""`doctor`: checks of the machine and the project, with repair of damaged kernels and caches."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from workbench.ground.errors import WorkbenchError, size
from workbench.ground.files import read_json
from workbench.ground.manifest import MANIFEST, described
from workbench.ground.project import cache_of, is_writable
from workbench.ground.results import JsonObject, Result
from workbench.run.directory import list_runs
from workbench.run.execute import versions
from workbench.weights.header import read_header
from workbench.weights.kernels import backend

_LOW_SPACE = 5_000_000_000
Status = Literal["ok", "repaired", "warning", "failed"]


class Diagnosis(JsonObject):
    """One check of the machine or the project."""

    check: str
    """Name of the check."""
    status: Status
    """Result of the check."""
    text: str
    """Result in words."""
    hint: str | None
    """Advice on how to fix a problem."""
    data: Any
    """Result as data, which depends on the check."""


class Checkup(Result):
    """Checks of the installation. With a failed check, the exit code is 3."""

    version: Literal[1] = 1
    """Version of the format."""
    project: str
    """Folder of the project."""
    checks: list[Diagnosis]
    """All checks."""


def examine(project: Path, runs: Path) -> Checkup:
    """Check the machine and a project, rebuild damaged kernels, and remove damaged cache files, which are recreated on demand."""
    checks = [*_kernels(), _device(), _versions(), *_caches(cache_of(project)), _results(runs), *_disk(project, runs)]
    return Checkup(project=str(project), checks=checks)


def _found(check: str, status: Status, text: str, hint: str | None = None, data: Any = None) -> Diagnosis:
    return Diagnosis(check=check, status=status, text=text, hint=hint, data=data)


def _kernels() -> Iterator[Diagnosis]:
    """Report the C compiler and the kernels, which are rebuilt if they are damaged."""
    kernels = backend()
    data = {
        **kernels.record(),
        "file": str(kernels.file) if kernels.file else None,
        "removed": [str(file) for file in kernels.removed],
    }
    compiler = f"{kernels.compiler} ({kernels.version})" if kernels.compiler else "none"
    hint = None if kernels.compiler else kernels.reason
    yield _found("compiler", "ok" if kernels.compiler else "warning", compiler, hint, kernels.compiler)
    if kernels.name == "torch":
        hint = (
            "Unset WORKBENCH_KERNELS."
            if kernels.asked
            else "Install a C compiler (apt install gcc), or set CC to an installed one."
        )
        yield _found("kernels", "warning", f"torch, which is slower but gives the same results: {kernels.reason}", hint, data)
    elif kernels.removed:
        yield _found("kernels", "repaired", f"rebuilt, because {kernels.removed[0]} was damaged", None, data)
    else:
        yield _found("kernels", "ok", f"compiled: {kernels.file}", None, data)


def _device() -> Diagnosis:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(i) for i in range(count)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _found("device", "ok", ", ".join([*names, f"cpu with {cores} cores"]), None, {"cuda": names, "cores": cores})


def _versions() -> Diagnosis:
    installed = versions()
    missing = [name for name, version in installed.items() if version == "not installed"]
    text = ", ".join(f"{name} {version}" for name, version in installed.items())
    hint = f"{missing[0]} is not installed: pip install {missing[0].replace('_', '-')}" if missing else None
    return _found("versions", "warning" if missing else "ok", text, hint, installed)


def _caches(cache: Path) -> Iterator[Diagnosis]:
    """Report the sizes of the project's caches, and remove damaged files."""
    if not cache.exists():
        yield _found("caches", "ok", f"{cache}: not created yet", None, {})
        return
    if not cache.is_dir():
        yield _found("caches", "failed", f"{cache}: expected a folder, found a file", "Move or delete the file.", {})
        return
    sizes: dict[str, int] = {}
    removed: list[str] = []
    for file in sorted(path for path in cache.rglob("*") if path.is_file()):
        inside = file.relative_to(cache)
        if not any(part.startswith(".") for part in inside.parts) and _damaged(file):
            file.unlink()
            removed.append(str(inside))
            continue
        sizes[inside.parts[0]] = sizes.get(inside.parts[0], 0) + file.stat().st_size
    text = f"{cache}: {size(sum(sizes.values()))}" + (
        f" ({', '.join(f'{name} {size(n)}' for name, n in sizes.items())})" if sizes else ""
    )
    data = {"bytes": sizes, "removed": removed}
    if removed:
        text += f"; {len(removed)} damaged files removed ({', '.join(removed[:3])})"
    yield _found("caches", "repaired" if removed else "ok", text, None, data)


def _damaged(file: Path) -> bool:
    """Return whether a cached file is damaged: a JSON file that does not parse, or a truncated safetensors file."""
    if file.suffix == ".json":
        return read_json(file) is None
    if file.suffix == ".safetensors":
        try:
            read_header(file)
        except WorkbenchError:
            return True
    return False


def _results(runs: Path) -> Diagnosis:
    """Report finished runs whose files are missing, changed or were added, and runs that cannot be checked."""
    done = [run for run in list_runs(runs) if run.done]
    broken = {run.name: described(found) for run in done if (found := run.harm())}
    unsealed = [run.name for run in done if not run.sealed]
    text = f"{len(done)} finished runs" + (f", {len(unsealed)} without {MANIFEST}, of an earlier version" if unsealed else "")
    data = {"broken": broken, "unsealed": unsealed}
    if not broken:
        return _found("results", "ok", text, None, data)
    hint = (
        "Run the recipes again: a broken run is moved aside, and made again. `workbench runs verify NAME` also compares contents."
    )
    return _found("results", "failed", "; ".join(f"{name}: {found}" for name, found in broken.items()), hint, data)


def _disk(project: Path, runs: Path) -> Iterator[Diagnosis]:
    """Report free space and permissions of the project, the runs and the hub's cache."""
    from huggingface_hub import constants

    for name, place in {"project": project, "runs": runs, "hub cache": Path(constants.HF_HUB_CACHE)}.items():
        existing = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        data = {"path": str(place), "free": free, "writable": is_writable(place)}
        if not existing.is_dir():
            yield _found(name, "failed", f"{place}: {existing} is a file, expected a folder", "Move or delete the file.", data)
        elif not data["writable"]:
            moved = name == "project" and is_writable(cache_of(project))  # its runs are checked by themselves
            hint = f"Its cache is {cache_of(project)}." if moved else "Change its permissions, or use another folder."
            yield _found(name, "warning" if moved else "failed", f"{place}: {existing} is not writable", hint, data)
        elif free < _LOW_SPACE:
            yield _found(
                name,
                "warning",
                f"{place}: {size(free)} free",
                "Delete what you do not need: see `workbench runs ls` and `hf cache ls`.",
                data,
            )
        else:
            yield _found(name, "ok", f"{place}: {size(free)} free", None, data)
