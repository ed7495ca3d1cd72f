"""Check, row by row, that the written files contain a grown model's old elements unchanged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from workbench.errors import GateFailedError
from workbench.grow.expansion.remap import runs
from workbench.lazy import torch
from workbench.steps import NEW, Grown, Growth
from workbench.weights.specs import BLOCK_ELEMENTS, Source, TensorSpec, Weights


def old_elements(growth: Growth, before: Weights, saved: Weights, names: Mapping[str, str], step: str) -> dict[str, int]:
    """Compare old rows and columns in the files with those before growth, cast to the files' dtype, block by block.

    Args:
        growth: The plan.
        before: The weights before growth.
        saved: The weights in the files.
        names: Tensor after the step -> its name in the files, for tensors that no later step changes.
        step: Id of the step, for errors.

    Returns:
        Numbers of tensors: `identical`, `with_additions` (their old elements are identical), `rescaled` by the method, `new`, and
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


def told(check: Mapping[str, Any]) -> str:
    """Return the result of a growth check in one line.

    Example: "259 old tensors are bit-identical, 54 new; logits differ by 0, cached generation agrees; transformers loads it".
    """
    counts = check.get("kept", {})
    words = {
        "identical": "old tensors are bit-identical",
        "with_additions": "with additions keep their old elements",
        "shortened": "shorter ones keep their other elements",
        "rescaled": "rescaled",
        "new": "new",
        "changed_later": "changed by later steps",
        "trained": "tensors trained",
    }
    parts = [", ".join(f"{counts[key]} {text}" for key, text in words.items() if counts.get(key))]
    if "max_logit_difference" in check:
        parts.append(
            f"logits differ by {check['max_logit_difference']:.2g}"
            + (", cached generation agrees" if check.get("same_generation") else "")
        )
    elif check.get("finite_logits"):
        parts.append("logits are finite")
    if waiting := check.get("at_first_without"):
        parts.append(
            f"{len(waiting)} of the new tensors ({waiting[0]}) have no gradient until the zeros that follow them are trained"
        )
    if share := check.get("new_token_probability"):
        parts.append(f"new tokens take {100 * share:.2g} % of the probability")
    parts += ["transformers loads it"] if check.get("reloaded") else []
    return "; ".join(filter(None, parts))
