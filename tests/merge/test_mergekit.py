"""`merge: mergekit/NAME`: each method against mergekit's own run, random ones independent of threads and order, bad parameters named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.mergekit_runs import difference, run_mergekit, save_models
from worlds.merging import InMemory, merge, models
from worlds.multimodal import save_multimodal
from worlds.project import CPU, Project
from worlds.tiny import tensors_of

import workbench.merge.mergekit.table as api
from workbench.ground.errors import WorkbenchError
from workbench.merge.mergekit.methods import METHODS
from workbench.merge.mergekit.table import KNOWN, seed_of
from workbench.merge.streaming.deltas import StepBricks, WeightsDelta
from workbench.merge.streaming.merged import MergedWeights
from workbench.models.layout import Model
from workbench.recipe.methods import methods
from workbench.weights.device import load_all
from workbench.weights.specs import load

# Method -> bricks, parameters, and whether mergekit is given the base.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "linear": ({"one": 0.3, "two": 0.5, "three": {"weight": -0.1}}, {"normalize": True}, False),
    "slerp": ({"one": {}}, {"t": 0.3}, True),
    "nuslerp": ({"one": 0.3, "two": 0.5}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, True),
    "multislerp": ({"one": 0.3, "two": 0.5, "three": 0.4}, {}, True),
    "karcher": ({"one": {}, "two": {}, "three": {}}, {"max_iter": 20}, False),
    "task_arithmetic": ({"one": 0.3, "two": -0.5}, {"lambda": 0.7, "normalize": True}, True),
    "ties": ({"one": {"weight": 0.3, "density": 0.25}, "two": 0.5}, {"density": 0.5}, True),
    "breadcrumbs": ({"one": 0.3, "two": 0.5}, {"density": 0.5, "gamma": 0.05}, True),
    "breadcrumbs_ties": ({"one": 0.3, "two": {"weight": 0.5, "gamma": 0.1}}, {"density": 0.5}, True),
    "sce": ({"one": {}, "two": {}, "three": {}}, {"select_topk": 0.6}, True),
    "model_stock": ({"one": {}, "two": {}}, {"filter_wise": True}, True),
    "ram": ({"one": {}, "two": {}}, {"epsilon": 0.05}, True),
    "ramplus_tl": ({"one": {}, "two": {}}, {"epsilon": 0.05, "r": 0.3}, True),
    "nearswap": ({"one": {}}, {"t": 0.01}, True),
    "arcee_fusion": ({"one": {}}, {}, True),
    "passthrough": ({"one": {"scale": 0.5}}, {}, False),
    # Random only where something is dropped: these are checked below, and here with a density of 1.
    "dare_linear": ({"one": 0.3, "two": 0.5}, {"lambda": 1.5}, True),
    "dare_ties": ({"one": 0.3, "two": 0.5}, {"density": 1}, True),
    "della": ({"one": 0.3, "two": 0.5}, {"epsilon": 0.2}, True),
    "della_linear": ({"one": 0.3, "two": 0.5}, {}, True),
}
RANDOM = {"dare_linear": {}, "dare_ties": {"lambda": 0.5}, "della": {"epsilon": 0.1}, "della_linear": {"rescale": False}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the float32 models of `save_models`."""
    path = tmp_path_factory.mktemp("mergekit")
    (path / "recipes").mkdir()
    save_models(path)
    return path


def recipe(method: str, bricks: Any, parameters: dict[str, Any], **fields: Any) -> str:
    import yaml

    step = {"merge": f"mergekit/{method}", "bricks": bricks, "parameters": parameters, **fields}
    return yaml.safe_dump({"base": "base", "bricks": {n: n for n in ("one", "two", "three", "lora")}, "steps": [step]})


def test_every_method_is_there_and_the_table_says_what_mergekit_says() -> None:
    from mergekit.merge_methods.registry import registered_methods

    assert set(METHODS) == set(CASES) == {m.spec.name for m in registered_methods()}
    for method in registered_methods():
        stated = KNOWN[method.spec.name].parameters
        for parameter in method.spec.parameters:
            star = "*" if parameter.scope.value != "shared" else ""
            if parameter.required:
                expected = f"{parameter.name}{star} ({'1' if parameter.name == 'weight' else 'required'}"
            elif parameter.name == "int8_mask":
                expected = "int8_mask (no effect"
            else:
                default = parameter.default
                shown = (
                    str(default).lower() if default is None or isinstance(default, bool) else f"{default:g}".replace("e-0", "e-")
                )
                expected = f"{parameter.name}{star} ({shown}"
            assert expected in stated, (method.spec.name, expected, stated)
        contract = method.spec.contract
        base = int(contract.base.value == "required")
        limits = [n for n in (contract.max_inputs and contract.max_inputs - base, contract.max_non_base) if n is not None]
        least = max(contract.min_inputs - base, contract.min_non_base or 0, 1)
        assert KNOWN[method.spec.name].laws.arity == (least, min(limits, default=None))
        assert stated.count("(") == len(method.spec.parameters)
        assert methods()[f"merge:mergekit/{method.spec.name}"].paper == KNOWN[method.spec.name].paper


@pytest.mark.parametrize("name", CASES)
def test_equals_mergekits_own_run(name: str, folder: Path, tmp_path: Path) -> None:
    bricks, parameters, base = CASES[name]
    entries = {n: e if isinstance(e, dict) else {"weight": e} for n, e in bricks.items()}
    config = {"merge_method": name, "dtype": "float32", "parameters": parameters,
              "models": [{"model": str(folder / n), "parameters": e} for n, e in entries.items()],
              **({"base_model": str(folder / "base")} if base else {})}  # fmt: skip
    theirs = run_mergekit(config, tmp_path / "out")
    ours = Project(folder).tensors(recipe(name, bricks, parameters))
    assert difference(ours, theirs) <= 1e-6
    before = tensors_of(folder / "base")
    assert any(not torch.allclose(theirs[n], before[n], atol=1e-4) for n in theirs)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
def test_without_base_weights_are_merged_not_deltas(name: str, folder: Path, tmp_path: Path) -> None:
    config = {"merge_method": name, "dtype": "float32", "parameters": {"weight": 0.5},
              "models": [{"model": str(folder / n)} for n in ("one", "two")]}  # fmt: skip
    theirs = run_mergekit(config, tmp_path / "out")
    ours = Project(folder).tensors(recipe(name, ["one", "two"], {"weight": 0.5}, with_base=False))
    assert difference(ours, theirs) <= 1e-6
    assert difference(Project(folder).tensors(recipe(name, ["one", "two"], {"weight": 0.5})), theirs) > 1e-3


def test_schedules_rules_and_adapters_reach_mergekit(folder: Path, tmp_path: Path) -> None:
    """A gradient and a filter, per brick and for all, as mergekit reads them; on layers only, where both tools agree on depth."""
    theirs = run_mergekit(
        {"merge_method": "ties", "base_model": str(folder / "base"), "dtype": "float32", "parameters": {"density": [0.2, 1.0, 0.2]},
         "models": [{"model": str(folder / "one"), "parameters": {"weight": [0.1, 0.9, 0.1]}},
                    {"model": str(folder / "two"), "parameters": {"weight": [{"filter": "mlp", "value": 0.2}, {"value": 0.7}]}}]},
        tmp_path / "out")  # fmt: skip
    rules = [{"where": {}, "value": 0.7}, {"where": {"include": ["*mlp*"]}, "value": 0.2}]
    bricks = {"one": {"knots": [0.1, 0.9, 0.1]}, "two": {"weight": rules}}
    ours = Project(folder).tensors(recipe("ties", bricks, {"density": {"knots": [0.2, 1.0, 0.2]}}))
    assert difference(ours, theirs) <= 1e-6
    # The adapter's delta is added to the base first; mergekit merges the adapter into a dense copy.
    models = [{"model": f"{folder / 'base'}+{folder / 'lora'}"}, {"model": str(folder / "one")}]
    theirs = run_mergekit(
        {"merge_method": "model_stock", "base_model": str(folder / "base"), "dtype": "float32", "models": models},
        tmp_path / "out",
    )
    ours = Project(folder).tensors(recipe("model_stock", ["lora", "one"], {}))
    assert difference(ours, theirs) <= 1e-6


@pytest.mark.parametrize(
    ("name", "parameters", "entry"),
    [("passthrough", {}, {"scale": 0.5}), ("linear", {"normalize": False}, {"weight": 0.5})],
    ids=["passthrough", "linear"],
)
def test_a_scale_reaches_tensors_that_the_adapter_leaves_alone(name: str, parameters: dict[str, Any], entry: dict[str, Any], folder: Path, tmp_path: Path) -> None:  # fmt: skip
    model = {"model": f"{folder / 'base'}+{folder / 'lora'}", "parameters": entry}
    theirs = run_mergekit(
        {"merge_method": name, "dtype": "float32", "models": [model], "parameters": parameters}, tmp_path / "out"
    )
    assert difference(Project(folder).tensors(recipe(name, {"lora": entry}, parameters)), theirs) <= 1e-6
    own = "base: base\nbricks: {lora: lora}\nsteps: [{merge: linear, normalize: false, bricks: {lora: 0.5}}]\n"
    assert difference(Project(folder).tensors(own), theirs) <= 1e-6


# -- where mergekit's numbers are others than ours; docs/merging-mergekit.md states them

ROOT = math.sqrt(0.5)
TIES = {"sign": "mass", "weigh": "before", "divide": "weight"}
# What -> method, dtype, base and bricks, mergekit's parameters, our fields, mergekit's result, ours.
DIFFERENCES: dict[str, tuple[str, torch.dtype, list[list[float]], dict[str, Any], dict[str, Any], list[float], list[float]]] = {
    "of 17 equal magnitudes it keeps some, not the first": (
        "ties", torch.float32, [[0] * 17, [1] * 17], {"weight": 1.0, "density": 0.5, "normalize": True}, {**TIES, "density": 0.5},
        [*[0] * 8, 1, 0, *[1] * 7], [*[1] * 8, *[0] * 9]),
    "a vote that cancels exactly counts as plus": (
        "ties", torch.float32, [[1, 1], [1.5, 0.5], [0.5, 1.5]], {"weight": 1.0, "density": 1.0, "normalize": True}, {**TIES, "density": 1.0},
        [1.5, 1.5], [1, 1]),
    "a tensor of zeros counts as orthogonal": ("slerp", torch.float32, [[0, 0], [0, 0], [1, 2]], {"t": 0.5}, {}, [ROOT, 2 * ROOT], [0.5, 1]),
    "a norm below 1e-8 counts as 1": (
        "slerp", torch.float32, [[0, 0], [3e-9, 0], [4e-9, 0]], {"t": 0.5}, {}, [7e-9 * ROOT, 0], [3.5e-9, 0]),
    "bfloat16 weights are multiplied in bfloat16": (
        "task_arithmetic", torch.bfloat16, [[0], [1], [1], [1]], {"weight": 0.3}, {"bricks": {f"b{i}": 0.3 for i in range(3)}},
        [0.90234375], [0.8984375]),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENCES)
def test_where_mergekit_differs(what: str) -> None:
    from mergekit.merge_methods.api import merge_tensors

    method, dtype, numbers, parameters, fields, theirs, ours = DIFFERENCES[what]
    base, *bricks = (torch.tensor(values, dtype=dtype) for values in numbers)
    found = merge_tensors(bricks if method == "slerp" else [base, *bricks], method, base_index=0, parameters=parameters)
    torch.testing.assert_close(found, torch.tensor(theirs, dtype=dtype), rtol=1e-6, atol=0)
    own = merge(method, {"w": base}, {f"b{i}": {"w": brick} for i, brick in enumerate(bricks)}, dtype, **fields)["w"]
    torch.testing.assert_close(own, torch.tensor(ours, dtype=dtype), rtol=1e-6, atol=0)


def test_mergekit_drops_the_language_model_of_a_llava(tmp_path: Path) -> None:
    """It takes names from the live model, does not find those of the language part on disk, and says nothing."""
    for seed, name in enumerate(("one", "two")):
        save_multimodal("llava", tmp_path / name, seed=seed)
    theirs = run_mergekit({"merge_method": "linear", "dtype": "float32", "parameters": {"weight": 0.5},
                           "models": [{"model": str(tmp_path / name)} for name in ("one", "two")]}, tmp_path / "out")  # fmt: skip
    one, two = (tensors_of(tmp_path / name) for name in ("one", "two"))
    assert {name.removeprefix("model.") for name in theirs} == {name for name in one if not name.startswith("language_model.")}
    (tmp_path / "recipes").mkdir()
    ours = Project(tmp_path).tensors("base: one\nbricks: {one: one, two: two}\nsteps: [{merge: linear}]\n")
    assert sum(name.startswith("language_model.") for name in ours) == 21
    assert difference(ours, {name: (one[name] + two[name]) / 2 for name in one}) <= 1e-6


# -- random methods


def in_memory(name: str, order: list[str], seed: int, **parameters: Any) -> MergedWeights:
    base, bricks = models(2, seed=3)
    weights = InMemory(base)
    model = Model(weights, {"num_hidden_layers": 2})
    step = METHODS[name].model_validate(
        {"merge": f"mergekit/{name}", "parameters": {"density": 0.5, **parameters}, "bricks": dict.fromkeys(order, 0.5)}
    )
    deltas = {b: WeightsDelta(InMemory(bricks[b])) for b in order}
    keys = {"brick0": "key b", "brick1": "key a"}
    return MergedWeights(model, model, step, StepBricks(deltas, keys), seed=seed)


@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_equal_mergekit_under_the_same_seed(name: str) -> None:
    from mergekit.merge_methods.api import merge_tensors

    base, bricks = models(2, seed=3)
    merged = in_memory(name, ["brick0", "brick1"], 7, **RANDOM[name])
    before = torch.get_rng_state()
    for tensor in base:
        ours = load(merged, tensor, torch.float32, CPU)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(7, tensor, ["key a", "key b"]))
            tensors = [base[tensor], *(base[tensor] + (bricks[b][tensor] - base[tensor]) for b in ("brick1", "brick0"))]
            theirs = merge_tensors(tensors, name, base_index=0, parameters={"density": 0.5, "weight": 0.5, **RANDOM[name]})
        assert float((ours - theirs).abs().max()) <= 1e-6
        assert not torch.equal(ours, base[tensor])
    assert torch.equal(torch.get_rng_state(), before), "torch's own random state is left alone"


@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_depend_on_the_seed_alone(name: str) -> None:
    first = load_all(in_memory(name, ["brick0", "brick1"], 7), torch.float32, CPU, threads=1)
    torch.manual_seed(99)
    second = load_all(in_memory(name, ["brick1", "brick0"], 7), torch.float32, CPU, threads=2)
    other = load_all(in_memory(name, ["brick0", "brick1"], 8), torch.float32, CPU, threads=1)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)
    assert METHODS[name].laws.random


def test_arcee_fusion_and_della_on_unusual_shapes() -> None:
    """Over a million elements its quartiles come from a random sample."""
    base = {"w": torch.randn(1100, 1000, generator=torch.Generator().manual_seed(1))}
    brick = {"w": base["w"] + 0.1 * torch.randn(1100, 1000, generator=torch.Generator().manual_seed(2))}
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        results.append(merge("mergekit/arcee_fusion", base, {"a": brick})["w"])
    assert torch.equal(*results)
    assert 0.01 < float((results[0] != base["w"]).float().mean()) < 0.5
    # mergekit divides 0 by 0 there and stops (Mamba's convolutions, [d, 1, k]).
    generator = torch.Generator().manual_seed(0)
    base = {
        "conv": torch.randn(6, 1, 4, generator=generator),
        "column": torch.randn(50, 1, generator=generator),
        "gain": torch.randn(1),
    }
    brick = {n: t + 1 for n, t in base.items()}
    result = merge("mergekit/della_linear", base, {"a": brick}, parameters={"density": 0.5, "weight": 1, "rescale": False})
    share = {n: float((result[n] != base[n]).float().mean()) for n in base}
    assert share["gain"] == 1
    assert 0.2 < share["column"] < 0.8
    assert 0.1 < share["conv"] < 0.9


# -- laws


def fields(name: str, count: int, weight: float = 1.0) -> dict[str, Any]:
    """A step's fields for so many bricks, nothing set but what is required."""
    known = api.parameters(name)
    names = [f"brick{i}" for i in range(count)]
    return {
        "bricks": dict.fromkeys(names, weight) if "weight" in known else names,
        "parameters": {"t": 0.01} if "t" in known else {},
    }


def base_is_given(name: str) -> bool:
    return api.base_policy(name) != "ignored"


@pytest.mark.parametrize("name", METHODS)
def test_laws(name: str) -> None:
    laws, known = METHODS[name].laws, api.parameters(name)
    least, most = METHODS[name].laws.arity
    count = most or 3
    base, bricks = models(count)
    label = f"mergekit/{name}"
    same = merge(label, base, dict.fromkeys(bricks, base), **fields(name, count))
    assert difference(same, base) == 0 if base_is_given(name) else difference(same, base) <= 1e-5, (
        "bricks that are the base give the base"
    )
    if "weight" in known:
        try:
            zero = difference(merge(label, base, bricks, **fields(name, count, 0.0)), base) <= 1e-6
        except WorkbenchError:
            zero = False
        assert zero == laws.zero_is_base
        shift = [{n: t - base[n] for n, t in merge(label, base, bricks, **fields(name, count, w)).items()} for w in (1.0, 2.0)]
        linear = max(float((shift[1][n] - 2 * shift[0][n]).abs().max()) for n in base) < 1e-5
        assert linear == laws.linear_in_weight
    turned = dict(reversed(list(bricks.items())))
    one, two = (merge(label, base, some, **fields(name, count)) for some in (bricks, turned))
    assert all(torch.equal(one[n], two[n]) for n in base), "the same bytes in any order"
    if least == 1:
        single = merge(label, base, {"brick0": bricks["brick0"]}, **fields(name, 1))
        if laws.single_is_identity:
            assert difference(single, bricks["brick0"]) <= 1e-6
        elif name != "ram" and name != "ramplus_tl":  # they drop what changed by less than epsilon
            assert difference(single, bricks["brick0"]) > 1e-3
