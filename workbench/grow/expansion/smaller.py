"""Plan of a model with fewer neurons, attention heads or channels of the residual stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from workbench.activations.importance import channel_strengths, input_strengths, scale_ratios
from workbench.activations.sites import Site
from workbench.errors import InvalidRecipeError, WorkbenchError
from workbench.grow.expansion.parts import DecoderParts
from workbench.grow.expansion.resize import Resize, StreamNorms, resize_stream, stream_norms
from workbench.grow.mixtures.gates import live_modules
from workbench.lazy import np, torch
from workbench.models.layout import Model
from workbench.models.texts import TextRow
from workbench.steps import Axis

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

Units = Literal["neurons", "heads"]
ONLY_LAYERS = "Prune `layers` instead."


class Smaller(Resize):
    """The tensors and sizes of a model with fewer neurons, heads or channels."""

    def __init__(self, model: Model) -> None:
        try:
            super().__init__(DecoderParts(model, "prune", ONLY_LAYERS))
        except WorkbenchError as error:
            raise self._refusal(model, error) from None

    def keep(self, units: Units, share: float, kept: NDArray[np.int64] | None) -> None:
        """Remove units from every layer.

        Args:
            units: "neurons", or "heads" for key-value heads with their query heads.
            share: Share of the units to remove.
            kept: Numbers of the units that remain in each layer [layers, units]; None keeps the first ones.

        Raises:
            WorkbenchError: If the architecture does not allow it, or the share removes nothing or everything.
        """
        try:
            self._keep(units, share, kept)
        except WorkbenchError as error:
            raise self._refusal(self.parts.model, error) from None

    def _keep(self, units: Units, share: float, kept: NDArray[np.int64] | None) -> None:
        depth = self.parts.model.layout.depth
        if units == "neurons":
            for layer in range(depth):
                self.parts.model.layout.mlp_out(layer)  # refuses mixtures: each expert would need a ranking of its own
            parts, before = self.feed_forward()
            count = before - count_removed(units, share, before, "neurons")
            self.count_neurons(parts, before, count)
            kept = np.tile(np.arange(count), (depth, 1)) if kept is None else kept
            for part, numbers in zip(parts, kept, strict=True):
                self.neurons(part, Axis(numbers), Axis(numbers))
            return
        heads = self.heads(ONLY_LAYERS)
        count = heads.groups - count_removed(units, share, heads.groups, "key-value heads")
        if wide := self.parts.head_norms(heads.size):
            raise InvalidRecipeError(
                f"grow prune: {wide[0]} normalizes over all heads, so fewer would change the others", ONLY_LAYERS
            )
        self.check_head_size(heads, "Prune `layers` or `neurons` instead.", self.head_counts(heads, count))
        kept = np.tile(np.arange(count), (depth, 1)) if kept is None else kept
        for layer, numbers in enumerate(kept):
            self.attention(layer, heads, partial(_channels, numbers))
        self.resize_heads(heads, count)

    def keep_channels(self, share: float, kept: NDArray[np.int64] | None, scales: Mapping[str, float] | None) -> None:
        """Remove channels from the residual stream. Heads that are removed in the same step are removed before.

        Args:
            share: Share of the channels to remove.
            kept: Numbers of the channels that remain [channels], in order; None keeps the first ones.
            scales: Live name of a norm -> factor of its weight; None takes the factor for removed channels of zero.

        Raises:
            WorkbenchError: If the architecture does not allow it, or the share removes nothing or everything.
        """
        try:
            count, norms = self._channels_after(share)
            axis = Axis(np.arange(count) if kept is None else kept)
            resize_stream(self, norms, axis, self.heads(ONLY_LAYERS).size, scales)
        except WorkbenchError as error:
            raise self._refusal(self.parts.model, error) from None

    def _channels_after(self, share: float) -> tuple[int, StreamNorms]:
        """Return how many channels remain, and the norms of the residual stream."""
        heads, before, instead = (
            self.heads(ONLY_LAYERS),
            int(self.parts.size("hidden_size") or 0),
            "Prune `layers` or `neurons` instead.",
        )
        # Some architectures divide the channels by the number of query heads.
        step = math.lcm(8, int(self.config.get("num_attention_heads", heads.queries)))
        count = step * int((1 - share) * before / step + 0.5)
        if not 0 < count < before:
            raise InvalidRecipeError(
                f"grow prune: `hidden: {share:g}` leaves {count} of {before} channels, in multiples of {step}; expected some to go and some "
                "to stay",
                f"A share of {step / before:.2g} removes {step} channels.",
            )
        names = ("num_attention_heads", "num_key_value_heads")
        sizes: dict[str, int] = {key: int(self.config[key]) for key in names if key in self.config}
        sizes |= {getattr(self.parts.parsed, "attribute_map", {}).get("hidden_size", "hidden_size"): count}
        self.check_head_size(heads, instead, sizes)
        return count, stream_norms(self.parts, {"hidden_size": count, "head_dim": heads.size, **sizes}, instead, means=True)

    def strongest_channels(
        self, share: float, live: PreTrainedModel, rows: Sequence[TextRow], progress: Callable[[int, int], None]
    ) -> tuple[Tensor, float, dict[str, float]]:
        """Return the channels that remain, their share of the total importance, and the factor of every norm's weight.

        Args:
            share: Share of the channels to remove.
            live: The live model.
            rows: The texts as tokens.
            progress: Receives (texts done in both passes, texts of both).
        """
        count, norms = self._channels_after(share)
        texts = 2 * len(rows)
        strengths = channel_strengths(live, list(norms.centered), rows, lambda done, _: progress(done, texts))
        kept = strengths.argsort(descending=True, stable=True)[:count].sort().values
        scales = scale_ratios(live, norms.centered, kept, rows, lambda done, _: progress(len(rows) + done, texts))
        return kept, round(float(strengths[kept].sum() / strengths.sum()), 4), scales

    def strongest(self, units: Units, share: float, live: PreTrainedModel, rows: Sequence[TextRow]) -> tuple[Tensor, list[float]]:
        """Return the units that remain in each layer [layers, units], and the share of each layer's total importance that they have.

        Args:
            units: "neurons", or "heads" for key-value heads with their query heads.
            share: Share of the units to remove.
            live: The live model.
            rows: The texts as tokens.
        """
        model, depth = self.parts.model, self.parts.model.layout.depth
        writers = [model.layout.mlp_out(i) if units == "neurons" else model.layout.attention_out(i) for i in range(depth)]
        modules = live_modules(model, writers)
        sites = [
            Site(layer, "neurons", modules[name], live.get_submodule(modules[name]), self.parts.sizes(self.parts.linear(name))[1])
            for layer, name in enumerate(writers)
        ]
        strengths = torch.stack(input_strengths(live, sites, rows))
        if units == "heads":
            strengths = strengths.reshape(depth, self.heads(ONLY_LAYERS).groups, -1).sum(-1)
        count = strengths.shape[1] - count_removed(units, share, strengths.shape[1], units)
        kept = strengths.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
        shares = strengths.gather(1, kept).sum(1) / strengths.sum(1).clamp_min(1e-300)
        return kept, [round(value, 4) for value in shares.tolist()]

    @staticmethod
    def _refusal(model: Model, error: WorkbenchError) -> WorkbenchError:
        """Return an error of the step that names the architecture."""
        message = error.message.removeprefix("grow prune: ")
        named = message if "model_type" in message else f"model_type {model.config.get('model_type')}: {message}"
        return InvalidRecipeError(f"grow prune: {named}", error.hint or ONLY_LAYERS)


def count_removed(name: str, wanted: float, total: int, units: str) -> int:
    """Return how many of `total` units to remove, for a number or a share.

    Raises:
        WorkbenchError: If none would be removed, or none would remain.
    """
    count = wanted if isinstance(wanted, int) else int(wanted * total + 0.5)
    if count < 1:
        raise InvalidRecipeError(
            f"grow prune: `{name}: {wanted:g}` removes none of {total} {units}", f"A share of {1 / total:.2g} removes one."
        )
    if count >= total:
        raise InvalidRecipeError(
            f"grow prune: `{name}: {wanted:g}` removes all {total} {units}; at least one must remain",
            f"Choose {total - 1} {units} or fewer, or a smaller share." if total > 1 else "This model cannot lose any.",
        )
    return count


def _channels(numbers: NDArray[np.int64], each: int) -> Axis:
    """Return the axis that keeps some groups of `each` channels."""
    return Axis((numbers[:, None] * each + np.arange(each)).reshape(-1))
