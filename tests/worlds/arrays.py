"""Projects whose recipes run with tensors and with arrays, and the comparison of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from worlds.processes import workbench
from worlds.project import CPU, Project
from worlds.tiny import save_finetuned

from workbench.run.device import Work, needs_no_torch
from workbench.run.execute import execute
from workbench.weights.specs import NUMPY

# Tensors of more than one block and of more than the sample of `trim` need more numbers than a tiny model has.
WIDE = (700, 400)


def lay_out(folder: Path, base: Path, dtype: torch.dtype, tuned: torch.dtype | None = None) -> Project:
    """Make a project of a base and three fine-tunes, with one wide tensor, a tensor of whole numbers and one of zeros."""
    (folder / "recipes").mkdir(parents=True)
    shutil.copytree(base, folder / "base")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(5)
    tensors["extra.wide"] = (torch.randn(WIDE, generator=generator) * 0.05).to(dtype)
    tensors["extra.table"] = (torch.randn(3, 4, 5, generator=generator) * 0.05).to(dtype)
    tensors["extra.counts"] = torch.arange(6, dtype=torch.int32).view(2, 3)
    tensors["extra.scale"] = torch.tensor(0.5, dtype=dtype)
    save_file(tensors, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    for seed, name in enumerate("abc", 1):
        save_finetuned(folder / "base", folder / name, seed=seed, dtype=tuned)
        changed = load_file(folder / name / "model.safetensors")
        changed["extra.counts"] = tensors["extra.counts"]
        changed["extra.table"] = tensors["extra.table"].to(tuned or dtype)  # deltas of zero
        save_file(changed, folder / name / "model.safetensors", metadata={"format": "pt"})
    return Project(folder)


def written(project: Project, text: str, device: torch.device, threads: int = 2) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Run a recipe anew; return the bytes of all files of its result, and its record without times and memory."""
    shutil.rmtree(project.path / "runs", ignore_errors=True)
    resolved = project.resolve(text)
    assert needs_no_torch(resolved)
    document = execute(resolved, project.path / "runs", Work(device, threads)).to_dict()
    record = json.loads((Path(document["run"]) / "run.json").read_text("utf-8"))
    for field in ("created", "seconds", "peak_bytes"):
        record.pop(field)
    record["run"], record["key"] = document["run"], document["key"]
    return {file.name: file.read_bytes() for file in Path(document["model"]).iterdir()}, record


def check_same(project: Project, text: str) -> dict[str, bytes]:
    """Check that a recipe gives the same files and record with tensors and with arrays; return the files."""
    files, record = written(project, text, CPU)
    in_arrays, its_record = written(project, text, NUMPY)
    assert in_arrays.keys() == files.keys()
    assert [name for name in files if files[name] != in_arrays[name]] == []
    assert its_record == record
    return files


def check_apart(project: Project, text: str) -> None:
    """Check that `workbench run` works in a process in which an import of torch fails, and writes the same weights."""
    shutil.rmtree(project.path / "runs", ignore_errors=True)
    project.write(text, "apart.yaml")
    heavy = ["torch", "transformers", "safetensors.torch", "peft", "tokenizers", "scipy"]
    done, imported = workbench("run", "apart", cwd=project.path, watched=heavy, missing=["torch", "safetensors.torch"])
    assert done.returncode == 0, done.stderr
    assert imported == set()
    (model,) = (project.path / "runs").glob("apart-*/model")
    in_arrays = (model / "model.safetensors").read_bytes()
    assert in_arrays == written(project, text, CPU)[0]["model.safetensors"]
