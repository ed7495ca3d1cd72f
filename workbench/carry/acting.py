"""Low-rank updates that act beside the weights of a live model, with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from workbench.models.hooks import hooked
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@contextmanager
def acting(model: PreTrainedModel, updates: Mapping[str, Factors]) -> Iterator[None]:
    """Add updates to the outputs of linear layers inside the block: y + B A x.

    Args:
        model: The live model.
        updates: Module -> (B [outputs, rank], A [rank, inputs]) as `left` and `right`, on the model's device.
    """

    def after(update: Factors) -> Any:
        def add(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + ((args[0] @ update.right.T) @ update.left.T)

        return add

    with ExitStack() as stack:
        for name, update in updates.items():
            stack.enter_context(hooked(model.get_submodule(name), after=after(update)))
        yield
