"""Files that change while a command reads them are refused, and no memo, mask or cache takes one content for another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.dense import write_facts_file, write_text
from worlds.project import CPU, Project
from worlds.tiny import edit_json, save_finetuned, tensors_of

from workbench.adapters.read import Adapter
from workbench.ground import identity
from workbench.ground.files import file_digest
from workbench.ground.identity import FileIdentity, InputChangedError, WatchedFiles, identity_of, open_unchanged, settled_identity
from workbench.steps import Memo
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import digests_known, entry_digest, fingerprint, tensor_digests
from workbench.weights.specs import load

FULL = "bricks: {full: own/full}\nsteps: [{merge: task_arithmetic, bricks: {full: 0.5}}]\noutput: {dtype: float32}\n"


@pytest.fixture
def own(project: Project, llama: Path) -> Project:
    """The project with a checkpoint brick that a test may change."""
    save_finetuned(llama, project.path / "own" / "full", seed=11)
    return project


def overwrite(brick: Path, llama: Path, seed: int) -> None:
    """Other content in the same file, with the times of the old one put back: `cp -p` of a file of equal age and size."""
    file = brick / "model.safetensors"
    before = file.stat()
    other = save_finetuned(llama, brick.parent / "other", seed=seed) / "model.safetensors"
    file.write_bytes(other.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def at_event(stage: str, act: Callable[[], None], last: bool = False) -> Callable[[dict[str, Any]], None]:
    """An event handler that acts once: at the first event of a stage, or where all of it is done."""
    done: list[bool] = []

    def handler(event: dict[str, Any]) -> None:
        if event["stage"] == stage and not done and (not last or ("done" in event and event["done"] == event["total"])):
            done.append(True)
            act()

    return handler


@pytest.mark.parametrize("replaced", [False, True], ids=["overwritten", "renamed over"])
@pytest.mark.parametrize("when", ["before the first tensor", "after the last tensor"])
def test_a_brick_that_changes_during_a_run(own: Project, llama: Path, when: str, replaced: bool) -> None:
    """The run is refused, and the next one computes from the new file: it neither says "finished before" nor keeps old digests."""
    brick = own.path / "own" / "full"

    def change() -> None:
        if replaced:
            shutil.copyfile(save_finetuned(llama, brick.parent / "other", seed=12) / "model.safetensors", brick / "new")
            (brick / "new").rename(brick / "model.safetensors")
        else:
            overwrite(brick, llama, 12)

    with pytest.raises(
        InputChangedError, match=r"own/full/model.safetensors: the file changed while this command was reading it"
    ):
        own.run(FULL, events=at_event("write", change, when == "after the last tensor"))
    result = own.run(FULL)
    written = tensors_of(Path(result["model"]))
    base, tuned = tensors_of(own.path / "base"), tensors_of(brick)
    for name, tensor in written.items():
        assert torch.equal(tensor, base[name].float() + 0.5 * (tuned[name].float() - base[name].float())), name
    record = json.loads((Path(result["run"]) / "run.json").read_text())
    assert record["inputs"]["bricks"]["full"]["digest"] == own.resolve(FULL).bricks["full"].digest(None)


def test_equal_size_and_time_are_not_equal_content(own: Project, llama: Path, tmp_path: Path) -> None:
    """The memo of digests notices `cp -p` of another file of the same size and time."""
    brick = own.path / "own" / "full"
    first = tensor_digests(Checkpoint(brick, "x").entries, tmp_path)
    assert digests_known(Checkpoint(brick, "x").entries, tmp_path)
    stamp = own.resolve(FULL).stamp
    overwrite(brick, llama, 12)
    now = tensor_digests(Checkpoint(brick, "x").entries, tmp_path)
    assert now == tensor_digests(Checkpoint(brick, "x").entries)
    assert all(now[name] != first[name] for name in first)
    assert own.resolve(FULL).stamp != stamp


def test_every_reader_refuses_a_changed_file(own: Project, llama: Path, tmp_path: Path) -> None:
    """Headers, blocks, digests and adapters: offsets of one file are never used on another."""
    brick = own.path / "own" / "full"
    opened, fresh = Checkpoint(brick, "x"), Checkpoint(brick, "x")
    name = next(iter(opened.entries))
    source = opened.open(name, CPU)
    source.read(0, 1, torch.empty(1, opened.specs[name].cols))
    shutil.copytree(own.path / "bricks" / "one", tmp_path / "one")
    adapter = Adapter(tmp_path / "one", "a")
    part = adapter.keys.parts[0].fields["lora_A"]
    overwrite(brick, llama, 12)
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, tmp_path / "one" / "adapter_model.safetensors")
    for read in (
        lambda: source.read(0, 1, torch.empty(1, opened.specs[name].cols)),
        lambda: fresh.open(name, CPU),
        lambda: load(fresh, name, torch.float32),
        lambda: entry_digest(fresh.entries[name]),
        lambda: tensor_digests(fresh.entries, tmp_path),
        lambda: fingerprint(fresh.entries),
        lambda: part.read(),
        lambda: part.columns(0, 2),
    ):
        with pytest.raises(InputChangedError):
            read()
    assert not (tmp_path / "digests").exists(), "a refused digest leaves no memo"


def test_digests_taken_while_streaming_belong_to_the_file_that_was_read(own: Project, llama: Path, tmp_path: Path) -> None:
    brick = own.path / "own" / "full"
    checkpoint = Checkpoint(brick, "x")
    for name, spec in checkpoint.specs.items():
        load(checkpoint, name, spec.dtype)
    assert len(checkpoint.streamed) == len(checkpoint.specs)
    overwrite(brick, llama, 12)
    with pytest.raises(InputChangedError):
        tensor_digests(checkpoint.entries, tmp_path, checkpoint.streamed)
    assert tensor_digests(Checkpoint(brick, "x").entries, tmp_path) == tensor_digests(Checkpoint(brick, "x").entries)


@pytest.mark.parametrize("file", ["facts.jsonl", "text.txt", "base/tokenizer.json"])
def test_small_inputs_that_change_poison_no_cache(project: Project, llama: Path, file: str) -> None:
    """Facts, texts and the tokenizer are part of a key before they are read; an edit of others is not kept under that key."""
    write_facts_file(project.path / "facts.jsonl", 4)
    write_text(project.path / "text.txt")
    (project.path / "base").unlink()
    shutil.copytree(llama, project.path / "base")
    step = {"edit": "memit", "facts": "facts.jsonl", "layers": [1], "position": "subject_last", "contexts": 1,
            "statistics": "text.txt", "clamp": 20.0, "confidence": 0.3}  # fmt: skip
    text = f"steps: [{json.dumps(step)}]\noutput: {{dtype: float32}}\n"

    def change() -> None:
        if file == "facts.jsonl":
            write_facts_file(project.path / file, 3)
        else:
            (project.path / file).write_text((project.path / file).read_text() + "\n")

    with pytest.raises(InputChangedError, match=file):
        project.run(text, events=at_event("edit", change))
    assert not list((project.path / ".workbench" / "edits").glob("[0-9a-f]*")), "nothing was kept"
    kept = project.run(text)["configuration"]
    shutil.rmtree(project.path / ".workbench")
    shutil.rmtree(project.path / "runs")
    assert project.run(text)["configuration"] == kept


def test_an_identity_is_taken_when_a_later_write_would_change_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writes within a tick of the kernel's clock leave the same times, so a file that was just written is waited for."""
    waited: list[float] = []
    monkeypatch.setattr("workbench.ground.identity.time.sleep", waited.append)
    with (tmp_path / "x").open("w") as file:
        now = identity_of(file.fileno()).ctime_ns
        ticks = identity._TICKS_NS
        for age, waits in ((-1, False), (0, True), (5_000_000, True), (ticks - 1, True), (ticks, False), (25_000_000, False)):
            monkeypatch.setattr("workbench.ground.identity.time.time_ns", lambda age=age: now + age)
            settled_identity(file.fileno())
            assert bool(waited) == waits
            waited.clear()


def test_what_a_stored_key_takes_of_an_identity(tmp_path: Path) -> None:
    """All but the device, whose number may differ when the machine has started again."""
    info = tmp_path.stat()
    assert identity_of(tmp_path)[:5] == (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    one = FileIdentity(1, 2, 3, 4, 5, 6, read_only=False)
    assert one.storable == one._replace(device=9).storable
    assert all(
        one.storable != one._replace(**{field: 9}).storable for field in ("inode", "size", "mtime_ns", "ctime_ns", "system")
    )


def test_a_file_that_changed_is_not_read(tmp_path: Path) -> None:
    """Neither one that another identity is expected of, nor one that is written to while its digest is taken."""
    import xxhash

    file = tmp_path / "x"
    file.write_text("a")
    before = identity_of(file)
    assert identity.settled(file) == before
    file.write_text("bc")
    with pytest.raises(InputChangedError, match=f"{file}: the file changed"), open_unchanged(file, before):
        pytest.fail("read all the same")

    made = xxhash.xxh3_128

    class Written:
        def __init__(self) -> None:
            self.inner = made()

        def update(self, data: bytes) -> None:
            self.inner.update(data)
            file.write_text("other")

        def hexdigest(self) -> str:
            return self.inner.hexdigest()

    assert file_digest(file) == xxhash.xxh3_128_hexdigest(b"bc")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("workbench.weights.digests.xxhash.xxh3_128", Written)
        with pytest.raises(InputChangedError, match=f"{file}: the file changed"):
            file_digest(file)


def test_a_package_that_is_missing_has_no_version() -> None:
    assert identity.installed("torch", "no-such-package") == {"torch": torch.__version__, "no-such-package": "not installed"}


def test_watched_files(tmp_path: Path) -> None:
    file, watched = tmp_path / "x", WatchedFiles()
    file.write_text("a")
    assert watched.read(file) == b"a"
    watched.check()
    file.write_text("b")
    with pytest.raises(InputChangedError, match="changed"):
        watched.check()
    with pytest.raises(InputChangedError, match="changed"):
        watched.read(file)
    file.unlink()
    with pytest.raises(InputChangedError, match="removed"):
        watched.check()


def test_a_digest_is_that_of_all_bytes_in_their_order(own: Project) -> None:
    """A sample that was read before counts for nothing, and rows that were left out or read twice make no digest."""
    checkpoint = Checkpoint(own.path / "own" / "full", "x")
    name = "model.layers.0.mlp.up_proj.weight"
    rows, cols = checkpoint.specs[name].shape

    def read(*blocks: tuple[int, int]) -> str | None:
        source = checkpoint.open(name, CPU)
        for start, stop in blocks:
            source.read(start, stop, torch.empty(stop - start, cols))
        return checkpoint.streamed.pop(name, None)

    expected = entry_digest(checkpoint.entries[name])
    assert read((0, 5), (5, rows)) == expected
    assert read((0, 5), (0, 3), (3, rows)) == expected
    assert read((0, 5), (6, rows)) is None
    assert read((0, 5), (4, 6), (5, rows)) == expected
    assert read((5, rows)) is None


@pytest.mark.parametrize("name", ["base/config.json", "base/generation_config.json", "own/full/config.json"])
def test_a_run_without_its_key_s_name_is_not_that_of_other_settings(own: Project, llama: Path, name: str) -> None:
    """A run is stopped when its result is whole: its folder still has the name of the files' times, which settings do not change."""
    (own.path / "base").unlink()
    shutil.copytree(llama, own.path / "base")

    def stop(event: dict[str, Any]) -> None:
        if event.get("text") == "done":
            raise KeyboardInterrupt

    stamp = own.resolve(FULL).stamp
    with pytest.raises(KeyboardInterrupt):
        own.run(FULL, events=stop)
    edit_json(own.path / name, temperature=0.9, rope_theta=77.0)
    assert own.resolve(FULL).stamp != stamp
    written = json.loads((Path(own.run(FULL)["model"]) / Path(name).name).read_bytes())
    assert (written.get("temperature"), written.get("rope_theta")) == ((0.9, 77.0) if name.startswith("base") else (None, None))


@pytest.mark.parametrize("file", ["own/full/model.safetensors", "bricks/one/adapter_model.safetensors", "base/model.safetensors"])
def test_inputs_are_looked_at_before_a_result_is_kept(own: Project, llama: Path, file: str) -> None:
    """Base, checkpoint bricks and adapters: what changed behind the last read is noticed."""
    for name in ("base", "bricks"):
        there = (own.path / name).resolve()
        (own.path / name).unlink()
        shutil.copytree(there, own.path / name)
    resolved = own.resolve("bricks: {full: own/full, one: bricks/one}\nsteps: [{merge: average}]\n")
    resolved.check_inputs()
    os.utime(own.path / file, ns=(1, 1))
    with pytest.raises(InputChangedError, match="the file changed"):
        resolved.check_inputs()


# Bricks that differ in few places.


@pytest.fixture
def alike(project: Project, llama: Path) -> Project:
    """Two checkpoint bricks that differ in one row of one matrix, at a place that no sample meets, and a third one."""
    for name, row in (("a", 3), ("b", 5)):
        place = save_finetuned(llama, project.path / "own" / name, seed=21)
        tensors = load_file(place / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][row] += 0.5
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    save_finetuned(llama, project.path / "own" / "c", seed=22)
    one, two = (fingerprint(Checkpoint(project.path / "own" / n, n).entries) for n in "ab")
    assert one == two, "the sample does not tell them apart"
    return project


DARE = "bricks: {NAME: own/PLACE}\nsteps: [{merge: dare, density: 0.5}]\noutput: {dtype: float32}\n"
ROW = "model.layers.0.mlp.up_proj.weight"


def mask(project: Project, place: str, name: str = "x") -> torch.Tensor:
    """Which elements of a tensor that both bricks share DARE keeps."""
    result = project.tensors(DARE.replace("NAME", name).replace("PLACE", place))[ROW]
    return result != tensors_of(project.path / "base")[ROW].float()


def test_masks_depend_on_all_of_a_brick(alike: Project) -> None:
    """Masks of two bricks agree no more often than independent ones, whatever they are called; one brick's mask is always the same."""
    one, two = mask(alike, "a"), mask(alike, "b")
    agree = (one == two).float().mean().item()
    assert 0.45 < agree < 0.55, "independent masks of density 0.5 agree at half of the places"
    assert torch.equal(one, mask(alike, "a", "other_name"))


def test_masks_depend_on_content_alone(alike: Project, llama: Path) -> None:
    """Not on the cache, the folder, the shards or the file's times."""
    cold = mask(alike, "a")
    assert (alike.path / ".workbench" / "digests").is_dir()
    assert torch.equal(mask(alike, "a"), cold), "warm"
    shutil.rmtree(alike.path / ".workbench")
    moved = alike.path / "own" / "moved"
    moved.mkdir()
    tensors = tensors_of(alike.path / "own" / "a")
    shards = [dict(list(tensors.items())[i::2]) for i in range(2)]
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, moved / file, metadata={"format": "pt"})
    index = {"weight_map": {n: f for f, shard in zip(files, shards, strict=True) for n in shard}}
    (moved / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(alike.path / "own" / "a" / name, moved / name)
    assert torch.equal(mask(alike, "moved"), cold)


TIES = "bricks: {B1: own/a, B2: own/b, c: own/c}\nsteps: [{merge: ties, density: 0.3}]\noutput: {dtype: float32}\n"


def test_the_memo_of_a_search_tells_bricks_apart(alike: Project) -> None:
    """Compositions that share a memo have the bytes that a run writes: one brick's threshold is never taken for another's."""
    memo = Memo()
    for brick in ("a", "b"):
        text = f"bricks: {{x: own/{brick}}}\nsteps: [{{merge: ties, density: 0.3}}]\noutput: {{dtype: float32}}\n"
        plain = alike.tensors(text)
        shared = composed(alike, text, memo)
        assert all(torch.equal(plain[name], shared[name]) for name in plain), brick
    assert len(memo) > 0


def composed(project: Project, text: str, memo: Memo) -> dict[str, torch.Tensor]:
    from dataclasses import replace

    from workbench.models.live import compute
    from workbench.run.compose import compose

    return compute(compose(replace(project.resolve(text), memo=memo), CPU).model, torch.float32, CPU)


def test_the_order_of_bricks_with_equal_samples_does_not_depend_on_their_names(alike: Project) -> None:
    one = alike.tensors(TIES.replace("B1", "a").replace("B2", "b"))
    two = alike.tensors(TIES.replace("B1", "z").replace("B2", "b"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    order = alike.resolve(TIES.replace("B1", "a").replace("B2", "b")).fingerprints
    renamed = alike.resolve(TIES.replace("B1", "z").replace("B2", "b")).fingerprints
    assert order["a"] == renamed["z"]
    assert order["a"] != order["b"]


def test_a_method_that_draws_nothing_reads_no_brick_ahead(alike: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the content is needed are whole bricks read before the first tensor."""
    read: list[str] = []
    original = tensor_digests

    def noted(entries: Any, *rest: Any) -> Any:
        read.append(next(iter(entries.values())).file.parent.name)
        return original(entries, *rest)

    monkeypatch.setattr("workbench.bricks.brick.tensor_digests", noted)
    alike.tensors("bricks: {a: own/a, c: own/c}\nsteps: [{merge: ties}]\n")
    assert read == []
    alike.tensors("bricks: {a: own/a, c: own/c}\nsteps: [{merge: dare}]\n")
    assert sorted(read) == ["a", "c"]
