"""Cosines of what bricks add to the outputs of a model's linear layers, on the bricks' own texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

from workbench.lazy import torch
from workbench.merge.measuring.layers import LayerStack
from workbench.merge.streaming.deltas import Deltas
from workbench.models.architecture import is_conv1d
from workbench.models.texts import Text, batches, encode, longest_row, spread
from workbench.steps import MergeContext
from workbench.weights.specs import load

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXTS = 16
"""Number of texts of each brick, evenly spaced over its file."""
LONGEST = 512
"""Largest number of tokens of a text."""


def output_cosines(
    tools: MergeContext, deltas: Mapping[str, Deltas], texts: Mapping[str, Sequence[Text]]
) -> dict[tuple[str, str], float]:
    """Measure how alike the bricks' updates of the base's linear layers are.

    For a layer whose updates by two bricks are Δ and Δ′, and the inputs x that it has in the base on the texts of both bricks, the
    cosine is Σ (Δx)·(Δ′x) / √(Σ ‖Δx‖² · Σ ‖Δ′x‖²). Weights that meet no input of these texts do not count, unlike in the cosine of the
    deltas.

    Args:
        tools: Source of the base, which is held one decoder layer at a time.
        deltas: Brick -> its deltas.
        texts: Brick -> its own texts.

    Returns:
        Pair of bricks, in the given order -> mean cosine over the linear layers of the decoder that both update. Pairs without such a
        layer are left out, and so are bricks without texts.
    """
    names = [name for name in deltas if name in texts]
    longest = longest_row(tools.base.config, LONGEST)
    data = {name: list(batches(encode(spread(texts[name], TEXTS), tools.tokenizer, longest), tools.device)) for name in names}
    stack = LayerStack.of(tools, "")
    # All batches enter together, because the stack records the calls of one round of forward passes.
    rows = [(name, batch) for name in names for batch in data[name]]
    cosines: dict[tuple[str, str], list[float]] = {}
    with torch.no_grad():
        hidden, calls = stack.enter([batch for _, batch in rows])
        for layer in range(len(stack.layers)):
            tools.progress(layer, len(stack.layers), f"outputs of layer {layer}")
            readers = {
                name: module for name, module in stack.readers(layer).items() if sum(d.touches(name) for d in deltas.values()) > 1
            }
            updates = {name: _updates(tools, deltas, name, module) for name, module in readers.items()}
            sums: dict[str, dict[str, Tensor]] = {name: {} for name in readers}
            with stack.loaded(layer), _Inputs(readers) as inputs:
                for i, (brick, batch) in enumerate(rows):
                    hidden[i] = stack.run(layer, hidden[i], calls[i][layer])
                    for name, x in inputs.taken(batch.mask).items():
                        added = torch.stack([update(x) for update in updates[name].values()])
                        found = torch.einsum("itn,jtn->ij", added, added)
                        sums[name][brick] = sums[name].get(brick, 0) + found
            for name, by_brick in sums.items():
                for pair, value in _cosines(list(updates[name]), by_brick).items():
                    cosines.setdefault(pair, []).append(value)
    tools.progress(len(stack.layers), len(stack.layers), "outputs")
    return {pair: sum(values) / len(values) for pair, values in cosines.items()}


def _updates(
    tools: MergeContext, deltas: Mapping[str, Deltas], name: str, module: nn.Module
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return brick -> function from inputs [token, in] to what the brick adds to the outputs [token, out], for bricks that touch a tensor."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for brick, source in deltas.items():
        if not source.touches(name):
            continue
        factors = source.factors(name, tools.device)
        if factors is not None:
            matrices = [factors.right.float().T, factors.left.float().T]
            if is_conv1d(module):
                matrices = [factors.left.float(), factors.right.float()]
        else:
            base = load(tools.base.weights, name, dtype=torch.float32, device=tools.device)
            delta = torch.empty_like(base)
            source.open_delta(name, tools.device).read_delta(0, len(base), base, delta)
            matrices = [delta if is_conv1d(module) else delta.T]
        found[brick] = partial(_through, matrices)
    return found


def _through(matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return the product of an input with matrices, one after the other."""
    for matrix in matrices:
        x = x @ matrix
    return x


class _Inputs:
    """Hooks that keep the inputs of linear layers until they are taken.

    Args:
        readers: Tensor name -> linear layer.
    """

    def __init__(self, readers: Mapping[str, nn.Module]) -> None:
        self._readers = readers
        self._kept: dict[str, Tensor] = {}

    def __enter__(self) -> _Inputs:
        self._hooks = [module.register_forward_pre_hook(self._keep(name)) for name, module in self._readers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self._kept[name] = args[0]

        return keep

    def taken(self, mask: Tensor) -> dict[str, Tensor]:
        """Return tensor name -> inputs [token, in] since the last call, without padding; inputs of routed experts are left out."""
        rows = {name: x.reshape(-1, x.shape[-1]).float() for name, x in self._kept.items()}
        self._kept = {}
        return {name: x[mask.flatten().bool()] for name, x in rows.items() if len(x) == mask.numel()}


def _cosines(bricks: Sequence[str], sums: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """Return pair -> cosine of one layer, from brick -> inner products [brick, brick] of all bricks' outputs on its texts."""
    found = {}
    for (i, one), (j, two) in combinations(enumerate(bricks), 2):
        if one in sums and two in sums:
            both = sums[one] + sums[two]
            square = float(both[i, i]) * float(both[j, j])
            if square > 0:
                found[one, two] = float(both[i, j]) / math.sqrt(square)
    return found
