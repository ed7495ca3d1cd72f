"""Exact float32 on every device, staged copies, and results of one kind of device that never mix with those of another."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.card import CUDA, card
from worlds.commands import call, refused
from worlds.project import CPU, Project

from workbench.models.identity import computed_on
from workbench.run.materialize import configuration_digest, known_digest, remember_digest
from workbench.weights import writer
from workbench.weights.device import Landing, Staging, exact, prepare
from workbench.weights.specs import TensorSpec
from workbench.weights.writer import Shard, layout_digest, write_checkpoint

OPERATORS = {
    "cuda.matmul": torch.backends.cuda.matmul, "cudnn.conv": torch.backends.cudnn.conv, "cudnn.rnn": torch.backends.cudnn.rnn,
    "mkldnn.matmul": torch.backends.mkldnn.matmul, "mkldnn.conv": torch.backends.mkldnn.conv,
}  # fmt: skip


def precisions() -> dict[str, str]:
    return {name: operator.fp32_precision for name, operator in OPERATORS.items()}


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """A test may change torch's settings; they are global."""
    before, everywhere = precisions(), torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = everywhere
    for name, value in before.items():
        OPERATORS[name].fp32_precision = value


@pytest.mark.parametrize("way", ["set_float32_matmul_precision", "fp32_precision"])
def test_exact_wins_over_what_the_program_asked_for(way: str) -> None:
    """A program can ask torch for TF32 and bfloat16 inside float32 products in two ways. Convolutions use TF32 by default."""
    if way == "fp32_precision":
        torch.backends.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("medium")
    before = precisions()
    assert before["cuda.matmul"] == "tf32"
    with exact():
        assert set(precisions().values()) == {"ieee"}
    assert precisions() == before


def test_exact_restores_and_asks_for_operators_that_repeat_on_cuda_alone() -> None:
    before = precisions()
    with pytest.raises(KeyError), exact():
        raise KeyError
    assert precisions() == before
    with exact(CPU):
        assert not torch.are_deterministic_algorithms_enabled()
    with exact(CUDA):
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_program_that_uses_torchs_newer_settings_can_run_a_recipe(project: Project) -> None:
    """The older `allow_tf32` raises there."""
    project.write("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n")
    code = (
        "import torch; torch.backends.fp32_precision = 'tf32'\n"
        "import workbench; print(workbench.load_recipe('recipes/test.yaml').run(device='cpu').status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project.path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.parametrize(("given", "expected"), [(None, ":4096:8"), (":16:8", ":16:8"), (":0:0", ":4096:8")])
def test_products_on_cuda_get_a_fixed_workspace(given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    prepare(CPU)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == given
    prepare(CUDA)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected


# -- results of two kinds of device


class Ones:
    """Weights whose tensors are all ones; remembers what was opened."""

    def __init__(self) -> None:
        self.specs = {name: TensorSpec.of((4, 4), torch.float32) for name in "abc"}
        self.opened: list[str] = []

    def origin(self, name: str) -> str:
        return name

    def open(self, name: str, device: torch.device) -> Ones:
        self.opened.append(name)
        return self

    def read(self, start: int, stop: int, out: torch.Tensor) -> None:
        if self.opened == ["a", "b"]:
            raise KeyboardInterrupt
        out.fill_(1)


@pytest.mark.parametrize("other", [False, True])
def test_a_write_is_not_resumed_on_another_kind_of_device(other: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(weights: Ones) -> None:
        write_checkpoint(weights, tmp_path, dtype=None, shard_size=1 << 20, device=CPU, threads=1)  # type: ignore[arg-type]

    if other:  # the first attempt leaves the journal that a CUDA device would leave
        monkeypatch.setattr(writer, "layout_digest", lambda shards, _device: layout_digest(shards, CUDA))
    with pytest.raises(KeyboardInterrupt):
        write(Ones())
    monkeypatch.undo()
    weights = Ones()
    weights.opened.append("resumed")
    write(weights)
    assert ("a" in weights.opened) == other
    assert "b" in weights.opened


def test_a_write_is_not_resumed_with_another_layout_device_or_library(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [Shard("x", {"a": TensorSpec.of((2,), torch.float32)})]
    others = [Shard("x", {"a": TensorSpec.of((2,), torch.bfloat16)})]
    assert len({layout_digest(shards, CPU), layout_digest(shards, CUDA), layout_digest(others, CPU)}) == 3
    assert layout_digest(shards, CUDA) == layout_digest(shards, torch.device("cuda:1"))
    before = layout_digest([], CPU)
    monkeypatch.setattr("workbench.weights.writer.installed", lambda *names: dict.fromkeys(names, "another"))
    assert layout_digest([], CPU) != before


def test_a_digest_of_another_device_or_of_other_libraries_is_not_taken(project: Project) -> None:
    resolved = project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n")
    digest, _ = configuration_digest(resolved, CPU)
    memo = resolved.cache / "configurations" / f"{resolved.key}.json"
    kind, libraries = computed_on(CPU)
    kept = json.loads(memo.read_text("utf-8"))
    del kept["xxh3"]  # of the memo itself
    assert kept == {kind: {"digest": digest, "libraries": libraries}}
    other = {"digest": "of cuda", "libraries": libraries}
    memo.write_text(json.dumps({"cuda": other}), "utf-8")
    assert known_digest(resolved.cache, resolved.key) == "of cuda", "scores of a GPU machine are found on one without"
    assert configuration_digest(resolved, CPU)[0] == digest
    assert known_digest(resolved.cache, resolved.key) == digest, "that of this machine comes first"
    assert json.loads(memo.read_text("utf-8"))["cuda"] == other
    memo.write_text(json.dumps({kind: {"digest": "kept", "libraries": libraries}}), "utf-8")
    assert configuration_digest(resolved, CPU)[0] == "kept"
    remember_digest(resolved, "of a run on cuda", CUDA)
    assert [known_digest(resolved.cache, resolved.key, device) for device in (CPU, CUDA)] == ["kept", "of a run on cuda"]
    for outdated in (
        {kind: {"digest": "kept", "libraries": {**libraries, "torch": "2.0"}}},
        {"digest": "of 0.2", "device": "cpu"},
    ):
        memo.write_text(json.dumps(outdated), "utf-8")
        assert configuration_digest(resolved, CPU)[0] == digest, "of other libraries, or of an earlier format"


# -- copies


def test_staging_and_landing_on_the_cpu() -> None:
    staging = Staging(CPU)
    first = staging.room(8)
    first.fill_(1)
    assert staging.send(first).data_ptr() == first.data_ptr()
    assert staging.room(4).data_ptr() == first.data_ptr()
    landing = Landing(6, "BF16", CPU)
    block = torch.tensor([[1.0, 1.00390625, 2.0]])
    room = landing.rounded(block)
    room.copy_(block)
    assert bytes(landing.bytes_of(room)) == bytes(block.bfloat16().view(-1).view(torch.uint8).numpy().data)


@pytest.mark.parametrize(
    ("place", "size"),
    [(card, 16), pytest.param(nullcontext, 1 << 26, marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])],
)  # fmt: skip
def test_staged_blocks_are_not_overwritten_while_they_are_copied(place: Any, size: int) -> None:
    """The card of host memory ends each copy as late as it may: when it is waited for, or when the block is read."""
    with place():
        staging = Staging(CUDA)
        sent = []
        for value in range(8):
            room = staging.room(size)
            room.fill_(value)
            sent.append(staging.send(room))
        assert [int(block.max()) for block in sent] == [int(block.min()) for block in sent] == list(range(8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_threads_see_what_the_main_thread_has_queued() -> None:
    """Factors of an edit are made on the main thread and read by all."""
    from workbench.weights.device import each

    matrix = torch.randn(4096, 4096, device=CUDA)
    product = matrix
    for _ in range(20):
        product = torch.nn.functional.normalize(product @ matrix)
    seen: dict[str, torch.Tensor] = {}
    each(lambda name: seen.__setitem__(name, product.clone()), [str(i) for i in range(16)], 8, CUDA)
    assert all(torch.equal(value, product) for value in seen.values())


# -- plan


def test_a_plan_for_cuda_counts_buffers_on_the_device_and_staged_blocks(project: Project) -> None:
    """By hand: each tensor of the tiny model is one block. On the device float32 buffers, and two stored blocks of each input; page-locked
    buffers are powers of two, of each size some."""
    from workbench.run.plan import plan

    resolved = project.resolve("bricks: {one: bricks/full}\nsteps: [{merge: task_arithmetic}]\n")
    on_cpu, on_cuda = (plan(resolved, project.path / "runs", 3, cuda=cuda) for cuda in (False, True))
    elements = max(spec.numel for spec in resolved.base.weights.specs.values())
    stored = 2 * elements  # bf16
    assert on_cuda.device_bytes == 3 * ((1 + 6) * 4 * elements + 2 * 2 * stored)
    sizes = {2 ** math.ceil(math.log2(2 * spec.numel)) for spec in resolved.base.weights.specs.values()}
    assert on_cuda.peak_bytes - 250_000_000 == 3 * (2 * 2 + 1) * sum(sizes)
    assert on_cpu.device_bytes == 0
    assert on_cpu.peak_bytes != on_cuda.peak_bytes


def test_plan_says_what_the_device_holds_and_refuses_others(project: Project, cwd: Path) -> None:
    recipe = str(project.write("bricks: {one: bricks/full}\nsteps: [{merge: task_arithmetic}]\n"))
    for device, shown in (("cuda:1", True), ("cpu", False)):
        assert (" on the device, " in call("plan", recipe, "--device", device).stdout) == shown
    error = refused("plan", recipe, "--device", "gpu")
    assert (error.exit_code, "--device gpu: expected auto, cpu, cuda or cuda:N" in error.message) == (2, True)
