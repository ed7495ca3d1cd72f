"""Forward passes for edits: inputs and outputs of a layer, added shifts, and logits at selected positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from workbench.edit.places.parts import Parts
from workbench.edit.places.rows import Padded
from workbench.errors import WorkbenchError
from workbench.lazy import no_grad, torch
from workbench.models.hooks import Stopped, head_sees, hooked, shaped, states_of

if TYPE_CHECKING:
    from torch import Tensor


@no_grad
def keys_and_values(parts: Parts, layer: int, batch: Padded) -> tuple[Tensor, Tensor]:
    """Return a projection's inputs and outputs at the lookup tokens; layers above it are not run.

    Args:
        parts: Parts of the model.
        layer: Layer of the output projection.
        batch: The rows.

    Returns:
        Inputs [row, d_in] and outputs [row, d_out].
    """
    rows = torch.arange(len(batch.lookup), device=batch.lookup.device)
    first, second = (states[rows, batch.lookup].float() for states in _projected(parts, layer, batch))
    return first, second


@no_grad
def keys_of_tokens(parts: Parts, layer: int, batch: Padded) -> Tensor:
    """Return a projection's inputs [token, d_in] at all tokens of a batch, row by row and without padding."""
    return _projected(parts, layer, batch)[0][batch.mask.bool()].float()


def _projected(parts: Parts, layer: int, batch: Padded) -> tuple[Tensor, Tensor]:
    """Return a projection's inputs [row, position, d_in] and outputs [row, position, d_out]; layers above it are not run."""
    recorded: list[Tensor] = []

    def record(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        recorded.extend(shaped(t, *batch.tokens.shape) for t in (args[0], output))
        raise Stopped

    with hooked(parts.out(layer), after=record):
        run(parts, batch)
    return recorded[0], recorded[1]


def run(parts: Parts, batch: Padded) -> Any:
    """Run a forward pass; return None if a hook ends it early."""
    inputs = batch.inputs() if batch.inputs else {"attention_mask": batch.mask, "use_cache": False}
    try:
        return parts.model(input_ids=batch.tokens, **inputs)
    except Stopped:
        return None


def logits_at(parts: Parts, places: Tensor) -> AbstractContextManager[None]:
    """Restrict the output head to some positions within the block: logits are [1, position, vocabulary].

    Raises:
        WorkbenchError: If the model has no output head.
    """
    head = parts.model.get_output_embeddings()
    if head is None:
        raise WorkbenchError(f"{type(parts.model).__name__} has no output head", "Edits need a causal language model.")
    return head_sees(head, places)


@contextmanager
def added(parts: Parts, layer: int, batch: Padded, shift: Tensor, rows: Tensor) -> Iterator[None]:
    """Add a shift to a projection's output at the lookup of each row, within the block.

    Args:
        parts: Parts of the model.
        layer: Layer of the output projection.
        batch: The rows.
        shift: [fact, d_out]; gradients flow into it.
        rows: [row], the index of the fact that a row belongs to.
    """
    positions = torch.arange(len(batch.lookup), device=batch.lookup.device) * batch.tokens.shape[1] + batch.lookup

    def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1])
        return flat.index_add(0, positions, shift[rows].to(output.dtype)).reshape(output.shape)

    with hooked(parts.out(layer), after=add):
        yield


def target_log_probabilities(logits: Tensor, batch: Padded, rows: int) -> tuple[Tensor, Tensor]:
    """Return each row's mean log-probability of its target tokens, and whether all of them are the most likely ones.

    Args:
        logits: [1, position, vocabulary], at `batch.places`.
        batch: The rows.
        rows: Number of rows.

    Returns:
        Two tensors [row].
    """
    scores = logits[0].float().log_softmax(-1)
    chosen = scores.gather(1, batch.targets[:, None])[:, 0]
    counts = torch.zeros(rows, device=chosen.device).index_add(0, batch.owner, torch.ones_like(chosen))
    mean = torch.zeros(rows, device=chosen.device).index_add(0, batch.owner, chosen) / counts
    right = (scores.argmax(-1) == batch.targets).float()
    top = torch.zeros(rows, device=chosen.device).index_add(0, batch.owner, right) == counts
    return mean, top


@no_grad
def score(parts: Parts, batch: Padded) -> tuple[Tensor, Tensor]:
    """Return `target_log_probabilities` of the model as it is."""
    with logits_at(parts, batch.places):
        return target_log_probabilities(run(parts, batch).logits, batch, len(batch.lookup))


def self_test(parts: Parts, layer: int, batch: Padded) -> float:
    """Check that a change of the output projection at one position reaches the block's output there, and no earlier position.

    The ratio is 1 in most families. Granite multiplies the output; if a norm follows the projection (Gemma 2 and 3, OLMo 2 and 3,
    GLM 4), the ratio is not constant. Values are optimized at the projection itself, so edits are correct in all cases.

    Args:
        parts: Parts of the model.
        layer: Layer of the output projection.
        batch: The rows.

    Returns:
        The mean ratio of the change at the block's output to the change of the projection's output.

    Raises:
        WorkbenchError: If the change does not arrive, or if earlier positions change.
    """
    rows = torch.arange(len(batch.lookup), device=batch.lookup.device)
    outputs: list[Tensor] = []

    def record(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(states_of(output, batch.tokens).float())
        raise Stopped

    with torch.no_grad(), hooked(parts.layers[layer], after=record):
        run(parts, batch)
        _, values = keys_and_values(parts, layer, batch)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(values.shape, generator=generator).to(values.device)
        shift = noise * (values.norm(dim=1, keepdim=True) + 1e-6) / noise.norm(dim=1, keepdim=True)
        with added(parts, layer, batch, shift, rows):
            run(parts, batch)
    change = outputs[-1] - outputs[0]
    arrived = change[rows, batch.lookup].norm(dim=1) / shift.norm(dim=1)
    before = max((float(change[i, : int(p)].abs().max()) for i, p in enumerate(batch.lookup) if p), default=0.0)
    if not bool((arrived > 1e-4).all()) or before > 1e-4 * float(shift.abs().max()):
        raise WorkbenchError(
            f"{parts.modules[layer]}: a change of its output has no effect on the block's output at the same position (ratio "
            f"{float(arrived.min()):.2g}), or changes earlier positions (by {before:.2g})",
            "Edits do not support this architecture. Please report it with its config.json.",
        )
    return float(arrived.mean())
