"""Importance of the channels of the residual stream, and the scale that its norms lose with some channels, measured on texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from workbench.lazy import no_grad, torch
from workbench.models.hooks import hooked
from workbench.models.texts import TextRow, batch_limit, batches

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_Consumer: TypeAlias = "Callable[[str, Tensor, Tensor], None]"
"""Takes (norm, its input [tokens, channels], its output [tokens, channels])."""


def channel_strengths(
    model: PreTrainedModel, norms: Sequence[str], rows: Sequence[TextRow], progress: Callable[[int, int], None] = lambda *_: None
) -> Tensor:
    """Return the mean over tokens of |output of a norm|, summed over the norms, for every channel [channels], float64.

    The first token of a text does not count, because its activations are many times larger than others.

    Args:
        model: The live model.
        norms: Live names of the norms of the residual stream.
        rows: The texts as tokens.
        progress: Receives (texts done, texts).

    Source:
        Muralidharan et al. 2024, Minitron, arXiv 2407.14679, section 2.2 (embedding channels).
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def see(norm: str, _before: Tensor, after: Tensor) -> None:
        sums[norm] = sums.get(norm, 0) + after.abs().double().sum(0).cpu()
        tokens[norm] = tokens.get(norm, 0) + len(after)

    _visit(model, norms, rows, see, progress)
    return torch.stack([sums[norm] / tokens[norm] for norm in norms]).sum(0)


def scale_ratios(
    model: PreTrainedModel,
    norms: Mapping[str, bool],
    kept: Tensor,
    rows: Sequence[TextRow],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, float]:
    """Return the mean over tokens of the scale of the kept channels of a norm's input, relative to that of all channels.

    The scale of an RMS norm's input is its root mean square, and that of a LayerNorm's input is its standard deviation. If all other
    channels are zero (and the mean is zero), the ratio is sqrt(all channels / kept channels).

    Args:
        model: The live model.
        norms: Live name of each norm -> whether it subtracts the mean.
        kept: Numbers of the channels that remain [kept channels].
        rows: The texts as tokens.
        progress: Receives (texts done, texts).
    """
    sums, tokens = dict.fromkeys(norms, 0.0), dict.fromkeys(norms, 0)

    def see(norm: str, before: Tensor, _after: Tensor) -> None:
        every = before.double()
        scales = [(x - x.mean(-1, keepdim=True) if norms[norm] else x).square().mean(-1).sqrt() for x in (every[:, kept], every)]
        nonzero = scales[1] > 0
        sums[norm] += float((scales[0] / scales[1])[nonzero].sum())
        tokens[norm] += int(nonzero.sum())

    kept = kept.to(next(model.parameters()).device)
    _visit(model, list(norms), rows, see, progress)
    return {norm: sums[norm] / tokens[norm] if sums[norm] else 1.0 for norm in norms}


@no_grad
def _visit(
    model: PreTrainedModel, norms: Sequence[str], rows: Sequence[TextRow], see: _Consumer, progress: Callable[[int, int], None]
) -> None:
    """Pass the inputs and outputs of norms on texts to a consumer; only tokens behind the first one of a text count."""
    device, done = next(model.parameters()).device, 0
    for batch in batches(rows, device, batch_limit(device)):
        place, length = batch.mask.cumsum(1), batch.mask.sum(1, keepdim=True)
        counted = (batch.mask.bool() & (place > length.sub(1).clamp_max(1))).flatten()

        def after(norm: str, counted: Tensor, _module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            see(norm, *(x.reshape(-1, x.shape[-1])[counted] for x in (args[0], output)))

        with ExitStack() as stack:
            for norm in norms:
                stack.enter_context(hooked(model.get_submodule(norm), after=partial(after, norm, counted)))
            model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        done += len(batch.tokens)
        progress(done, len(rows))
