"""Detection of norms and of what they compute, by running the modules: class names are no reliable guide."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.ground.lazy import no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor, nn


_ROWS = 4
_TOLERANCE = 1e-3
# Inputs are large enough that an epsilon (below 1) does not affect a norm's output, and small enough that tanh is not saturated.
_LARGE = 30.0
_BUILDING = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class Norm:
    """A norm that divides by the root mean square of its input: y = x / sqrt(mean(x²) + eps) * (offset + weight) + bias.

    A LayerNorm does the same with x - mean(x) in place of x.

    Attributes:
        offset: Number added to the stored weight: 0, or 1 if the weight is stored as the difference from 1.
        eps: Epsilon of the module.
        has_weight: Whether the norm has a weight; without one, growth cannot rescale its output.
        has_bias: Whether the norm adds a bias.
        centered: Whether the norm subtracts the mean.
    """

    offset: int
    eps: float
    has_weight: bool
    has_bias: bool
    centered: bool = False


def is_norm(module: nn.Module) -> bool:
    """Return whether a module looks like a norm: no submodules, only vectors as parameters, and an output without scale.

    The module is run on random numbers and on a multiple of them: a norm gives nearly the same output for both.
    """
    if any(True for _ in module.children()) or any(p.dim() != 1 for p in module.parameters()):
        return False
    size = _channels(module)
    if size is None:
        return False
    x = _LARGE * torch.randn(_ROWS, size, generator=torch.Generator().manual_seed(0))
    small, large = _output_of(module, x), _output_of(module, 50 * x)
    if small is None or large is None or small.shape != x.shape:
        return False
    varies = float((small - small.mean(0)).abs().max()) > _TOLERANCE
    return varies and bool(torch.allclose(small, large, rtol=1e-2, atol=1e-2))


def rms_norm(module: nn.Module) -> Norm | None:
    """Return what a norm computes, or None if it is no RMS norm."""
    return _computed(module, centered=False)


def layer_norm(module: nn.Module) -> Norm | None:
    """Return what a norm computes, or None if it is no LayerNorm."""
    return _computed(module, centered=True)


def _computed(module: nn.Module, centered: bool) -> Norm | None:
    """Return what a norm computes, or None if it is no norm of the kind."""
    size = _channels(module)
    if size is None:
        return None
    x = _LARGE * (torch.randn(_ROWS, size, generator=torch.Generator().manual_seed(1)) + 0.5)  # the mean is not 0
    y = _output_of(module, x)
    if y is None or y.shape != x.shape:
        return None
    parameters = dict(module.named_parameters())
    weight, bias = (_values(name, size) if name in parameters else None for name in ("weight", "bias"))
    if set(parameters) - {"weight", "bias"}:
        return None
    y = y - bias if bias is not None else y
    x = x - x.mean(-1, keepdim=True) if centered else x
    for offset in (0, 1) if weight is not None else (0,):
        gain = offset + weight if weight is not None else torch.ones(size)
        expected = x * x.square().mean(-1, keepdim=True).rsqrt() * gain
        if torch.allclose(y, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return Norm(offset, _epsilon(module, gain, bias), weight is not None, bias is not None, centered)
    return None


def _epsilon(module: nn.Module, gain: Tensor, bias: Tensor | None) -> float:
    """Return the epsilon, from an input so small that it matters: y = x g / sqrt(m + eps) gives eps = (x g / y)² − m."""
    x = 1e-4 * (1 - 2 * (torch.arange(len(gain)) % 2)).float()[None]  # the mean is 0, up to one element
    y = _output_of(module, x)
    assert y is not None, "the module has just been run"
    y = y - bias if bias is not None else y
    return float(((x * gain / y).double().square() - x.double().square().mean()).median())


def _channels(module: nn.Module) -> int | None:
    """Return the number of channels of a norm, or None if it is unknown."""
    for parameter in module.parameters():
        return int(parameter.numel())
    for key in ("hidden_size", "normalized_shape", "dim", "size"):
        value = getattr(module, key, None)
        value = value[-1] if isinstance(value, (tuple, list)) and value else value
        if isinstance(value, int) and value > 0:
            return value
    return 32 if type(module) is not torch.nn.Identity else None  # without weights and sizes: any number of channels will do


def _values(name: str, size: int) -> Tensor:
    """Return values for a weight or a bias that differ from the usual initial values 0 and 1."""
    return torch.linspace(0.3, 0.9, size) if name == "weight" else torch.linspace(-0.2, 0.4, size)


@no_grad
def _output_of(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return the output of a copy of the module on x, with known weights, or None if it does not accept such an input."""
    try:
        probe = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        for name, parameter in probe.named_parameters():
            parameter.copy_(_values(name.rpartition(".")[2], parameter.numel()))
        output = probe(x)
    except _BUILDING:
        return None
    return output.float() if isinstance(output, torch.Tensor) and output.is_floating_point() else None
