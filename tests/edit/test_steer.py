"""`edit: steer` and `grow: bias`: a direction between two lists of prompts, stored as the bias of feed-forward output projections."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.jsonl import write_jsonl
from worlds.project import Project
from worlds.tiny import files_of, save_adapter, save_model, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.ground.manifest import MANIFEST
from workbench.run.plan import plan

POSITIVE = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w1 w5 w10"]
NEGATIVE = ["w11 w2 w13", "w14 w5", "w16 w7 w18 w19"]
F32 = "output: {dtype: float32}\n"
BIAS = "{grow: bias}"


def steer(layers: str = "[1, 2]", strength: float = 1.5, **fields: str) -> str:
    named = {"positive": "positive.jsonl", "negative": "negative.jsonl", **fields}
    return f"{{edit: steer, {', '.join(f'{k}: {v}' for k, v in named.items())}, layers: {layers}, strength: {strength}}}"


def with_prompts(project: Project) -> Project:
    write_jsonl(project.path / "positive.jsonl", [{"prompt": text} for text in POSITIVE])
    write_jsonl(project.path / "negative.jsonl", [{"text": text} for text in NEGATIVE])
    return project


@pytest.fixture
def llama_world(project: Project) -> Project:
    return with_prompts(project)


@pytest.fixture
def gpt2_world(tmp_path: Path) -> Project:
    save_model(tmp_path / "base", "gpt2", dtype=torch.float32)
    (tmp_path / "recipes").mkdir()
    return with_prompts(Project(tmp_path))


def opened(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def states(model: Any, tokenizer: Any, text: str, layer: int) -> torch.Tensor:
    """Output of a decoder layer [time, width], by transformers' own record of hidden states; the last layer's is not among them."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found: torch.Tensor = model(ids, output_hidden_states=True).hidden_states[layer + 1][0]
    return found


def direction(base: Path, layer: int) -> torch.Tensor:
    model, tokenizer = opened(base)
    means = [
        torch.stack([states(model, tokenizer, t, layer)[-1].double() for t in texts]).mean(0) for texts in (POSITIVE, NEGATIVE)
    ]
    return (means[0] - means[1]).float()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_state_moves_by_the_direction_at_every_position(family: str, request: pytest.FixtureRequest) -> None:
    world: Project = request.getfixturevalue(f"{family}_world")
    first = f"{BIAS}, " if family == "llama" else ""
    run = world.run(f"steps: [{first}{steer('[1]')}]\n" + F32)
    base, tokenizer = opened(world.path / "base")
    steered, _ = opened(Path(run["model"]))
    v = direction(world.path / "base", 1)
    for text in ("w1 w2 w3 w4 w5", "w20", "w11 w2 w13"):
        before, after = (states(m, tokenizer, text, 1) for m in (base, steered))
        torch.testing.assert_close(after - before, (1.5 * v).expand_as(before), atol=1e-6, rtol=1e-6)
        # A linear layer with a bias of zero sums in another order than one without.
        earlier = [states(m, tokenizer, text, 0) for m in (base, steered)]
        torch.testing.assert_close(*earlier, atol=1e-6 if family == "llama" else 0, rtol=0)


def test_a_strength_of_zero_changes_nothing(llama_world: Project) -> None:
    plain = llama_world.run("steps: []\n")
    zero = llama_world.run(f"steps: [{steer(strength=0)}]\n")
    zero_files, plain_files = (files_of(Path(run["model"])) for run in (zero, plain))
    for files in (zero_files, plain_files):
        del files["README.md"], files[MANIFEST]  # the card names the recipe
    assert zero_files == plain_files
    assert "model.safetensors" in zero_files


def test_biases_of_zero_keep_the_function(llama_world: Project) -> None:
    run = llama_world.run(f"steps: [{BIAS}]\n" + F32)
    (step,) = run["steps"]
    config = json.loads((Path(run["model"]) / "config.json").read_text("utf-8"))
    before, after = (tensors_of(p) for p in (llama_world.path / "base", Path(run["model"])))
    added = {name: t for name, t in after.items() if name not in before}
    layers = config["num_hidden_layers"]
    assert (config["mlp_bias"], step["biases"], len(added)) == (True, 3 * layers, 3 * layers)
    assert {name.rpartition("layers.")[2].partition(".")[2] for name in added} == {
        f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")
    }
    assert not any(t.any() for t in added.values())
    base, tokenizer = opened(llama_world.path / "base")
    grown, _ = opened(Path(run["model"]))
    ids = torch.tensor([tokenizer("w1 w2 w3 w4")["input_ids"]])
    torch.testing.assert_close(base(ids).logits, grown(ids).logits, atol=1e-6, rtol=0)


def on_biased_base(world: Project) -> Project:
    """The project with a base that has biases, and two steering bricks made on it."""
    run = world.run(f"steps: [{BIAS}]\n" + F32, "biased.yaml")
    (world.path / "biased").symlink_to(run["model"])
    for name, layers in (("one", "[1]"), ("two", "[1, 2]")):
        made = world.run(f"base: biased\nsteps: [{{id: vector, {steer(layers).removeprefix('{')}]\n" + F32, f"{name}.yaml")
        (world.path / f"v-{name}").symlink_to(Path(made["run"]) / "edits" / "vector")
    return world


def test_bricks_are_summed_and_merged_with_a_lora(llama_world: Project) -> None:
    world = on_biased_base(llama_world)
    save_adapter(world.path / "biased", world.path / "lora", seed=3)
    head = "base: biased\nbricks: {one: v-one, two: v-two, lora: lora}\n"
    lora = world.tensors(head + "steps: [{merge: task_arithmetic, bricks: {lora: 1}}]\n" + F32)
    merged = world.tensors(head + "steps: [{merge: task_arithmetic, bricks: {one: 2, two: -0.5, lora: 1}}]\n" + F32)
    base = tensors_of(world.path / "biased")
    vectors = {i: 1.5 * direction(world.path / "biased", i) for i in (1, 2)}
    expected = {1: 2 * vectors[1] - 0.5 * vectors[1], 2: -0.5 * vectors[2]}
    for name, tensor in merged.items():
        layer = name.split(".")[2] if name.endswith("down_proj.bias") else ""
        if layer in ("1", "2"):
            torch.testing.assert_close(tensor, base[name] + expected[int(layer)], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(tensor, lora[name]), name


def test_peft_loads_the_brick(llama_world: Project) -> None:
    from peft import PeftModel

    world = on_biased_base(llama_world)
    text = "base: biased\nbricks: {two: v-two}\nsteps: [{merge: task_arithmetic, bricks: {two: 1}}]\n"
    merged, tokenizer = opened(Path(world.run(text + F32)["model"]))
    base, _ = opened(world.path / "biased")
    adapted = PeftModel.from_pretrained(base, world.path / "v-two")
    ids = torch.tensor([tokenizer("w1 w2 w3 w4")["input_ids"]])
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_holds_the_directions(gpt2_world: Project) -> None:
    from peft import PeftModel

    text = f"steps: [{steer('[0, 3]')}]\n"
    steered, tokenizer = opened(Path(gpt2_world.run(text + F32)["model"]))
    adapter = gpt2_world.run(text + "output: {form: adapter}\n", "adapter.yaml")["adapter"]
    base, _ = opened(gpt2_world.path / "base")
    ids = torch.tensor([tokenizer("w1 w2 w3 w4")["input_ids"]])
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, adapter)(ids).logits
    torch.testing.assert_close(adapted, steered(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(adapted, plain, atol=1e-3)


def refused(world: Project, text: str) -> WorkbenchError:
    with pytest.raises(WorkbenchError) as caught:
        world.run(text + F32)
    return caught.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: (w.path / "negative.jsonl").write_text(""), "negative.jsonl: no prompts"),
        (lambda w: write_jsonl(w.path / "negative.jsonl", [{"prompt": t} for t in POSITIVE[::-1]]), "have the same prompts"),
        (lambda w: (w.path / "negative.jsonl").unlink(), "negative.jsonl"),
    ],
)
def test_bad_prompts(llama_world: Project, change: Callable[[Project], Any], message: str) -> None:
    change(llama_world)
    assert message in refused(llama_world, f"steps: [{BIAS}, {steer()}]\n").message


@pytest.mark.parametrize(
    ("step", "message", "code"),
    [
        (f"{BIAS}, {steer('[9]')}", "edit steer: layer 9 does not exist; the model has layers 0 to 3", 2),
        (f"{BIAS}, {steer('[1, 1]')}", "edit steer: layer 1 is listed twice", 2),
        (f"{BIAS}, {steer('[]')}", "layers", 2),
        (f"{BIAS}, {steer(strength='.nan')}", "strength", 2),  # type: ignore[arg-type]
        (steer(), "edit steer: model.layers.1.mlp.down_proj has no bias in this llama model", 1),
        (steer("[4]", 0), "edit steer: layer 4 does not exist; the model has layers 0 to 3", 2),
        (f"{BIAS}, {BIAS}", "grow bias: the base has these biases already", 2),
    ],
)
def test_bad_steps(llama_world: Project, step: str, message: str, code: int) -> None:
    error = refused(llama_world, f"steps: [{step}]\n")
    assert message in error.message
    assert error.exit_code == code


def test_other_families_are_refused_by_name(gpt2_world: Project) -> None:
    error = refused(gpt2_world, f"steps: [{BIAS}]\n")
    assert "grow bias: the base is a gpt2 model" in error.message


def test_the_plan_needs_no_model(gpt2_world: Project) -> None:
    row = plan(gpt2_world.resolve(f"steps: [{steer()}]\n"), gpt2_world.path / "runs").steps[0].to_dict()
    assert (row["inputs"], row["layers"], row["strength"]) == (["positive.jsonl", "negative.jsonl"], [1, 2], 1.5)
    with pytest.raises(WorkbenchError, match="layer 7 does not exist"):
        plan(gpt2_world.resolve(f"steps: [{steer('[7]')}]\n"), gpt2_world.path / "runs")
