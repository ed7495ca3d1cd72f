"""Overrides of config.json: the fields of `output: {config:}`, checked by the class of transformers that reads the result."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError, nearest
from workbench.models.layout import Model
from workbench.models.skeleton import parse_config, skeleton
from workbench.resolve.resolved import Resolved
from workbench.run.kind import shapes_before
from workbench.weights.header import POSITIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DTYPE = dict.fromkeys(("dtype", "torch_dtype"), "Write `output: {dtype: …}`.")
_MADE = ("model_type", "architectures", "auto_map", "quantization_config", "transformers_version", "_name_or_path")
_OTHERS = _DTYPE | dict.fromkeys(_MADE, "The base and the steps decide it.")
_MODEL = "With other heads, equal tensors are another model."
_HEADS = re.compile(r"(n|num)_(\w+_)?heads?|\w*head_dim")  # tensors often keep their shapes
_NUMBERS = ("rope_theta", "partial_rotary_factor")
_ROPE = ("rope_parameters", "rope_scaling", *_NUMBERS)


def configured(resolved: Resolved, model: Model | None = None) -> Model:
    """Return a recipe's result with the fields of config.json that its `output` overrides; without `model`, only check them, from headers.

    Raises:
        WorkbenchError: If a field is unknown or of another type, transformers refuses the result, or parameters get other shapes.
    """
    given = resolved.recipe.fields.output.config
    assert given is not None, "a recipe without overrides is not asked"
    model = model or shapes_before(resolved, len(resolved.recipe.steps))
    from huggingface_hub.errors import StrictDataclassError

    try:
        parsed = parse_config({name: value for name, value in model.config.items() if name != "quantization_config"})
        config = _merged(model.config, given, parsed, "")
        built = [skeleton(json.dumps(one, sort_keys=True)) for one in (model.config, config)]
        tied = [{"tied heads": sorted(live.all_tied_weights_keys)} for live in built]
        old, new = (ties | {n: list(p.shape) for n, p in m.named_parameters()} for m, ties in zip(built, tied, strict=True))
        if other := next((name for name in {**old, **new} if old.get(name) != new.get(name)), None):
            hint = "Tensors decide their shapes: use a `grow` step (depth, width, experts, prune) or the `tokenizer` block."
            raise WorkbenchError(f"{', '.join(given)}: {other} is {old.get(other)}, and would be {new.get(other)}", hint)
    except (StrictDataclassError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise resolved.recipe.error(("output", "config"), f"transformers refuses it: {' '.join(str(error).split())}") from None
    except WorkbenchError as error:
        raise resolved.recipe.error(("output", "config"), error.message, error.hint) from None
    return Model(model.weights, config)


def _merged(section: Mapping[str, Any], given: Mapping[str, Any], parsed: PretrainedConfig, path: str) -> dict[str, Any]:
    """Return a part of config.json with overrides, and give them to its class, which checks their types."""
    merged, shown, typed = dict(section), {**parsed.to_dict(), **section}, {field.name for field in fields(parsed)}
    rotary = bool(getattr(parsed, "rope_parameters", None))
    known = {*shown, *typed, *parsed.attribute_map, *(_ROPE if rotary else ())} - _OTHERS.keys()
    for name, value in given.items():
        field = name if name in section else parsed.attribute_map.get(name, name)
        current, part, place = shown.get(field), field in parsed.sub_configs, f"{path}{name}"
        if name in _OTHERS or _HEADS.fullmatch(name):
            raise WorkbenchError(f"{place} cannot be overridden", _OTHERS.get(name, _MODEL))
        if name not in known:
            parts = [inner for inner in parsed.sub_configs if hasattr(getattr(parsed, inner, None), name)]
            hint = f"Write `{parts[0]}: {{{name}: …}}`." if parts else nearest(name, known)
            raise WorkbenchError(f"{place}: {type(parsed).__name__} has no such field", hint)
        if (part or (isinstance(current, Mapping) and value is not None)) and not isinstance(value, Mapping):
            raise WorkbenchError(f"{place}: expected fields, found {value!r}")
        if part:
            merged[field] = _merged(section.get(field) or {}, value, getattr(parsed, field), f"{place}.")
        elif rotary and name in _ROPE:
            _set_rope(merged, name, value, parsed, place)
        else:
            one: Any = float(value) if type(current) is float and type(value) is int else value
            if current is not None and type(current) is not type(one) and (field not in typed or isinstance(one, bool)):
                raise WorkbenchError(f"{place}: expected a value like {current!r}, found {value!r}")
            merged[field] = {**current, **one} if isinstance(current, Mapping) and one else one
            setattr(parsed, field, merged[field])
    if rotary and not given.keys().isdisjoint((*_ROPE, *POSITIONS)):
        from transformers import modeling_rope_utils

        heard, own = list[str](), modeling_rope_utils.logger
        modeling_rope_utils.logger = SimpleNamespace(warning=heard.append, warning_once=heard.append)  # said once a process
        try:
            parsed.validate_rope()
        finally:
            modeling_rope_utils.logger = own
        if heard:
            raise WorkbenchError(f"transformers refuses it: {' '.join('; '.join(heard).split())}")
    return merged


def _set_rope(section: dict[str, Any], name: str, value: Any, parsed: PretrainedConfig, place: str) -> None:
    """Override rotary settings, in `rope_parameters` or, as in older files, in `rope_theta` and `rope_scaling`."""
    rope: dict[str, Any] = dict(parsed.rope_parameters)
    labels = parsed.nested_rope_parameter_keys(rope)  # kinds of layers with settings of their own
    given = {name: value} if name in _NUMBERS else {"rope_type": "default"} if value is None else value
    for label, part in given.items() if labels else [("", given)]:
        if not isinstance(part, Mapping) or (labels and label not in labels):
            expected = f"`rope_parameters: {{{labels[0]}: {{…}}}}`, because kinds of layers differ" if labels else "fields"
            raise WorkbenchError(f"{place}: expected {expected}, found {value!r}")
        change = {"rope_type" if key == "type" else key: one for key, one in part.items()}
        if bad := [one for key in _NUMBERS if isinstance(one := change.get(key, 1), bool | str | Mapping | None) or one <= 0]:
            raise WorkbenchError(f"{place}: found {bad[0]!r}, expected a number above 0")
        old = rope[label] or {} if labels else rope
        same = change.get("rope_type", old.get("rope_type")) == old.get("rope_type")  # another type has other fields
        new = {key: one for key, one in old.items() if key != "type" and (same or key in _NUMBERS)} | change
        rope = {**rope, label: new} if labels else new
    parsed.rope_parameters = rope
    if labels or "rope_parameters" in section:
        section["rope_parameters"] = rope
        section.pop("rope_theta", section.pop("rope_scaling", None))
        return
    rest = {key: one for key, one in rope.items() if key not in _NUMBERS}
    section |= {key: rope[key] for key in _NUMBERS if key in rope}
    section["rope_scaling"] = rest if rest["rope_type"] != "default" else None
