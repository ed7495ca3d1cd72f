"""Agreement with mergekit, PEFT and the papers' own formulas, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds.merging import ULP, merge, models, reference_trim
from worlds.project import CPU
from worlds.tiny import save_adapter, tensors_of

from workbench.adapters.bind import bind
from workbench.adapters.read import Adapter
from workbench.models.live import compute
from workbench.recipe.recipe import from_data
from workbench.resolve.resolve import resolve
from workbench.run.compose import compose
from workbench.weights.specs import TensorSpec

WEIGHTS = [0.5, 1.0, 1.5]
BRICKS = {f"brick{i}": w for i, w in enumerate(WEIGHTS)}


# -- mergekit


@pytest.fixture(scope="module")
def mergekit() -> Callable[..., Tensor]:
    """mergekit's in-memory merge of one tensor."""
    return pytest.importorskip("mergekit.merge_methods.api").merge_tensors  # type: ignore[no-any-return]


def within(ours: Tensor, theirs: Tensor, bound: float = 1e-6) -> None:
    assert float((ours - theirs).abs().max()) <= bound


def test_mergekit_linear_and_task_arithmetic(mergekit: Callable[..., Tensor]) -> None:
    base, bricks = models(3)
    for normalize in (True, False):
        ours = merge("linear", base, bricks, bricks=BRICKS, normalize=normalize)
        for name in base:
            tensors = [b[name] for b in bricks.values()]
            theirs = mergekit(tensors, "linear", parameters={"weight": WEIGHTS, "normalize": normalize})
            within(ours[name], theirs, 1e-6 * (1 if normalize else sum(WEIGHTS)))
    average = merge("average", base, bricks)
    for name in base:
        within(average[name], mergekit([b[name] for b in bricks.values()], "linear", parameters={"weight": 1.0}))
    base, bricks = models(3)
    ours = merge("task_arithmetic", base, bricks, bricks=BRICKS, **{"lambda": 0.7})
    for name in base:
        theirs = mergekit([base[name], *(b[name] for b in bricks.values())], "task_arithmetic", base_index=0,
                          parameters={"weight": WEIGHTS, "lambda": 0.7})  # fmt: skip
        within(ours[name], theirs)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.33, 0.5, 1.0])
def test_mergekit_ties(mergekit: Callable[..., Tensor], density: float) -> None:
    """mergekit's TIES is {sign: mass, weigh: before, divide: weight, threshold: tensor}."""
    base, bricks = models(3)
    ours = merge("ties", base, bricks, bricks=BRICKS, density=density,
                 sign="mass", weigh="before", divide="weight", threshold="tensor")  # fmt: skip
    for name in base:
        theirs = mergekit([base[name], *(b[name] for b in bricks.values())], "ties", base_index=0,
                          parameters={"weight": WEIGHTS, "density": density, "normalize": True})  # fmt: skip
        within(ours[name], theirs)


# -- TIES by its papers


def paper_ties(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Yadav et al. 2023, algorithm 1, weights applied to the elected values."""
    trimmed = torch.stack([reference_trim(d, density) for d in deltas])
    elected = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    total = torch.zeros_like(elected)
    for values, mask, weight in zip(trimmed, agrees, weights, strict=True):
        total += weight * torch.where(mask, values, 0)
    return total / agrees.sum(0).clamp(min=1)


# Not "model" with equal magnitudes: a model-wide threshold keeps all values equal to it, the reference the first ones.
@pytest.mark.parametrize(("threshold", "kind"), [("tensor", "random"), ("tensor", "equal magnitudes"), ("model", "random")])
@pytest.mark.parametrize("density", [0.1, 0.2, 0.6])
def test_paper_ties_exactly(density: float, threshold: str, kind: str) -> None:
    base = {n: torch.zeros_like(t) for n, t in models(0)[0].items()}  # on a base of zeros, result and delta are the same floats
    _, bricks = models(3, seed=7)
    bricks = {k: {n: t - models(3, seed=7)[0][n] for n, t in b.items()} for k, b in bricks.items()}
    if kind == "equal magnitudes":
        bricks = {k: {n: (t * 16).round() / 16 for n, t in b.items()} for k, b in bricks.items()}
    ours = merge("ties", base, bricks, density=density, threshold=threshold, bricks=dict.fromkeys(bricks, 1.0))
    if threshold == "tensor":
        expected = {n: paper_ties([b[n] for b in bricks.values()], [1.0] * 3, density) for n in base}
    else:
        joint = paper_ties([torch.cat([t.reshape(-1) for t in b.values()]) for b in bricks.values()], [1.0] * 3, density)
        parts = joint.split([t.numel() for t in base.values()])
        expected = {n: part.reshape(t.shape) for (n, t), part in zip(base.items(), parts, strict=True)}
    assert all(torch.equal(ours[n], expected[n]) for n in base)


@pytest.mark.parametrize("sign", ["mass", "frequency"])
def test_peft_ties(sign: str) -> None:
    """peft.utils.merge_utils.ties trims τ, votes unweighted, and divides Σ wτ̂ by the number that agree: {weigh: after, divide: count}.

    A vote of 0 (possible by frequency) is positive there and elects nothing here; three bricks that all speak cannot tie.
    """
    from peft.utils.merge_utils import ties

    base, bricks = models(3)
    density = 0.5 if sign == "mass" else 1.0
    ours = merge("ties", base, bricks, bricks=BRICKS, density=density, sign=sign, weigh="after", divide="count")
    for name in base:
        theirs = ties([b[name] - base[name] for b in bricks.values()], torch.tensor(WEIGHTS), density,
                      {"mass": "total", "frequency": "frequency"}[sign])  # fmt: skip
        within(ours[name] - base[name], theirs)


# -- PEFT's merge_and_unload

FLAVOURS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 32, r".*\.3\..*\.o_proj": 3}}),
    "rslora patterns": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}),
    "some layers": ("llama", {"layers_to_transform": [1, 3]}),
    "alpha 0": ("llama", {"lora_alpha": 0}),
    "untied": ("llama_untied", {"target_modules": ["lm_head", "q_proj"]}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gemma2": ("gemma2", {}),
    "opt": ("opt", {}),
}  # fmt: skip


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_peft_merge_and_unload(flavour: str, model_of: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    family, settings = FLAVOURS[flavour]
    base = model_of(family)
    save_adapter(base, tmp_path / "lora", seed=3, family=family.removesuffix("_untied"), **settings)
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(live, tmp_path / "lora").merge_and_unload(safe_merge=True).save_pretrained(tmp_path / "peft")
    theirs, before = tensors_of(tmp_path / "peft"), tensors_of(base)
    recipe = from_data(
        {"version": 1, "base": str(base), "bricks": {"x": str(tmp_path / "lora")}, "steps": [{"merge": "task_arithmetic"}]},
        tmp_path,
    )
    model = compose(resolve(recipe), CPU).model
    full, half = compute(model, torch.float32, CPU), compute(model, None, CPU)
    assert set(full) == set(before) == set(theirs)
    changed = [n for n in full if not torch.equal(full[n], before[n].float())]
    assert bool(changed) == (flavour != "alpha 0")
    for name in full:
        within(full[name], theirs[name])
        ulp = ULP[torch.bfloat16] * torch.maximum(theirs[name].abs(), before[name].float().abs())
        assert half[name].dtype == torch.bfloat16
        assert ((half[name].float() - theirs[name]).abs() <= ulp + 1e-12).all()


def test_square_conv1d_is_transposed(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """GPT-2's attention output is square: its shape does not tell [in, out] from [out, in]."""
    base = model_of("gpt2")
    adapter = Adapter(save_adapter(base, tmp_path / "lora", seed=3, family="gpt2", target_modules=["attn.c_proj"]), "x")
    bound = bind(adapter, {f"h.{i}.attn.c_proj.weight": TensorSpec.of((32, 32), torch.float32) for i in range(4)})
    assert all(name.startswith("h.") for name in bound.places)  # the base may lack the root that the adapter names
    a, b = (tensors_of(tmp_path / "lora")[f"base_model.model.transformer.h.0.attn.c_proj.lora_{x}.weight"] for x in "AB")
    factors = bound.factors("h.0.attn.c_proj.weight", CPU)
    assert factors is not None
    torch.testing.assert_close(factors.left @ factors.right, 2 * (b @ a).T)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_mergekit_slerp(mergekit: Callable[..., Tensor], t: float) -> None:
    base, bricks = models(2)
    far = {name: tensor.flip(0) for name, tensor in bricks["brick1"].items()}  # nearly orthogonal: no linear short cut
    for second in (bricks["brick1"], far):
        ours = merge("slerp", base, {"brick0": bricks["brick0"], "brick1": second}, bricks={"brick0": 1 - t, "brick1": t})
        for name in base:
            within(ours[name], mergekit([bricks["brick0"][name], second[name]], "slerp", parameters={"t": t}, base_index=0), 1e-6)


@pytest.mark.parametrize("then", ["sum", "ties"])
@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dare_by_formula(then: str, rescale: str) -> None:
    """Each brick's mask, drawn alone, put into mergekit's and the paper's formulas."""
    base, bricks = models(3)
    options = {"density": 0.4, "rescale": rescale}
    result = merge("dare", base, bricks, then=then, bricks=BRICKS, **options)
    for name in base:
        deltas = []
        for brick, weight in BRICKS.items():
            tau = bricks[brick][name] - base[name]
            alone = merge("dare", base, {brick: bricks[brick]}, density=0.4, rescale="none")[name]
            mask = ((alone - base[name]).abs() > 0.5 * tau.abs()).float()
            assert 0 < float(mask.mean()) < 1 or tau.numel() < 8
            kept = tau * mask
            scale = {"inverse": 1 / 0.4, "none": 1.0, "l1": float(tau.abs().sum() / kept.abs().sum().clamp_min(1e-30))}[rescale]
            deltas.append(weight * kept * scale)
        stack = torch.stack(deltas)
        expected = stack.sum(0)
        if then == "ties":
            agrees = torch.sign(stack) * torch.sign(expected) > 0
            mass = (agrees * torch.tensor(WEIGHTS).view(-1, *[1] * (stack.dim() - 1))).sum(0)
            expected = (stack * agrees).sum(0) / mass.where(mass > 0, torch.ones_like(mass))
        within(result[name] - base[name], expected, 2e-6)
