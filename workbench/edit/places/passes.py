"""Forward passes that an edit needs: what a layer reads and gives, the top of the model alone, logits at a few places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.edit.places.parts import Parts, Stopped, first_of, hooked, shaped
from workbench.edit.places.rows import Padded
from workbench.errors import WorkbenchError
from workbench.models.attention import head_sees


@torch.no_grad()
def keys_and_values(parts: Parts, layer: int, batch: Padded) -> tuple[Tensor, Tensor]:
    """What the output projection of a layer reads [row, d_in] and gives [row, d_out] at the lookup; layers above are not run."""
    rows = torch.arange(len(batch.lookup), device=batch.lookup.device)
    found: list[Tensor] = []

    def see(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        size = batch.tokens.shape
        found.extend(shaped(t, *size)[rows, batch.lookup].float() for t in (args[0], output))
        raise Stopped

    with hooked(parts.out(layer), after=see):
        run(parts, batch)
    return found[0], found[1]


def run(parts: Parts, batch: Padded) -> Any:
    """A forward pass; None where a hook has ended it."""
    inputs = batch.inputs() if batch.inputs else {"attention_mask": batch.mask, "use_cache": False}
    try:
        return parts.model(input_ids=batch.tokens, **inputs)
    except Stopped:
        return None


def logits_at(parts: Parts, places: Tensor) -> AbstractContextManager[None]:
    """The head sees a few places alone: logits are [1, place, vocabulary]. Errors: a model without a head."""
    head = parts.model.get_output_embeddings()
    if head is None:
        raise WorkbenchError(f"{type(parts.model).__name__} has no output head", "Edits need a causal language model.")
    return head_sees(head, places)


@contextmanager
def added(parts: Parts, layer: int, batch: Padded, shift: Tensor, rows: Tensor) -> Iterator[None]:
    """The output projection of a layer gives `shift` more at the lookup of each row.

    Args:
        shift: [fact, d_out]; gradients flow into it.
        rows: [row], the fact that a row belongs to.
    """
    at = torch.arange(len(batch.lookup), device=batch.lookup.device) * batch.tokens.shape[1] + batch.lookup

    def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1])
        return flat.index_add(0, at, shift[rows].to(output.dtype)).reshape(output.shape)

    with hooked(parts.out(layer), after=add):
        yield


def target_log_probabilities(logits: Tensor, batch: Padded, rows: int) -> tuple[Tensor, Tensor]:
    """Mean log-probability of the target's tokens [row], and whether all of them are on top [row].

    Args:
        logits: [1, place, vocabulary], at `batch.places`.
        rows: Number of rows.
    """
    scores = logits[0].float().log_softmax(-1)
    chosen = scores.gather(1, batch.wanted[:, None])[:, 0]
    counts = torch.zeros(rows, device=chosen.device).index_add(0, batch.owner, torch.ones_like(chosen))
    mean = torch.zeros(rows, device=chosen.device).index_add(0, batch.owner, chosen) / counts
    right = (scores.argmax(-1) == batch.wanted).float()
    top = torch.zeros(rows, device=chosen.device).index_add(0, batch.owner, right) == counts
    return mean, top


@torch.no_grad()
def score(parts: Parts, batch: Padded) -> tuple[Tensor, Tensor]:
    """As `target_log_probabilities`, of the model as it is."""
    with logits_at(parts, batch.places):
        return target_log_probabilities(run(parts, batch).logits, batch, len(batch.lookup))


def self_test(parts: Parts, layer: int, batch: Padded) -> float:
    """Prove on this model that what is added to the output projection at one place arrives in the block's output there and nowhere
    before it; returns the mean ratio of what arrives to what was added.

    1 in most families; Granite multiplies it; with a norm behind the projection (Gemma 2 and 3, OLMo 2 and 3, GLM 4) it is no
    constant. Values are optimised at the projection itself, so that edits are right in each case.

    Errors: nothing arrives, or something arrives before.
    """
    rows = torch.arange(len(batch.lookup), device=batch.lookup.device)
    seen: list[Tensor] = []

    def see(_module: Any, _args: Any, output: Any) -> None:
        seen.append(first_of(output).float())
        raise Stopped

    with torch.no_grad(), hooked(parts.layers[layer], after=see):
        run(parts, batch)
        _, values = keys_and_values(parts, layer, batch)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(values.shape, generator=generator).to(values.device)
        shift = noise * (values.norm(dim=1, keepdim=True) + 1e-6) / noise.norm(dim=1, keepdim=True)
        with added(parts, layer, batch, shift, rows):
            run(parts, batch)
    change = seen[-1] - seen[0]
    arrived = change[rows, batch.lookup].norm(dim=1) / shift.norm(dim=1)
    before = max((float(change[i, : int(p)].abs().max()) for i, p in enumerate(batch.lookup) if p), default=0.0)
    if not bool((arrived > 1e-4).all()) or before > 1e-4 * float(shift.abs().max()):
        raise WorkbenchError(
            f"{parts.modules[layer]}: a change of its output does not arrive in the block's output where it was made (ratio {float(arrived.min()):.2g}, "
            f"earlier positions {before:.2g})",
            "This architecture is not what edits expect: please report it with its config.json.",
        )
    return float(arrived.mean())
