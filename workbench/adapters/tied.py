"""Effect of an adapter on tied embeddings: the same update of embeddings and head, or updates that untie them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from workbench.adapters.entries import Stored
from workbench.adapters.keys import Keys
from workbench.lazy import torch
from workbench.models.architecture import is_embedding_module, is_head_module
from workbench.models.tied import tied_embeddings
from workbench.weights.digests import entry_digest
from workbench.weights.specs import block_elements, buffer, matrix

if TYPE_CHECKING:
    from workbench.models.layout import Model


def unties(keys: Keys, base: Model) -> str | None:
    """Describe how an adapter unties a tied base's head from its embeddings; return None if they stay one tensor.

    The result follows PEFT's forward pass. LoRA on one of the two, or a saved copy of one, changes that one only. Factors or
    copies of both (`ensure_weight_tying`) and trained tokens change both.
    """
    tied = tied_embeddings(base.weights.specs, base.config)
    if tied is None or updates_both_alike(keys):
        return None
    rows = _updates(keys, is_head_module).get("tokens")
    changed = []
    for end, is_end in (("head", is_head_module), ("embeddings", is_embedding_module)):
        updates = _updates(keys, is_end)
        saved = updates.pop("saved", ())
        tokens = updates.pop("tokens", None)
        if updates or (tokens and rows) or any(not is_copy(keys, s, tied[0], base) for s in saved):
            changed.append(end)
    if not changed:
        return None
    return f"updates only the {changed[0]}" if len(changed) == 1 else "updates head and embeddings in different ways"


def updates_both_alike(keys: Keys) -> bool:
    """Return whether an adapter changes a tied head and the embeddings in the same way.

    This holds for no update at all, transposed factors, equal copies, equal rows, and rows of the embeddings only, which PEFT
    shares with a tied head.
    """
    heads, first = _updates(keys, is_head_module), _updates(keys, is_embedding_module)
    rows, first_rows = heads.pop("tokens", None), first.pop("tokens", None)
    if rows and not (first_rows and _same_tensor(rows[0], first_rows[0])):
        return False
    if set(heads) != set(first) or "other" in heads:
        return False
    if "saved" in heads and not _same_tensor(heads["saved"][0], first["saved"][0]):
        return False
    if "factors" not in heads:
        return True
    (a, b), (left, right) = heads["factors"], first["factors"]
    if a.shape != right.shape[::-1] or b.shape != left.shape[::-1]:
        return False
    return torch.equal(a.read(), right.read().T) and torch.equal(b.read(), left.read().T)


def _updates(keys: Keys, is_end: Callable[[str], bool]) -> dict[str, tuple[Stored, ...]]:
    """Return the updates of modules with one of these names: "factors", "saved" (a whole weight), "tokens" (rows) or "other"."""
    updates: dict[str, tuple[Stored, ...]] = {}
    for part in keys.parts:
        if is_end(part.module):
            is_lora = set(part.fields) in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
            kind = "tokens" if "trainable_tokens_delta" in part.fields else "factors" if is_lora else "other"
            updates[kind] = tuple(part.fields[name] for name in sorted(part.fields))
    for name, stored in keys.saved.items():
        if name.endswith(".weight") and is_end(name.removesuffix(".weight")):
            updates["saved"] = (stored,)
    return updates


def _same_tensor(first: Stored, second: Stored) -> bool:
    """Return whether two stored tensors are equal."""
    return first.entry.spec == second.entry.spec and entry_digest(first.entry) == entry_digest(second.entry)


def is_copy(keys: Keys, stored: Stored, name: str, base: Model | None) -> bool:
    """Return whether a whole tensor of an adapter equals the base's; PEFT stores such copies of embeddings and heads.

    The comparison uses the adapter's dtype, so a bfloat16 copy of a float32 base counts as equal.
    """
    if base is None or base.weights.specs[name].shape != stored.shape:
        return False
    place = (stored.key, name)
    if place not in keys.copies:
        keys.copies[place] = _equals_base(stored, name, base)
    return keys.copies[place]


def _equals_base(stored: Stored, name: str, base: Model) -> bool:
    """Return whether a stored tensor equals the base's, cast to its dtype."""
    spec, cpu = base.weights.specs[name], torch.device("cpu")
    source, scratch = base.weights.open(name, cpu), buffer(spec, cpu)
    for start, stop in spec.blocks(block_elements(cpu)):
        block = matrix(scratch, start, stop, spec.cols)
        source.read(start, stop, block)
        if not torch.equal(block.to(stored.entry.spec.dtype).float(), stored.rows(start, stop)):
            return False
    return True
