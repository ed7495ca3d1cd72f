"""Settings of generation_config.json that change generated texts, and the identity of a configuration with them and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.files import json_digest
from workbench.jsondoc import read_object
from workbench.models.architecture import text_parts

FILE = "generation_config.json"
# transformers' defaults of missing settings; test_decoding compares them with the installed version.
DEFAULTS: Mapping[str, Any] = {
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}
# Settings that do not change texts, or that lm-eval passes with every call.
_IDLE = frozenset(
    {
        "_from_model_config",
        "transformers_version",
        "bos_token_id",
        "pad_token_id",
        "max_length",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
    }
)
# Settings of older checkpoints, which transformers takes from config.json where there is no generation_config.json.
_LEGACY = (
    *DEFAULTS,
    "eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
)


def generation_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change texts, compared with the same weights without a generation_config.json.

    Args:
        folder: Directory with generation_config.json, which may be missing.
        config: The content of config.json, which the digest of the weights covers. Settings equal to it or to transformers' defaults are
            ignored, so that the result is empty for most models.

    Returns:
        Field -> value; None for a field that config.json sets and generation_config.json does not.

    Raises:
        WorkbenchError: If the file is not a JSON object.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    stated = {
        key: value
        for key, value in read_object(path, None, "Download the file again.", infinite=True).items()
        if value is not None and key not in _IDLE
    }
    config_values: dict[str, Any] = {}
    for part in reversed(list(text_parts(config))):
        config_values |= {key: value for key, value in part.items() if value is not None}
    from_config = {key: config_values[key] for key in _LEGACY if config_values.get(key) is not None}
    differing = sorted(key for key in {*stated, *from_config} if _value(stated, key) != _value(from_config, key))
    return {key: stated.get(key) for key in differing}


def identity(weights: str, settings: Mapping[str, Any], tokenizer: str) -> str:
    """Return the digest of a configuration: the digest of its weights, combined with what else decides its scores.

    Args:
        weights: Digest of the weights.
        settings: Generation settings, usually empty.
        tokenizer: Digest of the tokenizer; empty if only scores are known.
    """
    return json_digest([weights, settings, tokenizer]) if settings or tokenizer else weights


def _value(settings: Mapping[str, Any], key: str) -> Any:
    """Return a setting or its default; a list of one value equals the value."""
    value = settings.get(key, DEFAULTS.get(key))
    return value[0] if isinstance(value, list) and len(value) == 1 else value
