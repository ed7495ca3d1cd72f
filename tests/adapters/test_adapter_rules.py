"""PEFT's rule for names in an adapter's configuration, DoRA beside other changes of the same tensor, and factors of linear layers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from worlds.flavours import Flavour, logits, reference, relative, save_base, save_flavour
from worlds.project import Project
from worlds.tiny import edit_json, live, save_adapter, tensors_of

from workbench.adapters.bind import bind
from workbench.adapters.linear import linear_bytes, linear_factors, not_linear, ranks_of
from workbench.adapters.read import Adapter
from workbench.ground.errors import WorkbenchError
from workbench.models.layout import Model
from workbench.route.mixing.kernel import Mix, Mixer
from workbench.weights.checkpoint import Checkpoint

FIRST = "model.layers.0.self_attn.q_proj"


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    state: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return state


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ("q_proj", 32), ("self_attn.q_proj", 32), (r"layers\.0\..*q_proj", 32), ("model.layers.0.self_attn.q_proj", 32),
        ("proj", 8), ("_proj", 8), ("attn.q_proj", 8), ("layers.0.self_attn", 8), ("q_pro", 8),
    ],
)  # fmt: skip
def test_patterns_match_the_end_of_a_name_at_a_dot(llama: Path, tmp_path: Path, pattern: str, alpha: int) -> None:
    adapter = save_adapter(llama, tmp_path / "lora", seed=5, r=4, lora_alpha=8)
    edit_json(adapter / "adapter_config.json", alpha_pattern={pattern: 32})
    assert Adapter(adapter, "brick 'lora'").scale(FIRST, 4) == alpha / 4
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).state_dict()[f"{FIRST}.weight"]
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{FIRST}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(merged_by_peft(llama, adapter)[f"{FIRST}.weight"], base + alpha / 4 * b @ a)


def test_the_first_pattern_that_matches_counts(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama, tmp_path / "lora", seed=5, r=4, lora_alpha=8)
    edit_json(adapter / "adapter_config.json", alpha_pattern={"proj": 64, "q_proj": 16, FIRST: 32})
    assert Adapter(adapter, "brick 'lora'").scale(FIRST, 4) == 4


@pytest.mark.parametrize(
    ("targets", "refused"), [(["q_proj"], True), (["self_attn.q_proj"], True), (["proj"], False), (["_proj"], False)]
)
def test_layers_that_target_modules_name(project: Project, tmp_path: Path, targets: list[str], refused: bool) -> None:
    """An adapter without the last layer: of another base where its list names a module there, by the same rule."""
    adapter = Path(shutil.copytree(project.path / "bricks/one", tmp_path / "short"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if ".layers.3." not in n}, adapter / "adapter_model.safetensors")
    edit_json(adapter / "adapter_config.json", target_modules=targets, base_model_name_or_path="base")
    text = f"bricks: {{short: {adapter}}}\nsteps: [{{merge: task_arithmetic}}]\n"
    if refused:
        with pytest.raises(WorkbenchError, match="it updates layers 0 to 2"):
            project.resolve(text)
    else:
        project.resolve(text)


@pytest.fixture
def dora(llama: Path, tmp_path: Path) -> Path:
    return save_adapter(llama, tmp_path / "dora", seed=6, use_dora=True, target_modules=["q_proj"])


def test_dora_on_a_tensor_that_the_adapter_replaces_is_refused(project: Project, dora: Path, llama: Path) -> None:
    """The norm would be that of the base's weight, not of the one that is saved."""
    file = dora / "adapter_model.safetensors"
    weight = tensors_of(llama)[f"{FIRST}.weight"].float() + 1
    save_file({**load_file(file), f"base_model.model.{FIRST}.modules_to_save.weight": weight}, file)
    with pytest.raises(WorkbenchError, match=rf"the adapter has both DoRA and another update on {re.escape(FIRST)}\.weight"):
        project.resolve(f"bricks: {{dora: {dora}}}\nsteps: [{{merge: task_arithmetic}}]\n")


def test_dora_after_a_step_that_replaced_the_tensor(project: Project, dora: Path, llama: Path) -> None:
    """Its delta is the one on the recipe's base, and is added to what the step before has left."""
    text = f"bricks: {{full: bricks/full, dora: {dora}}}\nsteps: [{{merge: linear, bricks: {{full: 1}}}}, {{merge: task_arithmetic, bricks: {{dora: 1}}}}]\n"
    got = project.tensors(text)
    base, full, peft = tensors_of(llama), tensors_of(project.path / "bricks/full"), merged_by_peft(llama, dora)
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        torch.testing.assert_close(got[name], full[name].float() + peft[name] - base[name].float(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(peft[f"{FIRST}.weight"], base[f"{FIRST}.weight"].float(), atol=1e-2)


PLAIN = {
    "plain": Flavour("llama", {"target_modules": ["q_proj", "gate_proj", "down_proj"]}),
    "rslora": Flavour("qwen2", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, "r": 8}),
    "patterns": Flavour(
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 6},
            "alpha_pattern": {r".*\.1\.self_attn\.q_proj": 3, "v_proj": 11},
        },
    ),
    "conv1d": Flavour("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "fused": Flavour("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
    "head": Flavour("llama_untied", {"target_modules": ["lm_head", "q_proj"]}),
    "adalora": Flavour(
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "init_r": 5, "target_r": 3, "lora_alpha": 7, "total_step": 9},
        peft="AdaLoraConfig",
    ),
}
OTHERS = {
    "DoRA on ": Flavour("qwen2", {"target_modules": ["q_proj"], "use_dora": True}),
    "LoRA on an embedding on ": Flavour("llama_untied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "a whole tensor for ": Flavour("llama_untied", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "lora_bias on ": Flavour("gpt_neox", {"target_modules": ["dense"], "lora_bias": True}),
    "trainable tokens on ": Flavour("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3]}),
    "LoRA on a parameter of ": Flavour("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
    "LoRA on a parameter of model.layers.0.mlp.gate": Flavour(
        "mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}
    ),
    "LoRA on stacked experts in ": Flavour("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}),
    "hada on ": Flavour("llama", {"target_modules": ["q_proj"]}, peft="LoHaConfig"),
    "OFT on ": Flavour("llama", {"target_modules": ["down_proj"], "oft_block_size": 4}, peft="OFTConfig"),
    "(IA)³ on ": Flavour(
        "llama", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, peft="IA3Config"
    ),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_base(tmp_path_factory.mktemp("bases") / family, family)
        return made[family]

    return get


def opened(flavour: Flavour, base: Path, out: Path) -> tuple[Adapter, str | None]:
    """The adapter, and what `not_linear` says of it."""
    adapter = Adapter(save_flavour(flavour, base, out), "brick 'mine'")
    checkpoint = Checkpoint(base, "base")
    return adapter, not_linear(adapter, bind(adapter, checkpoint.specs, Model(checkpoint, checkpoint.config)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_adapter_acts_as_under_peft(name: str, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = base_of(PLAIN[name].family)
    adapter, reason = opened(PLAIN[name], base, tmp_path / "adapter")
    assert reason is None
    factors = linear_factors(adapter)
    assert {module: a.shape[0] for module, (a, _) in factors.items()} == ranks_of(adapter)
    assert linear_bytes(adapter) == sum(part.nbytes for pair in factors.values() for part in pair)
    model = live(base)
    mixer = Mixer(model, {"mine": factors})
    plain = logits(live(base))
    with mixer.acting(Mix.of(torch.ones(1))):
        ours = logits(model)
    assert relative(ours, logits(reference(base, tmp_path / "adapter"))) <= 1e-5
    assert relative(ours, plain) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reason", OTHERS)
def test_other_adapters_are_named(reason: str, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    flavour = OTHERS[reason]
    found = opened(flavour, base_of(flavour.family), tmp_path / "adapter")[1]
    assert found is not None
    assert reason in found
