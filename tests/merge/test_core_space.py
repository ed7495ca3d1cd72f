"""The core space: lossless where a method is linear or turns with its deltas, adapters that differ, vanish or repeat, recipes."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.commands import document
from worlds.factored import (
    CORE,
    METHODS,
    SPECTRAL,
    Lora,
    adapters,
    delta,
    flat_copy,
    iso_formula,
    lora,
    product,
    relative,
    step_on,
)
from worlds.merging import InMemory
from worlds.project import CPU, Project
from worlds.tiny import save_adapter

from workbench.adapters.read import WEIGHTS
from workbench.ground.errors import WorkbenchError
from workbench.merge.streaming.deltas import WeightsDelta
from workbench.weights.specs import load

INVARIANT = [name for name, cls in METHODS.items() if cls.laws.rotation_invariant]


@pytest.mark.parametrize(
    ("method", "fields", "weights"),
    [("average", {}, (1 / 3, 1 / 3, 1 / 3)), ("linear", {"bricks": {"b0": 1, "b1": 2, "b2": 5}}, (1 / 8, 2 / 8, 5 / 8)),
     ("task_arithmetic", {"lambda": 0.4, "bricks": {"b0": 1, "b1": -2, "b2": 3}}, (0.4, -0.8, 1.2))],
)  # fmt: skip
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 8, 3), (12, 16, 9)])
def test_core_is_lossless_for_linear_methods(method: str, fields: Any, weights: Any, ranks: tuple[int, int, int]) -> None:
    """1e-6 of the delta's norm, in float32; ranks may sum to more than the tensor's rows or columns."""
    bricks = adapters(ranks)
    exact = sum(w * product(b) for w, b in zip(weights, bricks.values(), strict=True))
    base = {"w": torch.zeros(24, 18)}
    for space in ("core", "full"):
        step = step_on(method, base, bricks, space=space, **fields)
        assert relative(load(step, "w", torch.float32, CPU), exact) < 1e-6
        update = step.update("w", CPU)
        assert update is not None
        assert update.rank == (min(sum(ranks), 18) if space == "core" else sum(ranks))
        assert relative(update.left.double() @ update.right.double(), exact) < 1e-6


def test_ties_in_the_core_is_its_formula() -> None:
    """U · ties(UᵀτV) · Vᵀ with singular bases of the stacked factors; signs of basis vectors do not matter."""
    bricks = adapters((3, 2))
    u = np.linalg.svd(np.concatenate([b.pairs["w"][0].double().numpy() for b in bricks.values()], 1), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate([b.pairs["w"][1].double().numpy() for b in bricks.values()], 0), full_matrices=False)[2]
    cores = [torch.from_numpy(u.T @ product(b) @ v.T).float() for b in bricks.values()]
    expected = u @ delta("ties", cores, density=0.4).double().numpy() @ v
    for fields in ({}, {"threshold": "model"}):
        step = step_on("ties", {"w": torch.zeros(24, 18)}, bricks, space="core", density=0.4, **fields)
        assert relative(load(step, "w", torch.float32, CPU), expected) < 1e-5


@pytest.mark.parametrize("brick", ["whole deltas", "factors"])
def test_iso_c_stays_in_the_span_of_adapters(brick: str) -> None:
    """The paper's mean over all values puts most of the energy outside the adapters' span."""
    made = {f"b{i}": lora(3, 60, 50, seed=i) for i in range(3)}
    bricks = made if brick == "factors" else None
    base = {"w": torch.zeros(60, 50)}
    found = load(step_on("iso_c", base, bricks), "w", torch.float32, CPU) if bricks else delta("iso_c", flat_copy(made))
    basis = np.linalg.qr(np.concatenate([b.pairs["w"][0].double().numpy() for b in made.values()], 1))[0]

    def outside(matrix: np.ndarray) -> float:
        return float(np.linalg.norm(matrix - basis @ (basis.T @ matrix)) ** 2 / np.linalg.norm(matrix) ** 2)

    assert outside(found.double().numpy()) < 1e-10
    assert outside(iso_formula([product(b) for b in made.values()])) > 0.5
    spectrum = np.linalg.svd(found.double().numpy())[1]
    assert np.allclose(spectrum[:9], spectrum[0], rtol=1e-5)
    assert spectrum[9] < 1e-5 * spectrum[0]


@pytest.mark.parametrize("method", [m for m in CORE if METHODS[m].laws.permutation_invariant])
def test_order_and_names_change_no_byte_in_the_core(method: str) -> None:
    bricks = adapters((3, 5, 2))
    keys = dict(zip(bricks, "xyz", strict=True))
    base = {"w": torch.randn(24, 18, generator=torch.Generator().manual_seed(9))}
    found = []
    for order in permutations(bricks):
        renamed = {f"n{i}": bricks[name] for i, name in enumerate(order)}
        step = step_on(method, base, renamed, {f"n{i}": keys[name] for i, name in enumerate(order)}, space="core")
        found.append(load(step, "w", torch.float32, CPU))
    assert all(torch.equal(f, found[0]) for f in found)
    assert not torch.equal(found[0], base["w"])


@pytest.mark.parametrize("method", INVARIANT)
def test_rotation_invariance_as_declared(method: str) -> None:
    """method(QτP) = Q method(τ) P; TIES, which works element by element, declares otherwise."""
    generator = torch.Generator().manual_seed(5)
    deltas = [torch.randn(12, 9, generator=generator) for _ in range(3)]
    q, p = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (12, 9))
    expected = (q @ delta(method, deltas) @ p).double().numpy()
    assert relative(delta(method, [q @ d @ p for d in deltas]), expected) < 2e-6
    assert relative(delta("ties", [q @ d @ p for d in deltas]), (q @ delta("ties", deltas) @ p).double().numpy()) > 0.1


# -- adapters that differ, vanish or repeat


@pytest.mark.parametrize("method", CORE)
def test_one_adapter_in_the_core(method: str) -> None:
    """A lone adapter comes back exactly where the method says so."""
    brick = lora(4)
    fields = {"density": 1} if method in ("ties", "dare") else {}
    found = load(step_on(method, {"w": torch.zeros(24, 18)}, {"a": brick}, space="core", **fields), "w", torch.float32, CPU)
    same = relative(found, product(brick)) < 1e-6
    assert same == (METHODS[method].laws.single_is_identity or method in ("ties", "dare"))


@pytest.mark.parametrize("method", CORE)
def test_zero_and_repeated_adapters(method: str) -> None:
    base = {"w": torch.randn(24, 18, generator=torch.Generator().manual_seed(9))}
    one = lora(4)
    nothing = Lora({"w": (torch.zeros(24, 4), torch.randn(4, 18))})
    step = step_on(method, base, {"a": nothing, "b": nothing}, space="core")
    assert torch.equal(load(step, "w", torch.float32, CPU), base["w"])
    update = step.update("w", CPU)
    assert update is not None
    assert update.rank == 0
    repeated = step_on(method, base, {"a": one, "b": one}, space="core").update("w", CPU)
    beside = step_on(method, base, {"a": one, "b": nothing}, space="core").update("w", CPU)
    for found in (repeated, beside):
        assert found is not None
        assert found.rank == 4, "directions that say nothing are left out"
        assert found.left.isfinite().all()


def test_adapters_on_different_tensors_and_dense_ones() -> None:
    """TSV-M of two adapters on different tensors is each of them: k counts the tensor's own triplets, not the core's."""
    bricks = {"a": lora(6, names=("u",)), "b": lora(6, seed=1, names=("v",))}
    step = step_on("tsv", {n: torch.zeros(24, 18) for n in ("u", "v", "x")}, bricks, space="core")
    assert step.merged == ["u", "v"]
    for name, brick in zip("uv", bricks.values(), strict=True):
        assert relative(load(step, name, torch.float32, CPU), product(brick, name)) < 1e-6
    pairs = {n: (torch.randn(24, 2), torch.randn(2, 18)) for n in ("u", "v")}
    base = {n: torch.zeros(24, 18) for n in ("u", "v")}
    bricks = {"a": Lora(pairs, dense=("v",)), "b": lora(3, names=("u", "v"))}
    step = step_on("task_arithmetic", base, bricks, space="core")
    assert step.whole(CPU) == ["v"]
    assert step.update("v", CPU) is None
    assert relative(load(step, "v", torch.float32, CPU), product(bricks["a"], "v") + product(bricks["b"], "v")) < 1e-6
    assert step_on("task_arithmetic", base, bricks).whole(CPU) == []


def test_what_has_no_update_or_an_empty_one() -> None:
    base = {"w": torch.randn(24, 18)}
    checkpoint = WeightsDelta(InMemory({"w": torch.randn(24, 18)}))
    assert step_on("task_arithmetic", base, {"a": lora(2), "b": checkpoint}).update("w", CPU) is None
    assert step_on("ties", base, adapters((2, 2))).update("w", CPU) is None
    assert step_on("slerp", base, adapters((2, 2))).update("w", CPU) is None
    assert step_on("linear", base, adapters((2, 2)), normalize=False).update("w", CPU) is None
    step = step_on("average", {"w": torch.zeros(24, 18), "x": torch.zeros(7)}, adapters((2,)))
    update = step.update("x", CPU)
    assert update is not None
    assert (update.left.shape, update.right.shape) == ((7, 0), (0, 1))


def test_declared_spaces_are_fields() -> None:
    for name, cls in METHODS.items():
        assert ("space" in cls.model_fields) == ("core" in cls.laws.spaces), name
    assert {"average", "linear", "task_arithmetic", "ties", *SPECTRAL} <= set(CORE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", CORE)
def test_cuda_agrees(method: str) -> None:
    base = {"w": torch.randn(24, 18, generator=torch.Generator().manual_seed(9))}
    for space in ("full", "core"):
        step = step_on(method, base, adapters((3, 5, 2)), space=space)
        on_cpu, on_gpu = (load(step, "w", torch.float32, torch.device(d)).cpu() for d in ("cpu", "cuda"))
        torch.testing.assert_close(on_gpu, on_cpu, atol=1e-5, rtol=1e-5)


# -- recipes


def run(project: Project, text: str, name: str) -> dict[str, Any]:
    made: dict[str, Any] = document("run", str(project.write(text, name)), "--quiet", "--device", "cpu")
    return made


@pytest.mark.parametrize("method", CORE)
def test_run_with_two_adapters_in_both_spaces(project: Project, method: str) -> None:
    """rank 8, and rank 4 rsLoRA, on four modules a layer of the tiny llama."""
    from worlds.tiny import tensors_of

    head = "bricks: {one: bricks/one, two: bricks/two}\noutput: {dtype: float32}\n"
    results = {}
    for space in ("full", "core"):
        document = run(project, f"{head}steps: [{{merge: {method}, space: {space}}}]\n", f"{method}-{space}.yaml")
        assert document["status"] == "done"
        assert document["steps"][0]["tensors"] == 16
        assert "merged_whole" not in document["steps"][0]
        results[space] = tensors_of(Path(document["model"]))
    base = {n: t.float() for n, t in tensors_of(project.path / "base").items()}
    moved = [n for n in base if not torch.equal(results["core"][n], base[n])]
    assert len(moved) == 16
    for name in moved:
        full, core = (results[s][name] - base[name] for s in ("full", "core"))
        same = relative(core, full.double().numpy()) < 1e-5
        assert same or not (METHODS[method].laws.rotation_invariant or method == "linear"), name
        assert not (same and method in ("ties", "dare")), "another basis, another vote"


def test_tensors_without_factors_are_merged_whole_and_named(project: Project) -> None:
    file = save_adapter(project.path / "base", project.path / "saved", seed=5, modules_to_save=["norm"]) / WEIGHTS
    save_file({name: t if t.dim() > 1 else t + 0.5 for name, t in load_file(file).items()}, file)
    told: list[str] = []
    text = "bricks: {one: bricks/one, saved: saved}\nsteps: [{merge: ties, space: core}]\n"
    (step,) = project.run(text, events=lambda event: told.append(event.get("text", "")))["steps"]
    norms = [name for name, tensor in load_file(project.path / "base" / "model.safetensors").items() if tensor.dim() == 1]
    whole = step["merged_whole"]
    assert sorted(whole) == sorted(norms)
    assert f"space: core: 9 tensors without low-rank factors are merged as whole deltas: {', '.join(whole[:3])}" in told


def test_core_refuses_before_work(project: Project) -> None:
    text = "bricks: {one: bricks/one, full: bricks/full}\nsteps: [{merge: tsv, space: core}]\n"
    with pytest.raises(WorkbenchError, match=r"brick 'full' is a checkpoint, but `space: core` merges the factors") as caught:
        project.resolve(text)
    assert "space: full" in (caught.value.hint or "")
    assert "brick extract" in (caught.value.hint or "")
    assert "test.yaml:4" in caught.value.message
    project.resolve(text.replace("core", "full"))
    project.write("bricks: {one: bricks/one}\nsteps: [{merge: tsv}]\n", "inner.yaml")
    with pytest.raises(WorkbenchError, match="brick 'r' is a recipe"):
        project.resolve("bricks: {r: {recipe: recipes/inner.yaml}}\nsteps: [{merge: average, space: core}]\n")
    with pytest.raises(WorkbenchError, match="`normalize: false` scales the base") as caught:
        project.resolve("bricks: {one: bricks/one}\nsteps: [{merge: linear, normalize: false, space: core}]\n")
    assert caught.value.exit_code == 2
