"""The mixing kernel: a weighted sum of the low-rank updates of several bricks, from concatenated factors.

Brick i updates a module by B_i A_i, with A_i [rank_i, in] and B_i [out, rank_i]. With weights w_i,

    delta(x) = sum_i w_i B_i A_i x = B_cat (w * (A_cat x)),   A_cat = [A_1; A_2; ...],   B_cat = [B_1, B_2, ...],

where w repeats each weight over the ranks of its brick. The intermediate result has one number for each token and rank, so ranks may
differ, and a brick without an update of the module has rank 0. A stack of the bricks' outputs, as in PEFT's Arrow, has `out` numbers
for each token and brick instead.

Only bricks with a weight other than zero are computed, and only rows that have such a brick.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.architecture import counterpart, is_conv1d, nearest_name

if TYPE_CHECKING:
    from torch import Tensor, nn


Pair = tuple["Tensor", "Tensor"]
"""Factors of one brick's update of one module: A [rank, in] and B [out, rank], with the scaling in either of them."""


@dataclass(frozen=True)
class Mix:
    """Weights of the bricks in one forward pass.

    Attributes:
        weights: float32; [bricks] for all rows, [rows, bricks], or [rows, tokens, bricks], of the rows in `rows`.
        active: Bricks with a weight other than zero, in order.
        count: Number of rows of the batch; None if the weights hold for any batch.
        rows: Indices of the rows with such a weight; None for all rows.
        joined: Factors and weights by module, gathered when the module is first used.
    """

    weights: Tensor
    active: tuple[int, ...]
    count: int | None = None
    rows: Tensor | None = None
    joined: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, weights: Tensor) -> Mix | None:
        """Return the mix with some weights; None if all weights are zero, so that the base acts alone.

        Args:
            weights: [bricks], [rows, bricks] or [rows, tokens, bricks].
        """
        weights = weights.detach().float()
        if not 1 <= weights.dim() <= 3 or not bool(weights.isfinite().all()):
            raise WorkbenchError(
                f"weights of bricks: expected finite numbers [bricks], [rows, bricks] or [rows, tokens, bricks], "
                f"found {list(weights.shape)} with {int((~weights.isfinite()).sum())} NaN or infinite numbers",
                "The router's scores overflowed, or the weights were made by hand.",
            )
        used = weights != 0
        active = tuple(used.reshape(-1, used.shape[-1]).any(0).nonzero()[:, 0].tolist())
        if not active:
            return None
        if weights.dim() == 1:
            return cls(weights, active)
        acts = used.reshape(len(used), -1).any(1)
        if bool(acts.all()):
            return cls(weights, active, len(weights))
        rows = acts.nonzero()[:, 0]
        return cls(weights[rows], active, len(weights), rows)


class StackedFactors:
    """The factors of all bricks for one module, concatenated over ranks.

    Args:
        pairs: For each brick, its factors, or None if it does not update the module. At least one brick does.

    Attributes:
        ranks: Rank of each brick's update.
    """

    def __init__(self, pairs: Sequence[Pair | None]) -> None:
        self.ranks = [0 if pair is None else pair[0].shape[0] for pair in pairs]
        self._starts = [0, *accumulate(self.ranks)]
        present = [pair for pair in pairs if pair is not None]
        self._a = torch.cat([a.float() for a, _ in present]).contiguous()  # [ranks, in]
        self._b = torch.cat([b.float().T for _, b in present]).contiguous()  # [ranks, out]

    def add(self, output: Tensor, inputs: Tensor, mix: Mix) -> Tensor:
        """Return a module's output plus the weighted updates of the bricks, in the output's dtype.

        Args:
            output: [..., out], with the rows of `mix` first; some models flatten rows and tokens into one dimension.
            inputs: [..., in], with the same leading dimensions.
            mix: The weights.
        """
        if inputs.device != self._a.device:
            self._a, self._b = self._a.to(inputs.device), self._b.to(inputs.device)
        a, b, scale = self._chosen(mix)
        if not len(a):
            return output
        count = mix.count or 1
        x, y = (part.reshape(count, -1, part.shape[-1]) for part in (inputs, output))
        if mix.rows is None:
            return _sum(y, _product(x, a, b, scale)).view_as(output)
        rows = mix.rows.to(inputs.device)
        total = y.clone()
        total[rows] = _sum(y[rows], _product(x[rows], a, b, scale))
        return total.view_as(output)

    def _chosen(self, mix: Mix) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return A [ranks, in], B [ranks, out] and the weights of the ranks of the active bricks.

        Weights have the shape [1, ranks], [rows, 1, ranks] or [rows, tokens, ranks]; None stands for 1 everywhere.
        """
        known = mix.joined.get(id(self))
        if known is not None and known[0].device == self._a.device:
            return known
        active = [brick for brick in mix.active if self.ranks[brick]]
        spans = _spans([(self._starts[brick], self._starts[brick + 1]) for brick in active])
        a, b = (
            part[slice(*spans[0])] if len(spans) == 1 else torch.cat([part[start:stop] for start, stop in spans] or [part[:0]])
            for part in (self._a, self._b)
        )
        columns = torch.tensor([brick for brick in active for _ in range(self.ranks[brick])], dtype=torch.long)
        scale: Tensor | None = mix.weights.to(self._a.device)[..., columns.to(self._a.device)]
        assert scale is not None
        scale = scale[:, None] if scale.dim() == 2 else scale
        mix.joined[id(self)] = (a, b, None if bool((scale == 1).all()) else scale)
        return mix.joined[id(self)]


def _spans(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that follow each other."""
    spans: list[tuple[int, int]] = []
    for start, stop in ranges:
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
    return spans


def _product(x: Tensor, a: Tensor, b: Tensor, scale: Tensor | None) -> Tensor:
    """Return the update [rows, tokens, out] in float32."""
    hidden = torch.nn.functional.linear(x.float(), a)
    return (hidden if scale is None else hidden * scale) @ b


def _sum(output: Tensor, update: Tensor) -> Tensor:
    """Add a float32 update to an output, rounding once."""
    return (output + update).to(output.dtype)


class Mixer:
    """Low-rank updates of bricks on a live model. No brick acts outside `acting`, and the model is then the base bit for bit.

    Args:
        model: The live model.
        factors: Brick -> live module -> factors (A [rank, in], B [out, rank]), in the order of the columns of weights.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, Mapping[str, Pair]]) -> None:
        self.names = tuple(factors)
        modules = dict(model.named_modules())
        placed = {brick: _placed(brick, parts, modules) for brick, parts in factors.items()}
        self.stacks: dict[str, StackedFactors] = {}
        self._acting = threading.local()
        self._handles = []
        for name in dict.fromkeys(name for parts in placed.values() for name in parts):
            device = next(modules[name].parameters()).device
            pairs = (parts.get(name) for parts in placed.values())
            stack = StackedFactors([None if pair is None else (pair[0].to(device), pair[1].to(device)) for pair in pairs])
            self.stacks[name] = stack
            self._handles.append(modules[name].register_forward_hook(self._hook(name, stack)))

    @contextmanager
    def acting(self, mix: Mix | None, tokens: int = 0) -> Iterator[None]:
        """Let bricks act in the forward passes of this thread within the block.

        Args:
            mix: Weights of the bricks; None: the base alone.
            tokens: Tokens of each row, for modules that see rows and tokens as one dimension.
        """
        before = getattr(self._acting, "state", None)
        self._acting.state = None if mix is None else (mix, tokens)
        try:
            yield
        finally:
            self._acting.state = before

    def detach(self) -> None:
        """Remove the bricks from the model."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, stack: StackedFactors) -> Any:
        """Return a forward hook that adds the updates to the module's output."""

        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            state = getattr(self._acting, "state", None)
            if state is None:
                return None
            mix, tokens = state
            x = inputs[0]
            if mix.count is not None and not _has_rows(x, mix, tokens):
                raise WorkbenchError(
                    f"{name}: expected the inputs of {mix.count} rows of {tokens} tokens, found {list(x.shape)}; rows of one batch that "
                    "use different bricks cannot be told apart in this module",
                    "Forward the rows of each brick in a batch of their own: `with model.routing.fixed(BRICK)`.",
                )
            return stack.add(output, x, mix)

        return add


def check_places(model: nn.Module, factors: Mapping[str, Mapping[str, Pair]]) -> None:
    """Check that bricks fit a model, whose weights may be missing."""
    modules = dict(model.named_modules())
    for brick, parts in factors.items():
        _placed(brick, parts, modules)


def _has_rows(inputs: Tensor, mix: Mix, tokens: int) -> bool:
    """Return whether a module's inputs hold the rows of the batch in order, with the tokens of token weights."""
    width = mix.weights.shape[1] if mix.weights.dim() == 3 else None
    if inputs.dim() == 2:  # OPT flattens rows and tokens; an expert of a mixture sees some of the tokens only
        return inputs.shape[0] == (mix.count or 1) * tokens and width in (None, tokens)
    return inputs.shape[0] == mix.count and width in (None, inputs.shape[1])


def _placed(brick: str, parts: Mapping[str, Pair], modules: Mapping[str, nn.Module]) -> dict[str, Pair]:
    """Return a brick's factors under the names of the model's modules."""
    placed: dict[str, Pair] = {}
    for name, (a, b) in parts.items():
        place = counterpart(name, modules)
        if place is None:
            raise WorkbenchError(
                f"brick '{brick}': the model has no module {name}.{nearest_name(name, modules)}",
                "The brick was trained on another architecture, or a step before the route step changes the layers.",
            )
        module = modules[place]
        if not (isinstance(module, torch.nn.Linear) or is_conv1d(module)):
            raise WorkbenchError(
                f"brick '{brick}': {place} is a {type(module).__name__}, expected a linear layer",
                "Train the brick without this module, or use it in a merge step.",
            )
        weight: Any = module.weight
        shape = tuple(weight.shape[::-1]) if is_conv1d(module) else tuple(weight.shape)
        if (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
            raise WorkbenchError(
                f"brick '{brick}': {place} is [{shape[0]}, {shape[1]}] in the model, the brick's update is {list(b.shape)} x {list(a.shape)}",
                "The brick was trained on another base, or a step before the route step changes the layers.",
            )
        placed[place] = (a, b)
    return placed
