"""Step classes for mergekit's methods, `merge: mergekit/NAME`. mergekit is imported only when a recipe uses one (`api.py`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Discriminator, Field, StrictBool, Tag, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.merge.measuring.matrices import rows_of
from workbench.merge.mergekit.table import (
    KNOWN,
    Known,
    Parameter,
    base_policy,
    merge_tensors,
    parameters,
    seed_of,
    version_number,
)
from workbench.steps import Block, Group, MergeMethod, register
from workbench.steps.fields import BrickEntry, Bricks, Number, constants, value_at

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "mergekit/"
_LOCK = threading.Lock()
"""Held during random methods, because mergekit draws from torch's global generator."""

Setting = Annotated[
    Annotated[StrictBool, Tag("flag")] | Annotated[Number, Tag("schedule")],
    Discriminator(lambda value: "flag" if isinstance(value, bool) else "schedule"),
]
"""The value of a mergekit parameter: true or false, a number, or a schedule."""


class Problem(NamedTuple):
    """An error in a step's fields, and its place in the step."""

    path: tuple[str, ...]
    text: str
    known: tuple[str, ...] = ()


class BridgeEntry(BrickEntry):
    """A brick's parameters in a mergekit step: those that mergekit accepts per model."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Setting]

    weight: Number | None = None  # type: ignore[assignment]
    """The brick's weight, if the method has one; if omitted, the weight under `parameters`."""

    def given(self) -> dict[str, object]:
        """Return the parameters that the recipe sets for this brick."""
        return {**({} if self.weight is None else {"weight": self.weight}), **(self.__pydantic_extra__ or {})}


def _container(value: Any) -> str:
    return "list" if isinstance(value, (list, tuple)) else "mapping"


class Bridge(MergeMethod):
    """Merge by mergekit's own code. mergekit gets whole tensors in float32; its result minus the base is the delta.

    Random methods run on the CPU. torch's generator is seeded from the recipe's seed, the tensor's name and the bricks' content,
    and restored afterwards, so results depend neither on threads nor on the order of tensors or bricks.
    """

    page = "mergekit"
    method: ClassVar[str]
    known: ClassVar[Known]

    bricks: (
        Annotated[
            Annotated[tuple[str, ...], Tag("list")] | Annotated[Bricks[BridgeEntry], Tag("mapping")], Discriminator(_container)
        ]
        | None
    ) = None
    """Mapping of brick name to weight, or to the brick's parameters under mergekit's names. A list of names is enough if no
    parameters are needed; if omitted, all bricks."""
    parameters: dict[str, Setting] = {}
    """Parameters for all bricks, under mergekit's names. Numbers may be schedules."""
    with_base: bool | None = Field(None, strict=True)
    """For `nuslerp` and `multislerp` only: merge the bricks' deltas from the base (true, the default) or their weights
    (false)."""

    def entry(self, brick: str) -> BridgeEntry:
        """Return the parameters that the recipe sets for a brick."""
        entry = super().entry(brick)
        assert isinstance(entry, BridgeEntry)
        return entry

    @model_validator(mode="after")
    def _check(self) -> Bridge:
        problems = list(self._problems())
        if problems:
            details = [
                InitErrorDetails(
                    type=PydanticCustomError("extra_forbidden", "unknown", {"known": list(p.known)})
                    if p.known
                    else PydanticCustomError("value_error", "{text}", {"text": p.text}),
                    loc=p.path,
                    input=self.parameters,
                )
                for p in problems
            ]
            raise ValidationError.from_exception_data(type(self).__name__, details)
        return self

    def _problems(self) -> Iterator[Problem]:
        """Yield every error of the step's parameters against mergekit's specification and their valid ranges."""
        try:
            specs = parameters(self.method)
        except WorkbenchError as error:
            yield Problem(("merge",), f"{error.message}: {error.hint}")
            return
        if self.with_base is not None and base_policy(self.method) != "optional":
            yield Problem(("with_base",), f"`with_base` does not apply to {self.name}, whose base is {base_policy(self.method)}")
        yield from _checked(self.known, specs, ("parameters",), self.parameters, per_brick=False)
        entries = {brick: self.entry(brick) for brick in self.bricks or ()}
        for brick, entry in entries.items():
            yield from _checked(self.known, specs, ("bricks", brick), entry.given(), per_brick=True)
        for parameter in specs.values():
            if parameter.required and parameter.default is None and parameter.name not in self.parameters:
                yield Problem(("parameters",), f"{self.name} requires {parameter.name}: parameters: {{{parameter.name}: 0.5}}")
        yield from self._della(entries)

    def _della(self, entries: dict[str, BridgeEntry]) -> Iterator[Problem]:
        """Check that density ± epsilon are probabilities, for plain numbers; schedules are checked at each tensor."""
        if "della" not in self.method:
            return
        for path, values in [((), {}), *((("bricks", b), e.given()) for b, e in entries.items())]:
            density, epsilon = (values.get(n, self.parameters.get(n, d)) for n, d in (("density", 1.0), ("epsilon", 0.15)))
            if isinstance(density, float) and isinstance(epsilon, float) and (text := _no_probability(density, epsilon)):
                yield Problem(path or ("parameters",), text)

    def moves_base(self) -> bool:
        """Return whether the step rescales the base: the base is not an input, and the bricks' weights may not sum to one.

        mergekit also scales tensors that an adapter does not change.
        """
        if self._takes_base:
            return False
        if self.method == "passthrough":
            return "scale" in self.parameters or any("scale" in self.entry(brick).given() for brick in self.bricks or ())
        flag = {"linear": "normalize", "multislerp": "normalize_weights"}.get(self.method)
        return flag is not None and self.parameters.get(flag) is False

    @property
    def _takes_base(self) -> bool:
        policy = base_policy(self.method)
        return policy == "required" or (policy == "optional" and self.with_base is not False)

    def prepare(self, group: Group) -> Callable[[Block], Tensor]:
        """Merge the whole tensor at once, and return its rows block by block."""
        return rows_of(self._delta(group))

    @no_grad
    def _delta(self, group: Group) -> Tensor:
        block = group.whole()
        if not block.base.numel():
            return block.base
        takes_base = self._takes_base
        if takes_base and not any(bool(delta.any()) for delta in block.deltas):
            return torch.zeros_like(block.base)  # no brick changes the tensor: multislerp would have no direction
        shape = self._shape(group.spec.shape)
        tensors = [delta.add_(block.base).view(shape) for delta in block.deltas]
        if takes_base:
            tensors.insert(0, block.base.view(shape))
        if self.laws.random:
            tensors = [tensor.cpu() for tensor in tensors]
        ids = [*(["base"] if takes_base else []), *(f"brick {name}" for name in group.bricks)]
        try:
            with _seeded(group if self.laws.random else None):
                merged = merge_tensors()(
                    tensors,
                    self.method,
                    parameters=self._values(group),
                    ids=ids,
                    base_index=0 if takes_base else None,
                    name=group.tensor,
                )
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, TypeError) as error:
            raise WorkbenchError(f"{self.name}: mergekit refuses {group.tensor}: {error}") from error
        merged = merged.to(block.base.device).reshape(block.base.shape)
        if not bool(torch.isfinite(merged).all()):
            raise WorkbenchError(
                f"{self.name}: the result contains NaN or infinity at {group.tensor}",
                "Weights that sum to 0 cause a division by zero: exclude the tensor with `where`, or change the parameters.",
            )
        return merged - block.base

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that mergekit gets.

        DELLA ranks along the second axis. If that axis has length 1, mergekit would divide 0 by 0, so the tensor becomes one row.
        """
        if not shape or ("della" in self.method and len(shape) > 1 and shape[1] == 1):
            return (-1,)
        return shape

    def _values(self, group: Group) -> dict[str, Any]:
        """Return the values of all parameters at one tensor, in the form that `merge_tensors` expects."""
        values_by_name: dict[str, Any] = {}
        for parameter in parameters(self.method).values():
            shared = self.parameters.get(parameter.name)
            if not parameter.per_brick:
                if shared is not None:
                    values_by_name[parameter.name] = self._value_at(group, parameter, shared, parameter.default)
                continue
            default = parameter.default if shared is None else self._value_at(group, parameter, shared, parameter.default)
            values = {}
            for brick in group.bricks:
                brick_value = self.entry(brick).given().get(parameter.name)
                values[f"brick {brick}"] = (
                    default if brick_value is None else self._value_at(group, parameter, brick_value, default)
                )
            values_by_name[parameter.name] = values
        if "della" in self.method:
            for brick, density in values_by_name["density"].items():
                if group.spec.numel == 1:
                    values_by_name["density"][brick] = 1.0  # a single value has no rank, and is kept
                elif text := _no_probability(density, values_by_name["epsilon"][brick]):
                    raise WorkbenchError(f"{self.name}: {brick} at {group.tensor}: {text}")
        return values_by_name

    @staticmethod
    def _value_at(group: Group, parameter: Parameter, setting: Any, default: Any) -> Any:
        """Return a setting at one tensor, in the parameter's type."""
        if isinstance(setting, bool):
            return setting
        number = value_at(setting, group.tensor, group.model, float("nan"))
        return default if number != number else parameter.validate(number)


def _checked(
    known: Known, specs: dict[str, Parameter], path: tuple[str, ...], settings: Mapping[str, object], *, per_brick: bool
) -> Iterator[Problem]:
    """Check the names, types and ranges of the parameters in one place of the step."""
    usable = [p.name for p in specs.values() if p.per_brick or not per_brick]
    for name, setting in settings.items():
        key_path = (*path, name)
        if name not in specs:
            yield Problem(key_path, "", tuple(usable) or ("none",))
            continue
        if name not in usable:
            yield Problem(key_path, f"{name} applies to all bricks: write it under `parameters`")
            continue
        low, high = known.ranges.get(name, (float("-inf"), float("inf")))
        kind = specs[name].kind
        found = (
            str(setting).lower() if isinstance(setting, bool) else f"{setting:g}" if isinstance(setting, float) else "a schedule"
        )
        if (kind == "bool") != isinstance(setting, bool):
            yield Problem(key_path, f"expected {'true or false' if kind == 'bool' else 'a number'}, found {found}")
        elif kind == "int" and not (isinstance(setting, float) and setting.is_integer()):
            yield Problem(key_path, f"expected a whole number, found {found}")
        elif kind != "bool" and (bad := [v for v in constants(setting) if not low <= v <= high]):
            bounds = f"between {low:g} and {high:g}" if high < float("inf") else f"of at least {low:g}"
            yield Problem(key_path, f"expected a number {bounds}, found {bad[0]:g}")


def _no_probability(density: float, epsilon: float) -> str | None:
    """Return an error text if density ± epsilon are not probabilities; None if they are."""
    if density in (0.0, 1.0) or (density + epsilon < 1 and density - epsilon > 0):
        return None
    return f"expected density ± epsilon between 0 and 1, found {density:g} ± {epsilon:g}; a density of 1 drops nothing"


@contextmanager
def _seeded(group: Group | None) -> Iterator[None]:
    """Seed torch's global CPU generator for one tensor, and restore it afterwards; do nothing if `group` is None."""
    if group is None:
        yield
        return
    with _LOCK:
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed_of(group.seed, group.tensor, group.keys))
            yield
        finally:
            torch.set_rng_state(state)


def _make_method(name: str, known: Known) -> type[Bridge]:
    """Create and register the step of one mergekit method."""
    doc = f"{known.text}.\n\nParameters (* may differ by brick): {known.parameters}."
    title = "Mergekit" + name.title().replace("_", "")
    tag: Any = Literal[f"{PREFIX}{name}"]
    cls: type[Bridge] = create_model(title, __base__=Bridge, __module__=__name__, __doc__=doc, merge=(tag, ...))
    cls.method, cls.known, cls.laws = name, known, known.laws
    cls.along_arc = name in ("slerp", "nuslerp", "multislerp", "karcher")
    # Version 2 million: seeds of random methods depend on the whole content of the bricks.
    cls.version = version_number() + (1_000_000 if known.laws.random else 0)
    cls.formula, cls.paper = known.formula, known.paper
    return register(cls)


METHODS = {name: _make_method(name, known) for name, known in KNOWN.items()}
