"""Every merge method beside its formula in float64 (`worlds/formulas.py`) on drawn shapes, dtypes, numbers of bricks and fields.

The tolerance is what float32 may round. Each of T terms is rounded two or three times by at most half a unit in the last place, 2⁻²⁴ of
the term, and the result once more to its own dtype. Which elements are kept, which sign wins and which brick is counted is exact in
worlds of multiples of 1/16, ties and cancellation included; in worlds of random numbers, what is closer than 2⁻²⁰ may go either way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from worlds import formulas, text_formulas
from worlds.factored import Lora
from worlds.formulas import DENSITIES, LAMBDAS, NAMES, WEIGHTS, Formula, World, by_matrix, overlap_shares, worlds
from worlds.fuzzing import EXAMPLES, fuzz_reader
from worlds.project import CPU

import workbench.weights.specs as specs_module
from workbench.ground.errors import WorkbenchError
from workbench.merge.fisher import Diagonal
from workbench.merge.measuring.layers import Grams
from workbench.merge.streaming.deltas import StepBricks, WeightsDelta
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.recipe.methods import methods
from workbench.steps import MergeMethod
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import load

ROUNDING = {torch.float32: (0.0, 0.0), torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25)}
"""Dtype of the result -> half a unit in the last place, relative to the number, and of the numbers near zero."""
MOST = 4
"""Largest weight times lambda of an adapter, whose terms may cancel before they are added up."""
NEEDS_WEIGHT = ("linear", "regmean", "fisher")
AUTO = st.sampled_from((None, "auto"))
VOTE = {
    "sign": st.sampled_from(("mass", "frequency")),
    "weigh": st.sampled_from(("after", "before")),
    "divide": st.sampled_from(("count", "weight")),
}
WHERE = {"threshold": st.sampled_from(("tensor", "model"))}
SCALE = {"lambda": LAMBDAS}
LINE = {"threshold": st.sampled_from((0.5, 0.0, 1.0, 0.25))}
# Method -> its formula, and the strategies of its fields.
FORMULAS: dict[str, tuple[Formula, dict[str, st.SearchStrategy[Any]]]] = {
    "average": (formulas.average, {}),
    "linear": (formulas.linear, {"normalize": st.booleans()}),
    "task_arithmetic": (formulas.scaled_sum, {**SCALE, "weights": AUTO}),
    "ties": (formulas.ties, {**SCALE, **VOTE, **WHERE, "density": DENSITIES, "weights": AUTO}),
    "dare": (formulas.dare, {**SCALE, "density": DENSITIES, "rescale": st.sampled_from(("inverse", "l1", "none")),
                             "then": st.sampled_from(("sum", "ties")), "weights": AUTO}),
    "slerp": (formulas.slerp, {"parallel": st.sampled_from((0.9995, 0.5, 1.0))}),
    "consensus": (formulas.masked, {**SCALE, **LINE, "least": st.integers(1, 3)}),
    "tall_mask": (formulas.masked, {**SCALE, **LINE}),
    "localize_and_stitch": (formulas.localize_and_stitch, {**SCALE, **WHERE, "density": DENSITIES}),
    "iso_c": (by_matrix(formulas.iso), SCALE),
    "tsv": (by_matrix(formulas.tsv), SCALE),
    "wudi": (by_matrix(formulas.wudi), {**SCALE}),
    "cocktail": (text_formulas.cocktail, {"examples": st.just("rows.jsonl")}),
    "aim": (text_formulas.aim, {**SCALE, "weights": AUTO, "omega": st.sampled_from((0.2, 0.0, 1.0)), "calibration": st.just("rows.jsonl")}),
    "fisher": (text_formulas.fisher, {"floor": st.sampled_from((1e-6, 0.5)), "calibration": st.just("rows.jsonl")}),
    "regmean": (text_formulas.regmean, {"off_diagonal": st.sampled_from((0.5, 0.0, 1.0)), "ridge": st.sampled_from((1e-3, 0.1)),
                                   "calibration": st.just("rows.jsonl")}),
    "null_space": (text_formulas.null_space, {**SCALE, "ridge": st.sampled_from((1e-4, 0.1)), "calibration": st.just("rows.jsonl"),
                                         "tokens": st.just(["<think>"])}),
}  # fmt: skip


def test_every_method_has_a_formula() -> None:
    """FeatCal's reads whole models: `test_forward_order.py`. mergekit's methods stand beside mergekit: `test_mergekit.py`."""
    ours = {cls.name for cls in methods().values() if issubclass(cls, MergeMethod) and "/" not in cls.name}
    assert ours == {*FORMULAS, "featcal"}


def opened(world: World, out: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The base and the bricks' deltas, read from files."""

    def checkpoint(tensors: Any, name: str) -> Checkpoint:
        (out / name).mkdir()
        save_file(tensors, out / name / "model.safetensors")
        return Checkpoint(out / name, name)

    base, deltas = checkpoint(world.base, "base"), dict[str, Any]()
    for i, brick in enumerate(world.bricks):
        pairs: Any = brick
        deltas[f"b{i}"] = Lora(pairs) if i in world.adapters else WeightsDelta(checkpoint(brick, f"b{i}"))
    return base, deltas


def measured(method: str, world: World, draw: Any, out: Path) -> tuple[Any, Any]:
    """What a method would measure on texts: for the formula, and for the method."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    count, some = len(world.bricks), {n: t for n, t in world.base.items() if draw(st.booleans()) or t.dim() < 2}
    if method == "cocktail":
        weights = torch.rand(count, generator=generator, dtype=torch.float64)
        found = {f"b{i}": float(w / weights.sum()) for i, w in enumerate(weights)}
        return found, found
    linear = {n: t for n, t in world.base.items() if n not in some and n in NAMES[:2] and t.dim() == 2 and t.numel()}
    inputs = {n: t.shape[0] if world.flipped(n) else t.shape[1] for n, t in linear.items()}
    if method == "aim":
        means = {n: torch.rand(size, generator=generator) * draw(st.sampled_from((1, 0))) for n, size in inputs.items() if size}
        return means, means
    if method == "null_space":
        rows = {
            n: torch.randn(draw(st.integers(1, 12)), size, generator=generator) * draw(st.sampled_from((1, 1, 0)))
            for n, size in inputs.items()
        }
        for n, x in rows.items():
            save_file({"inputs": x}, out / f"{n}.inputs")
        return rows, {n: out / f"{n}.inputs" for n in rows}
    by_brick: list[dict[str, Tensor]] = []
    for i in range(count):
        if method == "fisher":
            by_brick.append({n: torch.rand(t.shape, generator=generator) ** 4 for n, t in some.items()})
            save_file(by_brick[-1] or {"none": torch.zeros(1)}, out / f"fisher{i}")
        else:
            rows = {
                n: torch.randn(draw(st.integers(1, 12)), s, generator=generator) * draw(st.sampled_from((1, 1, 0)))
                for n, s in inputs.items()
            }
            by_brick.append({n: x.T @ x / len(x) for n, x in rows.items()})
            for n, gram in by_brick[-1].items():
                save_file({"gram": torch.cat([gram[j, j:] for j in range(len(gram))] or [torch.zeros(0)])}, out / f"{n}.{i}")
    if method == "fisher":
        return by_brick, {f"b{i}": Diagonal.open(out / f"fisher{i}") for i in range(count)}
    return by_brick, {f"b{i}": Grams(out, {n: f"{n}.{i}" for n in by_brick[i]}, None) for i in range(count)}  # type: ignore[arg-type]


@pytest.mark.parametrize("method", FORMULAS)
@given(data=st.data())
@settings(fuzz_reader, max_examples=40 if EXAMPLES < 80 else 3 * EXAMPLES)
def test_method_is_its_formula(method: str, data: st.DataObject, tmp_path: Path) -> None:
    formula, strategies = FORMULAS[method]
    cls: Any = methods()[f"merge:{method}"]
    least, most = cls.laws.arity
    world = data.draw(worlds(least, most or 5))
    fields = {name: data.draw(values) for name, values in strategies.items()}
    count = len(world.bricks)
    weights = data.draw(st.lists(WEIGHTS, min_size=count, max_size=count))
    entries: dict[str, Any] = {f"b{i}": w for i, w in enumerate(weights)}
    given_fields = {k: v for k, v in fields.items() if v is not None}
    if method == "slerp":
        weights = [1 - weights[1], weights[1]]
        entries["b0"] = weights[0]
    if method in ("regmean", "fisher"):
        weights = [abs(w) for w in weights]
        entries = {f"b{i}": w for i, w in enumerate(weights)}
    if method == "tall_mask" and (chosen := data.draw(st.sampled_from((None, *range(count))))) is not None:
        fields["chosen"], given_fields["brick"] = chosen, f"b{chosen}"
    if method == "null_space" and (kept := data.draw(st.sampled_from((None, *range(count))))) is not None:
        given_fields["keep"] = f"b{kept}"
    if "least" in fields:
        fields["least"] = given_fields["least"] = min(fields["least"], count)
    if method in ("ties", "dare"):
        own = [data.draw(st.one_of(st.none(), DENSITIES)) for _ in range(count)]
        fields["densities"] = [fields["density"] if d is None else d for d in own]
        entries = {
            f"b{i}": {"weight": w, **({} if d is None else {"density": d})}
            for i, (w, d) in enumerate(zip(weights, own, strict=True))
        }
        if given_fields.get("weights"):
            fields["divide"] = given_fields["divide"] = "weight"
            given_fields.pop("divide" if method == "dare" else "", None)
    fields |= {"kept": int(given_fields["keep"][1:]) if "keep" in given_fields else None}
    fields |= {"seed": data.draw(st.integers(0, 3)), "directed": method == "wudi"}
    if method not in ("average", "cocktail"):
        given_fields["bricks"] = entries
    if cls.laws.rotation_invariant and len(world.adapters) == count:
        given_fields["space"] = data.draw(st.sampled_from(("full", "core")))  # the same numbers
    out = Path(tempfile.mkdtemp(dir=tmp_path))
    base, deltas = opened(world, out)
    value = None
    if cls.laws.needs != "tensor":
        world.measured, value = measured(method, world, data.draw, out)
    if fields.get("weights"):
        weights = [w * share for w, share in zip(weights, overlap_shares(world), strict=True)]
    step = cls.model_validate({"merge": method, **given_fields})
    model = Model(base, {"num_hidden_layers": 2, **({"model_type": "gpt2"} if world.conv1d else {})})
    keys = {f"b{i}": f"key{i}" for i in range(count)}
    merged = MergedWeights(model, model, step, StepBricks(deltas, keys), seed=fields["seed"], measured=value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specs_module, "BLOCK_ELEMENTS", world.block)
        for name, origin in world.base.items():
            if sum(weights) == 0 and method in NEEDS_WEIGHT and fields.get("normalize", True):
                if name in merged.merged:
                    with pytest.raises(WorkbenchError, match="weights"):
                        load(merged, name, world.out, CPU)
                continue
            expected = formula(world, name, weights, fields)
            check(load(merged, name, world.out, CPU), origin, world, name, expected, rotated="space" in given_fields)


def check(found: Tensor, origin: Tensor, world: World, name: str, expected: formulas.Result, rotated: bool) -> None:
    """Compare within the rounding that the top of this file states; what was rotated has the rounding of its norm in every element."""
    assert found.shape == origin.shape
    right = origin.double() + expected.delta
    terms = expected.size + origin.double().abs() + world.stack(name).abs().sum(0)
    pairs: list[Any] = [world.bricks[i][name] for i in world.adapters if name in world.bricks[i]]
    terms = terms + MOST * sum(b.double().abs() @ a.double().abs() for b, a in pairs)
    terms = terms + MOST * rotated * sum(float(b.double().norm() * a.double().norm()) for b, a in pairs)
    bound = 2.0**-24 * (len(world.bricks) + 6) * expected.condition * terms
    relative, least = ROUNDING[world.out]
    bound += relative * (right.abs() + bound) + least
    wrong = ~((found.double() - right).abs() <= bound)  # NaN too
    if expected.free is not None:
        wrong &= ~expected.free
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)}: {float(found[at])}, expected {float(right[at])} ± {float(bound[at])}; {int(wrong.sum())} of {wrong.numel()}"
        )
