"""A codebook at one decoder block of a live model: for inputs near a stored key, the key's value replaces the block's output.

The rule applies to each position on its own. If the block's input x lies within a key's radius,

    y(x) = v_i,   i = argmin_j { |x - k_j| : |x - k_j| <= r_j },   else the block's own output.

The result is therefore the same in a batch, in a packed row, after a shared prefix and in cached decoding. A position outside all
balls keeps the block's output bit for bit. The output of a block is not an input of the same block at this or a later position,
so the codebook's own outputs do not decide whether a text is in scope. Keys and values are hidden states of the whole block
rather than of its feed-forward part, so that norms after that part, multipliers of the residual stream and experts make no
difference.

Source: Hartvigsen et al. 2023, GRACE, arXiv 2211.11031.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.ground.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


# |x|² - 2xk + |k|² suffers from cancellation: its error is up to this share of |x|² + |k|² (with TF32 on GPUs). Pairs that may lie
# within the radius are computed exactly.
_CANCELLED = 4e-3
_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Codebook:
    """Keys [entries, inputs], values [entries, outputs] and radii [entries], all float32."""

    keys: Tensor
    values: Tensor
    radii: Tensor

    def to(self, device: torch.device) -> Codebook:
        """Return the codebook on a device."""
        return Codebook(self.keys.to(device), self.values.to(device), self.radii.to(device))

    def lookup(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the states that lie within a ball.

        Args:
            states: [rows, inputs].

        Returns:
            Indices of the rows, of the nearest entry for each, and the distance from it; each [hits].
        """
        step = max(1, _ELEMENTS // max(1, len(self.keys)))
        parts = [self._pairs_within_radius(states[i : i + step].float(), i) for i in range(0, len(states), step)]
        row, entry, distance = (torch.cat(part) for part in zip(*parts, strict=True))
        nearest = torch.full((len(states),), torch.inf, device=states.device).scatter_reduce(0, row, distance, "amin")
        first = torch.full((len(states),), len(self.keys), device=states.device)  # ties go to the first entry
        closest = distance == nearest[row]
        first = first.scatter_reduce(0, row[closest], entry[closest], "amin")
        hits = (first < len(self.keys)).nonzero()[:, 0]
        return hits, first[hits], nearest[hits]

    def _pairs_within_radius(self, states: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (row, entry, distance) of every pair within the radius; rows are numbered from `start`."""
        size = states.square().sum(1)[:, None] + self.keys.square().sum(1)
        rough_squared = size - 2 * states @ self.keys.T
        row, entry = (rough_squared <= self.radii.square() + _CANCELLED * size).nonzero(as_tuple=True)
        distance = (states[row] - self.keys[entry]).norm(dim=1)
        within_radius = distance <= self.radii[entry]
        return row[within_radius] + start, entry[within_radius], distance[within_radius]

    def attach(self, block: nn.Module) -> Any:
        """Attach the codebook to a block; return the hook's handle, whose `remove` detaches it."""
        current = {"codebook": self}

        def replace(states: Tensor, output: Tensor) -> Tensor | None:
            if current["codebook"].keys.device != output.device:
                current["codebook"] = self.to(output.device)
            book = current["codebook"]
            rows, entries, _ = book.lookup(states)
            if not len(rows):
                return None
            return output.index_put((rows,), book.values[entries].to(output.dtype))

        return _hook_block(block, replace)


@dataclass(frozen=True)
class Attached:
    """A codebook at a block of a live model (`model.codebook`).

    Attributes:
        facts: The fact of each entry, as a sentence.
    """

    book: Codebook
    block: nn.Module
    facts: Sequence[str]

    @contextmanager
    def noting(self) -> Iterator[list[str]]:
        """Say in a list, at the end of the block, which facts' entries replaced outputs within it, and how near they were."""
        seen: dict[str, dict[int, float]] = {}
        found: list[str] = []

        def note(states: Tensor, _: Tensor) -> None:
            _rows, entries, distances = self.book.to(states.device).lookup(states)
            for entry, distance in zip(entries.tolist(), distances.tolist(), strict=True):
                seen.setdefault(self.facts[entry], {}).setdefault(entry, distance)

        with _hook_block(self.block, note):
            yield found
        for fact, distances in seen.items():
            entry, distance = next(iter(distances.items()))
            used = f"{len(distances)} of {self.facts.count(fact)} entries"
            found.append(f"{fact} ({used}; the first at distance {distance:.3g}, radius {float(self.book.radii[entry]):.3g})")


def radii(keys: Sequence[Tensor], answers: Sequence[Sequence[int]], reach: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return the radius of every entry: a share of the distance to the nearest state that needs another answer.

    Such a state is another fact's key with a different rest of the answer, or a state of the fact's own foreign prompts
    (`reach`). With a share of at most one half, balls with different answers do not overlap (GRACE splits them on a clash). Keys
    with the same rest of the answer do not limit each other (GRACE expands them). Every distance depends on one pair of keys
    only, so radii do not depend on the order of facts, and removing a fact gives the same memory as never adding it.

    Args:
        keys: For each fact, [entries, inputs].
        answers: For each fact, the token that each entry predicts.
        reach: For each fact, [entries]: distance to the nearest state of its own foreign prompts.
        share: Radius as a share of the distance.
    """
    labels = [tuple(answer[i:]) for answer in answers for i in range(len(answer))]
    owners = torch.tensor([i for i, answer in enumerate(answers) for _ in answer])
    all_keys = torch.cat(list(keys))
    codes = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    label_codes = torch.tensor([codes[label] for label in labels])
    nearest_foreign: list[Tensor] = []
    for start in range(0, len(all_keys), 256):
        approximate = torch.cdist(all_keys[start : start + 256], all_keys)
        is_foreign = (label_codes[start : start + 256, None] != label_codes) & (owners[start : start + 256, None] != owners)
        approximate = approximate.masked_fill(~is_foreign, torch.inf)
        nearest_indices = approximate.topk(min(8, len(all_keys)), largest=False).indices
        distances = (all_keys[start : start + 256, None] - all_keys[nearest_indices]).double().square().sum(-1).sqrt().float()
        distances = distances.masked_fill(~is_foreign.gather(1, nearest_indices), torch.inf)
        nearest_foreign.append(distances.amin(1))
    nearest = torch.minimum(torch.cat(nearest_foreign), torch.cat(list(reach)))
    return list(torch.split(share * nearest, [len(k) for k in keys]))


@contextmanager
def reading(block: nn.Module) -> Iterator[list[Tensor]]:
    """Record a block's inputs and outputs: after each forward pass the list is [inputs, outputs], both [positions, width]."""
    recorded: list[Tensor] = []

    def record(states: Tensor, output: Tensor) -> None:
        recorded[:] = [part.detach().float() for part in (states, output)]

    with _hook_block(block, record):
        yield recorded


@contextmanager
def writing(block: nn.Module, places: Tensor, values: Tensor) -> Iterator[None]:
    """Set the block's outputs at some positions (of [batch, time], flattened) to `values` [places, width]."""
    with _hook_block(block, lambda _, output: output.index_put((places,), values.to(output.dtype))):
        yield


def _hook_block(block: nn.Module, change: Callable[[Tensor, Tensor], Tensor | None]) -> Any:
    """Register a forward hook that may replace a decoder block's output.

    If `change` returns None, the block's own output object is passed on. Blocks of some families return a tuple whose first part
    is the output.

    Args:
        block: The decoder block.
        change: Called with the block's inputs and outputs, [positions, width]; returns new outputs or None.
    """

    def act(_block: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Tensor], output: Any) -> Any:
        states = inputs[0] if inputs else kwargs["hidden_states"]
        first = output if isinstance(output, torch.Tensor) else output[0]
        changed = change(states.reshape(-1, states.shape[-1]), first.reshape(-1, first.shape[-1]))
        if changed is None:
            return None
        changed = changed.view_as(first)
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    return block.register_forward_hook(act, with_kwargs=True)
