"""Further families as the hub publishes them, which published.json lacks: names with {layer}, and where they were read."""

from __future__ import annotations

from typing import Any

TRANSFORMERS = ["huggingface/transformers", "src/transformers/conversion_mapping.py (5.24)"]
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "projection_dim": 16,
}  # fmt: skip
SIGLIP: dict[str, Any] = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
MASK = [1, 1, 64, 64]


def entry(models: str, kind: str, architecture: str, source: list[str], **fields: Any) -> dict[str, Any]:
    """Return a family in the form of published.json.

    Args:
        models: The models that have this layout.
        kind: The type of model.
        architecture: The class of transformers.
        source: Repository and path of what was read.
        **fields: `names`: names that the files have; `only`: names that transformers does not load, with dtype and tiny shape;
            `renames`: patterns that make the published names from those that save_pretrained writes; `copies`: second copies of tied
            weights; `config`: fields of config.json;
            `packed`: how projections are stored in 8 bits (`save_fp8`), or "mxfp4".
    """
    empty: dict[str, Any] = {"published": {}, "published_only": [], "extra_config_keys": [], "names": []}
    return {**empty, "models": models, "model_type": kind, "architecture": architecture, "sources": [source], **fields}


def mergekit(name: str) -> list[str]:
    """Return the source of an architecture that mergekit defines."""
    return ["arcee-ai/mergekit", f"mergekit/_data/architectures/{name}.json"]


MORE: dict[str, dict[str, Any]] = {
    "gpt2": entry(
        "GPT-2", "gpt2", "GPT2LMHeadModel", mergekit("gpt2"),
        names=["wte.weight", "wpe.weight", "h.{layer}.attn.c_attn.weight", "ln_f.bias"], renames=[(r"^transformer\.", "")],
        only={"h.{layer}.attn.bias": ["F32", MASK]}, certainty="the mask h.{layer}.attn.bias is recalled",
    ),
    "bloom": entry(
        "BLOOM", "bloom", "BloomForCausalLM", ["amansingh61/bloom", "model.safetensors.index.json"],
        names=["h.{layer}.input_layernorm.bias", "h.{layer}.self_attention.query_key_value.weight"], renames=[(r"^transformer\.", "")],
    ),
    "falcon": entry(
        "Falcon 40B, 180B", "falcon", "FalconForCausalLM", ["Alikhan13r/falcon-180B-chat", "model.safetensors.index.json"],
        names=["lm_head.weight", "transformer.h.{layer}.ln_mlp.bias", "transformer.h.{layer}.self_attention.query_key_value.weight"],
        copies={"lm_head.weight": "transformer.word_embeddings.weight"},
        config={"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": True, "alibi": False},
    ),
    "gpt_neox": entry(
        "GPT-NeoX, Pythia", "gpt_neox", "GPTNeoXForCausalLM", mergekit("gpt-neox"),
        names=["embed_out.weight", "gpt_neox.layers.{layer}.attention.query_key_value.weight"], renames=[(r"^lm_head\.", "embed_out.")],
        only={
            "gpt_neox.layers.{layer}.attention.bias": ["F32", MASK], "gpt_neox.layers.{layer}.attention.masked_bias": ["F32", []],
            "gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq": ["F32", [1]],
        },
    ),
    "mpt": entry(
        "MPT", "mpt", "MptForCausalLM", ["ggml-org/llama.cpp", "gguf-py/gguf/tensor_mapping.py"],
        names=["transformer.wte.weight", "transformer.blocks.{layer}.attn.Wqkv.weight", "transformer.blocks.{layer}.ffn.up_proj.weight"],
    ),
    "mixtral": entry(
        "Mixtral 8x7B, 8x22B", "mixtral", "MixtralForCausalLM", ["tbressers/WizardLM-2-8x22B", "model.safetensors.index.json"],
        names=[f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.w{i}.weight" for i in (1, 2, 3)],
    ),
    "phimoe": entry(
        "Phi-3.5-MoE", "phimoe", "PhimoeForCausalLM", TRANSFORMERS,
        names=[f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.w{i}.weight" for i in (1, 2, 3)],
    ),
    "qwen2_moe": entry(
        "Qwen1.5-MoE, Qwen2-57B-A14B", "qwen2_moe", "Qwen2MoeForCausalLM", TRANSFORMERS,
        names=["model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "model.layers.{layer}.mlp.shared_expert_gate.weight"],
    ),
    "olmoe": entry(
        "OLMoE", "olmoe", "OlmoeForCausalLM", TRANSFORMERS, names=["model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"],
    ),
    "jamba": entry(
        "Jamba", "jamba", "JambaForCausalLM", TRANSFORMERS,
        names=["model.layers.{layer}.feed_forward.experts.{expert}.gate_proj.weight", "model.layers.{layer}.mamba.in_proj.weight"],
    ),
    "dbrx": entry(
        "DBRX", "dbrx", "DbrxForCausalLM", ["ggml-org/llama.cpp", "gguf-py/gguf/tensor_mapping.py"],
        names=["transformer.blocks.{layer}.ffn.experts.mlp.w1", "transformer.blocks.{layer}.norm_attn_norm.attn.Wqkv.weight"],
        config={"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}, "ffn_config": {"moe_top_k": 2}},
    ),
    "llama_2": entry(
        "Llama 1 and 2", "llama", "LlamaForCausalLM", ["auraecosystem/llama-65b-hf", "model.safetensors.index.json"],
        names=["model.layers.{layer}.self_attn.q_proj.weight"],
        only={"model.layers.{layer}.self_attn.rotary_emb.inv_freq": ["F32", [4]]},
    ),
    "minimax": entry(
        "MiniMax-Text-01", "minimax", "MiniMaxForCausalLM", TRANSFORMERS,
        names=[f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.w{i}.weight" for i in (1, 2, 3)],
    ),
    "deepseek_v2": entry(
        "DeepSeek V2", "deepseek_v2", "DeepseekV2ForCausalLM", TRANSFORMERS,
        names=["model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"],
    ),
    "internvl": entry(
        "InternVL 3 in transformers' form", "internvl", "InternVLForConditionalGeneration", TRANSFORMERS,
        names=["language_model.model.layers.{layer}.mlp.up_proj.weight", "language_model.lm_head.weight",
               "vision_tower.encoder.layer.{layer}.attention.q_proj.weight"],
        config={"text_config": {"model_type": "qwen2", **LLAMA}, "tie_word_embeddings": False,
                "vision_config": {"image_size": [28, 28], "patch_size": [14, 14]}, "image_token_id": 60},
    ),
    "deepseek_v3_fp8": entry(
        "DeepSeek V3, R1 in 8 bits", "deepseek_v3", "DeepseekV3ForCausalLM", ["published.json", "the note of deepseek_v3"],
        names=["model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", "model.layers.{layer}.self_attn.o_proj.weight"],
        published_only=["model.layers.61.*"], packed="block", extra_config_keys=["num_nextn_predict_layers"],
    ),
    "gpt_oss_mxfp4": entry(
        "gpt-oss 20b, 120b as they are published", "gpt_oss", "GptOssForCausalLM",
        ["huggingface/transformers", "src/transformers/integrations/mxfp4.py (5.24)"], config={"intermediate_size": 64}, packed="mxfp4",
        names=["model.layers.{layer}.mlp.experts.gate_up_proj", "model.layers.{layer}.mlp.experts.down_proj_bias"],
    ),
    "qwen3_fp8": entry(
        "Qwen3 FP8", "qwen3", "Qwen3ForCausalLM", ["huggingface/transformers", "src/transformers/integrations/finegrained_fp8.py (5.24)"],
        names=["model.layers.{layer}.self_attn.q_norm.weight", "lm_head.weight"], packed="block", config={"tie_word_embeddings": False},
        certainty="recalled: which tensors have scales",
    ),
    "ministral3_fp8": entry(
        "Ministral 3 in 8 bits, text part", "ministral3", "Ministral3ForCausalLM",
        ["published.json", "the note of mistral3"],
        names=["model.layers.{layer}.self_attn.o_proj.weight"], packed="tensor", certainty="recalled: names of the scales",
    ),
    "persimmon": entry(
        "Persimmon 8B", "persimmon", "PersimmonForCausalLM", ["ggml-org/llama.cpp", "gguf-py/gguf/tensor_mapping.py"],
        names=["model.layers.{layer}.self_attn.query_key_value.weight", "model.layers.{layer}.mlp.dense_h_to_4h.weight"],
    ),
    "olmo2": entry(
        "OLMo 2", "olmo2", "Olmo2ForCausalLM", mergekit("olmo2"),
        names=["model.layers.{layer}.post_feedforward_layernorm.weight", "model.layers.{layer}.self_attn.q_norm.weight"],
    ),
    "stablelm": entry(
        "StableLM 2", "stablelm", "StableLmForCausalLM", mergekit("stablelm2"),
        names=["model.norm.bias", "model.layers.{layer}.input_layernorm.bias", "model.layers.{layer}.mlp.gate_proj.weight"],
    ),
    "cohere2": entry(
        "Command R7B, Command A", "cohere2", "Cohere2ForCausalLM", mergekit("cohere2"),
        names=["model.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.self_attn.o_proj.weight"],
    ),
    "granitemoe": entry(
        "Granite 3 MoE", "granitemoe", "GraniteMoeForCausalLM", TRANSFORMERS,
        names=["model.layers.{layer}.block_sparse_moe.input_linear.weight", "model.layers.{layer}.block_sparse_moe.router.layer.weight"],
    ),
    "mamba": entry("Mamba", "mamba", "MambaForCausalLM", mergekit("mamba"), names=["backbone.layers.{layer}.mixer.in_proj.weight"]),
    "gpt_bigcode": entry(
        "StarCoder", "gpt_bigcode", "GPTBigCodeForCausalLM", mergekit("gptbigcode"), names=["transformer.h.{layer}.attn.c_attn.weight"],
    ),
    "qwen2_vl": entry(
        "Qwen2-VL", "qwen2_vl", "Qwen2VLForConditionalGeneration", mergekit("qwen2_vl"),
        names=["model.layers.{layer}.mlp.down_proj.weight", "visual.merger.mlp.0.weight", "visual.blocks.{layer}.attn.qkv.bias"],
        config={"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}},
    ),
    "llava": entry(
        "LLaVA 1.5", "llava", "LlavaForConditionalGeneration", TRANSFORMERS,
        names=["language_model.model.layers.{layer}.mlp.up_proj.weight", "language_model.lm_head.weight", "multi_modal_projector.linear_1.bias",
               "vision_tower.vision_model.encoder.layers.{layer}.mlp.fc1.weight"],
        renames=[(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.")],
        config={"text_config": {"model_type": "llama", **LLAMA}, "vision_config": CLIP, "tie_word_embeddings": False},
    ),
    "paligemma": entry(
        "PaliGemma", "paligemma", "PaliGemmaForConditionalGeneration", TRANSFORMERS,
        names=["language_model.model.layers.{layer}.mlp.up_proj.weight", "multi_modal_projector.linear.weight",
               "vision_tower.vision_model.encoder.layers.{layer}.mlp.fc1.weight"],
        renames=[(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.")],
        config={"text_config": {"model_type": "gemma", **LLAMA}, "vision_config": SIGLIP, "projection_dim": 32},
    ),
    "mistral_small": entry(
        "Mistral Small 3.1, Devstral", "mistral3", "Mistral3ForConditionalGeneration", mergekit("mistral3"),
        names=["language_model.lm_head.weight", "language_model.model.layers.{layer}.mlp.up_proj.weight",
               "multi_modal_projector.patch_merger.merging_layer.weight", "vision_tower.transformer.layers.{layer}.attention.k_proj.weight"],
        config={"text_config": {"model_type": "mistral", **LLAMA}, "tie_word_embeddings": False},
    ),
}  # fmt: skip
"""Entry -> family."""
