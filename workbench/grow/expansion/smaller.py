"""Plan of a model with fewer neurons, attention heads or channels of the residual stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from workbench.activations.importance import channel_strengths, input_statistics, scale_ratios
from workbench.activations.sites import Site
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.lazy import np, torch
from workbench.grow.expansion.parts import DecoderParts
from workbench.grow.expansion.resize import Resize, StreamNorms, resize_stream, stream_norms
from workbench.grow.mixtures.gates import live_modules
from workbench.models.layout import Model
from workbench.models.texts import TextRow
from workbench.steps import Axis

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

Units = Literal["neurons", "heads"]
UNITS: tuple[Units, ...] = ("neurons", "heads")
ONLY_LAYERS = "Prune `layers` instead."
RIDGE = 1e-2
"""Weight of the change of an output matrix, relative to the mean square of its inputs."""


class Smaller(Resize):
    """The tensors and sizes of a model with fewer neurons, heads or channels."""

    def __init__(self, model: Model) -> None:
        try:
            super().__init__(DecoderParts(model, "prune", ONLY_LAYERS))
        except WorkbenchError as error:
            raise self._refusal(model, error) from None

    def keep_units(self, units: Units, share: float, kept: NDArray[np.int64] | None) -> None:
        """Remove units from every layer; `strongest` gives the matrices out of those that remain.

        Args:
            units: "neurons", or "heads" for key-value heads with their query heads.
            share: Share of the units to remove.
            kept: Numbers of the units that remain in each layer [layers, units]; None keeps the first ones.

        Raises:
            WorkbenchError: If the architecture does not allow it, or the share removes nothing or everything.
        """
        try:
            self._keep_units(units, share, kept)
            for name in self._writers(units):
                self.tensors[name] = replace(self.tensors[name], fitted=True)
        except WorkbenchError as error:
            raise self._refusal(self.parts.model, error) from None

    def _keep_units(self, units: Units, share: float, kept: NDArray[np.int64] | None) -> None:
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

    def strongest(
        self, units: Units, share: float, live: PreTrainedModel, rows: Sequence[TextRow]
    ) -> tuple[Tensor, list[float], dict[str, Tensor]]:
        """Return the units that remain, and the matrices out of them, which do the work of the others as far as these depend on them.

        Args:
            units: "neurons", or "heads" for key-value heads with their query heads.
            share: Share of the units to remove.
            live: The live model before the step.
            rows: The texts as tokens.

        Returns:
            Numbers of the units that remain in each layer [layers, units], the share of each layer's total importance that they have, and
            tensor name -> the matrix out of them [hidden, inputs that remain], float32.

        Raises:
            WorkbenchError: If an activation is NaN or infinite.
        """
        sites = self._sites(units, live)
        kept: list[Tensor] = []
        shares: list[float] = []
        fitted: dict[str, Tensor] = {}
        for name, site, found in zip(self._writers(units), sites, input_statistics(live, sites, rows), strict=True):
            groups = site.units if units == "neurons" else self.heads(ONLY_LAYERS).groups
            strengths, moments = found[0].reshape(groups, -1).sum(1), found[1]
            numbers = (
                strengths.argsort(descending=True, stable=True)[: groups - count_removed(units, share, groups, units)]
                .sort()
                .values
            )
            columns = torch.from_numpy(_channels(numbers.numpy(), site.units // groups).index).to(moments.device)
            fitted[name] = refitted(site.columns().T, moments, columns).float().cpu()
            if not bool(torch.isfinite(fitted[name]).all()):
                raise WorkbenchError(
                    f"grow prune: the {units} of layer {site.layer} are NaN or infinite on the texts",
                    "Look at the model: workbench doctor; or prune `layers` by a list.",
                )
            kept.append(numbers)
            shares.append(round(float(strengths[numbers].sum() / strengths.sum().clamp_min(1e-300)), 4))
        return torch.stack(kept), shares, fitted

    def stored(self, fitted: Mapping[str, Tensor], channels: Tensor | None) -> dict[str, Tensor]:
        """Return the matrices out of units as their tensors are stored, with the channels that remain; None: all channels."""
        rows = {name: matrix if channels is None else matrix[channels] for name, matrix in fitted.items()}
        return {name: matrix.T.contiguous() if self.parts.linear(name).transposed else matrix for name, matrix in rows.items()}

    def _writers(self, units: Units) -> list[str]:
        """Return the matrix out of the units of each layer."""
        layout = self.parts.model.layout
        return [layout.mlp_out(i) if units == "neurons" else layout.attention_out(i) for i in range(layout.depth)]

    def _sites(self, units: Units, live: PreTrainedModel) -> list[Site]:
        """Return these matrices as modules of the live model."""
        writers = self._writers(units)
        modules = live_modules(self.parts.model, writers)
        return [
            Site(layer, "neurons", modules[name], live.get_submodule(modules[name]), self.parts.sizes(self.parts.linear(name))[1])
            for layer, name in enumerate(writers)
        ]

    @staticmethod
    def _refusal(model: Model, error: WorkbenchError) -> WorkbenchError:
        """Return an error of the step that names the architecture."""
        message = error.message.removeprefix("grow prune: ")
        named = message if "model_type" in message else f"model_type {model.config.get('model_type')}: {message}"
        return InvalidRecipeError(f"grow prune: {named}", error.hint or ONLY_LAYERS)


def refitted(matrix: Tensor, moments: Tensor, kept: Tensor) -> Tensor:
    """Return the columns of an output matrix that remain, with what the outputs lose without the others added where inputs tell it.

    The columns V minimize E ‖W a − V a_kept‖² + r ‖V − W_kept‖², so that V = W_kept + W_gone M_gone,kept (M_kept + rI)⁻¹ with M = E a aᵀ. It is
    the update of Optimal Brain Surgeon for inputs that go together (Hassibi et al. 1993; of language models, Ling et al. 2024, SlimGPT).

    Args:
        matrix: W [out, in].
        moments: M [in, in].
        kept: Numbers of the columns that remain.

    Returns:
        V [out, kept], float64.
    """
    gone = torch.ones(len(moments), dtype=torch.bool, device=kept.device)
    gone[kept] = False
    inner, across = moments[kept][:, kept].double(), moments[kept][:, gone].double()
    inner.diagonal().add_(RIDGE * float(moments.diagonal().double().mean().clamp_min(1e-30)))
    columns: Tensor = matrix[:, kept].double() + matrix[:, gone].double() @ torch.linalg.solve(inner, across).T
    return columns


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
