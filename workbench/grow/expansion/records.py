"""Records of growth steps, and what they say in words: results of checks, origins of the parts of a stack, what pruning removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from pydantic import AliasChoices, Field

from workbench.ground.errors import size
from workbench.ground.results import JsonObject, Number


class GrowthCheck(JsonObject):
    """Result of the checks of a growth step, with the fields of the checks that were made."""

    kept: dict[str, int] = {}
    """Kind of tensor in the files, such as `identical` or `new` -> number of tensors."""
    max_logit_difference: Number | None = None
    """Largest difference of two logits before and after growth."""
    same_generation: bool = False
    """True if both models generate the same tokens with a cache."""
    finite_logits: bool = False
    """True if the logits are finite, for methods that promise no more."""
    at_first_without: list[str] = []
    """Added tensors that have no gradient before the first step."""
    new_token_probability: Number | None = None
    """Mean probability of new tokens."""
    reloaded: bool = False
    """True if transformers loads the files."""

    def line(self) -> str:
        """Return the result in one line.

        Example: "259 old tensors are bit-identical, 54 new; logits differ by 0, cached generation agrees; transformers loads it".
        """
        words = {
            "identical": "old tensors are bit-identical",
            "with_additions": "with additions keep their old elements",
            "shortened": "shorter ones keep their other elements",
            "rescaled": "rescaled",
            "new": "new",
            "changed_later": "changed by later steps",
            "trained": "tensors trained",
        }
        parts = [", ".join(f"{self.kept[key]} {text}" for key, text in words.items() if self.kept.get(key))]
        if self.max_logit_difference is not None:
            agrees = ", cached generation agrees" if self.same_generation else ""
            parts.append(f"logits differ by {self.max_logit_difference:.2g}{agrees}")
        elif self.finite_logits:
            parts.append("logits are finite")
        if waiting := self.at_first_without:
            parts.append(
                f"{len(waiting)} of the new tensors ({waiting[0]}) have no gradient until the zeros that follow them are trained"
            )
        if self.new_token_probability:
            parts.append(f"new tokens take {100 * self.new_token_probability:.2g} % of the probability")
        parts += ["transformers loads it"] if self.reloaded else []
        return "; ".join(filter(None, parts))


_Origin = Annotated[str, Field(serialization_alias="from", validation_alias=AliasChoices("from", "origin"))]


class TakenLayers(JsonObject):
    """Layers of a stack from one model."""

    layers: str
    """Numbers of the layers in the result, such as 0-15."""
    source: str
    """The brick, or the configuration so far."""
    origin: _Origin
    """Numbers of the layers there."""

    def source_text(self) -> str:
        """Return the source in words."""
        return f"{_named(self.source)}, {_layers(self.origin)}"


class MergedLayers(JsonObject):
    """Layers of a stack that are a merge."""

    layers: str
    """Numbers of the layers in the result."""
    merge: str
    """Merge method."""
    bricks: dict[str, str]
    """Brick -> numbers of its layers."""
    base: str | None
    """Brick that deltas are taken from; null for the configuration so far."""
    origin: _Origin
    """Numbers of its layers."""

    def source_text(self) -> str:
        """Return the sources in words."""
        bricks = ", ".join(f"{name} {span}" for name, span in self.bricks.items())
        return f"{self.merge} of {bricks}; deltas from {self.base or 'the configuration so far'} {self.origin}"


class MergedPart(JsonObject):
    """A part of a stack outside the layers that is a merge."""

    merge: str
    """Merge method."""
    bricks: list[str]
    """The merged bricks."""
    base: str | None
    """Brick that deltas are taken from; null for the configuration so far."""


class _Stack(JsonObject):
    """Entries of the record of a stack about its sources."""

    blocks: list[MergedLayers | TakenLayers]
    embeddings: str | MergedPart | None = None
    norm: str | MergedPart | None = None
    head: str | MergedPart | None = None
    tokenizer: str | None = None


def stack_parts(record: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield (part of the result, its source) for a step's record or plan row.

    Example: ("layers 0-15", "brick one, layers 0-15"), ("layers 16-23", "ties of one 16-23, two 18-25 on base"), ("head", "brick two").

    Args:
        record: The row of a `grow: stack` step; other steps yield nothing.
    """
    if not record.get("blocks"):
        return
    stack = _Stack.model_validate(record)
    yield from ((_layers(block.layers), block.source_text()) for block in stack.blocks)
    for part, source in (
        ("embeddings", stack.embeddings),
        ("norm", stack.norm),
        ("head", stack.head),
        ("tokenizer", stack.tokenizer),
    ):
        if isinstance(source, MergedPart):
            yield part, f"{source.merge} of {', '.join(source.bricks)}"
        elif source:
            yield part, _named(source)


class _Importance(JsonObject):
    """Importance of the parts of a model on texts, as far as it was measured: of layers `by` influence or perplexity, and of other units."""

    by: str | None = None
    influence: list[Number] = []
    last_attention: list[int] = []
    removed: list[int] = []
    losses: list[Number] = []
    neurons_kept_strength: list[Number] = []
    heads_kept_strength: list[Number] = []
    channels_kept_strength: Number | None = None

    def why(self, gone: Sequence[int]) -> str:
        """Return the importance of removed layers in brackets, or an empty text for a list of layers."""
        if self.by == "influence":
            removed = [value for layer, value in enumerate(self.influence) if layer in gone]
            others = [value for layer, value in enumerate(self.influence) if layer not in gone]
            stays = "".join(f"; {layer} stays as the last layer with attention" for layer in self.last_attention)
            return (
                f" (influence {min(removed):.3g} to {max(removed):.3g}, the others {min(others):.3g} to {max(others):.3g}{stays})"
            )
        if self.by == "perplexity":
            order = ", ".join(map(str, self.removed))
            return f" (in the order {order}; loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g})"
        return ""


class _Pruned(JsonObject):
    """Entries of the record of a pruning: sizes before and after."""

    layers: tuple[int, int] | None = None
    gone_layers: list[int] = []
    neurons: tuple[int, int] | None = None
    key_value_heads: tuple[int, int] | None = None
    hidden: tuple[int, int] | None = None
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    importance: _Importance = _Importance()


def removal_line(record: Mapping[str, object]) -> str | None:
    """Return the sizes of a model before and after pruning, and what was removed, for a step's record or plan row.

    Example: "30 -> 22 layers, removed 12-17, 25-26 (influence 0.0231 to 0.027, the others 0.0271 to 1.01); 134.5 million -> 106.2 million
    parameters, 269 MB -> 212 MB".

    Args:
        record: The row of a `grow: prune` step; None is returned for other steps.
    """
    if record.get("grow") != "prune" or "parameters" not in record:
        return None
    pruned, parts = _Pruned.model_validate(record), []
    measured = pruned.importance
    if pruned.layers:
        gone = f", removed {_spans(pruned.gone_layers)}{measured.why(pruned.gone_layers)}" if pruned.gone_layers else ""
        parts.append("{} -> {} layers".format(*pruned.layers) + gone)
    for sizes, unit, shares in (
        (pruned.neurons, "neurons a layer", measured.neurons_kept_strength),
        (pruned.key_value_heads, "key-value heads", measured.heads_kept_strength),
    ):
        if sizes:
            strength = f" with {100 * min(shares):.0f} to {100 * max(shares):.0f} % of their importance" if shares else ""
            parts.append("{} -> {} {}".format(*sizes, unit) + strength)
    if pruned.hidden:
        share = measured.channels_kept_strength
        strength = "" if share is None else f" with {100 * share:.0f} % of their importance"
        parts.append("{} -> {} channels".format(*pruned.hidden) + strength)
    before, after = pruned.parameters
    parts.append(f"{_count(before)} -> {_count(after)} parameters, " + " -> ".join(map(size, pruned.bytes)))
    return "; ".join(parts)


def _spans(numbers: Sequence[int]) -> str:
    """Return numbers in ascending order with ranges: "3, 12-17"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _count(number: int) -> str:
    """Return a number of parameters: "106 million"."""
    return f"{number / 1e6:,.4g} million" if number >= 1e6 else f"{number:,}"


def _layers(span: str) -> str:
    return f"layer{'s' if '-' in span else ''} {span}"


def _named(source: str) -> str:
    return source if " " in source else f"brick {source}"
