"""Tensors on disk: what is refused, what is written, and that digests say the same of disk and memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from worlds.project import CPU
from worlds.tiny import edit_json, files_of, save_finetuned, tensors_of

import workbench.weights.checkpoint as reader
import workbench.weights.specs as specs_module
import workbench.weights.writer as writer
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import read_json, write_json
from workbench.ground.foreign_names import INDEX, SINGLE
from workbench.ground.manifest import sha256_of
from workbench.weights.checkpoint import Checkpoint, read_config
from workbench.weights.device import load_all
from workbench.weights.digests import entry_digest, tensor_digest, tensor_digests, weights_digest
from workbench.weights.header import read_header
from workbench.weights.specs import TensorSpec, load
from workbench.weights.writer import JOURNAL, plan_shards, write_checkpoint

GB = 10**9


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BAD_FILES = {
    "empty": (b"", "not a safetensors file (a header of 0 bytes in a file of 0 bytes)"),
    "short": (b"abc", "not a safetensors file"),
    "html": (b"<!DOCTYPE html><html>" * 9, "not a safetensors file (a header of"),
    "header not JSON": (raw(b"{nope"), "damaged safetensors header"),
    "header a list": (raw([1, 2]), "damaged safetensors header"),
    "tensor a number": (raw({"a": 1}), "damaged safetensors header"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}), "damaged safetensors header"),
    "three offsets": (
        raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"0000"),
        "damaged safetensors header",
    ),
    "header cut": (raw({"a": tensor(0, 4, [1])})[:-3], "not a safetensors file"),
    "truncated": (raw({"a": tensor(0, 8, [2])}, b"0000"), "(truncated?)"),
    "trailing bytes": (raw({"a": tensor(0, 4, [1])}, b"00000000"), "its header describes"),
    "overlap": (raw({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, b"0" * 12), "b has offsets 4-12, expected 8-16"),
    "gap": (raw({"a": tensor(4, 8, [1])}, b"0" * 8), "a has offsets 4-8, expected 0-4"),
    "long name": (raw({"layers." + "9" * 5000: tensor(0, 4, [1])}, b"0" * 4), "damaged safetensors header: 'layers.999"),
    "size unlike shape": (raw({"a": tensor(0, 8, [3])}, b"0" * 8), "a has offsets 0-8, expected 0-12"),
    "negative shape": (
        raw({"a": tensor(0, 4, [-1, -1])}, b"0" * 4),
        "damaged safetensors header: 'a' has no valid dtype, shape and data_offsets",
    ),
    "fp8": (raw({"a": tensor(0, 4, [4], "F8_E4M3")}, b"0" * 4), "a has dtype F8_E4M3, a quantized or packed format"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name: str, tmp_path: Path) -> None:
    data, message = BAD_FILES[name]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(WorkbenchError) as caught:
        read_header(tmp_path / "x.safetensors")
    assert message in caught.value.message


def sharded(out: Path) -> Path:
    """Two files and an index."""
    out.mkdir()
    save_file({"a": torch.zeros(2)}, out / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, out / "model-2.safetensors")
    (out / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}), "utf-8")
    return out


def index(path: Path, **places: str) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": places}), "utf-8")


def spoil(action: str, path: Path) -> None:
    if action == "parent folder":
        shutil.copy(path / "model-1.safetensors", path.parent / "out.safetensors")
        index(path, a="../out.safetensors")
    elif action == "absolute path":
        index(path, a=str(path / "model-1.safetensors"))
    elif action == "dots":
        index(path, a="..")
    elif action == "link":
        (path / "model-1.safetensors").rename(path.parent / "out.safetensors")
        (path / "model-1.safetensors").symlink_to(path.parent / "out.safetensors")
    elif action == "missing shard":
        (path / "model-2.safetensors").unlink()
    elif action == "tensor in no file":
        index(path, a="model-1.safetensors", b="model-2.safetensors", c="model-1.safetensors")
    elif action == "tensor in two files":
        save_file({"a": torch.zeros(2)}, path / "model-2.safetensors")
        index(path, a="model-1.safetensors", b="model-2.safetensors")
    elif action == "no JSON":
        (path / INDEX).write_text("{", "utf-8")
    elif action == "no map":
        (path / INDEX).write_text("[]", "utf-8")
    else:
        for file in path.iterdir():
            file.unlink()
        if action != "nothing":
            (path / action).write_bytes(b"x")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("parent folder", "names a file outside its directory ('../out.safetensors')"),
        ("absolute path", "names a file outside its directory"),
        ("dots", "names a file outside its directory ('..')"),
        ("link", "names a file outside its directory ('model-1.safetensors')"),
        ("missing shard", "names model-2.safetensors, which is missing"),
        ("tensor in no file", "names c, which no file has"),
        ("tensor in two files", "a is in both model-1.safetensors and model-2.safetensors"),
        ("no JSON", "is not an index of safetensors files"),
        ("no map", "is not an index of safetensors files"),
        ("pytorch_model.bin", "has pickle files only (pytorch_model.bin), which are never opened; expected model.safetensors"),
        ("model-q4.gguf", "no model.safetensors in"),
        ("nothing", "no model.safetensors in"),
    ],
)
def test_bad_folder(action: str, message: str, tmp_path: Path) -> None:
    spoil(action, sharded(tmp_path / "model"))
    with pytest.raises(WorkbenchError) as caught:
        Checkpoint(tmp_path / "model", "base")
    assert message in caught.value.message
    assert caught.value.message.startswith("base: ")


def test_hub_snapshots_are_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    for file in sharded(snapshot).glob("*.safetensors"):
        file.rename(blobs / file.stem)
        file.symlink_to(Path("../../blobs") / file.stem)
    assert sorted(Checkpoint(snapshot, "base").specs) == ["a", "b"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"quantization_config": {"quant_method": "gptq"}}', "quantized weights (gptq)"),
        ('{"quantization_config": {"load_in_4bit": true}}', "quantized weights (unknown)"),
        ("{", "config.json: not JSON: Expecting property name"),
        ("[]", "config.json: found a list, expected an object"),
        (None, "no config.json in"),
    ],
)
def test_bad_config(config: str | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config, "utf-8")
    with pytest.raises(WorkbenchError) as caught:
        read_config(tmp_path, "base")
    assert message in caught.value.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_named(dtype: torch.dtype, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs_module, "BLOCK_ELEMENTS", 8)
    spoiled = torch.ones(3, 5, 4, dtype=dtype)
    spoiled[2, 1, 3] = value
    save_file({"good": torch.ones(2), "bad": spoiled, "count": torch.tensor([3, 1])}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path, "brick 'x'")
    assert load(checkpoint, "count", torch.float32).tolist() == [3, 1]
    with pytest.raises(WorkbenchError, match=rf"^brick 'x': bad holds {value} at \[2, 1, 3\]"):
        load(checkpoint, "bad", torch.float32)


def test_a_large_sum_is_not_infinite(tmp_path: Path) -> None:
    save_file({"a": torch.full((4, 4), 3e38)}, tmp_path / SINGLE)
    assert load(Checkpoint(tmp_path, "base"), "a", torch.float32).max() == torch.tensor(3e38)


def test_odd_shapes_and_sources_without_their_checkpoint(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "none": torch.empty(3, 0), "bool": torch.tensor([True, False]),
               "half": torch.randn(5, dtype=torch.float16), "double": torch.ones(2, 2, dtype=torch.float64)}  # fmt: skip
    save_file(tensors, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path, "base")
    written = write_checkpoint(checkpoint, tmp_path / "out", dtype=None, shard_size=GB, device=CPU, threads=2).digests
    assert list(written) == list(checkpoint.specs)
    again = load_file(tmp_path / "out" / SINGLE)
    for name, value in tensors.items():
        assert torch.equal(again[name], value)
        assert again[name].dtype == value.dtype
        assert tensor_digest(value) == written[name] == entry_digest(checkpoint.entries[name])
    save_file({"a": torch.ones(2, 2)}, tmp_path / SINGLE)
    source = Checkpoint(tmp_path, "base").open("a", CPU)
    out = torch.zeros(2, 2)
    source.read(0, 2, out)
    assert out.sum() == 4


# -- writer


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 100))
@settings(max_examples=80, deadline=None)
def test_plan_shards(sizes: list[int], shard_size: int) -> None:
    specs = {f"t{i}": TensorSpec.of((n,), torch.int8) for i, n in enumerate(sizes)}
    shards = plan_shards(specs, shard_size)
    assert [n for shard in shards for n in shard.specs] == list(specs)
    assert all(shard.nbytes <= shard_size or len(shard.specs) == 1 for shard in shards)
    assert all(a.nbytes + next(iter(b.specs.values())).nbytes > shard_size for a, b in pairwise(shards))
    assert len({shard.name for shard in shards}) == len(shards)
    assert all(len(shard.header()) % 8 == 0 for shard in shards), "tensors start at multiples of eight bytes"
    assert (len(shards) == 1) == (shards[0].name == SINGLE)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs_module, "BLOCK_ELEMENTS", 200)


@pytest.mark.usefixtures("small_blocks")
def test_bytes_do_not_depend_on_threads_or_shards(llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(llama, "base")
    digests = []
    for threads in (1, 2, 4):
        out = tmp_path / f"threads-{threads}"
        digests.append(write_checkpoint(checkpoint, out, dtype=torch.float16, shard_size=GB, device=CPU, threads=threads).digests)
        assert files_of(out) == files_of(tmp_path / "threads-1")
    for size in (1, 5_000, 20_000):
        out = tmp_path / f"shards-{size}"
        written = write_checkpoint(checkpoint, out, dtype=torch.float16, shard_size=size, device=CPU, threads=2)
        assert written.sha256 == {file: sha256_of(file) for file in out.glob("*.safetensors")}
        digests.append(written.digests)
        again = Checkpoint(out, "again")
        assert tensor_digests(again.entries) == digests[0]
        assert len(list(out.glob("*.safetensors"))) > 1
        assert set(json.loads((out / INDEX).read_text("utf-8"))["weight_map"]) == set(checkpoint.specs)
    assert all(d == digests[0] for d in digests)
    for name, value in tensors_of(llama).items():
        assert torch.equal(tensors_of(tmp_path / "threads-1")[name], value.to(torch.float16))


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("then", [20_000, GB])
@pytest.mark.usefixtures("small_blocks")
def test_resume(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: int) -> None:
    """After an interruption: finished tensors are kept where their bytes are right, and another shard size leaves no stale file."""
    checkpoint = Checkpoint(llama, "base")
    out, whole = tmp_path / "out", tmp_path / "whole"
    write_checkpoint(checkpoint, whole, dtype=None, shard_size=then, device=CPU, threads=1)
    real = writer._write_tensor
    calls: list[str] = []

    def interrupted(weights: Any, name: str, place: Any, device: torch.device) -> str:
        if len(calls) == 9:
            raise Interrupt
        calls.append(name)
        return real(weights, name, place, device)

    def resumed(weights: Any, name: str, place: Any, device: torch.device) -> str:
        calls.append(name)
        return real(weights, name, place, device)

    monkeypatch.setattr(writer, "_write_tensor", interrupted)
    with pytest.raises(Interrupt):
        write_checkpoint(checkpoint, out, dtype=None, shard_size=20_000, device=CPU, threads=1)
    first, *_ = calls
    place = reader.read_header(next(f for f in sorted(out.glob("*.safetensors")) if first in reader.read_header(f)))[first]
    with place.file.open("r+b") as stream:  # a block that never reached the disk
        stream.seek(place.offset + 8)
        stream.write(b"\0" * 8)
    with (out / JOURNAL).open("a") as stream:
        stream.write('{"tensor": "model.la')
    done = list(calls)
    calls.clear()
    monkeypatch.setattr(writer, "_write_tensor", resumed)
    write_checkpoint(checkpoint, out, dtype=None, shard_size=then, device=CPU, threads=1)
    assert files_of(out) == files_of(whole)
    if then == 20_000:
        assert calls == [n for n in checkpoint.specs if n not in done[1:]]
    else:
        assert calls == list(checkpoint.specs)


def test_progress_and_failure(llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = Checkpoint(llama, "base")
    write_checkpoint(
        checkpoint, tmp_path / "a", dtype=None, shard_size=GB, device=CPU, threads=2, progress=lambda *a: seen.append(a)
    )
    assert seen == sorted(seen)
    assert seen[-1] == (sum(s.nbytes for s in checkpoint.specs.values()),) * 2
    large = save_finetuned(llama, tmp_path / "large", seed=1, scale=1e6, dtype=torch.float32)
    with pytest.raises(WorkbenchError, match="not finite in F16"):
        write_checkpoint(Checkpoint(large, "x"), tmp_path / "b", dtype=torch.float16, shard_size=GB, device=CPU, threads=2)


@pytest.mark.parametrize("threads", [1, 4])
def test_in_memory_are_the_written_bytes(llama: Path, tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        checkpoint = Checkpoint(llama, "base")
        written = write_checkpoint(checkpoint, tmp_path, dtype=torch.float16, shard_size=GB, device=CPU, threads=1)
        loaded = load_all(checkpoint, torch.float16, CPU, threads)
        assert list(loaded) == list(checkpoint.specs)
        assert {name: tensor_digest(t) for name, t in loaded.items()} == written.digests
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# -- digests


def test_memory_equals_disk(llama: Path) -> None:
    checkpoint = Checkpoint(llama, "base")
    on_disk = tensor_digests(checkpoint.entries)
    assert on_disk == {name: tensor_digest(t) for name, t in tensors_of(llama).items()}
    assert on_disk == {name: tensor_digest(load(checkpoint, name, spec.dtype)) for name, spec in checkpoint.specs.items()}


def test_digests_are_remembered_and_ignore_bookkeeping(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "m"
    shutil.copytree(llama, copy)
    first = tensor_digests(Checkpoint(copy, "x").entries, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("workbench.weights.digests.entry_digest", lambda _entry: pytest.fail("read again"))
        assert tensor_digests(Checkpoint(copy, "x").entries, tmp_path) == first
    save_finetuned(llama, copy, seed=1)
    assert tensor_digests(Checkpoint(copy, "x").entries, tmp_path) != first
    checkpoint = Checkpoint(llama, "base")
    digests = tensor_digests(checkpoint.entries)
    digest: Callable[..., str] = lambda **changes: weights_digest(checkpoint.specs, digests, {**checkpoint.config, **changes})  # noqa: E731
    assert digest() == digest(transformers_version="9", _name_or_path="x", dtype="float32", use_cache=False)
    assert digest() != digest(rms_norm_eps=1e-3)
    other = {**digests, next(iter(digests)): "0" * 32}
    assert weights_digest(checkpoint.specs, other, checkpoint.config) != digest()
    name, spec = next(iter(checkpoint.specs.items()))
    for same_bytes in (TensorSpec.of(spec.shape[::-1], spec.dtype), TensorSpec.of(spec.shape, torch.float16)):
        assert weights_digest({**checkpoint.specs, name: same_bytes}, digests, checkpoint.config) != digest()


def test_json_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "x.json", {"b": [1]})
    edit_json(tmp_path / "a" / "x.json", c=2)
    assert read_json(tmp_path / "a" / "x.json") == {"b": [1], "c": 2}
    (tmp_path / "cut.json").write_text('{"a": ', "utf-8")
    assert read_json(tmp_path / "cut.json") is None
    assert read_json(tmp_path / "none.json") is None
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.json"]
