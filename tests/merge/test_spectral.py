"""TSV-M and Iso-C: worked examples, the papers' formulas in numpy, what is decomposed, adapters beside checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worlds.factored import METHODS, SPECTRAL, delta, iso_formula, relative, tsv_formula
from worlds.merging import InMemory
from worlds.project import Project

from workbench.merge.aim import Aim
from workbench.merge.fisher import Fisher
from workbench.models.layout import Model
from workbench.run.plan import plan

# -- worked examples


def test_iso_c_and_tsv_by_hand() -> None:
    """3 and 1 become 2 and 2; a third, zero singular value would make them 4/3 if it counted."""
    one, two = torch.zeros(3, 4), torch.zeros(3, 4)
    one[0, 0], two[1, 2] = 3.0, -1.0
    expected = torch.zeros(3, 4)
    expected[0, 0], expected[1, 2] = 2.0, -2.0
    torch.testing.assert_close(delta("iso_c", [one, two]), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(delta("iso_c", [one, two], **{"lambda": 0.5}), expected / 2, atol=1e-6, rtol=0)
    # weights: 3 and −5 give 4; a spectrum that is flat already stays
    torch.testing.assert_close(delta("iso_c", [one, two], bricks={"b0": 1, "b1": 5}), expected * 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(delta("iso_c", [expected]), expected, atol=1e-6, rtol=0)
    # 2×3, two bricks, one triplet each. Left vectors at 0° and 60° become −15° and 75°, right ones are orthogonal.
    one = torch.tensor([[2.0, 0, 0], [0, 0.5, 0]])  # the second triplet, 0.5, goes: k = 2 / 2
    two = torch.tensor([[0, 0, 0.5], [0, 0, math.sqrt(3) / 2]])
    low, high = math.cos(math.radians(75)), math.sin(math.radians(75))
    expected = torch.tensor([[2 * high, 0, low], [-2 * low, 0, high]])
    torch.testing.assert_close(delta("tsv", [one, two]), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(delta("tsv", [one, two], **{"lambda": 3}), expected * 3, atol=1e-6, rtol=0)
    # a weight scales the singular value, a negative one turns the brick around
    weighted = torch.stack([expected[:, 0] * -0.5, expected[:, 1], expected[:, 2] * 4], 1)
    torch.testing.assert_close(delta("tsv", [one, two], bricks={"b0": -0.5, "b1": 4}), weighted, atol=1e-6, rtol=0)
    # Two bricks with one direction: the nearest orthonormal pair is not unique; nothing leaves their span.
    same = torch.tensor([[1.0, 2, 2], [0, 0, 0]])
    torch.testing.assert_close(delta("tsv", [same * 3, same * 4]), same * 3.5, atol=1e-5, rtol=0)


# -- what is decomposed


@pytest.mark.parametrize("method", SPECTRAL)
def test_adapters_and_a_checkpoint_in_full_space(project: Project, method: str) -> None:
    """Every matrix at once with the deltas that a merge of each brick alone shows."""
    text = f"bricks: {{one: bricks/one, full: bricks/full}}\nsteps: [{{merge: {method}}}]\n"
    merged = project.tensors(text)
    alone = {b: project.tensors(f"bricks: {{b: bricks/{b}}}\nsteps: [{{merge: average}}]\n") for b in ("one", "full")}
    base = project.tensors("steps: []\n")
    formula = tsv_formula if method == "tsv" else iso_formula
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.gate_proj.weight"):
        deltas = [(alone[b][name] - base[name]).double().numpy() for b in ("one", "full")]
        if method == "tsv" and "gate_proj" in name:
            u, s, v = np.linalg.svd(deltas[1], full_matrices=False)
            expected = u[:, :16] @ np.diag(s[:16]) @ v[:16]  # the adapter does not reach it; half of 32 triplets stay
        elif method == "tsv":
            expected = low_rank_tsv(deltas, (8, 16))
        else:
            expected = formula(deltas)
        assert relative(merged[name] - base[name], expected) < 1e-4, name


def low_rank_tsv(deltas: list[np.ndarray], ranks: tuple[int, ...]) -> np.ndarray:
    """TSV-M with so many triplets of each."""
    parts = [
        [m[..., :r] if i < 2 else m[:r] for i, m in enumerate(np.linalg.svd(d, full_matrices=False))]
        for d, r in zip(deltas, ranks, strict=True)
    ]
    u1, _, v1 = np.linalg.svd(np.concatenate([p[0] for p in parts], 1), full_matrices=False)
    u2, _, v2 = np.linalg.svd(np.concatenate([p[2] for p in parts], 0), full_matrices=False)
    return (u1 @ v1) @ np.diag(np.concatenate([p[1] for p in parts])) @ (u2 @ v2)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "wudi"])
def test_plan_and_record_say_where_tensors_are_small_for_so_many_bricks(project: Project, method: str) -> None:
    """17 adapters of rank 8 on values of 16 rows; with four, only tsv leaves out directions there."""
    few, many = (", ".join(f"b{i}: bricks/one" for i in range(count)) for count in (4, 17))
    text = f"bricks: {{{many}}}\nsteps: [{{id: m, merge: {method}}}]\n"
    wanted = (
        "m: tensors with fewer rows or columns than there are bricks (17) get the weighted mean: 4, such as "
        "model.layers.0.self_attn.v_proj.weight [16, 32]"
    )
    assert wanted in plan(project.resolve(text), project.path / "runs").warnings
    assert wanted in json.loads((Path(project.run(text)["run"]) / "run.json").read_text("utf-8"))["warnings"]
    key = "model.layers.0.self_attn.v_proj.weight"
    mean = project.tensors(text.replace(method, "average"))
    torch.testing.assert_close(project.tensors(text)[key], mean[key], atol=1e-6, rtol=0)
    found = project.resolve(text.replace(many, few)).warnings
    assert not any("weighted mean" in warning for warning in found)
    cut = [warning for warning in found if "directions" in warning]
    assert bool(cut) == (method == "tsv")
    assert all(
        "an adapter's rank at 4 tensors, such as model.layers.0.self_attn.v_proj.weight [16, 32]: 4 of 8" in w for w in cut
    )
    elsewhere = text.replace("merge:", "where: {exclude: ['*v_proj*']}, merge:")
    assert not any("weighted mean" in warning for warning in project.resolve(elsewhere).warnings)


def test_memory_of_a_tensor_for_plan() -> None:
    """Base and three deltas in float32, and the places for what is decomposed in float64; averaged tensors and the core space hold no whole one."""
    specs = {
        "w": torch.zeros(10, 8),
        "norm": torch.zeros(8),
        "lm_head.weight": torch.zeros(10, 8),
        "experts": torch.zeros(2, 10, 8),
    }
    model = Model(InMemory(specs), {})
    for method, wide, square in (("tsv", 5, 6), ("iso_c", 4, 5)):
        step: Any = METHODS[method].model_validate({"merge": method})
        found = {name: step.tensor_bytes(model, name, 3) for name in specs}
        work = 8 * (wide * 80 + square * 64)
        assert found == {"w": 4 * 4 * 80 + work, "norm": 0, "lm_head.weight": 0, "experts": 4 * 4 * 160 + work}
        core: Any = METHODS[method].model_validate({"merge": method, "space": "core"})
        assert core.tensor_bytes(model, "w", 3) == 0
    fisher = Fisher.model_validate({"merge": "fisher", "calibration": "x.jsonl"})
    assert fisher.tensor_bytes(model, "w", 3) == 4 * 4 * 80, "the information of each brick, and its sum"
    aim = Aim.model_validate({"merge": "aim", "calibration": "x.jsonl"})
    live = Model(InMemory({"model.experts.w": specs["experts"], "norm": specs["norm"]}), {})
    assert aim.measure_bytes(live) == 8 * 168, "the whole model is live where experts are fused"
