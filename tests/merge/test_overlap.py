"""Overlap of bricks: the RV coefficient from factors and from dense deltas, the weights that follow, and steps that use them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from worlds.factored import Lora, adapters, delta, flat_copy, lora, product, relative, step_on
from worlds.merging import InMemory
from worlds.project import CPU, Project

from workbench.ground.errors import WorkbenchError
from workbench.merge.measuring.matrices import overlap
from workbench.merge.streaming.deltas import WeightsDelta
from workbench.models.layout import Model
from workbench.recipe.methods import method
from workbench.recipe.recipe import dump_step
from workbench.resolve.keys import StepKey
from workbench.run.plan import plan
from workbench.steps import MergeMethod
from workbench.weights.specs import load

METHODS = ["task_arithmetic", "tsv", "ties", "dare"]


def rv(one: np.ndarray, two: np.ndarray) -> float:
    """Robert & Escoufier 1976, for deltas [out, in], literally."""
    norms = np.linalg.norm(one.T @ one), np.linalg.norm(two.T @ two)
    return float(np.linalg.norm(one.T @ two) ** 2 / (norms[0] * norms[1]))


def measured(bricks: dict[str, Any], base: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Any:
    """The overlap that a step on these bricks measures, and its weights."""
    step = step_on("task_arithmetic", base, bricks, weights="auto")
    if config:
        step._base = step._current = Model(InMemory(base), {"num_hidden_layers": 2, **config})
    return step.overlap(CPU)


@pytest.mark.parametrize(("rows", "cols"), [(24, 18), (18, 24)])
@pytest.mark.parametrize("dense", [False, True])
def test_coefficients_are_those_of_the_definition(rows: int, cols: int, dense: bool) -> None:
    bricks = adapters((2, 5, 7), rows=rows, cols=cols, names=("layers.0.w", "layers.1.w"))
    for brick in bricks.values():
        brick.dense = tuple(brick.pairs) if dense else ()
    base = {name: torch.zeros(rows, cols) for name in ("layers.0.w", "layers.1.w")}
    found = measured(bricks, base)
    names = list(bricks)
    expected = [[np.mean([rv(product(bricks[a], n), product(bricks[b], n)) for n in base]) for b in names] for a in names]
    np.testing.assert_allclose(found.pairs, expected, rtol=1e-6)
    assert list(found.layers) == [0, 1]
    first = [[rv(product(bricks[a], "layers.0.w"), product(bricks[b], "layers.0.w")) for b in names] for a in names]
    np.testing.assert_allclose(found.layers[0], first, rtol=1e-6)
    for name, row in zip(names, expected, strict=True):
        assert found.weights[name] == pytest.approx(1 / sum(row), rel=1e-6)


def test_overlap_counts_scale_free_matrices_and_experts() -> None:
    one, two = lora(3, seed=1), lora(4, seed=2)
    turned = Lora({"w": (two.pairs["w"][0] * -8.0, two.pairs["w"][1])})
    base = {"w": torch.zeros(24, 18)}
    first, second = measured({"a": one, "b": two}, base), measured({"a": one, "b": turned}, base)
    assert first.pairs[0][1] == pytest.approx(second.pairs[0][1], rel=1e-9)
    # b0 and b1 are one delta, b2 writes to other outputs: 1/2, 1/2 and 1, and the sum is b0 + b2.
    left, right = torch.zeros(24, 3), torch.randn(3, 18, generator=torch.Generator().manual_seed(0))
    left[:3] = torch.eye(3)
    other = torch.zeros(24, 3)
    other[10:13] = torch.eye(3)
    bricks = {"b0": Lora({"w": (left, right)}), "b1": Lora({"w": (left, right)}), "b2": Lora({"w": (other, right)})}
    base = {"w": torch.zeros(24, 18)}
    found = measured(bricks, base)
    assert found.weights == pytest.approx({"b0": 0.5, "b1": 0.5, "b2": 1.0})
    merged = load(step_on("task_arithmetic", base, bricks, weights="auto"), "w", torch.float32, CPU)
    assert relative(merged, product(bricks["b0"]) + product(bricks["b2"])) < 1e-6
    one, two = lora(3, seed=1, names=("layers.0.w", "layers.1.w")), lora(3, seed=1, names=("layers.0.w",))
    base = {n: torch.zeros(24, 18) for n in ("layers.0.w", "layers.1.w", "layers.0.norm")}
    assert measured({"a": one, "b": two}, base).pairs[0][1] == pytest.approx(0.5)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    found = measured(
        {"a": lora(3, seed=1, names=names), "b": lora(3, seed=1, names=names)}, {n: torch.zeros(24, 18) for n in names}
    )
    assert (found.layers, found.pairs[0][1], found.weights) == ({}, 0.0, {"a": 1.0, "b": 1.0})
    base = {"v": torch.zeros(9)}
    same = {n: WeightsDelta(InMemory({"v": torch.ones(9)})) for n in "ab"}
    assert measured(same, base).pairs[0][1] == 0
    assert overlap([], []).weights == {}
    # Two bricks that change different experts of one stack do not overlap; those that change the same one do.
    base = {"w": torch.zeros(2, 6, 5)}
    change = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))

    def brick(expert: int) -> WeightsDelta:
        stack = torch.zeros(2, 6, 5)
        stack[expert] = change
        return WeightsDelta(InMemory({"w": stack}))

    assert measured({"a": brick(0), "b": brick(1)}, base).pairs[0][1] == 0
    assert measured({"a": brick(0), "b": brick(0)}, base).pairs[0][1] == pytest.approx(1)


@pytest.mark.parametrize("dense", [False, True])
def test_conv1d_is_measured_on_its_outputs(dense: bool) -> None:
    """GPT-2 stores [in, out]: the coefficient of the stored deltas' transposes."""
    name = "transformer.h.0.mlp.c_fc.weight"
    bricks = adapters((2, 3), names=(name,))
    for brick in bricks.values():
        brick.dense = (name,) if dense else ()
    base = {name: torch.zeros(24, 18)}
    found = measured(bricks, base, {"model_type": "gpt2"})
    one, two = (product(b, name).T for b in bricks.values())
    assert found.pairs[0][1] == pytest.approx(rv(one, two), rel=1e-6)
    assert rv(one, two) != pytest.approx(rv(one.T, two.T), rel=1e-2)


def test_tsv_with_auto_is_its_formula() -> None:
    """Each brick's values are divided by the cosines of its vectors with the whitened ones, which the overlap has counted."""
    deltas, weights = overlapping()
    written = {"b0": 1.0, "b1": -2.0, "b2": 0.5}
    parts = [np.linalg.svd(d.double().numpy(), full_matrices=False) for d in deltas]
    left = np.concatenate([u[:, :3] * np.sign(w) for (u, _, _), w in zip(parts, written.values(), strict=True)], 1)
    right = np.concatenate([v[:3] for _, _, v in parts], 0)
    white = [u @ v for u, _, v in (np.linalg.svd(m, full_matrices=False) for m in (left, right))]
    values = []
    for i, ((_, s, _), name) in enumerate(zip(parts, written, strict=True)):
        own = slice(3 * i, 3 * i + 3)
        by_square = s[:3] ** 2 / np.sum(s[:3] ** 2)
        kept = [(a * b).sum(0) @ by_square for a, b in ((left[:, own], white[0][:, own]), (right[own].T, white[1][own].T))]
        assert max(kept) < 0.95
        values.append(abs(written[name]) * weights[name] * s[:3] / (kept[0] * kept[1]))
    expected = white[0] @ np.diag(np.concatenate(values)) @ white[1]
    assert relative(delta("tsv", deltas, bricks=written, weights="auto"), expected) < 1e-5


def overlapping() -> tuple[list[torch.Tensor], dict[str, float]]:
    """Three deltas that have much in common, and the weights of their overlap."""
    shared = torch.randn(14, 10, generator=torch.Generator().manual_seed(5))
    deltas = [shared + 0.5 * torch.randn(14, 10, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    base = {"w": torch.zeros(14, 10)}
    tuned = {f"b{i}": WeightsDelta(InMemory({"w": d})) for i, d in enumerate(deltas)}
    return deltas, measured(tuned, base).weights


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_equal_bricks_add_up_to_one(method: str, dense: bool) -> None:
    """Whatever a method does about what bricks have in common, `auto` does not do it again: matrices and vectors."""
    table = "model.embed_tokens.weight"
    brick = lora(3, seed=2, names=("w", table))
    brick.dense = ("w",) if dense else ()
    base = {"w": torch.zeros(24, 18), table: torch.zeros(24, 18), "norm": torch.zeros(9)}
    bricks: dict[str, Any] = {f"b{i}": brick for i in range(3)}
    if dense:
        tuned = {n: flat_copy({"b": brick}, n)[0] for n in ("w", table)} | {"norm": torch.arange(9.0)}
        bricks = {f"b{i}": WeightsDelta(InMemory(tuned)) for i in range(3)}
    whole = {"density": 1.0} if method in ("ties", "dare") else {}
    step = step_on(method, base, bricks, weights="auto", **whole)
    for name in ("w", table):
        assert relative(load(step, name, torch.float32, CPU), product(brick, name)) < 1e-5
    if dense:
        torch.testing.assert_close(load(step, "norm", torch.float32, CPU), tuned["norm"], atol=1e-5, rtol=1e-5)


def test_auto_in_keys_and_records(project: Project) -> None:
    """Results of `auto` before whitening was made up for are not taken from a cache; steps without it keep their keys."""
    text = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: tsv%s}]\n"
    plain, auto = (project.resolve(text % extra, f"t{i}.yaml") for i, extra in enumerate(("", ", weights: auto")))
    parts = [resolved.recipe.steps[0].key_parts(StepKey(resolved, resolved.digests, 0)) for resolved in (plain, auto)]
    assert parts[1] == [*parts[0], {"auto": 2}]
    # The run's record has the weights; the same weights written out give the same tensors; keys without the field stay.
    text = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: task_arithmetic, weights: auto}]\n"
    row = project.run(text)["steps"][0]["overlap"]
    weights, pairs = row["weights"], row["rv"]
    assert pairs["one"][0] == pairs["two"][1] == 1
    assert weights["one"] == pytest.approx(1 / sum(pairs["one"]), rel=1e-12)
    written = (
        f"bricks: {{one: bricks/one, two: bricks/two}}\nsteps: [{{merge: task_arithmetic, bricks: {json.dumps(weights)}}}]\n"
    )
    found, expected = project.tensors(text), project.tensors(written)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
    plain = method(MergeMethod, "task_arithmetic").model_validate({"merge": "task_arithmetic"})
    assert "weights" not in dump_step(plain)


def test_ties_and_core_space_with_auto() -> None:
    with pytest.raises(ValueError, match="take what bricks have in common away twice: leave out `divide`"):
        method(MergeMethod, "ties").model_validate({"merge": "ties", "weights": "auto", "divide": "count"})
    assert method(MergeMethod, "ties").model_validate({"merge": "ties", "weights": "auto"}).divide == "weight"
    assert method(MergeMethod, "ties").model_validate({"merge": "ties"}).divide == "count"
    bricks = adapters((3, 4))
    base = {"w": torch.zeros(24, 18)}
    full, core = (step_on("task_arithmetic", base, bricks, weights="auto", space=space) for space in ("full", "core"))
    torch.testing.assert_close(load(full, "w", torch.float32, CPU), load(core, "w", torch.float32, CPU), atol=1e-5, rtol=0)


# -- in a recipe


def test_plan_counts_the_measurement(project: Project) -> None:
    """Checkpoints are read once more, whole tensor by whole tensor; other methods refuse the field."""
    steps = "steps: [{merge: task_arithmetic%s}]\n"
    text = "bricks: {full: {checkpoint: bricks/full}, one: bricks/one}\n" + steps
    plain, weighed = (
        plan(project.resolve(text % extra, f"r{i}.yaml"), project.path / "runs")
        for i, extra in enumerate(("", ", weights: auto"))
    )
    size = sum(p.stat().st_size for p in (project.path / "bricks" / "full").glob("*.safetensors"))
    assert 0.9 * size < weighed.read_bytes - plain.read_bytes < 1.1 * size
    assert weighed.peak_bytes > plain.peak_bytes
    with pytest.raises(WorkbenchError, match="weights"):
        project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: average, weights: auto}]\n", "average.yaml")
