"""Configuration of the model in a GGUF file: what transformers reads from the file, completed and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.models.architecture import model_depth
from workbench.weights.configuration import DEPTHS, MAX_SIZE, check_config

# Fields of an architecture that transformers reads, that are read here, or that say nothing about what the model computes.
_READ = frozenset(
    {
        "context_length",
        "block_count",
        "feed_forward_length",
        "embedding_length",
        "rope.dimension_count",
        "rope.freq_base",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "vocab_size",
        "attention.key_length",
        "attention.value_length",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    }
)
_SLIDING = {"gemma2", "gemma3"}
_LARGE = {"gemma2": 46, "gemma3": 62}  # layers of the 27 B models, whose attention is scaled by the width of a head's share
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_settings(
    file: Path, architecture: str, fields: Mapping[str, Any], tensors: Sequence[Any], label: str, hint: str
) -> dict[str, Any]:
    """Return config.json of the model in a GGUF file.

    transformers reads sizes, rotary base and ties. Sizes of heads, caps of logits, the scale of Gemma's attention and the rotary
    scaling of Llama 3 are read here, because transformers takes defaults for them.

    Args:
        file: The GGUF file.
        architecture: Its architecture.
        fields: Its fields, without those of the tokenizer.
        tensors: Its tensors, as the package gguf reads them.
        label: The file in messages.
        hint: Hint of errors.

    Raises:
        WorkbenchError: If the file has fields that are not read, or if transformers cannot read it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    own = {name.removeprefix(f"{architecture}."): v for name, v in fields.items() if name.startswith(f"{architecture}.")}
    unread = [name for name in own if name not in _READ and not _is_harmless(name, own[name], architecture)]
    if unread:
        raise WorkbenchError(
            f"{label}: the field {architecture}.{unread[0]} = {str(own[unread[0]])[:40]} is not read from GGUF files"
            + (f" ({len(unread)} such fields)" if len(unread) > 1 else ""),
            hint,
        )
    try:
        parsed = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError, ArithmeticError, AttributeError, IndexError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WorkbenchError(f"{label}: transformers cannot read its configuration ({reason})", hint) from None
    config: dict[str, Any] = json.loads(parsed.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        config.pop(key, None)
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)].__name__]
    check_config(config, label)
    for name in (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        DEPTHS[0],
        "intermediate_size",
        "vocab_size",
    ):
        if type(config.get(name)) is not int or not 0 < config[name] <= MAX_SIZE:
            raise WorkbenchError(f"{label}: {name} is {str(config.get(name))[:40]}; expected a positive whole number", hint)
    _complete(config, architecture, own, label, hint)
    factors = next((tensor for tensor in tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        config["rope_parameters"] = {
            **(config.get("rope_parameters") or {}),
            **_llama3_rope([float(value) for value in factors.data], config, label, hint),
        }
    return config


def _is_harmless(name: str, value: Any, architecture: str) -> bool:
    """Return whether a field says what is the case without it."""
    if name == "attention.sliding_window":
        return architecture in _SLIDING
    return (name == "rope.scaling.type" and value in ("none", "")) or (name == "expert_count" and value == 0)


def _complete(config: dict[str, Any], architecture: str, own: Mapping[str, Any], label: str, hint: str) -> None:
    """Set what transformers does not read from a file, and check that sizes of heads agree."""
    size = own.get("attention.key_length") or config["hidden_size"] // config["num_attention_heads"]
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, size) != size:
            raise WorkbenchError(f"{label}: {architecture}.{name} is {own[name]}, but a head has {size} rows", hint)
    config["head_dim"] = size
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if architecture == "gemma2" and name in own:
            config[name] = own[name]
    if architecture in _LARGE:
        large = model_depth(config) == _LARGE[architecture]
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if large else size


def _llama3_rope(factors: list[float], config: Mapping[str, Any], label: str, hint: str) -> dict[str, Any]:
    """Return the rotary settings of Llama 3.1 and later whose factors a file stores.

    llama.cpp stores what each frequency is divided by. transformers computes it from four numbers, of which files by Meta only vary
    `factor`; the last factor is that number. Source: transformers, modeling_rope_utils._compute_llama3_parameters.
    """
    theta, size = float((config.get("rope_parameters") or config)["rope_theta"]), int(config["head_dim"])
    factor = factors[-1] if factors else 0.0
    if (
        len(factors) != size // 2
        or factor <= 0
        or not all(
            math.isclose(stored, _divisor(theta ** (2 * i / size), factor), rel_tol=1e-3) for i, stored in enumerate(factors)
        )
    ):
        raise WorkbenchError(f"{label}: rope_freqs.weight does not hold the rotary scaling of Llama 3", hint)
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _divisor(length: float, factor: float) -> float:
    """Return what Llama 3 divides a frequency by whose wave has the given length over 2π."""
    low, high, context = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"], _LLAMA3["original_max_position_embeddings"]
    wave = 2 * math.pi * length
    if wave < context / high:
        return 1.0
    if wave > context / low:
        return factor
    smooth = (context / wave - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)
