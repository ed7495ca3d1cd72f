"""Edits of mixtures: they change the shared expert, which all tokens pass, and dense layers; routers and other experts keep their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.dense import write_facts_file, write_text
from worlds.growing import logits_of, save_family
from worlds.project import CPU, Project
from worlds.tiny import WORDS, tensors_of

from workbench.ground.errors import WorkbenchError
from workbench.run.compose import compose
from workbench.run.plan import plan

DEEPSEEK = {"first_k_dense_replace": 2, "n_shared_experts": 2, "num_key_value_heads": 4, "head_dim": 4}
MODELS: dict[str, tuple[str, dict[str, Any], dict[int, str]]] = {
    "deepseek_v3": ("deepseek_v3", DEEPSEEK, {1: "mlp.down_proj", 2: "mlp.shared_experts.down_proj"}),
    "glm4_moe": ("glm4_moe", {}, {1: "mlp.shared_experts.down_proj", 2: "mlp.shared_experts.down_proj"}),
    "qwen2_moe": ("qwen2_moe", {}, {1: "mlp.shared_expert.down_proj", 2: "mlp.shared_expert.down_proj"}),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        DEEPSEEK,
        {1: "mlp.down_proj", 2: "mlp.shared_experts.down_proj"},
    ),  # layers hand on chosen tokens
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [1, 2]}, {1: "mlp.down_proj", 2: "mlp.down_proj"}),
}
"""Name -> family, fields of its configuration, and the module that an edit of layers 1 and 2 changes."""
SOLVED = (
    "position: subject_last, contexts: 0, statistics: text.txt, tokens_per_input: 4, steps: 60, learning_rate: 0.5, clamp: 20.0"
)
EDITS = {
    "rome": f"{SOLVED}, confidence: 0.3, refine: 0, layers: [2]",
    "memit": f"{SOLVED}, confidence: 0.95, refine: 0, layers: [1, 2], lambda: 0.1",
    "alphaedit": f"{SOLVED}, confidence: 0.3, refine: 0, layers: [2], energy: 0.3, l2: 0.002",
    "ultraedit": "layers: [2], min_efficacy: 0",
    "finetune": "layers: [2], epochs: 40, learning_rate: 0.01, min_efficacy: 0",
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("edit", EDITS)
def test_the_shared_expert_is_edited(edit: str, name: str, project: Project) -> None:
    family, fields, modules = MODELS[name]
    base = save_family(family, project.path / "mixture", fields)
    (fact,) = write_facts_file(project.path / "facts.jsonl", 1)
    write_text(project.path / "text.txt")
    document = project.run(
        f"base: mixture\nsteps: [{{edit: {edit}, facts: facts.jsonl, {EDITS[edit]}}}]\noutput: {{dtype: float32}}\n"
    )
    before, after = tensors_of(base), tensors_of(Path(document["model"]))
    layers = [1, 2] if edit == "memit" else [2]
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {f"model.layers.{layer}.{modules[layer]}.weight" for layer in layers}
    prompt = [WORDS.index(word) for word in fact["prompt"].replace("{subject}", fact["subject"]).split()]
    losses = [
        -logits_of(place, torch.tensor([prompt]))[0, -1].log_softmax(-1)[WORDS.index(fact["target"])]
        for place in (base, document["model"])
    ]
    assert losses[1] < losses[0] - 0.2


def test_layers_without_a_shared_expert_are_named(project: Project) -> None:
    """The layers of qwen3_moe that are dense can be edited, and a model without any is refused with the reason."""
    write_facts_file(project.path / "facts.jsonl", 1)
    write_text(project.path / "text.txt")
    save_family("qwen3_moe", project.path / "some", {"mlp_only_layers": [1, 2]})
    save_family("gpt_oss", project.path / "none")
    for base, message in (
        ("some", "layer 3 has no feed-forward part to edit"),
        ("none", "layer 0 of GptOssForCausalLM routes tokens to experts, and no linear output of a shared expert"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            compose(project.resolve(f"base: {base}\nsteps: [{{edit: rome, facts: facts.jsonl, {SOLVED}, layers: [3]}}]\n"), CPU)


def test_plan_agrees_with_run(project: Project) -> None:
    """Plan what can be edited, and refuse a mixture with linear attention, in both commands."""
    write_facts_file(project.path / "facts.jsonl", 1)
    save_family("glm4_moe", project.path / "shared")
    save_family("qwen3_next", project.path / "hybrid")
    for edit in ("rome, layers: [1]", "patch"):
        step = f"steps: [{{edit: {edit}, facts: facts.jsonl}}]\n"
        plan(project.resolve(f"base: shared\n{step}"), project.path / "runs")
        with pytest.raises(WorkbenchError, match="expected one feed-forward down-projection"):
            plan(project.resolve(f"base: hybrid\n{step}"), project.path / "runs")
        with pytest.raises(WorkbenchError, match="is a state-space or recurrent layer"):
            compose(project.resolve(f"base: hybrid\n{step}"), CPU)
