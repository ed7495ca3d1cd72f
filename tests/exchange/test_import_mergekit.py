"""`workbench recipe import`: example YAMLs in mergekit's syntax, imported, run, and compared with mergekit's own run in float32."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from worlds.mergekit_runs import EXAMPLES, difference, imported, run_mergekit, run_mergekit_moe
from worlds.tiny import save_finetuned, save_model, tensors_of

from workbench.exchange.mergekit import import_recipe
from workbench.ground.errors import WorkbenchError

REFUSED = {"refused"}
RANDOM = {"dare_ties", "dare_linear", "della"}


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in REFUSED])
def test_examples_equal_mergekit(name: str, mergekit_project: Path, tmp_path: Path, in_mergekit_project: None) -> None:
    text = EXAMPLES[name].read_text("utf-8")
    if name in RANDOM:  # what random masks keep is checked below; all else is, where nothing is dropped
        text = re.sub(r"density: [\d.]+", "density: 1.0", text)
    ours, recipe, _ = imported(text, mergekit_project, name)
    theirs = run_mergekit(yaml.safe_load(text), tmp_path / "out")
    assert difference(ours, theirs) <= 1e-6, recipe
    assert all(t.dtype == torch.float32 for t in ours.values())
    sources = [tensors_of(mergekit_project / n) for n in ("base", "one", "two", "three")]
    assert all(set(ours) != set(source) or difference(ours, source) > 1e-3 for source in sources), (
        "a merge, not one of its inputs"
    )


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_random_examples_drop_as_much_as_mergekit(
    name: str, mergekit_project: Path, tmp_path: Path, in_mergekit_project: None
) -> None:
    text = EXAMPLES[name].read_text("utf-8")
    ours, _, _ = imported(text, mergekit_project, name)
    theirs = run_mergekit(yaml.safe_load(text), tmp_path / "out", seed=1)
    base = tensors_of(mergekit_project / "base")
    for tensor in ("model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"):
        one, two = (m[tensor] - base[tensor] for m in (ours, theirs))
        shares = [float((d.abs() > 1e-7).float().mean()) for d in (one, two)]
        assert shares[0] == pytest.approx(shares[1], abs=0.05)
        assert float(one.abs().sum()) == pytest.approx(float(two.abs().sum()), rel=0.1)


def test_the_refused_example_of_the_docs(in_mergekit_project: None) -> None:
    with pytest.raises(WorkbenchError) as caught:
        import_recipe(EXAMPLES["refused"])
    assert caught.value.message.endswith(
        "refused.yml:3:5 slices.0.sources: the inputs' layer ranges have different lengths; mergekit rejects this too"
    )
    assert caught.value.exit_code == 2


def test_the_recipe_is_readable(mergekit_project: Path, in_mergekit_project: None) -> None:
    _, text, _ = imported(EXAMPLES["ties"].read_text("utf-8"), mergekit_project, "ties")
    lines = text.splitlines()
    assert lines[0] == f"# workbench run {mergekit_project / 'recipes' / 'ties.yaml'}"
    assert lines[1] == "# Imported from ties.yml, mergekit's ties."
    assert (
        "\n".join(lines[lines.index("version: 1") :]) + "\n"
        == """\
version: 1
base: base
bricks:
  one: one
  two: two
  three: three
steps:
  - merge: ties
    bricks:
      one:
        weight: 1.0
        density:
          - {where: {}, value: 1.0}
          - {where: {layers: ':'}, value: {knots: [1.0, 0.7, 0.1]}}
      two:
        weight:
          - {where: {}, value: 0.0}
          - {where: {layers: ':'}, value: {knots: [0.0, 0.3, 0.7, 1.0]}}
        density: 0.5
      three:
        weight:
          - {where: {}, value: 0.25}
          - {where: {include: ['*mlp*']}, value: 0.5}
        density: 0.33
    density: 1.0
    sign: mass
    weigh: before
    divide: weight
    threshold: tensor
output: {dtype: float32}
"""
    )


# -- values: every level, filter and gradient, at every tensor


def test_values_equal_mergekits_at_every_tensor(mergekit_project: Path) -> None:
    """Random settings on three levels, resolved by mergekit and by the recipe's schedules, with and without the base at hand."""
    from mergekit.config import ParameterSetting
    from mergekit.merge_methods.base import ParameterScope, ParameterSpec
    from mergekit.parameter_resolver import resolve_parameter
    from pydantic import TypeAdapter

    from workbench.exchange.mergekit.config import ImportReport
    from workbench.exchange.mergekit.methods import setting
    from workbench.ground.yamldoc import Document
    from workbench.merge.mergekit.table import Parameter
    from workbench.models.layout import Model
    from workbench.steps.fields import Number, value_at
    from workbench.weights.checkpoint import Checkpoint

    checkpoint = Checkpoint(mergekit_project / "base", "base")
    model = Model(checkpoint, checkpoint.config)
    draw = random.Random(0)
    filters = ["mlp", "self_attn", "layers.1.", "norm", "embed", "model.", "o_proj", "*", None, "no such tensor"]

    def scalars() -> Any:
        count = draw.choice([1, 1, 2, 3, 5])
        values = [draw.choice([0.0, 0.25, 1.0, "5e-1", 3]) for _ in range(count)]
        return values if count > 1 else values[0]

    def level() -> dict[str, Any]:
        if draw.random() < 0.3:
            return {}
        if draw.random() < 0.3:
            return {"weight": scalars()}
        return {"weight": [{"filter": draw.choice(filters), "value": scalars()} for _ in range(draw.randint(1, 3))]}

    spec = ParameterSpec("weight", float, ParameterScope.SHARED, default=0.125)
    parameter = Parameter("weight", "float", False, False, 0.125, spec.validate)
    for case in range(300):
        levels = [level() for _ in range(3)]
        typed = [TypeAdapter(dict[str, ParameterSetting]).validate_python(scope) for scope in levels]
        for at_hand in (model, None):
            report = ImportReport(Document({}, {}, "test"))
            found = setting(parameter, [((str(i),), scope) for i, scope in enumerate(levels)], at_hand, report)
            assert not report.problems
            schedule = None if found is None else TypeAdapter(Number).validate_python(found)
            for name in checkpoint.specs:
                layer = model.layout.layer(name)
                theirs = resolve_parameter(
                    spec, typed, tensor_name=name, t=0 if layer is None else layer / (model.layout.depth - 1)
                )
                ours = 0.125 if schedule is None else value_at(schedule, name, model, float("nan"))
                assert ours == pytest.approx(theirs, abs=1e-12), (case, levels, found, name)


def test_one_layer_takes_the_last_value_of_a_gradient(tmp_path: Path, cwd: Path) -> None:
    (tmp_path / "recipes").mkdir()
    save_model(tmp_path / "base", dtype=torch.float32, layers=1)
    save_finetuned(tmp_path / "base", tmp_path / "one", seed=1)
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels:\n  - {model: one, parameters: {weight: [0.2, 0.5, 0.2]}}\ndtype: float32\n"
    for gradient in ("[0.2, 0.5, 0.2]", "[0.2, 0.9]"):
        ours, _, _ = imported(text.replace("[0.2, 0.5, 0.2]", gradient), tmp_path)
        theirs = run_mergekit(yaml.safe_load(text.replace("[0.2, 0.5, 0.2]", gradient)), tmp_path / f"out{gradient}")
        assert difference(ours, theirs) <= 1e-6


def test_an_untied_head_takes_the_first_value(tmp_path: Path, cwd: Path) -> None:
    (tmp_path / "recipes").mkdir()
    save_model(tmp_path / "base", "llama_untied", dtype=torch.float32)
    save_finetuned(tmp_path / "base", tmp_path / "one", seed=1)
    text = """\
merge_method: slerp
base_model: base
models: [{model: base}, {model: one}]
parameters:
  t:
    - {filter: lm_head, value: [0.1, 0.8]}
    - {value: [0.9, 0.2, 0.4]}
dtype: float32
"""
    ours, recipe, _ = imported(text, tmp_path)
    theirs = run_mergekit(yaml.safe_load(text), tmp_path / "out")
    assert difference(ours, theirs) <= 1e-6
    assert "- {where: {include: ['*lm_head*']}, value: 0.1}" in recipe, "no rule for layers, where the filter matches none"


def test_bfloat16_outputs_equal_mergekits_float32_arithmetic(
    mergekit_project: Path, tmp_path: Path, in_mergekit_project: None
) -> None:
    text = EXAMPLES["linear"].read_text("utf-8") + "out_dtype: bfloat16\n"
    ours, _, _ = imported(text, mergekit_project)
    theirs = run_mergekit(yaml.safe_load(text), tmp_path / "out")
    assert all(t.dtype == torch.bfloat16 for t in ours.values())
    ulp = max(
        float(((ours[n].float() - theirs[n].float()).abs() / theirs[n].float().abs().clamp_min(1e-6)).max()) for n in theirs
    )
    assert ulp <= 2**-7
    assert sum(int((ours[n] != theirs[n]).sum()) for n in theirs) < 20, (
        "where the two float32 results straddle a rounding boundary"
    )


MOE = """\
base_model: base
experts:
  - {source_model: base, positive_prompts: [w3 w4]}
  - {source_model: one, positive_prompts: [w7 w8 w9], negative_prompts: [w3]}
  - {source_model: two, positive_prompts: [w20 w21]}
gate_mode: MODE
experts_per_token: 1
dtype: float32
"""


@pytest.mark.parametrize("mode", ["random", "hidden"])
def test_mixtures_have_mergekits_experts(mode: str, mergekit_project: Path, tmp_path: Path, in_mergekit_project: None) -> None:
    """All but the router is what `mergekit-moe` writes, loaded by transformers; the router has a row for each expert."""
    from transformers import AutoModelForCausalLM

    from workbench.recipe.recipe import load_recipe
    from workbench.resolve.resolve import resolve
    from workbench.run.device import Work
    from workbench.run.execute import execute

    text = MOE.replace("MODE", mode)
    _, recipe, notes = imported(text, mergekit_project, "moe")
    assert "anchor: true" in recipe
    assert "into" not in recipe
    assert any("reads" in note or "drawn" in note for note in notes)
    resolved = resolve(load_recipe(mergekit_project / "recipes" / "moe.yaml"))
    ours = execute(resolved, tmp_path / "runs", Work(torch.device("cpu"), 1)).place
    run_mergekit_moe(yaml.safe_load(text), tmp_path / "theirs")
    one, two = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).state_dict() for p in (ours, tmp_path / "theirs"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith("gate.weight"):
            assert tensor.shape == two[name].shape == (3, tensor.shape[1])
        else:
            assert float((tensor - two[name]).abs().max()) <= 1e-6, name


def test_copies_of_the_base_are_upcycled(mergekit_project: Path, in_mergekit_project: None) -> None:
    text = "base_model: base\nexperts: [{source_model: base}, {source_model: base}]\ngate_mode: random\n"
    _, recipe, _ = imported(text, mergekit_project, "copies")
    assert "{grow: experts, experts: 2, top_k: 2}" in recipe
