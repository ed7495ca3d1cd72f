"""Access to mergekit through its public API. Only this module imports mergekit, and only when a recipe uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.errors import WorkbenchError
from workbench.files import json_digest

if TYPE_CHECKING:
    from torch import Tensor

INSTALL = "pip install 'mergekit>=0.1.5,<0.2'"


class Parameter(NamedTuple):
    """A parameter of a method, as mergekit's specification states it."""

    name: str
    kind: str
    """"float", "int" or "bool"."""
    per_brick: bool
    required: bool
    default: Any
    validate: Callable[[Any], Any]


@cache
def method(name: str) -> Any:
    """Return mergekit's method object.

    Raises:
        WorkbenchError: If mergekit is missing, has an unsupported version or cannot be imported, or has no such method.
    """
    try:
        installed = version("mergekit")
    except PackageNotFoundError:
        raise WorkbenchError(f"mergekit/{name} needs mergekit, which is not installed", INSTALL) from None
    if not installed.startswith("0.1.") or _numbers(installed) < (0, 1, 5):
        raise WorkbenchError(f"mergekit/{name} needs mergekit >=0.1.5,<0.2; found {installed}", INSTALL)
    try:
        from mergekit import merge_methods
    except ImportError as error:
        raise WorkbenchError(f"mergekit/{name}: mergekit {installed} cannot be imported ({error})", INSTALL) from error
    try:
        return merge_methods.get(name)
    except RuntimeError:
        raise WorkbenchError(f"mergekit {installed} has no method {name}", INSTALL) from None


@cache
def parameters(name: str) -> dict[str, Parameter]:
    """Return a method's parameters by name, from mergekit's specification."""
    by_name = {}
    for spec in method(name).spec.parameters:
        text = str(spec.value_type)
        kind = next(k for k in ("bool", "int", "float") if k in text)
        default = None if spec.required else spec.default
        by_name[spec.name] = Parameter(spec.name, kind, spec.scope.value != "shared", spec.required, default, spec.validate)
    return by_name


def base_policy(name: str) -> str:
    """Return whether the base is "required", "optional" or "ignored" as an input of a method."""
    return str(method(name).spec.contract.base.value)


@cache
def merge_tensors() -> Callable[..., Tensor]:
    """Return mergekit's function that merges the tensors of several models."""
    from mergekit.merge_methods.api import merge_tensors

    return merge_tensors  # type: ignore[no-any-return]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def version_number() -> int:
    """Return the version number for cache keys: the bridge's version and mergekit's, so that a new mergekit computes again."""
    try:
        numbers = (*_numbers(version("mergekit")), 0, 0, 0)[:3]
    except PackageNotFoundError:
        numbers = (0, 0, 0)
    return 1_000_000 + numbers[0] * 10_000 + numbers[1] * 100 + numbers[2]


def seed_of(seed: int, tensor: str, keys: Sequence[str]) -> int:
    """Return a 60-bit seed for a tensor's random numbers, from the recipe's seed, the tensor's name and the bricks' keys."""
    return int(json_digest([seed, tensor, list(keys)])[:15], 16)
