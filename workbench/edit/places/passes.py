"""Forward passes for edits: a layer's inputs and outputs, added shifts, logits at some positions, and passes without what is known.

Earlier tokens and lower layers of a causal model do not depend on an edit. Their keys, values and hidden states are computed once for
all optimization steps (`upper`). Tokens that begin several rows of a batch are run once (`packer`). If a model does not give the same
numbers this way, whole rows are run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.edit.places.parts import Earlier, EditRow, Padded, Parts, padded
from workbench.ground.errors import WorkbenchError, refuses_memory
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import Stopped, additive_masks, cache_name, head_sees, hooked, shaped, states_of, windows

if TYPE_CHECKING:
    from torch import Tensor


@no_grad
def keys_and_values(parts: Parts, layer: int, batch: Padded) -> tuple[Tensor, Tensor]:
    """Return a projection's inputs and outputs at the lookup tokens; layers above it are not run.

    Args:
        parts: Parts of the model.
        layer: Layer of the output projection.
        batch: The rows.

    Returns:
        Inputs [row, d_in] and outputs [row, d_out].
    """
    recorded: list[Tensor] = []

    def record(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        recorded.extend(shaped(t, *batch.tokens.shape) for t in (args[0], output))
        raise Stopped

    with hooked(parts.out(layer), after=record):
        run(parts, batch)
    rows = torch.arange(len(batch.lookup), device=batch.lookup.device)
    first, second = (states[rows, batch.lookup].float() for states in recorded)
    return first, second


def run(parts: Parts, batch: Padded) -> Any:
    """Run a forward pass; return None if a hook ends it early."""
    inputs = batch.earlier.inputs() if batch.earlier else {"attention_mask": batch.mask, "use_cache": False}
    try:
        return parts.model(input_ids=batch.tokens, **inputs)
    except Stopped:
        return None


def logits_at(parts: Parts, places: Tensor) -> AbstractContextManager[None]:
    """Restrict the output head to some positions within the block: logits are [1, position, vocabulary].

    Raises:
        WorkbenchError: If the model has no output head.
    """
    head = parts.model.get_output_embeddings()
    if head is None:
        raise WorkbenchError(f"{type(parts.model).__name__} has no output head", "Edits need a causal language model.")
    return head_sees(head, places)


@contextmanager
def added(parts: Parts, layer: int, batch: Padded, shift: Tensor, rows: Tensor) -> Iterator[None]:
    """Add a shift to a projection's output at the lookup of each row, within the block.

    Args:
        parts: Parts of the model.
        layer: Layer of the output projection.
        batch: The rows.
        shift: [fact, d_out]; gradients flow into it.
        rows: [row], the index of the fact that a row belongs to.
    """
    positions = torch.arange(len(batch.lookup), device=batch.lookup.device) * batch.tokens.shape[1] + batch.lookup

    def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1])
        return flat.index_add(0, positions, shift[rows].to(output.dtype)).reshape(output.shape)

    with hooked(parts.out(layer), after=add):
        yield


def target_log_probabilities(logits: Tensor, batch: Padded, rows: int) -> tuple[Tensor, Tensor]:
    """Return each row's mean log-probability of its target tokens, and whether all of them are the most likely ones.

    Args:
        logits: [1, position, vocabulary], at `batch.places`.
        batch: The rows.
        rows: Number of rows.

    Returns:
        Two tensors [row].
    """
    scores = logits[0].float().log_softmax(-1)
    chosen = scores.gather(1, batch.targets[:, None])[:, 0]
    counts = torch.zeros(rows, device=chosen.device).index_add(0, batch.owner, torch.ones_like(chosen))
    mean = torch.zeros(rows, device=chosen.device).index_add(0, batch.owner, chosen) / counts
    right = (scores.argmax(-1) == batch.targets).float()
    top = torch.zeros(rows, device=chosen.device).index_add(0, batch.owner, right) == counts
    return mean, top


@no_grad
def score(parts: Parts, batch: Padded) -> tuple[Tensor, Tensor]:
    """Return `target_log_probabilities` of the model as it is."""
    with logits_at(parts, batch.places):
        return target_log_probabilities(run(parts, batch).logits, batch, len(batch.lookup))


def self_test(parts: Parts, layer: int, batch: Padded) -> float:
    """Check that a change of the output projection at one position reaches the block's output there, and no earlier position.

    The ratio is 1 in most families. Granite multiplies the output; if a norm follows the projection (Gemma 2 and 3, OLMo 2 and 3,
    GLM 4), the ratio is not constant. Values are optimized at the projection itself, so edits are correct in all cases.

    Args:
        parts: Parts of the model.
        layer: Layer of the output projection.
        batch: The rows.

    Returns:
        The mean ratio of the change at the block's output to the change of the projection's output.

    Raises:
        WorkbenchError: If the change does not arrive, or if earlier positions change.
    """
    rows = torch.arange(len(batch.lookup), device=batch.lookup.device)
    outputs: list[Tensor] = []

    def record(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(states_of(output, batch.tokens).float())
        raise Stopped

    with torch.no_grad(), hooked(parts.layers[layer], after=record):
        run(parts, batch)
        _, values = keys_and_values(parts, layer, batch)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(values.shape, generator=generator).to(values.device)
        shift = noise * (values.norm(dim=1, keepdim=True) + 1e-6) / noise.norm(dim=1, keepdim=True)
        with added(parts, layer, batch, shift, rows):
            run(parts, batch)
    change = outputs[-1] - outputs[0]
    arrived = change[rows, batch.lookup].norm(dim=1) / shift.norm(dim=1)
    before = max((float(change[i, : int(p)].abs().max()) for i, p in enumerate(batch.lookup) if p), default=0.0)
    if not bool((arrived > 1e-4).all()) or before > 1e-4 * float(shift.abs().max()):
        raise WorkbenchError(
            f"{parts.modules[layer]}: a change of its output has no effect on the block's output at the same position (ratio "
            f"{float(arrived.min()):.2g}), or changes earlier positions (by {before:.2g})",
            "Edits do not support this architecture. Please report it with its config.json.",
        )
    return float(arrived.mean())


# Largest difference of a row's mean log-probability, in nats, that a different order of float32 sums explains.
TOLERANCE = 1e-3


@dataclass
class Upper:
    """Passes that start at a layer, and at each row's lookup where the model can.

    Attributes:
        parts: Parts of the model.
        layer: The layer.
        batch: The rows to run; their `lookup`, `places` and `owner` refer to their own tokens.
        states: The hidden states [row, position, width] at which a pass starts.
        in_tuples: Whether the model's layers return tuples.
        skips: Whether the layers below can be left out: they hand no numbers of chosen tokens to the next layer (GLM-5).
    """

    parts: Parts
    layer: int
    batch: Padded
    states: Tensor
    in_tuples: bool
    skips: bool

    def run(self) -> Any:
        """Run a forward pass; the layers below pass on what they get, and are restored after it."""

        def pass_through(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, None, None) if self.in_tuples else hidden

        def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, object]) -> Any:
            return ((self.states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.states})

        below = list(self.parts.layers[: self.layer]) if self.skips else []
        with self.parts.layers[self.layer].register_forward_pre_hook(enter, with_kwargs=True):
            try:
                for module in below:
                    module.forward = pass_through
                return run(self.parts, self.batch)
            finally:
                for module in below:
                    module.__dict__.pop("forward", None)

    def keep_rows(self, rows: Tensor) -> None:
        """Run only some of the rows from now on, given in ascending order."""
        self.batch, self.states = self.batch.kept(rows), self.states[rows]


def upper(parts: Parts, layer: int, batch: Padded) -> Upper:
    """Prepare passes of only the layers from one on, and only the tokens from each row's lookup on.

    Args:
        parts: Parts of the model; its weights below the layer must not change as long as passes are run.
        layer: The edited layer.
        batch: Whole rows.
    """
    batch = _from_lookup(parts, batch)
    hidden_states: list[Tensor] = []
    first: list[Any] = []

    def record(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden_states.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise Stopped

    note = hooked(parts.layers[0], after=lambda _module, _args, output: first.append(output))
    with torch.no_grad(), note, parts.layers[layer].register_forward_pre_hook(record, with_kwargs=True):
        run(parts, batch)
    output = first[0] if first and isinstance(first[0], tuple) else ()
    # Weights of the attention, which some layers return too, are for the caller alone.
    skips = not any(isinstance(other, torch.Tensor) and not other.is_floating_point() for other in output[1:])
    return Upper(parts, layer, batch, hidden_states[0], bool(output), skips)


def _from_lookup(parts: Parts, batch: Padded) -> Padded:
    """Return the tokens from each row's lookup on, with a cache of the earlier ones; the whole batch if that is not supported.

    Models without an argument for a cache or for positions ignore them, or fail: BLOOM, MPT, GPT-1, Reformer. Others fail at a cache of
    keys and values alone (state-space layers), or at a mask of one's own. What a model does depends on its architecture and on lengths,
    so that the rows with the most tokens, and with the most and the fewest before their lookup, stand for all.
    """
    if int(batch.lookup.max()) < 2:
        return batch
    chosen = {int(batch.mask.sum(1).argmax()), int(batch.lookup.argmax()), int(batch.lookup.argmin())}
    extremes = torch.tensor(sorted(chosen), device=batch.lookup.device)
    return _if_same_numbers(parts, batch, lambda: _with_cache(parts, batch), lambda rows: rows.kept(extremes))


def _if_same_numbers(parts: Parts, batch: Padded, make: Callable[[], Padded], tested: Callable[[Padded], Padded]) -> Padded:
    """Return another form of a batch if the model takes it and gives the same numbers for the tested rows, otherwise the batch."""
    taken = inspect.signature(parts.model.forward).parameters
    if not {cache_name(parts.model), "position_ids"} <= taken.keys():
        return batch
    try:
        other = make()
        expected, actual = (score(parts, tested(rows))[0] for rows in (batch, other))
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        if refuses_memory(error):
            raise
        return batch
    return other if float((expected - actual).abs().max()) < TOLERANCE else batch


PACKED = 256
"""Largest number of tokens that are packed: in the attention, all of them are the keys of each."""
Packer = Callable[[Sequence[EditRow]], Padded]


def packer(parts: Parts, rows: Sequence[EditRow]) -> Packer:
    """Return what makes a batch of rows: packed, or padded if the model does not give the same numbers for packed rows.

    Args:
        parts: Parts of the model.
        rows: All rows. As many as can be packed stand for all, because some models count the tokens between two: the shortest two, and
            the longest ones.
    """
    ordered, few, room = sorted(rows, key=lambda row: len(row.tokens)), list[EditRow](), PACKED
    for row in [*ordered[:2], *ordered[:1:-1]]:
        if len(row.tokens) <= room:
            few.append(row)
            room -= len(row.tokens)
    whole = padded(few, parts.model.device) if few else None
    if whole is None or _if_same_numbers(parts, whole, lambda: packed(parts, few), lambda rows: rows) is whole:
        return lambda chosen: padded(chosen, parts.model.device)
    return lambda chosen: packed(parts, chosen)


def packed(parts: Parts, rows: Sequence[EditRow]) -> Padded:
    """Return rows as one without padding, in which tokens that begin several rows stand once; with too many tokens, padded rows.

    Every token sees the ones before it in its own rows. `lookup` and `places` refer to the one row, `owner` to the given ones, so that
    `kept` cannot leave rows out.
    """
    numbers: dict[tuple[int, int], int] = {}  # (number of the token before, token) -> number
    chains = []
    for row in rows:
        chain = [-1]
        for token in row.tokens:
            chain.append(numbers.setdefault((chain[-1], token), len(numbers)))
        chains.append(torch.tensor(chain[1:]))
    batch, count = padded(rows, parts.model.device), len(numbers)
    if count > PACKED:
        return batch
    visible, positions = torch.zeros(1, count, count, dtype=torch.bool), torch.zeros(1, count, dtype=torch.long)
    for own in chains:
        visible[0, own[:, None], own] |= torch.ones(len(own), len(own)).tril().bool()
        positions[0, own] = torch.arange(len(own))
    device, config = batch.tokens.device, parts.model.config
    tokens = torch.tensor([[token for _, token in numbers]])
    visible, positions, tokens = visible.to(device), positions.to(device), tokens.to(device)
    attention = additive_masks(visible, positions, positions, windows(config), parts.model.dtype)
    at = torch.nn.utils.rnn.pad_sequence(chains, batch_first=True).to(device)
    lookup = at.gather(1, batch.lookup[:, None])[:, 0]
    rest = Earlier((), attention, positions, cache_name(parts.model))
    return replace(
        batch, tokens=tokens, mask=torch.ones_like(tokens), lookup=lookup, places=at.flatten()[batch.places], earlier=rest
    )


def _with_cache(parts: Parts, batch: Padded) -> Padded:
    """Return the tail of a batch with a cache of its own."""
    from transformers import DynamicCache

    device, rows = batch.tokens.device, len(batch.lookup)
    earlier_width, width = int(batch.lookup.max()), int((batch.mask.sum(1) - batch.lookup).max())
    name, kinds, dtype = cache_name(parts.model), windows(parts.model.config), parts.model.dtype
    full = DynamicCache()  # without the configuration, sliding layers keep all tokens; the mask hides those outside the window
    body = getattr(parts.model, parts.model.base_model_prefix, parts.model)
    with torch.no_grad():
        body(
            input_ids=batch.tokens[:, :earlier_width],
            attention_mask=batch.mask[:, :earlier_width],
            use_cache=True,
            **{name: full},
        )
    cached = [(cached.keys, cached.values) for cached in full.layers]
    offsets = torch.arange(width, device=device)
    index = batch.lookup[:, None] + offsets
    exists = index < batch.tokens.shape[1]
    index = index.clamp(max=batch.tokens.shape[1] - 1)
    tokens = batch.tokens.gather(1, index)
    mask = batch.mask.gather(1, index) * exists
    positions = batch.lookup[:, None] + offsets
    earlier = torch.arange(earlier_width, device=device).expand(rows, -1)
    sees_earlier = (earlier < batch.lookup[:, None])[:, None, :].expand(-1, width, -1)
    sees_own = (offsets[:, None] >= offsets)[None].expand(rows, -1, -1)
    visible = torch.cat((sees_earlier, sees_own), 2)
    attention = additive_masks(visible, positions, torch.cat((earlier, positions), 1), kinds, dtype)

    row, place = batch.places // batch.tokens.shape[1], batch.places % batch.tokens.shape[1]
    places = row * width + place - batch.lookup[row]
    rest = Earlier(cached, attention, positions, name)
    return replace(batch, tokens=tokens, mask=mask, lookup=torch.zeros_like(batch.lookup), places=places, earlier=rest)
