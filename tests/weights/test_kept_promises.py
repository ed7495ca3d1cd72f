"""Small promises that everything else rests on: rounding, keys, and the order in which files reach the disk."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.project import CPU, Project

from workbench.ground.files import publish, write_bytes, write_json
from workbench.merge.dare import Dare
from workbench.merge.ties import Ties
from workbench.run.device import Work
from workbench.run.execute import execute
from workbench.steps import MergeMethod
from workbench.weights import kernels
from workbench.weights.header import save_tensors

# bfloat16 keeps 16 of 32 bits: lower halves of exactly 0x8000 are ties, and go to the neighbour whose last kept bit is 0.
TIES = [
    (0x3F800000, 0x3F80), (0x3F807FFF, 0x3F80), (0x3F808000, 0x3F80), (0x3F808001, 0x3F81), (0x3F810000, 0x3F81), (0x3F818000, 0x3F82),
    (0x3F817FFF, 0x3F81), (0xBF808000, 0xBF80), (0xBF818000, 0xBF82), (0x00008000, 0x0000), (0x00018000, 0x0002), (0x7F7F0000, 0x7F7F),
]  # fmt: skip


@pytest.mark.parametrize("form", ["c", "torch"])
def test_bfloat16_rounds_half_to_even(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From bit patterns, not from another cast: half of the elements of an average of two bfloat16 models are ties."""
    if form == "torch":
        monkeypatch.setattr(kernels, "_library", lambda: None)
    elif not kernels.compiled():
        pytest.skip("no C compiler")
    many = TIES * 40  # more than one vector, and a rest
    bits = torch.tensor([x - (1 << 32) if x >> 31 else x for x, _ in many], dtype=torch.int32)
    out = torch.empty(len(many), dtype=torch.bfloat16)
    assert kernels.narrow(bits.view(torch.float32), out)
    assert [x & 0xFFFF for x in out.view(torch.int16).tolist()] == [y for _, y in many]


@pytest.mark.parametrize("form", ["c", "torch"])
def test_float16_rounds_half_to_even(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "torch":
        monkeypatch.setattr(kernels, "_library", lambda: None)
    elif not kernels.compiled():
        pytest.skip("no C compiler")
    step = 2.0**-10
    wide = torch.tensor(
        [1 + step / 2, 1 + 1.5 * step, 1 + step * 0.51, -1 - step / 2, -1 - 1.5 * step, 2.0**-25, 1.5 * 2.0**-24] * 9
    )
    out = torch.empty(len(wide), dtype=torch.float16)
    assert kernels.narrow(wide, out)
    assert out.tolist() == [1.0, 1 + 2 * step, 1 + step, -1.0, -1 - 2 * step, 0.0, 2 * 2.0**-24] * 9


@pytest.mark.parametrize("form", ["c", "torch"])
def test_an_average_of_two_written_models_rounds_half_to_even(
    form: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the way to the file: (θ₁ + θ₂) / 2 of neighbours in bfloat16 is a tie everywhere."""
    from safetensors.torch import load_file, save_file

    if form == "torch":
        monkeypatch.setattr(kernels, "_library", lambda: None)
    base = load_file(project.path / "base" / "model.safetensors")
    for name, up in (("low", 0), ("high", 1)):
        place = project.path / "own" / name
        place.mkdir(parents=True)
        save_file({n: (t.view(torch.int16) + up).view(torch.bfloat16) for n, t in base.items()}, place / "model.safetensors")
        for other in ("config.json", "tokenizer.json"):
            shutil.copyfile(project.path / "base" / other, place / other)
    found = project.run("bricks: {low: own/low, high: own/high}\nsteps: [{merge: average}]\noutput: {dtype: bfloat16}\n")
    written = load_file(Path(found["model"]) / "model.safetensors")
    for name, tensor in base.items():
        bits = tensor.view(torch.int16)
        even = torch.where(bits & 1 == 0, bits, bits + 1)  # of x and its upper neighbour the one with an even mantissa
        assert torch.equal(written[name].view(torch.int16), even), name


# Keys.

STEP = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: METHOD}]\n"


def test_a_method_s_version_is_part_of_every_key(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version is another step, configuration and run; no key of another method moves."""
    ties, dare = STEP.replace("METHOD", "ties"), STEP.replace("METHOD", "dare")
    before, other = project.resolve(ties), project.resolve(dare)
    kept = (before.keys, before.key, before.run_key, before.stamp)
    kept_other = (other.keys, other.key, other.run_key)
    monkeypatch.setattr(Ties, "version", MergeMethod.version + 7)
    after, same = project.resolve(ties), project.resolve(dare)
    assert all(a != b for a, b in zip(kept, (after.keys, after.key, after.run_key, after.stamp), strict=True))
    assert (same.keys, same.key, same.run_key) == kept_other
    assert (Dare.version, Ties.version) == (3, MergeMethod.version + 7)


@pytest.mark.parametrize(("method", "moves"), [("dare", True), ("ties", False)])
def test_the_seed_is_part_of_the_keys_of_what_is_random(project: Project, method: str, moves: bool) -> None:
    text = STEP.replace("METHOD", method)
    one, two = (project.resolve(f"seed: {seed}\n{text}") for seed in (1, 2))
    for a, b in ((one.keys, two.keys), (one.key, two.key), (one.run_key, two.run_key), (one.stamp, two.stamp)):
        assert (a != b) == moves
    tensors = [project.tensors(f"seed: {seed}\n{text}") for seed in (1, 2)]
    assert any(not torch.equal(tensors[0][n], tensors[1][n]) for n in tensors[0]) == moves, "keys say what the numbers do"


def test_the_shard_size_is_part_of_the_run_s_key_alone(project: Project) -> None:
    """Runs of other files never share a directory; the configuration is the same."""
    text = STEP.replace("METHOD", "ties") + "output: {shard_size: SIZE}\n"
    small, large, same = (project.resolve(text.replace("SIZE", size)) for size in ("50kB", "1GB", "1000MB"))
    assert small.key == large.key
    assert small.run_key != large.run_key
    assert small.stamp != large.stamp
    assert large.run_key == same.run_key, "1GB and 1000MB are one size"
    one, two = (execute(resolved, project.path / "runs", Work(CPU, 1)).to_dict() for resolved in (small, large))
    assert one["run"] != two["run"]
    assert one["configuration"] == two["configuration"]
    assert len(list(Path(one["model"]).glob("*.safetensors"))) > 1
    assert len(list(Path(two["model"]).glob("*.safetensors"))) == 1


# What reaches the disk, in which order.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(call, name) of every fsync, rename and replace, in order."""
    found: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        found.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def renamed(self: Path, target: Any) -> Path:
        found.append(("rename", f"{self.name} -> {Path(target).name}"))
        return rename(self, target)

    def replaced(self: Path, target: Any) -> Path:
        found.append(("rename", f"{self.name} -> {Path(target).name}"))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
@pytest.mark.parametrize("kind", ["json", "bytes", "tensors"])
def test_a_file_is_flushed_before_it_gets_its_name(tmp_path: Path, calls: list[tuple[str, str]], kind: str) -> None:
    file = tmp_path / "folder" / "x"
    if kind == "json":
        write_json(file, {})
    elif kind == "bytes":
        write_bytes(file, b"x")
    else:
        save_tensors({"x": torch.zeros(2)}, file)
    temporary = calls[-3][1]
    assert re.fullmatch(rf"\.x\.{os.getpid()}\d+", temporary)
    assert calls[-3:] == [("fsync", temporary), ("rename", f"{temporary} -> x"), ("fsync", "folder")]
    assert [p.name for p in file.parent.iterdir()] == ["x"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
def test_a_folder_is_flushed_before_it_gets_its_name(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    (tmp_path / "partial" / "below").mkdir(parents=True)
    (tmp_path / "partial" / "a").write_text("a")
    (tmp_path / "partial" / "below" / "b").write_text("b")
    publish(tmp_path / "partial", tmp_path / "target")
    at = calls.index(("rename", "partial -> target"))
    assert sorted(calls[:at]) == [("fsync", "a"), ("fsync", "b"), ("fsync", "below"), ("fsync", "partial")]
    assert calls[at + 1 :] == [("fsync", tmp_path.name)]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_a_run_is_done_after_all_of_it_is_on_the_disk(project: Project, calls: list[tuple[str, str]], form: str) -> None:
    """Every file, then the model's folder, then `status: done`."""
    text = "bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n" + (
        "output: {shard_size: 50kB}\n" if form == "checkpoint" else "output: {form: adapter}\n"
    )
    found = project.run(text)
    place = Path(found["model"] or found["adapter"])
    (at,) = (i for i, (call, name) in enumerate(calls) if call == "rename" and name.endswith(f"-> {place.name}"))
    flushed = {name for call, name in calls[:at] if call == "fsync"}
    assert {file.name for file in place.iterdir()} <= flushed
    assert calls[at + 1][0] == "fsync", "the folder that holds the model"
    records = [i for i, (call, name) in enumerate(calls) if call == "rename" and name.endswith("-> run.json")]
    assert records[-1] > at
    assert sum(i > at for i in records) == 1
