"""Pooled states of a brick's prompts, kept beside its card, so that routers are fitted without running the base again.

All statistics follow from the states, also of folds that hold prompts out. The prompts themselves are not in the file, only digests of
them.

states       [prompt or copy, window, hidden size], float32; see `windows`
digests      [prompt or copy, 16], uint8: digest of each text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import WorkbenchError
from workbench.files import bytes_digest
from workbench.lazy import torch
from workbench.route.deciding.copies import copies
from workbench.route.features.hidden import POOLING, pooled, token_rows
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

FILE = "routing.safetensors"
"""Name of the file beside a card."""
_SHAPES = {"states": 3, "digests": 2}


@dataclass(frozen=True)
class KeptStates:
    """Pooled states of a brick's prompts and their copies.

    Attributes:
        states: [text, window, hidden size], float32.
        digests: Digest of each text, in the same order.
        layer: Number of decoder blocks whose output was pooled.
        window: Number of last tokens that were pooled.
        pooling: Version of the pooling.
    """

    states: Tensor
    digests: tuple[str, ...]
    layer: int
    window: int
    pooling: int

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {digest: row for row, digest in enumerate(self.digests)}

    def differs(self, layer: int, window: int) -> str | None:
        """Return how the states differ from those that a router needs; None if they fit."""
        if self.layer != layer:
            return f"are of layer {self.layer}, and the router reads layer {layer}"
        if self.window != window:
            return f"are of the last {self.window} tokens, and the router reads the last {window}"
        if self.pooling != POOLING:
            return f"were pooled by version {self.pooling}, and this is version {POOLING}"
        return None

    def of(self, texts: Sequence[str]) -> Tensor | None:
        """Return the states [text, window, hidden size] of some texts; None if one of them is missing."""
        rows = [self._rows.get(text_digest(text)) for text in texts]
        return None if None in rows else self.states[torch.tensor(rows, dtype=torch.long)]

    def save(self, path: Path) -> dict[str, Tensor]:
        """Write the file, and return its tensors."""
        tensors = {
            "states": self.states.contiguous(),
            "digests": torch.tensor([list(bytes.fromhex(digest)) for digest in self.digests], dtype=torch.uint8),
        }
        save_tensors(tensors, path)
        return tensors


def text_digest(text: str) -> str:
    """Return the digest of a text as it is."""
    return bytes_digest(text.encode("utf-8", "surrogatepass"))


def measure_states(model: Any, tokenizer: Any, prompts: Sequence[str], layer: int, window: int) -> KeptStates:
    """Run the base over prompts and their copies.

    Args:
        model: The live base; no brick acts on it.
        tokenizer: Its tokenizer.
        prompts: The prompts of a brick.
        layer: Number of decoder blocks whose output is pooled.
        window: Number of last tokens that are pooled.
    """
    texts = list(dict.fromkeys(text for number, prompt in enumerate(prompts) for text in copies(prompt, number).values()))
    states = pooled(model, token_rows(tokenizer, texts), layer, window)
    return KeptStates(states, tuple(map(text_digest, texts)), layer, window, POOLING)


def read_states(path: Path, layer: int, window: int, pooling: int) -> tuple[KeptStates, dict[str, Tensor]]:
    """Read the file; the arguments that it does not hold come from the card.

    Returns:
        The states, and the file's tensors for their digest.

    Raises:
        WorkbenchError: If the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise WorkbenchError(f"{path} is missing") from None
    except SafetensorError as error:
        raise WorkbenchError(f"{path} is not a safetensors file: {str(error)[:100]}") from None
    older = 2 if pooling != POOLING else 3  # one window a text: such states are measured again, with a line that says so
    wrong = [
        n for n, dimensions in _SHAPES.items() if n not in tensors or tensors[n].ndim not in (dimensions, min(dimensions, older))
    ]
    if wrong or len(tensors["states"]) != len(tensors["digests"]):
        raise WorkbenchError(f"{path} is not a file of routing statistics: '{wrong[0] if wrong else 'digests'}' does not fit")
    digests = tuple(bytes(row).hex() for row in tensors["digests"].tolist())
    return KeptStates(tensors["states"], digests, layer, window, pooling), tensors
