"""Width: add neurons, attention heads or channels to every layer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from workbench.ground.errors import InvalidRecipeError
from workbench.ground.lazy import np
from workbench.grow.expansion.parts import DecoderParts, check_shapes
from workbench.grow.expansion.resize import Resize, resize_stream, stream_norms
from workbench.models.layout import Model
from workbench.steps import Axis, GrowMethod, Growth, Learns, Preserves, register
from workbench.steps.fields import Whole

_STD = 0.02
"""Standard deviation of random weights if config.json has no initializer_range."""


@register
class Width(GrowMethod):
    """Widen every layer and preserve the function (Chen et al. 2016, Net2Net; Chen et al. 2022, bert2BERT).

    The inputs of new neurons and heads are random or copied. Their outputs are zero, or shared with the originals. New channels
    (`hidden`) are zero in every matrix that writes to the residual stream, and need RMS norms: their weights are scaled by sqrt(d / D)
    and their epsilon by d / D.
    """

    paper = "Chen et al. 2016, Net2Net, arXiv 1511.05641; Chen et al. 2022, bert2BERT, arXiv 2110.07143"
    formula = "W_in ↦ [W_in; N(0, σ²)], W_out ↦ [W_out, 0]; hidden: W_out ↦ [W_out; 0], g ↦ g √(d/D), ε ↦ ε d/D"
    preserves: ClassVar[Preserves] = "approximate"
    learns: ClassVar[Learns] = "after_one_step"
    builds: ClassVar[bool] = True
    random: ClassVar[bool] = True

    grow: Literal["width"]
    neurons: Whole | None = Field(None, ge=1)
    """Total number of neurons of every feed-forward layer after growth (intermediate_size). In a mixture, of every expert that a router
    selects, a multiple of 8; shared experts and dense layers grow by the same factor, rounded up."""
    how: Literal["random", "copy"] = "random"
    """Initialization of new neurons. `random`: random inputs, and outputs of zero. `copy`: copies of old neurons that share the output
    in unequal parts, so that training moves them apart."""
    key_value_heads: Whole | None = Field(None, ge=1)
    """Total number of key-value heads of every layer after growth; each comes with its group of query heads."""
    hidden: Whole | None = Field(None, ge=1)
    """Total number of channels of the residual stream after growth (hidden_size)."""

    @model_validator(mode="after")
    def _check_fields(self) -> Width:
        if self.neurons is None and self.key_value_heads is None and self.hidden is None:
            raise ValueError("expected at least one of `neurons`, `key_value_heads` and `hidden`")
        return self

    def expand(self, model: Model) -> Growth:
        """Plan the wider model.

        Raises:
            WorkbenchError: If a size does not exceed the current one, or the architecture does not allow the growth: unknown
                parts, fused heads, or norms that are no RMS norms.
        """
        plan = _WidthPlan(DecoderParts(model))
        plan.parts.check_unused()
        if self.neurons is not None:
            plan.add_neurons(self.neurons, self.how == "copy")
        if self.key_value_heads is not None:
            plan.add_heads(self.key_value_heads)
        if self.hidden is not None:
            plan.hidden(self.hidden)
        growth = plan.growth("widened")
        check_shapes(growth.config, {n: g.spec(model.weights.specs[g.source]) for n, g in growth.tensors.items()}, "width")
        return growth


class _WidthPlan(Resize):
    """The tensors and sizes of the wider model."""

    @property
    def std(self) -> float:
        """Standard deviation of new random weights."""
        stated = self.parts.text.get("initializer_range")
        return float(stated) if isinstance(stated, int | float) and stated else _STD

    def add_neurons(self, count: int, copied: bool) -> None:
        """Give every feed-forward layer, or expert, `count` neurons; new ones are copies of old ones if `copied`."""
        parts, before = self.feed_forward()
        _check_larger("neurons", before, count)
        if parts[0].is_expert and count % 8:  # transformers multiplies experts together, in rows of 16 bytes
            raise InvalidRecipeError(
                f"grow width: `neurons: {count}`: experts need a multiple of 8",
                f"Set for example `neurons: {-(-count // 8) * 8}`.",
            )
        for part, after in zip(parts, self.count_neurons(parts, before, count), strict=True):
            padded = Axis.padded(part.count, after)
            into, out = _copied_axes(part.count, after) if copied else (padded, padded)
            self.neurons(part, into, out, self.std)

    def add_heads(self, count: int) -> None:
        """Give every layer `count` key-value heads and as many groups of query heads."""
        heads = self.heads("Grow `hidden`.")
        _check_larger("key_value_heads", heads.groups, count)
        self.check_head_size(heads, "Grow `neurons` or `depth`.", self.head_counts(heads, count))
        for layer in range(self.parts.model.layout.depth):
            self.attention(layer, heads, lambda each: Axis.padded(each * heads.groups, each * count), self.std)
        if wide := self.parts.head_norms(heads.size):
            raise InvalidRecipeError(f"grow width: {wide[0]} normalizes over all heads, so new heads would change the old ones")
        self.resize_heads(heads, count)

    def hidden(self, count: int) -> None:
        """Give the residual stream `count` channels."""
        parts = self.parts
        before = int(parts.size("hidden_size") or 0)
        head = int(parts.size("head_dim") or before // int(parts.size("num_attention_heads") or 1))
        _check_larger("hidden", before, count)
        norms = stream_norms(parts, {"hidden_size": count, "head_dim": head}, "Grow `neurons` or `depth`.")
        resize_stream(self, norms, Axis.padded(before, count), head, std=self.std)


def _copied_axes(before: int, count: int) -> tuple[Axis, Axis]:
    """Return the sources of all neurons for the matrices into them, and for the matrix out of them with their shares.

    As in Net2Net, the shares of a neuron and its copies add up to one; here they differ, so that the copies can learn different
    things.
    """
    index = np.concatenate([np.arange(before), np.arange(count - before) % before])
    number = np.arange(count) // before + 1  # 1 for the neuron itself, 2 for its first copy
    total = np.bincount(index, weights=number, minlength=before)
    return Axis(index), Axis(index, (number / total[index]).astype(np.float32))


def _check_larger(field: str, before: int, count: int) -> None:
    """Raise WorkbenchError unless the new size exceeds the current one."""
    if count <= before:
        raise InvalidRecipeError(
            f"grow width: `{field}: {count}`: the model has {before}, expected more", f"Set for example `{field}: {2 * before}`."
        )
