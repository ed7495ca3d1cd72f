"""mergekit through its public API: specifications of its methods, and the call. The only module that imports mergekit, on use only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.files import json_digest

INSTALL = "pip install 'mergekit>=0.1.5,<0.2'"


class Parameter(NamedTuple):
    """A parameter as mergekit's own specification states it."""

    name: str
    kind: str
    """float, int or bool."""
    per_brick: bool
    required: bool
    default: Any
    validate: Callable[[Any], Any]


@cache
def method(name: str) -> Any:
    """mergekit's method object. Errors: not installed, another version, unknown there."""
    try:
        found = version("mergekit")
    except PackageNotFoundError:
        raise WorkbenchError(f"mergekit/{name} needs mergekit, which is not installed", INSTALL) from None
    if not found.startswith("0.1.") or _numbers(found) < (0, 1, 5):
        raise WorkbenchError(f"mergekit/{name} needs mergekit 0.1.5 or a later 0.1, found {found}", INSTALL)
    try:
        from mergekit import merge_methods
    except ImportError as error:
        raise WorkbenchError(f"mergekit/{name}: mergekit {found} cannot be imported ({error})", INSTALL) from error
    try:
        return merge_methods.get(name)
    except RuntimeError:
        raise WorkbenchError(f"mergekit {found} has no method {name}", INSTALL) from None


@cache
def parameters(name: str) -> dict[str, Parameter]:
    """A method's parameters, from mergekit's specification."""
    found = {}
    for spec in method(name).spec.parameters:
        text = str(spec.value_type)
        kind = next(k for k in ("bool", "int", "float") if k in text)
        default = None if spec.required else spec.default
        found[spec.name] = Parameter(spec.name, kind, spec.scope.value != "shared", spec.required, default, spec.validate)
    return found


def base_policy(name: str) -> str:
    """required, optional or ignored."""
    return str(method(name).spec.contract.base.value)


def brick_counts(name: str) -> tuple[int, int | None]:
    """Smallest and largest number of bricks, the base not counted."""
    contract = method(name).spec.contract
    base = 1 if contract.base.value == "required" else 0
    least = max(contract.min_inputs - base, contract.min_non_base or 0, 1)
    most = [
        n for n in (None if contract.max_inputs is None else contract.max_inputs - base, contract.max_non_base) if n is not None
    ]
    return least, min(most) if most else None


@cache
def merge_tensors() -> Callable[..., Tensor]:
    from mergekit.merge_methods.api import merge_tensors

    return merge_tensors  # type: ignore[no-any-return]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def version_number() -> int:
    """Part of every cache key: the bridge's own version, then mergekit's, so that another mergekit computes again."""
    try:
        numbers = (*_numbers(version("mergekit")), 0, 0, 0)[:3]
    except PackageNotFoundError:
        numbers = (0, 0, 0)
    return 1_000_000 + numbers[0] * 10_000 + numbers[1] * 100 + numbers[2]


def seed_of(seed: int, tensor: str, keys: Sequence[str]) -> int:
    """Seed of a tensor's random numbers: 60 bits of the digest of the recipe's seed, the tensor's name and the bricks' keys."""
    return int(json_digest([seed, tensor, list(keys)])[:15], 16)
