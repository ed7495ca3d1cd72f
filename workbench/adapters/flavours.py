"""Which PEFT configurations are read, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workbench.errors import WorkbenchError
from workbench.weights.configuration import check_fields

BAKE = (
    "Bake it into a checkpoint first: PeftModel.from_pretrained(base, DIR).merge_and_unload(safe_merge=True)"
    ".save_pretrained(OUT), then use `checkpoint: OUT`."
)
_CONVERT = (
    "Its factors refer to a changed base. Convert it where it was trained: model.save_pretrained(OUT, "
    "path_initial_model_for_weight_conversion=DIR_OF_THE_UNTRAINED_ADAPTER), or bake it there with merge_and_unload()."
)
_TWICE = "It repeats layers of its base: build that base first (`grow`), then train on it, or bake it: merge_and_unload()."
_GATED = "It acts on some tokens only, so that no change of weights equals it; use it with PEFT at inference."
# peft_type -> how its parts' names start. All else is refused.
TUNERS = {
    "LORA": "lora_",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "IA3": "ia3_",
    "OFT": "oft_",
    "ADALORA": "lora_",
    "TRAINABLE_TOKENS": "trainable_",
}
TITLES = {"LOHA": "LoHa", "LOKR": "LoKr", "IA3": "(IA)³", "OFT": "OFT"}
# A field of the configuration -> the hint. A field that is unset or false is not used.
_REFUSED = {
    "layer_replication": _TWICE, "alora_invocation_tokens": _GATED, "arrow_config": _GATED, "use_qalora": BAKE,
    "kasa_config": _CONVERT, "use_bdlora": BAKE, "monteclora_config": BAKE, "coft": BAKE,
}  # fmt: skip
# Initialisations that subtract their factors from the base. EVA, orthogonal and gaussian ones leave it as it is.
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# Fields that do not change what stored factors mean.
_NEUTRAL = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "init_weights", "init_ia3_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "trainable_token_indices", "token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "use_dora", "velora_config", "qalora_group_size", "lora_bias", "target_parameters", "ensure_weight_tying", "runtime_config",
    "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "decompose_both", "decompose_factor",
    "feedforward_modules", "enable_lora", "merge_weights", "oft_block_size", "block_share", "use_cayley_neumann",
    "num_cayley_neumann_terms", "eps", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
})  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _are_tokens(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(tokens, list) and all(_is_whole(token) for token in tokens) for tokens in lists)


def _are_ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_positive, value.values()))


def _are_masks(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(mask, list) and all(map(_is_flag, mask)) for mask in value.values())


# Field -> test, and what is expected; null is allowed everywhere.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: isinstance(value, str), "a text"),
    "auto_mapping": (lambda value: isinstance(value, dict), "an object"),
    "lora_alpha": (_is_number, "a number"),
    "alpha": (_is_number, "a number"),
    "r": (_is_whole, "a whole number"),
    "init_r": (_is_whole, "a whole number"),
    "alpha_pattern": (lambda value: isinstance(value, dict) and all(map(_is_number, value.values())), "patterns with numbers"),
    "target_parameters": (lambda value: _are_texts(value) and not isinstance(value, str), "a list of texts"),
    "target_modules": (_are_texts, "a text or a list of texts"),
    "exclude_modules": (_are_texts, "a text or a list of texts"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a text"),
    "trainable_token_indices": (_are_tokens, "a list of token ids"),
    "token_indices": (_are_tokens, "a list of token ids"),
    "num_cayley_neumann_terms": (lambda value: _is_whole(value) and 0 < value <= 100, "a whole number from 1 to 100"),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "fan_in_fan_out", "use_cayley_neumann", "block_share"), (_is_flag, "true or false")
    ),
}


def check_kinds(config: Mapping[str, Any], where: str) -> None:
    """Check that the fields that are read are of the kind that PEFT writes: "16" is no number.

    Raises:
        WorkbenchError: The first field that is not. The message names file and field.
    """
    check_fields(config, _KINDS, where)
    # AdaLoRA keeps which singular values are left under this name: lists of truth values.
    test, expected = (
        (_are_masks, "lists of truth values")
        if config.get("peft_type") == "ADALORA"
        else (_are_ranks, "patterns with numbers over 0")
    )
    check_fields(config, {"rank_pattern": (test, expected)}, where)


def check_config(config: Mapping[str, Any], label: str) -> None:
    """Errors: another tuner, a LoRA variant that stored factors and the base do not determine."""
    kind = config.get("peft_type")
    if kind not in TUNERS:
        raise WorkbenchError(f"{label}: peft_type {kind}; expected {', '.join(TUNERS)}", BAKE)
    if used := [field for field in _REFUSED if config.get(field)]:
        raise WorkbenchError(f"{label}: {kind} with {', '.join(used)}, which is not read here", _REFUSED[used[0]])
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MUTATING):
        raise WorkbenchError(
            f"{label}: init_lora_weights {start!r}: the adapter refers to a base from which its first factors were taken away",
            _CONVERT,
        )


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Fields in use that this reader has no knowledge of."""
    return sorted(k for k, v in config.items() if v and k not in _NEUTRAL and k not in _REFUSED)


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that change what equal tensors mean: part of an adapter's digest."""
    always = ("peft_type", "lora_alpha", "use_rslora", "alpha_pattern", "fan_in_fan_out")
    found = {key: config.get(key) for key in always}
    names = ["target_parameters", "trainable_token_indices", "token_indices"]
    names += ["r", "alpha", "rank_pattern"] if config.get("peft_type") in ("LOHA", "LOKR") else []
    names += ["init_r"] if config.get("peft_type") == "ADALORA" else []
    names += ["block_share", "use_cayley_neumann", "num_cayley_neumann_terms"] if config.get("peft_type") == "OFT" else []
    return found | {key: config[key] for key in names if config.get(key) is not None}
