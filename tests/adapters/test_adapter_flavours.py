"""Every flavour of adapter that is read: one adapter with weight 1 is PEFT's own forward and PEFT's own merge, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worlds.card import CUDA, card
from worlds.flavours import BOUND, Flavour, logits, reference, relative, resolved, save_base, save_flavour
from worlds.project import CPU
from worlds.tiny import edit_json, tensors_of

from workbench.adapters.bind import bind
from workbench.ground.errors import WorkbenchError
from workbench.models.live import compute, live_model
from workbench.run.compose import compose

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FLAVOURS = {
    "plain": Flavour("llama", {"target_modules": [*ATTENTION, "gate_proj", "down_proj"]}),
    "rslora": Flavour("qwen2", {"target_modules": ATTENTION, "use_rslora": True, "r": 8}),
    "patterns": Flavour("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 6},
                                  "alpha_pattern": {r".*\.1\.self_attn\.q_proj": 3, "v_proj": 11}}),
    "wrong_flag": Flavour("gpt2", {"target_modules": ["c_proj", "c_attn", "lm_head"]}, unties=True, says="updates only the head"),
    "fused_qkv": Flavour("gpt_neox", {"target_modules": ["query_key_value", "dense", "dense_4h_to_h"]}),
    "embedding": Flavour("llama", {"target_modules": ["embed_tokens", "q_proj"]}, unties=True, says="updates only the embeddings"),
    "head": Flavour("qwen2", {"target_modules": ["lm_head", "q_proj"]}, unties=True, says="updates only the head"),
    "tied_head": Flavour("qwen2", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, merges=False),
    "modules_to_save": Flavour("llama_untied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
                               says="holds whole tensors"),
    "saved_head": Flavour("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, unties=True, says="updates only the head"),
    "saved_tied": Flavour("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, says="holds whole tensors"),
    "bias_all": Flavour("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all"}, says="holds whole tensors"),
    "bias_lora_only": Flavour("opt", {"target_modules": ["q_proj", "fc2"], "bias": "lora_only"}, says="holds whole tensors"),
    "lora_bias": Flavour("gpt_neox", {"target_modules": ["query_key_value", "dense"], "lora_bias": True}, says="lora_bias on 8"),
    "dora": Flavour("qwen2", {"target_modules": ATTENTION, "use_dora": True}, dense=True, says="DoRA on 16 tensors"),
    "dora_conv1d": Flavour("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "use_dora": True}, dense=True, says="DoRA on 16 tensors"),
    "dora_embedding": Flavour("llama_untied", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, dense=True, says="DoRA on 2"),
    "dora_tied": Flavour("llama", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True}, dense=True, unties=True,
                         says="DoRA on 2"),
    "token_rows": Flavour("qwen2", {"token_indices": [2, 30]}, dense=True, says="trainable_token_indices on 1", peft="TrainableTokensConfig"),
    "tokens": Flavour("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 40]}, says="trainable_token_indices on 1"),
    "experts_mixtral": Flavour("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "experts_qwen3_moe": Flavour("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
                                               "rank_pattern": {r".*experts\.gate_up_proj": 2}, "use_rslora": True}),
    "router": Flavour("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "adalora": Flavour("gpt2", {"target_modules": ["c_attn", "c_proj"], "init_r": 5, "target_r": 3, "lora_alpha": 7, "total_step": 9},
                       peft="AdaLoraConfig"),
    "oft": Flavour("llama", {"target_modules": ["down_proj"], "oft_block_size": 4, "num_cayley_neumann_terms": 3}, dense=True, says="OFT on 4", peft="OFTConfig"),
    "loha": Flavour("llama", {"target_modules": ["q_proj", "down_proj"], "alpha": 6, "rank_pattern": {"down_proj": 2}}, dense=True,
                    says="LoHa on 8 tensors", peft="LoHaConfig"),
    "lokr": Flavour("llama", {"target_modules": ["q_proj", "down_proj"], "alpha": 6, "r": 2}, dense=True, says="LoKr on 8", peft="LoKrConfig"),
    "lokr_both": Flavour("qwen2", {"target_modules": ["k_proj", "down_proj"], "alpha": 3, "r": 1, "decompose_both": True}, dense=True,
                         says="LoKr on 8", peft="LoKrConfig"),
    "vera": Flavour("llama", {"target_modules": ["q_proj", "gate_proj", "down_proj"]}, dense=True, says="VeRA on 12 tensors", peft="VeraConfig"),
    "boft": Flavour("llama", {"target_modules": ["q_proj", "down_proj"], "boft_block_size": 4, "bias": "none"}, dense=True, says="BOFT on 8 tensors",
                    peft="BOFTConfig"),
    "boft_blocks": Flavour("gpt_neox", {"target_modules": ["query_key_value", "dense_4h_to_h"], "boft_block_size": 0, "boft_block_num": 4,
                                        "bias": "all"}, dense=True, says="BOFT on 8 tensors", peft="BOFTConfig"),
    "hra": Flavour("llama", {"target_modules": ["q_proj", "down_proj"]}, dense=True, says="HRA on 8 tensors", peft="HRAConfig"),
    "fourierft": Flavour("llama", {"target_modules": ["q_proj", "down_proj"], "n_frequency": 40, "scaling": 30.0, "random_loc_seed": 5,
                                   "n_frequency_pattern": {"down_proj": 25}}, dense=True, says="FourierFT on 8 tensors", peft="FourierFTConfig"),
    "randlora": Flavour("llama", {"target_modules": ["q_proj", "gate_proj", "down_proj"]}, dense=True, says="RandLoRA on 12 tensors", peft="RandLoraConfig"),
    "vblora": Flavour("llama", {"target_modules": ["q_proj", "down_proj"], "num_vectors": 9, "vector_length": 8, "topk": 3}, dense=True,
                      says="VB-LoRA on 8 tensors", peft="VBLoRAConfig"),
    "ia3_conv1d": Flavour("gpt2", {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"], "fan_in_fan_out": True},
                          dense=True, says="(IA)³ on", peft="IA3Config"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_base(tmp_path_factory.mktemp("bases") / family, family)
        return made[family]

    return get


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FLAVOURS)
def test_flavour(name: str, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    flavour = FLAVOURS[name]
    base = base_of(flavour.family)
    adapter = save_flavour(flavour, base, tmp_path / "adapter")
    recipe = resolved(base, adapter, tmp_path)
    model = compose(recipe, CPU).model
    tensors = compute(model, torch.float32, CPU)
    with card() as seen:  # on a CUDA device too, as far as no hardware is needed
        there = compute(compose(recipe, CUDA).model, torch.float32, CUDA)
        there = {name: tensor.cpu() for name, tensor in there.items()}
    assert (seen.mixed, seen.unsteady) == ([], set())
    assert all(torch.allclose(there[name], tensors[name], rtol=1e-5, atol=1e-6) for name in tensors)
    peft = reference(base, adapter)
    merged = (
        {}
        if flavour.unties or not flavour.merges
        else {k: v.clone() for k, v in reference(base, adapter).merge_and_unload().state_dict().items()}
    )
    live = live_model(model.config, tensors, base, CPU)
    errors = {key: relative(live.state_dict()[key], value) for key, value in merged.items()}
    assert max(errors.values(), default=0) <= BOUND
    ours = logits(live)
    error = relative(ours, logits(peft))
    assert error <= BOUND
    with peft.disable_adapter():
        change = relative(ours, logits(peft))
        assert change > 1e-3, "the adapter does nothing"
    assert flavour.unties == (set(tensors) != set(tensors_of(base)))
    assert flavour.says in "\n".join(recipe.warnings)
    assert bool(flavour.says) == bool(recipe.warnings)
    bound = bind(recipe.bricks["one"].adapter, recipe.base.weights.specs, recipe.base)
    products = [bound.factors(n, CPU) for n in bound.places]
    assert all(f is None for f in products) if flavour.dense else any(f is not None for f in products)


# Flavour -> a change of adapter_config.json with which its tensors have another size than the file says, and what the refusal names.
WRONG_SIZES = {
    "plain": ({"r": 8, "lora_alpha": 8}, r"down_proj has rank 4 in .*adapter_model.safetensors; expected rank 8, by r in adapter_config.json"),
    "rslora": ({"r": 4}, "rank 8 .* expected rank 4, by r"),
    "fused_qkv": ({"r": 0}, "rank 4 .* expected rank 0, by r"),
    "patterns": ({"rank_pattern": {"v_proj": 6}}, r"layers\.1\.self_attn\.q_proj has rank 2 .* expected rank 4, by r and rank_pattern"),
    "embedding": ({"rank_pattern": {"embed_tokens": 2}}, "embed_tokens has rank 4 .* expected rank 2, by r and rank_pattern"),
    "dora": ({"r": 2}, "rank 4 .* expected rank 2"),
    "experts_qwen3_moe": ({"rank_pattern": {}}, r"experts\.gate_up_proj has rank 2 .* expected rank 4"),
    "router": ({"rank_pattern": {"mlp.gate": 8}}, None),  # PEFT's name of a target parameter is mlp.gate.weight
    "adalora": ({"init_r": 6}, "rank 5 .* expected rank 6, by init_r"),
    "loha": ({"r": 5}, "q_proj has rank 4 .* expected rank 5, by r and rank_pattern"),
    "lokr": ({"r": 3}, "rank 2 .* expected rank 3, by r"),
    "lokr_both": ({"r": 2}, "rank 1 .* expected rank 2, by r"),
    "hra": ({"r": 4}, "rank 3 .* expected rank 4, by r"),
    "fourierft": ({"n_frequency_pattern": {}}, "down_proj has 25 frequencies .* expected 40 frequencies, by n_frequency"),
    "oft": ({"oft_block_size": 8}, "blocks of 4 .* expected blocks of 8, by oft_block_size"),
    "boft": ({"boft_block_size": 2}, "blocks of 4 .* expected blocks of 2, by boft_block_size"),
    "boft_blocks": ({"boft_block_num": 2}, "blocks of .* expected 2 blocks of .*, by boft_block_num"),
    "vera": ({"r": 7}, r"is \[6\]; expected \[7\]"),
    "randlora": ({"r": 6}, "expected"),
    "vblora": ({"r": 4}, "expected"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRONG_SIZES)
def test_another_size_than_the_file_says(name: str, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    """It is refused where PEFT refuses it, and read where PEFT reads it."""
    change, message = WRONG_SIZES[name]
    base = base_of(FLAVOURS[name].family)
    adapter = save_flavour(FLAVOURS[name], base, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", **change)
    if message is None:
        resolved(base, adapter, tmp_path)
        reference(base, adapter)
        return
    with pytest.raises((RuntimeError, ValueError)):
        reference(base, adapter)
    with pytest.raises(WorkbenchError, match=message):
        resolved(base, adapter, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cut", [(slice(-1), slice(None)), (slice(None), slice(-1))], ids=["a block less", "no triangle"])
def test_rotations_that_do_not_fit_the_inputs(cut: tuple[slice, slice], base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = base_of("llama")
    adapter = save_flavour(FLAVOURS["oft"], base, tmp_path / "adapter")
    tensors = {name: tensor[cut].contiguous() for name, tensor in tensors_of(adapter).items()}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        WorkbenchError, match=r"oft_R\S* is \[\d+, \d\], which does not fit the \d+ inputs of model.layers.0.mlp.down_proj"
    ):
        resolved(base, adapter, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_pruned_ranks_of_adalora(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    """AdaLoRA stores what its pruning has left, and scales it by the rank before."""
    base = base_of("gpt2")
    adapter = save_flavour(FLAVOURS["adalora"], base, tmp_path / "adapter")
    kept = [True, False, True, True, False]
    tensors = tensors_of(adapter)
    module = "base_model.model.transformer.h.0.attn.c_attn"
    for name in ("lora_A", "lora_E", "lora_B"):
        tensor = tensors[f"{module}.{name}"]
        tensors[f"{module}.{name}"] = (tensor[:, kept] if name == "lora_B" else tensor[kept]).contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_json(adapter / "adapter_config.json", rank_pattern={"transformer.h.0.attn.c_attn.lora_E": kept})
    model = compose(resolved(base, adapter, tmp_path), CPU).model
    live = live_model(model.config, compute(model, torch.float32, CPU), base, CPU)
    error = relative(logits(live), logits(reference(base, adapter)))
    assert error <= BOUND
