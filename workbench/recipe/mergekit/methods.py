"""Translation of mergekit's methods to steps: native methods if the numbers are equal, `mergekit/NAME` otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import nearest
from workbench.merge.mergekit.table import KNOWN, Parameter, base_policy, parameters
from workbench.recipe.mergekit.config import Config, ModelSource
from workbench.recipe.mergekit.settings import Names, Setting, complement, is_default, setting

Step = dict[str, Any]


@dataclass(frozen=True)
class MethodInputs:
    """A mergekit configuration with a brick name for each input.

    Attributes:
        config: The configuration.
        bricks: Brick -> input, in mergekit's order, without the base if the method uses it as base.
        base_brick: Name of the base as a brick, for methods that merge it like another model.
        model: The base, or the part of it that is merged, if its files are local.
    """

    config: Config
    bricks: Mapping[str, ModelSource]
    base_brick: str
    model: Names | None

    def known(self) -> dict[str, Parameter]:
        """Return the method's parameters as mergekit specifies them."""
        return parameters(self.config.method)

    def shared(self, name: str) -> Setting:
        """Return a parameter for all bricks, or mergekit's default if the file does not set it."""
        value = setting(self.known()[name], self.config.scopes, self.model, self.config.report)
        return self.known()[name].default if value is None else value

    def each(self, name: str) -> dict[str, Setting]:
        """Return the value of a parameter for each brick."""
        parameter, values = self.known()[name], {}
        for brick, source in self.bricks.items():
            value = setting(parameter, [source.parameters, *self.config.scopes], self.model, self.config.report)
            if value is None and parameter.required and not self.config.report.problems:
                self.config.report.refuse(source.path, f"{self.config.method} requires a {name} here; mergekit rejects this too")
            values[brick] = parameter.default if value is None else value
        return values

    def note_unused(self, used: Sequence[str]) -> None:
        """Add a note for each parameter in the file that mergekit does not use either."""
        parameters, method, report = self.known(), self.config.method, self.config.report
        sources = [source.parameters for source in self.config.sources]
        for key_path, mapping in [*self.config.scopes, *sources]:
            is_input = (key_path, mapping) in sources
            for name in mapping:
                if name not in parameters:
                    close = f" ({nearest(name, parameters)})" if nearest(name, parameters).startswith("Did") else ""
                    report.note(
                        (*key_path, name), f"{method} has no such parameter and mergekit ignores it{close}, so it is omitted"
                    )
                elif is_input and not parameters[name].per_brick:
                    report.note(
                        (*key_path, name), "applies to all inputs, so mergekit ignores it for one input, and it is omitted"
                    )
                elif name not in used:
                    report.note((*key_path, name), f"has no effect on the result of {method}, so it is omitted")


def step_of(inputs: MethodInputs) -> Step:
    """Return the merge step as plain data. Problems and notes go to the configuration's report."""
    make = _OWN.get(inputs.config.method)
    step = make(inputs) if make else None
    return step if step is not None else _bridge(inputs)


def _linear(inputs: MethodInputs) -> Step:
    inputs.note_unused(("weight", "normalize"))
    step: Step = {"merge": "linear", "bricks": inputs.each("weight")}
    return step if inputs.shared("normalize") else {**step, "normalize": False}


def _task_arithmetic(inputs: MethodInputs) -> Step | None:
    if inputs.shared("normalize"):
        return None
    inputs.note_unused(("weight", "lambda", "normalize"))
    return {"merge": "task_arithmetic", "bricks": inputs.each("weight"), **_lambda(inputs)}


def _ties(inputs: MethodInputs) -> Step | None:
    if not inputs.shared("normalize") or inputs.shared("rescale"):
        return None
    inputs.note_unused(("weight", "density", "lambda", "normalize", "rescale"))
    inputs.config.report.note(
        (),
        "ties: the fields below select mergekit's variant. Ties are broken differently, which bf16 inputs can show: among equal magnitudes "
        "at the threshold mergekit keeps arbitrary elements, this step the first ones; if the votes for a sign cancel exactly, mergekit "
        "takes plus, this step leaves the element at 0",
    )
    return {
        "merge": "ties",
        **_weights_and_densities(inputs),
        **_lambda(inputs),
        "sign": "mass",
        "weigh": "before",
        "divide": "weight",
        "threshold": "tensor",
    }


def _slerp(inputs: MethodInputs) -> Step:
    inputs.note_unused(("t",))
    t = inputs.shared("t")
    if t is None and not inputs.config.report.problems:
        inputs.config.report.refuse(("merge_method",), "slerp requires the parameter t; mergekit rejects this too")
    (brick,) = inputs.bricks
    return {"merge": "slerp", "bricks": {inputs.base_brick: complement(t or 0.0), brick: t or 0.0}}


def _dare_linear(inputs: MethodInputs) -> Step | None:
    return None if inputs.shared("normalize") else _dare(inputs, "sum")


def _dare_ties(inputs: MethodInputs) -> Step | None:
    return _dare(inputs, "ties") if inputs.shared("normalize") else None


def _dare(inputs: MethodInputs, then: str) -> Step:
    inputs.note_unused(("weight", "density", "lambda", "normalize", "rescale"))
    inputs.config.report.note(
        (), "dare: random masks have the same distribution as mergekit's, but are drawn from the recipe's seed, so they differ"
    )
    rescale = "l1" if inputs.shared("rescale") else "none"
    return {"merge": "dare", **_weights_and_densities(inputs), **_lambda(inputs), "rescale": rescale, "then": then}


def _passthrough(inputs: MethodInputs) -> Step | None:
    (scale,) = inputs.each("scale").values()
    if scale is not None:
        return None
    inputs.note_unused(("scale",))
    return {"merge": "task_arithmetic", "bricks": dict.fromkeys(inputs.bricks, 1.0)}


def _bridge(inputs: MethodInputs) -> Step:
    """Return a `mergekit/NAME` step with every parameter that the file sets."""
    parameters, method = inputs.known(), inputs.config.method
    used = [name for name in parameters if name != "int8_mask"]
    inputs.note_unused(used)
    entries: dict[str, dict[str, Setting]] = {brick: {} for brick in inputs.bricks}
    shared: dict[str, Setting] = {}
    for name in used:
        if not parameters[name].per_brick:
            value = _clamped(inputs, name, inputs.shared(name))
            if parameters[name].required and value is None and not inputs.config.report.problems:
                inputs.config.report.refuse(
                    ("merge_method",), f"{method} requires the parameter {name}; mergekit rejects this too"
                )
            if not is_default(value, parameters[name].default):
                shared[name] = value
            continue
        values = {brick: _clamped(inputs, name, value) for brick, value in inputs.each(name).items()}
        if name != "weight" and all(value == next(iter(values.values())) for value in values.values()):
            if not is_default(next(iter(values.values())), parameters[name].default):
                shared[name] = next(iter(values.values()))
            continue
        for brick, value in values.items():
            if value is not None:
                entries[brick][name] = value
    step: Step = {"merge": f"mergekit/{method}", "bricks": _plain(entries)}
    if shared:
        step["parameters"] = shared
    if KNOWN[method].laws.random:
        inputs.config.report.note(
            (), f"{method}: random numbers come from the recipe's seed and do not depend on the order of models or tensors"
        )
    if base_policy(method) == "optional" and inputs.config.base is None:
        step["with_base"] = False
    return step


def _weights_and_densities(inputs: MethodInputs) -> dict[str, Any]:
    weights = inputs.each("weight")
    densities = {brick: _clamped(inputs, "density", value) for brick, value in inputs.each("density").items()}
    first = next(iter(densities.values()))
    if all(value == first for value in densities.values()):
        return {"bricks": weights, "density": first}
    return {"bricks": {brick: {"weight": weights[brick], "density": densities[brick]} for brick in weights}, "density": 1.0}


def _lambda(inputs: MethodInputs) -> dict[str, Any]:
    value = inputs.shared("lambda")
    return {} if is_default(value, 1.0) else {"lambda": value}


def _clamped(inputs: MethodInputs, name: str, value: Setting) -> Setting:
    """Limit a share to 1, as mergekit does; a recipe does not allow more."""
    if name not in ("density", "select_topk") or isinstance(value, (list, dict)) or value is None or value <= 1:
        return value
    inputs.config.report.note((), f"{name} {value:g}: mergekit takes it as 1")
    return 1.0


def _plain(entries: dict[str, dict[str, Setting]]) -> Any:
    """Shorten brick entries: a number if there is only a weight, a list of names if no brick has fields."""
    if not any(entries.values()):
        return list(entries)
    return {brick: entry["weight"] if list(entry) == ["weight"] else entry for brick, entry in entries.items()}


_OWN: dict[str, Callable[[MethodInputs], Step | None]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "slerp": _slerp,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
    "passthrough": _passthrough,
}
