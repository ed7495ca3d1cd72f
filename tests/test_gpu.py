"""CUDA agrees with the CPU: run, eval, chat."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from worlds.fact_world import FACTS, TEXT
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

RECIPE = """
bricks: {one: bricks/one, two: bricks/two, full: bricks/full}
steps: [{merge: ties, density: 0.5}, {grow: depth, blocks: 1}]
"""


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in bf16 steps."""
    ordered = [torch.where(t < 0, -32768 - t, t) for t in (x.view(torch.int16).int() for x in (a, b))]
    return int((ordered[0] - ordered[1]).abs().max())


def test_run_agrees_within_one_ulp(project: Project) -> None:
    on_cpu = Path(project.run(RECIPE, out=project.path / "cpu")["model"])
    shutil.rmtree(project.path / "runs")
    on_gpu = Path(project.run(RECIPE, device=torch.device("cuda"), out=project.path / "gpu")["model"])
    expected, found = (load_file(p / "model.safetensors") for p in (on_cpu, on_gpu))
    assert expected.keys() == found.keys()
    assert max(ulps(expected[name], found[name]) for name in expected) <= 1


# A kind of computation each: products, counts and random masks, decompositions, texts through a live model, gradients, growth.
KINDS = {
    "combination": "{merge: task_arithmetic}", "counts": "{merge: ties, density: 0.3}", "masks": "{merge: dare, density: 0.5}",
    "core": "{merge: tsv}", "texts": "{merge: regmean, calibration: rows.jsonl}",
    "gradients": "{merge: fisher, calibration: rows.jsonl, samples: 4}",
    "edit": "{edit: memit, facts: facts.jsonl, layers: [1], contexts: 1, statistics: text.txt, tokens_per_input: 4, min_efficacy: 0, unconverged: skip}",
    "finetune": "{edit: finetune, facts: facts.jsonl, epochs: 4, min_efficacy: 0}",
    "train": "{grow: brick, data: rows.jsonl, steps: 3, rank: 2}",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("card", ["cuda", "cuda:1"])
def test_each_kind_repeats_its_bytes_and_agrees_with_the_cpu(kind: str, card: str, project: Project) -> None:
    """In two projects, so that nothing is cached; on four threads, whose copies overlap."""
    if card == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    write_jsonl(project.path / "facts.jsonl", FACTS)
    (project.path / "text.txt").write_text(TEXT * 20)
    write_jsonl(project.path / "rows.jsonl", [{"prompt": f"w{i} w{i + 1} is", "completion": f"w{i + 2}"} for i in range(8)])
    text = f"bricks: {{one: bricks/one, full: bricks/full}}\nsteps: [{KINDS[kind]}]\noutput: {{dtype: float32}}\n"
    results = []
    for place in (card, card, "cpu"):
        made = Path(project.run(text, device=torch.device(place), threads=4)["model"])
        results.append({file.name: load_file(file) for file in made.glob("*.safetensors")})
        for folder in ("runs", ".workbench"):
            shutil.rmtree(project.path / folder)
    first, again, expected = results
    assert first.keys() == again.keys() == expected.keys()
    for name, tensors in first.items():
        assert all(torch.equal(tensors[key], again[name][key]) for key in tensors), name
        if kind not in ("edit", "finetune", "train"):  # descents, in which last bits grow
            torch.testing.assert_close(tensors, expected[name], rtol=1e-3, atol=1e-4)


def test_a_merge_stays_within_its_planned_memory(project: Project) -> None:
    from workbench.run.plan import plan

    text = "bricks: {one: bricks/one, full: bricks/full}\nsteps: [{merge: ties, density: 0.3}]\n"
    planned = plan(project.resolve(text), project.path / "runs", 4, cuda=True).device_bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    project.run(text, device=torch.device("cuda"), threads=4)
    assert torch.cuda.max_memory_allocated() - before <= planned + (64 << 20)  # cuBLAS's workspace


def test_live_model_agrees(project: Project) -> None:
    from workbench.run.materialize import materialize

    resolved = project.resolve(RECIPE + "output: {dtype: float32}\n")
    tokens = torch.arange(1, 17)[None] % 32
    with torch.no_grad():
        expected = materialize(resolved, CPU)(tokens).logits
        found = materialize(resolved, torch.device("cuda"))(tokens.cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_eval_agrees(project: Project) -> None:
    from worlds.suites import mini_suite

    mini_suite(project)
    project.write(RECIPE + "output: {dtype: float32}\n")
    results = []
    for device in ("cpu", "cuda"):
        command = [sys.executable, "-m", "workbench", "eval", "recipes/test.yaml", "--suite", "mini", "--device", device, "--json",
                   "--runs-dir", f"runs-{device}"]  # fmt: skip
        done = subprocess.run(command, cwd=project.path, capture_output=True, text=True, check=True)
        tasks = [c["tasks"]["mini"] for c in json.loads(done.stdout)["configurations"]]
        results.append([(task["acc"]["value"], task["margin"]["value"]) for task in tasks])
    for (accuracy, margin), (other, other_margin) in zip(*results, strict=True):
        assert accuracy == other
        assert margin == pytest.approx(other_margin, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_agree_with_lm_evals_loop(dtype: torch.dtype, tasks_dir: Path, tokenizer: Any) -> None:
    """Masks, prefix and head on the device: the check that every evaluation makes, with its own tolerance."""
    from worlds.local_tasks import A, suite, tiny

    from workbench.evaluate import build_plan, score

    plan = build_plan(suite(tasks=["pick"], num_fewshot=3), tokenizer, tasks_dir=tasks_dir,
                      dtype=str(dtype).removeprefix("torch."), batch_size=4)  # fmt: skip
    scores, _ = score(plan, A, tiny().to(dtype), device="cuda")
    assert scores.plan == plan.digest, "the scorer was refused"
    assert scores.check is not None
    assert scores.check.max_difference <= scores.check.tolerance


def test_chat_agrees(project: Project) -> None:
    project.write(RECIPE + "output: {dtype: float32}\n")
    answers = [
        subprocess.run([sys.executable, "-m", "workbench", "chat", "recipes/test.yaml", "--plain", "--max-new-tokens", "8", "--device", device],
                       cwd=project.path, input="a b c\n", capture_output=True, text=True, check=True).stdout
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    assert answers[0] == answers[1]
