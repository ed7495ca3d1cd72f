"""The fields of config.json that the workbench reads, and checks of their types."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from workbench import jsondoc
from workbench.errors import WorkbenchError

MAX_LAYERS = 10_000
MAX_SIZE = 2**40
# Fields for the number of layers, the number of positions, and the text decoder of a multimodal model; `models/architecture.py` reads
# them. If several of POSITIONS are set, the first one counts, as in lm-eval.
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers")
POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")
TEXT_CONFIGS = ("text_config", "llm_config")
_PARTS = (*TEXT_CONFIGS, "vision_config", "audio_config")
_NAME_BYTES = 255


def is_file_name(name: str) -> bool:
    """Return whether a text from an untrusted file is a plain file name: no path, no NUL, not too long for a file system."""
    is_plain = name not in ("", ".", "..") and "/" not in name and "\0" not in name
    try:
        return is_plain and len(os.fsencode(name)) <= _NAME_BYTES
    except UnicodeEncodeError:  # an unpaired surrogate
        return False


def _is_integer_up_to(limit: int) -> Callable[[Any], bool]:
    return lambda value: (type(value) is int or (type(value) is float and value.is_integer())) and 0 <= value <= limit


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_token(value: Any) -> bool:
    is_integer = type(value) is int and abs(value) < 2**31
    return is_integer or (isinstance(value, list) and all(type(number) is int and abs(number) < 2**31 for number in value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


_LAYERS = f"a whole number from 0 to {MAX_LAYERS:,}"
_SIZE = "a whole number from 0"
# Field -> (test, description of the expected value). null is always allowed: transformers then takes its default.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(DEPTHS, (_is_integer_up_to(MAX_LAYERS), _LAYERS)),
    **dict.fromkeys(("vocab_size", "n_embd", "d_model", *POSITIONS), (_is_integer_up_to(MAX_SIZE), _SIZE)),
    "model_type": (_is_text, "a text"),
    "architectures": (_is_list_of_texts, "a list of texts"),
    "layer_types": (_is_list_of_texts, "a list of texts"),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
    "auto_map": (_is_object, "an object"),
    "rope_scaling": (_is_object, "an object"),
    "rope_parameters": (_is_object, "an object"),
    "initializer_range": (_is_number, "a number"),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (_is_token, "a token id, or a list of them")),
    **dict.fromkeys(_PARTS, (_is_object, "an object")),
}


def check_config(config: Mapping[str, Any], label: str) -> None:
    """Check the fields of config.json that the workbench reads, including those of parts such as `text_config`.

    Args:
        config: The content of config.json.
        label: The file's name in messages.

    Raises:
        WorkbenchError: If a field has the wrong type or a number is out of range. The message names file and field.
    """
    check_fields(config, _FIELDS, label)
    for name in _PARTS:
        if config.get(name):
            check_fields(config[name], _FIELDS, f"{label}: {name}")


def check_fields(content: Mapping[str, Any], fields: Mapping[str, tuple[Callable[[Any], bool], str]], label: str) -> None:
    """Check the fields of an untrusted JSON object; null is always valid.

    Args:
        content: The object. Fields without an entry in `fields` are ignored.
        fields: Field -> (test, description of the expected value).
        label: The object's name in messages.

    Raises:
        WorkbenchError: If a field is invalid.
    """
    for name, value in content.items():
        test, expected = fields.get(name, (None, ""))
        if test is not None and value is not None and not test(value):
            actual = jsondoc.kind(value) if isinstance(value, (dict, list)) else repr(value)[:60]
            raise WorkbenchError(
                f"{label}: {name}: expected {expected}, found {actual}", "The file is damaged: download it again."
            )
