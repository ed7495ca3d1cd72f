"""Supported PEFT configurations, and error messages for the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import LEARNED, PROMPTS
from workbench.weights.header import check_fields, is_number

BAKE = (
    "Bake it into a checkpoint first: PeftModel.from_pretrained(base, DIR).merge_and_unload(safe_merge=True)"
    ".save_pretrained(OUT), then use `checkpoint: OUT`."
)
_CONVERT = (
    "Its factors refer to a modified base. Convert it on the machine that trained it: model.save_pretrained(OUT, "
    "path_initial_model_for_weight_conversion=DIR_OF_THE_UNTRAINED_ADAPTER), or bake it there with merge_and_unload()."
)
_TWICE = (
    "It repeats layers of its base. Build that base first with a `grow` step and train on it, or bake the adapter with "
    "merge_and_unload()."
)
_GATED = "It applies to some tokens only, so no change of weights is equivalent to it. Use it with PEFT at inference."
# Supported peft_type -> prefix of the names of its parts.
TUNERS = {
    "LORA": "lora_", "LOHA": "hada_", "LOKR": "lokr_", "IA3": "ia3_", "OFT": "oft_", "ADALORA": "lora_",
    "TRAINABLE_TOKENS": "trainable_", "VERA": "vera_", "BOFT": "boft_", "HRA": "hra_", "FOURIERFT": "fourierft_",
    "RANDLORA": "randlora_", "VBLORA": "vblora_",
}  # fmt: skip
TITLES = {
    "LOHA": "LoHa", "LOKR": "LoKr", "IA3": "(IA)³", "OFT": "OFT", "VERA": "VeRA", "BOFT": "BOFT", "HRA": "HRA",
    "FOURIERFT": "FourierFT", "RANDLORA": "RandLoRA", "VBLORA": "VB-LoRA",
}  # fmt: skip
# peft_type -> the field that states the rank of a module, the field with patterns for it, and PEFT's default.
SIZES = {
    **dict.fromkeys(("LORA", "LOHA", "LOKR"), ("r", "rank_pattern", 8)),
    "ADALORA": ("init_r", "", 12),
    "HRA": ("r", "", 8),
    "FOURIERFT": ("n_frequency", "n_frequency_pattern", 1000),
}
# peft_type -> the fields that state the number of blocks and the size of a block, and PEFT's default of the size.
BLOCKS = {"OFT": ("r", "oft_block_size", 32), "BOFT": ("boft_block_num", "boft_block_size", 4)}
# Configuration field that is not supported -> hint. An unset or false field raises no error.
_REFUSED = {
    "layer_replication": _TWICE,
    "alora_invocation_tokens": _GATED,
    "arrow_config": _GATED,
    "use_qalora": BAKE,
    "kasa_config": _CONVERT,
    "use_bdlora": BAKE,
    "monteclora_config": BAKE,
    "coft": BAKE,
}
# Initializations that subtract their factors from the base. EVA, orthogonal and gaussian do not change the base.
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# Fields that are read, or that do not change what the stored factors mean.
_NEUTRAL = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "init_weights", "init_ia3_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "trainable_token_indices", "token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "use_dora", "velora_config", "qalora_group_size", "lora_bias", "target_parameters", "ensure_weight_tying", "runtime_config",
    "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "decompose_both", "decompose_factor",
    "feedforward_modules", "enable_lora", "merge_weights", "oft_block_size", "block_share", "use_cayley_neumann",
    "num_cayley_neumann_terms", "eps", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor",
    "boft_dropout", "apply_GS", "n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "sparse", "very_sparse", "randlora_dropout",
    "randlora_alpha", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "vblora_dropout", "init_vector_bank_bound",
    "init_logits_std",
})  # fmt: skip


def _is_integer(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _are_tokens(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(tokens, list) and all(_is_integer(token) for token in tokens) for tokens in lists)


def _are_ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(is_number(rank) and rank > 0 for rank in value.values())


def _are_masks(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(mask, list) and all(map(_is_flag, mask)) for mask in value.values())


_INTEGERS = (
    "r", "init_r", "n_frequency", "oft_block_size", "boft_block_size", "boft_block_num", "projection_prng_key", "random_loc_seed",
)  # fmt: skip
_FLAGS = (
    "use_rslora", "use_dora", "decompose_both", "fan_in_fan_out", "use_cayley_neumann", "block_share", "save_projection", "apply_GS",
    "sparse", "very_sparse",
)  # fmt: skip
# Field -> test, and the expected value for the error message; null is always allowed.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: isinstance(value, str), "a text"),
    "auto_mapping": (lambda value: isinstance(value, dict), "an object"),
    **dict.fromkeys(("lora_alpha", "alpha", "scaling", "randlora_alpha"), (is_number, "a number")),
    "alpha_pattern": (lambda value: isinstance(value, dict) and all(map(is_number, value.values())), "patterns with numbers"),
    "target_parameters": (lambda value: _are_texts(value) and not isinstance(value, str), "a list of texts"),
    **dict.fromkeys(("target_modules", "exclude_modules"), (_are_texts, "a text or a list of texts")),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a text"),
    **dict.fromkeys(("trainable_token_indices", "token_indices"), (_are_tokens, "a list of token ids")),
    "num_cayley_neumann_terms": (lambda value: _is_integer(value) and 0 < value <= 100, "a whole number from 1 to 100"),
    "topk": (lambda value: _is_integer(value) and value > 0, "a whole number over 0"),
    "n_frequency_pattern": (_are_ranks, "patterns with numbers over 0"),
    **dict.fromkeys(_INTEGERS, (_is_integer, "a whole number")),
    **dict.fromkeys(_FLAGS, (_is_flag, "true or false")),
}


def check_kinds(config: Mapping[str, object], label: str) -> None:
    """Check that fields of adapter_config.json have the types that PEFT writes; "16" is not a number.

    Raises:
        WorkbenchError: If a field has another type. The message names the file and the field.
    """
    check_fields(config, _KINDS, label)
    # AdaLoRA uses this field for lists of booleans that mark the singular values it keeps.
    test, expected = (
        (_are_masks, "lists of truth values")
        if config.get("peft_type") == "ADALORA"
        else (_are_ranks, "patterns with numbers over 0")
    )
    check_fields(config, {"rank_pattern": (test, expected)}, label)


def check_config(config: Mapping[str, object], label: str) -> None:
    """Check that this package can apply an adapter.

    Raises:
        WorkbenchError: If the `peft_type` is not supported, or the stored factors and the base do not determine the update.
    """
    kind = config.get("peft_type")
    if kind not in TUNERS:
        raise WorkbenchError(f"{label}: peft_type {kind}; expected {', '.join(TUNERS)}", LEARNED if kind in PROMPTS else BAKE)
    if used := [field for field in _REFUSED if config.get(field)]:
        raise WorkbenchError(f"{label}: {kind} with {', '.join(used)} is not supported", _REFUSED[used[0]])
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MUTATING):
        raise WorkbenchError(
            f"{label}: init_lora_weights {start!r} is not supported: the adapter refers to a base minus its initial factors",
            _CONVERT,
        )


def unknown_fields(config: Mapping[str, object]) -> list[str]:
    """Return the fields that are set but not known to this package."""
    return sorted(k for k, v in config.items() if v and k not in _NEUTRAL and k not in _REFUSED)


_MEANING = {
    "ADALORA": ("init_r",),
    "OFT": ("block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    "VERA": ("r", "projection_prng_key", "save_projection"),
    "HRA": ("apply_GS",),
    "FOURIERFT": ("scaling", "random_loc_seed"),
    "RANDLORA": ("r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse"),
    "VBLORA": ("r", "topk"),
}
"""peft_type -> its own fields that change what equal tensors mean."""


def meaning(config: Mapping[str, object]) -> dict[str, object]:
    """Return the fields that change what equal tensors mean; they are part of an adapter's digest."""
    always = ("peft_type", "lora_alpha", "use_rslora", "alpha_pattern", "fan_in_fan_out")
    fields = {key: config.get(key) for key in always}
    names = ["target_parameters", "trainable_token_indices", "token_indices"]
    names += ["r", "alpha", "rank_pattern"] if config.get("peft_type") in ("LOHA", "LOKR") else []
    names += _MEANING.get(str(config.get("peft_type")), ())
    return fields | {key: config[key] for key in names if config.get(key) is not None}
