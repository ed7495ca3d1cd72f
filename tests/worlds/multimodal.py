"""Tiny multimodal models of three architectures, their text models, and inputs with an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from worlds.made import once
from worlds.tiny import VOCABULARY, save_tokenizer

TEXT_MODELS = {"llava": "llama", "qwen2_5_vl": "qwen2", "qwen3_5": "qwen3_5_text"}
IMAGE, VIDEO, START, END = 60, 61, 62, 63
_PATCHES = 16  # 8 x 8 pixels in patches of 4 x 4 give LLaVA four tokens; 4 x 4 patches, merged by four, give Qwen four tokens


def _text_fields(kind: str) -> dict[str, Any]:
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    if kind != "qwen3_5":
        return common
    linear = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
    sizes = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    return {**common, **linear, **sizes, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}


def _rope(kind: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    return {**rope, "partial_rotary_factor": 1.0} if kind == "qwen3_5" else rope


def _vision_rope(kind: str) -> dict[str, Any]:
    return {**_rope(kind), "mrope_section": [1, 1, 2], **({"mrope_interleaved": True} if kind == "qwen3_5" else {})}


def text_config(kind: str) -> Any:
    """The configuration of the text model of an architecture."""
    import transformers as t

    rope = _vision_rope(kind) if kind == "qwen3_5" else _rope(kind)
    made = {"llava": t.LlamaConfig, "qwen2_5_vl": t.Qwen2Config, "qwen3_5": t.Qwen3_5TextConfig}[kind]
    return made(**_text_fields(kind), rope_parameters=rope)


def whole_config(kind: str, **vision: Any) -> Any:
    """The configuration of the multimodal model; keyword arguments change its encoder."""
    import transformers as t

    tower = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4, **vision}
    text = _text_fields(kind)
    if kind == "llava":
        clip = t.CLIPVisionConfig(num_hidden_layers=2, num_attention_heads=2, image_size=8, initializer_range=0.2, **tower)
        return t.LlavaConfig(
            vision_config=clip.to_dict(),
            text_config=t.LlamaConfig(**text).to_dict(),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            tie_word_embeddings=False,
        )
    tower |= {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tower |= {"window_size": 16, "fullatt_block_indexes": [1]} if kind == "qwen2_5_vl" else {"num_position_embeddings": 16}
    made = t.Qwen2_5_VLConfig if kind == "qwen2_5_vl" else t.Qwen3_5Config
    return made(
        vision_config=tower,
        text_config={**text, "rope_parameters": _vision_rope(kind)},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def _noisy(model: Any) -> Any:
    """Make all parameters random, so that no tensor of one model equals that of another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@once
def save_text(kind: str, out: Path, *, seed: int, tokens: int = VOCABULARY) -> Path:
    """A text model of an architecture in float32, with tokenizer; `tokens` leaves out the last tokens of the vocabulary."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = text_config(kind)
    config.vocab_size = tokens
    _noisy(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).save_pretrained(out)
    save_tokenizer(out)
    file = out / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["model"]["vocab"] = {token: i for token, i in content["model"]["vocab"].items() if i < tokens}
    file.write_text(json.dumps(content), "utf-8")
    return out


@once
def save_multimodal(kind: str, out: Path, *, seed: int, tied: bool = False, **vision: Any) -> Path:
    """A multimodal model in float32, with tokenizer and a processor's file; keyword arguments change its encoder."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    config = whole_config(kind, **vision)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    _noisy(AutoModelForImageTextToText.from_config(config, dtype=torch.float32)).save_pretrained(out)
    save_tokenizer(out)
    (out / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}\n', "utf-8")
    return out


def load_multimodal(path: Path) -> Any:
    """The live multimodal model."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def image_inputs(kind: str, seed: int = 0) -> dict[str, Any]:
    """A prompt with one image."""
    torch.manual_seed(seed)
    ids = torch.tensor([[5, START, *[IMAGE] * 4, END, 9, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "llava":
        return {**inputs, "pixel_values": torch.randn(1, 3, 8, 8)}
    types = (ids == IMAGE).int()
    pixels = torch.randn(_PATCHES, 3 * 2 * 4 * 4)
    return {**inputs, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": types}


def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The logits of a prompt."""
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits
