"""What edits write to and read: decoder layers with their feed-forward output projections, and facts as rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from workbench.adapters.lora import Places
from workbench.facts.facts import Fact, joined
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.architecture import is_conv1d
from workbench.models.hooks import feed_forward_mixers, hidden_width, is_attention, output_projections
from workbench.models.layout import stack_prefix
from workbench.models.prompts import PromptPair, as_message, encode_pair
from workbench.models.texts import side_by_side

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.steps import MethodContext


INSTEAD = "Use `edit: memory`, which stores facts outside the weights and works with every architecture."


@dataclass(frozen=True)
class Parts:
    """Parts of a live decoder-only model that edits use.

    Attributes:
        model: The live model.
        layers: Its decoder layers.
        prefix: Live name of the layers: "model.layers".
        modules: Layer -> live name of the feed-forward output projection. In Nemotron-H only some layers have one.
        tensors: Layer -> name on disk of that projection's weight.
        transposed: Whether those weights are stored as [in, out] (Conv1D).
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    prefix: str
    modules: Mapping[int, str]
    tensors: Mapping[int, str]
    transposed: bool

    @classmethod
    def find(cls, context: MethodContext) -> Parts:
        """Find the parts of a context's model.

        The output projection of a layer is the last linear module outside the attention that a one-token forward pass runs and
        whose output is as wide as the hidden state. Of a mixture, it is that of the shared expert, which all tokens pass; layers
        without a shared expert have none.

        Raises:
            WorkbenchError: If the model has state-space layers, only mixtures without a shared expert, or another layer without such
                a projection.
        """
        model = context.model
        prefix = stack_prefix(model, context.layout.layout.depth)
        layers = model.get_submodule(prefix)
        assert isinstance(layers, torch.nn.ModuleList)
        places = feed_forward_mixers(layers)
        if not places:
            _refuse_states(model, layers)
            places = list(range(len(layers)))
        modules = output_projections(model, prefix, places, context.device)
        mixtures = [number for number in places if _routes(layers[number])]
        modules = {number: name for number, name in modules.items() if number not in mixtures or ".shared_" in name}
        places = [number for number in places if number in modules or number not in mixtures]
        if not places:
            raise WorkbenchError(
                f"layer 0 of {type(model).__name__} routes tokens to experts, and no linear output of a shared expert was found: edits of "
                "weights need a feed-forward part that all tokens pass",
                INSTEAD,
            )
        if missing := [number for number in places if number not in modules]:
            raise WorkbenchError(
                f"layer {missing[0]} of {type(model).__name__} has no linear module outside the attention with {hidden_width(model)} outputs",
                f"Edits change the feed-forward output projection. {INSTEAD}",
            )
        on_disk = Places(context.layout.weights.specs, context.layout.config)
        tensors: dict[int, str] = {}
        for number, module in modules.items():
            name = on_disk.whole(f"{module}.weight")
            if name is None:
                raise WorkbenchError(
                    f"{module}.weight: edits do not support a weight that transformers fuses or renames", INSTEAD
                )
            tensors[number] = name
        first = model.get_submodule(modules[places[0]])
        return cls(model, layers, prefix, modules, tensors, is_conv1d(first))

    @property
    def editable(self) -> list[int]:
        """Layers with a feed-forward output projection: all of them, except in models whose layers are one mixer each."""
        return sorted(self.modules)

    def nearest(self, layer: int) -> int:
        """Return the editable layer that is nearest to a layer; of two, the earlier one."""
        return min(self.editable, key=lambda other: (abs(other - layer), other))

    def out(self, layer: int) -> nn.Module:
        """Return a layer's feed-forward output projection."""
        module: nn.Module = self.model.get_submodule(self.modules[layer])
        return module

    def width(self, layer: int) -> int:
        """Return the number of inputs of a layer's output projection, which is the length of a key."""
        weight = self.out(layer).weight
        assert isinstance(weight, torch.Tensor)
        return int(weight.shape[0] if self.transposed else weight.shape[1])

    def check_layers(self, layers: tuple[int, ...], label: str) -> None:
        """Check that layers exist and can be edited.

        Args:
            layers: Layer indices.
            label: Start of the error message, such as "edit memit".

        Raises:
            WorkbenchError: If a layer does not exist or has no feed-forward part.
        """
        if bad := [i for i in layers if not 0 <= i < len(self.layers)]:
            raise InvalidRecipeError(f"{label}: layer {bad[0]} does not exist; the model has layers 0 to {len(self.layers) - 1}")
        if bad := [i for i in layers if i not in self.modules]:
            raise InvalidRecipeError(
                f"{label}: layer {bad[0]} has no feed-forward part to edit",
                f"Choose from the layers that have one: {', '.join(map(str, self.editable))}.",
            )

    @contextmanager
    def changed(self, updates: dict[int, Tensor]) -> Iterator[None]:
        """Add updates ΔW [out, in] to output projections within the block; the model's own weights are restored after it."""
        saved: dict[int, Tensor] = {}
        try:
            for layer, update in updates.items():
                weight = self.out(layer).weight
                assert isinstance(weight, torch.nn.Parameter)
                saved[layer] = weight.data
                added = update.T if self.transposed else update
                weight.data = weight.data + added.to(weight.device, weight.dtype)
            yield
        finally:
            for layer, data in saved.items():
                self.out(layer).weight.data = data


def _routes(layer: nn.Module) -> bool:
    """Return whether a layer has experts."""
    stacked = any(p.dim() == 3 and "conv" not in name for name, p in layer.named_parameters())
    return stacked or any(name.endswith("experts") for name, _ in layer.named_modules())


def _refuse_states(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Raise WorkbenchError if a layer has no attention, or a state-space part beside it."""
    for number, layer in enumerate(layers):
        names = [name for name, _ in layer.named_parameters()]
        attention = any(is_attention(name) for name, _ in layer.named_modules())
        if any(name.endswith("A_log") for name in names) or not attention:
            raise WorkbenchError(
                f"layer {number} of {type(model).__name__} is a state-space or recurrent layer: edits of weights need attention and a "
                "feed-forward part",
                INSTEAD,
            )


Position = Literal["subject_last", "prompt_last"]
LONGEST = 512
"""Largest number of tokens of a prompt with its target."""


@dataclass(frozen=True)
class EditRow:
    """Tokens of a prompt, or of a prompt and its target.

    Attributes:
        tokens: All input tokens. The last target token is left out if its prediction is not needed.
        lookup: Index of the token at which the fact is looked up.
        start: Index of the prompt's last token, which predicts the first target token.
        target: Tokens of the target.
        span: Index of the subject's first token, and the index after its last token.
    """

    tokens: tuple[int, ...]
    lookup: int
    start: int
    target: tuple[int, ...]
    span: tuple[int, int]

    @property
    def prompt(self) -> EditRow:
        """The row without the target: its prompt's last token predicts the first target token."""
        return replace(self, tokens=self.tokens[: self.start + 1], target=self.target[:1])


@dataclass(frozen=True)
class Padded:
    """Rows padded on the right, where a causal model does not see the padding.

    Attributes:
        tokens: [row, position].
        mask: [row, position], 1 for tokens and 0 for padding.
        lookup: [row], position of the lookup.
        places: Flat indices into [row · position] of all positions that predict a target token, row by row.
        targets: The target token at each of these positions.
        owner: The row of each of these positions.
        earlier: What the tokens see of others that were run before; None if the rows are whole.
    """

    tokens: Tensor
    mask: Tensor
    lookup: Tensor
    places: Tensor
    targets: Tensor
    owner: Tensor
    earlier: Earlier | None = None

    def kept(self, rows: Tensor) -> Padded:
        """Return some of the rows, given in ascending order."""
        width, number = self.tokens.shape[1], torch.full_like(self.lookup, -1)
        number[rows] = torch.arange(len(rows), device=rows.device)
        owner = number[self.owner]
        own = owner >= 0
        places = owner[own] * width + self.places[own] % width
        earlier = self.earlier.kept(rows) if self.earlier else None
        return Padded(self.tokens[rows], self.mask[rows], self.lookup[rows], places, self.targets[own], owner[own], earlier)


@dataclass(frozen=True)
class Earlier:
    """Tokens that were run before those of a batch.

    Attributes:
        cached: Of each layer the keys and values [row, head, position, width].
        attention: The model's `attention_mask`, one tensor or one for each kind of attention: [row, 1, query, key].
        positions: [row, position] of the batch's own tokens.
        cache: Name of the model's argument for a cache.
    """

    cached: Sequence[tuple[Tensor, Tensor]]
    attention: Tensor | dict[str, Tensor]
    positions: Tensor
    cache: str

    def inputs(self) -> dict[str, object]:
        """Return the model's inputs other than the tokens, with a new cache, because a pass adds to it."""
        if not self.cached:
            return {"attention_mask": self.attention, "position_ids": self.positions, "use_cache": False}
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.cached):
            cache.update(keys, values, number)
        return {"attention_mask": self.attention, "position_ids": self.positions, "use_cache": True, self.cache: cache}

    def kept(self, rows: Tensor) -> Earlier:
        """Return what some of the rows see."""
        masks = self.attention
        attention = {kind: mask[rows] for kind, mask in masks.items()} if isinstance(masks, dict) else masks[rows]
        return Earlier([(keys[rows], values[rows]) for keys, values in self.cached], attention, self.positions[rows], self.cache)


def row_of(fact: Fact, tokenizer: PreTrainedTokenizerBase, position: Position, before: str = "", end: bool = False) -> EditRow:
    """Tokenize a fact's prompt and target.

    Args:
        fact: The fact.
        tokenizer: A fast tokenizer: character offsets tell which tokens belong to the subject.
        position: Token at which the fact is looked up; always the prompt's last token if the fact has no subject.
        before: Context before the prompt.
        end: Whether the target ends with the end-of-text token, if the tokenizer has one.

    Raises:
        WorkbenchError: If the tokenizer is not fast, or the prompt, the target or the subject has no tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise WorkbenchError(
            f"{type(tokenizer).__name__} has no character offsets, which edits need to find the subject's tokens",
            "Save the base with its fast tokenizer (tokenizer.json).",
        )
    text, shift = (f"{before}. {fact.text}", len(before) + 2) if before else (fact.text, 0)
    return _row(fact, tokenizer, fact_pair(fact, tokenizer, text), (shift, position, end))


def message_row(fact: Fact, tokenizer: Any, position: Position) -> EditRow | None:
    """Return a fact as a user's message, with the target as the answer; None if the tokenizer has no template that words it."""
    text = as_message(tokenizer, fact.text)
    if text is None:
        return None
    pair = encode_pair(tokenizer, text, joined(text, fact.target))
    return _row(fact, tokenizer, pair, (text.index(fact.text), position, False))


def _row(fact: Fact, tokenizer: Any, pair: PromptPair, form: tuple[int, Position, bool]) -> EditRow:
    """Return the row of a fact's tokens; `form` is where its prompt begins in the text, the lookup's position, and whether it ends."""
    shift, position, end = form
    prompt, target = pair.prompt, tuple(pair.continuation)
    if end and tokenizer.eos_token_id is not None:
        target = (*target, int(tokenizer.eos_token_id))
    last = len(prompt) - 1
    span = (last, last + 1)
    if fact.span is not None:
        first, stop = fact.span[0] + shift, fact.span[1] + shift
        offsets = (pair.offsets or [])[: len(prompt)]  # a token that extends into the target belongs to the target
        in_subject = [i for i, (a, b) in enumerate(offsets) if a < stop and b > first]
        if not in_subject:
            raise WorkbenchError(
                f"{fact.place}: the subject {fact.subject!r} has no tokens of its own",
                "Rephrase the subject with words that the tokenizer knows.",
            )
        span = (in_subject[0], in_subject[-1] + 1)
    lookup = span[1] - 1 if position == "subject_last" else last
    return EditRow((*prompt, *target[:-1]), lookup, last, target, span)


def fact_pair(fact: Fact, tokenizer: Any, text: str | None = None) -> PromptPair:
    """Tokenize a fact's prompt and target as lm-eval does: as one text, with white space at the prompt's end moved to the target.

    Args:
        fact: The fact.
        tokenizer: The base's tokenizer.
        text: Prompt to use in place of the fact's own.

    Raises:
        WorkbenchError: If the prompt or the target has no tokens.
    """
    text = fact.text if text is None else text
    pair = encode_pair(tokenizer, text, fact.continuation, "continuation")
    if not pair.prompt or not pair.continuation:
        empty_text = fact.continuation if pair.prompt else text
        raise WorkbenchError(
            f"{fact.place or fact.id}: {empty_text!r} has no tokens in the base's vocabulary",
            "Rephrase the fact with words that the tokenizer knows.",
        )
    return pair


def check_rows(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, longest: int, end: bool = False) -> None:
    """Check that all facts can be tokenized and are not too long.

    Args:
        facts: The facts.
        tokenizer: The base's tokenizer.
        longest: Largest number of tokens of a prompt with its target; a target may have half of them.
        end: Whether targets must end with the end-of-text token.

    Raises:
        WorkbenchError: If a fact is too long, `row_of` rejects it, or the tokenizer has no such token.
    """
    if end and tokenizer.eos_token_id is None:
        raise WorkbenchError(
            "`end_of_text` needs an end-of-text token, and the base's tokenizer has none", "Set `end_of_text: false`."
        )
    for fact in facts:
        row = row_of(fact, tokenizer, "subject_last")
        if len(row.target) > longest // 2 or len(row.tokens) > longest:
            raise WorkbenchError(
                f"{fact.place}: prompt and target have {row.start + 1 + len(row.target)} tokens ({len(row.target)} of them in the target); "
                f"at most {longest} tokens are allowed, {longest // 2} in the target",
                "Shorten the fact, or split it into several facts.",
            )


def padded(rows: Sequence[EditRow], device: torch.device) -> Padded:
    """Pad rows to a batch on a device."""
    batch = side_by_side([row.tokens for row in rows], device)
    width = batch.tokens.shape[1]
    places = [i * width + row.start + j for i, row in enumerate(rows) for j in range(len(row.target))]
    targets = [token for row in rows for token in row.target]
    owners = [i for i, row in enumerate(rows) for _ in row.target]
    lookup = [row.lookup for row in rows]

    def on_device(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(device)

    return Padded(batch.tokens, batch.mask, on_device(lookup), on_device(places), on_device(targets), on_device(owners))
