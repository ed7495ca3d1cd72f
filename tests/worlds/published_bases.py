"""Tiny bases as the hub publishes them: a model of transformers under the hub's tensor names and dtypes, with the tensors that its class does not load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from worlds.causal import HEADS, WIDTH
from worlds.family import NotTinyError, build, with_fields
from worlds.packed_models import save_fp8
from worlds.project import Project
from worlds.published import of_file, speculative
from worlds.tiny import VOCABULARY

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **TEXT, "num_key_value_heads": HEADS, "head_dim": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "num_nextn_predict_layers": 0,
}  # fmt: skip
SMALL_TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}},
    "gemma3": {
        "mm_tokens_per_image": 4,
        "vision_config": {"model_type": "siglip_vision_model", **SMALL_TOWER, "image_size": 56, "patch_size": 14, "vision_use_head": False},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT, "tie_word_embeddings": True},
        "vision_config": {"model_type": "pixtral", **SMALL_TOWER, "head_dim": 8, "image_size": 56, "patch_size": 14},
    },
    "llama4": {
        "text_config": {"intermediate_size_mlp": 48},
        "vision_config": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "image_size": 56},
    },
    "glm5_next": {
        "text_config": {"linear_head_dim": 8, "linear_num_heads": 4, "index_head_dim": 8, "index_n_heads": 4},
        "vision_config": {"image_size": 56, "out_hidden_size": WIDTH, "projection_intermediate_size": 48},
    },
    "kimi_k25": {
        "text_config": {"model_type": "deepseek_v3", **DEEPSEEK},
        "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4},
        "projection_hidden_size": 32, "tie_word_embeddings": False,
    },
    "qwen3_vl_moe": {"text_config": {"moe_intermediate_size": 12}},
    "qwen3_omni_moe": {
        "thinker_config": {
            "audio_config": {"downsample_hidden_size": 8, "num_mel_bins": 16, "output_dim": WIDTH},
            "vision_config": {"deepstack_visual_indexes": [0, 1, 2], "out_hidden_size": WIDTH, "num_position_embeddings": 16},
        },
        "talker_config": {"thinker_hidden_size": WIDTH, "spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 16}},
        "code2wav_config": {"codebook_size": 8, "decoder_dim": 16, "num_quantizers": 2, "upsample_rates": [2, 2]},
    },
}  # fmt: skip
"""Type of model -> fields of its tiny configuration, beside those of `tiny_json`."""
CLASSES = {
    "llama4": ("llama4", "Llama4ForConditionalGeneration"),
    "kimi_k25": ("kimi_k25", "Kimi_K25ForConditionalGeneration"),
    "qwen3_omni": ("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration"),
    "glm5_next": ("glm5_next", "Glm5NextForConditionalGeneration"),
    "step3p7": ("step3p7", "Step3p7ForConditionalGeneration"),
}
"""Entry of published.json without a class or type -> the class of transformers that loads it."""
RENAMED = {
    "gemma3": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "deepseek_v4": [
        (r"^model\.", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^lm_head\.", "head."),
        (r"^hc_head\.hc_", "hc_head_"),
    ],
    "kimi_k25": [
        (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
        (r"^model\.mm_projector\.", "mm_projector."),
        (r"^vision_tower\.encoder\.patch_embed\.", "vision_tower.patch_embed."),
    ],
}
"""Entry -> patterns that make the hub's names from those that save_pretrained writes, where published.json's note gives other ones."""
FURTHER_SOURCES = {"gemma3": ["Ibtasam-98/medgemma-27b-it", "model.safetensors.index.json"]}
"""Entry of published.json -> what else was read."""
EXTRA_CONFIG: dict[str, Any] = {
    "num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "mamba_ssm_dtype": "float32",
    "num_mtp_modules": 3, "mtp_transformer_layers": 1, "use_mtp": True, "attn_type_list": [1] * 4, "language_model_only": False,
    "auto_map": {"AutoConfig": "configuration_remote.RemoteConfig", "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM"},
}  # fmt: skip
"""Key of config.json that only the published file has -> its value."""


class NotBuiltError(Exception):
    """A base cannot be built as published; the message says why."""


@dataclass(frozen=True)
class Base:
    """A base as published, in a project folder.

    Attributes:
        kind: The class of transformers.
        project: The folder, with base/.
        only: Tensors of the base that the class does not load.
        info: What transformers says when it loads the base.
        trained: The directory that transformers loads: base/, or the same in float32 where the published one is in 8 bits.
    """

    kind: Any
    project: Project
    only: dict[str, torch.Tensor]
    info: dict[str, Any]
    trained: Path


def kind_of(key: str, about: dict[str, Any]) -> str:
    """Return the type of model of an entry."""
    kind: str = CLASSES[key][0] if key in CLASSES else about.get("model_type") or key
    return kind


def sources(key: str, about: dict[str, Any]) -> list[list[str]]:
    """Return where the names of an entry are from: repository and path."""
    named = [source for source in about["sources"] if not source[0].startswith("code index")]
    return [*named, *([FURTHER_SOURCES[key]] if key in FURTHER_SOURCES else [])]


def certainty(about: dict[str, Any]) -> str:
    """Return what of an entry is recalled, or that the names are those that transformers writes; empty if all was read."""
    said: str = about.get("certainty", "").replace("recalled, not read in this session", "recalled")
    listed = (isinstance(about["published"], dict) and about["published"]) or "names" in about
    return "; ".join(
        part for part in (said, "" if listed else "published.json lists no tensors: names as save_pretrained writes them") if part
    )


def template(name: str) -> str:
    """Return a tensor's name with {n} for every number."""
    return re.sub(r"(?<=\.)(\d+|\{\w+\})(?=\.|$)", "{n}", name)


def as_published(key: str, about: dict[str, Any], folder: Path) -> Base:
    """Build the tiny base of an entry of published.json.

    Args:
        key: The entry's name.
        about: The entry.
        folder: A folder that does not exist yet.

    Raises:
        NotBuiltError: If transformers has no such class, or the names that it writes are not the published ones.
    """
    kind = kind_of(key, about)
    name = CLASSES.get(key, ("", about["architecture"]))[1]
    try:
        family = build(kind, name, folder, with_fields(CONFIGS.get(kind, {}), about.get("config", {})))
    except NotTinyError as error:
        raise NotBuiltError(str(error)) from None
    saved = of_file(folder / "base")
    rules = about.get("renames") or RENAMED.get(key, [])
    tensors = renamed(rules, fused(saved) if key == "qwen3_5_moe" else saved)
    if key == "qwen3_vl_moe":  # save_pretrained writes the stacks of experts in the live order
        tensors = {name: t.mT.contiguous() if ".experts." in name else t for name, t in tensors.items()}
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if key == "qwen3" else about.get("copies", {})
    tensors |= {second: tensors[first].clone() for second, first in copies.items()}
    if absent := sorted({template(name) for name in about.get("names", [])} - {template(name) for name in tensors}):
        raise NotBuiltError(f"save_pretrained writes no {', '.join(absent[:3])}, which the source names")
    listed = about["published"] if isinstance(about["published"], dict) else {}
    listed = dict(zip(renamed(rules, listed), listed.values(), strict=True))
    dtypes = {template(name): DTYPES[dtype] for name, (dtype, _) in {**listed, **about.get("only", {})}.items()}
    if listed and (unknown := sorted({template(name) for name in tensors} - dtypes.keys())):
        raise NotBuiltError(f"published.json lacks {', '.join(unknown[:3])}")
    layers = family.base.config.get_text_config().num_hidden_layers
    extra = further(about, listed, tensors, layers)
    tensors |= extra
    cast = {
        name: t.to(dtypes.get(template(name), torch.bfloat16)).contiguous() if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    write(folder / "base", cast, about["extra_config_keys"])
    trained = folder / "base"
    if layout := about.get("packed"):
        trained = folder / "plain"
        shutil.copytree(folder / "base", trained)
        cast = save_mxfp4(folder / "base") if layout == "mxfp4" else save_fp8(folder / "base", layout)
        save_file(cast, trained / "model.safetensors", metadata={"format": "pt"})
    _, info = family.kind.from_pretrained(trained, dtype=torch.float32, output_loading_info=True)
    if lost := {key: value for key, value in info.items() if value and key != "unexpected_keys"}:
        raise NotBuiltError(f"{family.kind.__name__} of transformers loads the published names with {str(lost)[:200]}")
    return Base(family.kind, Project(folder), {name: cast[name] for name in extra}, info, trained)


def renamed(rules: list[tuple[str, str]], tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the names that save_pretrained writes, or that published.json lists, as the hub's."""
    made = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, other in rules:
            new = re.sub(pattern, other, new)
        made[new] = tensor
    return made


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack experts that are stored one by one: gate_up_proj [experts, 2 * inner, hidden] and down_proj [experts, hidden, inner]."""
    kept, groups = {}, dict[str, dict[str, dict[int, torch.Tensor]]]()
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            groups.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = tensor
        else:
            kept[name] = tensor
    for stem, parts in groups.items():
        gate, up, down = (
            torch.stack([t for _, t in sorted(parts[part].items())]) for part in ("gate_proj", "up_proj", "down_proj")
        )
        kept |= {f"{stem}.gate_up_proj": torch.cat([gate, up], 1), f"{stem}.down_proj": down}
    return kept


def further(
    about: dict[str, Any], listed: dict[str, Any], tensors: dict[str, torch.Tensor], layers: int
) -> dict[str, torch.Tensor]:
    """Return random tensors that only the published files have: a head that predicts further tokens."""
    draw = torch.Generator().manual_seed(7)
    own = {template(name) for name in tensors}
    made = {
        pattern.replace("{layer}", str(layer)): torch.randn(shape, generator=draw).to(DTYPES[dtype])
        for pattern, (dtype, shape) in about.get("only", {}).items()
        for layer in range(layers)
    }
    for pattern, (_, shape) in listed.items():
        if template(pattern) in own or pattern == "lm_head.weight" or pattern.startswith("vision_tower."):
            continue
        for name in instances(pattern, layers):
            made[name] = torch.randn(shape, generator=draw) * 0.1
    if any(f".layers.{layers}." in name for name in made):  # beside the head's own tensors the layer has those of a decoder layer
        made = speculative(tensors, layers, "layer") | made
    elif not listed and "layers." in " ".join(about["published_only"]):
        made = speculative(tensors, layers, "layer")
    return made


def instances(pattern: str, layers: int) -> Iterator[str]:
    """Yield the names of a pattern: the layer after the last one, or the first of a head; every expert; both parts of a double layer."""
    first = (
        pattern.replace("model.layers.{layer}.", f"model.layers.{layers}.", 1)
        .replace("{layer}", "0")
        .replace("mtp.{n}.", "mtp.0.")
    )
    for expert in range(4) if "{expert}" in first else (0,):
        for part in (0, 1) if "{n}" in first else (0,):
            yield first.replace("{expert}", str(expert)).replace("{n}", str(part))


def write(place: Path, tensors: dict[str, torch.Tensor], keys: list[str]) -> None:
    """Write the tensors and config.json of a base in the place of what save_pretrained wrote."""
    for file in place.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    file = place / "config.json"
    config = {**json.loads(file.read_text("utf-8")), "dtype": "bfloat16"}
    for key in keys:
        if "." not in key:
            inside = config["text_config"] if "text_config" in config and key != "language_model_only" else config
            inside[key] = EXTRA_CONFIG[key]
    file.write_text(json.dumps(config, indent=2), "utf-8")


def save_mxfp4(place: Path) -> dict[str, torch.Tensor]:
    """Store the experts of gpt-oss as the hub does, in place, with random numbers of four bits; return what all tensors are worth."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    draw = torch.Generator().manual_seed(11)
    stored, worth = {}, {}
    for name, tensor in of_file(place).items():
        stored[name] = worth[name] = tensor
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = stored.pop(name).shape
            codes = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=draw, dtype=torch.uint8)
            scales = torch.randint(120, 125, (experts, outputs, inputs // 32), generator=draw, dtype=torch.uint8)
            stored |= {f"{name}_blocks": codes, f"{name}_scales": scales}
            worth[name] = convert_moe_packed_tensors(codes, scales).contiguous()
    save_file(stored, place / "model.safetensors", metadata={"format": "pt"})
    file = place / "config.json"
    config = json.loads(file.read_text("utf-8"))
    said = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    file.write_text(json.dumps({**config, "quantization_config": said}), "utf-8")
    return worth
