"""Importance of the blocks of a live model and of the inputs of its output matrices, measured on texts.

The influence of a block is how far it turns the hidden state: 1 minus the mean cosine between its input and its output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from workbench.activations.labelled import ItemRow
from workbench.activations.losses import LOGITS, loss_batches, losses
from workbench.activations.sites import Progress, Site, Tokens, stream
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import first_of, hooked, states_of, with_first
from workbench.models.layout import stack_prefix
from workbench.models.texts import TextRow, batch_limit, batches, side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@no_grad
def block_influence(
    model: PreTrainedModel, depth: int, rows: Sequence[TextRow], device: torch.device, progress: Progress = lambda *_: None
) -> Tensor:
    """Return the influence of every block [blocks], float64: 1 - mean over tokens of cos(input, output).

    Args:
        model: The live model.
        depth: Number of its blocks.
        rows: The texts as tokens.
        device: Device of the model.
        progress: Receives (texts done, texts).

    Raises:
        WorkbenchError: If a block does not return one hidden state per token.

    Source:
        Men et al. 2024, ShortGPT, arXiv 2403.03853, equation 1.
    """
    blocks = _blocks(model, depth)
    sums, tokens, done = torch.zeros(depth, dtype=torch.float64), 0, 0
    for batch in batches(rows, device, batch_limit(device)):
        counted = batch.mask.bool()
        with _recorded(blocks) as seen:
            model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        for number, (before, output) in seen.items():
            after = states_of(output, batch.tokens)
            pairs = before[counted].double(), after[counted].double()
            sums[number] += torch.nn.functional.cosine_similarity(*pairs, dim=-1, eps=1e-30).sum().cpu()
        tokens, done = tokens + int(counted.sum()), done + len(batch.tokens)
        progress(done, len(rows))
    return 1 - sums / tokens


@dataclass(frozen=True)
class LossesWithout:
    """Losses of a model without some of its blocks.

    Attributes:
        loss: Mean loss per learned token without the blocks that are left out already, in nats.
        without: Block -> the mean loss if it is left out too, for each of the other blocks.
    """

    loss: float
    without: dict[int, float]


@no_grad
def losses_without(
    model: PreTrainedModel, depth: int, rows: Sequence[TextRow], gone: Collection[int], progress: Progress = lambda *_: None
) -> LossesWithout:
    """Return the loss of a model without each of its blocks. A block that is left out passes its input on.

    Blocks below the one that is left out are computed once for each batch of texts.

    Args:
        model: The live model.
        depth: Number of its blocks.
        rows: The texts as tokens.
        gone: Blocks that are left out already.
        progress: Receives (batches done, batches).

    Raises:
        WorkbenchError: If a block returns more than a hidden state, so that it cannot be left out.
    """
    blocks = _blocks(model, depth)
    items = [ItemRow(row.tokens, len(row.tokens) - row.learned) for row in rows]
    others = [number for number in range(depth) if number not in gone]
    device = next(model.parameters()).device
    examples = _example_outputs(model, blocks, items[0], device)
    most = max(1, LOGITS // int(model.config.get_text_config().vocab_size))
    groups = list(loss_batches([len(row.tokens) for row in rows], [row.learned for row in rows], most, batch_limit(device)))
    total, learned, without = 0.0, sum(row.learned for row in rows), dict.fromkeys(others, 0.0)
    passing = {number: _pass_input(examples[number]) for number in range(depth)}
    for done, group in enumerate(groups):
        part = [items[i] for i in group]
        with _replaced(blocks, {number: passing[number] for number in gone}), _recorded(blocks) as seen:
            total += float(losses(model, part, scored="response").sums.sum())
        states = {number: before for number, (before, _) in seen.items()}
        for number in others:
            below = {n: passing[n] for n in (*range(number), *gone)}
            with _replaced(blocks, {**below, number: _return_state(examples[number], states[number])}):
                without[number] += float(losses(model, part, scored="response").sums.sum())
        progress(done + 1, len(groups))
    return LossesWithout(total / learned, {number: value / learned for number, value in without.items()})


MOMENTS = 2**30
"""Bytes of second moments that a pass over the texts sums up, unless those of one site take more."""


def input_statistics(model: PreTrainedModel, sites: Sequence[Site], rows: Sequence[TextRow]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each site the strengths of the inputs of its output matrix and their second moments, both over tokens.

    The first token of a text does not count: it attracts attention and has activations that are many times larger than others. As many
    passes over the texts are made as `MOMENTS` asks for.

    Args:
        model: The live model.
        sites: The output matrices.
        rows: The texts as tokens.

    Yields:
        E |aᵢ| ‖W_out[:, i]‖ of every input i [units], float64 on the CPU, and E a aᵀ [units, units], float32 on the model's device.
    """
    read, device, start = [ItemRow(row.tokens, len(row.tokens)) for row in rows], next(model.parameters()).device, 0
    while start < len(sites):
        stop = start + max(1, MOMENTS // (4 * sites[start].units ** 2))
        part, tokens = sites[start:stop], 0
        sums = [torch.zeros(site.units, dtype=torch.float64) for site in part]
        products = [torch.zeros(site.units, site.units, device=device) for site in part]

        def consume(number: int, values: Tensor, batch: Tokens, sums: Any = sums, products: Any = products) -> None:
            nonlocal tokens
            seen = values[batch.counted].float()
            sums[number] += seen.abs().double().sum(0).cpu()
            products[number].addmm_(seen.T, seen)
            tokens += len(seen) if number == 0 else 0

        stream(model, part, read, consume, "whole")
        for site, total, product in zip(part, sums, products, strict=True):
            yield total / tokens * site.norms().double().cpu(), product.div_(tokens)
        start = stop


def _blocks(model: PreTrainedModel, depth: int) -> torch.nn.ModuleList:
    blocks = model.get_submodule(stack_prefix(model, depth))
    assert isinstance(blocks, torch.nn.ModuleList)
    return blocks


def _hidden_state(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """Return the hidden state among the arguments of a block."""
    hidden: Tensor = args[0] if args else next(iter(named.values()))
    return hidden


@contextmanager
def _recorded(blocks: torch.nn.ModuleList) -> Iterator[dict[int, tuple[Tensor, Any]]]:
    """Record block -> (input, output) of the latest forward pass within the block."""
    seen: dict[int, tuple[Tensor, Any]] = {}
    inputs: dict[int, Tensor] = {}

    def before(number: int, _module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs[number] = _hidden_state(args, named).clone()  # some blocks add to it in place

    def after(number: int, _module: Any, _args: Any, output: Any) -> None:
        seen[number] = inputs.pop(number), output

    with ExitStack() as handles:
        for number, block in enumerate(blocks):
            handles.enter_context(block.register_forward_pre_hook(partial(before, number), with_kwargs=True))
            handles.enter_context(block.register_forward_hook(partial(after, number)))
        yield seen


@contextmanager
def _replaced(blocks: torch.nn.ModuleList, forwards: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward functions of some blocks within the block."""
    own: dict[int, Any] = {number: vars(blocks[number]).get("forward") for number in forwards}
    try:
        for number, forward in forwards.items():
            vars(blocks[number])["forward"] = forward
        yield
    finally:
        for number, before in own.items():
            if before is None:
                del vars(blocks[number])["forward"]
            else:
                vars(blocks[number])["forward"] = before


def _pass_input(like: Any) -> Callable[..., Any]:
    """Return a forward function that passes its input on."""
    return lambda *args, **named: with_first(like, _hidden_state(args, named))


def _return_state(like: Any, hidden: Tensor) -> Callable[..., Any]:
    """Return a forward function that returns a state whatever it is given."""
    return lambda *_args, **_named: with_first(like, hidden)


def _example_outputs(model: PreTrainedModel, blocks: torch.nn.ModuleList, item: ItemRow, device: torch.device) -> list[Any]:
    """Return an output of every block, which shows the form that its output has."""
    batch = side_by_side([item.tokens[:2]], device)
    with _recorded(blocks) as seen:
        model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    for number, (_, output) in seen.items():
        rest = output[1:] if isinstance(output, (tuple, list)) else ()
        if first_of(output).shape[:-1] != batch.tokens.shape or any(isinstance(part, torch.Tensor) for part in rest):
            raise WorkbenchError(
                f"block {number} of {type(model).__name__} returns more than one hidden state per token, and cannot be left out",
                "Choose layers by influence, or name them.",
            )
    return [seen[number][1] for number in range(len(blocks))]


_Consumer: TypeAlias = "Callable[[str, Tensor, Tensor], None]"
"""Takes (norm, its input [tokens, channels], its output [tokens, channels])."""


def channel_strengths(
    model: PreTrainedModel, norms: Sequence[str], rows: Sequence[TextRow], progress: Progress = lambda *_: None
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
    model: PreTrainedModel, norms: Mapping[str, bool], kept: Tensor, rows: Sequence[TextRow], progress: Progress = lambda *_: None
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
def _visit(model: PreTrainedModel, norms: Sequence[str], rows: Sequence[TextRow], see: _Consumer, progress: Progress) -> None:
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
