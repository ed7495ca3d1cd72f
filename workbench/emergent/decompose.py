"""Metrics of a decomposition into bricks: sparsity, coupling, and the cosine of bricks in function space.

All take plain numbers, so that neuron sets of a model and bricks of a recipe are judged on one scale. A damage matrix holds how much a
function loses when a brick is removed: rows are bricks, columns are functions, and brick i serves function i.

Source: the questions of Xiao et al. 2024, arXiv 2409.02877, section 5.3, which gives no formulas; the definitions are this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from workbench.emergent.losses import loss_batches
from workbench.lazy import no_grad, torch
from workbench.models.hooks import first_of, hooked, shaped
from workbench.models.layout import stack_prefix
from workbench.models.texts import side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Output: TypeAlias = Literal["hidden", "update"]
"""Hidden state after each layer, or what the layer adds to it: the outputs of its attention and its feed-forward part."""


def row_couplings(damage: Tensor) -> Tensor:
    """Return the mean off-diagonal damage of each row divided by its diagonal [..., bricks]; infinite if the diagonal is not positive.

    Args:
        damage: Damage matrices [..., bricks, functions]; square, at least 2 wide.
    """
    size = damage.shape[-1]
    if damage.shape[-2] != size or size < 2:
        raise ValueError(f"expected square damage matrices of at least 2 bricks, found {tuple(damage.shape[-2:])}")
    own = damage.diagonal(dim1=-2, dim2=-1)
    others = (damage.sum(-1) - own) / (size - 1)
    return torch.where(own > 0, others / own, torch.inf)


def coupling(damage: Tensor) -> Tensor:
    """Return the median over rows of mean off-diagonal damage / diagonal damage [...].

    It is 0 if removing a brick harms only its own function, and about 1 if it harms all functions alike. The mean of an even number of
    rows' two middle values counts. A ratio of means would depend on the row with the largest damage alone.

    Args:
        damage: Damage matrices [..., bricks, functions].
    """
    rows = row_couplings(damage).sort(-1).values
    size = rows.shape[-1]
    return (rows[..., (size - 1) // 2] + rows[..., size // 2]) / 2


def dominant_rows(damage: Tensor) -> Tensor:
    """Return, for each row, whether its diagonal exceeds every other entry of the row [..., bricks] bool.

    Columns are not compared: some functions are harmed by every brick, so that a column's largest entry says little about a brick.

    Args:
        damage: Damage matrices [..., bricks, functions].
    """
    own = damage.diagonal(dim1=-2, dim2=-1)
    diagonal = torch.eye(damage.shape[-1], dtype=torch.bool, device=damage.device)
    return own > damage.masked_fill(diagonal, -torch.inf).amax(-1)


def double_centered(matrix: Tensor) -> Tensor:
    """Return a matrix without the means of its rows and columns, so that neither strong bricks nor fragile functions stand out."""
    return matrix - matrix.mean(-1, keepdim=True) - matrix.mean(-2, keepdim=True) + matrix.mean((-2, -1), keepdim=True)


@dataclass(frozen=True)
class ScoreCurve:
    """Scores of nested sets of bricks, from few bricks to all.

    Attributes:
        shares: Share of the bricks in each set, ascending; the last is 1.
        scores: Score of each set; higher is better.
        floor: Score that is no quality at all: that of chance, or of no bricks.

    Raises:
        ValueError: If shares do not ascend to 1, or the score of all bricks does not exceed the floor.
    """

    shares: tuple[float, ...]
    scores: tuple[float, ...]
    floor: float = 0.0

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in pairwise(self.shares))
        if len(self.shares) != len(self.scores) or not self.shares or not ascending or self.shares[0] < 0 or self.shares[-1] != 1:
            raise ValueError(
                f"expected one score for each share, with shares ascending to 1; found {self.shares} and {self.scores}"
            )
        if self.scores[-1] <= self.floor:
            raise ValueError(f"all bricks score {self.scores[-1]:g}, which does not exceed the floor {self.floor:g}")

    @property
    def quality(self) -> tuple[float, ...]:
        """Share of the full score that each set keeps, above the floor."""
        full = self.scores[-1] - self.floor
        return tuple((score - self.floor) / full for score in self.scores)

    def least_share(self, kept: float = 0.9) -> float:
        """Return the sparsity of the decomposition: the least share of the bricks that keeps a share of the score.

        Every larger set must keep it too, so that one lucky small set does not count.

        Args:
            kept: Share of the score to keep.
        """
        least = 1.0
        for share, quality in zip(reversed(self.shares), reversed(self.quality), strict=True):
            if quality < kept:
                break
            least = share
        return least

    def area(self) -> float:
        """Return the area under quality against share, by trapezoids; below the smallest share, quality falls to 0 at no bricks."""
        shares, quality = list(self.shares), list(self.quality)
        if shares[0] > 0:
            shares, quality = [0.0, *shares], [0.0, *quality]
        points = list(zip(shares, quality, strict=True))
        return sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(points))

    def document(self, kept: float = 0.9) -> dict[str, Any]:
        """Return the curve, its sparsity and its area as plain data."""
        return {
            "shares": list(self.shares),
            "scores": list(self.scores),
            "floor": self.floor,
            "kept": kept,
            "least_share": self.least_share(kept),
            "area": self.area(),
        }


def sample_places(lengths: Sequence[int], size: int, *, seed: int = 0) -> Tensor:
    """Draw tokens of rows without replacement; the first token of a row only if it is the row's only one.

    Args:
        lengths: Number of tokens of each row.
        size: Number of tokens to draw; all tokens if there are fewer.
        seed: Seed of the draw.

    Returns:
        Row and position of each token [tokens, 2], in ascending order.
    """
    places = torch.tensor([(i, t) for i, length in enumerate(lengths) for t in range(min(1, length - 1), length)])
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:size]
    return places[order.sort().values]


@dataclass(frozen=True)
class LayerOutputs:
    """Outputs of the layers of a model on some tokens.

    Attributes:
        hidden: Hidden states after each layer, float32 [layers, tokens, width].
        update: What each layer adds to the hidden state [layers, tokens, width].
    """

    hidden: Tensor
    update: Tensor


@no_grad
def layer_outputs(model: PreTrainedModel, depth: int, rows: Sequence[Sequence[int]], places: Tensor) -> LayerOutputs:
    """Compute the outputs of every layer on some tokens. Models of bricks can be loaded one after the other for this.

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

    collected: list[tuple[Tensor, Tensor, Tensor]] = []
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
            collected.append((where, entering, leaving))
    order = torch.cat([where for where, _, _ in collected]).argsort()
    first = torch.cat([entering for _, entering, _ in collected], 1)[:, order]
    last = torch.cat([leaving for _, _, leaving in collected], 1)[:, order]
    return LayerOutputs(last, last - first)


def _hooks(number: int, keep: Callable[[str, int, Tensor], None]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hooks that keep the hidden states before and after a layer."""

    def before(_module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep("in", number, args[0] if args else named["hidden_states"])

    def after(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        keep("out", number, first_of(output))

    return before, after


@dataclass(frozen=True)
class FunctionCosines:
    """Cosines between the changes that bricks make to a model's outputs on the same tokens.

    Bricks that repeat each other have cosines near 1, bricks in conflict have negative ones.

    Attributes:
        names: The bricks.
        layers: Mean cosine over tokens in each layer [layers, bricks, bricks]; NaN where a brick changes no token.
        output: Outputs that were compared.
        tokens: Number of tokens.
    """

    names: tuple[str, ...]
    layers: Tensor
    output: Output
    tokens: int

    @property
    def mean(self) -> Tensor:
        """Mean over layers [bricks, bricks], without layers that a brick does not change."""
        return self.layers.nanmean(0)

    def document(self) -> dict[str, Any]:
        """Return the cosines as plain data; undefined ones are None."""
        return {
            "names": list(self.names),
            "output": self.output,
            "tokens": self.tokens,
            "mean": _plain(self.mean),
            "layers": _plain(self.layers),
        }


def function_cosines(base: LayerOutputs, bricks: Mapping[str, LayerOutputs], output: Output = "update") -> FunctionCosines:
    """Compare what bricks change in function space: mean cosine over tokens of the differences to the base's outputs.

    Args:
        base: Outputs of the base.
        bricks: Brick -> outputs of the base with this brick, on the same tokens.
        output: Outputs to compare.
    """
    before: Tensor = getattr(base, output)
    changes = torch.stack(
        [getattr(outputs, output) - before for outputs in bricks.values()], 1
    )  # [layers, bricks, tokens, width]
    norms = changes.norm(dim=-1)
    products = torch.einsum("latw,lbtw->labt", changes, changes)
    lengths = norms[:, :, None] * norms[:, None]
    cosines = torch.where(lengths > 0, products / lengths, torch.nan).nanmean(-1)
    return FunctionCosines(tuple(bricks), cosines, output, before.shape[1])


def _plain(values: Tensor) -> Any:
    """Return a tensor as nested lists, with None for NaN."""
    if values.dim():
        return [_plain(row) for row in values]
    number = float(values)
    return None if number != number else number
