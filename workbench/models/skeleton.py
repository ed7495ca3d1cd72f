"""Models built by transformers without memory for their weights, and stored tensors that are no weights.

Buffers that transformers computes itself and second copies of tied embeddings are removed from a checkpoint; packed weights are refused.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.architecture import is_embedding, is_head
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import entry_digest
from workbench.weights.header import TEXT_CONFIGS, HeadersOnlyError, dequantise
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def parse_config(config: Mapping[str, object]) -> PretrainedConfig:
    """Parse the content of config.json with transformers.

    Raises:
        WorkbenchError: If the installed transformers does not know the architecture or refuses a field.
    """
    return copy.deepcopy(_parsed(json.dumps(config)))


@lru_cache(maxsize=8)
def _parsed(text: str) -> PretrainedConfig:
    """Parse the text of config.json: transformers takes only files, and a run reads the same text several times."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text, "utf-8")
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise WorkbenchError(
                f"config.json: transformers cannot read model_type {json.loads(text).get('model_type')} ({reason[:200]})",
                "A newer version of transformers may support it.",
            ) from None


def ties_head(config: Mapping[str, object]) -> bool:
    """Return whether the model of a config.json uses its embeddings as its head, by its flag or the architecture's default."""
    return bool(skeleton(json.dumps(config, sort_keys=True)).all_tied_weights_keys)


def groups_of(model: PreTrainedModel, names: list[str]) -> list[tuple[str, Any, list[tuple[str, str]]]]:
    """Group tensors on disk by the live tensor that they become, as transformers' loader does.

    Returns:
        Tuples (live tensor, conversion or None, [(name on disk, matched pattern)]). A name that the model does not use has the live
        tensor "?name".

    Raises:
        WorkbenchError: If the installed transformers has its conversions in other modules.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError as error:
        raise WorkbenchError(
            f"the installed transformers has its conversion of names in other modules ({error})",
            "pip install transformers==5.24.0",
        ) from None

    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    live, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, live)
        if key not in live and name in live:
            key, pattern = rename_source_key(name, [], [], prefix, live)
        if key not in live:
            key, pattern = f"?{name}", None
        if key not in groups:  # a copy, because a conversion object collects its tensors
            groups[key] = (copy.deepcopy(by_pattern[pattern]) if pattern is not None else None, [])
        groups[key][1].append((name, pattern or name))
    return [(key, transform, members) for key, (transform, members) in groups.items()]


@lru_cache(maxsize=4)
def skeleton(config: str) -> PreTrainedModel:
    """Build a model without memory for its weights, of the class that config.json names or else as a causal language model.

    Args:
        config: The text of config.json.

    Raises:
        WorkbenchError: If transformers does not know the architecture.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    data = json.loads(config)
    parsed = parse_config({k: v for k, v in data.items() if k != "quantization_config"})
    classes: list[Any] = [getattr(transformers, str(name), None) for name in data.get("architectures") or []]
    kinds: list[Any] = [k for k in classes if isinstance(k, type) and issubclass(k, PreTrainedModel)]
    kinds = [k for k in kinds if k.config_class is type(parsed)]
    if type(parsed) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kinds.append(MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)])
    if not kinds:
        raise WorkbenchError(
            f"config.json: transformers has no model for model_type {data.get('model_type')}, architectures {data.get('architectures')}",
            "Use a model that transformers supports natively.",
        )
    with torch.device("meta"):
        model: PreTrainedModel = kinds[0]._from_config(part_for(kinds[0], parsed))
    return model


def part_for(kind: Any, parsed: PretrainedConfig) -> PretrainedConfig:
    """Return what a model class takes of a configuration: all of it, or the part of the text decoder, as `AutoModelForCausalLM` does."""
    return parsed if kind.config_class is None or isinstance(parsed, kind.config_class) else parsed.get_text_config(decoder=True)


def causal_skeleton(config: dict[str, object], device: torch.device) -> PreTrainedModel:
    """Build a causal language model without weights, in eval mode.

    Args:
        config: The content of config.json.
        device: The device of the buffers, which are computed. Parameters are on the meta device.
    """
    from torch import nn

    parsed = parse_config(config)
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        kind = decoder_class(parsed, config)
        model: PreTrainedModel = kind._from_config(part_for(kind, parsed), dtype=torch.float32)
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    for module in model.modules():
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else value.to(device)
    return model.eval()


def loading_class(config: dict[str, object]) -> str:
    """Return the name of the transformers class that loads all of a model, for a line that a user runs.

    It is the Auto class for the class in `architectures`, with common Auto classes first, or the class in `architectures` itself.
    `AutoModelForCausalLM` loads many multimodal models without their towers, so it is returned only for classes that it maps to.
    """
    kind, named = config.get("model_type"), config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if isinstance(architecture, str) and architecture.endswith("ForCausalLM"):
        return "AutoModelForCausalLM"
    from transformers.models.auto import modeling_auto

    usual = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    if isinstance(architecture, str) and "vision_config" not in config and "audio_config" not in config:
        usual = (usual[2], *usual[:2], usual[3])
    other_names = [name for name in sorted(vars(modeling_auto)) if name.startswith("AutoModelFor") and name not in usual]
    for name in (*usual, *other_names, "AutoModel"):
        mapping = getattr(getattr(modeling_auto, name, None), "_model_mapping", None)
        stands_for = mapping._model_mapping.get(kind) if mapping is not None else None
        if stands_for and (
            architecture is None or architecture in ((stands_for,) if isinstance(stands_for, str) else stands_for)
        ):
            return str(name)
    return str(architecture or "AutoModelForCausalLM")


def check_decoder(config: dict[str, object]) -> None:
    """Check that config.json describes a decoder-only language model of transformers."""
    decoder_class(parse_config(config), config)


def decoder_class(parsed: Any, config: dict[str, object]) -> Any:
    """Return the class in transformers of a decoder-only language model, with its encoders of images if it has some.

    Args:
        parsed: The configuration.
        config: The content of config.json, for the message.

    Raises:
        WorkbenchError: If it is another model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(parsed) in mapping and (mapping is MODEL_FOR_CAUSAL_LM_MAPPING or not parsed.is_encoder_decoder):
            return mapping[type(parsed)]
    raise WorkbenchError(
        f"config.json: model_type {config.get('model_type')} is not a decoder-only language model",
        "Only merges support other models. Live models (edit, eval, chat) must be decoder-only language models.",
    )


# Buffers in old files that transformers computes itself: causal masks and their fill values (GPT-2, GPT-Neo, GPT-J, GPT-NeoX, CodeGen),
# rotary frequencies of every layer, position ids.
_BUFFERS = re.compile(
    r"(^|\.)((cross)?attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)(rotary_emb|rotary|rotary_pos_emb)\.inv_freq$|(^|\.)position_ids$"
)
_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scales?|weight_scale_inv|weight_format|SCB|codebooks|W_q)$"
    r"|\.weight\.(absmax|quant_map|quant_state)|\.weight\._(data|scale)$|_proj_(blocks|scales|scale_inv|scale)$"
)


def tidy(checkpoint: Checkpoint) -> None:
    """Remove all tensors that are not weights from a checkpoint and list the buffers in `checkpoint.left_out`.

    Raises:
        WorkbenchError: If the architecture needs custom code, if weights are packed although config.json does not say so, or if the
            stored copy of tied embeddings differs from them.
    """
    checkpoint.config = native(checkpoint.config, f"{checkpoint.label}: {checkpoint.path / 'config.json'}")
    for name, entry in list(checkpoint.entries.items()):
        spec = entry.spec
        if is_buffer(name, spec):
            del checkpoint.entries[name]
            checkpoint.left_out.append(name)
            continue
        if _PACKED.search(name):
            raise WorkbenchError(
                f"{checkpoint.label}: {name} is part of a quantized weight; expected floating point",
                dequantise(None, checkpoint.path),
            )
        # integers under the name of a weight, or a matrix of bytes
        if (
            spec.kind == "integer"
            and not entry.packing
            and (name.endswith(".weight") or (spec.itemsize == 1 and len(spec.shape) > 1))
        ):
            raise WorkbenchError(
                f"{checkpoint.label}: {name} holds {spec.dtype_name} numbers, which are codes of a quantized weight; expected floating point",
                dequantise(None, checkpoint.path),
            )
    drop_tied_copy(checkpoint)


def native(config: dict[str, object], label: str) -> dict[str, object]:
    """Return config.json without the custom code that it names.

    Models that transformers now supports natively may still name their original code, which is not needed and never run.

    Raises:
        WorkbenchError: If transformers does not support the architecture natively.
    """
    if "auto_map" not in config:
        return dict(config)
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise WorkbenchError(
            f"{label} requires custom code (auto_map), which is never executed",
            f"transformers does not support model_type {config.get('model_type')} natively: use a revision of the model for a type that it supports.",
        )
    return {key: value for key, value in config.items() if key != "auto_map"}


def is_buffer(name: str, spec: TensorSpec) -> bool:
    """Return whether a stored tensor is a buffer that transformers computes itself."""
    if not _BUFFERS.search(name):
        return False
    if name.endswith((".bias", ".causal_mask")):  # a real bias has one dimension
        return len(spec.shape) == 4 and spec.shape[-1] == spec.shape[-2]
    return spec.numel == 1 if name.endswith(".masked_bias") else True


def drop_tied_copy(checkpoint: Checkpoint) -> None:
    """Remove a stored copy of tied embeddings, so that the tensor is read and written once.

    Raises:
        WorkbenchError: If the copy differs from the embeddings, although config.json ties them.
    """
    for head in [n for n in checkpoint.entries if is_head(n)]:
        shape = checkpoint.entries[head].spec.shape
        embeddings = [n for n, e in checkpoint.entries.items() if n != head and e.spec.shape == shape and is_embedding(n)]
        if not embeddings or not is_tied(checkpoint):
            continue
        try:
            differs = entry_digest(checkpoint.entries[embeddings[0]]) != entry_digest(checkpoint.entries[head])
        except HeadersOnlyError:
            differs = False
            checkpoint.deferred.append(f"{checkpoint.label}: {head} equals {embeddings[0]}, as config.json states")
        if differs:
            raise WorkbenchError(
                f"{checkpoint.label}: {head} differs from {embeddings[0]}, although config.json ties them",
                "Set tie_word_embeddings to false in config.json if the model has its own head; if not, save the model again.",
            )
        del checkpoint.entries[head]


def is_tied(checkpoint: Checkpoint) -> bool:
    """Return whether head and embeddings share one tensor, by config.json or else by the architecture's default."""
    config = checkpoint.config
    if "tie_word_embeddings" in config and not any(field in config for field in TEXT_CONFIGS):
        return bool(config["tie_word_embeddings"])
    try:
        return ties_head(config)
    except WorkbenchError:  # transformers does not know the architecture, which can still be merged by tensor name
        return bool(config.get("tie_word_embeddings"))
