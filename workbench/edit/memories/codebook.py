"""A codebook at one decoder block of a live model: inputs near a stored key get the key's value for an output.

The rule is applied position by position, so it needs to know nothing of prompts: where the block's input x lies within a key's radius,

    y(x) = v_i,   i = argmin_j { |x - k_j| : |x - k_j| <= r_j },   else the block's own output,

is the same in a batch, in a packed row, behind a shared prefix and in cached decoding. A position outside all balls keeps the very bits that
the block gave. The output of a block changes no input of the same block, at this position or a later one: whether a text is in scope does
not depend on what the codebook does to it. Hidden states of the whole block are taken, not of its feed-forward part, so that norms behind
that part, multipliers of the residual stream and experts make no difference. (Hartvigsen et al. 2023, GRACE, arXiv 2211.11031.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Float32 products cancel: |x|² - 2xk + |k|² is off by a share of |x|² + |k|² (TF32 on GPUs included). What is nearer than that is computed exactly.
_CANCELLED = 4e-3
_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Codebook:
    """Keys [entries, inputs], values [entries, outputs], radii [entries]; float32."""

    keys: Tensor
    values: Tensor
    radii: Tensor

    def to(self, device: torch.device) -> Codebook:
        """The same on a device."""
        return Codebook(self.keys.to(device), self.values.to(device), self.radii.to(device))

    def lookup(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `states` [rows, inputs] that lie in a ball, and the nearest entry of each; both [hits]."""
        step = max(1, _ELEMENTS // max(1, len(self.keys)))
        parts = [self._near(states[i : i + step].float(), i) for i in range(0, len(states), step)]
        row, entry, distance = (torch.cat(part) for part in zip(*parts, strict=True))
        nearest = torch.full((len(states),), torch.inf, device=states.device).scatter_reduce(0, row, distance, "amin")
        first = torch.full((len(states),), len(self.keys), device=states.device)  # of entries at one distance
        closest = distance == nearest[row]
        first = first.scatter_reduce(0, row[closest], entry[closest], "amin")
        hits = (first < len(self.keys)).nonzero()[:, 0]
        return hits, first[hits]

    def _near(self, states: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """(row, entry, distance) of every pair that lies within the radius; rows are numbered from `start`."""
        size = states.square().sum(1)[:, None] + self.keys.square().sum(1)
        rough = size - 2 * states @ self.keys.T
        row, entry = (rough <= self.radii.square() + _CANCELLED * size).nonzero(as_tuple=True)
        distance = (states[row] - self.keys[entry]).norm(dim=1)
        within = distance <= self.radii[entry]
        return row[within] + start, entry[within], distance[within]

    def attach(self, block: nn.Module) -> Any:
        """Replace the block's outputs; returns the hook's handle, whose `remove` undoes it."""
        held = {"codebook": self}

        def replace(states: Tensor, output: Tensor) -> Tensor | None:
            if held["codebook"].keys.device != output.device:
                held["codebook"] = self.to(output.device)
            book = held["codebook"]
            rows, entries = book.lookup(states)
            if not len(rows):
                return None
            return output.index_put((rows,), book.values[entries].to(output.dtype))

        return _hook(block, replace)


def radii(keys: Sequence[Tensor], answers: Sequence[Sequence[int]], reach: Sequence[Tensor], share: float) -> list[Tensor]:
    """Radius of every entry: a share of the distance to the nearest state that must answer something else.

    Such a state is another fact's key with another rest of the answer, or what the fact itself was measured against (`reach`). With a share of
    at most one half, balls of different answers do not meet: GRACE's split on a clash. Keys with the same rest of the answer do not bound each
    other: its expansion on the same label. Every distance is a sum over one pair of keys, so the radii do not depend on the order of facts,
    and those of a memory without a fact are those of a memory that never had it.

    Args:
        keys: [entries, inputs] of each fact.
        answers: Tokens that each fact's entries predict, one an entry.
        reach: [entries] of each fact: distance to the nearest state of its own foreign prompts.
        share: Of that distance.
    """
    labels = [tuple(answer[i:]) for answer in answers for i in range(len(answer))]
    owners = torch.tensor([i for i, answer in enumerate(answers) for _ in answer])
    every = torch.cat(list(keys))
    codes = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    kind = torch.tensor([codes[label] for label in labels])
    found: list[Tensor] = []
    for start in range(0, len(every), 256):
        rough = torch.cdist(every[start : start + 256], every)
        foreign = (kind[start : start + 256, None] != kind) & (owners[start : start + 256, None] != owners)
        rough = rough.masked_fill(~foreign, torch.inf)
        near = rough.topk(min(8, len(every)), largest=False).indices
        exact = (every[start : start + 256, None] - every[near]).double().square().sum(-1).sqrt().float()
        exact = exact.masked_fill(~foreign.gather(1, near), torch.inf)
        found.append(exact.amin(1))
    nearest = torch.minimum(torch.cat(found), torch.cat(list(reach)))
    return list(torch.split(share * nearest, [len(k) for k in keys]))


@contextmanager
def reading(block: nn.Module) -> Iterator[list[Tensor]]:
    """Inputs and outputs of a block while a model runs: after each pass the list is [inputs, outputs], both [positions, width]."""
    seen: list[Tensor] = []

    def keep(states: Tensor, output: Tensor) -> None:
        seen[:] = [part.detach().float() for part in (states, output)]

    hook = _hook(block, keep)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def writing(block: nn.Module, places: Tensor, values: Tensor) -> Iterator[None]:
    """Outputs of a block at some positions (of [batch, time], flattened) are `values` [places, width] while a model runs."""
    hook = _hook(block, lambda _, output: output.index_put((places,), values.to(output.dtype)))
    try:
        yield
    finally:
        hook.remove()


def _hook(block: nn.Module, change: Callable[[Tensor, Tensor], Tensor | None]) -> Any:
    """Hook a decoder block: `change` gets its inputs and outputs, [positions, width], and gives new outputs or None.

    Where it gives None the block's own output object goes on. Some families' blocks return a tuple, whose first part is the output.
    """

    def act(_block: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
        states = inputs[0] if inputs else given["hidden_states"]
        first = output if isinstance(output, Tensor) else output[0]
        changed = change(states.reshape(-1, states.shape[-1]), first.reshape(-1, first.shape[-1]))
        if changed is None:
            return None
        changed = changed.view_as(first)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    return block.register_forward_hook(act, with_kwargs=True)
