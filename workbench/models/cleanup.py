"""What a checkpoint on the hub stores that is no weight of its own: buffers, a second copy of tied embeddings, packed numbers."""

from __future__ import annotations

import re
from typing import Any

from workbench.errors import WorkbenchError
from workbench.models.architecture import is_embedding, is_head
from workbench.models.skeleton import is_native, ties_head
from workbench.weights.checkpoint import Checkpoint, HeadersOnlyError
from workbench.weights.configuration import TEXT_CONFIGS
from workbench.weights.digests import entry_digest
from workbench.weights.foreign import dequantise
from workbench.weights.specs import TensorSpec

# What old files hold and transformers makes itself: causal masks and their filling of GPT-2, GPT-Neo, GPT-J, GPT-NeoX and CodeGen,
# rotary frequencies of every layer, position numbers.
_BUFFERS = re.compile(
    r"(^|\.)((cross)?attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)(rotary_emb|rotary|rotary_pos_emb)\.inv_freq$|(^|\.)position_ids$"
)
_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|SCB|codebooks)$|\.weight\.(absmax|quant_map|quant_state)"
    r"|_proj_(blocks|scales)$"
)


def tidy(checkpoint: Checkpoint) -> None:
    """Keep a checkpoint's weights and nothing else; `checkpoint.left_out` names what was left out.

    Errors: an architecture of custom code, packed weights without a word in config.json, tied embeddings whose stored copy differs.
    """
    checkpoint.config = native(checkpoint.config, f"{checkpoint.label}: {checkpoint.path / 'config.json'}")
    for name, entry in list(checkpoint.entries.items()):
        if _PACKED.search(name):
            raise WorkbenchError(
                f"{checkpoint.label}: {name} is part of a quantised weight; expected floating point",
                dequantise(None, checkpoint.path),
            )
        if is_buffer(name, entry.spec):
            del checkpoint.entries[name]
            checkpoint.left_out.append(name)
    drop_tied_copy(checkpoint)


def native(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A config.json without the custom code that it names: models that transformers has of its own by now still name the code that
    they came with, which is neither executed nor needed.

    Errors: an architecture that transformers has only through that code.
    """
    if "auto_map" in config and not is_native(config):
        raise WorkbenchError(
            f"{where} asks for custom code (auto_map), which is never executed",
            f"transformers has no model_type {config.get('model_type')} of its own: use a revision of the model that it supports natively.",
        )
    return {key: value for key, value in config.items() if key != "auto_map"}


def is_buffer(name: str, spec: TensorSpec) -> bool:
    """Whether a stored tensor is a buffer that transformers makes itself. A bias of a layer of that name has one dimension."""
    if not _BUFFERS.search(name):
        return False
    if name.endswith((".bias", ".causal_mask")):
        return len(spec.shape) == 4 and spec.shape[-1] == spec.shape[-2]
    return spec.numel == 1 if name.endswith(".masked_bias") else True


def drop_tied_copy(checkpoint: Checkpoint) -> None:
    """Forget a stored copy of tied embeddings: one tensor, read and written once.

    Errors: the copy differs from the embeddings, so that what the config ties is not tied in the file.
    """
    for head in [n for n in checkpoint.entries if is_head(n)]:
        shape = checkpoint.entries[head].spec.shape
        alike = [n for n, e in checkpoint.entries.items() if n != head and e.spec.shape == shape and is_embedding(n)]
        if not alike or not is_tied(checkpoint):
            continue
        try:
            differs = entry_digest(checkpoint.entries[alike[0]]) != entry_digest(checkpoint.entries[head])
        except HeadersOnlyError:
            differs = False
            checkpoint.deferred.append(f"{checkpoint.label}: {head} equals {alike[0]}, as config.json says")
        if differs:
            raise WorkbenchError(
                f"{checkpoint.label}: {head} differs from {alike[0]}, which config.json says it equals",
                "Set tie_word_embeddings to false there if the head is its own, else save the model again.",
            )
        del checkpoint.entries[head]


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether head and embeddings are one tensor: as config.json says, else as the architecture has it."""
    config = checkpoint.config
    if "tie_word_embeddings" in config and not any(field in config for field in TEXT_CONFIGS):
        return bool(config["tie_word_embeddings"])
    try:
        return ties_head(config)
    except WorkbenchError:  # an architecture that transformers does not know merges by tensor name, as it is
        return bool(config.get("tie_word_embeddings"))
