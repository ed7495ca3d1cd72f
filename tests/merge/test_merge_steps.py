"""Merge steps in a recipe: where, schedules, steps on steps, recipes as bricks, bricks that do not fit."""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.jsonl import write_jsonl
from worlds.project import Project
from worlds.tiny import edit_json, save_adapter, save_finetuned, tensors_of

import workbench.weights.specs as specs_module
from workbench.ground.errors import WorkbenchError
from workbench.recipe.methods import methods
from workbench.steps import MergeMethod

# Those that read texts: test_calibration.py. mergekit's own need parameters: test_mergekit.py.
METHODS = [
    cls
    for cls in methods().values()
    if issubclass(cls, MergeMethod) and not cls.name.startswith("mergekit/") and cls.laws.needs == "tensor"
]


def test_where_and_schedules_over_depth(project: Project) -> None:
    base = tensors_of(project.path / "base")
    full = tensors_of(project.path / "bricks" / "full")
    merged = project.tensors(
        "bricks: {full: bricks/full}\nsteps: [{merge: average, where: {include: ['*.mlp.*'], layers: '1:3'}}]\n", None
    )
    for name in base:
        inside = ".mlp." in name and any(f"layers.{i}." in name for i in (1, 2))
        assert torch.equal(merged[name], full[name] if inside else base[name]), name
    text = "bricks: {full: bricks/full}\nsteps: [{merge: task_arithmetic, lambda: {knots: [0, 1, 0.5]}}]\n"
    merged = project.tensors(text)
    base, full = (tensors_of(project.path / p) for p in ("base", "bricks/full"))
    third = [0.0, 2 / 3, 2 / 3 + 1 / 3 * 0.5, 0.5]
    for name in base:
        layer = name.split(".")[2]
        scale = third[int(layer)] if layer.isdigit() else 0.0 if "embed" in name else 0.5
        expected = base[name].float() + scale * (full[name].float() - base[name].float())
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=0)


def test_rules_and_bricks_of_both_kinds(project: Project) -> None:
    """LoRA adapters and a checkpoint in one merge; a rule for one of them."""
    text = """
    bricks: {one: bricks/one, full: {checkpoint: bricks/full}}
    steps:
      - merge: task_arithmetic
        bricks: {one: 0.5, full: {weight: [{where: {include: ["*.mlp.*"]}, value: 0.25}]}}
    """
    merged = project.tensors(text)
    one = project.tensors("bricks: {one: bricks/one}\nsteps: [{merge: average}]\n")
    full = tensors_of(project.path / "bricks" / "full")
    for name, theta in tensors_of(project.path / "base").items():
        base = theta.float()
        weight = 0.25 if ".mlp." in name else 1.0
        expected = base + 0.5 * (one[name] - base) + weight * (full[name].float() - base)
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=0)


def test_second_step_adds_its_delta(project: Project) -> None:
    """next = current + (method(base, bricks) − base): deltas refer to the base, whatever the step before has done."""
    first, second = "{merge: ties, bricks: {one: 1, full: 1}}", "{merge: task_arithmetic, bricks: {two: 0.5}}"
    head = "bricks: {one: bricks/one, two: bricks/two, full: bricks/full}\n"
    both = project.tensors(head + f"steps: [{first}, {second}]\n")
    one, two = (project.tensors(head + f"steps: [{step}]\n") for step in (first, second))
    for name, theta in tensors_of(project.path / "base").items():
        torch.testing.assert_close(both[name], one[name] + two[name] - theta.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("outer", ["ties", "average"])
def test_recipe_as_a_brick(project: Project, outer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's result counts unrounded: it equals the same merge with the result as a float32 checkpoint. TIES reads it three times."""
    monkeypatch.setattr(specs_module, "BLOCK_ELEMENTS", 256)
    inner = "bricks: {one: bricks/one, full: bricks/full}\nsteps: [{merge: ties, density: 0.3}]\noutput: {dtype: float32}\n"
    document = project.run(inner, "inner.yaml")
    nested = project.tensors(f"bricks: {{i: {{recipe: recipes/inner.yaml}}, two: bricks/two}}\nsteps: [{{merge: {outer}}}]\n")
    checkpoint = project.tensors(
        f"bricks: {{i: {{checkpoint: {document['model']}}}, two: bricks/two}}\nsteps: [{{merge: {outer}}}]\n"
    )
    for name in nested:
        torch.testing.assert_close(nested[name], checkpoint[name], atol=1e-7, rtol=0)


def test_merges_and_bricks_that_grow(project: Project) -> None:
    """Bricks reach the layers that were there before, by their old names; a new layer stays as growth made it."""
    head = "bricks: {full: bricks/full, one: bricks/one}\nsteps: ["
    grow, mix = "{grow: depth, after: [1], check: off}", "{merge: task_arithmetic, where: {layers: '1:3'}}"
    grown, merged, both = (project.tensors(head + steps + "]\n") for steps in (grow, mix, f"{grow}, {mix}"))
    moved = {0: 0, 1: 1, 3: 2, 4: 3}
    for name in both:
        parts = name.split(".")
        layer = int(parts[2]) if parts[2].isdigit() else None
        if layer == 2:
            assert torch.equal(both[name], grown[name])
        elif layer is None:
            assert torch.equal(both[name], merged[name])
        else:
            old = ".".join([*parts[:2], str(moved[layer]), *parts[3:]])
            torch.testing.assert_close(both[name], merged[old], atol=1e-6, rtol=0)
    project.write("steps: [{grow: depth, blocks: 1, check: off}]\n", "grown.yaml")
    with pytest.raises(WorkbenchError, match="recipe grown cannot be a brick: it grows the base"):
        project.tensors("bricks: {g: {recipe: recipes/grown.yaml}}\nsteps: [{merge: average}]\n")


def test_recipes_inside_recipes_on_several_threads(project: Project) -> None:
    """Tensors of the inner and the outer recipe are opened at once, in every order, and no thread waits for another."""
    inner = "bricks: {one: bricks/one, full: bricks/full}\nsteps: [{merge: ties, density: 0.5}]\n"
    project.write(inner, "inner.yaml")
    project.write(
        "bricks: {inner: {recipe: recipes/inner.yaml}, two: bricks/two}\nsteps: [{merge: dare, rescale: l1}]\n", "middle.yaml"
    )
    outer = "bricks: {middle: {recipe: recipes/middle.yaml}, full: bricks/full}\nsteps: [{merge: ties, density: 0.5}]\n"
    models = [Path(project.run(outer, f"outer-{i}.yaml", threads=1 + 3 * i)["model"]) for i in range(6)]
    assert len({(model / "model.safetensors").read_bytes() for model in models}) == 1


@pytest.mark.parametrize("cls", [cls for cls in METHODS if cls.laws.permutation_invariant], ids=lambda cls: cls.name)
def test_order_in_the_recipe_gives_the_same_bytes(project: Project, cls: type[MergeMethod]) -> None:
    written, method = [], cls.name
    for i, order in enumerate(permutations(["one", "two", "full"][: cls.laws.arity[1]])):
        text = f"bricks: {{{', '.join(f'{n}: bricks/{n}' for n in order)}}}\nsteps: [{{merge: {method}}}]\n"
        written.append((Path(project.run(text, f"order-{i}.yaml")["model"]) / "model.safetensors").read_bytes())
    assert len(set(written)) == 1


# -- bricks that do not fit


def test_unfit_bricks(project: Project, llama: Path, model_of: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    short = save_finetuned(llama, tmp_path / "short", seed=1)
    tensors = tensors_of(short)
    save_file({n: t for n, t in tensors.items() if "layers.3.mlp" not in n}, short / "model.safetensors")
    wide = save_finetuned(llama, tmp_path / "wide", seed=1)
    save_file({**tensors, "model.norm.weight": torch.ones(64)}, wide / "model.safetensors")
    extra = save_finetuned(llama, tmp_path / "extra", seed=1)
    edit_json(extra / "config.json", architectures=["LlamaForSequenceClassification"])
    save_file({**tensors, "score.weight": torch.ones(2, 32)}, extra / "model.safetensors")
    other = save_adapter(model_of("gpt2"), tmp_path / "other", seed=1, family="gpt2")
    with pytest.raises(WorkbenchError) as caught:
        project.resolve(f"bricks: {{s: {short}, w: {wide}, x: {extra}, o: {other}}}\nsteps: [{{merge: average}}]\n")
    lines = caught.value.message.splitlines()
    assert lines[0].startswith("brick 's': lacks model.layers.3.mlp.")
    assert lines[1].startswith("brick 'w': model.norm.weight is [64], the base has [32]")
    assert lines[2].startswith("brick 'x': has score.weight that the base does not")
    assert lines[3].startswith("brick 'o': module transformer.h.0.attn.c_attn has no weight in the base.")


def test_tied_heads_that_are_stored(project: Project, llama: Path, tmp_path: Path) -> None:
    """A brick may store lm_head beside the embedding that ties it, if they are equal."""
    from safetensors.torch import save_file

    brick = save_finetuned(llama, tmp_path / "tied", seed=1)
    tensors = tensors_of(brick)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, brick / "model.safetensors")
    merged = project.tensors(f"bricks: {{t: {brick}}}\nsteps: [{{merge: average}}]\n", None)
    assert all(torch.equal(merged[n], tensors[n]) for n in merged)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, brick / "model.safetensors")
    with pytest.raises(WorkbenchError, match=r"brick 't': lm_head\.weight differs from model\.embed_tokens\.weight"):
        project.resolve(f"bricks: {{t: {brick}}}\nsteps: [{{merge: average}}]\n")
    # The other way round: one tensor, written once.
    base, brick = (save_finetuned(llama, tmp_path / name, seed=seed) for name, seed in (("stored", 1), ("plain", 2)))
    tensors = tensors_of(base)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    merged = project.tensors(f"base: {base}\nbricks: {{p: {brick}}}\nsteps: [{{merge: average}}]\n", None)
    assert set(merged) == set(tensors)
    assert torch.equal(merged["model.embed_tokens.weight"], tensors_of(brick)["model.embed_tokens.weight"])


def test_config_that_differs_is_said(project: Project, tmp_path: Path) -> None:
    for name, fields in {
        "same": {"rope_parameters": None, "rope_theta": 10000.0},  # as transformers 4 wrote what 5 calls rope_parameters
        "other": {"rope_parameters": None, "rope_theta": 500000.0, "rms_norm_eps": 1e-3},
    }.items():
        place = project.path / name
        shutil.copytree(project.path / "bricks" / "full", place)
        config = json.loads((place / "config.json").read_text())
        assert config["rope_parameters"]["rope_theta"] == 10000.0
        config = {k: v for k, v in {**config, **fields}.items() if v is not None}
        (place / "config.json").write_text(json.dumps(config))
    assert not project.resolve("bricks: {same: same}\nsteps: [{merge: average}]\n").warnings
    (warning,) = project.resolve("bricks: {other: other}\nsteps: [{merge: average}]\n").warnings
    assert warning == "brick 'other': config.json differs from the base's in rms_norm_eps, rope; the result has the base's values"


@pytest.mark.parametrize("method", ["regmean", "featcal"])
def test_one_file_for_several_bricks_is_warned_about(method: str, project: Project) -> None:
    """Also if the step's own file stands for those without one; a file for each brick, and Fisher, give no warning."""
    for name in ("one", "two", "all"):
        write_jsonl(project.path / f"{name}.jsonl", [{"text": "w1 w2 w3"}])
    bricks = "bricks: {one: bricks/one, two: bricks/two}\n"
    own = "bricks: {one: {calibration: one.jsonl}, two: {calibration: two.jsonl}}"
    assert not [
        w for w in project.resolve(f"{bricks}steps: [{{merge: {method}, {own}}}]\n", "own.yaml").warnings if "calibrates" in w
    ]
    for name, fields in (
        ("all", "calibration: all.jsonl"),
        ("named", "bricks: {one: {calibration: all.jsonl}, two: 1}, calibration: all.jsonl"),
    ):
        found = project.resolve(f"{bricks}steps: [{{merge: {method}, {fields}}}]\n", f"{name}.yaml").warnings
        assert [w for w in found if w.startswith(f"merge-{method}: all.jsonl calibrates one, two: ")]
    fisher = project.resolve(f"{bricks}steps: [{{merge: fisher, calibration: all.jsonl}}]\n", "fisher.yaml").warnings
    assert not [w for w in fisher if "calibrates" in w]


def test_settings_that_one_config_leaves_out_have_their_default(project: Project) -> None:
    """A base without rope_theta computes with 10,000: a brick with a million differs, one with 10,000 does not."""
    base = project.path / "silent"
    shutil.copytree((project.path / "base").resolve(), base)
    drop_json(base / "config.json", "rope_parameters", "rope_theta", "rms_norm_eps")
    for name, fields in {"same": {"rope_theta": 10000.0}, "other": {"rope_theta": 1e6, "rms_norm_eps": 1e-3}}.items():
        place = project.path / name
        shutil.copytree(project.path / "bricks" / "full", place)
        drop_json(place / "config.json", "rope_parameters")
        edit_json(place / "config.json", **fields)
    text = "base: silent\nbricks: {{one: {}}}\nsteps: [{{merge: average}}]\n"
    assert not [w for w in project.resolve(text.format("same")).warnings if "config.json differs" in w]
    (said,) = (w for w in project.resolve(text.format("other")).warnings if "config.json differs" in w)
    assert said == "brick 'one': config.json differs from the base's in rms_norm_eps, rope; the result has the base's values"


@pytest.mark.parametrize(("field", "value"), [("num_attention_heads", 2), ("hidden_act", "gelu"), ("num_key_value_heads", 4)])
def test_other_heads_or_another_activation_are_another_model(field: str, value: Any, project: Project) -> None:
    place = project.path / "other"
    shutil.copytree(project.path / "bricks" / "full", place)
    before = json.loads((place / "config.json").read_text())[field]
    edit_json(place / "config.json", **{field: value})
    assert before != value
    text = "base: base\nbricks: {one: %s}\nsteps: [{merge: average}]\n"
    with pytest.raises(WorkbenchError) as caught:
        project.resolve(text % "other")
    assert f"brick 'one': config.json has {field} {value}, the base has {before}" in caught.value.message
    assert "add `any_base: true` to the brick" in (caught.value.hint or "")
    warnings = project.resolve(text % "{checkpoint: other, any_base: true}").warnings
    assert [w for w in warnings if f"config.json differs from the base's in {field}" in w]


def drop_json(path: Path, *fields: str) -> None:
    data = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({key: value for key, value in data.items() if key not in fields}), "utf-8")
