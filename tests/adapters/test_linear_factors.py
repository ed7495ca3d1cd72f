"""Adapters as low-rank updates of live layers: those that are nothing else act under the mixing kernel as under PEFT, others are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from worlds.flavours import Flavour, logits, reference, relative, save_base, save_flavour
from worlds.tiny import live

from workbench.adapters.bind import bind
from workbench.adapters.linear import linear_bytes, linear_factors, not_linear, ranks_of
from workbench.adapters.read import Adapter
from workbench.models.layout import Model
from workbench.route.mixing.kernel import Mix, Mixer
from workbench.weights.checkpoint import Checkpoint

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
