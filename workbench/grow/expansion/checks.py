"""Checks of the files of a grown model: config.json matches the tensors, and old elements are unchanged, row by row."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workbench.ground.errors import GateFailedError, WorkbenchError
from workbench.ground.lazy import np, torch
from workbench.grow.expansion.parts import NOT_BUILT, other_shape
from workbench.grow.expansion.remap import runs
from workbench.grow.expansion.streamed import decoder_layers
from workbench.models.architecture import model_depth
from workbench.models.layout import Layout, Model
from workbench.models.live import live_names
from workbench.models.skeleton import skeleton
from workbench.steps import NEW, Grown, Growth
from workbench.weights.specs import BLOCK_ELEMENTS, Source, TensorSpec, Weights

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


_REPORT = "Report this architecture. `check: off` in the step writes the model without this check."
# Attributes that hold the number of a module's own layer, under the names that architectures use.
_NUMBER = re.compile(r"(^|_)(idx|index|number|num)s?$|(layer|block)_?(idx|index|id|number|num)s?$")


def built_model(config: Mapping[str, object], step: str) -> PreTrainedModel:
    """Return the model without weights that transformers builds from a config.json.

    Raises:
        WorkbenchError: If transformers cannot build it (exit code 3).
    """
    try:
        return skeleton(json.dumps(dict(config), sort_keys=True))
    except WorkbenchError as error:
        raise GateFailedError(f"step {step}: {error.message}, so the growth cannot be checked", _REPORT) from None
    except NOT_BUILT as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GateFailedError(
            f"step {step}: transformers cannot build a model from the grown config.json: {reason[:200]}", _REPORT
        ) from None


def check_fits(before: Model, growth: Growth, specs: Mapping[str, TensorSpec], step: str) -> None:
    """Check that config.json and the tensors of a grown model agree: layers, widths, heads, vocabulary.

    Every tensor must match a parameter of the same shape in the model that transformers builds from the file, and every parameter
    of that model must have a tensor. Tensors that matched no parameter before growth are ignored.

    Args:
        before: The model before growth.
        growth: The plan, with the grown config.json.
        specs: The grown tensors, by their names in the files.
        step: Id of the step, for errors.

    Raises:
        WorkbenchError: If they differ (exit code 3).
    """
    built = built_model(growth.config, step)
    old_places, places = live_names(before.config, before.weights.specs), live_names(growth.config, specs)
    kind = growth.config.get("model_type")
    for name, live in places.items():
        source = growth.tensors[name].source if name in growth.tensors else name
        if live or not old_places.get(source, ["unknown"]):
            continue
        raise GateFailedError(
            f"step {step}: the model that transformers builds from the grown config.json (model_type {kind}) has no parameter "
            f"for {name}{_depths(before, growth, specs)}",
            _REPORT,
        )
    if found := other_shape(built, places, specs):
        name, shape = found
        raise GateFailedError(
            f"step {step}: {name} has the shape {list(specs[name].shape)}; transformers builds {list(shape)} "
            f"from the grown config.json (model_type {kind})",
            _REPORT,
        )
    filled_places = {place for live in places.values() for place in live} | set(built.all_tied_weights_keys)
    if absent := sorted(name for name, _ in built.named_parameters() if name not in filled_places):
        raise GateFailedError(
            f"step {step}: transformers builds {absent[0]} from the grown config.json (model_type {kind}), and no tensor fills "
            f"it ({len(absent)} such parameters){_depths(before, growth, specs)}",
            _REPORT,
        )
    _check_layers(before, growth, specs, built, step)


def _check_layers(before: Model, growth: Growth, specs: Mapping[str, TensorSpec], built: PreTrainedModel, step: str) -> None:
    """Check that transformers builds each layer in the same way as its source layer: windows, rotary patterns, kinds.

    Only layers whose tensors all keep their shapes are compared, as after `depth` and `stack`.
    """
    if before.config.get("model_type") != growth.config.get("model_type"):
        return
    new_layers, new = decoder_layers(built), Layout.from_config(specs, growth.config)
    if new_layers is None or len(new_layers[1]) != new.depth:
        return
    models = {None: before} | dict[str | None, Model](growth.models.items())
    built_layers: dict[str | None, Sequence[nn.Module] | None] = {}
    signatures: dict[tuple[str | None, int], dict[str, object]] = {}
    for number in range(new.depth):
        grown = [growth.tensors[name] for name in new.in_layer(number) if name in growth.tensors]
        sources = {(g.model, models[g.model].layout.layer(g.source)) for g in grown}
        model, source = sources.pop() if len(sources) == 1 else (None, None)
        if source is None or any(g.reshaped for g in grown):
            continue
        if model not in built_layers:
            found = decoder_layers(built_model(models[model].config, step))
            # The layers of a part of a model cannot be told.
            own = found[1] if found is not None and len(found[1]) == models[model].layout.depth else None
            built_layers[model] = None if own is None else list(own)
        if (old_layers := built_layers[model]) is None:
            continue
        expected = signatures.setdefault((model, source), _signature(old_layers[source]))
        actual = _signature(new_layers[1][number])
        if different := sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key)):
            key = different[0]
            raise GateFailedError(
                f"step {step}: transformers builds layer {number} differently from its source, layer {source}{f' of {model}' if model else ''}: {key} is "
                f"{actual.get(key)!r}, expected {expected.get(key)!r}; config.json changes what a layer computes",
                _REPORT,
            )


def _signature(layer: nn.Module) -> dict[str, object]:
    """Return the module classes and the plain attributes of a layer, without its own number."""
    attributes: dict[str, object] = {}
    for name, module in layer.named_modules():
        attributes[name or "(layer)"] = type(module).__name__
        for key, value in vars(module).items():
            if not key.startswith("_") and not _NUMBER.search(key) and isinstance(value, (bool, int, float, str, type(None))):
                attributes[f"{name}.{key}".lstrip(".")] = value
    return attributes


def _depths(before: Model, growth: Growth, specs: Mapping[str, TensorSpec]) -> str:
    """Return a text with the numbers of layers in config.json and in the tensors if they differ, or an empty text."""
    try:
        prefix = before.layout.prefix
    except WorkbenchError:
        return ""
    numbers = {int(n) for name in specs if name.startswith(prefix) and (n := name[len(prefix) :].partition(".")[0]).isdigit()}
    stated, present = model_depth(growth.config), len(numbers)
    return "" if stated == present else f": config.json states {stated} layers, the tensors have {present}"


def old_elements(growth: Growth, before: Weights, saved: Weights, names: Mapping[str, str], step: str) -> dict[str, int]:
    """Compare old rows and columns in the files with those before growth, cast to the files' dtype, block by block.

    Args:
        growth: The plan.
        before: The weights before growth.
        saved: The weights in the files.
        names: Tensor after the step -> its name in the files, for tensors that no later step changes.
        step: Id of the step, for errors.

    Returns:
        Numbers of tensors: `identical`, `with_additions` (their old elements are identical), `rescaled` or fitted by the method, `new`, and
        `changed_later`; `shortened` if there are tensors that lost elements (the others are identical).

    Raises:
        WorkbenchError: If an old element differs (exit code 3).
    """
    counts = dict.fromkeys(("identical", "with_additions", "shortened", "rescaled", "new", "changed_later"), 0)
    uses = Counter(grown.source for grown in growth.tensors.values())
    for name, grown in growth.tensors.items():
        if grown.new:
            counts["new"] += 1
        elif name not in names:
            counts["changed_later"] += 1
        elif grown.rescaled:
            counts["rescaled"] += 1
        else:
            # The first part is the old tensor: `Mixture` appends new experts to the old ones.
            old = grown.parts[0] if grown.parts else grown
            if (row := _first_difference(old, before, saved, names[name])) is not None:
                raise GateFailedError(
                    f"step {step}: {names[name]} differs in row {row} from {grown.source} before growth",
                    "Report this architecture. `check: off` in the step writes the model without this check.",
                )
            counts[_kind(grown, before.specs[grown.source], uses[grown.source])] += 1
    return counts if counts["shortened"] else {key: count for key, count in counts.items() if key != "shortened"}


def _kind(grown: Grown, spec: TensorSpec, uses: int) -> str:
    """Return the count that a tensor whose old elements are identical belongs to.

    Args:
        grown: The tensor.
        spec: Shape and dtype of its source.
        uses: Number of tensors with this source. If there are several, the source is divided among them.
    """
    if not grown.reshaped:
        return "identical"
    return "with_additions" if grown.parts or uses > 1 or grown.added(spec) is not None else "shortened"


def _first_difference(grown: Grown, before: Weights, saved: Weights, name: str) -> int | None:
    """Return the first row with a different old element, or None if all are bit-identical."""
    old, new = before.specs[grown.source], saved.specs[name]
    rows = np.arange(old.rows) if grown.rows is None else grown.rows.index
    cols = np.arange(old.cols) if grown.cols is None else grown.cols.index
    if new.rows < len(rows) or new.cols < len(cols):
        return 0
    new_columns, old_columns = torch.from_numpy(np.flatnonzero(cols != NEW)), torch.from_numpy(cols[cols != NEW])
    all_columns = len(new_columns) == old.cols == new.cols and grown.cols is None
    cpu = torch.device("cpu")
    old_source, new_source = before.open(grown.source, cpu), saved.open(name, cpu)
    step = max(1, BLOCK_ELEMENTS // max(old.cols, new.cols))
    for start in range(0, len(rows), step):
        index = rows[start : start + step]
        written = _read(new_source, new, start, len(index))
        for place, length in runs(index):
            if index[place] == NEW:
                continue
            expected, actual = _read(old_source, old, int(index[place]), length), written[place : place + length]
            if not all_columns:
                expected, actual = expected[:, old_columns], actual[:, new_columns]
            equal_rows = (expected.to(new.dtype) == actual.to(new.dtype)).all(1)
            if not bool(equal_rows.all()):
                return start + place + int((~equal_rows).nonzero()[0])
    return None


def _read(source: Source, spec: TensorSpec, start: int, count: int) -> torch.Tensor:
    """Read rows of a tensor, in float32 or in the tensor's own integer dtype."""
    out = torch.empty(count, spec.cols, dtype=torch.float32 if spec.is_float else spec.dtype)
    source.read(start, start + count, out)
    return out
