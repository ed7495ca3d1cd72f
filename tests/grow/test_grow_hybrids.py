"""Depth and width of mixtures and hybrids: outputs of every expert and mixer that start at zero, and what config.json says of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.growing import logits_of, save_family
from worlds.project import CPU, Project
from worlds.tiny import tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.grow.expansion import resize
from workbench.grow.expansion.layers import concatenated, reordered
from workbench.models.layout import Layout
from workbench.run.compose import compose

TOKENS = torch.randint(2, 60, (3, 40), generator=torch.Generator().manual_seed(5))
"""Longer than the windows of 8 tokens and the convolutions of 4."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "qwen3_moe, every second": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "deepseek_v3": ("deepseek_v3", {"first_k_dense_replace": 2, "n_shared_experts": 2, "num_key_value_heads": 4, "head_dim": 4}),
    "gpt_oss": ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]}),
    "glm4_moe": ("glm4_moe", {"first_k_dense_replace": 1, "attention_bias": True}),
    "qwen3_next": (
        "qwen3_next",
        {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"], "mlp_only_layers": [2]},
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"], "conv_bias": True}),
}
"""Case -> family, fields of its configuration."""


@pytest.mark.parametrize("case", CASES)
def test_depth_is_exact(case: str, project: Project) -> None:
    """In front, in the middle and at the end, tied and untied: the same bits, with a cache too, and every copy can learn."""
    family, fields = CASES[case]
    for place, tied, copied in (("after: [0, 2]", True, [0, 2]), ("after: [1, -1]", False, [1, 3])):
        name = f"base-{tied}"
        save_family(family, project.path / name, {**fields, "tie_word_embeddings": tied})
        document = project.run(f"base: {name}\nsteps: [{{grow: depth, {place}}}]\n")
        step = document["steps"][0]
        assert step["copied_layers"] == copied
        assert (step["check"]["max_logit_difference"], step["check"]["same_generation"]) == (0.0, True)
        assert step["check"]["gradient"]["after_one_step"] > step["check"]["gradient"]["now"] > 0
        assert torch.equal(logits_of(document["model"], TOKENS), logits_of(project.path / name, TOKENS)), place


@pytest.mark.parametrize(
    ("case", "left"),
    [
        ("mixtral", "experts.3.w2"),
        ("gpt_oss", "experts.down_proj_bias"),
        ("gpt_oss", "self_attn.o_proj.bias"),
        ("deepseek_v3", "shared_experts.down_proj"),
        ("glm4_moe", "experts.1.down_proj"),
        ("qwen3_next", "linear_attn.out_proj"),
        ("falcon_h1", "mamba.out_proj.bias"),
        ("falcon_h1", "feed_forward.down_proj.weight"),
        ("lfm2", "conv.out_proj.bias"),
        ("lfm2", "feed_forward.w2"),
    ],
)
def test_every_output_counts(case: str, left: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """One output that is not zero changes the function, and the check says so."""
    base, writers = save_family(CASES[case][0], project.path / "base2", CASES[case][1]), Layout.residual_writers
    names = [name for layer in range(4) for name in writers(project.resolve(f"base: {base}\nsteps: []\n").base.layout, layer)]
    assert any(left in name for name in names)
    monkeypatch.setattr(Layout, "residual_writers", lambda *a: [name for name in writers(*a) if left not in name])
    with pytest.raises(WorkbenchError, match="the grown model computes something else"):
        project.run(f"base: {base}\nsteps: [{{grow: depth, blocks: 4}}]\n")


def test_a_part_without_a_known_output_is_named(project: Project) -> None:
    """Before any work: a copy of a layer that still writes would change the function."""
    save_family("inkling_text", project.path / "odd")
    with pytest.raises(WorkbenchError, match="layer 3: no known tensor is the output of attn_sconv to the residual stream"):
        compose(project.resolve("base: odd\nsteps: [{grow: depth, blocks: 1, check: off}]\n"), CPU)


def test_numbers_of_layers_move(project: Project) -> None:
    """By transformers' rules: which layers are dense, in the order [0, 0, 1, 2, 3, 3]."""
    order = [0, 0, 1, 2, 3, 3]
    for fields, moved in (
        ({"mlp_only_layers": [0, 2]}, {"mlp_only_layers": [0, 1, 3]}),
        ({"mlp_only_layers": [0, 1, 2, 3]}, {"mlp_only_layers": [0, 1, 2, 3, 4, 5]}),
        ({"decoder_sparse_step": 2}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 3]}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 3, 4, 5]}),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 1}, {"first_k_dense_replace": 2, "moe_layer_freq": 1}),
        ({"num_dense_layers": 3}, {"num_dense_layers": 4}),
        ({"moe_layer_freq": [0, 1, 1, 1]}, {"moe_layer_freq": [0, 0, 1, 1, 1, 1]}),
        ({"moe_layers": [1, 3], "interleave_moe_layer_step": 2}, {"moe_layers": [2, 4, 5], "interleave_moe_layer_step": 2}),
        ({"attn_layer_indices": [3]}, {"attn_layer_indices": [4, 5]}),
    ):
        assert reordered({"num_hidden_layers": 4, **fields}, 4, order, "depth") == {"num_hidden_layers": 6, **moved}
    ernie = {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 1}
    assert reordered(ernie, 4, order, "depth") == {
        **ernie,
        "num_hidden_layers": 6,
        "moe_layer_start_index": 2,
        "moe_layer_end_index": -1,
    }
    with pytest.raises(
        WorkbenchError, match=r"the first 2 layers are dense \(first_k_dense_replace\), so no layer with experts"
    ) as caught:
        reordered({"num_hidden_layers": 4, "first_k_dense_replace": 2}, 4, [0, 2, 1, 3], "stack")
    assert caught.value.hint == "Keep the layers below 2 in front."
    maverick = {"model_type": "llama4_text", "interleave_moe_layer_step": 2}
    for rule in ({"attn_layer_period": 2}, {"moe_layer_freq": 2}, maverick, {**ernie, "moe_layer_end_index": 2}):
        with pytest.raises(WorkbenchError, match="refers to layers by number"):
            reordered({"num_hidden_layers": 4, **rule}, 4, order, "depth")
    for rule in ({"first_k_dense_replace": 1}, {"mlp_only_layers": [0, 1, 2, 3]}):
        with pytest.raises(WorkbenchError, match="refers to layers by number"):
            concatenated([({"num_hidden_layers": 4, **rule}, 4)] * 2, "stack")


def test_patterns_of_published_files_are_read_as_transformers_reads_them(project: Project) -> None:
    """Qwen3-Next and LFM2 state an interval and numbers instead of a list over layers."""
    for family, fields, expected in (
        ("qwen3_next", {"full_attention_interval": 2}, ["linear_attention", "full_attention"] * 2),
        ("lfm2", {"full_attn_idxs": [1, 2]}, ["conv", "full_attention", "full_attention", "conv"]),
    ):
        config = {"model_type": family, "num_hidden_layers": 4, "architectures": None, **fields}
        grown = reordered(config, 4, [0, 1, 1, 2, 3], "depth")
        assert grown["layer_types"] == [expected[old] for old in (0, 1, 1, 2, 3)], family


@pytest.mark.parametrize(("step", "number"), [("{grow: depth, blocks: 2}", 6), ("{grow: stack, order: [0, 1, 3]}", 3)])
def test_layers_that_predict_more_tokens_stay_behind_the_last(step: str, number: int, project: Project) -> None:
    """DeepSeek-V3 and GLM-4.5 store them as further layers; a new layer must not take their number."""
    base = save_family("glm4_moe", project.path / "mtp")
    tensors = load_file(base / "model.safetensors")
    more = {f"model.layers.4.{leaf}.weight": torch.full((2, 3), 7.0) for leaf in ("eh_proj", "mlp.experts.0.down_proj")}
    save_file({**tensors, **more}, base / "model.safetensors", {"format": "pt"})
    grown = tensors_of(Path(project.run(f"base: mtp\nsteps: [{step}]\n")["model"]))
    assert sum("eh_proj" in name for name in grown) == 1
    for name, tensor in more.items():
        assert torch.equal(grown[name.replace(".4.", f".{number}.")], tensor)
    config = json.loads((base / "config.json").read_text("utf-8"))
    layers = Layout.from_config(grown, {**config, "num_hidden_layers": number})
    assert len(layers.in_layer(number - 1)) == len(Layout.from_config(tensors, config).in_layer(3))


WIDER: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("neurons: 64", {"intermediate_size": 64}),
    "qwen3_moe": ("neurons: 24, how: copy", {"moe_intermediate_size": 24, "intermediate_size": 72}),
    "deepseek_v3": ("neurons: 32", {"moe_intermediate_size": 32, "intermediate_size": 96}),
    "gpt_oss": ("neurons: 64, how: copy", {"intermediate_size": 64}),
    "glm4_moe": ("neurons: 40", {"moe_intermediate_size": 40, "intermediate_size": 120}),
    "qwen3_next": (
        "neurons: 24",
        {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "intermediate_size": 72},
    ),
    "falcon_h1": ("neurons: 64", {"intermediate_size": 64}),
    "lfm2": ("neurons: 40", {"intermediate_size": 40, "block_auto_adjust_ff_dim": False}),
}
"""Case -> growth, and fields of config.json after it."""


@pytest.mark.parametrize("case", WIDER)
def test_width_keeps_the_function(case: str, project: Project) -> None:
    """Dense layers, experts and shared experts get neurons, on live models and in the files that transformers loads."""
    (family, fields), (growth, sizes) = CASES[case], WIDER[case]
    base = save_family(family, project.path / "wide", fields)
    document = project.run(f"base: wide\nsteps: [{{grow: width, {growth}}}]\n")
    config = json.loads((Path(document["model"]) / "config.json").read_text("utf-8"))
    assert {key: config[key] for key in sizes} == sizes
    assert document["steps"][0]["check"]["same_generation"]
    expected = logits_of(base, TOKENS)
    assert (logits_of(document["model"], TOKENS) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_sizes_that_do_not_divide_are_rounded_up(project: Project) -> None:
    """24 neurons of an expert instead of 16: 49 of a dense layer become 73.5. Experts themselves need a multiple of 8."""
    save_family("qwen3_moe", project.path / "odd", {"mlp_only_layers": [1], "intermediate_size": 49})
    model = Path(project.run("base: odd\nsteps: [{grow: width, neurons: 24}]\n")["model"])
    assert json.loads((model / "config.json").read_text("utf-8"))["intermediate_size"] == 74
    assert tensors_of(model)["model.layers.1.mlp.down_proj.weight"].shape == (32, 74)
    with pytest.raises(WorkbenchError, match="`neurons: 23`: experts need a multiple of 8") as caught:
        compose(project.resolve("base: odd\nsteps: [{grow: width, neurons: 23}]\n"), CPU)
    assert caught.value.hint == "Set for example `neurons: 24`."


def test_new_neurons_of_experts(project: Project) -> None:
    """Stacked in turn [in, out] (gpt_oss), one after the other [out, in] (granitemoe), and in a tensor for each expert (mixtral)."""
    grown = {}
    for family in ("gpt_oss", "granitemoe", "mixtral"):
        base = save_family(family, project.path / family)
        model = project.run(f"base: {family}\nsteps: [{{grow: width, neurons: 64, check: off}}]\n")["model"]
        grown[family] = tensors_of(base), tensors_of(Path(model))
    old, new = grown["gpt_oss"]
    name = "model.layers.1.mlp.experts."
    assert torch.equal(new[f"{name}gate_up_proj"][..., :96], old[f"{name}gate_up_proj"])
    assert torch.equal(new[f"{name}down_proj"][:, :48], old[f"{name}down_proj"])
    assert not new[f"{name}down_proj"][:, 48:].any()
    assert not new[f"{name}gate_up_proj_bias"][:, 96:].any()
    drawn = new[f"{name}gate_up_proj"][..., 96:]
    assert drawn.shape == (4, 32, 32)
    assert len({float(value) for value in drawn.flatten()}) > 4000
    old, new = grown["granitemoe"]
    name = "model.layers.1.block_sparse_moe."
    into = new[f"{name}input_linear.weight"]
    assert torch.equal(torch.cat([into[:, :48], into[:, 64:112]], 1), old[f"{name}input_linear.weight"])
    assert torch.equal(new[f"{name}output_linear.weight"][..., :48], old[f"{name}output_linear.weight"])
    assert not new[f"{name}output_linear.weight"][..., 48:].any()
    old, new = grown["mixtral"]
    rows = [new[f"{name}experts.{expert}.w1.weight"][48:] for expert in range(4)]
    assert all(row.any() and not torch.equal(row, other) for row, other in pairwise(rows))
    assert not any(new[f"{name}experts.{expert}.w2.weight"][:, 48:].any() for expert in range(4))


def test_rows_in_the_wrong_order_are_caught(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt_oss stores the rows of two matrices in turn; taken one after the other, they compute something else."""
    save_family("gpt_oss", project.path / "turns")
    whole = resize._stacked
    monkeypatch.setattr(resize, "_stacked", lambda index, count, stacked, _: whole(index, count, stacked, False))
    with pytest.raises(WorkbenchError, match="the grown model computes something else"):
        project.run("base: turns\nsteps: [{grow: width, neurons: 64}]\n")


def test_width_that_config_cannot_state_is_refused(project: Project) -> None:
    """State-space models whose inner width has the name of neurons, and layers that only other programs load."""
    save_family("mamba", project.path / "mamba")
    with pytest.raises(
        WorkbenchError, match=r"A_log depends on intermediate_size, and is no known matrix of a feed-forward part"
    ):
        compose(project.resolve("base: mamba\nsteps: [{grow: width, neurons: 200}]\n"), CPU)
    base = save_family("glm4_moe", project.path / "mtp")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "model.layers.4.eh_proj.weight": torch.ones(2, 2)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(WorkbenchError, match=r"transformers does not build model.layers.4.eh_proj.weight, so its size") as caught:
        compose(project.resolve("base: mtp\nsteps: [{grow: width, neurons: 24}]\n"), CPU)
    assert "Load and save the model with transformers" in (caught.value.hint or "")
