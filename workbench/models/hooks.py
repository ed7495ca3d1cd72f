"""Forward hooks of live models, the shapes of what they see, and passes without gradients of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Stopped(Exception):  # noqa: N818  not an error: the rest of the forward pass is skipped
    """Exception that a hook raises to end a forward pass early."""


@contextmanager
def hooked(
    module: torch.nn.Module, *, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Register a forward pre-hook, a forward hook, or both, within the block."""
    handles = []
    if before is not None:
        handles.append(module.register_forward_pre_hook(before))
    if after is not None:
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Compute no gradients of parameters inside the block."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def shaped(flat: Tensor, batch: int, time: int) -> Tensor:
    """Reshape the input or output of a linear layer to [batch, time, width]; OPT flattens the first two dimensions."""
    return flat.reshape(batch, time, flat.shape[-1])


def first_of(output: Any) -> Tensor:
    """Return the hidden state from a block's output, which is a tuple or a list in some architectures."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def states_of(output: Any, tokens: Tensor) -> Tensor:
    """Return the hidden states [row, token, width] from a block's output.

    Args:
        output: The block's output.
        tokens: Tokens [row, token] of the batch.

    Raises:
        WorkbenchError: If the block does not return one state for each token: some architectures carry several states of a token from
            block to block, and some add tokens of their own.
    """
    hidden = first_of(output)
    if hidden.shape[:-1] != tokens.shape:
        raise WorkbenchError(
            f"a block returns states of shape {list(hidden.shape)} for tokens of shape {list(tokens.shape)}; expected one state for each token",
            "This architecture can be merged, but not edited, routed or analyzed by its hidden states.",
        )
    return hidden


def with_first(output: Any, hidden: Tensor) -> Any:
    """Return a block's output with another hidden state."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
