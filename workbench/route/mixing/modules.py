"""Bricks on the modules of a live model: each module adds the updates of the bricks that act in the current forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.models.architecture import counterpart, is_conv1d, nearest_name
from workbench.route.mixing.kernel import Mix, Pair, StackedFactors

if TYPE_CHECKING:
    from torch import Tensor, nn


class Mixer:
    """Low-rank updates of bricks on a live model. No brick acts outside `acting`, and the model is then the base bit for bit.

    Args:
        model: The live model.
        factors: Brick -> live module -> factors (A [rank, in], B [out, rank]), in the order of the columns of weights.

    Raises:
        WorkbenchError: If the model lacks a module, or a module has another shape or is no linear layer.
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
            stack = StackedFactors([_on(parts.get(name), device) for parts in placed.values()])
            self.stacks[name] = stack
            self._handles.append(modules[name].register_forward_hook(self._hook(name, stack)))

    @property
    def nbytes(self) -> int:
        """Memory of all factors in bytes."""
        return sum(stack.nbytes for stack in self.stacks.values())

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
    """Check that bricks fit a model, whose weights may be missing.

    Args:
        model: The model.
        factors: Brick -> live module -> factors.

    Raises:
        WorkbenchError: If the model lacks a module, or a module has another shape or is no linear layer.
    """
    modules = dict(model.named_modules())
    for brick, parts in factors.items():
        _placed(brick, parts, modules)


def _on(pair: Pair | None, device: torch.device) -> Pair | None:
    """Return factors on a device."""
    return None if pair is None else (pair[0].to(device), pair[1].to(device))


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
