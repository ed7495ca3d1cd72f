"""Metrics of a decomposition into bricks: how few of them keep the quality, and the cosine of bricks in function space.

All take plain numbers, so that neuron sets of a model and bricks of a recipe are judged on one scale.

Source: the questions of Xiao et al. 2024, arXiv 2409.02877, section 5.3, which gives no formulas; the definitions are this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from workbench.activations.losses import loss_batches
from workbench.lazy import no_grad, torch
from workbench.models.hooks import first_of, hooked, shaped
from workbench.models.layout import stack_prefix
from workbench.models.texts import side_by_side
from workbench.results import Measured, Number, Part, absent

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class QualityCurve(Part):
    """Quality of nested sets of bricks, from few bricks to all."""

    shares: list[Number]
    """Share of the bricks in each set."""
    scores: list[Number]
    """Its score: the negative loss in nats per token."""
    floor: Number
    """Score without any brick."""
    quality: list[Number]
    """Share of the full score above the floor that each set keeps."""
    kept: Number
    """Share of the score that defines `least_share`."""
    least_share: Number
    """Least share of the bricks that keeps this share of the score; all larger sets keep it too."""
    area: Number
    """Area under quality against share."""
    order: list[str] | None = absent()
    """Bricks of a recipe in the order in which they are added."""


def quality_curve(
    shares: Sequence[float], scores: Sequence[float], floor: float, kept: float = 0.9, order: Sequence[str] | None = None
) -> QualityCurve | None:
    """Return a curve with its sparsity and area; None if the full score does not exceed the floor.

    Args:
        shares: Share of the bricks in each set, ascending; the last is 1.
        scores: Score of each set; higher is better.
        floor: Score that is no quality at all: that of no bricks.
        kept: Share of the score to keep, which defines the sparsity.
        order: Bricks in the order in which they are added.

    Raises:
        ValueError: If shares do not ascend to 1.
    """
    ascending = all(a < b for a, b in pairwise(shares))
    if len(shares) != len(scores) or not shares or not ascending or shares[0] < 0 or shares[-1] != 1:
        raise ValueError(f"expected one score for each share, with shares ascending to 1; found {shares} and {scores}")
    if scores[-1] <= floor:
        return None
    quality = [(score - floor) / (scores[-1] - floor) for score in scores]
    least = 1.0  # every larger set must keep the score too, so that one lucky small set does not count
    for share, own in zip(reversed(shares), reversed(quality), strict=True):
        if own < kept:
            break
        least = share
    points = list(zip(shares, quality, strict=True))
    if shares[0] > 0:  # below the smallest share, quality falls to 0 at no bricks
        points = [(0.0, 0.0), *points]
    return QualityCurve(
        shares=list(shares),
        scores=list(scores),
        floor=floor,
        quality=quality,
        kept=kept,
        least_share=least,
        area=sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(points)),
        order=None if order is None else list(order),
    )


@no_grad
def layer_updates(model: PreTrainedModel, depth: int, rows: Sequence[Sequence[int]], places: Tensor) -> Tensor:
    """Return what every layer adds to the hidden state of some tokens, float32 [layers, tokens, width].

    Models of bricks can be loaded one after the other for this.

    Args:
        model: The live model.
        depth: Number of its layers.
        rows: Tokens of the texts.
        places: Row and position of each token [tokens, 2]; see `sample_places`.
    """
    device = next(model.parameters()).device
    layers = model.get_submodule(stack_prefix(model, depth))
    assert isinstance(layers, torch.nn.ModuleList)
    backbone = getattr(model, model.base_model_prefix, model)
    size, at = (0, 0), (places[:0, 0], places[:0, 1])  # shape of the current batch, and its tokens
    states: dict[tuple[str, int], Tensor] = {}

    def keep(side: str, number: int, hidden: Tensor) -> None:
        states[side, number] = shaped(hidden, *size)[at].float().cpu()

    collected: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            before, after = _hooks(number, keep)
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.enter_context(hooked(layer, after=after))
        counts = places[:, 0].bincount(minlength=len(rows)).tolist()
        for index in loss_batches([len(row) for row in rows], counts, len(places)):
            batch = side_by_side([rows[i] for i in index], device)
            row_of = {i: b for b, i in enumerate(index)}
            where = torch.tensor([n for n, i in enumerate(places[:, 0].tolist()) if i in row_of])
            size = (len(index), batch.tokens.shape[1])
            at = torch.tensor([row_of[i] for i in places[where, 0].tolist()]), places[where, 1]
            backbone(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
            entering, leaving = (torch.stack([states[side, n] for n in range(depth)]) for side in ("in", "out"))
            collected.append((where, leaving - entering))
    order = torch.cat([where for where, _ in collected]).argsort()
    return torch.cat([update for _, update in collected], 1)[:, order]


def _hooks(number: int, keep: Callable[[str, int, Tensor], None]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hooks that keep the hidden states before and after a layer."""

    def before(_module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep("in", number, args[0] if args else named["hidden_states"])

    def after(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        keep("out", number, first_of(output))

    return before, after


class FunctionSpace(Part):
    """Cosines of the changes that bricks make to a model's outputs on the same tokens: near 1 they repeat each other, below 0 they conflict."""

    names: list[str]
    """The bricks."""
    tokens: int
    """Number of tokens."""
    mean: list[list[Measured]]
    """Mean over layers; null if a brick changes nothing."""
    layers: list[list[list[Measured]]]
    """Layer -> cosines."""


def function_cosines(base: Tensor, bricks: Mapping[str, Tensor]) -> FunctionSpace:
    """Compare what bricks change in function space: mean cosine over tokens of the differences to the base's updates.

    Args:
        base: Updates of the base's layers; see `layer_updates`.
        bricks: Brick -> updates of the base with this brick, on the same tokens.
    """
    changes = torch.stack([updates - base for updates in bricks.values()], 1)  # [layers, bricks, tokens, width]
    norms = changes.norm(dim=-1)
    products = torch.einsum("latw,lbtw->labt", changes, changes)
    lengths = norms[:, :, None] * norms[:, None]
    cosines = torch.where(lengths > 0, products / lengths, torch.nan).nanmean(-1)
    return FunctionSpace(names=list(bricks), tokens=base.shape[1], mean=cosines.nanmean(0).tolist(), layers=cosines.tolist())
