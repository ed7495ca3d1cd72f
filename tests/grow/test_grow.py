"""Growth: what a grown model computes, what can learn in it, and what its bricks still reach."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from worlds.project import CPU, Project
from worlds.tiny import config, edit_json, live, save_model, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.grow.expansion.remap import GrownSource
from workbench.models.layout import Layout
from workbench.recipe.methods import methods
from workbench.run.compose import compose
from workbench.steps import NEW, Axis, Grown
from workbench.weights.specs import TensorSpec

FAMILIES = ["llama_untied", "qwen2", "gpt2", "gemma2", "gpt_neox", "gpt_neo", "opt"]
# Families with a layout of their own; `test_growth_table.py` grows the others.
MORE = ["qwen3", "gemma3", "olmo2", "phi", "granite", "smollm3", "phi3", "cohere", "gpt_neox sequential"]


def grown(project: Project, base: Path, step: str) -> dict[str, Any]:
    """Run one growth step on a base; reload what was written and compare it with the base once more."""
    from transformers import AutoModelForCausalLM

    document = project.run(f"base: {base}\nsteps: [{step}]\n")
    after, info = AutoModelForCausalLM.from_pretrained(document["model"], output_loading_info=True)
    assert not any(info.values())
    tokens = torch.randint(2, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        old, new = live(base)(tokens).logits, after.float().eval()(tokens).logits
    document["difference"] = float((old - new[..., : old.shape[-1]]).abs().max()) / max(1.0, float(old.abs().max()))
    return document


@pytest.mark.parametrize("family", MORE)
def test_depth_of_more_families(family: str, project: Project, dense_of: Callable[[str], Path]) -> None:
    document = grown(project, dense_of(family), "{grow: depth, blocks: 2}")
    check = document["steps"][0]["check"]
    assert (check["max_logit_difference"], check["same_generation"]) == (0.0, True)
    assert document["difference"] == 0.0
    assert check["gradient"]["now"] < check["gradient"]["after_one_step"] == document["steps"][0]["tensors"]


@pytest.mark.parametrize(("family", "place"), [("llama", "after: [0, -1]"), *((family, "blocks: 2") for family in FAMILIES)])
def test_depth_preserves(family: str, place: str, project: Project, model_of: Callable[..., Path]) -> None:
    """In float32: equal logits and cached generation, checked by `run` itself and once more on what it wrote."""
    from transformers import AutoModelForCausalLM

    base = model_of(family, torch.float32)
    document = project.run(f"base: {base}\nsteps: [{{grow: depth, {place}}}]\n")
    check = document["steps"][0]["check"]
    assert (check["max_logit_difference"], check["same_generation"]) == (0.0, True)
    grown, info = AutoModelForCausalLM.from_pretrained(document["model"], output_loading_info=True)
    assert not any(info.values())
    assert grown.config.num_hidden_layers == 6
    tokens = torch.randint(2, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(live(base)(tokens).logits, grown.float()(tokens).logits)


def test_lists_over_layers_move_with_them() -> None:
    """Layer types follow their layers; GPT-Neo's run-length encoding says the same as its list."""
    expand = methods()["grow:depth"].model_validate({"grow": "depth", "after": [0, 2]})
    for family, key in (("qwen2", "layer_types"), ("gemma2", "layer_types"), ("gpt_neo", "attention_layers")):
        before = config(family).to_dict()
        after = grow_config(expand, before)
        old = before[key]
        assert after[key] == [old[0], old[0], old[1], old[2], old[2], old[3]]
        if family == "gpt_neo":
            assert after["attention_types"] == [[after[key], 1]]
    with pytest.raises(WorkbenchError, match=r"refers to layers by number \(moe_layer_freq\), and growth moves layers"):
        grow_config(expand, {**config("llama").to_dict(), "moe_layer_freq": 2})


def grow_config(step: Any, data: dict[str, Any]) -> dict[str, Any]:
    from workbench.models.layout import Model

    names = ["embed.weight"] + [f"layers.{i}.{p}.weight" for i in range(4) for p in ("self_attn.o_proj", "mlp.down_proj")]
    grown = step.expand(Model(type("W", (), {"specs": dict.fromkeys(names)})(), {"num_hidden_layers": 4, **data}))
    return dict(grown.config)


def test_order_of_the_grown_file(project: Project) -> None:
    document = project.run("steps: [{grow: depth, after: [1], check: off}]\n")
    names = list(tensors_of(Path(document["model"])))
    layers = [int(n.split(".")[2]) for n in names if ".layers." in n]
    assert sorted(set(layers)) == [0, 1, 2, 3, 4]
    assert document["steps"][0]["new_layers"] == [2]
    zeros = [n for n, t in tensors_of(Path(document["model"])).items() if not t.any()]
    assert sorted(zeros) == ["model.layers.2.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"]


def test_broken_growth_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "residual_writers", lambda *_: [])
    with pytest.raises(WorkbenchError, match="step grow-depth: the grown model computes something else") as caught:
        project.run("steps: [{grow: depth, blocks: 1}]\n")
    assert caught.value.exit_code == 3
    runs = list((project.path / "runs").iterdir())
    assert len(runs) == 1
    assert json.loads((runs[0] / "run.json").read_text("utf-8"))["status"] == "failed"
    assert not (runs[0] / "model").exists()
    assert project.run("steps: [{grow: depth, blocks: 1, check: off}]\n")["status"] == "done"


KEPT = [
    ("{grow: depth, blocks: 1}", {"identical": 38, "new": 9}),
    ("{grow: depth, blocks: 1}, {merge: task_arithmetic, bricks: {one: 1}}", {"identical": 22, "new": 9, "changed_later": 16}),
    (
        "{grow: depth, blocks: 1}, {grow: brick, rank: 2, data: rows.jsonl, steps: 1}",
        {"identical": 10, "new": 9, "changed_later": 28},
    ),
    ("{grow: depth, blocks: 1}, {grow: width, neurons: 60, check: off}", {"identical": 26, "new": 9, "changed_later": 12}),
    ("{grow: stack, order: [0, 1, 1, 3]}", {"identical": 29, "new": 9}),
    ("{grow: width, neurons: 60}", {"identical": 26, "with_additions": 12}),
    ("{grow: width, hidden: 48}", {"with_additions": 29, "rescaled": 9}),
    ("{grow: experts, experts: 2}", {"identical": 38, "new": 16}),
]


@pytest.mark.parametrize(("steps", "expected"), KEPT)
def test_old_elements_are_the_same_bits(steps: str, expected: dict[str, int], project: Project) -> None:
    """Of every operator, counted in the files, bf16 included; what later steps change is not counted as kept."""
    (project.path / "rows.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n', "utf-8")
    for check, dtype in (("tensors", "bfloat16"), ("full", "float32")):
        with_check = steps.replace("}", f", check: {check}}}", 1)
        text = f"bricks: {{one: bricks/one}}\nsteps: [{with_check}]\noutput: {{dtype: {dtype}}}\n"
        document = project.run(text, f"{check}.yaml")
        found = document["steps"][0]["check"]
        card = (Path(document["model"]) / "README.md").read_text("utf-8")
        assert f"## Growth\n\n- `{document['steps'][0]['id']}`: " in card
        assert {k: n for k, n in found["kept"].items() if n} == expected
        assert found.get("reloaded", False) == (check == "full")


def test_files_that_differ_are_not_kept(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old tensor that changes on its way into the file, and a config.json that loads another model: exit 3, and no model."""
    import workbench.run.forms
    from workbench.grow.expansion.remap import GrownWeights

    opened = GrownWeights.open

    class Shifted:
        def __init__(self, source: Any) -> None:
            self.source = source

        def read(self, start: int, stop: int, out: torch.Tensor) -> None:
            self.source.read(start, stop, out)
            out[-1, -1] += 0.5

    def shifted(self: GrownWeights, name: str, device: torch.device) -> Any:
        source = opened(self, name, device)
        return Shifted(source) if name == "model.layers.2.self_attn.k_proj.weight" else source

    monkeypatch.setattr(GrownWeights, "open", shifted)
    with pytest.raises(WorkbenchError, match=r"model.layers.2.self_attn.k_proj.weight differs in row 15 from model") as caught:
        project.run("steps: [{grow: stack, order: [0, 1, 2, 3, 3], check: tensors}]\n")
    assert caught.value.exit_code == 3
    with pytest.raises(WorkbenchError, match=r"the grown model computes something else") as caught:
        project.run("steps: [{grow: depth, after: [3], check: tensors}]\n")
    assert caught.value.exit_code == 3
    monkeypatch.undo()
    written = workbench.run.forms.write_config

    wrong = {
        r"layer 0 differently from its source, layer 0.*variance_epsilon is 0.1, expected 1e-06": {"rms_norm_eps": 0.1},
        "the reloaded model gives other outputs than the composed tensors": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 3.0}
        },
    }
    for message, fields in wrong.items():
        monkeypatch.setattr(workbench.run.forms, "write_config", lambda config, *rest, f=fields: written({**config, **f}, *rest))
        with pytest.raises(WorkbenchError, match=message) as caught:
            project.run("steps: [{grow: stack, order: [0, 1, 2]}]\n")
        assert caught.value.exit_code == 3
    monkeypatch.undo()
    unreadable = SimpleNamespace(from_pretrained=lambda *_, **__: Path("/").read_bytes())
    monkeypatch.setattr("workbench.run.check_growth.decoder_class", lambda *_: unreadable)
    with pytest.raises(WorkbenchError, match=r"^step deeper: .* cannot load the written model \(.*Is a directory: '/'\)$"):
        project.run("steps: [{id: deeper, grow: stack, order: [0, 1, 2]}]\n")
    assert not list((project.path / "runs").glob("*/model*"))


def test_reload_is_judged_by_what_growth_did(project: Project) -> None:
    """A config.json that names another dtype than the tensors have, and a tensor that the architecture has no use for, are the base's own."""
    from safetensors.torch import load_file, save_file

    base = save_model(project.path / "odd", "llama", dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {**tensors, "mtp.head.weight": torch.ones(2, 2, dtype=torch.bfloat16)}, base / "model.safetensors", {"format": "pt"}
    )
    edit_json(base / "config.json", dtype="float32")
    check = project.run("base: odd\nsteps: [{grow: depth, blocks: 1}]\n")["steps"][0]["check"]
    assert check["reloaded"]
    assert check["kept"]["identical"] == len(tensors) + 1


def test_post_norm_models_are_caught(project: Project) -> None:
    """OPT-350m normalises after the sum: an added block of zeros changes its function, which only the check can know."""
    base = save_model(project.path / "post", "opt", dtype=torch.float32)
    edit_json(base / "config.json", do_layer_norm_before=False)
    with pytest.raises(WorkbenchError, match="computes something else"):
        project.run("base: post\nsteps: [{grow: depth, blocks: 1}]\n")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{grow: depth, blocks: 5}", "`blocks: 5` for a model of 4 layers, expected at most one copy of each layer"),
        ("{grow: depth, after: [4]}", "`after` names layer 4; the model has layers 0..3"),
        ("{grow: depth, after: [-5]}", "`after` names layer -5; the model has layers 0..3"),
    ],
)
def test_growth_errors(step: str, message: str, project: Project) -> None:
    with pytest.raises(WorkbenchError, match=message) as caught:
        compose(project.resolve(f"steps: [{step}]\n"), CPU)
    assert caught.value.exit_code == 2


# -- stack


def test_stack_is_what_passthrough_writes(project: Project) -> None:
    """Two overlapping slices, with a factor: mergekit's `passthrough` writes the same tensors."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    base = (project.path / "base").resolve()
    slices = "slices: [{layers: [0, 3]}, {layers: [1, 4], scale: {'mlp.down_proj.*': 0.5}}]"
    document = project.run(f"steps: [{{grow: stack, {slices}}}]\noutput: {{dtype: float32}}\n")
    assert document["steps"][0] | {"key": "", "check": {}} == {
        "id": "grow-stack",
        "grow": "stack",
        "key": "",
        "check": {},
        "tensors": 18,
        "order": [0, 1, 2, 1, 2, 3],
        "new_layers": [3, 4],
        "gone_layers": [],
        "blocks": [
            {"layers": "0-2", "source": "the configuration so far", "from": "0-2"},
            {"layers": "3-5", "source": "the configuration so far", "from": "1-3"},
        ],
    }
    source = {"model": str(base)}
    theirs = MergeConfiguration.model_validate({"merge_method": "passthrough", "dtype": "float32", "slices": [
        {"sources": [{**source, "layer_range": [0, 3]}]},
        {"sources": [{**source, "layer_range": [1, 4], "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]}}]},
    ]})  # fmt: skip
    run_merge(theirs, str(project.path / "theirs"), MergeOptions(copy_tokenizer=False))
    ours, expected = tensors_of(Path(document["model"])), tensors_of(project.path / "theirs")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in ours.items())
    assert live(Path(document["model"])).config.num_hidden_layers == 6


def test_bricks_after_a_stack(project: Project) -> None:
    """The first place of a layer keeps its bricks, a repeat has none; a brick of a layer that is gone is named."""
    head = "bricks: {one: bricks/one}\n"
    stack, mix = "{grow: stack, order: [0, 1, 2, 3, 1]}", "{merge: task_arithmetic}"
    merged = project.tensors(head + f"steps: [{mix}]\n")
    after = project.tensors(head + f"steps: [{stack}, {mix}]\n")
    base = project.tensors("name: plain\n")
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert all(torch.equal(after[name.format(i)], merged[name.format(i)]) for i in range(4))
    assert torch.equal(after[name.format(4)], base[name.format(1)])
    with pytest.raises(
        WorkbenchError, match=r"brick 'one' changes \d+ tensors that step grow-stack has removed, such as model.layers.3."
    ) as caught:
        project.tensors(head + f"steps: [{{grow: stack, order: [0, 1, 2]}}, {mix}]\n")
    assert "where" in (caught.value.hint or "")
    kept = project.tensors(head + "steps: [{grow: stack, order: [0, 1, 2]}, {merge: task_arithmetic, where: {layers: '0:3'}}]\n")
    assert torch.equal(kept[name.format(2)], merged[name.format(2)])


# -- width


@pytest.mark.parametrize(
    ("step", "families"),
    [
        ("neurons: 150", ["llama", "gpt2", "gpt_neox", "gpt_neo", "opt", "gemma2", "phi3", "granite"]),
        ("neurons: 150, how: copy", ["llama", "gpt2", "phi3", "opt"]),
        ("key_value_heads: 4", ["qwen2", "qwen3", "gemma2", "granite"]),
        ("hidden: 48", ["qwen2", "qwen3", "granite", "olmo2", "phi3"]),
        ("neurons: 96, key_value_heads: 8, hidden: 64", ["llama", "qwen3"]),
    ],
)
def test_width_preserves(step: str, families: list[str], project: Project, dense_of: Callable[[str], Path]) -> None:
    """Checked by `run`, and once more on what it wrote; every tensor with additions can learn after one step."""
    for family in families:
        document = grown(project, dense_of(family), f"{{grow: width, {step}}}")
        record = document["steps"][0]
        assert record["check"]["same_generation"], family
        assert document["difference"] < 1e-5, family
        if "copy" not in step:
            assert record["check"]["gradient"]["after_one_step"] >= record["check"]["gradient"]["now"] > 0, family
        runs = project.path / "runs"
        runs.rename(runs.with_name(f"runs-{family}-{len(step)}"))


def test_copies_share_their_output_and_learn_apart(project: Project, dense_of: Callable[[str], Path]) -> None:
    """Net2Net: shares of one neuron's copies add up to its output, and differ."""
    base = dense_of("llama")
    after = project.tensors(f"base: {base}\nsteps: [{{grow: width, neurons: 72, how: copy}}]\n")
    before = tensors_of(base)
    up, down = (f"model.layers.1.mlp.{p}_proj.weight" for p in ("up", "down"))
    assert torch.equal(after[up][48:], before[up][:24])
    torch.testing.assert_close(after[down][:, :24] + after[down][:, 48:], before[down][:, :24])
    torch.testing.assert_close(after[down][:, 48:], before[down][:, :24] * 2 / 3)


def test_what_is_drawn_depends_on_seed_and_row_alone() -> None:
    class Ones:
        def read(self, start: int, stop: int, out: torch.Tensor) -> None:
            out.copy_(torch.arange(start, stop)[:, None].expand_as(out))

    rows = Axis(np.array([1, 2, NEW, 0, 0, NEW, NEW, 3]))
    made = Grown("x", rows=rows, cols=Axis(np.array([0, NEW, 1])), std=0.5, scale=2.0)
    source = GrownSource(Ones(), TensorSpec.of((4, 2), torch.float32), made, seed=3)
    whole = torch.empty(8, 3)
    source.read(0, 8, whole)
    parts = torch.empty(8, 3)
    for start in range(0, 8, 3):
        source.read(start, min(start + 3, 8), parts[start : start + 3])
    assert torch.equal(whole, parts)
    assert whole[[0, 1, 3, 4, 7]][:, [0, 2]].tolist() == [[2.0, 2.0], [4.0, 4.0], [0.0, 0.0], [0.0, 0.0], [6.0, 6.0]]
    drawn = torch.cat([whole[[2, 5, 6]].flatten(), whole[[0, 1, 3, 4, 7], 1]])
    assert len(drawn.unique()) == len(drawn)
    other = torch.empty(8, 3)
    GrownSource(Ones(), TensorSpec.of((4, 2), torch.float32), made, seed=4).read(0, 8, other)
    assert not (other == whole)[2].any()


def test_merges_after_width(project: Project) -> None:
    """Tensors that keep their shape are merged; one that has another shape is named."""
    head = "bricks: {one: bricks/one}\n"
    wide = "{grow: width, neurons: 64, check: off}"
    attention = "{merge: task_arithmetic, where: {include: ['*.self_attn.*']}}"
    name = "model.layers.2.self_attn.q_proj.weight"
    after, merged = (project.tensors(head + f"steps: [{steps}]\n") for steps in (f"{wide}, {attention}", attention))
    assert torch.equal(after[name], merged[name])
    with pytest.raises(
        WorkbenchError, match=r"bricks change \d+ tensors whose shape step grow-width has changed, such as model.layers.0.mlp"
    ):
        project.tensors(head + f"steps: [{wide}, {{merge: task_arithmetic}}]\n")


BAD = {
    "{grow: stack, order: [0, 4]}": "layer 4 does not exist; the model has layers 0..3",
    "{grow: stack, order: [0], slices: [{layers: [0, 1]}]}": "expected one of `slices",
    "{grow: stack, slices: [{layers: [2, 1]}]}": "expected 0 <= first < end",
    "{grow: stack, slices: [{layers: [0, 2], scale: {nothing: 2.0}}]}": "the glob 'nothing' of `scale` matches no tensor of layer 0",
    "{grow: width}": "expected at least one of",
    "{grow: width, neurons: 48}": "the model has 48, expected more",
    "{grow: width, key_value_heads: 3}": "not a multiple of the number of attention heads",
    "{grow: depth, blocks: 1, check: sometimes}": "expected 'full', 'tensors' or 'off', found 'sometimes'",
}


@pytest.mark.parametrize("step", BAD)
def test_refused(step: str, project: Project) -> None:
    with pytest.raises(WorkbenchError, match=re.escape(BAD[step])):
        compose(project.resolve(f"steps: [{step}]\n"), CPU)


UNFIT = {
    ("hidden: 64", "gpt2"): "has no RMS norms",
    ("hidden: 64", "gemma2"): "scales its embeddings by the width",
    ("key_value_heads: 8", "gpt_neox"): "model_type gpt_neox as hidden_size / num_attention_heads",
    ("key_value_heads: 8", "olmo2"): "normalizes over all heads",
    ("key_value_heads: 8", "opt"): "config.json has no `head_dim`",
    ("neurons: 200", "bloom"): "config.json has no field for the number of neurons",
}


@pytest.mark.parametrize(("step", "family"), UNFIT)
def test_families_that_do_not_fit(step: str, family: str, project: Project, dense_of: Callable[[str], Path]) -> None:
    with pytest.raises(WorkbenchError, match=UNFIT[step, family]):
        compose(project.resolve(f"base: {dense_of(family)}\nsteps: [{{grow: width, {step}}}]\n"), CPU)


def test_a_slice_far_beyond_the_model_is_refused_before_it_is_written_out(project: Project) -> None:
    """A list of layers would take more memory than there is."""
    from workbench.grow.stack import Stack

    step = Stack.model_validate({"grow": "stack", "slices": [{"layers": [0, 2**40]}]})
    with pytest.raises(WorkbenchError, match=r"layer 1099511627775 does not exist; the configuration so far has layers 0\.\.3"):
        step.expand(project.resolve("name: plain\n").base)
