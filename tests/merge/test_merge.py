"""Merge methods: the laws that each declares, worked examples, steps on steps. Agreement with other tools: test_parity.py."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from worlds.merging import BASE, ONE, TWO, close, merge, models, reference_trim
from worlds.project import CPU

from workbench.ground.errors import WorkbenchError
from workbench.merge.streaming.trim import joint_trims, trims
from workbench.recipe.methods import methods
from workbench.steps import MergeMethod
from workbench.weights.sparse import Rows, Selection, select
from workbench.weights.specs import TensorSpec

# Those that read texts: test_calibration.py. mergekit's own need parameters and their number of bricks: test_mergekit.py.
METHODS = [
    cls
    for cls in methods().values()
    if issubclass(cls, MergeMethod) and not cls.name.startswith("mergekit/") and cls.laws.needs == "tensor"
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# -- laws, exactly as declared


def weighted(cls: type[MergeMethod], weight: float, count: int) -> dict[str, Any]:
    names = [f"brick{i}" for i in range(count)]
    return {"bricks": dict.fromkeys(names, weight)} if "weight" in cls.entry_type().model_fields and _takes_weights(cls) else {}


def _takes_weights(cls: type[MergeMethod]) -> bool:
    return "dict" in str(cls.model_fields["bricks"].annotation)


def test_classes_of_entries_are_complete_before_threads_use_them() -> None:
    """Pydantic below 2.14 validates an entry with the base class, which has no `density`, while another thread builds its class."""
    kinds = {cls.entry_type() for cls in methods().values() if issubclass(cls, MergeMethod)}
    assert {kind.model_config["defer_build"] for kind in kinds} == {False}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
def test_laws(cls: type[MergeMethod], dtype: torch.dtype) -> None:
    laws = cls.laws
    count = min(laws.arity[1] or 3, 3)
    base, bricks = models(count, dtype)
    result = merge(cls, base, bricks, dtype)

    same = merge(cls, base, dict.fromkeys(bricks, base), dtype)
    assert all(torch.equal(same[n], base[n]) for n in base), "bricks that are the base give the base"
    if _takes_weights(cls):
        try:
            zero: dict[str, Tensor] | None = merge(cls, base, bricks, dtype, **weighted(cls, 0.0, count))
        except (WorkbenchError, ValidationError):
            zero = None
        assert laws.zero_is_base == (zero is not None and all(torch.equal(zero[n], base[n]) for n in base))

    others = [merge(cls, base, {name: bricks[name] for name in order}, dtype) for order in permutations(bricks)]
    assert laws.permutation_invariant == all(torch.equal(other[n], result[n]) for other in others for n in base), (
        "the same bytes in any order"
    )

    single = merge(cls, base, {"brick0": bricks["brick0"]}, dtype) if laws.arity[0] == 1 else result
    if laws.single_is_identity:
        close(single, bricks["brick0"], base)
    else:
        assert any(not torch.allclose(single[n].float(), bricks["brick0"][n].float(), atol=1e-2) for n in base)

    if laws.linear_in_weight:
        f32 = {n: t.float() for n, t in base.items()}
        once, twice = (merge(cls, f32, bricks, **weighted(cls, w, 3)) for w in (1.0, 2.0))
        error = max(float(((twice[n] - f32[n]) - 2 * (once[n] - f32[n])).abs().max()) for n in base)
        assert error < 1e-5, "linear where it says so"


def test_laws_that_the_table_holds_for_ties_and_linear_too() -> None:
    """TIES with `weigh: after, divide: count` is homogeneous; with `divide: weight` weights cancel; linear divides them away."""
    base, bricks = models(3)
    weights = {f"brick{i}": w for i, w in enumerate((0.5, 1.0, 2.0))}
    double = {n: 2 * w for n, w in weights.items()}
    close(merge("linear", base, bricks, bricks=weights), merge("linear", base, bricks, bricks=double), base, ulps=4)
    by_weight = {"weigh": "before", "divide": "weight"}
    close(
        merge("ties", base, bricks, bricks=weights, **by_weight),
        merge("ties", base, bricks, bricks=double, **by_weight),
        base,
        ulps=4,
    )


# -- worked examples


def by_hand(method: str, **fields: Any) -> Tensor:
    return merge(method, {"w": BASE}, {"one": {"w": BASE + ONE}, "two": {"w": BASE + TWO}}, **fields)["w"] - BASE


@pytest.mark.parametrize(
    ("method", "fields", "expected"),
    [
        ("average", {}, [[0.2, -0.25, 0.4], [0.25, -0.2, -0.1]]),
        ("linear", {"bricks": {"one": 3, "two": 1}}, [[0.4, -0.175, 0.35], [0.225, -0.35, 0.15]]),
        # Σ wθ = 0.5 θ₁ + 1 θ₂: the base comes in one and a half times
        ("linear", {"bricks": {"one": 0.5, "two": 1}, "normalize": False},
         [[0.5 + 0.1, -1.0 - 0.45, 0.25 + 0.65], [0.125 + 0.4, 2.0 - 0.15, -0.5 - 0.4]]),
        ("task_arithmetic", {"lambda": 0.5, "bricks": {"one": 1, "two": -1}}, [[0.4, 0.15, -0.1], [-0.05, -0.3, 0.5]]),
        # Half of six values kept: one keeps .6 -.5 .4, two keeps -.4 .5 -.6. Signs elected by mass: + - +, 0 - -.
        ("ties", {"density": 0.5}, [[0.6, -0.4, 0.5], [0, -0.5, -0.6]]),
        # Four of six: one .6 .3 -.5 .4, two -.4 .5 .3 -.6; the third column of the first row agrees.
        ("ties", {"density": 4 / 6}, [[0.6, -0.4, 0.4], [0.3, -0.5, -0.6]]),
        ("ties", {"density": 1}, [[0.6, -0.25, 0.4], [0.25, -0.5, -0.6]]),
        ("ties", {"density": 1, "lambda": 2}, [[1.2, -0.5, 0.8], [0.5, -1.0, -1.2]]),
        # DARE that keeps all is task arithmetic, or the elected mean by weight.
        ("dare", {"density": 1, "lambda": 0.5, "bricks": {"one": 1, "two": -1}}, [[0.4, 0.15, -0.1], [-0.05, -0.3, 0.5]]),
        ("dare", {"density": 1, "then": "ties", "bricks": {"one": 1, "two": 4}}, [[-0.2, -0.34, 0.46], [0.28, -0.5, -0.6]]),
        ("dare", {"density": 0}, [[0, 0, 0], [0, 0, 0]]),
        # One vote a brick: two that differ cancel.
        ("ties", {"density": 1, "sign": "frequency"}, [[0, -0.25, 0.4], [0.25, 0, 0]]),
        # Weights after the vote: the same signs; the mean is of w·τ.
        ("ties", {"density": 1, "bricks": {"one": 1, "two": 4}}, [[0.6, -0.85, 1.15], [0.7, -0.5, -2.4]]),
        # Weights before: two's -0.8 outvotes 0.6, 0.4 does not outvote -0.5.
        ("ties", {"density": 1, "weigh": "before", "bricks": {"one": 1, "two": 4}}, [[-0.8, -0.85, 1.15], [0.7, -0.5, -2.4]]),
        ("ties", {"density": 1, "weigh": "before", "divide": "weight", "bricks": {"one": 1, "two": 4}},
         [[-0.2, -0.34, 0.46], [0.28, -0.5, -0.6]]),
        # A negative weight turns its brick around after the vote, and votes turned around before it.
        ("ties", {"density": 1, "bricks": {"one": -1, "two": 1}}, [[-0.6, -0.15, 0.1], [0.05, 0.5, -0.6]]),
        ("ties", {"density": 1, "weigh": "before", "bricks": {"one": -1, "two": 1}}, [[-0.4, -0.4, 0.5], [0.3, 0.3, -0.5]]),
        # A weight of 0 is a brick that says nothing: it counts like any other among those that agree.
        ("ties", {"density": 1, "bricks": {"one": 0, "two": 1}}, [[0, -0.2, 0.25], [0.15, 0, -0.6]]),
        ("ties", {"density": 0}, [[0, 0, 0], [0, 0, 0]]),
        ("ties", {"bricks": {"one": {"density": 0}, "two": {"density": 1}}}, TWO.tolist()),
    ],
)  # fmt: skip
def test_by_hand(method: str, fields: dict[str, Any], expected: list[list[float]]) -> None:
    torch.testing.assert_close(by_hand(method, **fields), torch.tensor(expected).float(), atol=1e-6, rtol=0)


def test_linear_without_weight_is_an_error() -> None:
    with pytest.raises(WorkbenchError, match="linear: the weights sum to 0 at w") as caught:
        by_hand("linear", bricks={"one": 1, "two": -1})
    assert "task_arithmetic" in (caught.value.hint or "")


# -- trim


class OneGroup:
    """What `trims` reads, over deltas in memory."""

    def __init__(self, delta: Tensor, elements: int) -> None:
        self.delta = delta
        self.spec = TensorSpec.of(tuple(delta.shape), delta.dtype)
        self.elements = elements

    device, memo = CPU, None

    def blocks(self) -> Any:
        for start, stop in self.spec.blocks(self.elements):
            yield type("Block", (), {"deltas": [self.delta[start:stop].clone()], "start": start})()

    def rows(self, start: int, stop: int) -> Rows:
        return Rows(None, [self.delta[start:stop]], [True])


@pytest.mark.parametrize("elements", [1, 7, 35, 10_000])
@pytest.mark.parametrize("kind", ["random", "few values", "all equal", "zeros", "small", "half zero"])
@pytest.mark.parametrize("density", [0, 0.01, 0.2, 0.5, 0.77, 1])
@pytest.mark.parametrize("how", ["in memory", "sampled", "two passes"])
def test_trim_keeps_exactly_the_first_largest(
    kind: str, density: float, elements: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(60, 7, generator=generator)
    delta = {"random": noise, "few values": (noise * 2).round() / 2, "all equal": noise.sign() * 0.1, "zeros": noise * 0,
             "small": noise * 1e-40, "half zero": noise * (noise > 0)}[kind]  # fmt: skip
    group = OneGroup(delta, elements)
    way = {"in memory": lambda: trims(group, [density]), "two passes": lambda: joint_trims([group], [density], True)}
    if how == "sampled":
        monkeypatch.setattr("workbench.merge.streaming.trim._SMALL", 0)
        monkeypatch.setattr("workbench.merge.streaming.trim._sample", lambda spec: [(0, 9), (0, 4)])
        way["sampled"] = way["in memory"]
    (trim,) = way[how]()
    selection, left, parts = Selection([trim], [1.0], 1.0), [trim.ties], []
    for start, stop in group.spec.blocks(elements):
        parts.append(torch.empty(stop - start, 7))
        assert select(group.rows(start, stop), selection, left, start * 7, False, parts[-1])
    assert torch.equal(torch.cat(parts), reference_trim(delta, density))
