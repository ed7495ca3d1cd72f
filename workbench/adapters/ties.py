"""What an adapter does to tied embeddings: the same to both ends, or something that unties them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from workbench.adapters.entries import Stored
from workbench.adapters.keys import Keys
from workbench.names import HEADS
from workbench.weights.digests import entry_digest
from workbench.weights.specs import block_elements, buffer, matrix
from workbench.weights.tied import EMBEDDINGS, tied_embeddings

if TYPE_CHECKING:
    from workbench.layout import Model

_CPU = torch.device("cpu")


def unties(keys: Keys, base: Model) -> str | None:
    """How an adapter unties a tied base's head from its embeddings; None where both stay one tensor.

    PEFT's own forward decides: LoRA on one of the two, or a saved copy of one, changes that one alone; factors or copies of
    both (`ensure_weight_tying`) and trained tokens change both.
    """
    tied = tied_embeddings(base.weights.specs, base.config)
    if tied is None or updates_both_alike(keys):
        return None
    ends = {"head": HEADS, "embeddings": tuple(name.removesuffix(".weight") for name in EMBEDDINGS)}
    reached = []
    for end, leaves in ends.items():
        updated = any(p.module.rpartition(".")[2] in leaves and "trainable_tokens_delta" not in p.fields for p in keys.parts)
        weights = [
            (n, s)
            for n, s in keys.saved.items()
            if n.removesuffix(".weight").rpartition(".")[2] in leaves and n.endswith(".weight")
        ]
        if updated or any(not is_copy(keys, s, tied[0], base) for _, s in weights):
            reached.append(end)
    if not reached:
        return None
    return f"updates the {reached[0]} alone" if len(reached) == 1 else "updates head and embeddings in different ways"


def updates_both_alike(keys: Keys) -> bool:
    """Whether an adapter brings the same update for head and embeddings."""
    embeddings = tuple(name.removesuffix(".weight") for name in EMBEDDINGS)
    heads = {**_updates(keys, HEADS)}
    first = {**_updates(keys, embeddings)}
    if "factors" in heads and "factors" in first:
        (a, b), (left, right) = heads.pop("factors"), first.pop("factors")
        if a.shape != right.shape[::-1] or b.shape != left.shape[::-1]:
            return False
        alike = torch.equal(a.read(), right.read().T) and torch.equal(b.read(), left.read().T)
        return alike and _same_saved(heads, first)
    return bool(heads) and "factors" not in heads and "factors" not in first and bool(first) and _same_saved(heads, first)


def _updates(keys: Keys, leaves: tuple[str, ...]) -> dict[str, tuple[Stored, ...]]:
    """ "factors" -> the two factors, "saved" -> the whole weight, of the module with one of these names."""
    found: dict[str, tuple[Stored, ...]] = {}
    for part in keys.parts:
        if part.module.rpartition(".")[2] in leaves:
            for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
                if a in part.fields:
                    found["factors"] = (part.fields[a], part.fields[b])
    for name, stored in keys.saved.items():
        if name.endswith(".weight") and name.removesuffix(".weight").rpartition(".")[2] in leaves:
            found["saved"] = (stored,)
    return found


def _same_saved(heads: Mapping[str, tuple[Stored, ...]], first: Mapping[str, tuple[Stored, ...]]) -> bool:
    if "saved" not in heads and "saved" not in first:
        return True
    if "saved" not in heads or "saved" not in first:
        return False
    one, other = heads["saved"][0], first["saved"][0]
    return one.entry.spec == other.entry.spec and entry_digest(one.entry) == entry_digest(other.entry)


def is_copy(keys: Keys, stored: Stored, name: str, base: Model | None) -> bool:
    """Whether a whole tensor of an adapter is the base's own, as PEFT stores embeddings and heads beside their factors.

    Compared in the copy's dtype, so that a bf16 copy of a float32 base is one.
    """
    if base is None or base.weights.specs[name].shape != stored.shape:
        return False
    place = (stored.key, name)
    if place not in keys.copies:
        keys.copies[place] = _equal(stored, name, base)
    return keys.copies[place]


def _equal(stored: Stored, name: str, base: Model) -> bool:
    spec = base.weights.specs[name]
    source, scratch = base.weights.open(name, _CPU), buffer(spec, _CPU)
    for start, stop in spec.blocks(block_elements(_CPU)):
        block = matrix(scratch, start, stop, spec.cols)
        source.read(start, stop, block)
        if not torch.equal(block.to(stored.entry.spec.dtype).float(), stored.rows(start, stop)):
            return False
    return True
