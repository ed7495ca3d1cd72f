"""Every kind of step on a CUDA device that is made of host memory: no tensors of two devices meet, and the result is the CPU's.

The same on a real device, where one is: tests/test_gpu.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from worlds.card import CUDA, card
from worlds.fact_world import FACTS, TEXT
from worlds.jsonl import write_jsonl
from worlds.local_tasks import A, suite, tiny
from worlds.project import CPU, Project

from workbench.evaluate import build_plan, score
from workbench.evaluate.measured import CUDA as CUDA_MEMORY
from workbench.recipe.methods import methods
from workbench.run.materialize import configuration_digest, materialize, swap

ADAPTERS = ("one", "two", "three")
MIXED = ("one", "full")
CLOSED = "facts: facts.jsonl, layers: [1], contexts: 1, statistics: text.txt, tokens_per_input: 4, min_efficacy: 0, unconverged: skip, steps: 8"
LEARN = "facts: facts.jsonl, min_efficacy: 0"
# What an edit needs: neurons that write nothing, biases.
BEFORE = {"": "", "grow width": "{grow: width, neurons: 160}, ", "grow bias": "{grow: bias}, "}
# Step -> bricks. A second row of a method takes another way through the code.
STEPS: dict[str, tuple[str, ...]] = {
    "merge: aim, calibration: rows.jsonl": MIXED,
    "merge: average": MIXED,
    'merge: average, where: {layers: "1:3"}': MIXED,
    "merge: cocktail, examples: rows.jsonl": MIXED,
    "merge: consensus": ADAPTERS,
    "merge: dare, density: 0.5": MIXED,
    "merge: featcal, calibration: rows.jsonl": MIXED,
    "merge: fisher, calibration: rows.jsonl, samples: 4": MIXED,
    "merge: iso_c": MIXED,
    "merge: linear": MIXED,
    "merge: localize_and_stitch": MIXED,
    "merge: null_space, calibration: rows.jsonl, tokens: [w3], keep: one": MIXED,
    "merge: regmean, calibration: rows.jsonl": MIXED,
    "merge: slerp": MIXED,
    "merge: tall_mask, brick: one": MIXED,
    "merge: task_arithmetic": MIXED,
    "merge: ties, density: 0.3": MIXED,
    "merge: ties, density: 0.3, threshold: model": MIXED,
    "merge: ties, space: core": ADAPTERS,
    "merge: tsv": MIXED,
    "merge: wudi": MIXED,
    f"edit: adapter, {LEARN}, epochs: 2": (),
    f"edit: alphaedit, {CLOSED}": (),
    f"edit: emmet, {CLOSED}": (),
    f"edit: encore, {CLOSED}": (),
    f"edit: finetune, {LEARN}, epochs: 2, form: lora, rank: 4": (),
    f"edit: finetune, {LEARN}, epochs: 2": (),
    f"edit: grace, {LEARN}, steps: 3": (),
    f"edit: memit, {CLOSED}": (),
    f"edit: memory, {LEARN}": (),
    f"edit: patch, {LEARN}, after: grow width": (),
    f"edit: rome, {CLOSED}": (),
    "edit: steer, positive: rows.jsonl, negative: facts.jsonl, layers: [1], after: grow bias": (),
    f"edit: ultraedit, {LEARN}, layers: [1]": (),
    "grow: bias": (),
    "grow: depth, blocks: 1": (),
    "grow: experts, experts: 2": (),
    "grow: prune, layers: 1, neurons: 0.25, calibration: rows.jsonl": (),
    "grow: split_ffn, experts: 2, top_k: 1, calibration: rows.jsonl": (),
    "grow: stack, order: [0, 1, 1, 2, 3]": (),
    'grow: vocabulary, tokens: ["<a>"]': (),
    "grow: width, neurons: 160": (),
    **{f"route: {name}, calibration: '{{brick}}.jsonl'": ("one", "two") for name in ("arrow", "centroid", "ridge", "text")},
    "route: fixed, bricks: {one: 0.5, two: 0.5}": ("one", "two"),
}


def lay_out(folder: Path, project: Project) -> Project:
    """A project on the same models, with nothing cached."""
    folder.mkdir()
    made = Project.of(folder, project.path)
    write_jsonl(folder / "facts.jsonl", FACTS)
    (folder / "text.txt").write_text(TEXT * 20)
    rows = [{"prompt": f"w{i} w{i + 1} is", "completion": f"w{i + 2}"} for i in range(8)]
    write_jsonl(folder / "rows.jsonl", rows)
    for shift, brick in enumerate(("one", "two")):
        write_jsonl(folder / f"{brick}.jsonl", [{"prompt": f"w{20 * shift + i} w{i + 1} is"} for i in range(12)])
    return made


@pytest.mark.parametrize("step", STEPS)
def test_steps(step: str, project: Project, tmp_path: Path) -> None:
    (project.path / "recipes").rmdir()
    head = f"bricks: {{{', '.join(f'{b}: bricks/{b}' for b in STEPS[step])}}}\n" if STEPS[step] else ""
    own, _, after = step.partition(", after: ")
    text = f"{head}steps: [{BEFORE[after]}{{{own}}}]\noutput: {{dtype: float32}}\n"
    with sdpa_kernel(SDPBackend.MATH):  # as on a device
        expected = _files(lay_out(tmp_path / "host", project).run(text))
    there = lay_out(tmp_path / "card", project)
    with card() as seen:
        found = _files(there.run(text, device=CUDA))
    assert seen.mixed == []
    assert seen.unsteady == set()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def _files(document: dict[str, Any]) -> dict[str, torch.Tensor]:
    files = sorted(Path(document["run"]).rglob("*.safetensors"))
    return {f"{file.name}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_scores_and_answers(tasks_dir: Path, tokenizer: Any) -> None:
    """Packed rows, a shared prefix, texts, and the check against lm-eval's loop."""
    plan = build_plan(suite(num_fewshot=3), tokenizer, tasks_dir=tasks_dir, dtype="float32", batch_size=4)
    expected, rows = score(plan, A, tiny(), device="cpu")
    with card() as seen:
        found, others = score(plan, A, tiny(), device="cuda")
    assert seen.mixed == []
    assert found.plan == expected.plan, "the scorer was refused"
    assert others.keys() == rows.keys()
    for name, task in expected.tasks.items():
        assert found.tasks[name].metrics == task.metrics
        measured = found.tasks[name].measured
        assert measured is not None
        assert measured.peak_of == CUDA_MEMORY


def test_weights_are_swapped_and_restored(project: Project) -> None:
    base, mean = (project.resolve(f"bricks: {{one: bricks/one}}\nsteps: [{step}]\n", f"{name}.yaml")
                  for name, step in (("base", ""), ("mean", "{merge: average}")))  # fmt: skip
    tokens = torch.arange(1, 17)[None] % 32
    with torch.no_grad():
        expected = [materialize(resolved, CPU)(tokens).logits for resolved in (base, mean)]
    with card() as seen, torch.no_grad():
        model = materialize(base, CUDA)
        with swap(model, mean, configuration_digest(mean, CUDA)[1]):
            inside = model(tokens.to(CUDA)).logits.cpu()
        after = model(tokens.to(CUDA)).logits.cpu()
    assert seen.mixed == []
    torch.testing.assert_close([after, inside], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.part("fuse")
def test_nothing_is_left_out() -> None:
    named = {":".join(part.strip() for part in step.partition(",")[0].split(":")) for step in STEPS}
    left = {name for name in methods() if name not in named and "mergekit/" not in name}
    # Trained by transformers' Trainer, which asks for hardware; no weights on a device; a set of neurons first.
    assert left == {"grow:brick", "fuse:avgce", "fuse:mince", "grow:components", "grow:add_expert", "grow:prune_experts", "route:roles",
                    "edit:scale_neurons"}  # fmt: skip
