"""Agreement with mergekit and PEFT, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from worlds.merging import merge, models
from worlds.project import CPU
from worlds.tiny import save_adapter, tensors_of

from workbench.adapters.bind import bind
from workbench.adapters.read import Adapter
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
