"""Depth of mixtures and hybrids: copies whose outputs are zero, of every expert and mixer, and what config.json says of their layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.growing import logits_of, save_family
from worlds.project import CPU, Project
from worlds.tiny import tensors_of

from workbench.errors import WorkbenchError
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
            "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16,
            "mamba_proj_bias": True, "projectors_bias": True, "attention_bias": True, "mlp_bias": True,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"], "conv_bias": True}),
}  # fmt: skip
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
        ("mixtral", "experts.3.w2"), ("gpt_oss", "experts.down_proj_bias"), ("gpt_oss", "self_attn.o_proj.bias"),
        ("deepseek_v3", "shared_experts.down_proj"), ("glm4_moe", "experts.1.down_proj"), ("qwen3_next", "linear_attn.out_proj"),
        ("falcon_h1", "mamba.out_proj.bias"), ("falcon_h1", "feed_forward.down_proj.weight"), ("lfm2", "conv.out_proj.bias"),
        ("lfm2", "feed_forward.w2"),
    ],
)  # fmt: skip
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
    layers = Layout.of(grown, {**config, "num_hidden_layers": number})
    assert len(layers.in_layer(number - 1)) == len(Layout.of(tensors, config).in_layer(3))
