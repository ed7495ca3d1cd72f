"""The neurons of a model: which tensors depend on their number, found by building the model with other sizes in config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.ground.errors import InvalidRecipeError
from workbench.grow.expansion.parts import NOT_BUILT, DecoderParts, check_builds, with_text
from workbench.models.skeleton import skeleton

if TYPE_CHECKING:
    from torch import nn

NEURONS = (
    "moe_intermediate_size",
    "expert_dim",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "decoder_ffn_dim",
    "intermediate_size_mlp",
    "prefix_dense_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
)
"""Fields of config.json with a number of neurons."""


@dataclass(frozen=True)
class FeedForward:
    """Neurons of a dense layer, of an expert, or of each expert of a layer whose matrices are stacked in one tensor.

    Attributes:
        field: Field of config.json with their number.
        out: Tensor name of the matrix out of the neurons.
        count: Number of neurons, of each expert.
        axes: Tensor name of `out`, and of each matrix and bias into the neurons -> its axis of neurons, counted from the end: 1 is the last.
        interleaved: Whether the rows of stacked matrices into the neurons alternate, as in gpt_oss.
    """

    field: str
    out: str
    count: int
    axes: Mapping[str, int]
    interleaved: bool = False

    @property
    def is_expert(self) -> bool:
        """Return whether a router selects these neurons."""
        return bool(re.search(r"(?<!shared_)experts\.|block_sparse_moe", self.out))


def feed_forward(parts: DecoderParts) -> list[FeedForward]:
    """Return the feed-forward parts of all layers: those whose tensors have other shapes if config.json states other sizes.

    Raises:
        WorkbenchError: If a tensor that depends on such a size is no matrix of a feed-forward part, or nothing depends on one.
    """
    layout, own, found = parts.model.layout, _shapes(parts.built), list[FeedForward]()
    fields = [f for f in NEURONS if f in parts.text or getattr(parts.parsed, f, None) is not None]
    for field in sorted(fields, key=lambda field: field not in parts.text):  # transformers has second names for some fields
        size = getattr(parts.parsed, field, None)
        other = 2 * size if isinstance(size, int) and size else 16 * int(parts.size("hidden_size") or 0)
        try:
            fields_then = with_text(parts.model.config, neuron_fields(parts, {field: other}))
            probed = _shapes(skeleton(json.dumps(fields_then, sort_keys=True)))
        except NOT_BUILT:  # a field that must fit to others, such as the width of a state-space model
            continue
        groups: dict[str, dict[str, int]] = {}
        known = {name for part in found for name in part.axes}
        for name in (name for name in parts.specs if name not in known):
            for live in parts.places[name]:
                shapes = list(zip(own[live][::-1], probed.get(live, ())[::-1], strict=False))
                if changed := [axis for axis, (one, other_size) in enumerate(shapes, 1) if one != other_size]:
                    parent = re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[0]
                    groups.setdefault(parent, {})[name] = changed[0] if len(changed) == 1 else 0
        for axes in groups.values():
            outs = [n for n in axes if layout.layer(n) is not None and layout.is_ffn_out(n)]
            if len(outs) != 1 or len(axes) < 2 or not all(axes.values()):
                raise InvalidRecipeError(
                    f"grow {parts.step}: {next(n for n in axes if n not in outs)} depends on {field}, and is no known matrix of a "
                    "feed-forward part",
                    parts.hint,
                )
            if norm := next((n for n in axes if parts.norm_of(n)), None):
                raise InvalidRecipeError(
                    f"grow {parts.step}: {norm} normalizes over the neurons, so another number of neurons would change the others",
                    parts.instead,
                )
            module = parts.modules[parts.places[outs[0]][0].rpartition(".")[0]]
            count = parts.specs[outs[0]].shape[-axes[outs[0]]]
            found.append(FeedForward(field, outs[0], count, axes, not getattr(module, "is_concatenated", True)))
    if not found:
        raise InvalidRecipeError(
            f"grow {parts.step}: config.json has no field for the number of neurons of a layer, such as intermediate_size",
            parts.instead,
        )
    return sorted(found, key=lambda part: layout.layer(part.out) or 0)


def neuron_fields(parts: DecoderParts, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the fields of config.json for numbers of neurons. LFM2 computes the number from its field unless another one forbids it."""
    computed = getattr(parts.parsed, "block_auto_adjust_ff_dim", False)
    return {**sizes, **({"block_auto_adjust_ff_dim": False} if computed else {})}


def neurons_with(parts: DecoderParts, found: Sequence[FeedForward], fields: Mapping[str, float]) -> list[int]:
    """Return the number of neurons of each part in the model that transformers builds with these fields of config.json."""
    shapes = _shapes(check_builds(with_text(parts.model.config, fields), parts.step))
    return [shapes[parts.places[part.out][0]][-part.axes[part.out]] for part in found]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
