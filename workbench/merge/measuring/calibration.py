"""Calibration texts of data-driven merge methods, and weighted least squares for one linear layer: fields, texts as tokens, solver, report."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import file_digest, json_digest
from workbench.ground.identity import open_unchanged
from workbench.ground.lazy import torch
from workbench.merge.measuring.matrices import rows_of
from workbench.models.architecture import is_conv1d_layer, is_head
from workbench.models.layout import Model
from workbench.models.texts import BATCH_TOKENS, TextRow, encode, longest_row, read_texts
from workbench.steps import Combination, Group, MergeContext, MergeMethod, Prepared
from workbench.steps.fields import BrickEntry, Bricks, Whole, lowest

if TYPE_CHECKING:
    from torch import Tensor


def solve(deltas: Sequence[Tensor], grams: Sequence[Callable[[], Tensor]], weights: Sequence[float], ridge: float) -> Tensor:
    """Return the delta that is closest to all bricks' deltas on their inputs.

    It minimizes Σ wᵢ tr((Δ − τᵢ) Gᵢ' (Δ − τᵢ)ᵀ): Δ = (Σ wᵢ τᵢ Gᵢ') (Σ wᵢ Gᵢ')⁻¹ with Gᵢ' = Gᵢ + ε·I and ε = ridge · mean of the
    diagonal of Σ wᵢGᵢ / Σ wᵢ (Jin et al. 2023, RegMean, arXiv 2212.09849, eq. 2). The ridge is added to every Gram, so it pulls
    toward the bricks' weighted mean instead of the base: the result is that mean, for any
    ridge, if all Grams are equal, and in every input direction in which all Grams are zero.

    Args:
        deltas: τᵢ [out, in], one per brick.
        grams: Functions that return Gᵢ [in, in], symmetric and positive semidefinite; only one Gram is in memory at a time.
        weights: wᵢ ≥ 0, not all 0.
        ridge: Ridge relative to the mean diagonal.

    Returns:
        Δ [out, in] in float32, solved in float64.

    Raises:
        WorkbenchError: If the system is singular.
    """
    used = [(tau, gram, w) for tau, gram, w in zip(deltas, grams, weights, strict=True) if w]
    if len(used) == 1:
        return used[0][0].clone()
    size, total = deltas[0].shape[1], sum(w for _, _, w in used)
    left = torch.zeros(size, size, dtype=torch.float64, device=deltas[0].device)
    right = torch.zeros(deltas[0].shape, dtype=torch.float64, device=deltas[0].device)
    for tau, gram, weight in used:
        weighted = gram().double().mul_(weight)
        left += weighted
        right.addmm_(tau.double(), weighted)
        del weighted
    trace = float(left.trace())
    if trace == 0:  # all Grams are zero: weight all directions equally
        left.fill_diagonal_(total)
        right = sum((tau.double() * w for tau, _, w in used), torch.zeros_like(right))
    epsilon = ridge * trace / max(size, 1) / total
    left.diagonal().add_(epsilon * total)
    for tau, _, weight in used:
        right.add_(tau, alpha=epsilon * weight)
    factor, info = torch.linalg.cholesky_ex(left)
    if int(info) or not bool(torch.isfinite(factor.diagonal()).all()):
        raise WorkbenchError(f"the least-squares system of {size} inputs is singular at ridge {ridge:g}", "Raise `ridge`.")
    return torch.cholesky_solve(right.T, factor).T.float()


def linear_deltas(group: Group) -> list[Tensor]:
    """Return every brick's delta of a linear layer as [out, in], also if it is stored as [in, out]."""
    deltas = group.whole().deltas
    return [delta.T for delta in deltas] if is_conv1d(group.model, group.tensor) else deltas


def merge_linear(
    group: Group, deltas: Sequence[Tensor], grams: Sequence[Callable[[], Tensor]], ridge: float, *, method: str
) -> Prepared:
    """Solve the weight of one linear layer, and note the norm of the result relative to the bricks' norms (`norm_report`).

    Args:
        group: The tensor.
        deltas: Deltas [out, in] from `linear_deltas`.
        grams: Functions that return the Grams, see `solve`.
        ridge: Ridge, see `solve`.
        method: Name of the method, for errors.

    Returns:
        Function from a block to its rows of the result.
    """
    weights = checked_weights(group, method)
    try:
        solved = solve(deltas, grams, weights, ridge)
    except WorkbenchError as error:
        raise WorkbenchError(f"{method}: {group.tensor}: {error.message}", error.hint) from None
    norms = [float(delta.norm()) for delta, weight in zip(deltas, weights, strict=True) if weight]
    mean = sum(norms) / len(norms)
    group.notes[group.tensor] = {"norm_ratio": float(solved.norm()) / mean if mean else 0.0}
    return rows_of((solved.T if is_conv1d(group.model, group.tensor) else solved).contiguous())


def average(group: Group, *, method: str) -> Combination:
    """Return the weighted mean, for tensors that are no linear layer or have no Gram, and note that the tensor was averaged."""
    weights = checked_weights(group, method)
    total = sum(weights)
    group.notes[group.tensor] = {"averaged": True}
    return Combination([w / total for w in weights])


def checked_weights(group: Group, method: str) -> list[float]:
    """Return the bricks' weights at a tensor."""
    weights = group.values("weight")
    check_weights(weights, group.tensor, method)
    return weights


def check_weights(weights: Sequence[float], tensor: str, method: str) -> None:
    """Raise WorkbenchError if one of the bricks' weights at a tensor is negative, or all are 0."""
    if min(weights) < 0 or sum(weights) == 0:
        raise WorkbenchError(
            f"{method}: the weights at {tensor} are {', '.join(f'{w:g}' for w in weights)}, expected 0 or more, not all 0",
            "The weights multiply squared errors. To subtract a skill, use `merge: task_arithmetic`.",
        )


def not_negative(bricks: Mapping[str, object] | None) -> None:
    """Check, in a validator of `bricks`, that no weight is negative: the weights multiply squared errors."""
    for name, entry in (bricks or {}).items():
        weight = entry.weight if isinstance(entry, BrickEntry) else entry
        if lowest(weight) < 0:
            raise ValueError(f"the weight of '{name}' is {lowest(weight):g}: it multiplies squared errors, expected 0 or more")


def is_linear(model: Model, tensor: str) -> bool:
    """Return whether a tensor is the weight of a linear layer inside the layer stack, or of an untied head."""
    if len(model.weights.specs[tensor].shape) != 2 or not tensor.endswith(".weight"):
        return False
    if model.layout.layer(tensor) is not None:
        return True
    return is_head(tensor) and not model.config.get("tie_word_embeddings", False)


def is_conv1d(model: Model, tensor: str) -> bool:
    """Return whether the weight of a linear layer is stored as [in, out]."""
    return is_conv1d_layer(model.config, tensor.removesuffix(".weight"))


def solver_bytes(model: Model, tensor: str, bricks: int) -> int:
    """Return the memory of one solve in bytes.

    It counts the base and the deltas in float32 and the right-hand side in float64; and one delta in float64, either with its
    square or with the sum of the Grams, one Gram and its scaled copy.
    """
    if not is_linear(model, tensor):
        return 0
    spec = model.weights.specs[tensor]
    inputs = spec.rows if is_conv1d(model, tensor) else spec.cols
    return spec.numel * (4 * (bricks + 1) + 8) + max(16 * spec.numel + 8 * inputs**2, 8 * spec.numel + 24 * inputs**2)


def by_pattern(names: Iterable[str]) -> dict[str, int]:
    """Return how many tensors have each name, with layer numbers replaced by `*`."""
    return dict(Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


def norm_report(notes: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
    """Return ‖Δ‖ / mean ‖τᵢ‖ of the solved tensors and the number of averaged tensors, for the step's record.

    Averaged tensors are counted by name, with layer numbers replaced by `*`. A ratio far above 1 means that the system was nearly
    singular: raise `ridge`.
    """
    ratios = {name: note["norm_ratio"] for name, note in sorted(notes.items()) if "norm_ratio" in note}
    averaged = by_pattern(name for name, note in sorted(notes.items()) if "averaged" in note)
    record: dict[str, object] = {"solved": len(ratios), "averaged": averaged}
    if ratios:
        largest = max(ratios, key=lambda name: ratios[name])
        record["norm_ratio"] = {
            "median": round(statistics.median(ratios.values()), 4),
            "smallest": round(min(ratios.values()), 4),
            "largest": round(ratios[largest], 4),
            "at": largest,
        }
    return record


class CalibrationEntry(BrickEntry):
    """A brick's fields in a step that reads calibration texts."""

    calibration: str | None = None
    """JSONL file of texts from the brick's own task; if omitted, the step's `calibration`."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of what a method holds while it runs a model layer by layer, for `plan`.

    Attributes:
        outside: Bytes of the parameters outside the layers, in float32.
        layer: Bytes of one layer in float32.
        squares: Numbers in one square matrix for each width of the layer's inputs.
        hidden: Bytes of the hidden states of one brick's texts, if these are as long as the fields allow.
    """

    outside: int
    layer: int
    squares: int
    hidden: int


class ReadsTexts(MergeMethod):
    """Base class of merge methods that run models on texts: the fields, and the checks before any work."""

    version = 3  # prompt and answer are tokenized as one text

    bricks: Any = None  # declared here to come before the other fields in the docs; subclasses give it its type
    calibration: str | None = None
    """JSONL file of texts, relative to the project: {"prompt":, "completion":} (or response, answer, target) or {"text":} a line."""
    samples: Whole = Field(256, ge=1)
    """Largest number of texts read from each file, evenly spaced over the file."""
    max_length: Whole = Field(512, ge=2)
    """Largest number of tokens of a text. Longer texts lose their end; longer prompts lose their start."""

    def inputs(self) -> list[str]:
        """Return the files of texts."""
        return [self.calibration] if self.calibration else []

    def check_inputs(self, project: Path) -> None:
        """Read every file once, so that errors in it appear before any work."""
        for file in self.inputs():
            read_texts(project / file, file)

    def sizes(self, model: Model) -> Sizes:
        """Return the sizes of a layer-by-layer pass over the texts."""
        layout, specs = model.layout, model.weights.specs
        layer = [spec for name, spec in specs.items() if layout.layer(name) == 0]
        outside = sum(4 * spec.numel for name, spec in specs.items() if layout.layer(name) is None)
        widths = {spec.cols for spec in layer if len(spec.shape) == 2}
        tokens = self.samples * min(self.max_length, 512) + BATCH_TOKENS
        squares = sum(width**2 for width in widths)
        return Sizes(outside, sum(4 * spec.numel for spec in layer), squares, 4 * tokens * min(widths, default=1))

    def rows_of(self, file: str, context: MergeContext, brick: str) -> tuple[list[TextRow], str]:
        """Return the tokens of a file's texts, and the cache key of what the model of a brick (of the base, for "") measures on them."""
        longest = longest_row(context.base.config, self.max_length)
        with open_unchanged(context.project / file):  # the cache key must describe the texts that were read
            rows = encode(read_texts(context.project / file, file, self.samples), context.tokenizer, longest)
            content = file_digest(context.project / file)
        return rows, json_digest([self.code_key(), context.keys[brick], content, self.samples, longest])


class Calibrated(ReadsTexts):
    """Base class of merge methods that run each brick's model on texts of its own task."""

    same_texts: ClassVar[str] = ""
    """What happens if several bricks have the same texts."""

    bricks: Bricks[CalibrationEntry] | None = None
    """Mapping of brick name to weight, or to {weight:, calibration:}. A list: each has weight 1. Default: all bricks. Weights must be 0 or more, and only their ratios matter."""
    calibration: str | None = None
    """JSONL file of texts, relative to the project, for bricks without a file of their own: {"prompt":, "completion":} (or
    response, answer, target) or {"text":} a line."""

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        not_negative(self.bricks)
        missing = [b for b in self.bricks or () if self.file(b) is None] if self.bricks is not None else ["every brick"]
        if self.calibration is None and missing:
            raise ValueError(f"expected `calibration`, a JSONL file of texts, for {', '.join(missing)} or for the step")
        return self

    def file(self, brick: str) -> str | None:
        """Return the file of a brick's texts: the brick's own, or the step's."""
        entry = self.entry(brick)
        return (entry.calibration if isinstance(entry, CalibrationEntry) else None) or self.calibration

    @property
    def count(self) -> int:
        """Number of listed bricks; 2 if the step takes all of them."""
        return len(self.bricks) if self.bricks else 2

    def warnings(self, names: Sequence[str]) -> Iterator[str]:
        """Yield a warning for each file of texts that stands for several bricks, if the method says what that does."""
        for file in self.inputs() if self.same_texts else ():
            if len(bricks := [name for name in names if self.file(name) == file]) > 1:
                yield f"{file} calibrates {', '.join(bricks)}: {self.same_texts}; give each brick texts of its own task"

    def inputs(self) -> list[str]:
        """Return the files of texts."""
        files = {self.calibration} if self.bricks is None else {self.file(brick) for brick in self.bricks}
        return sorted(file for file in files if file)

    def rows(self, context: MergeContext, brick: str) -> tuple[list[TextRow], str]:
        """Return a brick's texts as tokens, and the cache key of what the brick's model measures on them."""
        file = self.file(brick)
        assert file is not None
        return self.rows_of(file, context, brick)
