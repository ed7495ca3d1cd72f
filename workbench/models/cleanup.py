"""Removal of stored tensors that are not weights: buffers and second copies of tied embeddings. Packed weights are refused."""

from __future__ import annotations

import re
from typing import Any

from workbench.errors import WorkbenchError
from workbench.models.architecture import is_embedding, is_head
from workbench.models.skeleton import is_native, ties_head
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.configuration import TEXT_CONFIGS
from workbench.weights.digests import entry_digest
from workbench.weights.foreign import dequantise
from workbench.weights.header import Entry, HeadersOnlyError
from workbench.weights.specs import TensorSpec

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
        if _PACKED.search(name):
            raise WorkbenchError(
                f"{checkpoint.label}: {name} is part of a quantized weight; expected floating point",
                dequantise(None, checkpoint.path),
            )
        if _is_code(name, entry):
            raise WorkbenchError(
                f"{checkpoint.label}: {name} holds {entry.spec.dtype_name} numbers, which are codes of a quantized weight; expected floating point",
                dequantise(None, checkpoint.path),
            )
        if is_buffer(name, entry.spec):
            del checkpoint.entries[name]
            checkpoint.left_out.append(name)
    drop_tied_copy(checkpoint)


def native(config: dict[str, Any], label: str) -> dict[str, Any]:
    """Return config.json without the custom code that it names.

    Models that transformers now supports natively may still name their original code, which is not needed and never run.

    Args:
        config: The content of config.json.
        label: The file's name in messages.

    Raises:
        WorkbenchError: If transformers does not support the architecture natively.
    """
    if "auto_map" in config and not is_native(config):
        raise WorkbenchError(
            f"{label} requires custom code (auto_map), which is never executed",
            f"transformers does not support model_type {config.get('model_type')} natively: use a revision of the model for a type that it supports.",
        )
    return {key: value for key, value in config.items() if key != "auto_map"}


def _is_code(name: str, entry: Entry) -> bool:
    """Return whether a stored tensor has the form of a quantized weight: integers under the name of a weight, or a matrix of bytes."""
    if entry.spec.kind != "integer" or entry.packing or is_buffer(name, entry.spec):
        return False
    return name.endswith(".weight") or (entry.spec.itemsize == 1 and len(entry.spec.shape) > 1)


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
