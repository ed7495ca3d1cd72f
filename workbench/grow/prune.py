"""Prune: remove layers, neurons, attention heads or channels that texts need least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from workbench.activations.importance import block_influence, losses_without
from workbench.ground.errors import InvalidRecipeError
from workbench.ground.files import file_digest
from workbench.ground.results import JsonObject
from workbench.grow.expansion.layers import in_order, removable, reordered
from workbench.grow.expansion.parts import check_shapes
from workbench.grow.expansion.smaller import UNITS, Smaller, count_removed
from workbench.grow.mixtures.texts import TextMethod, load_measured, save_measured
from workbench.models.layout import Model
from workbench.models.texts import TextRow
from workbench.steps import GrowContext, Grown, Growth, Learns, Measured, Preserves, Recovery, register
from workbench.steps.fields import Real, Whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MeasuredPrune(Measured):
    """The parts of a model that remain, and the matrices out of neurons and heads that are fitted to the outputs of all of them.

    Attributes:
        gone: Layers to remove.
        kept: "neurons" and "heads" -> numbers of the units that remain in each layer, in order [layers, units]. The units of "heads"
            are key-value heads. "hidden" -> numbers of the channels that remain [channels].
    """

    gone: tuple[int, ...] = ()
    kept: Mapping[str, Tensor] = field(default_factory=dict)


class _Saved(JsonObject):
    """A cached measurement, beside its tensors."""

    gone: list[int]
    record: dict[str, object]


@register
class Prune(TextMethod):
    """Remove the layers, neurons, heads or channels that texts need least (Men et al. 2024, ShortGPT; Muralidharan et al. 2024, Minitron).

    `layers` removes whole layers: those that a list names, or a number or share of them with the lowest block influence or the lowest
    loss without them. `neurons` and `heads` remove the same share of every layer, because config.json has one number for all layers;
    heads go in groups, a key-value head with its query heads. The matrices out of those that remain are fitted to the outputs with all of
    them, by least squares on the texts (Ling et al. 2024, SlimGPT). `hidden` removes channels of the residual stream from every tensor. Norms
    then run over fewer channels: each norm's weight is multiplied by the mean ratio of the scales of the channels that remain and of all,
    which keeps the scale of its output. All importance is measured on the model before the step.

    `train` then trains all parameters of the smaller model, on the distributions of the model before the step unless it says otherwise.
    """

    paper = "Men et al. 2024, ShortGPT, arXiv 2403.03853; Song et al. 2024, SLEB, arXiv 2402.09025; Muralidharan et al. 2024, Minitron, arXiv 2407.14679"
    formula = (
        "influence of a layer: 1 − E cos(x_in, x_out); by perplexity: one after the other, the layer without which the loss is lowest; "
        "importance of neuron i: E |a_i| ‖W_down[:, i]‖; of a key-value head: the same of W_o, summed over the channels of its query heads; "
        "W_kept ↦ W_kept + W_gone M_gone,kept (M_kept + rI)⁻¹, M = E a aᵀ, r a hundredth of its mean diagonal; "
        "of channel c: Σ over norms of E |norm(x)_c|; g ↦ g[kept] E (rms(x[kept]) / rms(x)), ε ↦ ε d/k"
    )
    preserves: ClassVar[Preserves] = "no"
    learns: ClassVar[Learns] = "when_selected"
    builds: ClassVar[bool] = True
    version = 3  # what remains is fitted to the outputs with all neurons and heads
    removes: ClassVar[bool] = True
    keyed_if_set: ClassVar[frozenset[str]] = frozenset({"hidden"})

    grow: Literal["prune"]
    layers: Whole | Real | tuple[Whole, ...] | None = None
    """Layers to remove: a number of layers, a share between 0 and 1, or a list of their indices; negative indices count from the end.
    A share is rounded to the nearest number."""
    by: Literal["influence", "perplexity"] | None = None
    """How a number or share of layers is chosen. `influence` (if omitted): the layers that turn the hidden state least, in one pass over
    the texts. `perplexity`: one after the other, the layer without which the loss on the texts is lowest; that takes about half as many
    passes as the layers that remain, for each layer that is removed."""
    neurons: Real | None = Field(None, gt=0, lt=1)
    """Share of the neurons of every feed-forward layer to remove: those with the lowest mean |activation| times output norm."""
    heads: Real | None = Field(None, gt=0, lt=1)
    """Share of the key-value heads of every layer to remove, with their query heads: those with the lowest mean |activation| times output
    norm, summed over their channels."""
    hidden: Real | None = Field(None, gt=0, lt=1)
    """Share of the channels of the residual stream (hidden_size) to remove: those with the lowest mean |output| of the norms. What
    remains is a multiple of 8 and of the number of heads."""
    calibration: str | None = None
    """JSONL file of texts that importance is measured on, relative to the project: {"text":} or {"prompt":, "completion":} a line. A list
    of layers needs none."""
    train: Recovery | None = None
    """Train all parameters of the smaller model. Example: {data: FILE, steps: 100}."""

    _measured: MeasuredPrune | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check_fields(self) -> Prune:
        if self.layers is None and not self._shrinks():
            raise ValueError("expected at least one of `layers: 8`, `neurons: 0.25`, `heads: 0.25` and `hidden: 0.25`")
        if isinstance(self.layers, tuple):
            if not self.layers:
                raise ValueError("layers: expected at least one layer to remove, found an empty list")
            if self.by is not None:
                raise ValueError(
                    f"by: {self.by} chooses a number or share of layers, and `layers` names them; remove one of the two"
                )
        elif isinstance(self.layers, float) and not 0 < self.layers < 1:
            raise ValueError(f"layers: expected a share between 0 and 1, a number of layers, or a list; found {self.layers}")
        elif isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"layers: expected 1 or more layers to remove, found {self.layers}")
        elif self.layers is None and self.by is not None:
            raise ValueError(f"by: {self.by} chooses layers, and `layers` is not set")
        if self.measures() != (self.calibration is not None):
            raise ValueError(
                "calibration: importance is measured on texts; expected a JSONL file"
                if self.measures()
                else "calibration: a list of layers is not measured, so the texts are not used; remove the field"
            )
        return self

    def measures(self) -> bool:
        """Return True unless only a list of layers is removed."""
        return self._shrinks() or isinstance(self.layers, (int, float))

    def _shrinks(self) -> bool:
        """Return whether the tensors of the layers that remain get smaller."""
        return self.neurons is not None or self.heads is not None or self.hidden is not None

    def measure(self, model: Model, context: GrowContext) -> MeasuredPrune:
        """Measure the importance of layers, neurons and heads on the model before the step. The result is cached."""
        depth = model.layout.depth
        if (cached := load_measured(context, _Saved)) is not None:
            tensors, saved = cached
            if len(removable(model.config, depth, saved.gone, depth)) == len(saved.gone):
                remain = {name: tensors.pop(name) for name in (*UNITS, "hidden") if name in tensors}
                return MeasuredPrune(tensors, saved.record, tuple(saved.gone), remain)
        assert self.calibration is not None
        rows = self.rows(self.calibration, model, context)
        record: dict[str, object] = {
            "calibration": {
                "file": self.calibration,
                "digest": file_digest(context.project / self.calibration),
                "texts": len(rows),
                "tokens": sum(len(row.tokens) for row in rows),
            }
        }
        live, gone = context.live({}), tuple[int, ...]()
        kept: dict[str, Tensor] = {}
        fitted: dict[str, Tensor] = {}
        if isinstance(self.layers, (int, float)):
            gone, least = self._least(live, model, rows, context)
            record |= least
        if self._shrinks():
            plan = Smaller(model)
            for units in UNITS:
                if (share := getattr(self, units)) is not None:
                    context.progress(0, 1, f"activations of {units}")
                    kept[units], record[f"{units}_kept_strength"], found = plan.strongest(units, share, live, rows)
                    fitted |= found
            if self.hidden is not None:
                if self.heads is not None:
                    plan.keep_units("heads", self.heads, None)
                kept["hidden"], record["channels_kept_strength"], record["norm_scales"] = plan.strongest_channels(
                    self.hidden, live, rows, lambda done, total: context.progress(done, total, "channels")
                )
            absent = self._gone(model) if isinstance(self.layers, tuple) else gone
            order = [layer for layer in range(depth) if layer not in absent]
            remaining = in_order(model.layout, order, lambda name, _new: Grown(name))
            moved = {grown.source: name for name, grown in remaining.items()}
            fitted = {moved[n]: tensor for n, tensor in plan.stored(fitted, kept.get("hidden")).items() if n in moved}
        save_measured(context, {**kept, **fitted}, {"gone": list(gone), "record": {"importance": record}})
        return MeasuredPrune(fitted, {"importance": record}, gone, kept)

    def settled(self, measured: Measured) -> Prune:
        """Return the step with the parts that remain."""
        if not self.measures():
            return self
        assert isinstance(measured, MeasuredPrune)
        step = self.model_copy()
        step._measured = measured
        return step

    def expand(self, model: Model) -> Growth:
        """Plan the smaller model. Until importance is measured, the first parts of each kind remain: the sizes are the same.

        Raises:
            WorkbenchError: If a layer does not exist, nothing would be removed or nothing would remain, or the architecture does not
                allow other numbers of neurons, heads or channels.
        """
        depth, specs = model.layout.depth, model.weights.specs
        gone = self._gone(model)
        order = [layer for layer in range(depth) if layer not in gone]
        tensors, config, record = {name: Grown(name) for name in specs}, model.config, dict[str, object]()
        if self._shrinks():
            plan, measured = Smaller(model), self._measured
            for units in UNITS:
                if (share := getattr(self, units)) is not None:
                    plan.keep_units(units, share, measured.kept[units].numpy() if measured else None)
            if self.hidden is not None:
                kept, scales = (
                    (measured.kept["hidden"].numpy(), measured.record["importance"]["norm_scales"]) if measured else (None, None)
                )
                plan.keep_channels(self.hidden, kept, scales)
            resized = plan.growth("narrowed")
            tensors, config, record = dict(resized.tensors), resized.config, dict(resized.record)
            check_shapes(config, {n: g.spec(specs[g.source]) for n, g in tensors.items()}, "prune")
        if gone:
            record = {"layers": [depth, len(order)], **record}
            if isinstance(self.layers, tuple) or self._measured is not None:  # else it is not known yet which layers go
                record |= {"order": order, "gone_layers": sorted(gone)}
            planned = tensors
            tensors = in_order(model.layout, order, lambda name, _new: planned[name])
            config = reordered(config, depth, order, "prune")
        after = [grown.spec(specs[grown.source]) for grown in tensors.values()]
        record |= {
            "parameters": [sum(spec.numel for spec in specs.values()), sum(spec.numel for spec in after)],
            "bytes": [sum(spec.nbytes for spec in specs.values()), sum(spec.nbytes for spec in after)],
        }
        return Growth(tensors, config, record)

    def _gone(self, model: Model) -> set[int]:
        """Return the layers to remove; before importance is measured, the last ones that can go."""
        if self.layers is None:
            return set()
        depth = model.layout.depth
        if isinstance(self.layers, tuple):
            if bad := [layer for layer in self.layers if not -depth <= layer < depth]:
                raise InvalidRecipeError(f"grow prune: layer {bad[0]} does not exist; the model has layers 0..{depth - 1}")
            gone = [layer % depth for layer in self.layers]
            if twice := [layer for number, layer in enumerate(gone) if layer in gone[:number]]:
                raise InvalidRecipeError(f"grow prune: `layers` names layer {twice[0]} twice", "Name each layer once.")
            if len(gone) == depth:
                raise InvalidRecipeError(f"grow prune: `layers` names all {depth} layers; at least one must remain")
            return set(gone)
        count = count_removed("layers", self.layers, depth, "layers")
        return set(self._measured.gone if self._measured else removable(model.config, depth, reversed(range(depth)), count))

    def _least(
        self, live: PreTrainedModel, model: Model, rows: Sequence[TextRow], context: GrowContext
    ) -> tuple[tuple[int, ...], dict[str, object]]:
        """Return the layers that the texts need least, and the record of the measurement; of equal layers the first one goes.

        The last layer with attention of a hybrid model stays, and the record names it where it was among the least.
        """
        assert isinstance(self.layers, (int, float))
        depth = model.layout.depth
        count = count_removed("layers", self.layers, depth, "layers")
        if self.by != "perplexity":
            influence = block_influence(
                live, depth, rows, context.device, lambda done, total: context.progress(done, total, "influence of layers")
            )
            record: dict[str, object] = {"by": "influence", "influence": [round(value, 6) for value in influence.tolist()]}
            ranking = influence.argsort(stable=True).tolist()
            gone = removable(model.config, depth, ranking, count)
            stays = [layer for layer in ranking[:count] if layer not in gone]
            return tuple(gone), record | ({"last_attention": stays} if stays else {})
        gone, losses = list[int](), list[float]()
        for number in range(count):

            def progress(done: int, total: int, number: int = number) -> None:
                context.progress(done, total, f"losses without a layer, {number + 1} of {count}")

            found = losses_without(live, depth, rows, gone, progress)
            losses += [] if losses else [found.loss]
            ranking = sorted(found.without, key=lambda layer: (found.without[layer], layer))
            gone = removable(model.config, depth, [*gone, *ranking], number + 1)
            least = gone[-1]
            losses.append(found.without[least])
        return tuple(gone), {"by": "perplexity", "removed": gone, "losses": [round(loss, 6) for loss in losses]}
