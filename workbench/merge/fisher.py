"""Fisher: a mean that weights each element by how much each brick's predictions depend on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from safetensors import safe_open

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.merge.measuring.calibration import Calibrated, average, checked_weights, norm_report
from workbench.models.architecture import counterpart
from workbench.models.layout import Model
from workbench.models.texts import TextRow, log_likelihood
from workbench.steps import Block, Group, Laws, Measured, MergeContext, Prepared, register
from workbench.steps.fields import Real
from workbench.weights.device import free_models
from workbench.weights.header import is_whole, save_tensors

if TYPE_CHECKING:
    from torch import Tensor


@register
class Fisher(Calibrated):
    """The mean of the bricks' weights, weighted element by element by their Fisher information (Matena & Raffel 2022).

    An element's weight is the brick's empirical Fisher information on calibration texts: the mean squared gradient of a text's
    log-likelihood given its prompt. Tensors that the live model does not have in this shape get the plain weighted mean.
    """

    paper = "Matena & Raffel 2022, Merging models with Fisher-weighted averaging, arXiv 2111.09832"
    formula = "Δ = Σ wᵢFᵢτᵢ / Σ wᵢFᵢ,  Fᵢ = max(f / mean of f over the model, floor),  f = mean (∇ log p)²"
    laws = Laws(zero_is_base=False, memory="model", needs="model")

    merge: Literal["fisher"]
    floor: Real = Field(1e-6, gt=0)
    """Lower bound on the Fisher information of an element, relative to its mean over the brick's model."""

    def measure_bytes(self, model: Model) -> int:
        """Return the size of the weights and the sums of squared gradients, of the largest tensor's gradients, and of a text's loss.

        Tied embeddings have a gradient of the rows, one of the head, and their sum.
        """
        sizes = [4 * spec.numel for spec in model.weights.specs.values()]
        return 2 * sum(sizes) + 3 * max(sizes) + 5 * model.logits_bytes(self.max_length)

    def tensor_bytes(self, model: Model, tensor: str, bricks: int) -> int:
        """Return the size of all bricks' Fisher information for one tensor, and of their sum."""
        return 4 * model.weights.specs[tensor].numel * (bricks + 1)

    def measure(self, context: MergeContext) -> Measured:
        """Measure the Fisher information of each brick, or find it in the cache."""
        diagonals, record = {}, {}
        for brick in context.bricks:
            rows, key = self.rows(context, brick)
            file = context.cache / "fisher" / f"{key}.safetensors"
            if not is_whole(file):
                found = information(context, brick, rows)
                free_models(context.base.weights)  # the file is assembled in memory
                _save(found, file)
                del found  # the next brick's model is built before its own is assigned
            diagonals[brick] = Diagonal.open(file)
            record[brick] = {"file": self.file(brick), "texts": len(rows), "tensors": len(diagonals[brick].names)}
        return Measured(diagonals, {"calibration": record})

    def report(self, notes: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
        """Return which tensors got the plain weighted mean."""
        return {"averaged": norm_report(notes)["averaged"]}

    def prepare(self, group: Group) -> Prepared:
        """Return a function that computes Σ wFτ / Σ wF element by element."""
        diagonals: list[Diagonal] = [group.survey[brick] for brick in group.bricks]
        if any(group.tensor not in diagonal.names for diagonal in diagonals):
            return average(group, method="fisher")
        weights = checked_weights(group, "fisher")
        used = [(i, w) for i, w in enumerate(weights) if w]
        if len(used) == 1:
            return average(group, method="fisher")
        shares = [diagonals[i].load(group).clamp_min(self.floor).mul_(w) for i, w in used]
        total = shares[0].clone()
        for share in shares[1:]:
            total.add_(share)
        for share in shares:
            share.div_(total)

        def delta(block: Block) -> Tensor:
            stop = block.start + block.base.shape[0]
            result = torch.zeros_like(block.base)
            for (i, _), share in zip(used, shares, strict=True):
                result.addcmul_(block.deltas[i], share[block.start : stop])
            return result

        return delta


@dataclass(frozen=True)
class Diagonal:
    """A cached file with a brick's Fisher information, relative to its mean over the model."""

    file: Path
    names: frozenset[str]

    @classmethod
    def open(cls, file: Path) -> Diagonal:
        """Open a file that `Fisher.measure` wrote."""
        with safe_open(file, "pt") as opened:
            return cls(file, frozenset(opened.keys()))

    def load(self, group: Group) -> Tensor:
        """Return the values of the group's tensor [rows, cols]."""
        with safe_open(self.file, "pt") as opened:
            value: Tensor = opened.get_tensor(group.tensor)
        return value.view(group.spec.rows, group.spec.cols).to(group.device)


def information(context: MergeContext, brick: str, rows: Sequence[TextRow]) -> dict[str, Tensor]:
    """Return the mean over texts of the squared gradient of log p(answer | prompt), divided by its mean over the model.

    Returns:
        Tensor name -> values in the shape of the tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = context.live(brick)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def square(name: str, parameter: Tensor) -> None:  # runs as soon as a gradient exists, and frees it
        assert parameter.grad is not None
        sums[name].addcmul_(parameter.grad, parameter.grad)
        parameter.grad = None

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(square, name))
    for i, row in enumerate(rows):
        context.progress(i, len(rows), f"{brick}: Fisher information")
        log_likelihood(model, row, context.device).backward()  # type: ignore[no-untyped-call]
    context.progress(len(rows), len(rows), f"{brick}: Fisher information")
    mean = sum(float(t.double().sum()) for t in sums.values()) / sum(t.numel() for t in sums.values())
    if not 0 < mean < float("inf"):
        raise WorkbenchError(
            f"brick '{brick}': the mean squared gradient on its calibration texts is {mean}, expected a positive number",
            "Train or fetch the brick again.",
        )
    # transformers splits and renames the values as it does saved weights, so they come under the tensor names on disk.
    relative = {name: total.div_(mean) for name, total in sums.items()}
    first = {id(p): name for name, p in model.named_parameters()}
    live = {name: relative[first[id(p)]] for name, p in model.named_parameters(remove_duplicate=False)}
    saved = revert_weight_conversion(model, live)
    by_name = {}
    for name, spec in context.base.weights.specs.items():
        stored = counterpart(name, saved)
        if stored is not None and tuple(saved[stored].shape) == spec.shape:
            by_name[name] = saved[stored]
    return by_name


def _save(values: Mapping[str, Tensor], file: Path) -> None:
    """Write values to a file; tensors that share storage are copied, because safetensors refuses them."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in values.items():
        contiguous = value.detach().cpu().contiguous()
        storage = contiguous.untyped_storage().data_ptr()
        tensors[name] = contiguous.clone() if storage in storages else contiguous
        storages.add(storage)
    save_tensors(tensors, file)
